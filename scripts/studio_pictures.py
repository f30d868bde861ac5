"""Pictures of every page of the studio, wide, middling and narrow, light and dark, to look at.

`python scripts/studio_pictures.py RUN OUT [PAGE ...]`: RUN is a finished run, OUT a folder that is made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.studio_client import served
from tests.studio_pages import PAGES, chromium, go, opened, something_to_see

WIDTHS = (1440, 1024, 390)
THEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")
SETTLED_MS = 1500
"""The doctor's report of 30 pairs, and the first events of a run."""


def main(run: Path, out: Path, pages: list[str]) -> None:
    """Take them all; a page that complains in its console ends it."""
    out.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        something_to_see(Path(folder), run)
        with served(Path(folder)) as studio:
            page = opened(browser, studio.link, wrong)
            for theme in THEMES:
                page.emulate_media(color_scheme=theme)
                for name in pages or PAGES:
                    for width in WIDTHS:
                        page.set_viewport_size({"width": width, "height": 900})
                        go(page, PAGES[name])
                        page.reload()
                        page.wait_for_timeout(SETTLED_MS)
                        page.screenshot(path=out / f"{name}-{width}-{theme}.png", full_page=True)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
