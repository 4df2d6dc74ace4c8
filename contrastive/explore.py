"""explore.html: one page, without a network, to see what the encoder made of the test images."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import functions as fn
from contrastive.looking import Looked, nearest, some_of_each, thumbnail
from contrastive.scores import ranks

MOST = 3000  # dots of the map
NEIGHBOURS = 6
TILE = 32  # pixels of an image's side, at most
BYTES = 10_000_000  # of a page, at most

# What a click shows. Names are data: they go through `plain`, and never become elements.
SHOW_NEIGHBOURS = """
const plain = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)
const picture = (tile) => `<div style="width: ${side}px; height: ${side}px;
    image-rendering: pixelated; background-image: var(--images);
    background-size: ${columns * side}px auto; background-position:
    ${-side * (tile % columns)}px ${-side * Math.floor(tile / columns)}px"></div>`
const card = (tile, words, color) => `<div style="box-sizing: content-box; width: ${side}px;
    padding: 2px; border: 3px solid ${color}; font-size: 11px;
    overflow-wrap: anywhere">${picture(tile)}${words}</div>`
const chosen = dots.selected.indices
if (chosen.length > 0) {
    const i = chosen[0], d = dots.data
    const cards = d.neighbours[i].map((j) => card(bank.tile[j],
        `${plain(names[bank.label[j]])}<br>${plain(bank.file[j])}`,
        bank.label[j] == d.label[i] ? "#2ca02c" : "#d62728"))
    const about = `${plain(d.name[i])}, predicted: ${plain(d.taken[i])} (${plain(d.sure[i])})
        <br>${plain(d.file[i])}`
    panel.text = `<div style="display: flex; flex-wrap: wrap; gap: 8px">
        ${card(d.tile[i], about, "#333")}</div><p>Its nearest training images:</p>
        <div style="display: flex; flex-wrap: wrap; gap: 8px">${cards.join("")}</div>`
}
"""

# Which dots are shown.
FILTER = """
const wanted = search.value_input.toLowerCase(), d = dots.data
const only_errors = errors.active
shown.booleans = d.file.map((file, i) => (!only_errors || d.label[i] != d.predicted[i])
    && String(file).toLowerCase().includes(wanted))
count.text = `${shown.booleans.filter(Boolean).length} of ${d.file.length} images`
dots.change.emit()
"""

# What a colour says: a class, or how sure a way is among the test images.
COLOUR = """
const way = cb_obj.value, d = dots.data, of_class = way == classes
if (!of_class) d.colour = d.label.map((_, i) => scale[ranks[way][i]])
for (const [dot, swatch, own] of drawn) {
    const colour = of_class ? {value: own} : {field: "colour"}
    for (const glyph of [dot.glyph, dot.selection_glyph, dot.nonselection_glyph])
        glyph.fill_color = colour
    swatch.glyph.fill_color = {value: of_class ? own : "lightgrey"}
}
meaning.text = of_class ? "" : "violet: the least sure, yellow: the surest"
dots.change.emit()
"""
CLASSES = "the class"

TOOLTIP = """
<div style="display: flex; gap: 8px">
  <div style="width: 64px; height: 64px; image-rendering: pixelated;
    background-image: var(--images); background-size: COLUMNSpx auto;
    background-position: @place"></div>
  <div><b>@name</b><br>predicted: @taken<br>@sure sure<br>@file</div>
</div>
"""

# The images are a variable, as it alone reaches into the parts of a Bokeh page, and a blob, which
# the browser decodes once.
TEMPLATE = """
{% block inner_body %}
<h2>{{ heading }}</h2>
<p>Near each other is what the encoder finds alike (t-SNE of h). Point at a dot, or click it; a
click on a class hides it.</p>
{{ super() }}
{% endblock %}
{% block postamble %}
<style>body { font-family: sans-serif; margin: 1em }</style>
<script>
  const bytes = Uint8Array.from(atob("{{ images }}"), (c) => c.charCodeAt(0))
  const url = URL.createObjectURL(new Blob([bytes], {type: "image/webp"}))
  document.documentElement.style.setProperty("--images", `url(${url})`)
