"""The three gates with one check removed at a time: some test must notice each.

    python -m tests.removed_checks [--only MODULE] [--line N] [--jobs 2]

A check is a condition that refuses, a part of one (`and`, `or`, a comparison of several), a call made for its refusal,
an exception that is translated or expected, a flag of an opened file. The modules are compiled once with a switch at
each, so a removed check costs a fork and no import; so do processes that tests start. The switches also tell which
tests come to the place where the check makes a difference: first all tests run and are asked that, then for every check
those alone, until one fails.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

__all__ = ["Check", "checks_of", "main"]

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "dpo_studio"
_LOADED = ("test_gate_loads.py", "test_gate_loads_adapters.py", "test_guards_scan.py", "test_models_load.py")
_READ = ("test_gate_reads.py", "test_gate_reads_rows.py", "test_preferences_sources.py")
_WRITTEN = ("test_gate_writes.py", "test_gate_writes_folders.py")
_JUDGES = ("test_judges_hostile.py", "test_evaluation_llm.py")
MODULES: dict[str, tuple[str, ...]] = {
    "scan.py": _LOADED,
    "sizes.py": _LOADED,
    "models/adapter_settings.py": _LOADED,
    "models/tokenizer_settings.py": _LOADED,
    "models/finite.py": (
        "test_not_finite.py::test_an_adapter_that_is_not_finite_is_not_exported",
        "test_not_finite.py::test_an_adapter_whose_weights_cannot_be_read_is_no_traceback",
    ),
    "models/load.py": (
        *_LOADED,
        "test_out_of_memory.py::test_a_base_that_does_not_fit_is_told_of_by_name_with_the_way_on",
        "test_workflows_unfit.py::test_a_token_that_the_embedding_lacks_is_named",
    ),
    "models/folder.py": (*_LOADED, "test_models_folder.py", "test_workflows_unfit.py"),
    "models/find.py": ("test_models_load.py", "test_gate_loads.py"),
    "reading.py": (*_READ, "test_gate_loads.py"),
    "preferences/bounds.py": _READ,
    "preferences/tables.py": _READ,
    "writing.py": _WRITTEN,
    "runs/location.py": (*_WRITTEN, "test_cache.py"),
    "cache.py": ("test_cache.py",),
    "paths.py": ("test_guards_text.py", "test_gate_writes.py"),
    "evaluation/secret.py": _JUDGES,
    "evaluation/http_client.py": _JUDGES,
    "evaluation/endpoint.py": _JUDGES,
}
"""Each module, and the files whose tests are to notice."""
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "preferences/bounds.py",
        "opened > MAX_DEPTH in opened > MAX_DEPTH and is_deeper(row, MAX_DEPTH)",
    ): "spares a walk: a row has no more levels than brackets",
    ("preferences/bounds.py", "if len(text) < _COUNT_FROM"): "spares a count: a shorter row has not so many commas",
}
"""(module, the check as it is printed): why nothing can tell that it is gone."""
_TIMED = ("costs_a_7b", "add_no_second")
"""In the names of tests that measure time, which on a busy machine say nothing about a check."""
_SECONDS = 20.0
"""Of tests for one check, the fastest first, by what they took when nothing was removed: whatever they do not notice
counts as survived."""
_MEMORY = 8 * 2**30
"""Bytes beyond the imports' that tests may take without a bound on something."""
_OPTIONS = (
    *("-q", "-p", "no:cacheprovider", "-m", "not slow", "--durations=0", "--tb=no"),
    *("-W", "ignore:Module already imported"),  # pytest's own plugins, by what was imported before it
)
_GONE, _SEEN = "REMOVED_CHECK", "REMOVED_CHECKS_SEEN"
"""Environment variables: the check that is removed, and the file that the checks are told to where they matter."""


@dataclass(frozen=True)
class Check:
    """One check of a module."""

    module: str
    number: int
    line: int
    what: str

    @property
    def key(self) -> str:
        """Its name between processes."""
        return f"{self.module}:{self.number}"


# What the compiled modules call


class _Never(Exception):
    """What nothing raises, in the place of an exception that is no longer expected."""


_told: set[str] = set()


def _matters(key: str) -> bool:
    """Asked where a check makes a difference: whether it is still there."""
    if key not in _told and (file := os.environ.get(_SEEN)):
        _told.add(key)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(descriptor, f"{key}\n".encode())
        os.close(descriptor)
    return _is_there(key)


