"""The command line, one file per verb: its options and what it prints. Shared options are in `options`.

Nothing heavy is imported until a verb is used.
"""

from __future__ import annotations

from dpo_studio.cli.app import main

__all__ = ["main"]
