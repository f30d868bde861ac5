"""Laws of conversion and split for any rows at all, and what a hostile file may do: a pair, a refusal, a clear error.

The fuzzing is seeded: `make test` takes a few hundred rows and files, `make slow` 10,000.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_studio.config import SourceSection
from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError
from dpo_studio.preferences.formats import FORMATS
from dpo_studio.preferences.pair import Pair, prompt_key
from dpo_studio.preferences.sources import Refusal, open_pairs, read_pairs
from dpo_studio.preferences.split import stratified
from dpo_studio.workflows.pairs.data import convert_pairs, refused_beside, split_source

QUIET = Progress(quiet=True)


def user(text: object) -> dict[str, object]:
    return {"role": "user", "content": text}


def bot(text: object) -> dict[str, object]:
    return {"role": "assistant", "content": text}


SEEDS: dict[str, dict[str, Any]] = {
    "trl": {
        "prompt": [user("q")],
        "chosen": [bot("a")],
        "rejected": [bot("b")],
        "score_chosen": 2,
        "score_rejected": 1,
    },
    "ultrafeedback": {"prompt": "q", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")], "source": "s"},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "sharegpt-ranking": {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "alpaca-ranking": {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "history": [["x", "y"]]},
    "openai": {"input": {"messages": [user("q")]}, "preferred_output": [bot("a")], "non_preferred_output": [bot("b")]},
    "orca": {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
    "argilla": {"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen_rating": 4.5},
    "alpaca-eval": {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1, "dataset": "koala"},
    "pandalm": {"instruction": "q", "input": "", "response1": "a", "response2": "b"}
    | {f"annotator{n}": 1 for n in (1, 2, 3)},
    "helpsteer2": {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": -2},
    "helpsteer3": {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -1},
    "shp": {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 5, "score_B": 2},
    "nectar": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "answers": [{"answer": t, "rank": r} for r, t in enumerate("abc")],
    },
    "nectar-all": {"prompt": "q", "answers": [{"answer": text, "rank": rank} for rank, text in enumerate("abc")]},
    "webgpt": {"question": {"full_text": "q"}, "answer_0": "b", "answer_1": "a", "score_0": -0.5, "score_1": 0.5},
    "arena": {
        "conversation_a": [user("q"), bot("b")],
        "conversation_b": [user("q"), bot("a")],
        "winner": "model_b",
        "turn": 1,
    },
    "arena-55k": {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}
    | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
    "ultrafeedback-raw": {
        "instruction": "q",
        "models": [],
        "completions": [{"response": text, "fine-grained_score": 9 - at} for at, text in enumerate("abc")],
    },
    "label-studio": {
        "data": {"prompt": "q", "answer1": "a", "answer2": "b"},
        "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "left"}}]}],
    },
    "argilla-2": {
        "fields": {"prompt": "q", "response_a": "a", "response_b": "b"},
        "responses": {"preference": [{"value": "response_a", "user_id": "1"}]},
    },
    "open-webui": {
        "data": {"rating": 1},
        "meta": {"message_id": "2"},
        "snapshot": {
            "chat": {
                "chat": {
                    "history": {
                        "messages": {
                            "1": user("q") | {"parentId": None, "childrenIds": ["2"]},
                            "2": bot("a") | {"parentId": "1", "originalContent": "b"},
                        }
                    }
                }
            }
        },
    },
    "langfuse": {"id": "x", "input": "q", "output": "b"}
    | {"scores": [{"name": "output", "dataType": "CORRECTION", "stringValue": "a"}]},
    "studio-votes": {"prompt": "q", "answers": {"left": "a", "right": "b"}, "models": {}, "shown_order_seed": 1}
    | {"choice": "left"},
}


def test_every_format_has_a_seed_that_is_a_pair(tmp_path: Path) -> None:
    assert SEEDS.keys() == FORMATS.keys()
    for name, row in SEEDS.items():
        file = write(tmp_path / "seed.jsonl", [row])
        pair, *_ = read_pairs(SourceSection(source=str(file), format=name)).pairs
        assert (pair.chosen[-1].content, pair.rejected[-1].content[0]) in {("a", "b"), ("a", "c")}


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


# Laws

TEXT = st.text(max_size=6) | st.sampled_from(
    ["q", "a\u2028b", "\u00e9", "\ud83d", "[{'role': 'x'}]", " ", "Human:", "\r"]
)
VALUE = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | TEXT
ROW = st.sampled_from(sorted(SEEDS)).flatmap(
    lambda name: st.fixed_dictionaries({key: st.just(value) | TEXT | VALUE for key, value in SEEDS[name].items()})
)
ROWS = st.lists(ROW, min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, shape=st.sampled_from(["auto", *sorted(FORMATS)]))
def test_conversion(rows: list[Any], shape: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Kept and refused rows are all the rows, each once and in order; converting what was converted changes no byte."""
    folder = tmp_path_factory.mktemp("laws")
    source = SourceSection(source=str(write(folder / "in.jsonl", rows)), format=shape)
    out, again = folder / "out.jsonl", folder / "again.jsonl"
    try:
        summary = convert_pairs(source, out, progress=QUIET)
    except DataError as error:
        assert error.hint
        assert [file.name for file in folder.iterdir()] == ["in.jsonl"]
        return
    results = list(open_pairs(source).results)
    kept = [result.row for result in results if isinstance(result, Pair)]
    refused = [line["row"] for line in lines(refused_beside(out))]
    assert sorted({*kept, *refused}) == list(range(len(rows))) == list(dict.fromkeys(r.row for r in results))
    assert not {*kept} & {*refused}
    assert len(lines(out)) == summary["pairs"] == len(kept)
    assert sum(summary["refused"].values()) == len(refused) == len({*refused})
    convert_pairs(SourceSection(source=str(out)), again, progress=QUIET)
    assert again.read_bytes() == out.read_bytes()
    assert refused_beside(again).read_bytes() == b""