def _is_there(key: str) -> bool:
    return os.environ.get(_GONE) != key


def _kind(key: str, kind: type) -> type:
    return kind if _matters(key) else _Never


def _flag(key: str, flag: int) -> int:
    return flag if _matters(key) else 0


_SWITCHES = {
    f"{name}__": function
    for name, function in (("matters", _matters), ("is_there", _is_there), ("kind", _kind), ("flag", _flag))
}


# Finding the checks


class _Switched(ast.NodeTransformer):
    """A module with a switch at each check."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.found = module, list[Check]()
        self._tree = ast.parse(source)
        self._ours = _names_of_ours(self._tree)
        self._function: ast.FunctionDef | ast.AsyncFunctionDef | None = None
        self.tree = ast.fix_missing_locations(self.visit(self._tree))

    def _check(self, node: ast.AST, what: str) -> ast.Constant:
        check = Check(self.module, len(self.found), getattr(node, "lineno", 0), what)
        self.found.append(check)
        return ast.Constant(check.key)

    def _call(self, switch: str, *given: ast.expr) -> ast.Call:
        return ast.Call(ast.Name(f"{switch}__", ast.Load()), list(given), [])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._in_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._in_function(node)

    def _in_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        outer, self._function = self._function, node
        node.body = [made for statement in node.body for made in _listed(self.visit(statement))]
        self._function = outer
        return node

    # Conditions

    def visit_If(self, node: ast.If) -> ast.AST:
        refuses = self._refuses(node)
        shown = ast.unparse(node.test)
        if refuses or self._decides() or self._raises():
            node.test = self._parts(node.test)
        if refuses:
            node.test = _both(node.test, self._call("matters", self._check(node, f"if {shown}")))
        node.body = [made for statement in node.body for made in _listed(self.visit(statement))]
        node.orelse = [made for statement in node.orelse for made in _listed(self.visit(statement))]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        if _is_refusal(node.body):
            shown = ast.unparse(node.test)
            node.test = _both(self._parts(node.test), self._call("matters", self._check(node, f"if {shown}")))
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is None:
            return node
        if self._decides():
            node.value = self._parts(node.value)
        node.value = self.visit(node.value)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        node.body = self._parts(node.body)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.BoolOp) and isinstance(node.value.op, ast.And):
            node.value = self._parts(node.value)
        node.value = self.visit(node.value)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        node.ifs = [self._parts(test) for test in node.ifs]
        return node

    def _parts(self, test: ast.expr) -> ast.expr:
        """A condition whose parts can be taken out one at a time, however deep they stand."""
        return _Parts(self).visit(test)  # type: ignore[no-any-return]

    def _decides(self) -> bool:
        """Whether the function says yes or no."""
        returns = self._function.returns if self._function is not None else None
        return returns is not None and ast.unparse(returns) in ("bool", "BadRow | None")

    def _raises(self) -> bool:
        return self._function is not None and any(isinstance(node, ast.Raise) for node in ast.walk(self._function))

    def _refuses(self, node: ast.If) -> bool:
        last = node.body[-1]
        if isinstance(last, ast.If):
            return self._refuses(last)
        if isinstance(last, ast.Raise) or (isinstance(last, ast.Expr) and _is_refusal(last.value)):
            return True
        if isinstance(last, ast.Return):
            return self._decides() or _is_refusal(last.value)
        *_, end = _ends_of(node)  # a chain of reasons, of which the last else finds none
        return len(node.body) == 1 and isinstance(last, ast.Assign) and isinstance(end, ast.Return)

    # Calls, exceptions, flags

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.stmt]:
        call = node.value
        if not isinstance(call, ast.Call) or _is_refusal(call):
            return node
        encodes = isinstance(call.func, ast.Attribute) and call.func.attr == "encode"
        if not encodes and _name(call.func) not in self._ours:
            self.generic_visit(node)
            return node
        key = self._check(node, ast.unparse(call))
        if not encodes and not any(word in _name(call.func) for word in ("check", "refuse")):
            return ast.If(self._call("matters", key), [node], [])
        told = ast.ExceptHandler(
            ast.Name("BaseException", ast.Load()), None, [ast.Expr(self._call("matters", key)), ast.Raise(None, None)]
        )
        return ast.If(self._call("is_there", key), [ast.Try([node], [told], [], [])], [])

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        body = [made for statement in node.body for made in _listed(self.visit(statement))]
        passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        assert node.type is not None
        shown = f"except {ast.unparse(node.type)}"
        if not passes_on:
            key = self._check(node, shown)
            body.insert(0, ast.If(_negated(self._call("matters", key)), [ast.Raise(None, None)], []))
        if isinstance(node.type, ast.Tuple):
            node.type.elts = [self._caught(kind, shown) for kind in node.type.elts]
        elif passes_on and shown != "except BaseException":
            node.type = self._caught(node.type, shown)
        node.body = body
        return node

    def _caught(self, kind: ast.expr, whole: str) -> ast.expr:
        return self._call("kind", self._check(kind, f"{ast.unparse(kind)} in {whole}"), kind)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if ast.unparse(node.right).startswith("os.O_"):
            node.right = self._call("flag", self._check(node.right, ast.unparse(node.right)), node.right)
        node.left = self.visit(node.left)
        return node


class _Parts(ast.NodeTransformer):
    def __init__(self, module: _Switched) -> None:
        self._module = module

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        shown = ast.unparse(node)
        node.values = [self._part(value, node.op, shown) for value in node.values]
        return node

    def _part(self, value: ast.expr, joined: ast.boolop, whole: str) -> ast.expr:
        key = self._module._check(value, f"{ast.unparse(value)} in {whole}")
        inner = self.visit(value)
        asked = self._module._call("matters", key)
        if isinstance(joined, ast.Or):
            return _both(inner, asked)
        return ast.BoolOp(ast.Or(), [inner, _negated(asked)])

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """A chain as comparisons of two, for what stands between has no effects."""
        if len(node.ops) == 1:
            self.generic_visit(node)
            return node
        terms = [node.left, *node.comparators]
        pairs = zip(terms, node.ops, terms[1:], strict=False)
        chain = [ast.copy_location(ast.Compare(left, [op], [right]), node) for left, op, right in pairs]
        return self.visit(ast.copy_location(ast.BoolOp(ast.And(), list[ast.expr](chain)), node))  # type: ignore[no-any-return]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`isinstance(x, A | B)`: each kind."""
        whole = ast.unparse(node)
        self.generic_visit(node)
        if _name(node.func) == "isinstance" and isinstance(node.args[1], ast.BinOp):
            node.args[1] = ast.Tuple(
                [self._module._caught(kind, whole) for kind in _alternatives(node.args[1])], ast.Load()
            )
        return node


