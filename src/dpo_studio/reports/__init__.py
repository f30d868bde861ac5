"""What a run shows of itself: lines on the terminal while it goes, figures and one page after it.

Nothing in this room imports torch, and importing it imports nothing heavy: take what you need from
`reports.html` (the page), `reports.figures` (its figures as files) or `reports.progress` (the terminal).
"""

from __future__ import annotations
