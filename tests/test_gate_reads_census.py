"""What is read is read through the one gate: the source is searched for every other way to open, parse or match.

Whoever adds one gives a reason here, or uses `dpo_studio.reading`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
GATE = "dpo_studio/reading.py"
OPENERS = frozenset({"open", "read_text", "read_bytes", "fdopen", "memmap", "read_table", "ParquetFile", "open_file"})
"""Names of calls that open a file, whatever they hang on."""
PARSERS = frozenset({"json.loads", "json.load", "yaml.load", "yaml.safe_load", "tomllib.load", "tomllib.loads"})
MATCHERS = frozenset(f"re.{name}" for name in ("compile", "match", "search", "fullmatch", "sub", "split", "findall"))

KNOWN: dict[tuple[str, str], tuple[int, str]] = {
    # Our own files, which lie where this package does or which this very process writes.
    ("dpo_studio/reports/html.py", "read_text"): (1, "a part of this package"),
    ("dpo_studio/models/bundled.py", "open"): (3, "a part of this package, and the wheel that it is made of"),
    ("dpo_studio/models/bundled.py", "read_text"): (1, "the marker of a folder in our cache"),
    ("dpo_studio/models/bundled.py", "json.loads"): (1, "the marker of a folder in our cache"),
    ("dpo_studio/frozen/linear.py", "open"): (1, "/proc/meminfo"),
    ("dpo_studio/cli/app.py", "open"): (3, "/dev/null in place of a stream that is closed or that nobody reads"),
    ("dpo_studio/cli/rounds.py", "read_text"): (1, "the table that rounds have just written"),
    ("dpo_studio/cli/sweep.py", "read_text"): (1, "the table that a sweep has just written"),
    ("dpo_studio/disk.py", "open"): (3, "to write, and to bring to the disk what was written"),
    ("dpo_studio/runs/lock.py", "open"): (1, "a lock, opened without following a link"),
    ("dpo_studio/studio/processes.py", "read_bytes"): (1, "/proc"),
    ("dpo_studio/studio/jobs.py", "json.loads"): (1, "the words of a job, which the studio wrote into its own file"),
    ("dpo_studio/studio/pair_index.py", "json.loads"): (1, "a row of an index that the studio made"),
    ("dpo_studio/studio/worker.py", "json.loads"): (1, "a line of the studio that started this process"),
    ("dpo_studio/studio/worker.py", "fdopen"): (1, "a pipe of ours"),
    ("dpo_studio/studio/model_worker.py", "json.loads"): (1, "a line of our own process"),
    ("dpo_studio/ranks/watch.py", "json.loads"): (2, "the words of another process of this very run"),
    # To write.
    ("dpo_studio/studio/jobs.py", "open"): (2, "to write what a job says"),
    ("dpo_studio/studio/runner.py", "open"): (1, "to write the mark of a job"),
    ("dpo_studio/cli/studio.py", "open"): (1, "the browser"),
    ("dpo_studio/writing.py", "open"): (1, "to write"),
    ("dpo_studio/runs/folder.py", "open"): (1, "to write"),
    ("dpo_studio/cache.py", "open"): (1, "a lock, opened without following a link"),
    ("dpo_studio/export/requantise.py", "open"): (1, "to write the log of a process of ours"),
    ("dpo_studio/export/gptq_job.py", "fdopen"): (1, "a pipe of ours"),
    # Through the gate, one step further: what is opened is what `open_input` opened.
    ("dpo_studio/preferences/tables.py", "ParquetFile"): (2, "of a stream that the gate opened"),
    # JSON of rows, which has a reader of its own with a row's limits.
    ("dpo_studio/preferences/arena.py", "json.loads"): (
        1,
        "a text of a row, which has a row's limits",
    ),
    ("dpo_studio/preferences/votes.py", "json.loads"): (1, "a text of a row, which has a row's limits"),
    ("dpo_studio/preferences/row_contents.py", "json.loads"): (2, "a text of a row, which has a row's limits"),
    ("dpo_studio/cli/options.py", "json.loads"): (1, "typed by the user: a value of --judge-param"),
    # Expressions of constants, or of text that is escaped.
    ("dpo_studio/tokens/rendering.py", "re.compile"): (1, "special tokens, escaped"),
    ("dpo_studio/tokens/rendering.py", "re.split"): (1, "a range of two characters of ours"),
    ("dpo_studio/tokens/pieces.py", "re.compile"): (1, "special tokens and roles, escaped"),
    ("dpo_studio/preferences/rows.py", "re.compile"): (1, "words of a constant"),
    ("dpo_studio/evaluation/llm_template.py", "re.compile"): (1, "words of a constant, escaped"),
    ("dpo_studio/tokens/split.py", "re.compile"): (1, "words of a constant, escaped"),
    ("dpo_studio/evaluation/secret.py", "re.compile"): (1, "spellings of the user's own key, escaped"),
    ("dpo_studio/models/adapter_settings.py", "re.match"): (1, "a layer's name, refused before if it is more"),
    ("dpo_studio/workflows/training/saving.py", "re.match"): (1, "the constant MINUTES of the recipe"),
    # What a process of ours wrote a moment ago, where nobody else writes.
    ("dpo_studio/export/requantise.py", "read_text"): (4, "an export's scratch folder, and the log of our own process"),
    ("dpo_studio/export/gguf_tokenizer.py", "json.loads"): (1, "of what a loaded tokenizer has just written"),
    ("dpo_studio/export/requantise.py", "json.loads"): (4, "an export's scratch folder, and lines of our own process"),
    ("dpo_studio/export/gptq_job.py", "read_text"): (1, "a job that this process's parent wrote"),
    ("dpo_studio/export/gptq_job.py", "json.loads"): (1, "a job that this process's parent wrote"),
    ("dpo_studio/workflows/training/verifying.py", "read_text"): (1, "a run of a moment ago, in a scratch folder"),
    ("dpo_studio/workflows/training/verifying.py", "json.loads"): (1, "a run of a moment ago, in a scratch folder"),
    ("dpo_studio/workflows/evaluating/run.py", "read_text"): (1, "the figure that was just drawn"),
    ("dpo_studio/models/adapters.py", "json.loads"): (1, "of what json.dumps has just written"),
    # Functions of the gate under their module's name.
    ("dpo_studio/scan.py", "read_text"): (1, "reading.read_text"),
    ("dpo_studio/scan.py", "read_bytes"): (1, "reading.read_bytes"),
}
"""File and call -> how often, and why it may."""
FROM_GATE = "from dpo_studio.reading import read_bytes\nread_bytes(x, what='run', limit=1)"


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def is_constant(node: ast.AST) -> bool:
    """Whether an expression's text stands in the source: a literal, or several joined."""
    if isinstance(node, ast.BinOp):
        return is_constant(node.left) and is_constant(node.right)
    return isinstance(node, ast.Constant)


