# ruff: noqa: E501 - a payload stands on one line, however long
"""Paths, YAML and text from strangers: hostile ones are refused or made harmless."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from dpo_studio.cli.answer_stream import print_stream
from dpo_studio.config import load_recipe, parse_override, parse_yaml
from dpo_studio.console.progress import Plain, Progress
from dpo_studio.console.text import one_line, printable
from dpo_studio.errors import DPOStudioError, RecipeError, RunError, UsageError
from dpo_studio.export.card import Card, license_of, quoted
from dpo_studio.paths import inside, plain_name
from dpo_studio.reports.markup import block, esc, table
from dpo_studio.runs.folder import RunFolder, is_run
from tests.guard_words import words_of
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows

# Paths

BAD_NAMES = [
    *(
        "",
        ".",
        "..",
        "...",
        " ",
        ". .",
        "../x",
        "a/../../x",
        "a/b",
        "/etc/passwd",
        "/",
        "~/x/y",
        "..\\x",
        "a\\b",
        "C:",
        "C:x",
    ),
    *("C:\\x", "\\\\server\\share", "file:///etc", "a\0", "a\nb", "a\rb", "a\x1b[2J", "a\x7f", "a\u202eb", "a\u200bb"),
    *(
        "a\u2028b",
        "a\udcffb",
        "a ",
        "a.",
        "a..",
        "con",
        "NUL",
        "nul.txt",
        "Com1",
        "LPT9.log",
        "a*",
        "a?",
        "<a>",
        'a"',
        "a|b",
    ),
    *("x" * 256, "é" * 128),
]
GOOD_NAMES = [
    "demo",
    "run 1",
    "..a",
    "a..b",
    ".hidden",
    "-v",
    "é" * 127,
    "富士",
    "%2e%2e",
    "console",
    "com0",
    "x" * 255,
    "~x",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=words_of)
def test_names_that_lead_elsewhere_or_exist_nowhere_are_refused(name: str, tmp_path: Path) -> None:
    for act in (plain_name, lambda name: inside(tmp_path, name)):
        with pytest.raises(UsageError) as refused:
            act(name)
        assert len(refused.value.message) < 200
        refused.value.message.encode()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "names no file"),
        (" . ", "names no file"),
        ("..", "names no file"),
        ("X.", "ends in a dot or a space"),
        ("run ", "ends in a dot or a space"),
        (" run\t", "has a character that no file name has everywhere"),
        ("a/b", "has a character that no file name has everywhere"),
        ("x" * 256, "is longer than 255 bytes"),
        ("nul.txt", "is a device on some systems"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(name: str, reason: str) -> None:
    with pytest.raises(UsageError) as refused:
        plain_name(name, hint="another")
    assert refused.value.message == f"{name[:80]!r} {reason}"
    assert refused.value.hint == "another"


@pytest.mark.parametrize("name", ["runX", "X run"])
def test_letters_at_the_end_of_a_name_stay(name: str) -> None:
    assert plain_name(name) == name


@pytest.mark.parametrize("name", GOOD_NAMES, ids=words_of)
def test_names_that_are_only_odd_are_names(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name
    (tmp_path / name).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("target", ["/etc", "..", "../runs_evil", "/dev/null", "../runs_evil/deeper"])
def test_a_link_out_of_a_folder_is_not_in_it(tmp_path: Path, target: str) -> None:
    """`runs_evil` begins with `runs`."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs_evil").mkdir()
    (tmp_path / "runs" / "x").symlink_to(target)
    with pytest.raises(UsageError, match="is a link that points out of") as refused:
        inside(tmp_path / "runs", "x", hint="elsewhere")
    assert refused.value.hint == "elsewhere"


def test_a_link_within_and_a_folder_that_is_one_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    (tmp_path / "runs" / "x").symlink_to("y")
    assert inside(tmp_path / "runs", "x") == tmp_path / "runs" / "x"


