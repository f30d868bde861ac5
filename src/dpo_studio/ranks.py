"""The processes that train together. Today there is one; what several would have to agree on goes through here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_studio.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: one of one."""

    @classmethod
    def of_environment(cls) -> Ranks:
        """As the launcher has set them (`WORLD_SIZE`).

        Raises:
            RunError: several processes were started.
        """
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RunError("training on several devices is not built yet", hint="start it with one process")
        return cls()

    def sum_gradients(self, trained: Iterable[Tensor]) -> None:
        """Add up, in place, what every process has found for these tensors: one process has found all of it."""

    def any(self, here: bool) -> bool:
        """Whether something happened in any process: out of memory, a number that is not finite, a signal."""
        return here