def findings(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of each call that opens a file, parses text, or makes an expression of what is no literal."""
    imported: dict[str, str] = {}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "dpo_studio.reading":
            imported |= {alias.asname or alias.name: "gate" for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module in ("json", "yaml", "re", "tomllib", "os", "io", "gzip"):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = name_of(node.func).partition(".")
        called = f"{imported.get(first, first)}{dot}{rest}"
        if called in PARSERS:
            yield node.lineno, called
        elif called in MATCHERS:
            if not (node.args and is_constant(node.args[0])):
                yield node.lineno, called
        elif called.rpartition(".")[2] in OPENERS:
            yield node.lineno, called.rpartition(".")[2]


def test_every_place_that_reads_without_the_gate_is_known() -> None:
    found: Counter[tuple[str, str]] = Counter()
    lines: dict[tuple[str, str], list[int]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        name = str(file.relative_to(SOURCE))
        for line, called in findings(file.read_text(encoding="utf-8")) if name != GATE else ():
            found[name, called] += 1
            lines.setdefault((name, called), []).append(line)
    new = {key: lines[key] for key, count in found.items() if count > KNOWN.get(key, (0, ""))[0]}
    assert not new, f"reads that pass the gate by: {new}"


def test_the_census_would_find_one() -> None:
    """Planted in every spelling; and what is no reading of foreign text is left alone."""
    for planted, called in (
        ("open('x')", "open"),
        ("Path(x).open()", "open"),
        ("os.open(x, 0)", "open"),
        ("io.open(x)", "open"),
        ("gzip.open(x)", "open"),
        ("from os import fdopen as f\nf(3)", "fdopen"),
        ("from gzip import open as unpack\nunpack(x)", "open"),
        ("file.read_text()", "read_text"),
        ("(folder / 'x').read_bytes()", "read_bytes"),
        ("json.loads(x)", "json.loads"),
        ("json.load(x)", "json.load"),
        ("from json import loads\nloads(x)", "json.loads"),
        ("import json as j\nj.loads(x)", "json.loads"),
        ("yaml.safe_load(x)", "yaml.safe_load"),
        ("re.compile(x)", "re.compile"),
        ("re.match(f'{x}', y)", "re.match"),
        ("re.search('a' + x, y)", "re.search"),
        ("from re import fullmatch\nfullmatch(pattern, y)", "re.fullmatch"),
        ("import re as expressions\nexpressions.sub(x, '', y)", "re.sub"),
    ):
        assert [name for _, name in findings(planted)] == [called], planted
    for harmless in (
        "re.compile('a' 'b')",
        "re.match(r'a', x)",
        "read_json(x)",
        "opened(x)",
        "re.sub('a' + 'b', x, y)",
    ):
        assert not list(findings(harmless)), harmless
