"""What explore.html looks like in a browser, where one of its dots is clicked: explore.png.

    python results/looking/screenshot.py runs/X/explore.html 17   # the dot's number

It needs chromium and chromedriver, and what the tests need (tests/requirements.txt).
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

from browser import Page  # type: ignore[import-not-found]  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal() or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    there = Page(Path(sys.argv[1]).absolute())
    try:
        there.point(int(sys.argv[2]), click=True)
        there.wait(lambda: "nearest training images" in there.text())
        there.screenshot().quantize(256).save(HERE / "explore.png", optimize=True)
    finally:
        there.driver.quit()
