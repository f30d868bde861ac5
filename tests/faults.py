"""Kills real trainings, continues them, and compares every byte with the training that nothing disturbed.

    python -m tests.faults [--few] [--part 1/4] [--results FILE] [--table docs/reliability.md]

One process imports torch, which takes five seconds, and forks every trial before it starts a thread of its own; some
trials go through the real command. A trial is a run that is ended in some way and then continued until it is finished:
adapter, metrics, last checkpoint with the optimizer, and recipe must be the same bytes, and nothing unfinished may lie
about. `--few` is what `make test` runs; `--part i/n` every n-th trial. A trial whose outcome is in `--results` already
is not tried again, so a suite that was stopped goes on; `--table` writes what it holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.blows import Events, Journal, after_power_cut, fork, kill_after, start, wait
from tests.tiny_models import tiny_folder
from tests.tiny_runs import tiny_rows, write_recipe

_SIX_STEPS = {
    "pairs_per_step": 6,
    "max_steps": 6,
    "tokens_per_micro_batch": 150,
    "learning_rate": 1e-2,
    "evaluate_every": 3,
    "save_every": 2,
}
"""18 pairs: three steps an epoch, two epochs, several packs a step."""
_DROPOUT = {"rank": 2, "alpha": 4, "dropout": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {},
    "live": {"reference": {"mode": "live"}},
    "moving": {"reference": {"update_every": 2, "update_share": 0.6}},
    "bco": {"objective": {"kind": "bco"}, "training": _SIX_STEPS | {"tokens_per_micro_batch": 2048}},
    "mixture": {"objective": {"kind": "mixture"}},
    "long": {"training": _SIX_STEPS | {"max_steps": 120, "save_every": 7, "evaluate_every": 50}},
}
"""Whatever keeps a state from step to step. `long` is for the real command, which is met after it has imported."""


@dataclass(frozen=True)
class Blow:
    """How a trial's process is ended."""

    kind: str
    setting: str
    number: int
    """The event at which, or the seed of the time."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    kind: str
    setting: str
    number: int
    where: str
    code: int
    """Of the process that was ended; negative: by that signal. 0: it was finished before."""
    resumed_after: int
    """The step from which the run was continued; 0: from the start, -1: it was finished."""
    lost_too_much: bool
    """Whether steps from before a checkpoint had to be taken again."""
    differs: list[str]
    seconds: float

    @property
    def well(self) -> bool:
        return not self.differs and not self.lost_too_much


class Bench:
    """Recipes and undisturbed runs in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = folder / "tiny"
        assert wait(fork(lambda: tiny_folder(base), folder / "tiny.log")) == 0, (folder / "tiny.log").read_text()
        self.recipes = {name: self._recipe(name, sections, base) for name, sections in SETTINGS.items()}
        self.through: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        self.events: dict[str, list[str]] = {}

    def _recipe(self, name: str, sections: dict[str, Any], base: Path) -> Path:
        (self.folder / name).mkdir()
        everything: dict[str, Any] = {"adapter": _DROPOUT, "training": _SIX_STEPS} | sections
        return write_recipe(self.folder / name / "r.yaml", base, rows=tiny_rows(24), **everything)

    def arguments(self, setting: str, run: Path) -> list[str]:
        return ["train", str(self.recipes[setting]), "--set", f"run.folder={run}"]

    def measure(self, setting: str) -> None:
        """The undisturbed run, how long it takes, and everything it does to its folder."""
        if setting in self.through:
            return
        run, names = self.folder / setting / "through", self.folder / setting / "events"
        log, cache, events = run.with_suffix(".log"), run.with_suffix(".cache"), Events(run, names)
        started = time.monotonic()
        code = wait(start(self.arguments(setting, run), log, cache, events.install))
        assert code == 0, log.read_text()
        self.through[setting], self.seconds[setting] = run, time.monotonic() - started
        self.events[setting] = names.read_text().splitlines()

    def try_out(self, blow: Blow, spoil: Callable[[], None] = lambda: None) -> Outcome:
        """One trial. `spoil` prepares the process that continues the run: a test of this test."""
        self.measure(blow.setting)
        started = time.monotonic()
        place = Path(tempfile.mkdtemp(dir=self.folder))
        run, log, cache = place / "run", place / "log", place / "cache"
        code, where = self._end(blow, run, log, cache)
        before = log.read_text()
        steps = _steps_in(run)
        done = wait(start(self.arguments(blow.setting, run), log, cache, spoil))
        said = log.read_text()
        after = said[len(before) :]
        differs = [f"exit code {done}: {after[-300:]}"] if done else self._differences(blow.setting, run)
        if "Traceback" in said:
            differs.append(f"a traceback: {said[said.index('Traceback') :][:1500]}")
        differs += _wrong_code(blow.kind, code, before)
        resumed = _resumed_after(after)
        every = (SETTINGS[blow.setting].get("training") or _SIX_STEPS)["save_every"]
        least = (steps - 1) // every * every if steps else 0  # the checkpoint of the last line may not have been whole
        shutil.rmtree(place)
        seconds = round(time.monotonic() - started, 2)
        too_far_back = -1 < resumed < least
        return Outcome(blow.kind, blow.setting, blow.number, where, code, resumed, too_far_back, differs, seconds)

    def _end(self, blow: Blow, run: Path, log: Path, cache: Path) -> tuple[int, str]:
        """Start a run and end it; the exit code and where that was."""
        arguments = self.arguments(blow.setting, run)
        draw = random.Random(f"{blow.kind} {blow.setting} {blow.number}")
        if blow.kind in (AT_EVENT, POWER):
            events, journal = Events(run, last=blow.number), Journal(run.with_name("journal"))

            def prepare() -> None:
                if blow.kind == POWER:
                    journal.install()
                events.install()

            code = wait(start(arguments, log, cache, prepare))
            if blow.kind == POWER and run.exists():
                after_power_cut(run, journal.kept)
            return code, self.events[blow.setting][blow.number - 1]
        signals = _SIGNALS[blow.kind.removeprefix(COMMAND)]
        if blow.kind.startswith(COMMAND):
            return self._end_command(arguments, draw, signals, run, log, cache)
        moment = draw.uniform(0.02, 1.0) * self.seconds[blow.setting]
        again = draw.choice([0.0, 0.002, 0.02])
        return kill_after(start(arguments, log, cache), moment, *signals, pause=again), f"{moment:.3f} s"

    def _end_command(
        self, arguments: list[str], draw: random.Random, signals: list[int], run: Path, log: Path, cache: Path
    ) -> tuple[int, str]:
        """The real command, ended some time after its first steps."""
        environment = os.environ | {"DPO_STUDIO_CACHE": str(cache)}
        with log.open("w") as words:
            command = [str(Path(sys.executable).with_name("dpo")), *arguments]
            process = subprocess.Popen(command, stdout=words, stderr=words, env=environment)
        step = draw.randint(1, 90)
        while process.poll() is None and _steps_in(run) < step:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        for number in signals:
            if process.poll() is None:
                process.send_signal(number)
                time.sleep(0.01)
        return process.wait(timeout=120), f"step {step}"

    def _differences(self, setting: str, run: Path) -> list[str]:
        through = self.through[setting]
        names = ["metrics.jsonl", "recipe.yaml", "recipe.typed.yaml", "adapter", f"checkpoints/{_last(through)}"]
        there, here = (_contents(folder, names) for folder in (through, run))
        for content in (there, here):  # where it lies is no difference
            content.pop("recipe.typed.yaml", None)
            content["recipe.yaml"] = re.sub(rb"  folder: .*", b"", content.get("recipe.yaml", b""))
        found = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        numbers = [json.loads((folder / "result.json").read_text()) for folder in (through, run)]
        found += [key for key in ("steps", "accuracy", "held_out_loss") if numbers[0][key] != numbers[1][key]]
        found += [str(path) for path in run.rglob(".*") if path.name != ".lock"]  # its content is for people
        found += [name for name in ("report.html", "environment.json") if not (run / name).is_file()]
        return found


