"""A source's name -> its numbered raw rows: a file, a folder, a Hub dataset, the bundled pairs; or a sample of them.

A row's number counts from 0 over the split as it is read, before any sampling, so that a message, a refusal and a line
of `dpo score` all mean the same row.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from dpo_studio.config import BUNDLED, SourceSection
from dpo_studio.errors import DataError
from dpo_studio.preferences import bounds
from dpo_studio.preferences.bounds import numbered
from dpo_studio.preferences.files import SUFFIXES, UNREAD, file_rows
from dpo_studio.preferences.tables import arrow_rows, batch_rows
from dpo_studio.reading import is_own_stream, read_json, shown_path

__all__ = ["read_rows", "sample"]

_BUNDLED_FOLDER = Path(__file__).parent / "bundled"
_SAVE_AGAIN = "save it again with `save_to_disk`, or as Parquet"
_SAVED_BY_DATASETS = {"dataset_dict.json", "state.json"}
_NOT_DATA = _SAVED_BY_DATASETS | {"dataset_info.json", "dataset_infos.json"}
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[^/:]+))?")
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("held_out", "held-out", "heldout"), "held_out"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_WORDS)})(?![a-z])")
_NOT_ON_THE_HUB = (*SUFFIXES, ".gz", *UNREAD)  # a name that ends so was meant as a file
_ROWS_AT_ONCE = 1024
_MAX_STATE = 4_000_000
"""Bytes of the description that `datasets` writes of a saved set: a thousand shards take a hundred thousand."""

T = TypeVar("T")


def read_rows(section: SourceSection, *, seed: int) -> Iterator[tuple[int, object]]:
    """Number and content of every row of the source, or of a seeded sample of `section.rows` of them."""
    rows = _rows(section, seed)
    return rows if section.rows is None else iter(sample(rows, section.rows, seed=seed))


def sample(numbered: Iterable[tuple[int, T]], count: int, *, seed: int) -> list[tuple[int, T]]:
    """`count` of the numbered things, in order of number: those whose hash of (seed, number) is lowest.

    It needs one pass and memory for `count`; a sample of 100 lies inside the sample of 200; rows added at the end
    replace few of those chosen before. `random.sample` has none of the three.
    """
    return sorted(heapq.nsmallest(count, numbered, key=lambda item: _rank(seed, item[0])), key=lambda item: item[0])


def _rank(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"{seed}:{number}".encode()).digest()


# Which of the four kinds of source a name means


def _rows(section: SourceSection, seed: int) -> Iterator[tuple[int, object]]:
    name = section.source
    if name.startswith(BUNDLED):
        return enumerate(_bundled_rows(section))
    if is_own_stream(name):
        if section.split is not None:
            _choose_split(shown_path(name), ["train"], section.split)
        return numbered(file_rows(name), shown_path(name))
    head, _, split = name.rpartition(":")
    if (path := _existing(name)) is not None:
        return _path_rows(path, section, section.split)
    if head and (path := _existing(head)) is not None:
        return _path_rows(path, section, _one_split(section, split))
    hub = _HUB_ID.fullmatch(name)
    if hub is None or _looks_like_a_path(name):
        advice = UNREAD.get(Path(name.partition(":")[0].lower()).suffix)
        where = f"looked in {shown_path(Path.cwd())}"
        hint = f"{where}; and such a file is not read: {advice}" if advice else where
        raise DataError(f"no such file or folder: {shown_path(name)}", hint=hint)
    return _hub_rows(hub["id"], hub["config"], _one_split(section, hub["split"]), section, seed)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, no such user, a NUL
        return None


def _looks_like_a_path(name: str) -> bool:
    without_split = name.partition(":")[0].lower()
    return name.startswith((".", "~", "/")) or "\\" in name or without_split.endswith(_NOT_ON_THE_HUB)


def _one_split(section: SourceSection, in_name: str | None) -> str | None:
    """The split asked for, in the source's name or in `section.split` but not in both."""
    if in_name and section.split is not None:
        raise DataError(
            f"{section.source}: the split is given twice, as :{in_name} and as split: {section.split}",
            hint="keep one of the two",
        )
    return in_name or section.split


