"""The house keeps its rooms: what docs/design.md (section 2) says of them, held by the imports themselves.

An import inside a function counts like any other; one under `if TYPE_CHECKING` does not, for nothing runs it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

import dpo_studio

SRC = Path(dpo_studio.__file__).parent
ROOT = SRC.parents[1]
ROOMS = (
    *("errors", "paths", "disk", "ranks", "scan"),
    *("objectives", "config", "console", "frozen", "runs", "preferences", "tokens", "doctor", "models", "policy"),
    *("reports", "learning", "sampling", "evaluation", "export", "workflows", "studio", "cli"),
)
"""Low to high, as docs/design.md lists them: a room imports from itself and from those before it."""
BESIDE = {"reading": "disk", "cache": "disk", "sizes": "scan", "writing": "runs", "__main__": "cli"}
"""Modules at the top that belong to the room of another."""
MODULE_LINES, FUNCTION_LINES = 400, 60
TOO_LONG: dict[str, str] = {}
"""`room/module.py` or `room/module.py:function` -> why it is longer. Three at most, and none that has become short."""
OUTSIDE = {
    "dpo_studio.learning.logprobs.pair_logps",
    "dpo_studio.models.layers.set_recompute",
    "dpo_studio.models.load.load_chat_model",
    "dpo_studio.tokens.encode.EncodedAnswer",
    "dpo_studio.tokens.pack.pack",
}
"""Names that scripts outside this repository import: public even where nothing here uses them."""


def room_of(module: str) -> str:
    """The room of a dotted name; the package itself, which holds a version and lazy names, has none."""
    _, _, inside = module.partition(".")
    top = inside.partition(".")[0]
    return BESIDE.get(top, top)


@cache
def graph(package: str = "dpo_studio") -> grimp.ImportGraph:
    """Who imports whom, lazy imports included."""
    return grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)


def edges(of: grimp.ImportGraph) -> Iterator[tuple[str, str]]:
    """Every importer with what it imports."""
    for importer in sorted(of.modules):
        for imported in sorted(of.find_modules_directly_imported_by(importer)):
            yield importer, imported


def climbs(of: grimp.ImportGraph) -> list[str]:
    """Imports of a higher room by a lower one, or of a module in no room."""
    found = []
    for importer, imported in edges(of):
        low, high = room_of(importer), room_of(imported)
        if low and high and low in ROOMS and high in ROOMS and ROOMS.index(low) < ROOMS.index(high):
            found += [f"{place}: {low} imports from {high}" for place in places(of, importer, imported)]
    return found


def places(of: grimp.ImportGraph, importer: str, imported: str) -> list[str]:
    """`module:line  statement` of each such import."""
    details = of.get_import_details(importer=importer, imported=imported)
    return [f"{importer}:{each['line_number']}  {each['line_contents']}" for each in details]


def circles(of: grimp.ImportGraph) -> list[str]:
    """Each set of modules that import one another in a circle, by its shortest one."""
    found: dict[frozenset[str], str] = {}
    for importer, imported in edges(of):
        back = of.find_shortest_chain(importer=imported, imported=importer)
        if back is not None:
            found.setdefault(frozenset(back), " -> ".join((importer, *back)))
    return sorted(found.values(), key=len)


def test_a_room_imports_from_those_below_it() -> None:
    assert_none(climbs(graph()), "climbs")


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert_none(circles(graph()), "circles")


def test_every_module_has_a_room_and_is_looked_at() -> None:
    """A folder without `__init__.py` would be left out of the graph in silence."""
    files = {dotted(path) for path in SRC.rglob("*.py")}
    assert_none(sorted(files - graph().modules), "modules that grimp does not see: is there an __init__.py")
    rooms = {module: room_of(module) for module in sorted(files)}
    assert_none([f"{module}: {room}" for module, room in rooms.items() if room and room not in ROOMS], "not in a room")


def test_inside_the_package_only_the_version_is_taken_from_its_top() -> None:
    """Its other names are looked up lazily, in any room, which no graph would see."""
    lines = [
        line for module, other in edges(graph()) if other == "dpo_studio" for line in places(graph(), module, other)
    ]
    assert_none([line for line in lines if "import __version__" not in line], "imports of the package's own names")


def test_modules_and_functions_fit_in_a_head() -> None:
    long = {}
    for path in sorted(SRC.rglob("*.py")):
        name = path.relative_to(SRC).as_posix()
        text = path.read_text(encoding="utf-8")
        long[name] = (len(text.splitlines()), MODULE_LINES)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                long[f"{name}:{node.name}"] = ((node.end_lineno or node.lineno) - node.lineno + 1, FUNCTION_LINES)
    over = {name: f"{lines} lines, {limit} are allowed" for name, (lines, limit) in long.items() if lines > limit}
    assert_none([f"{name}: {said}" for name, said in over.items() if name not in TOO_LONG], "too long")
    assert_none(sorted(TOO_LONG.keys() - over.keys()), "exceptions that nothing needs")
    assert len(TOO_LONG) <= 3


def test_every_public_name_is_used_or_exported() -> None:
    """By another module, a benchmark, a script or a test: a name that a module uses alone is its own affair."""
    folders = ("src", "benchmarks", "scripts", "tests", "examples")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    used = {use for path in files for use in names_used(path)}
    idle = []
    for path in sorted(SRC.rglob("*.py")):
        for name in public_names(path):
            whole = f"{dotted(path)}.{name}"
            if whole not in used and name not in dpo_studio.__all__ and whole not in OUTSIDE:
                idle.append(f"{path.relative_to(ROOT)}: {name}")
    assert_none(idle, "names in __all__ that nothing uses")


def test_conftest_holds_fixtures_and_hooks_and_nothing_to_import() -> None:
    """pytest finds those by itself; what a test calls by name is in a module whose name says what it is."""
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    found = [
        node.name
        for node in functions
        if not node.name.startswith("pytest_")
        and "pytest.fixture" not in map(ast.unparse, map(_called, node.decorator_list))
    ]
    assert functions
    assert_none(found, "helpers in tests/conftest.py")
    others = [type(node).__name__ for node in tree.body[1:] if node not in functions]
    assert set(others) <= {"Import", "ImportFrom"}, "tests/conftest.py has more than imports and functions"


def _called(decorator: ast.expr) -> ast.expr:
    return decorator.func if isinstance(decorator, ast.Call) else decorator


def test_no_private_name_leaves_its_room() -> None:
    found = []
    for path in sorted(SRC.rglob("*.py")):
        for use in sorted(names_used(path)):
            module, _, name = use.rpartition(".")
            private = name.startswith("_") and not name.startswith("__") and module.startswith("dpo_studio")
            if private and room_of(module) != room_of(dotted(path)):
                found.append(f"{path.relative_to(ROOT)}: {use}")
    assert_none(found, "private names of other rooms")


@pytest.fixture
def crooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that breaks the order in a function, and has a circle; an import for types alone breaks nothing."""
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from crooked import cli\n"
    files = {
        "__init__": "",
        "errors": types,
        "config": "def load():\n    from crooked.workflows import work\n    return work\n",
        "workflows": "from crooked import errors\nfrom crooked.cli import app\n\nwork = app\n",
        "cli": "from crooked import workflows\n\napp = workflows\n",
    }
    (tmp_path / "crooked").mkdir()
    for name, text in files.items():
        (tmp_path / "crooked" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "crooked"


def test_a_climb_and_a_circle_would_be_seen(crooked: str) -> None:
    seen = climbs(graph(crooked))
    assert [line.rpartition(": ")[2] for line in seen] == [
        "config imports from workflows",
        "workflows imports from cli",
    ]
    assert "crooked.config:2 " in seen[0]
    assert circles(graph(crooked)) == ["crooked.cli -> crooked.workflows -> crooked.cli"]


def assert_none(found: list[str], what: str) -> None:
    """Fail with a line for each."""
    assert not found, f"{len(found)} {what}:\n  " + "\n  ".join(found)


def dotted(path: Path) -> str:
    """A file's module; a package is its `__init__.py`."""
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    """A file, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def public_names(path: Path) -> list[str]:
    """What a module's `__all__` lists, whether or not parts of the list are unpacked."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            texts = [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
            return [text for text in texts if isinstance(text, str)]
    return []


@cache
def names_used(path: Path) -> frozenset[str]:
    """Whole names of the package that a file imports, or reads from a module that it imports; none of its own."""
    used, modules = set(), {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dpo_studio":
            for alias in node.names:
                used.add(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            used.add(f"{modules[ast.unparse(node.value)]}.{node.attr}")
    own = dotted(path) if path.is_relative_to(SRC) else ""
    return frozenset(use for use in used if not own or use.rpartition(".")[0] != own)


MOST_PRIVATE = 20


def test_tests_replace_few_private_names() -> None:
    """`monkeypatch.setattr(module, "_name", ...)` ties a test to how, not what; each would better be an argument."""
    found = []
    for file in sorted(Path(__file__).parent.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in (
                "setattr",
                "object",
                "patch",
                "setitem",
            ):
                names = [a.value for a in call.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if any(name.rpartition(".")[2].startswith("_") for name in names):
                    found.append(f"{file.name}:{call.lineno}  {names}")
    assert 0 < len(found) <= MOST_PRIVATE, "\n".join(found)