def _alternatives(kinds: ast.expr) -> Iterator[ast.expr]:
    if isinstance(kinds, ast.BinOp):
        yield from _alternatives(kinds.left)
        yield kinds.right
    else:
        yield kinds


def _ends_of(node: ast.If) -> Iterator[ast.stmt]:
    """The last statement of each branch."""
    yield node.body[-1]
    if len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        yield from _ends_of(node.orelse[0])
    elif node.orelse:
        yield node.orelse[-1]


def _is_refusal(value: ast.expr | None) -> bool:
    """`TOO_LONG` and its like, yielded or returned; a call that never returns; an error that is returned."""
    if isinstance(value, ast.Yield):
        return _is_refusal(value.value)
    if isinstance(value, ast.Call):
        return _name(value.func) in ("_refuse", "Declined", "_Again", "JudgeError")
    return isinstance(value, ast.Name) and value.id.lstrip("_").startswith("TOO_")


def _names_of_ours(tree: ast.Module) -> set[str]:
    """Functions of the module, and what it imports from the project."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dpo_studio"):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _listed(made: Any) -> list[Any]:
    return made if isinstance(made, list) else [made]


def _both(left: ast.expr, right: ast.expr) -> ast.expr:
    return ast.BoolOp(ast.And(), [left, right])


def _negated(value: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), value)


def checks_of(module: str) -> list[Check]:
    """Every check of a module, in the order of its text."""
    return _Switched(module, (SOURCE / module).read_text(encoding="utf-8")).found


# Importing with switches


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        module = Path(self.path).relative_to(SOURCE).as_posix()
        tree = _Switched(module, Path(self.path).read_text(encoding="utf-8")).tree
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_SWITCHES)
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        file = f"{fullname.removeprefix('dpo_studio.').replace('.', '/')}.py"
        if not fullname.startswith("dpo_studio.") or file not in MODULES:
            return None
        loader = _Loader(fullname, str(SOURCE / file))
        return importlib.util.spec_from_file_location(fullname, SOURCE / file, loader=loader)


def install() -> None:
    """From here on, and in every process that this one starts, the modules are imported with their switches."""
    sys.meta_path.insert(0, _Finder())


# Running tests


@dataclass
class _Told:
    """A plugin of pytest: which checks mattered to each test, what it took, and the first test that failed."""

    seen: Path
    tests: dict[str, tuple[float, list[str]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    _seconds: float = 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed or (report.when == "call" and report.skipped):
            self.failed.append(report.nodeid)
        self._seconds += report.duration if report.when == "call" else 0
        if report.when == "teardown":
            mattered = self.seen.read_text().split() if self.seen.exists() else []
            self.tests[report.nodeid] = self._seconds, sorted(set(mattered))
            self._seconds = 0.0
            self.seen.unlink(missing_ok=True)
            _told.clear()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """What a fixture of the session costs is paid by each check again."""
        items[:] = [item for item in items if not any(word in item.name for word in _TIMED)]
        self.costs = {item.nodeid: 6.0 * ("tiny_run" in item.fixturenames) for item in items}


def _run(tests: Sequence[str], scratch: Path, *, gone: str, answer: Path) -> None:
    """In a fork: run tests without a check, and leave in `answer` what came of it."""
    import pytest

    seen = scratch / "seen"
    os.environ |= {_GONE: gone, _SEEN: str(seen)}
    log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    told = _Told(seen)
    first = ["-x"] if gone else []
    code = int(pytest.main([*first, *_OPTIONS, f"--basetemp={scratch / 'tests'}", *tests], plugins=[told]))
    answer.write_text(json.dumps([code, told.failed, told.tests, told.costs]))


def _forked(work: Callable[[], None]) -> int:
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.setsid()
        work()
        code = 0
    except BaseException as error:
        with suppress(OSError):
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


@dataclass
class _Job:
    """A fork that runs tests."""

    name: str
    scratch: Path
    pid: int
    until: float

    def outcome(self) -> list[Any]:
        """What it answered; without an answer the tests died of what was done."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            return list(json.loads((self.scratch / "answer").read_text()))
        except (OSError, ValueError):
            return [1, ["the tests' process died or was waiting"], {}, {}]