def _choose_split(where: str, splits: list[str], wanted: str | None) -> str:
    """The split asked for, else train, else the only one there is. Several without a train are never mixed."""
    listed = ", ".join(splits)
    if wanted is not None:
        for name in (wanted, _SPLIT_WORDS.get(wanted)):
            if name in splits:
                return name
        raise DataError(f"{where} has no split {wanted!r}", hint=f"its splits: {listed}")
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataError(f"{where} has several splits and none is named train", hint=f"name one with split: {listed}")


def _bundled_rows(section: SourceSection) -> Iterator[object]:
    name, _, in_name = section.source.removeprefix(BUNDLED).partition(":")
    bundled = sorted(path.stem for path in _BUNDLED_FOLDER.glob("*.jsonl"))
    if name not in bundled:
        there = ", ".join(BUNDLED + name for name in bundled)
        raise DataError(f"no bundled pairs are called {name!r}", hint=f"there is {there}")
    rows = [cast("dict[str, object]", row) for row in file_rows(_BUNDLED_FOLDER / f"{name}.jsonl")]
    splits = list(dict.fromkeys(str(row["split"]) for row in rows))
    split = _choose_split(f"{BUNDLED}{name}", splits, _one_split(section, in_name))
    return ({key: value for key, value in row.items() if key != "split"} for row in rows if row["split"] == split)


# Files and folders


def _path_rows(path: Path, section: SourceSection, split: str | None) -> Iterator[tuple[int, object]]:
    if path.is_dir() and section.data_dir is not None:
        path /= section.data_dir
        if not path.is_dir():
            raise DataError(f"{section.source} has no folder {section.data_dir}", hint="data_dir names a sub-folder")
    if path.is_dir() and any((path / name).exists() for name in _SAVED_BY_DATASETS):
        return numbered(_saved_rows(path, split), shown_path(path))
    files = _folder_files(path, split) if path.is_dir() else [_single_file(path, split)]
    return numbered(itertools.chain.from_iterable(map(file_rows, files)), shown_path(path))


def _single_file(path: Path, split: str | None) -> Path:
    """A file is one split, `train` unless its name says otherwise; asking for another is a mistake."""
    if split is not None and split != path.name.split(".")[0]:
        _choose_split(str(path), [_split_of(Path(path.name))], split)
    return path


def _folder_files(folder: Path, wanted: str | None) -> list[Path]:
    """The data files of one split, sorted by their path in the folder."""
    by_split: dict[str, list[Path]] = {}
    named: list[Path] = []
    for file in sorted(_data_files(folder)):
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
        if file.name.split(".")[0] == wanted:
            named.append(file)
    if not by_split:
        raise DataError(f"{folder} contains no data files", hint=f"looked for {', '.join(SUFFIXES)}")
    if named and wanted not in by_split:
        return named
    return by_split[_choose_split(str(folder), sorted(by_split), wanted)]


def _data_files(folder: Path) -> Iterator[Path]:
    """What is named as data is data: a pipe or a broken link among them is reported when it is read."""
    for count, file in enumerate(folder.rglob("*")):
        if count >= bounds.LIMITS.files:
            raise DataError(
                f"{shown_path(folder)} contains over {bounds.LIMITS.files:,} files and folders",
                hint="name the folder of the data",
            )
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.name.lower().endswith(SUFFIXES) and file.name not in _NOT_DATA and not hidden and not file.is_dir():
            yield file


def _split_of(relative: Path) -> str:
    """The split a file belongs to, by its name or a folder's, much as `datasets` reads them; train without either."""
    if shard := _SHARD.match(relative.name):
        return shard["split"]
    for part in reversed(relative.parts):
        if words := _SPLIT_WORD.findall(part.lower()):
            return _SPLIT_WORDS[words[-1]]  # the last: alpaca_eval_train.jsonl is for training
    return "train"


