"""How far `train_recipe` walks: modules it passes through, climbs back up, and returns.

    python scripts/climbs.py CHECKOUT

A tiny model is trained for two steps, in CHECKOUT's own code, under `sys.setprofile`. What is watched are the
functions of dpo_studio only: a callback from torch or pydantic counts as called by the function of ours that is below
it on the stack, and a lambda or a comprehension as its module. Every pair of modules counts once, so that neither loops
nor the number of steps change a number:

- a module is passed through if a function of it runs (class bodies and a module's own top level do not count);
- a climb is a pair (caller, callee) whose caller is in a lower room, nearer the core, than the callee's;
- a return is a pair (caller, callee) whose callee the walk had been in before, and left: not on the stack at the first
  such call, and first entered through another module.

Rooms, low to high, are the list of docs/design.md, in its form before and after the house was built; modules of one
room are level.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

__all__ = ["Walk"]

BEFORE = (
    *(
        "errors paths disk reading writing cache lock objectives foreign_keys config preferences tokens models learning"
    ).split(),
    *("evaluation export runs reports workflows cli_choices cli_source cli_cache cli_talk cli_judge cli_eval").split(),
    *("cli_data cli __main__").split(),
)
AFTER = (
    *(
        "errors paths disk reading writing cache ranks scan sizes objectives config console frozen runs preferences"
    ).split(),
    *("tokens doctor models policy reports learning sampling evaluation export workflows cli studio __main__").split(),
)
"""Top-level names, low to high."""


class Walk:
    """A profile function that keeps which module of ours called which."""

    def __init__(self, source: Path) -> None:
        self.root = f"{source}{os.sep}"
        self.stack: list[str] = []
        self.entered: dict[str, str] = {}
        self.calls: dict[tuple[str, str], bool] = {}
        self.names: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """One call or return of the interpreter."""
        if event not in ("call", "return"):
            return
        module = self._module(frame)
        if module is None:
            return
        if event == "return":
            if self.stack:
                self.stack.pop()
            return
        caller = self.stack[-1] if self.stack else ""
        if caller != module and (caller, module) not in self.calls:
            seen = module in self.entered and module not in self.stack and self.entered[module] != caller
            self.calls[caller, module] = seen
        self.entered.setdefault(module, caller)
        self.stack.append(module)

    def _module(self, frame: FrameType) -> str | None:
        """Its module where it is a function of ours."""
        code = frame.f_code
        if code.co_filename not in self.names:
            path = code.co_filename
            inside = path.removeprefix(self.root).removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
            self.names[path] = inside if path.startswith(self.root) else None
        if code.co_name == "<module>" or not code.co_flags & 0x2:  # CO_NEWLOCALS; class bodies have no fast locals
            return None
        return self.names[code.co_filename]

    def numbers(self, rooms: tuple[str, ...]) -> dict[str, Any]:
        """What was counted, and the climbs and returns themselves."""
        level = {name: at for at, name in enumerate(rooms)}
        pairs = [pair for pair in self.calls if pair[0]]
        strange = sorted({name for pair in pairs for name in pair if name.partition(".")[0] not in level})
        if strange:
            sys.exit(f"in no room: {', '.join(strange)}")
        height = {name: level[name.partition(".")[0]] for pair in pairs for name in pair}
        return {
            "modules": sorted(height),
            "climbs": sorted(pair for pair in pairs if height[pair[0]] < height[pair[1]]),
            "returns": sorted(pair for pair in pairs if self.calls[pair]),
            "calls": len(pairs),
        }


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
    import dpo_studio
    from tests.tiny_models import tiny_folder
    from tests.tiny_runs import write_recipe

    source = Path(dpo_studio.__file__).parent
    if not source.is_relative_to(tree):
        sys.exit(f"dpo_studio would be imported from {source}")
    recipe = write_recipe(folder / "recipe.yaml", tiny_folder(folder / "tiny"))
    settings = yaml.safe_load(recipe.read_text())
    settings["training"] |= {"max_steps": 2, "tokens_per_micro_batch": 256}
    recipe.write_text(yaml.safe_dump(settings))
    train = dpo_studio.train_recipe
    walk = Walk(source)
    sys.setprofile(walk)
    try:
        train(recipe)
    finally:
        sys.setprofile(None)
    found = walk.numbers(AFTER if (source / "frozen").is_dir() else BEFORE)
    for name in ("climbs", "returns"):
        print(f"{name}:\n  " + "\n  ".join(f"{caller} -> {callee}" for caller, callee in found[name]))
    print(
        f"modules={len(found['modules'])} calls={found['calls']} "
        f"climbs={len(found['climbs'])} returns={len(found['returns'])}"
    )


if __name__ == "__main__":
    main()
