"""Law 3: what the cache gives is what the live reference computes, and nothing is computed twice or kept wrongly."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_studio.config import load_recipe
from dpo_studio.console.progress import Progress
from dpo_studio.learning import reference
from dpo_studio.learning.batched_logps import COLUMNS, batched_logps
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.reference_cache import ReferenceCache
from dpo_studio.models.adapters import as_reference
from dpo_studio.models.attention import PAIRS
from dpo_studio.objectives import PairLogps
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import micro_batches
from dpo_studio.workflows.training import preparing, run_training
from tests.pairs_of_ids import encoded, random_pairs
from tests.policies import policy_on
from tests.textbook import plain_logps
from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_runs import write_pairs

THIRTY = random_pairs(30)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path, {"weights": "a", "dtype": "float32"})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(attn_implementation=PAIRS)


def values(logps: PairLogps) -> list[list[float]]:
    return torch.stack([getattr(logps, name) for name in COLUMNS], 1).tolist()


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens each call of the model inside reads."""
    calls: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def compute(model: Any, pairs: Sequence[EncodedPair], cache: ReferenceCache | None) -> PairLogps:
    return reference_logps(model, pairs, token_budget=100, cache=cache)


def test_the_cached_reference_is_the_live_one_and_the_textbook_s(cache: ReferenceCache) -> None:
    """Live: micro-batch by micro-batch with the adapter off. fp32 sums come back from the file bit for bit."""
    policy = policy_on(attn_implementation=PAIRS, size=0.1)
    with as_reference(policy):
        cached = compute(policy, THIRTY, cache)
        again = compute(policy, THIRTY, cache)
    assert values(again) == values(cached)
    assert cached.chosen_P.dtype == torch.float32
    with torch.no_grad():
        for batch in micro_batches(THIRTY, range(30), 10_000):
            with as_reference(policy):
                live = pair_logps(policy, batch)
            places = list(batch.pairs)
            torch.testing.assert_close(cached.chosen_P[places], live.chosen_P, rtol=1e-6, atol=0)
            torch.testing.assert_close(cached.rejected_P[places], live.rejected_P, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                torch.tensor(values(cached))[places, 2:], torch.tensor(values(live))[:, 2:], rtol=1e-6, atol=0
            )
            assert torch.equal(cached.chosen_tokens_P[places], live.chosen_tokens_P)
        expected_P2 = plain_logps(tiny_model(), THIRTY)
    torch.testing.assert_close(torch.tensor(values(cached))[:, :2], expected_P2, rtol=1e-4, atol=0)


def test_a_second_use_computes_nothing(model: Any, cache: ReferenceCache) -> None:
    with counted(model) as first:
        whole = compute(model, THIRTY, cache)
    with counted(model) as second:
        assert values(compute(model, THIRTY[::-1], cache)) == values(whole)[::-1]
    assert len(first) > 1
    assert second == []


def test_added_pairs_are_the_only_ones_computed(model: Any, cache: ReferenceCache) -> None:
    """Twenty are known; of thirty, ten are read: as many tokens as those ten alone take."""
    compute(model, THIRTY[:20], cache)
    with counted(model) as alone:
        compute(model, THIRTY[20:], None)
    seen: list[int] = []
    with counted(model) as added:
        together = reference_logps(model, THIRTY, token_budget=100, cache=cache, progress=seen.append)
    assert added == alone
    assert seen[0] == 20
    assert sum(seen) == 30
    assert values(together) == [
        *values(compute(model, THIRTY[:20], cache)),
        *values(compute(model, THIRTY[20:], cache)),
    ]


def test_without_a_cache_everything_is_computed(model: Any, tmp_path: Path) -> None:
    compute(model, THIRTY, None)
    assert not list(tmp_path.iterdir())


def test_no_pairs_need_no_model(model: Any, cache: ReferenceCache) -> None:
    with counted(model) as calls:
        assert len(compute(model, [], cache)) == 0
    assert calls == []


def test_log_probs_come_in_the_order_asked_for(model: Any) -> None:
    """Longest first is the order of packing, not of the answer."""
    whole = values(batched_logps(model, THIRTY, token_budget=100))
    some = batched_logps(model, [THIRTY[i] for i in (7, 2, 29)], token_budget=100)
    torch.testing.assert_close(
        torch.tensor(values(some)), torch.tensor([whole[i] for i in (7, 2, 29)]), rtol=1e-6, atol=0
    )
    counts = [[len(THIRTY[i].chosen.ids), len(THIRTY[i].rejected.ids)] for i in (7, 2, 29)]
    assert torch.stack([some.chosen_tokens_P, some.rejected_tokens_P], 1).tolist() == counts