AT_EVENT = "SIGKILL at a write, rename, fsync or removal"
RANDOM = "SIGKILL at a random time"
TERM = "SIGTERM"
INT = "SIGINT"
TWICE = "SIGINT twice"
POWER = "power cut: what was not synced is gone"
COMMAND = "real command: "
_SIGNALS: dict[str, list[int]] = {
    RANDOM: [signal.SIGKILL],
    TERM: [signal.SIGTERM],
    INT: [signal.SIGINT],
    TWICE: [signal.SIGINT, signal.SIGINT],
}


def all_blows(bench: Bench) -> Iterator[Blow]:
    """Every trial of `make faults`."""
    for setting in ("cached", "moving"):
        bench.measure(setting)
        for number, name in enumerate(bench.events[setting], 1):
            if setting == "cached" or ("checkpoints" in name and number % 3 == 0):
                yield Blow(AT_EVENT, setting, number)
            if setting == "cached" and number % 4 == 0:
                yield Blow(POWER, setting, number)
    for setting in ("cached", "live", "moving", "bco", "mixture"):
        for kind, count in ((RANDOM, 10), (TERM, 5), (INT, 5), (TWICE, 5)):
            yield from (Blow(kind, setting, number) for number in range(count))
    for kind in (RANDOM, TERM, INT, TWICE):
        yield from (Blow(COMMAND + kind, "long", number) for number in range(3))


def few_blows(bench: Bench) -> Iterator[Blow]:
    """Twelve for every day: the places where a checkpoint is half there, and one of each other kind."""
    bench.measure("cached")
    names = bench.events["cached"]

    def place(pattern: str) -> int:
        return next(number for number, name in enumerate(names, 1) if re.fullmatch(pattern, name))

    writing = r"RUN/checkpoints/\.step-4\.writing-[^/]+"
    for pattern in (
        rf"half {writing}/optimizer\.safetensors",
        rf"empty {writing}/manifest\.json",
        rf"os\.rename {writing}",
        r"os\.rmdir RUN/checkpoints/\.step-2\.writing-[^/]+",
        r"os\.rename RUN/\.result\.json.*",
    ):
        yield Blow(AT_EVENT, "cached", place(pattern))
    yield Blow(POWER, "cached", place(rf"os\.rename {writing}") + 2)
    yield from (Blow(RANDOM, "moving", number) for number in range(2))
    yield from (Blow(kind, "bco", 0) for kind in (RANDOM, TERM, INT, TWICE))


