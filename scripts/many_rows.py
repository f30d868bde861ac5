"""Write N short labelled rows, to measure `dpo data`: python scripts/many_rows.py 1000000 rows.jsonl (or rows.json)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

count, file = int(sys.argv[1]), Path(sys.argv[2])
array = file.suffix == ".json"
with file.open("w") as out:
    out.write("[" if array else "")
    for n in range(count):
        answers = {"output_1": f"It is {2 * n + 1}.", "output_2": f"I think {2 * n}."}
        row = {"instruction": f"What is {n} plus {n + 1}?"} | answers | {"preference": (1, 2, 1.5)[n % 3]}
        out.write(("," if array and n else "") + json.dumps(row) + ("" if array else "\n"))
    out.write("]" if array else "")
