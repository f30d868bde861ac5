"""Files of strangers, mutated: every reader answers with a value or an error of ours, and touches nothing else.

    python -m tests.fuzz [--readers 20000] [--verbs 600] [--seed N] [--only NUMBER] [--without MODULE[:FUNCTION]]

Each number is a mutation: of one file of a small model or a run, by a generator that the seed and the number decide.
It is read by our readers in a process that is forked every 500 numbers from one that has imported everything; or a
whole verb runs on it in a fork of its own. What counts as found: an exception that is none of ours (or a traceback), 20
seconds, 4 GB, a process that dies, a known attack that is not refused by name, and whatever is opened, changed,
connected to or started outside the case's folder, as Python's audit events tell. What a library's own Rust code opens
makes no such event; for that there are pipes outside, on which it hangs.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib
import inspect
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import dpo_studio
from tests.attacks import attacked
from tests.mutations import Mutation, mutated

__all__ = ["Found", "Ground", "main"]

SECONDS = 20
"""Of one case, of a processor's time: what else this machine does must not count."""
PATIENCE = 60
"""Seconds of one case that waits, for a pipe say; it is killed a little later where no signal reaches it."""
MEMORY = 4 * 2**30
"""Bytes of address space beyond what the imports have taken."""
BATCH = 500
"""Cases of readers that share a process: what one leaves behind in it, the next meet."""


@dataclass(frozen=True)
class Found:
    """One thing that should not have been."""

    number: int
    case: str
    what: str


@dataclass
class Ground:
    """Where the fuzzing takes place: a model, a run and a place outside, made once; each case works on a copy."""

    place: Path

    @property
    def outside(self) -> Path:
        """What no case may touch."""
        return self.place / "outside"

    @property
    def seeds(self) -> Path:
        """As they were made: `model`, `sharded`, `run`, `adapter`, `r.yaml`, `own.jinja`, `pairs.jsonl` and its .gz."""
        return self.place / "seeds"

    def case(self) -> Path:
        """A fresh copy of the seeds."""
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.seeds, folder)
        os.chdir(folder)  # relative paths, and runs whose recipe names no folder
        return folder

    def make(self) -> None:
        """Everything, with `dpo train`; some seconds."""
        from tests.tiny_models import tiny_folder
        from tests.tiny_runs import dpo, write_recipe

        self.seeds.mkdir(parents=True)
        model = tiny_folder(self.seeds / "model")
        recipe = write_recipe(self.seeds / "r.yaml", model)
        said = dpo("train", recipe)
        assert said.code == 0, said.err
        (model / "added_tokens.json").write_text("{}")
        shutil.copyfile(model / "chat_template.jinja", self.seeds / "own.jinja")
        shutil.copytree(self.seeds / "run" / "adapter", self.seeds / "adapter")
        (self.seeds / "pairs.jsonl.gz").write_bytes(gzip.compress((self.seeds / "pairs.jsonl").read_bytes()))
        self._move_paths()
        sharded = self.seeds / "sharded"
        shutil.copytree(model, sharded)
        _shard(sharded)
        self.outside.mkdir()
        for name in ("secret.json", "secret.safetensors", "secret.txt"):
            (self.outside / name).write_text("{}")
        shutil.copyfile(model / "model.safetensors", self.outside / "weights.safetensors")
        for name in ("pipe.json", "pipe.safetensors"):
            os.mkfifo(self.outside / name)

    def _move_paths(self) -> None:
        """Recipes and adapters name the case's own copy, not the seeds."""
        configs = (self.seeds / folder / "adapter_config.json" for folder in ("adapter", "run/adapter"))
        for file in (self.seeds / "r.yaml", *(self.seeds / "run").glob("recipe*.yaml"), *configs):
            file.write_text(file.read_text().replace(str(self.seeds), str(self.place / "case")))