def test_an_entry_is_of_ids_and_of_what_is_scored(cache: ReferenceCache) -> None:
    """Moving a boundary between prompt, chosen and rejected, unscoring a token, swapping: all other entries. The row
    number is not part of it."""
    one = encoded([5, 6], [7, 8], [9])
    cache.save([one], PairLogps(*(torch.tensor([float(x)]) for x in (-1, -2, 2, 1, -0.5, -2))))
    others = [
        encoded([5], [6, 7, 8], [9]),
        encoded([5, 6, 7], [8], [9]),
        encoded([5, 6], [7], [8, 9]),
        encoded([5, 6], [7, 8], [9], unscored=(1,)),  # in the chosen answer alone
        one.swap(),
    ]
    assert cache.load(others) == [None] * 5
    other_way = encoded([5, 6], [9], [7, 8], unscored=(1,))  # in the rejected answer alone
    cache.save([one.swap()], PairLogps(*(torch.tensor([float(x)]) for x in (-2, -1, 1, 2, -2, -0.5))))
    assert cache.load([other_way]) == [None]
    assert cache.load([encoded([5, 6], [7, 8], [9], row=99)]) == [(-1.0, -2.0, -0.5, -2.0)]


def test_every_part_of_the_context_makes_another_file(tmp_path: Path) -> None:
    context = {"weights": "a", "adapter": "", "dtype": "torch.float32", "attention": "x", "device": "cpu", "torch": "2"}
    files = {ReferenceCache(tmp_path, context).file}
    assert ReferenceCache(tmp_path, dict(reversed(context.items()))).file in files
    for key in context:
        files.add(ReferenceCache(tmp_path, context | {key: "other"}).file)
    assert len(files) == 7


def test_numbers_that_are_not_finite_are_not_kept(cache: ReferenceCache) -> None:
    """They are asked for again, for the next time may be another dtype's fault mended."""
    columns = (torch.tensor([-1.0, math.nan, -3.0, -math.inf]), torch.tensor([-1.0, -2.0, math.inf, -4.0]))
    cache.save(THIRTY[:4], PairLogps(*columns * 3))
    assert cache.load(THIRTY[:4]) == [(-1.0,) * 4, None, None, None]


def fill(model: Any, cache: ReferenceCache) -> list[list[float]]:
    """Enough entries for a file of several pages."""
    many = random_pairs(400, answer=(1, 2), prompt=(2, 3))
    numbers = torch.arange(400.0)
    cache.save(many, PairLogps(*[numbers] * 6))
    return values(compute(model, THIRTY, cache))


def test_a_flipped_bit_in_a_number_is_noticed(model: Any, cache: ReferenceCache) -> None:
    """SQLite keeps no checksum of its pages: a number with another bit reads as a number. Here a bit in the first
    number of each of three entries, found by its eight bytes (SQLite stores doubles big-endian)."""
    before = fill(model, cache)
    content = bytearray(cache.file.read_bytes())
    for value in (before[0][0], before[7][0], before[20][0]):
        place = content.index(struct.pack(">d", value))
        content[place + 3] ^= 4
    cache.file.write_bytes(content)
    with sqlite3.connect(cache.file) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sum(row is None for row in cache.load(THIRTY)) == 3
    assert values(compute(model, THIRTY, cache)) == before


