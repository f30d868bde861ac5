"""What the data doctor says of pairs that were made."""

from __future__ import annotations

from pathlib import Path

from dpo_studio.config import ModelSection, SourceSection
from dpo_studio.doctor.findings import DataReport
from dpo_studio.errors import DataError
from dpo_studio.paths import user_path
from dpo_studio.preferences.sources import open_pairs
from dpo_studio.runs.folder import is_run
from dpo_studio.workflows.pairs.checking import check_source

__all__ = ["look_at_made"]


def look_at_made(out: Path, model: str, held_out: str | None) -> DataReport:
    """The checks of `dpo data check`, with the tokenizer of the first model where it is one of this machine.

    A run or a server has no folder of its own tokenizer: then the text alone is looked at. Prompts without answers
    hold nothing out that the doctor could compare with.
    """
    local = not model.startswith("server:") and not is_run(user_path(model))
    local = local and not (user_path(model) / "adapter_config.json").is_file()
    section = ModelSection(path=model) if local else None
    return check_source(SourceSection(source=str(out)), held_out=_pairs(held_out), model=section, max_length=4096)


def _pairs(held_out: str | None) -> SourceSection | None:
    """The held-out source, if it is one of pairs."""
    if held_out is None:
        return None
    section = SourceSection(source=held_out)
    try:
        open_pairs(section)
    except DataError:
        return None
    return section