def _shard(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


# What reads each file

Reader = Callable[[Path], object]


def _model(name: str) -> list[Reader]:
    from dpo_studio.config import ModelSection
    from dpo_studio.models.find import is_whole
    from dpo_studio.models.folder import open_model
    from dpo_studio.models.load import load_chat_model

    def look(case: Path) -> object:
        section = ModelSection(path=str(case / name))
        folder = open_model(section.path)
        folder.check_base(section)
        folder.encoder(section)
        return is_whole(folder.path) and folder.fingerprint

    def load_it(case: Path) -> object:
        load_chat_model(ModelSection(path=str(case / name), dtype="float32"))
        return None

    return [look, load_it]


def _own_template(case: Path) -> object:
    """One that a recipe names, beside a model that has its own."""
    from dpo_studio.config import ModelSection
    from dpo_studio.models.folder import open_model

    section = ModelSection(path=str(case / "model"), chat_template=str(case / "own.jinja"))
    return open_model(section.path).encoder(section) and None


def _pairs(name: str) -> list[Reader]:
    from dpo_studio.config import SourceSection
    from dpo_studio.preferences.sources import read_pairs

    def read(case: Path) -> object:
        source = read_pairs(SourceSection(source=str(case / name)))
        return "\n".join(refusal.reason for refusal in source.refused)

    return [read]


def _run_readers() -> dict[str, list[Reader]]:
    from dpo_studio.learning.checkpoints import newest_checkpoint
    from dpo_studio.runs.data_digests import date_of, recipe_of
    from dpo_studio.runs.facts import read_run
    from dpo_studio.runs.folder import RunFolder
    from dpo_studio.runs.health import health_of

    def of(read: Callable[[RunFolder], object]) -> Reader:
        def read_as_verbs_do(case: Path) -> object:
            run = RunFolder(case / "run")
            run.refuse_what_leads_out()
            return read(run)

        return read_as_verbs_do

    def page(case: Path) -> object:
        return health_of(read_run(case / "run"))

    def lines(name: str) -> list[Reader]:
        return [of(lambda run: list(run.lines(name))), page]

    return {
        "run/recipe.yaml": [of(lambda run: run.recipe()), of(recipe_of), page],
        "run/recipe.typed.yaml": [of(lambda run: run.typed())],
        "run/result.json": [of(lambda run: run.result()), page],
        "run/metrics.jsonl": lines("metrics.jsonl"),
        "run/timing.jsonl": lines("timing.jsonl"),
        "run/data.json": [of(date_of), of(recipe_of)],
        "run/checkpoints/step-4/manifest.json": [of(lambda run: newest_checkpoint(run.checkpoints))],
        "run/checkpoints/step-4/state.json": [of(lambda run: newest_checkpoint(run.checkpoints))],
    }


def readers() -> dict[str, list[Reader]]:
    """Every file that is mutated, and what reads it."""
    from dpo_studio.config import load_recipe
    from dpo_studio.models.adapters import read_adapter_config
    from dpo_studio.scan import scan_folder
    from dpo_studio.workflows.loading import load_any

    adapter: list[Reader] = [
        lambda case: scan_folder(case / "run" / "adapter", "adapter"),
        lambda case: read_adapter_config(case / "run" / "adapter"),
    ]
    alone: list[Reader] = [lambda case: load_any(str(case / "adapter"), dtype="float32") and None]
    return {
        "model/config.json": _model("model"),
        "model/generation_config.json": _model("model")[:1],
        "model/tokenizer_config.json": _model("model")[:1],
        "model/added_tokens.json": _model("model")[:1],
        "model/chat_template.jinja": _model("model")[:1],
        "model/model.safetensors": _model("model"),
        "sharded/model.safetensors.index.json": _model("sharded"),
        "run/adapter/adapter_config.json": adapter,
        "adapter/adapter_config.json": alone,
        "adapter/adapter_model.safetensors": alone,
        "pairs.jsonl": _pairs("pairs.jsonl"),
        "pairs.jsonl.gz": _pairs("pairs.jsonl.gz"),
        "r.yaml": [lambda case: load_recipe(case / "r.yaml")],
        **_run_readers(),
        "own.jinja": [_own_template],
    }


def verbs() -> list[tuple[str, tuple[str, ...]]]:
    """(file, the verb that meets it); CASE stands for the case's folder."""
    pairs, short = "CASE/pairs.jsonl", ("--max-new-tokens", "2", "--temperature", "0")
    on_model = [
        ("score", "CASE/model", pairs),
        ("generate", "CASE/model", "--prompt", "hi", *short),
        ("train", "CASE/r.yaml", "--dry-run"),
    ]
    on_run = [
        ("score", "CASE/run", pairs),
        ("generate", "CASE/run", "--prompt", "hi", *short),
        ("export", "CASE/run", "CASE/out", "--to", "adapter"),
        ("train", "CASE/r.yaml", "--set", "run.folder=CASE/run"),
    ]
    table: dict[str, list[tuple[str, ...]]] = {
        "model/config.json": on_model,
        "model/generation_config.json": on_model,
        "model/tokenizer_config.json": on_model,
        "sharded/model.safetensors.index.json": [("score", "CASE/sharded", pairs)],
        "run/adapter/adapter_config.json": on_run[:3],
        "r.yaml": [("train", "CASE/r.yaml", "--dry-run"), ("train", "CASE/r.yaml")],
        "run/recipe.yaml": on_run,
        "run/recipe.typed.yaml": on_run[2:],
        "run/result.json": on_run[2:],
        "run/metrics.jsonl": on_run[3:],
        "run/timing.jsonl": on_run[3:],
        "run/data.json": [on_run[0], on_run[3]],
        "run/checkpoints/step-4/manifest.json": on_run[3:],
        "run/checkpoints/step-4/state.json": on_run[3:],
    }
    return [(file, verb) for file, its in table.items() for verb in its]


# One case


@dataclass
class Watch:
    """Python's audit events of one process: what is touched outside the places that a case may touch."""

    ground: Ground
    seen: list[str] = field(default_factory=list)
    on: bool = False

    def __post_init__(self) -> None:
        own = (self.ground.place / name for name in ("case", "cache", "tmp"))
        self._typed = str(self.ground.place / "case" / "r.yaml")
        self._own = (*(str(place) for place in own), "/dev/null")
        libraries = {sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys", "/dev/urandom"}
        libraries |= {"/dev/zero"}  # it may be opened, and looked at: whoever reads it runs out of time or memory
        libraries |= {"/etc/mime.types", "/etc/localtime", str(Path(__file__).parents[1]), *dpo_studio.__path__}
        self._readable = (*self._own, *(os.path.realpath(place) for place in libraries), *libraries)

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        """What `sys.addaudithook` calls; it must neither raise nor take long."""
        if not self.on:
            return
        if event in _PROCESSES and given[:2] != _UNAME:
            self.seen.append(f"{event} {given!r:.200}")
            return
        if event == "open":
            path, mode, flags = given
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(
                mode and set(mode) & set("wax+")
            )
            self._look(event, path, self._own if writes else self._readable)
        elif event in ("os.listdir", "os.scandir"):
            self._look(event, given[0], self._readable)
        elif event in _CHANGES and not any(isinstance(one, int) and one >= 0 for one in given[1:]):
            for path in given[: 2 if event in ("os.rename", "os.link") else 1]:
                self._look(event, path, self._own)

    def _look(self, event: str, path: Any, allowed: Sequence[str]) -> None:
        if path is None or isinstance(path, int):
            return
        plain = os.fsdecode(path)
        if allowed is self._readable and plain == self._typed:  # its user may have made it a link to anywhere
            return
        if plain.startswith(_LIBRARIES) and ".." not in plain:  # most events by far: imports, and what they look for
            return
        self.on = False
        try:
            real = os.path.realpath(plain)
            if not any(real == place or real.startswith(place.rstrip("/") + "/") for place in allowed):
                self.seen.append(f"{event} {real}")
        except ValueError:  # a NUL: the call fails as well
            pass
        finally:
            self.on = True


_UNAME = ("uname", ["uname", "-p"])
"""What Python's own `platform.processor` starts, for a run's environment.json."""
_LIBRARIES = (f"{sys.prefix}/", f"{sys.base_prefix}/")
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn"}
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate", "os.chown"}


class _Hung(BaseException):
    """Its time is over; no library catches this one."""


def _ring(number: int, frame: FrameType | None) -> None:
    raise _Hung


@contextmanager
def _limits() -> Iterator[None]:
    limits = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, PATIENCE)}
    for timer, (number, seconds) in limits.items():
        signal.signal(number, _ring)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in limits:
            signal.setitimer(timer, 0)


