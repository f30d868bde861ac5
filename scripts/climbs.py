"""How far `train_recipe` walks: modules it passes through, climbs back up, and returns.

    python scripts/climbs.py CHECKOUT

A tiny model is trained for two steps in CHECKOUT's own code, under `sys.setprofile`. Only direct calls between
functions of dpo_studio count, not those through torch or pydantic, and each pair (caller's module, callee's module)
once, in the order of their first calls: neither loops nor the number of steps change a number. The walk is what
somebody goes through who looks at each pair in that order: caller, callee, next caller, next callee, ..., staying where
the next caller is the module they stand in. Of its moves from one module to another, each counted once,

- a climb is one into a higher room, away from the core;
- a return is one into a module where the walk has been before.

Last come the calls up themselves: pairs whose callee's room is above the caller's, which dividing modules hardly moves.

The walk is printed twice. `whole` is every room: the number to compare two layouts by. `core` is four rooms alone: at
e0757bb it gives the 28 modules, 19 climbs and 56 returns that the plan of the rooms named without a definition. The
four were picked for that, of a thousand variants, and a module that leaves them for another room lowers `core` by
leaving.
Rooms, low to high, are those of docs/design.md, before and after; dividing a room can only add climbs.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Container
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Walk", "room_of"]

BEFORE = [
    *("errors", "paths", "disk", "reading", "writing", "cache", "lock", "objectives", "foreign_keys", "config"),
    *("preferences", "tokens", "models", "learning", "evaluation", "export", "runs", "reports", "workflows"),
]
AFTER = [
    *("errors", "paths", "disk", "reading", "writing", "cache", "ranks", "scan", "sizes", "objectives", "config"),
    *("console", "frozen", "runs", "preferences", "tokens", "doctor", "models", "policy", "reports", "learning"),
    *("sampling", "evaluation", "export", "workflows"),
]
"""Top-level names, low to high. The package itself is in no room and is passed over."""
CORE = {"workflows", "learning", "tokens", "objectives"}


class Walk:
    """A profile function that keeps which module of ours called which, in the order of the first calls."""

    def __init__(self, source: Path) -> None:
        self.root = f"{source}{os.sep}"
        self.pairs: dict[tuple[str, str], None] = {}
        self.names: dict[str, str] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """One event of the interpreter."""
        if event != "call" or frame.f_back is None:
            return
        caller, callee = self._module(frame.f_back), self._module(frame)
        if caller and callee and caller != callee:
            self.pairs.setdefault((caller, callee))

    def _module(self, frame: FrameType) -> str:
        """Its module where it is a function of ours; a class's body and a module's own lines are none."""
        path = frame.f_code.co_filename
        if path not in self.names:
            inside = path.removeprefix(self.root).removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
            self.names[path] = inside if path.startswith(self.root) else ""
        has_locals = frame.f_code.co_flags & inspect.CO_NEWLOCALS
        return self.names[path] if has_locals and frame.f_code.co_name != "<module>" else ""

    def counted(self, rooms: list[str], counted: Container[str]) -> tuple[int, list[str], list[str]]:
        """How many modules of these rooms are passed through; climbs; returns."""
        moves: list[tuple[str, str, bool]] = []
        seen: dict[str, None] = {}
        here = ""
        for pair in self.pairs:
            if any(room_of(module) not in counted for module in pair):
                continue
            for module in pair:
                if here and module != here:
                    moves.append((here, module, module in seen))
                seen.setdefault(module)
                here = module
        up = {f"{a} -> {b}" for a, b, _ in moves if rooms.index(room_of(a)) < rooms.index(room_of(b))}
        return len(seen), sorted(up), sorted({f"{a} -> {b}" for a, b, again in moves if again})


def room_of(module: str) -> str:
    """The first part of a dotted name."""
    return module.partition(".")[0]


def main() -> None:
    """In a process of the checkout's own; its models are made by its own tests."""
    if os.environ.get("CLIMBS_FOLDER"):
        _walk(Path(sys.argv[1]), Path(os.environ["CLIMBS_FOLDER"]))
        return
    tree = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)]),
            "CLIMBS_FOLDER": folder,
            "DPO_STUDIO_CACHE": str(Path(folder) / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        sys.exit(subprocess.run([sys.executable, __file__, str(tree)], env=os.environ | own, check=False).returncode)


def _walk(tree: Path, folder: Path) -> None:
    from tests.tiny_models import tiny_folder
    from tests.tiny_runs import write_recipe

    import dpo_studio

    source = Path(dpo_studio.__file__).parent
    if not source.is_relative_to(tree):
        sys.exit(f"dpo_studio would be imported from {source}")
    training = {"max_steps": 2, "tokens_per_micro_batch": 256}
    recipe = write_recipe(folder / "recipe.yaml", tiny_folder(folder / "tiny"), training=training)
    train = dpo_studio.train_recipe
    walk = Walk(source)
    sys.setprofile(walk)
    try:
        train(recipe)
    finally:
        sys.setprofile(None)
    rooms = AFTER if (source / "frozen").is_dir() else BEFORE
    strange = sorted({module for pair in walk.pairs for module in pair if room_of(module) not in rooms})
    if strange:
        sys.exit(f"in no room: {', '.join(strange)}")
    for name, counted in (("whole", set(rooms)), ("core", CORE)):
        modules, up, again = walk.counted(rooms, counted)
        print(f"climbs, {name}:\n  " + "\n  ".join(up))
        print(f"{name}: modules={modules} climbs={len(up)} returns={len(again)}")
    called = sorted(f"{a} -> {b}" for a, b in walk.pairs if rooms.index(room_of(a)) < rooms.index(room_of(b)))
    print("calls into a higher room (what was passed down is called back):\n  " + "\n  ".join(called))
    print(f"calls up: {len(called)} of {len(walk.pairs)}")


if __name__ == "__main__":
    main()
