"""Kills real `dpo data make`s, continues them, and compares every byte of OUT with the one that nothing disturbed.

    python -m tests.making_faults FOLDER TRIALS

One process imports torch and forks every trial before it starts a thread of its own. Half of the trials end at an event
of the folder that OUT is in (an open, a write cut in half, an fsync, a rename), the others after a random time. A model
answers, in bf16's batches of eight prompts, and a reward model judges. At last a trial whose kept answers are spoilt
has to fail, or the others would prove nothing.
"""

from __future__ import annotations

import importlib
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.blows import Events, fork, kill_after, start, wait
from tests.tiny_folders import ending_folder, reward_folder
from tests.tiny_runs import tiny_rows, write_rows


def main() -> None:
    folder, trials = Path(sys.argv[1]), int(sys.argv[2])
    importlib.import_module("dpo_studio.cli.making")
    answering: Any = importlib.import_module("dpo_studio.workflows.making.answering")
    rating: Any = importlib.import_module("dpo_studio.workflows.making.rating")
    importlib.import_module("dpo_studio.workflows.making.run")
    importlib.import_module("dpo_studio.workflows.making.looking")
    importlib.import_module("dpo_studio.evaluation.reward_model")
    answering.PROMPTS_AT_ONCE, rating.PROMPTS_AT_ONCE = 8, 8

    def models() -> None:
        ending_folder(folder / "model")
        reward_folder(folder / "reward")

    assert wait(fork(models, folder / "models.log")) == 0, (folder / "models.log").read_text()
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny_rows(24)])

    def command(place: Path) -> list[str]:
        judge = f"reward:{folder / 'reward'}"
        options = ["--samples", "3", "--max-new-tokens", "20", "--choose", "all"]
        return ["data", "make", str(prompts), str(place / "out.jsonl"), "--model", str(folder / "model"),
                "--judge", judge, *options]  # fmt: skip

    through = folder / "through"
    through.mkdir()
    names = folder / "events"
    started = time.monotonic()
    code = wait(start(command(through), folder / "log", folder / "cache", Events(through, names).install))
    assert code == 0, (folder / "log").read_text()
    seconds, events = time.monotonic() - started, names.read_text().splitlines()
    expected = (through / "out.jsonl").read_bytes()
    assert expected.count(b"\n") > 10
    draw, interrupted = random.Random(0), 0
    for trial in range(trials + 1):
        place = folder / f"trial-{trial}"
        place.mkdir()
        number = 0
        if trial % 2:
            ended = kill_after(
                start(command(place), folder / "log", folder / "cache"), draw.uniform(0.05, 1) * seconds, signal.SIGKILL
            )
        else:
            number = draw.randint(1, len(events)) if trial < trials else len(events) // 2
            blow = Events(place, last=number)
            ended = wait(start(command(place), folder / "log", folder / "cache", blow.install))
        interrupted += ended == -signal.SIGKILL
        if trial == trials:
            spoil(place / "out.jsonl.work")
        if not (place / "out.jsonl").exists():
            done = wait(start(command(place), folder / "log", folder / "cache"))
            assert done == 0, (folder / "log").read_text()[-3000:]
        same = (place / "out.jsonl").read_bytes() == expected
        same = same and (place / "out.card.md").read_bytes() == (through / "out.card.md").read_bytes()
        if same != (trial < trials):
            sys.exit(f"trial {trial}, ended at {events[number - 1] if number else 'some time'}: the same bytes: {same}")
        shutil.rmtree(place)
    print(f"{trials} trials, {interrupted} of {trials + 1} killed, {len(events)} events, {seconds:.1f} s each")


def spoil(work: Path) -> None:
    """Another text in a kept answer."""
    for file in sorted(work.glob("answers-*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line | {"text": "spoilt " + line["text"]}) + "\n" for line in lines))


if __name__ == "__main__":
    main()
