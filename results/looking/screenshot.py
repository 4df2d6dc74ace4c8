"""What explore.html looks like in a browser, where a test image is clicked.

    python results/looking/screenshot.py runs/X/explore.html 17

It needs chromium and chromedriver, and what the tests need (tests/requirements.txt).
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

from browser import Page  # type: ignore[import-not-found]  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    page, image = Path(sys.argv[1]).absolute(), int(sys.argv[2])
    there = Page(page)
    try:
        there.point(image, click=True)
        there.wait(lambda: "nearest training images" in there.text())
        there.screenshot().quantize(256).save(HERE / "explore.png", optimize=True)
    finally:
        there.driver.quit()
