"""Every place in the source that writes, found in its syntax tree: the gate, or a line of a list with its reason."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_names import name_of

SOURCE = Path(__file__).parent.parent / "src" / "dpo_studio"
GATE = frozenset({"disk.py", "writing.py"})

ALLOWED: dict[tuple[str, str], str] = {
    ("cache.py", "os.open"): "the lock beside an entry",
    ("cache.py", ".unlink"): "entries that are out of the cache, and their locks",
    ("cli/app.py", "os.open"): "/dev/null, where a stream was closed or nobody reads",
    ("cli/app.py", "open"): "/dev/null, where a stream was closed",
    ("runs/lock.py", ".mkdir"): "a run's folder, before its lock",
    ("runs/lock.py", ".unlink"): "the lock",
    ("runs/lock.py", ".rmdir"): "folders of a start that got no further, if nothing is in them",
    ("runs/lock.py", "os.open"): "the lock",
    ("reading.py", "os.open"): "to read",
    ("runs/folder.py", ".open"): "lines added to a run's own .jsonl",
    ("runs/folder.py", ".unlink"): "what a killed start of the same run left",
    ("learning/checkpoints.py", ".write_text"): "in a checkpoint's scratch folder",
    ("learning/checkpoints.py", "save_file"): "in a checkpoint's scratch folder",
    ("policy/whole.py", "save_file"): "in a checkpoint's scratch folder",
    ("workflows/launching.py", ".unlink"): "the status of a run's earlier start",
    ("learning/reference_cache.py", ".unlink"): "a damaged entry of the cache",
    ("learning/reference_cache.py", "os.utime"): "an entry was used now",
    ("learning/reference_cache.py", "sqlite3.connect"): "an entry of the cache",
    ("cache.py", "sqlite3.connect"): "an entry of the cache",
    ("models/adapters.py", ".mkdir"): "the adapter's folder in a run or a checkpoint",
    ("models/adapters.py", ".write_text"): "the adapter's settings there",
    ("models/adapters.py", "save_file"): "the adapter's weights there",
    ("models/bundled.py", ".open"): "in a scratch folder of the cache",
    ("models/bundled.py", ".save_pretrained"): "in a scratch folder of the cache",
    ("models/bundled.py", ".write_text"): "in a scratch folder of the cache",
    ("export/merge.py", ".save_pretrained"): "in an export's scratch folder",
    ("export/merge.py", ".write_text"): "in an export's scratch folder",
    ("export/merge.py", "shutil.copyfile"): "in an export's scratch folder",
    ("export/gptq_job.py", "os.fdopen"): "its own stdout",
    ("export/requantise.py", ".open"): "in an export's scratch folder",
    ("export/requantise.py", ".unlink"): "in an export's scratch folder",
    ("export/requantise.py", ".write_text"): "in an export's scratch folder",
    ("export/requantise.py", "save_file"): "in an export's scratch folder",
    ("export/whole.py", ".chmod"): "an export's own files, before it has its name",
    ("workflows/exporting/gguf.py", ".write_text"): "in an export's scratch folder",
    ("workflows/exporting/gguf.py", ".replace"): "in an export's scratch folder",
    ("workflows/exporting/run.py", ".mkdir"): "in an export's scratch folder",
    ("workflows/exporting/run.py", ".write_text"): "in an export's scratch folder",
    ("workflows/exporting/run.py", "save_file"): "in an export's scratch folder",
    ("workflows/exporting/quantizing.py", ".write_text"): "in an export's scratch folder",
    (
        "workflows/evaluating/run.py",
        ".unlink",
    ): "pages of an evaluation with more temperatures, in the run's own folder",
    ("workflows/training/run.py", ".unlink"): "the result of a run that is made longer",
    ("workflows/training/verifying.py", "tempfile.TemporaryDirectory"): "two runs that are compared and thrown away",
    ("cli/studio.py", ".open"): "the browser, at the studio's link",
    ("studio/store.py", "sqlite3.connect"): "the studio's own file",
    ("studio/store.py", ".touch"): "the studio's own file, for nobody else to read",
    ("studio/jobs.py", ".open"): "what a job says, in the studio's own folder",
    ("studio/runner.py", ".open"): "the mark of a job, in the studio's own folder, which must be new",
    ("studio/data_routes.py", ".mkdir"): "the folder of uploads",
    ("studio/pair_index.py", "sqlite3.connect"): "an index in the cache",
    ("studio/pair_index.py", ".replace"): "an index in the cache, from its scratch folder",
    ("studio/worker.py", "os.fdopen"): "its own stdout",
    ("reports/drawing.py", ".savefig"): "into memory",
    ("reports/svg.py", ".savefig"): "into memory",
}
"""(file, what it calls): why it may. In a scratch folder everything is gone unless the gate gives it its name."""

CALLS = frozenset(
    (
        *("os.open", "os.fdopen", "os.replace", "os.rename", "os.renames", "os.link", "os.symlink", "os.remove"),
        *("os.unlink", "os.rmdir", "os.removedirs", "os.mkdir", "os.makedirs", "os.truncate", "os.mkfifo", "os.mknod"),
        *("os.utime", "os.chmod", "os.sendfile", "os.copy_file_range", "sqlite3.connect"),
        *("tempfile.TemporaryDirectory", "tempfile.NamedTemporaryFile", "tempfile.mkdtemp", "tempfile.mkstemp"),
        *("torch.save", "np.save", "np.savez", "FileIO", "io.FileIO", "save_file", "io.open", "codecs.open"),
    )
)
READS = frozenset({"shutil.which", "shutil.disk_usage", "shutil.get_terminal_size"})
METHODS = frozenset(
    (
        *("write_text", "write_bytes", "mkdir", "touch", "rename", "unlink", "rmdir", "symlink_to", "hardlink_to"),
        *("chmod", "save_pretrained", "savefig", "to_csv", "to_json", "to_parquet", "extract", "extractall", "tofile"),
    )
)


def writes(text: str) -> Iterator[tuple[str, int]]:
    """(what is called, its line) of everything in a source text that may write a file."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        method = name.rpartition(".")[2] if isinstance(node.func, ast.Attribute) else ""
        if name in CALLS or (name.startswith("shutil.") and name not in READS):
            yield name, node.lineno
        elif method in METHODS or (method == "replace" and len(node.args) == 1 and not node.keywords):
            yield f".{method}", node.lineno
        elif (name == "open" or method == "open") and _may_write(node, first=1 if name == "open" else 0):
            yield "open" if name == "open" else ".open", node.lineno


