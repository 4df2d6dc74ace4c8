"""explore.html in a real browser: it opens from disk, points, clicks, filters, without an error."""

import re
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from browser import BROWSER, DRIVER, LEGEND, NODES, Page
from PIL import Image

from contrastive import explore
from contrastive.looking import Looked
from contrastive.probe import Features

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

EVIL = "<img src=x onerror=alert(1)>"


def looked(classes, per_class=6, side=8) -> Looked:
    """Images whose class shows in their h; the first of the first class is mistaken."""
    labels = torch.arange(len(classes)).repeat_interleave(per_class)
    n = len(labels)
    h = torch.eye(len(classes))[labels] + 0.01 * torch.randn(n, len(classes))
    images = torch.randint(0, 256, (n, 3, side, side)).to(torch.uint8)
    probabilities = torch.eye(len(classes))[labels] * 0.9 + 0.1 / len(classes)
    probabilities[0] = probabilities[-1]
    names = [f"{EVIL}/{i:03}.png" if i % 2 else f"plain/{i:03}.png" for i in range(n)]
    features = Features(h, labels, h, labels, tuple(classes))
    return Looked(images, images, features, probabilities, names, names)


def spread(n) -> np.ndarray:
    """Points that lie apart, so that a click meets one of them."""
    side = int(np.ceil(np.sqrt(n)))
    return np.stack([np.arange(n) % side, np.arange(n) // side], axis=1).astype(float)


def page(folder, classes=("cat", EVIL, "dog"), **values):
    """The later a test image comes, the surer the first way is of it, and the less the other."""
    seen = looked(classes, **values)
    file, n = folder / "explore.html", len(seen.test)
    sure = {"rising": torch.arange(n) / n, "falling": -torch.arange(n) / n}
    explore.explore(seen, spread(n), f"{EVIL} set", 0, file, sure)
    return file


# ------------------------------------------------------------------------------------------------
# Without a browser
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_it_is_one_file_below_10_mb_that_asks_for_nothing(classes, tmp_path):
    file = page(tmp_path, [f"class {i}" for i in range(classes)])
    text = file.read_text("utf-8")
    assert len(text.encode()) < 10e6
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(http|//)", text)


def test_the_sheet_holds_each_image_in_its_place(tmp_path):
    """Row by row, as the page looks for it; decoded again, it is the image but for WebP's loss."""
    levels = torch.linspace(0, 255, 7).round().to(torch.uint8)
    images = [level.expand(3, 8, 8) for level in levels]
    sheet, columns = explore.contact_sheet(images)
    assert columns == 3
    with Image.open(BytesIO(sheet)) as decoded:
        pixels = np.asarray(decoded.convert("RGB")).astype(int)
    assert pixels.shape == (24, 24, 3)
    for i, level in enumerate(levels.tolist()):
        tile = pixels[8 * (i // 3) :, 8 * (i % 3) :][:8, :8]
        assert abs(tile - level).max() <= 8


def test_large_images_become_small(tmp_path, monkeypatch):
    sheets = []

    def note(tiles):
        sheets.append({tuple(tile.shape) for tile in tiles})
        return original(tiles)

    original = explore.contact_sheet
    monkeypatch.setattr(explore, "contact_sheet", note)
    page(tmp_path, ["a", "b"], side=200)
    assert sheets == [{(3, 32, 32)}]


def test_a_page_that_would_be_too_large_shows_fewer_images(tmp_path, capsys):
    """Noise, which no compression shrinks, under names of 3,000 letters."""
    seen = looked(["a", "b"], per_class=1000, side=32)
    seen.test_files = [f"{'x' * 3000}{i}" for i in range(2000)]
    explore.explore(seen, spread(2000), "noise", 0, file := tmp_path / "x.html")
    shown = int(re.search(r"x.html: ([\d,]+) test", capsys.readouterr().out)[1].replace(",", ""))
    assert shown in (500, 1000)
    assert 3e6 < file.stat().st_size < 10e6


# ------------------------------------------------------------------------------------------------
# In a browser
# ------------------------------------------------------------------------------------------------

PICTURES = f"""{NODES}
return nodes.filter((n) => n.style?.backgroundImage).map((n) => n.getBoundingClientRect())
"""

needs_a_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="there is no chromium with chromedriver here (Debian: chromium-driver)",
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    torch.manual_seed(0)
    there = Page(page(tmp_path_factory.mktemp("explore")))
    try:
        yield there
        assert there.errors() == [], "the console's"
    finally:
        there.driver.quit()


@needs_a_browser
@pytest.mark.slow
def test_pointing_at_a_dot_shows_its_class_and_what_the_probe_says(opened):
    opened.point(17)
    opened.wait(lambda: "91%" not in opened.text() and "93% sure" in opened.text())
    assert "dog" in opened.text()
    assert "predicted: dog" in opened.text()


@needs_a_browser
@pytest.mark.slow
def test_a_click_shows_the_nearest_training_images(opened):
    """Of the same class here; the first is the image itself."""
    opened.point(6, click=True)
    opened.wait(lambda: "nearest training images" in opened.text())
    text = opened.text()
    for i in range(6, 12):
        assert f"{i:03}.png" in text

    shown = opened.driver.execute_script(PICTURES)
    assert len(shown) >= 7  # the image and its neighbours; the one that is pointed at, too
    screen = np.asarray(opened.screenshot()).astype(int)
    noise = []
    for box in shown:
        left, top, side = round(box["x"]), round(box["y"]), round(box["width"])
        noise.append(screen[top : top + side, left : left + side])
    assert all(picture.std() > 20 for picture in noise), "pictures of noise, and none is blank"
    assert len({picture.tobytes() for picture in noise}) >= 6


@needs_a_browser
@pytest.mark.slow
def test_names_are_letters_and_no_elements(opened):
    """A class and files called <img src=x onerror=alert(1)>: no image, no alert."""
    opened.point(7)
    opened.point(7, click=True)
    opened.wait(lambda: f"{EVIL}/007.png" in opened.text())
    assert EVIL in opened.text()
    assert opened.elements("IMG") == []
    assert f"{EVIL} set" in opened.driver.title
    assert f"{EVIL} set: the map" in opened.text()


@needs_a_browser
@pytest.mark.slow
def test_only_errors_and_the_search_choose_the_dots(opened):
    from selenium.webdriver.common.keys import Keys

    assert "18 of 18 images" in opened.text()
    button = opened.elements("BUTTON")[0]
    button.click()
    opened.wait(lambda: "1 of 18 images" in opened.text())
    button.click()
    opened.wait(lambda: "18 of 18 images" in opened.text())

    field = opened.elements("INPUT")[0]
    field.send_keys("PLAIN/")
    opened.wait(lambda: "9 of 18 images" in opened.text())
    field.send_keys(Keys.BACKSPACE * 6)
    opened.wait(lambda: "18 of 18 images" in opened.text())


@needs_a_browser
@pytest.mark.slow
def test_a_click_on_the_legend_hides_a_class(opened):
    visible = """return [...Bokeh.documents[0]._all_models.values()]
        .filter((m) => m.type == "GlyphRenderer").map((m) => m.visible)"""
    assert opened.driver.execute_script(visible) == [True] * 6
    opened.driver.execute_script(LEGEND)[0].click()
    opened.wait(lambda: opened.driver.execute_script(visible) == [False] * 2 + [True] * 4)
    opened.driver.execute_script(LEGEND)[0].click()  # the legend was drawn anew
    opened.wait(lambda: opened.driver.execute_script(visible) == [True] * 6)


@needs_a_browser
@pytest.mark.slow
def test_the_colours_say_the_class_or_how_sure_it_is(opened):
    from selenium.webdriver.support.select import Select

    def drawn(i):
        """The colour of an image's dot on the screen, (r, g, b)."""
        return opened.screenshot().getpixel(tuple(map(round, opened.place(i))))

    def in_the_legend(k):
        """The colour of a class in the legend, that which has most of it."""
        picture = opened.screenshot()
        item = opened.driver.execute_script(LEGEND)[k].rect
        left, middle = round(item["x"]), round(item["y"] + item["height"] / 2)
        colours = [picture.getpixel((left + i, middle)) for i in range(24)]
        return Counter(each for each in colours if min(each) < 240).most_common(1)[0][0]

    opened.point(12, click=True)  # also what is chosen takes the colour
    opened.wait(lambda: "012.png" in opened.text())
    opened.away()  # what it shows hides other dots
    classes = [drawn(i) for i in (1, 5, 7, 17)]
    assert classes[0] == classes[1] != classes[2]
    shades = [in_the_legend(k) for k in range(3)]
    assert shades[1] == (255, 127, 14)  # the second of Category10
    assert len(set(shades)) == 3
    choose = Select(opened.elements("SELECT")[0])
    assert [option.text for option in choose.options] == ["the class", "rising", "falling"]
    for way, least, most in (("rising", 1, 17), ("falling", 17, 1)):
        choose.select_by_value(way)
        opened.wait(lambda: drawn(least) not in classes)  # noqa: B023
        opened.wait(lambda: drawn(most)[0] > 200 and drawn(most)[2] < 100)  # noqa: B023 yellow
        red, green, blue = drawn(least)
        assert green < blue
        assert red < 140, "violet"
        assert drawn(12) not in classes
        assert [in_the_legend(k) for k in range(3)] == [(211, 211, 211)] * 3  # lightgrey
    assert "the surest" in opened.text()
    choose.select_by_value("the class")
    opened.wait(lambda: [drawn(i) for i in (1, 5, 7, 17)] == classes)
    assert [in_the_legend(k) for k in range(3)] == shades
    assert "the surest" not in opened.text()


@needs_a_browser
@pytest.mark.slow
def test_a_page_of_a_hundred_classes_opens(tmp_path):
    there = Page(page(tmp_path, [f"class {i}" for i in range(100)], per_class=2))
    try:
        assert there.errors() == []
    finally:
        there.driver.quit()