@pytest.mark.parametrize("damage", ["not a database", "empty", "cut", "a page overwritten", "all but the first page"])
def test_a_damaged_file_is_made_anew(model: Any, cache: ReferenceCache, damage: str) -> None:
    """A cache: what is lost is computed again, whether sqlite finds out on opening or only on reading a page."""
    before = fill(model, cache)
    content = bytearray(cache.file.read_bytes())
    assert len(content) > 4 * 4096
    match damage:
        case "not a database":
            content = bytearray(b"rubbish " * 1000)
        case "empty":
            content = bytearray()
        case "cut":
            content = content[: len(content) // 2 + 100]
        case "a page overwritten":
            content[4096:8192] = b"\xff" * 4096
        case "all but the first page":
            content[4096:] = b"\xff" * (len(content) - 4096)
    cache.file.write_bytes(content)
    assert values(compute(model, THIRTY, cache)) == before
    with counted(model) as calls:
        assert values(compute(model, THIRTY, cache)) == before
    assert calls == []


def test_a_file_that_cannot_be_used_is_left_alone(model: Any, cache: ReferenceCache, monkeypatch: Any) -> None:
    """Locked by another process for too long, or a full disk: an error, for the file itself may be whole."""
    before = fill(model, cache)
    content = cache.file.read_bytes()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda file, timeout: connect(file, timeout=0.05))
    other = connect(cache.file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        cache.load(THIRTY)
    other.close()
    assert cache.file.read_bytes() == content
    assert values(compute(model, THIRTY, cache)) == before


def test_what_an_interrupted_pass_saved_stays(
    model: Any, cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved every ten pairs; Ctrl-C within the third ten: twenty are there, and ten are computed."""
    monkeypatch.setattr(reference, "_PAIRS_BETWEEN_SAVES", 10)
    done = 0

    def progress(pairs: int) -> None:
        nonlocal done
        done += pairs
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_logps(model, THIRTY, token_budget=100, cache=cache, progress=progress)
    assert [known is not None for known in cache.load(THIRTY)] == [True] * 20 + [False] * 10
    with counted(model) as alone:
        compute(model, THIRTY[20:], None)
    with counted(model) as rest:
        compute(model, THIRTY, cache)
    assert rest == alone


def write_many(folder: str, start: int) -> None:
    """One transaction a pair, as fast as they go."""
    cache = ReferenceCache(Path(folder), {"weights": "a"})
    pairs = random_pairs(150, seed=5)
    for place in range(start, start + 100):
        number = torch.tensor([float(place)])
        cache.save([pairs[place]], PairLogps(*[number, -number] * 3))


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    """Pairs 0 to 99 and 50 to 149: nobody waits in vain, nothing is lost."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(str(tmp_path), start)) for start in (0, 50)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(600)
        assert writer.exitcode == 0
    known = ReferenceCache(tmp_path, {"weights": "a"}).load(random_pairs(150, seed=5))
    assert known == [(float(place), -float(place)) * 2 for place in range(150)]


@pytest.mark.parametrize("kind", ["simpo", "orpo", "sft", "wpo", "mixture"])
def test_training_pairs_have_a_reference_only_where_the_objective_reads_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whole runs of two steps on 12 pairs with 5 held out: the cache has all 17, or the held-out ones, whose accuracy
    is against the reference whatever was trained. The report is written. Live, nothing is computed in the step."""
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs.jsonl", 12)
    write_pairs(tmp_path / "held_out.jsonl", 5, seed=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {json.dumps(str(tiny_base))}, dtype: float32}}\n"
        "data: {train: {source: pairs.jsonl}, held_out: {source: held_out.jsonl}}\n"
        "training: {max_steps: 2, pairs_per_step: 4, tokens_per_micro_batch: 200, learning_rate: 1e-2}\n"
        f"objective: {{kind: {kind}}}\n"
    )
    done = run_training(load_recipe(recipe, [f"run.folder={tmp_path / 'run'}"]), Progress(quiet=True))
    (file,) = (tmp_path / "cache/reference").glob("*.sqlite")
    with sqlite3.connect(file) as database:
        (entries,) = database.execute("SELECT count(*) FROM logps5").fetchone()
    assert entries == (5 if kind in ("simpo", "orpo", "sft") else 17)
    assert 0 <= done.result["accuracy"] <= 1
    assert (tmp_path / "run/report.html").is_file()
    live = [f"run.folder={tmp_path / 'live'}", "reference.mode=live"]
    again = run_training(load_recipe(recipe, live), Progress(quiet=True))
    assert again.result["held_out_loss"] == pytest.approx(done.result["held_out_loss"], rel=1e-4)


def test_what_a_run_s_numbers_depend_on_is_in_the_key_and_nothing_else(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step each. Beta, learning rate, objective, seed, dropout, a moved base: the same file, and nothing computed.
    Precision, attention, other weights, another config, a starting adapter: a file of their own."""
    monkeypatch.setenv("DPO_STUDIO_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs.jsonl", 12)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {json.dumps(str(tiny_base))}, dtype: float32}}\n"
        "data: {train: {source: pairs.jsonl}, held_out: {fraction: 0}}\n"
        "training: {max_steps: 1, pairs_per_step: 4, tokens_per_micro_batch: 200}\n"
    )
    files = 0

    def another_file(name: str, *overrides: str) -> bool:
        nonlocal files
        run_training(load_recipe(recipe, [f"run.folder={tmp_path / name}", *overrides]), Progress(quiet=True))
        before, files = files, len(list((tmp_path / "cache/reference").glob("*.sqlite")))
        return files > before

    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    other = tiny_folder(tmp_path / "other", seed=1)
    theta = shutil.copytree(tiny_base, tmp_path / "theta")
    config = json.loads((theta / "config.json").read_text())
    (theta / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))

    assert another_file("first")
    same = ("objective.beta=0.3", "training.learning_rate=1e-3", "objective.kind=ipo", "training.seed=3")
    assert not another_file("same", *same, "adapter.dropout=0.1", f"model.path={moved}")
    assert another_file("precision", "model.dtype=bfloat16")
    assert another_file("attention", "model.attention=sdpa")
    assert another_file("weights", f"model.path={other}")
    assert another_file("config", f"model.path={theta}")
    assert another_file("adapter", f"model.adapter={tmp_path / 'first/adapter'}")
    monkeypatch.setattr(preparing, "computes_in_fp8", lambda model: True)
    assert another_file("compute")
