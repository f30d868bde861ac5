"""Progress output, and text made safe for display. Nothing here imports torch."""

from __future__ import annotations