def _wrong_code(kind: str, code: int, said: str) -> list[str]:
    """A killed process is killed; one that is asked to stop says so with a code of its own, and never with a trace."""
    # -15, -2: by the signal itself, before the command listens or after it has said goodbye; 143 and 130 to a shell
    wanted = {RANDOM: {-9}, TERM: {143, -15}, INT: {130}, TWICE: {130, -2}, AT_EVENT: {-9}, POWER: {-9}}
    late = set() if kind in (AT_EVENT, POWER) else {0}
    if code not in wanted[kind.removeprefix(COMMAND)] | late:
        return [f"ended with {code}: {said[-300:]}"]
    return []


def _steps_in(run: Path) -> int:
    """Whole lines of metrics.jsonl but that of step 0."""
    metrics = run / "metrics.jsonl"
    return max(0, metrics.read_text().count("\n") - 1) if metrics.exists() else 0


def _resumed_after(said: str) -> int:
    if "nothing to do" in said:
        return -1
    found = re.search(r"continuing .* after step (\d+)", said)
    return int(found[1]) if found else 0


def _last(run: Path) -> str:
    return max((path.name for path in (run / "checkpoints").iterdir()), key=lambda name: int(name[5:]))


def _contents(folder: Path, names: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        files = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
        found |= {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return found


def table(results: list[Outcome]) -> str:
    """Kinds of blows, how many, how they ended, as Markdown."""
    lines = [
        "| what happened | settings | trials | ended before it | continued from a checkpoint | same bytes |",
        "|" + "---|" * 6,
    ]
    for kind in dict.fromkeys(result.kind for result in results):
        these = [result for result in results if result.kind == kind]
        settings = ", ".join(dict.fromkeys(result.setting for result in these))
        early = sum(result.code == 0 for result in these)
        resumed = sum(result.resumed_after > 0 for result in these)
        lines.append(f"| {kind} | {settings} | {len(these)} | {early} | {resumed} | {sum(r.well for r in these)} |")
    well = sum(result.well for result in results)
    minutes = sum(result.seconds for result in results) / 60
    lines.append(f"| **all** | | **{len(results)}** | | | **{well}** |")
    return "\n".join([*lines, "", f"{minutes:.0f} minutes of trials, one after another."])


def put_table(page: Path, text: str) -> None:
    """Between the marks of the page."""
    mark = "<!-- the table of `make faults` -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(mark)
    page.write_text(f"{before}{mark}\n{text}\n{mark}{rest.partition(mark)[2]}", encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--few", action="store_true")
    options.add_argument("--part", default="1/1", metavar="I/N")
    options.add_argument("--results", type=Path, help="JSON lines, added to as trials end")
    options.add_argument("--table", type=Path, help="the page to put the table in")
    given = options.parse_args()
    part, parts = map(int, given.part.split("/"))
    importlib.import_module("dpo_studio.workflows.training")  # once, for every trial
    kept = given.results.read_text().splitlines() if given.results and given.results.exists() else []
    results = [Outcome(**json.loads(line)) for line in kept]
    done = {(result.kind, result.setting, result.number) for result in results}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        blows = list(few_blows(bench) if given.few else all_blows(bench))[part - 1 :: parts]
        for blow in blows:
            if (blow.kind, blow.setting, blow.number) in done:
                continue
            result = bench.try_out(blow)
            results.append(result)
            if given.results:
                with given.results.open("a") as lines:
                    lines.write(json.dumps(asdict(result)) + "\n")
            if not result.well:
                print(f"{blow}: {result}", file=sys.stderr, flush=True)
        if given.few:  # and one that has to fail, or the others would prove nothing
            spoilt = bench.try_out(Blow(AT_EVENT, "bco", len(bench.events.get("bco", [])) // 2), _forget)
            assert not spoilt.well, "a run continued without its optimizer went unnoticed"
    counted = Counter(result.well for result in results)
    print(f"{counted[True]} of {len(results)} trials ended in the same bytes")
    if given.table:
        put_table(given.table, table(results))
    sys.exit(0 if counted[False] == 0 else 1)


def _forget() -> None:
    """In the child: a resume that loses AdamW's averages."""
    session: Any = importlib.import_module("dpo_studio.workflows.training.session")
    real = session.restore

    def restore(checkpoint: Path, policy: Any, state: Any) -> None:
        real(checkpoint, policy, state)
        state.optimizer.state.clear()

    patch.object(session, "restore", restore).start()


if __name__ == "__main__":
    main()
