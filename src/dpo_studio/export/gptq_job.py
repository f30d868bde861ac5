"""The process in which gptqmodel works: `python -m dpo_studio.export.gptq_job JOB.json`.

It has one of its own because gptqmodel prints banners on stdout, replaces functions of transformers, safetensors and
triton when it is imported, and keeps threads. Here its output goes to stderr, and what was stdout carries one JSON line
an event. When the parent goes, however it goes, its end of stdin closes and this process goes too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

__all__: list[str] = []


def main(job_file: str) -> None:
    """Quantise what the job names; `{"layer": n}` after each layer."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    _quantise(json.loads(Path(job_file).read_text(encoding="utf-8")), events)
    sys.stderr.flush()
    os._exit(0)  # gptqmodel's threads, and the one above, are not waited for


def _leave_with_the_parent() -> None:
    while os.read(0, 1 << 10):
        pass
    os._exit(1)


def _quantise(job: dict[str, Any], events: TextIO) -> None:
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    torch.manual_seed(0)
    config = GPTQConfig(**job["config"], offload_to_disk=True, offload_to_disk_path=job["offload"])
    model = GPTQModel.from_pretrained(job["model"], config, dtype=getattr(torch, job["dtype"]))
    model.layer_callback = _Layers(events)
    rows = [{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in job["rows"]]
    model.quantize(rows, batch_size=job["batch_size"], calibration_data_min_length=1)
    model.save_quantized(job["out"])


class _Layers:
    """Told of every finished layer by gptqmodel, twice; passes it on once."""

    def __init__(self, events: TextIO) -> None:
        self._events = events

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
        """gptqmodel's own signature."""
        if submodule_finalized:
            print(json.dumps({"layer": layer_idx}), file=self._events, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