def test_a_home_of_nobody_s_is_no_traceback(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib raises a RuntimeError where ~ names no user of this machine; then it is a file's name like any other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nobody = "~nosuchuser/pairs.jsonl"
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny_rows(2))
    for code, words, command in (
        (1, "~nosuchuser/pairs.jsonl", ("score", tiny_base, nobody, "--out", "scores.jsonl")),
        (1, "~nosuchuser/pairs.jsonl", ("judge", "check", nobody, "--judge", "length", "--out", "verdicts.jsonl")),
        (2, "no such file: ~nosuchuser/j.py", ("judge", "check", pairs, "--judge", "~nosuchuser/j.py:f")),
        (2, "no such folder", ("score", tiny_base, pairs, "--out", "~nosuchuser/scores.jsonl")),
        (1, "~nosuchuser/r.yaml", ("train", "~nosuchuser/r.yaml")),
        (1, "~nosuchuser/m", ("generate", "~nosuchuser/m", "--prompt", "a")),
    ):
        said = dpo(*command)
        assert said.code == code and words in said.err and said.err.count("error: ") == 1, said


def furnished(folder: Path) -> Path:
    (folder / "a_folder" / "deep").mkdir(parents=True)
    for name in ("a_file", "a:file", "a_folder/deep/x"):
        (folder / name).write_text("x")
    (folder / "a_link").symlink_to("a_file")
    return folder


