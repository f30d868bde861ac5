"""Reports of a run: figures and one page. The facts of a run are read in `runs`.

Nothing in this room imports torch, and importing it imports nothing heavy: take what you need from
`reports.html` (the page), `reports.figures` (its figures as files) or `reports.data_page` (what a check of data found).
"""

from __future__ import annotations
