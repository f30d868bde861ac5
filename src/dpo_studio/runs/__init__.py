"""Run folders: their files, the lock, the facts of a run, and its health. Nothing here imports torch."""

from __future__ import annotations