@pytest.mark.parametrize(
    "name", ["..yaml", "...yaml", "....yaml", "a\\..\\b.yaml", "a\n.yaml", "NUL.yaml", "\u202eexe.yaml"]
)
def test_a_recipe_s_name_cannot_lead_its_run_elsewhere(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`....yaml` without its ending is `...`; a run of it would go to `runs/...`, and that of `...yaml` to `runs/..`."""
    (tmp_path / name).write_text("model: {path: m}\ndata: {train: {source: pairs.jsonl}}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DPOStudioError) as refused:
        load_recipe(tmp_path / name).run_folder  # noqa: B018
    assert "run.folder" in str(refused.value.hint)
    said = dpo("train", tmp_path / name)
    assert said.code in (1, 2) and not (tmp_path / "runs").exists()


def test_a_folder_that_is_named_may_be_anywhere(tmp_path: Path) -> None:
    """The recipe's author decides: the guard is for names that nobody chose as a path."""
    (tmp_path / "r.yaml").write_text("model: {path: m}\ndata: {train: {source: p.jsonl}}\nrun: {folder: ../out}\n")
    assert load_recipe(tmp_path / "r.yaml").run_folder == Path("../out")


HOSTILE_PATHS = [
    "a\\0b",
    "\\0",
    "\\x1b[2J",
    "/dev/zero",
    "/dev/stdin/x",
    "/proc/self/mem/x",
    "x" * 5000,
    "../" * 2000,
    "~nobody/x",
]


@pytest.mark.parametrize("path", HOSTILE_PATHS, ids=words_of)
@pytest.mark.parametrize(
    "key", ["model.path", "data.train.source", "run.folder", "model.chat_template", "model.adapter"]
)
def test_a_path_no_file_can_have_is_an_error_and_no_traceback(
    tmp_path: Path, tiny_base: Path, key: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "../" * 2000 and key in ("run.folder", "data.train.source"):
        pytest.skip("the root of the file system is a folder, and may be searched")
    if key == "run.folder" and path in ("\\x1b[2J", "~nobody/x"):
        pytest.skip("a folder of that name can be made")
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_base, adapter=None if key == "model.adapter" else {})
    said = dpo(
        "train", recipe, *(() if key in ("run.folder", "model.adapter") else ("--dry-run",)), "--set", f'{key}="{path}"'
    )
    assert said.code in (1, 2), said.err
    assert "error: " in said.err and "Traceback" not in said.err
    assert "\x1b" not in said.err and "\0" not in said.err


# YAML

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
BAD_YAML = [
    "!!python/object/apply:os.system ['touch canary']",
    "!!python/object/new:os.system ['touch canary']",
    "!!python/object:os.system {}",
    "!!python/name:os.system",
    "!!python/module:os",
    "a: !!python/tuple [1, 2]",
    "a: !!python/bytes x",
    "a: !include /etc/passwd",
    "a: !env HOME",
    "!<tag:yaml.org,2002:python/object/apply:eval> ['1']",
    "%TAG ! tag:yaml.org,2002:python/\n---\n!object/apply:os.system ['x']",
    "a: &x [1]\nb: *x",
    "a: &x {b: *x}",
    "&x [*x]",
    "a: &x {b: 1}\nc: {<<: *x}",
    LAUGHS,
    "a: 1\na: 2",
    "a: {b: 1, b: 2}",
    "[" * 700,
    "{a: " * 2_000,
    "- " * 2_000,
    "a: 1\n---\nb: 2",
    "a: '",
    "a: \x00",
    "a: \x1b[2J",
    "\t- a",
    "? [a]\n: ",
    "a: " + "9" * 5_000,
    "a: " + "1:" * 100_000 + "1",
    "a: !!float x",
    "a: !!int x",
    "a: !!timestamp 2024-99-99",
]


@pytest.mark.parametrize("text", BAD_YAML, ids=words_of)
def test_yaml_that_makes_objects_or_unfolds_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every reader: the recipe, `--set`, a run's recipes, a base's card. Nothing runs, nothing takes long."""
    monkeypatch.chdir(tmp_path)
    before = time.thread_time()
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")
    for name in ("recipe.yaml", "recipe.typed.yaml"):
        (tmp_path / name).write_text(text)
    assert is_run(tmp_path)
    for read in (RunFolder(tmp_path).recipe, RunFolder(tmp_path).typed):
        with pytest.raises(RunError, match="cannot be read"):
            read()
    with pytest.raises(UsageError):
        parse_override(f"model={text}")
    (tmp_path / "README.md").write_text(f"---\n{text}\nlicense: mit\n---\n")
    assert license_of(tmp_path) is None
    assert time.thread_time() - before < 20
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("2024-01-31", "2024-01-31"),
        ("${env:HOME}", "${env:HOME}"),
        ("'{{ x }}'", "{{ x }}"),
        ("$(id)", "$(id)"),
    ],
)
def test_what_other_tools_would_evaluate_is_text_here(text: str, value: Any) -> None:
    assert parse_yaml(f"a: {text}") == {"a": value}


# Text

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "'><img src=x onerror=alert(1)>",
    "<img src=//evil.test/b.png>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src=javascript:alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "</textarea><script>alert(1)</script>",
    "</style><style>*{display:none}</style>",
    "</div></section></main>",
    "<!-- ",
    "--><b>",
    "<![CDATA[<b>]]>",
    "<meta http-equiv=refresh content='0;url=//evil.test'>",
    "<base href=//evil.test/>",
    "<link rel=stylesheet href=//evil.test/x.css>",
    "<form action=//evil.test><input>",
    "<object data=x>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "&lt;script&gt;",
    "&#60;script&#62;",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "`${alert(1)}`",
    "{{ 7 * 7 }}",
    "![x](https://evil.test/beacon.png)",
    "[x](javascript:alert(1))",
    "[![x](https://evil.test/a.png)](https://evil.test)",
    "<https://evil.test>",
    "``` \n![x](https://evil.test/a.png)\n```",
    "`````",
    "---\nlicense: evil\n---",
    "# heading\n\n| a | b |\n|---|---|",
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]8;;https://evil.test\x07link\x1b]8;;\x07",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1bP$q\x1b\\",
    "\x9b31m",
    "a\rb",
    "a\x08\x08b",
    "\x07",
    "\x00",
    "\u202egnp.exe",
    "\u2066\u2069\u200e\u200f",
    "\u200b\ufeff\u2060",
    "\U000e0041\U000e0042",
    "\u2028\u2029",
    "\ud800",
    "[red]markup[/red][link=https://evil.test]x[/link]",
    "\x1b[31m" * 500,
]
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


class Tags(HTMLParser):
    """What an HTML reader other than ours finds in a piece of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")

    def unknown_decl(self, data: str) -> None:
        self.tags.append("declaration")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", PAYLOADS, ids=words_of)
def test_text_in_a_page_is_text(text: str) -> None:
    """In an element, an attribute, a block, a table's caption, head, name and cell: no tag, attribute or comment more."""
    page = f"<p title=\"{esc(text)}\" id='{esc(text)}'>{esc(text)}</p>{block(text)}" + table(
        text, [(text, text)], (text, text)
    )
    found = Tags()
    found.feed(page)
    found.close()
    assert set(found.tags) <= {"p", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert set(found.attributes) <= {"title", "id", "class", "dir", "scope"}
    assert found.text.count(printable(text)) >= 7 or len(text) > 200
    assert not UNSEEN.search(page)


@pytest.mark.parametrize("text", PAYLOADS, ids=words_of)
def test_text_on_a_terminal_is_text(text: str) -> None:
    """In what is said, warned of, and in an error's message and hint."""
    shown = io.StringIO()
    with Progress(Plain(Console(file=shown))) as progress:
        progress.say(text)
        progress.warn(text)
    error = dpo("train", f"no-such-{text[:100]}.yaml") if "\0" not in text and "\ud800" not in text else None
    everything = printable(text) + one_line(text) + shown.getvalue() + (error.err if error else "")
    assert not UNSEEN.search(everything)
    everything.encode()


@pytest.mark.parametrize("text", PAYLOADS, ids=words_of)
def test_text_in_a_model_card_is_text(text: str) -> None:
    """A name stands in a code span, an answer in a fence, neither of which it can close; the metadata stays what it was.

    Read by CommonMark's rules: a span ends at a run of as many backticks, a fence at a line of no fewer.
    """
    shown = printable(text)
    card = Card(shown, None, [], "peft", ["dpo"], None, [f"base: {quoted(shown)}"], example=(shown, shown)).text()
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["dpo"],
    }  # fmt: skip
    span = quoted(shown)
    opening = re.match("`+", span)
    assert opening and len(re.findall(f"(?<!`){opening[0]}(?!`)", span)) == 2
    fences = [line for line in card.splitlines() if re.fullmatch(r"`{3,}text", line)]
    assert len(fences) == 2
    assert all(card.splitlines().count(fence.removesuffix("text")) == 2 for fence in fences)
    assert not UNSEEN.search(card)
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert not re.search(r"(?<!\\)[<\[`&]", title), title


def test_a_whole_run_on_hostile_rows_and_names_shows_none_of_it_raw(tmp_path: Path, tiny_base: Path) -> None:
    """Every payload as prompt and as answer, and in the names of files: terminal, page, card."""
    rows = [row | {"prompt": f"{row['prompt']} {text}", "chosen": f"{text} {row['chosen']}"}
            for row, text in zip(tiny_rows(len(PAYLOADS)), PAYLOADS, strict=True)]  # fmt: skip
    place = tmp_path / "<script>alert(1)<\u2215script> ![x](evil)"
    place.mkdir()
    recipe = write_recipe(place / "recipe.yaml", tiny_base, rows=rows, training={"max_steps": 1})
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    page = (place / "run" / "report.html").read_text()
    export = dpo("export", place / "run", tmp_path / "out", "--to", "adapter")
    assert export.code == 0, export.err
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (said.err, page, export.err, card):
        assert not UNSEEN.search(text)
    found = Tags()
    found.feed(page)
    assert not {"script", "img", "iframe", "object", "form", "base", "link"} & set(found.tags)
    assert all(link.startswith("#") for link in re.findall(r'<a[^>]*href="([^"]*)', page))
    assert "](http" not in card.replace("`", "") or "```" in card


SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "WANDB_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
)


