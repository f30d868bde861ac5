"""Whether a refactor changed a number: two checkouts do the same work, and every file must hold the same bytes.

    python scripts/compare_checkouts.py ../before . [--only gptq --only moving] [--folder DIR]

Each checkout runs in processes of its own, from its own `src`, with one thread and a cache of its own, on the same
models and pairs; the tiny models are made by OLD's tests, the bundled one is converted once, by OLD. A case trains a
few steps with held-out evaluations and then scores pairs that it has not seen. Compared are metrics.jsonl, both files
of the adapter, and the lines of `dpo score`. Only the command line is used, so modules may move between the two.

What a machine decides by a measurement (dtype, tokens in memory) is fixed in the recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["CASES", "Case", "first_difference", "recipe_of"]

SIDES = ("old", "new")
COMPARED = (
    "run/metrics.jsonl",
    "run/adapter/adapter_model.safetensors",
    "run/adapter/adapter_config.json",
    "scores.jsonl",
)
_WIDTH = 100
"""Characters of a differing line that are shown."""

_MAKE = """
import sys
from pathlib import Path
from tests.tiny_models import tiny_folder
from tests.tiny_runs import tiny_rows, write_rows
folder = Path(sys.argv[1])
tiny_folder(folder / "tiny")
write_rows(folder / "pairs.jsonl", tiny_rows(24))
write_rows(folder / "unseen.jsonl", tiny_rows(12, seed=1))
"""


@dataclass(frozen=True)
class Case:
    """One recipe: what it changes in `recipe_of`, and what is scored afterwards."""

    changes: dict[str, dict[str, Any]]
    model: str = "tiny"
    score: tuple[str, ...] = ("unseen.jsonl",)


CASES = {
    "tiny": Case({}),
    "bf16": Case({"model": {"dtype": "bfloat16"}}),
    "gptq": Case({}, model="gptq"),
    "live": Case({"reference": {"mode": "live"}, "adapter": {"dropout": 0.1}}),
    "moving": Case({"reference": {"mode": "live", "update_every": 2, "update_share": 0.5}}),
    "mixture": Case({"objective": {"kind": "mixture"}}),
    "whole-step": Case({"objective": {"kind": "aot"}}),
    "bundled": Case(
        {
            "data": {
                "train": {"source": "bundled:everyday:train", "rows": 12},
                "held_out": {"source": "bundled:everyday:held_out", "rows": 4},
                "max_length": 144,
                "too_long": "cut_answer_end",
            },
            "training": {"max_steps": 3, "learning_rate": 3e-4},
        },
        model="bundled:smollm2-135m-instruct",
        score=("bundled:everyday:held_out", "--rows", "6"),
    ),
}
"""Name -> case. A mixture has a term with a running mean, `aot` looks at the whole step's pairs, dropout draws."""


def recipe_of(case: Case, shared: Path) -> dict[str, Any]:
    """Six steps of four pairs in several micro-batches, held-out pairs measured three times."""
    named = ":" in case.model
    recipe: dict[str, Any] = {
        "model": {"path": case.model if named else str(shared / case.model), "dtype": "float32"},
        "data": {"train": {"source": str(shared / "pairs.jsonl")}, "held_out": {"fraction": 0.25}},
        "adapter": {"rank": 4, "alpha": 8},
        "training": {
            "pairs_per_step": 4,
            "tokens_per_micro_batch": 320 if named else 96,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "evaluate_every": 2,
            "save_every": 3,
        },
        "run": {"folder": "run"},
    }
    for section, values in case.changes.items():
        recipe[section] = recipe.get(section, {}) | values
    return recipe


def main() -> None:
    """Make the models, run every case on both sides, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a working tree")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--only", action="append", choices=CASES, help="a case; may be given again")
    parser.add_argument(
        "--folder", type=Path, help="keep what was made here (it is emptied of nothing: name a new one)"
    )
    options = parser.parse_args()
    trees = {side: Path(getattr(options, side)).resolve() for side in SIDES}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        names = options.only or list(CASES)
        _prepare(folder, trees, names)
        different = sum([_report(name, folder, trees) for name in names])
    print(f"{len(names)} cases in {time.monotonic() - began:.0f} s; {different or 'no'} differences")
    sys.exit(1 if different else 0)


def _prepare(folder: Path, trees: dict[str, Path], names: Sequence[str]) -> None:
    """Models and pairs for both, a cache for each whose converted models are shared."""
    shared = folder / "shared"
    for place in (shared, folder / "models", *(folder / side / "cache" for side in SIDES)):
        place.mkdir(parents=True, exist_ok=False)
    for side in SIDES:
        (folder / side / "cache" / "models").symlink_to(folder / "models")
        found = Path(_python(["-c", "import dpo_studio; print(dpo_studio.__file__)"], folder, side, trees).strip())
        if not found.is_relative_to(trees[side] / "src"):
            sys.exit(f"{side}: dpo_studio would be imported from {found}, not from {trees[side]}/src")
    tests = str(trees["old"])
    _python(["-c", _MAKE, str(shared)], folder, "old", trees, tests)
    if "gptq" in names:
        made = ["-m", "tests.gptq_oracle", "model", str(shared / "tiny"), str(shared / "gptq")]
        _python(made, folder, "old", trees, tests)
    if "bundled" in names:  # both sides at once would make it twice
        ask = "from dpo_studio.cli import main; main()"
        words = ["generate", "bundled:smollm2-135m-instruct", "--prompt", "Hi", "--max-new-tokens", "1"]
        _python(["-c", ask, *words], folder, "old", trees)


def _environment(folder: Path, side: str, trees: dict[str, Path], *more: str) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    own = {
        "PYTHONPATH": os.pathsep.join([str(trees[side] / "src"), *more]),
        "DPO_STUDIO_CACHE": str(folder / side / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    return os.environ | threads | own


def _python(arguments: list[str], folder: Path, side: str, trees: dict[str, Path], *more: str) -> str:
    """What a command printed; a failure ends everything, for nothing can be compared without it."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=_environment(folder, side, trees, *more),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{side}: {' '.join(arguments)[:200]}\n{done.stderr[-2000:]}")
    return done.stdout