# What the `datasets` library saved


def _saved_rows(folder: Path, split: str | None) -> Iterator[object]:
    """A folder that `save_to_disk` wrote: its own files alone, whatever it names."""
    if (folder / "dataset_dict.json").exists():
        splits = _member(folder / "dataset_dict.json", "splits")
        folder /= _plain(_choose_split(shown_path(folder), sorted(map(str, splits)), split), folder)
    files = _member(folder / "state.json", "_data_files")
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    if _state(folder / "state.json").get("_indices_files") or not names:
        raise DataError(f"{shown_path(folder)} is a selection of another set, or has no rows", hint=_SAVE_AGAIN)
    return itertools.chain.from_iterable(arrow_rows(folder / _plain(name, folder)) for name in names)


def _state(file: Path) -> dict[str, Any]:
    state = read_json(file, what="saved dataset", limit=_MAX_STATE, hint=_SAVE_AGAIN)
    if not isinstance(state, dict):
        raise DataError(f"{shown_path(file)} is damaged", hint=_SAVE_AGAIN)
    return state


def _member(file: Path, name: str) -> list[Any]:
    found = _state(file).get(name)
    if not isinstance(found, list):
        raise DataError(f"{shown_path(file)} is damaged: it has no list {name}", hint=_SAVE_AGAIN)
    return found


def _plain(name: Any, folder: Path) -> str:
    """A name of a member of the folder; it cannot point elsewhere."""
    if not isinstance(name, str) or not name or "\0" in name or name == ".." or Path(name).name != name:
        raise DataError(f"{shown_path(folder)} names a file that is not in it: {str(name)[:80]!r}", hint=_SAVE_AGAIN)
    return name


# What the `datasets` library downloads


def _hub_rows(
    repo: str, config: str | None, split: str | None, section: SourceSection, seed: int
) -> Iterator[tuple[int, object]]:
    import datasets  # 1.3 s, and only the Hub needs it

    try:
        loaded = datasets.load_dataset(repo, config, split=split, revision=section.revision, data_dir=section.data_dir)
    except Exception as error:  # the library and its HTTP client raise dozens of kinds; each is one line to the user
        raise _hub_error(section.source, error) from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_choose_split(section.source, sorted(loaded), None)]
    return _dataset_rows(loaded, section, seed)


def _dataset_rows(dataset: Any, section: SourceSection, seed: int) -> Iterator[tuple[int, object]]:
    """Rows as plain Python, through Arrow: no image or audio column is decoded. Sampled before it is read."""
    numbers: Iterable[int] = range(len(dataset))
    if section.rows is not None:
        numbers = [number for number, _ in sample(((n, None) for n in numbers), section.rows, seed=seed)]
        dataset = dataset.select(numbers)
    tables = dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    return zip(
        numbers, (row for table in tables for batch in table.to_batches() for row in batch_rows(batch)), strict=True
    )


def _hub_error(name: str, error: Exception) -> DataError:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if isinstance(error, ConnectionError) and offline:
        return DataError(
            f"{name} is not a file or folder here, nor a dataset in the cache, and HF_HUB_OFFLINE keeps the Hub away",
            hint="unset HF_HUB_OFFLINE to download it once, or name a file or folder",
        )
    if isinstance(error, ConnectionError):
        return DataError(
            f"{name} is not a file or folder here, and the Hub cannot be reached",
            hint="with a copy in the cache set HF_HUB_OFFLINE=1; without one name a file or folder",
        )
    if type(error).__name__ == "DatasetNotFoundError":
        return DataError(
            f"{name} is not a file or folder here, and not a dataset on the Hub that you may read",
            hint="check the spelling; for a private or gated one log in with `hf auth login`",
        )
    return DataError(f"{name} cannot be loaded: {_first_line(error)}", hint="the form is name[/config][:split]")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
