"""How fast the studio is: a run of 20,000 steps drawn in Chromium, 200,000 pairs browsed and searched, its memory.

`python benchmarks/studio.py [--json FILE]`: two minutes on two cores; it needs Debian's chromium and the extra dev.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.studio_client import Browser, served
from tests.studio_pages import chromium, go, opened

from dpo_studio.studio.server import another_link

STEPS, PAIRS = 20_000, 200_000
DRAWN = """() => new Promise(done => {
    const began = performance.now();
    let longest = 0;
    let before = began;
    const look = () => {
        const now = performance.now();
        longest = Math.max(longest, now - before);
        before = now;
        if (document.querySelectorAll('.curve canvas').length >= 4)
            requestAnimationFrame(() => done([performance.now() - began, longest]));
        else requestAnimationFrame(look);
    };
    location.hash = '#/run/long';
    look();
})"""


def main() -> None:
    """Measure all of it, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    asked = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _long_run(folder / "long")
        _pairs(folder / "pairs.jsonl", asked.pairs)
        with served(folder) as studio:
            found |= _pages(studio)
            studio.link = another_link(folder, 0)
            studio.log_in()
            found |= _browsing(studio, asked.pairs)
            found["server_peak_MB"] = _kilobytes(studio, "VmHWM") / 1000
    for key, value in found.items():
        print(f"{key}={value:.3f}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


def _long_run(run: Path) -> None:
    """Metrics as a training writes them: every column, held-out numbers each 50 steps."""
    draw = random.Random(0)
    run.mkdir()
    recipe = "model: {path: base}\ndata: {train: {source: x.jsonl}}\ntraining: {max_steps: 20000}\n"
    for file in ("recipe.yaml", "recipe.typed.yaml"):
        (run / file).write_text(recipe)
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm"]
    names += ["learning_rate", "logps/chosen", "logps/rejected", "tokens/chosen", "tokens/rejected", "epoch"]
    held_out = ["eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"]
    with (run / "metrics.jsonl").open("w") as metrics:
        for step in range(1, STEPS + 1):
            row = {"step": step} | {name: draw.gauss(1, 0.2) for name in names}
            if step % 50 == 0:
                row |= {name: draw.gauss(1, 0.1) for name in held_out}
            metrics.write(json.dumps(row) + "\n")


def _pairs(file: Path, count: int) -> None:
    draw = random.Random(1)
    words = [f"word{number}" for number in range(5000)]
    with file.open("w") as out:
        for number in range(count):
            texts = (" ".join(draw.choices(words, k=size)) for size in (20, 60, 60))
            row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            out.write(json.dumps(row | {"prompt": f"{row['prompt']} {number}?"}) + "\n")


def _pages(studio: Browser) -> dict[str, float]:
    """Seconds to the first page, and from a click to the curves of the long run; the longest time without a frame."""
    with chromium() as browser:
        wrong: list[str] = []
        page = opened(browser, studio.link, wrong)
        page.reload(wait_until="networkidle")
        began = time.perf_counter()
        page.reload()
        page.get_by_role("heading", name="Runs").wait_for()
        first = time.perf_counter() - began
        sizes = page.evaluate(
            "performance.getEntriesByType('resource').filter(e => !e.name.includes('/api/'))"
            ".reduce((sum, each) => sum + each.encodedBodySize, 0)"
        )
        page.evaluate(DRAWN)
        again = []
        for _ in range(5):
            go(page, "machine")
            again.append(page.evaluate(DRAWN))
        go(page, "machine")
        assert not wrong, wrong
    drawn, longest = (sorted(each)[2] / 1000 for each in zip(*again, strict=True))
    return {"first_page_s": first, "first_page_kB": sizes / 1000, "curves_drawn_s": drawn, "longest_frame_s": longest}


def _browsing(studio: Browser, count: int) -> dict[str, float]:
    """Seconds of the index, of the slowest answer to others meanwhile, and of the slowest page and search after it."""
    slowest = {"session": 0.0}
    over = False

    def others() -> None:
        while not over:
            slowest["session"] = max(slowest["session"], _timed(lambda: studio.get("/api/session")))
            time.sleep(0.05)

    def page(**asked: Any) -> Any:
        return studio.client.get("/api/data/pairs", params={"path": "pairs.jsonl"} | asked).json()

    thread = Thread(target=others)
    thread.start()
    began = time.perf_counter()
    while page()["state"] != "ready":
        time.sleep(0.1)
    indexed = time.perf_counter() - began
    while studio.client.get("/api/data", params={"path": "pairs.jsonl"}).json()["state"] == "running":
        time.sleep(0.2)
    checked = time.perf_counter() - began
    over = True
    thread.join()
    looks: list[dict[str, Any]] = [
        {},
        {"offset": count // 2},
        {"offset": count - 20},
        {"search": "word17"},
        {"search": "word1 word2"},
    ]
    looks += [{"finding": "length-bias"}, {"finding": "length-bias", "offset": count // 4}, {"search": f"{count - 1}"}]
    pages = [_timed(partial(page, limit=20, **look)) for look in looks]
    return {
        "index_s": indexed,
        "doctor_s": checked,
        "others_meanwhile_s": slowest["session"],
        "slowest_page_s": max(pages),
        "slowest_page_is": float(pages.index(max(pages))),
    }


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _kilobytes(studio: Browser, what: str) -> int:
    status = Path(f"/proc/{studio.process.pid}/status").read_text()
    return int(next(row.split()[1] for row in status.splitlines() if row.startswith(what)))


if __name__ == "__main__":
    main()