Work = Sequence[tuple[str, Sequence[str], str, float]]
"""Name, tests, the check that is gone, and the seconds that may take."""


def _side_by_side(work: Work, place: Path, jobs: int) -> Iterator[tuple[str, list[Any]]]:
    """Each in a fork; its name and outcome as they come."""
    waiting, running = list(reversed(work)), list[_Job]()
    count = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            name, tests, gone, seconds = waiting.pop()
            scratch = place / f"{count}"
            count += 1
            scratch.mkdir()
            pid = _forked(lambda: _run(tests, scratch, gone=gone, answer=scratch / "answer"))  # noqa: B023 - run at once
            running.append(_Job(name, scratch, pid, time.monotonic() + seconds))
        for job in list(running):
            if os.waitpid(job.pid, os.WNOHANG)[0] or time.monotonic() > job.until:
                outcome = job.outcome()
                with suppress(ChildProcessError):
                    os.waitpid(job.pid, 0)
                running.remove(job)
                yield job.name, outcome
                shutil.rmtree(job.scratch, ignore_errors=True)
        time.sleep(0.02)


def _prepare(place: Path, files: Sequence[str]) -> None:
    """Imports, and an environment in which nothing needs a network; processes that tests start have switches, too.

    Tests are collected once: of the six seconds that the first test of a fork took, four were the imports of its file.
    """
    hook = place / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("from tests.removed_checks import install\ninstall()\n")
    ways = [str(hook), str(ROOT), str(SOURCE.parent), str(ROOT / "benchmarks")]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(ways),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # a pool's threads do not live on in a fork: whoever waits for them hangs
    }
    sys.path[:0] = ways[1:]
    install()
    import dpo_studio

    for module in pkgutil.walk_packages(dpo_studio.__path__, "dpo_studio."):
        if module.name != "dpo_studio.__main__":
            with suppress(ImportError):  # kernels want Triton, which a machine without a GPU has not
                importlib.import_module(module.name)
    import pytest
    import torch

    torch.set_num_threads(1)
    with (place / "collected").open("w") as said, redirect_stdout(said):
        code = pytest.main(["--collect-only", "-q", *_OPTIONS, *(f"tests/{file}" for file in files)])
    assert code == 0, (place / "collected").read_text()
    gc.collect()
    gc.freeze()  # pytest collects garbage five times as it ends: else a second each time, of what was imported here


