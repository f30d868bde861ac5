"""How long `dpo data check` takes for a file the size of UltraFeedback, and how much memory.

python benchmarks/data_check.py --pairs 60000 --model bundled:smollm2-135m-instruct --json data_check.json

Each check is the command in a process of its own, whose peak memory is what the operating system counted. The pairs are
made: prompts of about 200 words and answers of about 250, drawn by frequency from the words of the bundled pairs, 1 %
of the rows copies of another and 1 % its opposite. With datasketch installed (it is no dependency) its MinHash signs
1,000 answers beside ours: the last line is its time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from dpo_studio.config import SourceSection
from dpo_studio.doctor.duplicates import text_of_turns
from dpo_studio.preferences.minhash import signature
from dpo_studio.preferences.sources import read_pairs

__all__ = ["check", "made_texts", "write_pairs"]

_SIGNED = 1000


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--model", help="check with this model's tokenizer too")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args()
    record: dict[str, Any] = {"kind": "data-check", "pairs": options.pairs, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, options.pairs)
        record["megabytes"] = round(file.stat().st_size / 1e6)
        record["text"] = check(file)
        print(f"text alone: {_words(record['text'])}", flush=True)
        if options.model:
            record["tokens"] = check(file, "--model", options.model)
            print(f"with the tokenizer of {options.model}: {_words(record['tokens'])}", flush=True)
    record["signing"] = signing()
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, milliseconds in record["signing"].items():
        print(f"{name}: {milliseconds:.3f} ms for 700 words")
    if "datasketch" in record["signing"]:
        print(f"ratio={record['signing']['datasketch'] / record['signing']['ours']:.2f}")


def write_pairs(file: Path, count: int) -> None:
    """So many pairs, as JSON Lines in TRL's shape with scores."""
    draw = random.Random(0)
    words, weights = _vocabulary()

    def text(mean: int) -> str:
        return " ".join(draw.choices(words, cum_weights=weights, k=max(8, round(draw.gauss(mean, mean / 4)))))

    row: dict[str, Any] = {}
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            if number % 100 == 1:
                pass  # a copy of the row before
            elif number % 100 == 3:
                row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
            else:
                row = {"prompt": text(200), "chosen": text(250), "rejected": text(250)}
                row |= {"score_chosen": draw.randint(5, 10), "score_rejected": draw.randint(1, 7)}
            stream.write(json.dumps(row) + "\n")


def _vocabulary() -> tuple[list[str], list[int]]:
    """The words of the bundled pairs and how often each occurs, added up."""
    pairs = read_pairs(SourceSection(source="bundled:everyday")).pairs
    texts = [text_of_turns(turns) for pair in pairs for turns in (pair.prompt, pair.chosen, pair.rejected)]
    counts = Counter(" ".join(texts).split())
    total, cumulated = 0, []
    for number in counts.values():
        total += number
        cumulated.append(total)
    return list(counts), cumulated


def check(file: Path, *arguments: str) -> dict[str, float]:
    """Seconds, peak MiB and pairs of `dpo data check FILE ...`."""
    command = [sys.executable, "-c", "from dpo_studio.cli import main; main()", "data", "check", str(file), "--json"]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said, _ = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"dpo data check ended as {process.returncode}")
    report = json.loads(said)
    # The largest of all children so far: the check with a tokenizer comes last, and is the larger one.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    found = {finding["name"]: finding["count"] for finding in report["findings"] if finding["count"]}
    return {"seconds": round(seconds, 1), "peak_mib": round(peak), "pairs": report["pairs"], **found}


def made_texts(count: int) -> list[str]:
    """Texts of 700 words."""
    draw = random.Random(1)
    words, weights = _vocabulary()
    return [" ".join(draw.choices(words, cum_weights=weights, k=700)) for _ in range(count)]


def signing() -> dict[str, float]:
    """Milliseconds a text of 700 words: ours, and if it is there datasketch's (64 places, crc32, words by threes)."""
    texts = made_texts(_SIGNED)
    started = time.process_time()
    for text in texts:
        signature(text)
    found = {"ours": (time.process_time() - started) / len(texts) * 1000}
    try:
        datasketch = import_module("datasketch")
    except ImportError:
        return found
    started = time.process_time()
    for text in texts:
        datasketch.MinHash(num_perm=64, hashfunc=zlib.crc32).update_batch(_three_words(text.split()))
    return found | {"datasketch": (time.process_time() - started) / len(texts) * 1000}


def _three_words(words: Sequence[str]) -> set[bytes]:
    return {" ".join(words[at : at + 3]).encode() for at in range(len(words) - 2)}


def _words(measured: dict[str, float]) -> str:
    return f"{measured['pairs']:,} pairs in {measured['seconds']} s, peak {measured['peak_mib']} MiB"


if __name__ == "__main__":
    main()
