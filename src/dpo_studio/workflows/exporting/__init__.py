"""`dpo export` and `dpo quantize`: exports, verified before they are finished."""

from dpo_studio.workflows.exporting.run import Quantising, export_run

__all__ = ["Quantising", "export_run"]