def _of_number(ground: Ground, seed: int, number: int, files: Sequence[str]) -> tuple[str, Mutation]:
    """The file that is mutated, each in turn, and how: every other time by an attack, of each kind in turn."""
    draw = random.Random(f"{seed}:{number}")
    name, turn = files[number % len(files)], number // len(files)
    content = (ground.seeds / name).read_bytes()
    if turn % 2:
        return name, mutated(draw, name, content, ground.outside)
    return name, attacked(draw, name, content, ground.outside, turn // 2)


def _read(case: Path, its: Sequence[Reader], says: str) -> str:
    """What is wrong with how the readers take it; empty if nothing is. One of them owes the words of `says`."""
    from dpo_studio.errors import DPOStudioError

    heard = []
    for read in its:
        try:
            with _limits(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                heard.append(str(read(case) or ""))
        except DPOStudioError as error:
            if "Traceback" in str(error):
                return f"a traceback in a message: {error}"
            heard.append(str(error))
        except _Hung:
            return f"hangs\n{traceback.format_exc()[-1500:]}"
        except BaseException:
            return _traceback()
    if says and not any(re.search(says, one) for one in heard):
        return f"is not refused with the words {says!r}, but: {heard}"
    return ""


def _traceback() -> str:
    """The end of it, its lines cut: a message may hold five thousand digits."""
    return "\n".join(line[:300] for line in traceback.format_exc().splitlines())[-2500:]


_MAY_BE_LINKS = ("r.yaml", "own.jinja", "pairs.jsonl", "model/model.safetensors", "adapter/adapter_model.safetensors")
"""What its user names may be a link to anywhere, and weights one to another disk: only numbers are read from them."""


def _readers_batch(ground: Ground, seed: int, numbers: Sequence[int], told: Path, stop_at: int) -> None:
    """In a process of its own: read each case, tell of it in a line; what is found may end it."""
    table = readers()
    watch = Watch(ground)
    sys.addaudithook(watch.hook)
    _bound_memory()
    case = ground.case()
    for number in numbers:
        name, mutation = _of_number(ground, seed, number, list(table))
        _tell(told, number, f"{name}: {mutation.what}", None)
        mutation.put(case / name)
        watch.on = True
        wrong = _read(case, table[name], mutation.says)
        if name.startswith(_MAY_BE_LINKS) and mutation.what.startswith("a link"):
            watch.seen.clear()
        if (name, mutation.what.split("'")[1:2]) == ("run/recipe.yaml", ["chat_template"]):
            watch.seen[:] = [event for event in watch.seen if not event.startswith("open ")]  # read, to be compared
        watch.on = False
        outside, watch.seen[:] = list(watch.seen), []
        if outside:
            wrong = f"touches what is outside: {outside[:3]}\n{wrong}"
        _tell(told, number, f"{name}: {mutation.what}", wrong)
        stop_at -= bool(wrong)
        if not stop_at:
            return
        if mutation.put_back(case / name, ground.seeds / name):
            case = ground.case()


def _verb(ground: Ground, seed: int, number: int, told: Path) -> None:
    """In a process of its own: the verb itself on one case."""
    from dpo_studio.cli import main as dpo

    table = verbs()
    _, verb = table[number % len(table)]
    name, mutation = _of_number(ground, seed, number, [file for file, _ in table])
    case = ground.case()
    if "checkpoints" in name or name == "run/data.json":  # a run that goes on: there is no result yet
        (case / "run" / "result.json").unlink()
        shutil.rmtree(case / "run" / "adapter")
    mutation.put(case / name)
    about = f"dpo {' '.join(verb)} | {name}: {mutation.what}"
    _tell(told, number, about, None)
    watch = Watch(ground)
    sys.addaudithook(watch.hook)
    _bound_memory()
    sys.argv = ["dpo", *(word.replace("CASE", str(case)) for word in verb)]
    out, err, wrong = StringIO(), StringIO(), ""
    started = time.monotonic()
    try:
        with _limits(), redirect_stdout(out), redirect_stderr(err):
            watch.on = True
            try:
                dpo()
            finally:
                watch.on = False
    except SystemExit as left:
        if left.code not in (None, 0, 1, 2, 3):
            wrong = f"exit {left.code}: {err.getvalue()[-1500:]}"
    except _Hung:
        wrong = f"hangs after {time.monotonic() - started:.0f} s\n{traceback.format_exc()[-1500:]}"
    except BaseException:
        wrong = _traceback()
    if "No such command" in err.getvalue():
        wrong = err.getvalue()
    if "Traceback (most recent call last)" in err.getvalue():
        wrong = f"a traceback: {err.getvalue()[-2500:]}"
    if watch.seen:
        wrong = f"touches what is outside: {watch.seen[:3]}\n{wrong}"
    _tell(told, number, about, wrong)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _tell(told: Path, number: int, case: str, wrong: str | None) -> None:
    """A line before a case (`wrong` is None) and one after it, on the disk before anything else happens."""
    with told.open("a") as file:
        file.write(json.dumps([number, case, wrong]) + "\n")


# All of them


def _forked(work: Callable[[], None], told: Path, quiet_s: float) -> str:
    """Run `work` in a fork; say why it did not end by itself, if so. Where it tells nothing for long, it is killed."""
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    size, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"the process died ({code})"
        now = told.stat().st_size if told.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > quiet_s:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"hangs, and no signal reaches it: killed after {quiet_s:.0f} s"
        time.sleep(0.005)


def _outcome(told: Path, died: str) -> tuple[list[Found], int]:
    """What a fork told: what it found, and the last number it began."""
    lines = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    found = [Found(number, case, wrong) for number, case, wrong in lines if wrong]
    last = lines[-1][0] if lines else -1
    if died:
        found.append(Found(last, lines[-1][1] if lines else "?", died))
    return found, last


def _said(found: list[Found], seed: int) -> list[Found]:
    for one in found:
        print(f"\n--seed {seed} --only {one.number}: {one.case}\n{one.what}", flush=True)
    return found


def run_readers(ground: Ground, seed: int, numbers: Sequence[int], stop_at: int) -> list[Found]:
    """Every number through the readers; after a death the next fork goes on behind the case it died of."""
    found: list[Found] = []
    told, left = ground.place / "told", list(numbers)
    while left and len(found) < stop_at:
        batch = left[:BATCH]
        more = stop_at - len(found)
        died = _forked(
            lambda batch=batch, more=more: _readers_batch(ground, seed, batch, told, more),  # type: ignore[misc]
            told,
            1.5 * PATIENCE,
        )
        its, last = _outcome(told, died)
        found += _said(its, seed)
        left = left[(batch.index(last) + 1 if last in batch else 1) if died else len(batch) :]
    return found


def run_verbs(ground: Ground, seed: int, numbers: Sequence[int], stop_at: int) -> list[Found]:
    """Every number through its verb, each in a fork."""
    found: list[Found] = []
    told = ground.place / "told"
    for number in numbers:
        if len(found) >= stop_at:
            break
        died = _forked(lambda number=number: _verb(ground, seed, number, told), told, 1.5 * PATIENCE)  # type: ignore[misc]
        found += _said(_outcome(told, died)[0], seed)
    return found


def _prepare(place: Path) -> Ground:
    """Imports, seeds, and an environment in which nothing needs a network or a home."""
    for name in ("cache", "tmp"):
        (place / name).mkdir()
    os.environ |= {
        "DPO_STUDIO_CACHE": str(place / "cache"),
        "HF_HOME": str(place / "cache" / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(place / "tmp"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # a pool's threads do not live on in a fork: whoever waits for them hangs
    }
    tempfile.tempdir = None
    ground = Ground(place)
    for module in pkgutil.walk_packages(dpo_studio.__path__, "dpo_studio."):  # or each fork would import it again
        if module.name != "dpo_studio.__main__":
            with suppress(ImportError):  # kernels want Triton, which a machine without a GPU has not
                importlib.import_module(module.name)
    import torch

    torch.set_num_threads(1)
    if died := _forked(
        ground.make, place / "told", 300
    ):  # in a fork as well: this process uses nothing that has threads
        raise RuntimeError(f"no seeds: {died}")
    return ground


OUT_OF_REACH = {
    "dpo_studio.preferences.bounds:numbered": "test_gate_reads_rows.py::test_rows_without_end_are_an_error",
    "dpo_studio.reading:open_input": "test_gate_reads.py::test_a_stream_has_limits",
    "dpo_studio.reading:_kept": "test_gate_reads.py::test_a_stream_has_limits",
    "dpo_studio.reading:_copied": "test_gate_reads.py::test_a_stream_has_limits",
    "dpo_studio.reading:_next_piece": "test_gate_reads.py::test_a_stream_has_limits",
    "dpo_studio.models.folder:ModelFolder.check_unchanged": (
        "test_models_folder.py::test_what_changes_between_the_look_and_the_load_is_refused"
    ),
}
"""Checks that no mutation of a file reaches in its time, and the test that holds each: of fifty million rows, of the
streams that a process is given, of a file that changes after it was looked at."""


def _checks(named: str) -> list[str]:
    """MODULE:FUNCTION of one check; of a module alone, each of its functions that raises something."""
    if ":" in named:
        return [named]
    tree = ast.parse(inspect.getsource(importlib.import_module(named)))
    owners: list[tuple[str, ast.Module | ast.ClassDef]] = [
        ("", tree),
        *((f"{one.name}.", one) for one in tree.body if isinstance(one, ast.ClassDef)),
    ]
    functions = [
        (where + one.name, one) for where, owner in owners for one in owner.body if isinstance(one, ast.FunctionDef)
    ]
    checks = [f"{named}:{name}" for name, one in functions if _raises(one)]
    for check in OUT_OF_REACH.keys() & set(checks):
        print(f"without {check}: out of reach, held by {OUT_OF_REACH[check]}", flush=True)
    return [check for check in checks if check not in OUT_OF_REACH]


def _raises(tree: ast.AST) -> bool:
    return any(isinstance(one, ast.Raise) for one in ast.walk(tree))


class _Silent(ast.NodeTransformer):
    """What a check raises is passed over, and it goes on."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Pass()


def _nothing(*given: Any, **more: Any) -> None:
    """In the place of a check that raises nothing itself."""


def _without_raising(check: FunctionType) -> CodeType:
    tree = ast.parse(textwrap.dedent(inspect.getsource(check)))
    if not _raises(tree):
        return _nothing.__code__
    function = _Silent().visit(tree).body[0]
    function.decorator_list = []
    made: dict[str, Any] = {}
    silent = compile(ast.fix_missing_locations(tree), check.__code__.co_filename, "exec")
    exec(silent, check.__globals__, made)  # noqa: S102 - our own source, less what it raises
    code: CodeType = made[function.name].__code__
    return code


@contextmanager
def _without(named: str) -> Iterator[None]:
    """A check taken out, for whoever has imported it: its code is replaced by the same that raises nothing."""
    module, _, path = named.partition(":")
    check: Any = importlib.import_module(module)
    for name in path.split("."):
        check = getattr(check, name)
    check = check.func if isinstance(check, cached_property) else inspect.unwrap(check)
    kept = check.__code__, check.__defaults__, check.__kwdefaults__
    code = _without_raising(check)
    if code is _nothing.__code__:
        check.__defaults__ = check.__kwdefaults__ = None
    check.__code__ = code
    try:
        yield
    finally:
        check.__code__, check.__defaults__, check.__kwdefaults__ = kept


def _notices(ground: Ground, named: str, seed: int, numbers: Sequence[int]) -> bool:
    """Whether the same mutations tell that a check is gone."""
    with _without(named), redirect_stdout(StringIO()):
        noticed = run_readers(ground, seed, numbers, stop_at=1)
    about = "NOT FOUND"
    if noticed:
        why = next((line for line in reversed(noticed[0].what.splitlines()) if line.strip()), "")
        about = f"found by {noticed[0].number}, {noticed[0].case:.90} ({why:.160})"
    print(f"without {named}: {about}", flush=True)
    return bool(noticed)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing was found, 1 if something was; 2 if a check can be taken out and nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, default=20_000)
    parser.add_argument("--verbs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: another one every day, printed")
    parser.add_argument("--only", type=int, default=None, help="one number again")
    parser.add_argument("--without", action="append", default=[], help="then again without it")
    parser.add_argument("--stop-at", type=int, default=50, help="so many findings end it")
    asked = parser.parse_args(arguments)
    seed = asked.seed if asked.seed is not None else int(time.time() // 86_400)
    print(f"seed {seed}: {asked.readers} mutations through the readers, {asked.verbs} through verbs", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        ground = _prepare(Path(scratch).resolve())
        one = [] if asked.only is None else [asked.only]
        found = run_readers(ground, seed, one or range(asked.readers), asked.stop_at) if asked.readers else []
        if asked.verbs:
            found += run_verbs(ground, seed, one or range(asked.verbs), asked.stop_at)
        noticed = [
            _notices(ground, named, seed, range(asked.readers)) for given in asked.without for named in _checks(given)
        ]
    print(f"{len(found)} found in {time.monotonic() - started:.0f} s (seed {seed})")
    return 1 if found else 0 if all(noticed) else 2


if __name__ == "__main__":
    sys.exit(main())