def _may_write(node: ast.Call, *, first: int) -> bool:
    """Whether the mode, at place `first` or by its name, is anything but known to read."""
    modes = [word.value for word in node.keywords if word.arg == "mode"]
    modes += node.args[first : first + 1]
    return any(not isinstance(mode, ast.Constant) or set(str(mode.value)) & set("wax+") for mode in modes)


def test_whatever_writes_goes_through_the_gate_or_is_listed_with_its_reason() -> None:
    found: Counter[tuple[str, str]] = Counter()
    unlisted = []
    for file in sorted(SOURCE.rglob("*.py")):
        name = file.relative_to(SOURCE).as_posix()
        if name in GATE:
            continue
        for call, line in writes(file.read_text(encoding="utf-8")):
            found[name, call] += 1
            if (name, call) not in ALLOWED:
                unlisted.append(f"{name}:{line}: {call}")
    assert unlisted == [], "write through dpo_studio.disk, where dpo_studio.writing lets it"
    assert [entry for entry in ALLOWED if not found[entry]] == [], "listed, and no longer there"


@pytest.mark.parametrize(
    "planted",
    [
        "open(file, 'w')",
        "open(file, mode='ab')",
        "open(file, mode)",
        "path.open('x')",
        "path.open(mode='r+')",
        "(folder / name).write_text(text)",
        "path.write_bytes(b'')",
        "os.replace(a, b)",
        "a.replace(b)",
        "a.rename(b)",
        "shutil.copy(a, b)",
        "shutil.move(a, b)",
        "path.mkdir()",
        "os.makedirs(path)",
        "os.open(path, os.O_WRONLY)",
        "path.touch()",
        "figure.savefig(path)",
        "save_file(tensors, path)",
        "model.save_pretrained(path)",
        "sqlite3.connect(path)",
        "tempfile.mkdtemp()",
        "archive.extractall(path)",
    ],
)
def test_the_census_would_find_a_write(planted: str) -> None:
    """Wherever it stands: in a function, a condition, a lambda."""
    for text in (planted, f"def f():\n    if x:\n        return [{planted} for a in b]", f"f = lambda: {planted}"):
        assert [*writes(text)]


@pytest.mark.parametrize(
    "innocent",
    ["open(file)", "open(file, 'rb')", "path.open()", "path.open('r', encoding='utf-8')", "text.replace('a', 'b')",
     "path.read_text()", "shutil.which('gcc')", "shutil.disk_usage(path)"],
)  # fmt: skip
def test_it_leaves_readers_alone(innocent: str) -> None:
    assert [*writes(innocent)] == []
