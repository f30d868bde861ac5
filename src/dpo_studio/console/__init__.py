"""What a command says while it runs, and text made safe to be shown. Nothing here imports torch."""

from __future__ import annotations