LABELLED = {
    "prompt": "p",
    "first": "x.text",
    "second": "y.text",
    "label": "l",
    "score_first": "x.s",
    "score_second": "y.s",
}
OTHER = {1: 2, 2: 1, 0: 0, 3: 3, 9: 9}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(TEXT, TEXT | VALUE, TEXT | VALUE, st.sampled_from(sorted(OTHER)), st.floats(), st.floats())
    ),
    by_score=st.booleans(),
)
def test_swapped_answers_with_the_label_swapped_are_the_same_pairs(
    rows: list[Any], by_score: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("swap")
    one = [{"p": p, "x": {"text": x, "s": s}, "y": {"text": y, "s": t}, "l": n} for p, x, y, n, s, t in rows]
    other = [row | {"x": row["y"], "y": row["x"], "l": OTHER[row["l"]]} for row in one]
    good = {"p": "q", "x": {"text": "a", "s": 1}, "y": {"text": "b", "s": 2}, "l": 1}
    columns = {name: column for name, column in LABELLED.items() if not (by_score and name == "label")}
    label: dict[str, Any] = {} if by_score else {"first": 1, "second": 2, "tie": 0, "both_bad": 3}

    def pairs(rows: list[Any]) -> list[Pair]:
        file = write(folder / "rows.jsonl", [good, *rows])
        return read_pairs(SourceSection(source=str(file), map=columns, label=label)).pairs[1:]

    assert pairs(one) == pairs(other)


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.text("ab ", min_size=1, max_size=3), st.sampled_from(["x", "y", None])), min_size=2),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_no_split_shares_a_prompt(
    prompts: list[Any], fraction: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever prompts stand in several sources, and however they are spaced; every pair is on one side."""
    folder = tmp_path_factory.mktemp("split")
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b", "source": origin} for prompt, origin in prompts]
    source = SourceSection(source=str(write(folder / "in.jsonl", rows)))
    train, held_out = folder / "train.jsonl", folder / "held.jsonl"
    try:
        summary = split_source(source, train, held_out, fraction=fraction, seed=seed, progress=QUIET)
    except DataError:
        assert [file.name for file in folder.iterdir()] == ["in.jsonl"]
        return
    sides = [read_pairs(SourceSection(source=str(file))).pairs for file in (train, held_out)]
    assert [len(side) for side in sides] == [summary["train"], summary["held_out"]]
    assert sum(map(len, sides)) == summary["pairs"] == sum(bool(prompt.strip()) for prompt, _ in prompts)
    learned, measured = ({prompt_key(pair.prompt) for pair in side} for side in sides)
    assert not learned & measured


def test_every_source_gives_up_its_share() -> None:
    """A tenth of 4,000, 300, 13, 2 and 1 prompts to the nearest whole one: 400, 30, 1, at least 1, and none of one.

    A prompt that two sources share (0 of "a" is also one of "b") is counted in both and is on one side.
    """
    counts = {"a": 4000, "b": 300, "c": 13, "d": 2, "e": 1}
    prompts = [(origin, f"{origin} {n}") for origin, count in counts.items() for n in range(count)]
    rule = stratified(prompts, seed=3, fraction=0.1)
    held = {origin: sum(rule(key) for name, key in prompts if name == origin) for origin in counts}
    assert held == {"a": 400, "b": 30, "c": 1, "d": 1, "e": 0}
    shared = stratified([*prompts, ("b", "a 0")], seed=3, fraction=0.1)
    assert 400 <= sum(shared(key) for name, key in prompts if name == "a") <= 401


# Fuzzing

NASTY: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**300, -(10**4000), float("nan"), float("inf"), "", " ", "\x00", "\ud800",
    "x" * 5000, "<|im_end|>", "\u202e\u2028", "[{'role': 'user', 'content': 'x'}]", "1e999", "nan", "2", [], {}, [[]],
    [None], [{}], {"role": "user"}, [{"role": 3, "content": []}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"from": "gpt", "value": None}], [{"from": ["gpt"], "value": "a"}], {"messages": "x"}, [["a", "b"], ["c"]],
    "\n\nHuman: \n\nAssistant:", "\n\nAssistant: x\n\nHuman:", "<extra_id_1>User\n", ["a"] * 300,
    {"answer": {}, "rank": "x"}, [{"answer": "a", "rank": True}], 2**63, "tie", [{"type": "text", "text": 1}],
]  # fmt: skip


def mutated(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A row of some shape with one to four of its values, at any depth, replaced, removed or moved."""
    name = draw.choice(sorted(SEEDS))
    row = copy.deepcopy(SEEDS[name])
    for _ in range(draw.randint(1, 4)):
        places = list(_places(row))
        if not places:
            break
        inside, key = draw.choice(places)
        kind = draw.random()
        if kind < 0.15:
            del inside[key]
        elif kind < 0.25:
            inside[key] = [inside[key]]
        else:
            inside[key] = copy.deepcopy(draw.choice(NASTY))
    return name, row


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def damaged(draw: random.Random, folder: Path) -> Path:
    """A file of a few rows of any kind, whole or cut, with bytes changed, doubled or thrown in."""
    rows = [
        mutated(draw)[1] if draw.random() < 0.5 else SEEDS[draw.choice(sorted(SEEDS))]
        for _ in range(draw.randint(0, 5))
    ]
    suffix = draw.choice([".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv"])
    if suffix == ".csv":
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows(
            [["prompt", "chosen", "rejected"], *([f"q{n}", 'a, "x"\n', "b"] for n in range(4))]
        )
        data = stream.getvalue().encode()
    elif suffix.startswith(".jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        whole: Any = draw.choice([rows, {"data": rows}, rows[0] if rows else {}])
        data = json.dumps(whole, indent=draw.choice([None, 1])).encode()
    if draw.random() < 0.4:
        data = _spoilt(draw, data)
    if suffix.endswith(".gz"):
        data = gzip.compress(data, 1, mtime=0)
    if draw.random() < 0.6:
        data = _spoilt(draw, data)
    file = folder / f"fuzz{suffix}"
    file.write_bytes(data)
    return file


def _spoilt(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.randint(1, 8)) + data[at + draw.randint(0, 4) :]
    if kind == 2:
        return data[:at] + data[draw.randrange(len(data) + 1) :]
    if kind == 3:
        return (
            data[:at]
            + draw.choice([b'"', b"\n", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"NaN", b"\xff\xfe"])
            + data[at:]
        )
    return draw.choice([b"\xef\xbb\xbf", b"\x00", b"\n\n", b","]) + data


def fuzz(count: int, folder: Path) -> dict[str, int]:
    """Read mutated rows and damaged files; anything but a pair, a refusal or a DataError with a hint fails."""
    seen = {"pairs": 0, "refused": 0, "errors": 0}
    file = folder / "rows.jsonl"
    for seed in range(count):
        draw = random.Random(seed)
        if seed % 2:
            name, row = mutated(draw)
            source = SourceSection(source=str(write(file, [row])), format=draw.choice(["auto", name]))
        else:
            source = SourceSection(source=str(damaged(draw, folder)))
        if draw.random() < 0.2:
            columns = {"prompt": "prompt.0", "first": "chosen", "second": "answers.0.answer", "label": "l.0"}
            source = source.model_copy(update={"format": "mapped", "map": columns, "label": {"first": 1, "second": 2}})
        started = time.monotonic()
        try:
            for result in open_pairs(source).results:
                seen["refused" if isinstance(result, Refusal) else "pairs"] += 1
                assert isinstance(result, Refusal) or json.dumps(result.prompt[0].content, ensure_ascii=False).encode()
        except DataError as error:
            assert error.hint, seed
            assert str(error).encode("utf-8", "backslashreplace")
            seen["errors"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {source}") from error
        assert time.monotonic() - started < 5, seed
    return seen


def test_some_mutated_rows_and_files(tmp_path: Path) -> None:
    """All three ends are reached often: else the mutations would be too mild or too wild to find anything."""
    seen = fuzz(2000, tmp_path)
    assert min(seen.values()) > 200, seen


@pytest.mark.slow
def test_ten_thousand_mutated_rows_and_files(tmp_path: Path) -> None:
    seen = fuzz(10_000, tmp_path)
    assert min(seen.values()) > 1000, seen


PARQUET = ["int64", "timestamp[ns, tz=No/Where]", "binary", "decimal", "map", "dictionary", "duration", "bool", "null"]


@pytest.mark.parametrize("kind", PARQUET)
def test_a_parquet_of_an_unexpected_type(kind: str, tmp_path: Path) -> None:
    """An answer column of that type: each row is refused or the file is, and the good column beside it is no matter."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns: dict[str, Any] = {
        "int64": lambda: arrow.array([1, 2]),
        "timestamp[ns, tz=No/Where]": lambda: arrow.array([1, 2**62], arrow.timestamp("ns", "No/Where")),
        "binary": lambda: arrow.array([b"a", b"\xff"]),
        "decimal": lambda: arrow.array([1, 2], arrow.decimal256(70, 2)),
        "map": lambda: arrow.array([[("a", 1)], []], arrow.map_(arrow.string(), arrow.int64())),
        "dictionary": lambda: arrow.array([1, 2]).dictionary_encode(),
        "duration": lambda: arrow.array([1, 2**62], arrow.duration("s")),
        "bool": lambda: arrow.array([True, False]),
        "null": lambda: arrow.nulls(2),
    }
    texts = {name: arrow.array(["q", "r"]) for name in ("prompt", "rejected")}
    parquet.write_table(arrow.table(texts | {"chosen": columns[kind]()}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="none of its 2 rows can be used") as caught:
        read_pairs(SourceSection(source=str(tmp_path / "p.parquet")))
    assert caught.value.hint


LIMITED = """
import sys
sys.argv = ["dpo", "data", "convert", *sys.argv[1:]]
from dpo_studio.cli import main
try:
    main()
finally:
    print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0], file=sys.stderr)
"""
GOOD = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"
LONG = GOOD.replace("a", "x" * 50_000, 1).strip()
HUGE: dict[str, tuple[Callable[[], str], int]] = {
    "a line of 50 MB.jsonl": (lambda: GOOD + json.dumps({"prompt": "x" * 50_000_000}) + "\n" + GOOD, 0),
    "one line of 50 MB.jsonl": (lambda: "x" * 50_000_000, 1),
    "an array of 50 MB.json": (lambda: f"[{','.join([LONG] * 1000)}]", 0),
    "an open string.json": (lambda: f'[{GOOD}, "' + "x" * 50_000_000, 1),
    "a field of 50 MB.csv": (lambda: f"prompt,chosen,rejected\nq,a,b\nq,{'x' * 50_000_000},b\n", 1),
    "an open quote.csv": (lambda: 'prompt,chosen,rejected\nq,a,b\nq,"a,b\n' + "q,a,b\n" * 8_000_000, 1),
    "a bomb.jsonl.gz": (lambda: GOOD + "x" * 200_000_000, 1),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is asked of /proc")
@pytest.mark.parametrize("name", HUGE)
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    """Files of 50 MB, and 200 in a bomb, in a process of its own, to whom a row of 16 MiB is the most: under 150 MiB.

    A line that is too long is one refused row; where the next row begins cannot be told in the others. What unfolds to
    over a hundred times its size is refused whole.
    """
    content, code = HUGE[name]
    file = tmp_path / name
    with gzip.open(file, "wt", 1) if name.endswith(".gz") else file.open("w") as stream:
        stream.write(content())
    command = [sys.executable, "-c", LIMITED, str(file), str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    file.unlink()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert code == 0 or "hint: " in done.stderr
    assert int(done.stderr.split()[-1]) < 150 * 1024
    assert (tmp_path / "out.jsonl").exists() == (code == 0)
