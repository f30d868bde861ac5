"""Run folders: their files, the lock, what they say of a run, and whether it is well. Nothing here imports torch."""

from __future__ import annotations