def _report(name: str, folder: Path, trees: dict[str, Path]) -> int:
    """Run a case on both sides at once and print a line a file; how many differ."""
    began = time.monotonic()
    case = CASES[name]
    for side in SIDES:
        place = folder / side / name
        place.mkdir()
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(case, folder / "shared"), sort_keys=False))
    source, *settings = case.score
    source = source if ":" in source else str(folder / "shared" / source)
    verbs = (["train", "recipe.yaml"], ["score", "run", source, *settings, "--out", "scores.jsonl"])
    for verb in verbs:
        failed = _both(verb, folder, name, trees)
        if failed:
            print(f"{name:<11} {'dpo ' + verb[0]:<26} FAILED\n{failed}", flush=True)
            return 1
    different = 0
    for file in COMPARED:
        said = first_difference(*(folder / side / name / file for side in SIDES))
        different += said is not None
        print(f"{name:<11} {Path(file).name:<26} {'same' if said is None else 'DIFFERENT  ' + said}", flush=True)
    print(f"{name:<11} {time.monotonic() - began:.0f} s", flush=True)
    return different


def _both(verb: list[str], folder: Path, name: str, trees: dict[str, Path]) -> str:
    """Run `dpo VERB` in both trees; what the ones that failed said."""
    command = [sys.executable, "-c", "from dpo_studio.cli import main; main()", *verb]
    running = {}
    for side in SIDES:
        with (folder / side / name / f"{verb[0]}.log").open("w") as log:
            running[side] = subprocess.Popen(
                command,
                env=_environment(folder, side, trees),
                cwd=folder / side / name,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    codes = {side: process.wait() for side, process in running.items()}
    logs = {side: (folder / side / name / f"{verb[0]}.log").read_text()[-1500:] for side in SIDES}
    return "\n".join(f"{side}: exit {codes[side]}\n{logs[side]}" for side in SIDES if codes[side])


def first_difference(old: Path, new: Path) -> str | None:
    """None for the same bytes; else where they first differ: a line and its number, or a tensor."""
    missing = [str(file) for file in (old, new) if not file.is_file()]
    if missing:
        return f"not there: {', '.join(missing)}"
    before, after = old.read_bytes(), new.read_bytes()
    if before == after:
        return None
    if old.suffix == ".safetensors":
        return _first_tensor(before, after)
    lines = before.splitlines(), after.splitlines()
    for number, (left, right) in enumerate(zip(*lines, strict=False), 1):
        if left != right:
            at = max(0, next(i for i in range(len(left) + 1) if left[: i + 1] != right[: i + 1]) - _WIDTH // 2)
            shown = [side[at : at + _WIDTH].decode(errors="replace") for side in (left, right)]
            return f"line {number}, from character {at}:\n    old {shown[0]}\n    new {shown[1]}"
    return f"{len(lines[0])} lines, now {len(lines[1])}"


def _first_tensor(before: bytes, after: bytes) -> str:
    old, new = _tensors(before), _tensors(after)
    if old.keys() != new.keys():
        return f"other tensors: {', '.join(sorted(old.keys() ^ new.keys())[:3])}"
    for name in sorted(old):
        if old[name] != new[name]:
            return f"tensor {name}, the first of {sum(old[each] != new[each] for each in old)} of {len(old)}"
    return "the same tensors, written otherwise"


def _tensors(file: bytes) -> dict[str, tuple[object, object, bytes]]:
    """Name -> dtype, shape and bytes."""
    begin = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:begin])
    header.pop("__metadata__", None)
    found = {}
    for name, facts in header.items():
        at, end = facts["data_offsets"]
        found[name] = (facts["dtype"], facts["shape"], file[begin + at : begin + end])
    return found


if __name__ == "__main__":
    main()