def test_no_token_of_the_environment_is_ever_written_down(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, score, generate, export and fail; then look into every byte that was left or said."""
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"hf_canary{number}Secret")
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_base, training={"max_steps": 2, "save_every": 1})
    run = tmp_path / "run"
    commands: list[tuple[object, ...]] = [
        ("train", recipe),
        ("score", run, tmp_path / "pairs.jsonl", "--out", tmp_path / "scores.jsonl"),
        ("generate", run, "--prompt", "a", "--max-new-tokens", "2"),
        ("export", run, tmp_path / "out", "--to", "adapter"),
        ("train", recipe, "--set", "training.seed=7"),
        ("score", "no-such/model", tmp_path / "pairs.jsonl"),
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = [dpo(*command) for command in commands]
    assert [answer.code for answer in said] == [0, 0, 0, 0, 1, 1]
    texts = [answer.out + answer.err for answer in said]
    texts += [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert len(texts) > 20
    assert not any("canary" in text for text in texts)


def test_no_token_is_in_a_line_of_metrics_or_the_environment_s_record(tiny_run: Path) -> None:
    """The record names versions and hardware, and no variable."""
    record = json.loads((tiny_run / "environment.json").read_text())
    assert not {"env", "environ", "variables", "user", "host", "hostname"} & set(record)


@pytest.mark.parametrize("text", PAYLOADS, ids=words_of)
def test_an_answer_as_it_streams_to_a_terminal_cannot_rewrite_the_screen(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character a piece, as a model may draw them; into a pipe it goes as it is, for programs to read."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, clean in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        print_stream(iter(text))
        assert stream.getvalue() == (printable(text.replace("\r", "\\x0d")) if clean else text) + "\n"
        assert not clean or not UNSEEN.search(stream.getvalue())
