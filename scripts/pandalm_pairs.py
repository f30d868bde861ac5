"""PandaLM's human-judged test set -> TRL's conversational JSONL: the answer most of the three annotators preferred.

    python scripts/pandalm_pairs.py testset-v1.json.gz pandalm.jsonl

Ties (label 0, or no majority), answers that are not text, empty or identical, and exact duplicates are left out.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main(source: str, target: str) -> None:
    """Convert and print what was left out."""
    rows = json.loads(gzip.decompress(Path(source).read_bytes()))
    counts: Counter[str] = Counter()
    kept: dict[str, None] = {}
    for row in rows:
        line, reason = _pair(row)
        if line is not None and line in kept:
            line, reason = None, "duplicate"
        counts[reason] += 1
        if line is not None:
            kept[line] = None
    Path(target).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    print(f"{len(rows)} rows: {dict(counts)}", file=sys.stderr)


def _pair(row: dict[str, Any]) -> tuple[str | None, str]:
    votes = Counter(row[f"annotator{number}"] for number in (1, 2, 3))
    label, count = votes.most_common(1)[0]
    answers = {1: row["response1"], 2: row["response2"]}
    if label == 0 or count < 2:
        return None, "tie"
    if not all(isinstance(answer, str) for answer in answers.values()):
        return None, "answer is not text"
    if not all(answer.strip() for answer in answers.values()) or answers[1] == answers[2]:
        return None, "empty or identical"
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    turns = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": answers[label]}],
        "rejected": [{"role": "assistant", "content": answers[3 - label]}],
    }
    return json.dumps(turns, ensure_ascii=False), "kept"


if __name__ == "__main__":
    main(*sys.argv[1:])