Reached = Mapping[str, Sequence[tuple[float, str]]]
"""Of each check: seconds and names of the tests to which it matters."""


def _who_reaches(files: Sequence[str], place: Path, jobs: int) -> Reached:
    """Run everything once; a test that fails with nothing removed is said, and asked about nothing."""
    work = [(name, [f"tests/{name}"], "", 1200.0) for name in files]
    reached: dict[str, list[tuple[float, str]]] = {}
    for name, (code, failed, tests, costs) in _side_by_side(work, place, jobs):
        print(f"{name}: {len(tests)} tests, {len(failed)} of them fail or are skipped", *failed, flush=True)
        assert code in (0, 1), f"{name} cannot be run"
        for test, (seconds, mattered) in tests.items():
            for key in mattered if test not in failed else ():
                reached.setdefault(key, []).append((seconds + costs.get(test, 0), test))
    return reached


def _chosen(check: Check, reached: Reached, refusing: Collection[str]) -> tuple[list[str], float]:
    """The fastest of those that are to notice, first where something near by was refused: flags are passed by all."""
    files = tuple(f"tests/{name}" for name in MODULES[check.module])
    tests, total = list[str](), 0.0
    for _, seconds, test in sorted((one[1] not in refusing, *one) for one in reached.get(check.key, ())):
        if test.startswith(files) and (not tests or total + seconds <= _SECONDS):
            tests.append(test)
            total += seconds
    return tests, total


def _refused_near(check: Check, checks: Sequence[Check], reached: Reached) -> set[str]:
    """Tests in which a refusal of this module, at most eight lines away, took place."""
    near = (one for one in checks if one.module == check.module and abs(one.line - check.line) <= 8)
    keys = [one.key for one in near if one.what.startswith(("if ", "except "))]
    return {test for key in keys for _, test in reached.get(key, ())}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every check is noticed, 1 if one can be removed and nothing tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(MODULES), help="this module")
    parser.add_argument("--line", action="append", type=int, help="of one module, the checks of this line")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args(arguments)
    os.chdir(ROOT)
    modules = asked.only or list(MODULES)
    checks = [check for module in modules for check in checks_of(module) if not asked.line or check.line in asked.line]
    started = time.monotonic()
    print(f"{len(checks)} checks in {len(modules)} modules", flush=True)
    survived = []
    with tempfile.TemporaryDirectory(prefix="removed-") as scratch:
        place = Path(scratch).resolve()
        files = sorted({name for module in modules for name in MODULES[module]})
        _prepare(place, sorted({file.partition("::")[0] for file in files}))
        reached = _who_reaches(files, place, asked.jobs)
        chosen = {
            check.key: (check, *_chosen(check, reached, _refused_near(check, checks, reached))) for check in checks
        }
        survived = [check for check, tests, _ in chosen.values() if not tests]
        work = [(key, tests, key, 60 + 4 * total) for key, (_, tests, total) in chosen.items() if tests]
        for check in survived:
            print(f"NO TEST {check.module}:{check.line}: {check.what}", flush=True)
        for key, (code, failed, *_) in _side_by_side(work, place, asked.jobs):
            check = chosen[key][0]
            assert code not in (4, 5), f"the tests of {check} are not there"
            if code == 0:
                survived.append(check)
            print(f"{'by ' + failed[0] if code else 'SURVIVED'} {check.module}:{check.line}: {check.what}", flush=True)
    known = [check for check in survived if (check.module, check.what) in EQUIVALENT]
    for check in sorted(set(survived) - set(known), key=lambda check: check.key):
        print(f"can be removed: src/dpo_studio/{check.module}:{check.line}: {check.what}")
    print(
        f"{len(checks)} removed, {len(checks) - len(survived)} noticed, {len(known)} make no difference, "
        f"{len(survived) - len(known)} survived, in {time.monotonic() - started:.0f} s"
    )
    return int(len(survived) > len(known))


if __name__ == "__main__":
    from tests.removed_checks import main as of_the_module  # whose switches the modules get, and not __main__'s

    sys.exit(of_the_module())