</script>
{% endblock %}
"""


@fn.drawing
def explore(
    looked: Looked,
    points: np.ndarray,
    title: str,
    seed: int,
    file: Path,
    certainties: dict[str, Tensor] | None = None,
    most: int = MOST,
) -> None:
    """Leave a page that opens from disk: the map of up to `most` test images, points (N, 2).

    Pointing at a dot shows its image, class and prediction, a click its nearest training images;
    classes are hidden by a click on the legend, and right ones by a button; file names are
    searched. certainties: {way: how sure it is of each test image, (N,)}, to colour the dots by.
    """
    chosen = some_of_each(looked.h.test_labels, most, seed)
    found = nearest(looked.h.test[chosen], looked.h.train, NEIGHBOURS)
    neighbours, places = found.unique(return_inverse=True)  # each training image once
    tiles = [thumbnail(looked.test, i, TILE) for i in chosen.tolist()]
    tiles += [thumbnail(looked.train, i, TILE) for i in neighbours.tolist()]
    sheet, columns = contact_sheet(tiles)

    sure = {way: ranks(value, value)[chosen] for way, value in (certainties or {}).items()}
    page = layout(looked, points, (chosen, neighbours, places), columns, sure)
    held_out = looked.h.held_out
    heading = f"{fn.shown(title, 60)}: the map of the {held_out} images"
    whole = as_html(page, sheet, heading).encode()
    if len(whole) > BYTES and len(chosen) > 1:  # of pictures that hardly shrink, or of long names
        explore(looked, points, title, seed, file, certainties, len(chosen) // 2)
        return
    fn.write_atomically(file, whole)
    print(f"  page {file}: {len(chosen):,} {held_out} images, to be opened in a browser")


def contact_sheet(tiles: list[Tensor]) -> tuple[bytes, int]:
    """All tiles in one, row by row, as WebP; and how many stand in a row. Each uint8 (3, H, W)."""
    side, count = tiles[0].shape[-1], len(tiles)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = torch.stack([*tiles, *[torch.zeros_like(tiles[0])] * (rows * columns - count)])
    sheet = whole.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)  # (r, H, c, W, 3)
    pixels = sheet.reshape(rows * side, columns * side, 3).numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="WEBP", quality=70)
    return buffer.getvalue(), columns


def layout(
    looked: Looked,
    points: np.ndarray,
    which: tuple[Tensor, Tensor, Tensor],
    columns: int,
    sure: dict[str, Tensor],
) -> Any:
    """The page's parts: the map, what is beside it, and what they do to each other."""
    from bokeh.layouts import column, row
    from bokeh.models import (
        BooleanFilter,
        ColumnDataSource,
        CustomJS,
        Div,
        TextInput,
        Toggle,
    )

    chosen, neighbours, places = which
    names = list(map(readable, looked.h.classes))
    dots = ColumnDataSource(dots_of(looked, points, chosen, places, names, columns))
    shown = BooleanFilter([True] * len(chosen))
    bank = {
        "tile": list(range(len(chosen), len(chosen) + len(neighbours))),
        "label": looked.h.train_labels[neighbours].tolist(),
        "file": [readable(looked.train_files[i]) for i in neighbours.tolist()],
    }

    errors = Toggle(label="only errors", width=110)
    search = TextInput(placeholder="search a file name", width=200)
    count = Div(text=f"{len(chosen)} of {len(chosen)} images", align="center")
    panel = Div(text="Click a dot: its nearest training images appear here.", width=420)
    update = CustomJS(
        args={"dots": dots, "shown": shown, "errors": errors, "search": search, "count": count},
        code=FILTER,
    )
    errors.js_on_change("active", update)
    search.js_on_change("value_input", update)
    args = {"dots": dots, "bank": bank, "names": names, "panel": panel}
    args |= {"columns": columns, "side": 64}
    dots.selected.js_on_change("indices", CustomJS(args=args, code=SHOW_NEIGHBOURS))
    plot, drawn = the_map(dots, shown, names, columns)
    beside: list[Any] = coloured_by(sure, dots, drawn) if sure else []
    return column(row(errors, search, count, *beside), row(plot, panel))


def coloured_by(sure: dict[str, Tensor], dots: Any, drawn: list[tuple[Any, Any]]) -> list[Any]:
    """What lets a reader choose what the colours say: classes, or {way: ranks (N,) of 0 to 1}."""
    from bokeh.models import CustomJS, Div, Select
    from bokeh.palettes import Viridis256

    choose, meaning = Select(value=CLASSES, options=[CLASSES, *sure], width=170), Div(text="")
    meaning.align = "center"
    args = {
        "dots": dots,
        "drawn": [[dot, swatch, dot.glyph.fill_color] for dot, swatch in drawn],
        "meaning": meaning,
        "classes": CLASSES,
        "scale": list(Viridis256),
        "ranks": {way: (255 * rank).round().int().tolist() for way, rank in sure.items()},
    }
    choose.js_on_change("value", CustomJS(args=args, code=COLOUR))
    return [Div(text="coloured by", align="center"), choose, meaning]


