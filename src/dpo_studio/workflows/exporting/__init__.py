"""`dpo export` and `dpo quantize`: what leaves, looked at again before it is done."""

from dpo_studio.workflows.exporting.run import Quantising, export_run

__all__ = ["Quantising", "export_run"]
