"""One, two and four GPUs of one machine, data parallel, in one call: tokens/s of each over those of one.

    python benchmarks/several_gpus.py --gpus 1,2 --out benchmarks/results/h100-ranks.json

Weak scaling: 64 pairs a process and step (`--pairs-a-rank`), random weights in the shape of a 7B, the pairs drawn from
one list. Each number of GPUs is a set of processes of its own (torchrun's launcher; one GPU has no launcher), through
the product's loop, its dealing and its sums. The file is written after every figure, and by the workers after every
step, so a call that is cut off leaves what it had. `--gpus 1,2,2` trains twice on two: the adapters must be the same
bytes. A number with an s is sharded (`--gpus 1,2,2s`): each process has a slice of every layer (FSDP2). The ideal
printed beside a ratio is what the dealing of the pairs allows: all wait for the busiest process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

_WARM_UP = 3
"""Steps left out: the first compiles, the next two meet lengths that the first did not have."""
_PAIRS = 1024


def main() -> None:
    """Measure each number of GPUs, or be one of the processes that are measured."""
    options = _options()
    if options.notes is not None:
        _work(options)
        return
    began = time.time()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures: list[dict[str, Any]] = []
    for place, word in enumerate(options.gpus.split(",")):
        size, options.sharding = int(word.rstrip("s")), "full" if word.endswith("s") else "none"
        left = options.within - (time.time() - began)
        if left < 60:
            figures.append({"gpus": size, "sharding": options.sharding, "reason": "no time was left"})
            _write(out, {"options": vars(options), "figures": figures})
            break
        figures.append(_measured(options, size, out.with_suffix(f".{place}.notes"), left))
        _compare(figures)
        _write(out, {"options": vars(options), "figures": figures})
        print(json.dumps({key: value for key, value in figures[-1].items() if key != "step_seconds"}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, in this order; the first is the baseline")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--mix", default="ultrafeedback")
    parser.add_argument("--base", default="ours", choices=["ours", "rows8", "packed", "fp8"], help="bf16, FP8, GPTQ")
    parser.add_argument("--pairs-a-rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=20, help="measured, after the warm-up")
    parser.add_argument("--reference", default="cached", choices=["cached", "live"])
    parser.add_argument("--within", type=float, default=540.0, help="seconds of the whole call")
    parser.add_argument("--out", default="several_gpus.json")
    parser.add_argument("--notes", help=argparse.SUPPRESS)
    parser.add_argument("--sharding", default="none", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(options: argparse.Namespace, size: int, notes: Path, seconds: float) -> dict[str, Any]:
    """What `size` processes did in at most so many seconds."""
    notes.unlink(missing_ok=True)
    given = {key: value for key, value in vars(options).items() if key not in ("notes", "gpus", "within")}
    words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    work = [str(Path(__file__).resolve()), *words, "--notes", str(notes), "--within", str(seconds - 20)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    process = subprocess.Popen([sys.executable, *launcher, *work], env=environment, start_new_session=True)
    try:
        code: int | str = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its workers
        code = f"cut off after {seconds:.0f} s"
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {"stage": "nothing"}
    notes.unlink(missing_ok=True)
    return (
        {"gpus": size, "sharding": options.sharding} | known | ({} if code == 0 else {"reason": f"ended with {code}"})
    )


def _compare(figures: list[dict[str, Any]]) -> None:
    """The ratio of the last figure to the first, and whether a repeated one has the same bytes."""
    last, first = figures[-1], figures[0]
    if "tokens_per_second" not in last or "tokens_per_second" not in first:
        return
    last["ratio"] = last["tokens_per_second"] / first["tokens_per_second"] * first["gpus"]
    last["ideal"] = last["gpus"] / last["imbalance"]
    same = [
        each
        for each in figures[:-1]
        if (each["gpus"], each["sharding"]) == (last["gpus"], last["sharding"]) and "adapter_sha256" in each
    ]
    if same:
        last["same_bytes_as_before"] = same[-1]["adapter_sha256"] == last["adapter_sha256"]


def _write(file: Path, content: dict[str, Any]) -> None:
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def _work(options: argparse.Namespace) -> None:
    """One process: train, and note what is known after every step."""
    spawned = time.time()
    import torch

    from dpo_studio.ranks import Ranks
    from meter import device_name

    ranks = Ranks.of_environment()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if options.device == "cuda" else "cpu")
    notes = Path(options.notes)
    news: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "reference": options.reference}

    def say(**more: Any) -> None:
        news.update(more)
        if ranks.leads:
            _write(notes, news)

    with ranks.together():
        _train(options, ranks, device, spawned + options.within, say)
    sys.stdout.flush()
    os._exit(0)  # tearing down CUDA, NCCL and compilers takes seconds, and has nothing left to say


def _train(options: argparse.Namespace, ranks: Any, device: Any, deadline: float, say: Any) -> None:
    from dpo_studio.config import TrainingSection
    from dpo_studio.learning.logprobs import pair_logps
    from dpo_studio.learning.reference import reference_logps
    from dpo_studio.learning.state import TrainingState
    from dpo_studio.learning.train import train
    from dpo_studio.models.adapters import as_reference
    from dpo_studio.models.layers import compiled_layers
    from dpo_studio.objectives import DPO
    from dpo_studio.policy.policy import Policy
    from dpo_studio.tokens.dealing import rows_of_rank
    from dpo_studio.tokens.pack import Steps
    from meter import memory, synchronise
    from ours import our_policy
    from shapes import MIXES, mean_unique_tokens, random_pairs, shaped, unique_tokens

    shape = shaped(options.shape)
    pairs = random_pairs(MIXES[options.mix], _PAIRS, shape.vocabulary)
    say(stage="making the model")
    policy = our_policy(shape, device, options.base, ranks if options.sharding == "full" else None)
    pairs_per_step = options.pairs_a_rank * ranks.size
    steps = Steps(pairs, pairs_per_step, options.tokens, 0, 1, 10**6, rows=rows_of_rank(ranks.rank, ranks.size))
    section = TrainingSection(pairs_per_step=pairs_per_step, schedule="constant", warmup=0)
    state = TrainingState.fresh(Policy(policy), section, steps.total, ranks=ranks)
    ranks.as_first(Policy(policy).trained.values())

    def live(batches: Sequence[Any]) -> list[Any]:
        with as_reference(policy):
            return [pair_logps(policy, batch) for batch in batches]

    with compiled_layers(policy) if device.type == "cuda" else nullcontext():
        if options.reference == "cached":
            say(stage="the reference's log-probs")
            began = time.time()
            with as_reference(policy):
                known = reference_logps(policy, pairs, token_budget=options.tokens, cache=None, ranks=ranks)
            say(reference_seconds=time.time() - began)
            steps = Steps(
                pairs,
                pairs_per_step,
                options.tokens,
                0,
                1,
                10**6,
                lambda places: known.map(lambda x_P: x_P[list(places)]),
                rows_of_rank(ranks.rank, ranks.size),
            )
        say(stage="step 1")
        seconds, tokens, imbalance = [], [], []
        start = time.time()
        for report in train(Policy(policy), steps, DPO(), state, None if options.reference == "cached" else live):
            synchronise(device)
            ranks.wait()
            seconds.append(time.time() - start)
            start = time.time()
            tokens.append(sum(unique_tokens(pairs[place]) for place in steps.pairs_of(report.step)))
            imbalance.append(report.imbalance)
            say(stage=f"step {report.step + 1}", step_seconds=[round(each, 4) for each in seconds])
            if report.step == 1:
                say(first_loss=report.metrics["loss"])
            measured = len(seconds) - _WARM_UP
            if measured > 0:
                spent = sum(seconds[_WARM_UP:])
                rate = sum(tokens[_WARM_UP:]) / spent
                peaks = ranks.each(memory(device)["peak_gib"])
                say(
                    steps=measured,
                    seconds=spent,
                    tokens_per_second=rate,
                    pairs_per_second=rate / mean_unique_tokens(pairs),
                    imbalance=sum(imbalance[_WARM_UP:]) / measured,
                    peak_gib_of_ranks=peaks,
                    last_loss=report.metrics["loss"],
                )
            late = time.time() + 2 * seconds[-1] > deadline
            if measured >= options.steps or ranks.any(late):
                break
    digest = hashlib.sha256()
    for tensor in Policy(policy).state().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    ranks.check_same(digest.digest(), "adapters")  # every rank has the same bits
    say(stage="done", adapter_sha256=digest.hexdigest())


if __name__ == "__main__":
    main()