def dots_of(
    looked: Looked,
    points: np.ndarray,
    chosen: Tensor,
    places: Tensor,
    names: list[str],
    columns: int,
) -> dict[str, Any]:
    """A row for each dot: where it is, where its picture is on the sheet, what is known of it."""
    labels, predicted = looked.h.test_labels[chosen], looked.predicted[chosen]
    confidence = looked.probabilities[chosen].max(1).values
    x, y = points[chosen.numpy()].T.astype(float).tolist()
    tiles = range(len(chosen))
    return {
        "x": x,
        "y": y,
        "tile": list(tiles),
        "place": [f"-{64 * (tile % columns)}px -{64 * (tile // columns)}px" for tile in tiles],
        "label": labels.tolist(),
        "predicted": predicted.tolist(),
        "colour": ["black"] * len(chosen),
        "name": [names[label] for label in labels.tolist()],
        "taken": [names[label] for label in predicted.tolist()],
        "sure": [f"{value:.0%}" for value in confidence.tolist()],
        "file": [readable(looked.test_files[i]) for i in chosen.tolist()],
        "neighbours": places.tolist(),
    }


def the_map(
    dots: Any, shown: Any, names: list[str], columns: int
) -> tuple[Any, list[tuple[Any, Any]]]:
    """The dots, a colour a class, and a legend that hides classes; and of each class what draws its
    dots, and its swatch in the legend."""
    from bokeh.models import CDSView, HoverTool, IndexFilter, Legend, LegendItem, TapTool
    from bokeh.palettes import Category10, Category20, Turbo256
    from bokeh.plotting import figure

    count = len(names)
    turbo = [Turbo256[i * 255 // max(1, count - 1)] for i in range(count)]
    palette = Category10[10] if count <= 10 else Category20[20] if count <= 20 else turbo

    plot = figure(
        width=760, height=680, tools="pan,wheel_zoom,box_zoom,reset", toolbar_location="above"
    )
    plot.grid.visible = plot.axis.visible = False
    plot.toolbar.active_scroll = plot.select_one("WheelZoomTool")
    drawn: list[tuple[Any, Any]] = []
    items: list[Any] = []
    for label, name in enumerate(names):
        members = [i for i, other in enumerate(dots.data["label"]) if other == label]
        if not members:
            continue
        view = CDSView(filter=IndexFilter(members) & shown)
        look: dict[str, Any] = {
            "size": 7,
            "line_color": None,
            "fill_alpha": 0.8,
            "fill_color": palette[label],
        }
        also = {"selection_fill_alpha": 1.0, "nonselection_fill_alpha": 0.8}
        dot = plot.scatter("x", "y", source=dots, view=view, **also, **look)
        # Over that of the dots in the legend. Without a point, though nowhere, it is not drawn.
        swatch = plot.scatter([math.nan], [math.nan], **look | {"fill_alpha": 1.0})
        drawn.append((dot, swatch))
        items.append(LegendItem(label={"value": name}, renderers=[dot, swatch]))

    per_column = 25
    legend = Legend(items=items, ncols=math.ceil(len(items) / per_column), click_policy="hide")
    legend.label_text_font_size = "11px" if len(items) <= per_column else "8px"
    legend.spacing = legend.padding = 2
    plot.add_layout(legend, "right")
    tooltip = TOOLTIP.replace("COLUMNS", str(64 * columns))
    renderers = [dot for dot, _ in drawn]
    hover = HoverTool(renderers=renderers, tooltips=tooltip, mode="mouse")
    plot.add_tools(hover, TapTool(renderers=renderers))
    return plot, drawn


def readable(name: str) -> str:
    """A name that a page in UTF-8 can hold."""
    return name.encode("utf-8", "replace").decode()


def as_html(page: Any, sheet: bytes, title: str) -> str:
    """The page as one file, with Bokeh's scripts and all images in it."""
    from bokeh.embed import file_html
    from bokeh.resources import INLINE

    images = base64.b64encode(sheet).decode()
    filled = {"images": images, "heading": html.escape(title)}  # Bokeh escapes its own title
    return file_html(page, INLINE, title, template=TEMPLATE, template_variables=filled)
