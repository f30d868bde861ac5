"""A model's folder on this machine: bundled, on disk, or fetched from the Hub."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dpo_studio.config import BUNDLED
from dpo_studio.errors import ModelError
from dpo_studio.models.bundled import bundled_folder
from dpo_studio.paths import user_path
from dpo_studio.scan import weights_of

__all__ = ["HUB_FILES", "find_folder", "is_on_disk", "is_whole"]

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
"""The last names the license, which an export's card repeats."""
_NO_HUB = "check the network, or download the model elsewhere and give its folder"


def is_on_disk(path: str) -> bool:
    """Whether a model's name means a folder, there or not: neither the bundled model nor a name on the Hub."""
    return not path.startswith(BUNDLED) and (_is_path(path) or user_path(path).exists())


def find_folder(path: str, revision: str | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """The local folder of a model; of the Hub's, safetensors and text files only.

    Raises:
        ModelError: no such folder, no such repository, or no network.
    """
    if path.startswith(BUNDLED):
        return bundled_folder(path, say)
    folder = user_path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or _is_path(path):
        raise ModelError(
            f"no such model folder: {path}", hint="give a folder, a Hub id, or bundled:smollm2-135m-instruct"
        )
    return _from_hub(path, revision, say)


def is_whole(folder: Path) -> bool:
    """Whether every weight file is there: a cache may have a part of a model after a broken download."""
    wanted = weights_of(folder, folder.name)
    return bool(wanted) and all(file.is_file() for file in wanted)


def _is_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _from_hub(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    try:
        with suppress(LocalEntryNotFoundError):
            cached = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_files_only=True)
            if is_whole(Path(cached)):
                return Path(cached)
        if not constants.HF_HUB_OFFLINE:
            say(f"fetching {name} from the Hub")
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a Hub id: {error}") from None
    except NoRevision:
        raise ModelError(f"{name} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no folder {name} here, and no such model on the Hub", hint="private or gated? run `hf auth login`"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            hint = "free some space, or point HF_HOME elsewhere"
            raise ModelError(f"{name} cannot be fetched: {error.strerror}", hint=hint) from None
        why = "HF_HUB_OFFLINE keeps the Hub away" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ModelError(f"{name} is not on this machine, and {why} ({type(error).__name__})", hint=_NO_HUB) from None
