"""Every figure of every chapter: one style, colours that colour-blind readers can tell apart.

Each function draws one figure, shows it and returns None. `caption` says what to look at, `alt`
says the figure in words for a reader who cannot see it; both are shown as text that does not depend
on the version of matplotlib, so keep numbers that differ between machines out of them.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    import torch
    from torch import nn

# Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/
# in an order in which neighbours differ in lightness too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
BLUE, ORANGE, GREEN, PURPLE, VERMILION = COLOURS[:5]
GREY = "#9A9A9A"
MARKERS = "osD^vPX*"  # a second way, beside the colour, to tell lines apart
WIDTH, HEIGHT = 6.0, 3.0  # inches, the most a figure takes
MIN_PITCH = 8  # pixels from one small label to the next, the least that can be read
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.dpi": 80,
    "figure.facecolor": "white",  # readable on JupyterLab's dark theme too
    "figure.figsize": (WIDTH, HEIGHT),
    "font.size": 9,
    "grid.color": "#E5E5E5",
    "image.cmap": "gray_r",  # ink is dark
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 80,
}


def use_style() -> None:
    """Give the reader's own plots the style of the course's figures."""
    matplotlib.rcParams.update(STYLE)


def show(fig: Figure, *, caption: str, alt: str) -> None:
    """Show a figure as PNG, then its caption "Look at: …" with the figure in words folded under.

    The words also stand in the PNG's metadata, from which nbconvert's classic template makes
    `<img alt>`; JupyterLab 4.6 makes none, which is why the caption carries them. Raises ValueError
    where `caption` or `alt` is empty.
    """
    _check_words(caption, alt)
    png = _png(fig)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(fig)  # else the inline backend shows it once more
    _display(png, caption, alt)


def _check_words(caption: str, alt: str) -> None:
    for name, text in (("caption", caption), ("alt", alt)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"A figure needs {name}= in words, but got {text!r}: "
                "caption says what to look at, alt says what the figure shows."
            )


def _display(png: bytes, caption: str, alt: str, view: Mapping | None = None) -> None:
    """Show a PNG and its words; with `view`, a widget where a front end can draw it."""
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
        print(f"Figure: {alt}\nLook at: {caption}")
        return
    display(
        {
            **(view or {}),
            "image/png": base64.b64encode(png).decode(),
            "text/plain": f"Figure: {alt}",
        },
        metadata={"image/png": {"alt": alt}},
        raw=True,
    )
    display(
        {
            "text/html": f"<details><summary>Look at: {html.escape(caption)}</summary>"
            f"Figure: {html.escape(alt)}</details>",
            "text/plain": f"Look at: {caption}",
        },
        raw=True,
    )


def _png(fig: Figure) -> bytes:
    """The figure as a PNG of at most 128 colours, a third of the size of one in full colour."""
    from PIL import Image

    fig.set_dpi(STYLE["savefig.dpi"])
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    size = canvas.get_width_height()
    image = Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")
    file = io.BytesIO()
    image.quantize(128).save(file, format="PNG", optimize=True)
    return file.getvalue()


def _styled(function: Callable) -> Callable:
    """Draw in the course's style whatever the reader has set, and leave that as it is."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper


def _numbers(values):
    """A tensor, on whatever device and with whatever graph, or a sequence, as a NumPy array."""
    import numpy as np

    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)


@_styled
def lines(
    series: Mapping,
    xlabel: str,
    ylabel: str,
    *,
    caption: str,
    alt: str,
    logx: bool = False,
    logy: bool = False,
    highlight: str | Sequence[str] | None = None,
    markers: bool = False,
    hlines: Mapping[str, float] | None = None,
    vlines: Mapping[str, float] | None = None,
    ylim: tuple[float, float] | None = None,
) -> None:
    """Curves over a common x axis.

    `series` maps each label to y, to (x, y) or to (x, y, spread), each of shape (n,); the spread is
    drawn as a band y ± spread, and without x the points are counted from 1. A mapping of such
    mappings {title: series} gives panels side by side with one y axis. `highlight` names the labels
    to draw in colour, the others turn grey; `hlines` and `vlines` map labels to dashed levels.
    """
    nested = all(isinstance(value, Mapping) for value in series.values())
    panels = series if nested else {"": series}
    shared = nested and len({tuple(curves) for curves in panels.values()}) == 1  # one legend
    fig = Figure()
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    chosen = [highlight] if isinstance(highlight, str) else highlight
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        colours = itertools.cycle(COLOURS)
        for i, (label, curve) in enumerate(curves.items()):
            x, y, spread = _curve(label, curve)
            in_front = chosen is None or label in chosen
            colour = next(colours) if in_front else GREY
            marker = MARKERS[i % len(MARKERS)] if markers or len(y) == 1 else None
            ax.plot(x, y, label=label, color=colour, marker=marker, zorder=2 + in_front)
            if spread is not None:
                ax.fill_between(x, y - spread, y + spread, color=colour, alpha=0.2, linewidth=0)
        for label, level in (hlines or {}).items():
            ax.axhline(level, color="black", linestyle="--", linewidth=1)
            ax.annotate(label, (1, level), (-2, 2), xycoords=("axes fraction", "data"),
                        textcoords="offset points", ha="right", va="bottom")  # fmt: skip
        for label, level in (vlines or {}).items():
            ax.axvline(level, color="black", linestyle=":", linewidth=1)
            ax.annotate(label, (level, 1), (0, 1), xycoords=("data", "axes fraction"),
                        textcoords="offset points", ha="center", va="bottom")  # fmt: skip
        ax.set(title=title, xlabel=xlabel, xscale="log" if logx else "linear")
        ax.set(yscale="log" if logy else "linear", **({"ylim": ylim} if ylim else {}))
        if not logx and all(not isinstance(curve, tuple) for curve in curves.values()):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # epochs are counted
        if logx and len(x) <= 8 and x.max() < 100 * x.min():  # else labels overlap
            ax.set_xticks(x, [f"{value:,g}" for value in x])
            ax.minorticks_off()
        if len(curves) > 1 and not shared:
            ax.legend()
    if shared:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    axes[0].set_ylabel(ylabel)
    show(fig, caption=caption, alt=alt)


def _curve(label: str, curve):
    """x, y and spread (or None) of one entry of `lines`."""
    parts = curve if isinstance(curve, tuple) else (None, curve)
    if len(parts) not in (2, 3):
        raise ValueError(
            f"The curve {label!r} has {len(parts)} parts: give y, (x, y) or (x, y, spread)."
        )
    y = _numbers(parts[1])
    x = _numbers(parts[0]) if parts[0] is not None else _numbers(range(1, len(y) + 1))
    if x.shape != y.shape or y.ndim != 1:
        raise ValueError(
            f"The curve {label!r} has x of shape {x.shape} and y of shape {y.shape}: "
            "both must have the same shape (n,)."
        )
    return x, y, _numbers(parts[2]) if len(parts) == 3 else None


@_styled
def bars(
    values: Mapping[str, float],
    xlabel: str,
    *,
    caption: str,
    alt: str,
    errors: Mapping[str, float] | None = None,
    highlight: str | Sequence[str] | None = None,
    logx: bool = False,
    fmt: str = "{:.3g}",
    vline: Mapping[str, float] | None = None,
) -> None:
    """Horizontal bars, the first on top, each with its number beside it.

    `errors` maps labels to the half length of a whisker; `vline` maps a label to a dashed level.
    """
    numbers = {label: float(value) for label, value in values.items()}
    chosen = [highlight] if isinstance(highlight, str) else highlight
    fig = Figure(figsize=(WIDTH, min(HEIGHT, 0.8 + 0.3 * len(numbers))))
    ax = fig.subplots()
    drawn = ax.barh(
        list(numbers),
        list(numbers.values()),
        xerr=[float((errors or {}).get(label, 0)) for label in numbers] if errors else None,
        color=[BLUE if chosen is None or label in chosen else GREY for label in numbers],
        log=logx,
    )
    ax.bar_label(drawn, [fmt.format(value) for value in numbers.values()], padding=3)
    for label, level in (vline or {}).items():
        ax.axvline(level, color="black", linestyle="--", linewidth=1)
        ax.annotate(label, (level, 1), (3, 1), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="bottom")  # fmt: skip
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(xlabel)
    show(fig, caption=caption, alt=alt)


@_styled
def timeline(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]],
    xlabel: str,
    *,
    caption: str,
    alt: str,
) -> None:
    """What happened when: {title: {row: [(begin, end, label), ...]}}, a panel under the other.

    Each row's bars have one colour, the same in all panels, with their labels inside where they
    fit; all panels have one x axis, which begins at 0.
    """
    height = 0.75 + sum(0.3 + 0.24 * len(rows) for rows in panels.values())
    fig = Figure(figsize=(WIDTH, min(HEIGHT, height)))
    sizes = [len(rows) + 1 for rows in panels.values()]
    axes = fig.subplots(len(panels), sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    names = list(dict.fromkeys(row for rows in panels.values() for row in rows))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    ends = [bar[1] for rows in panels.values() for bars in rows.values() for bar in bars]
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        for place, (name, bars) in enumerate(rows.items()):
            spans = [(begin, end - begin) for begin, end, _ in bars]
            colour = colours[name]
            ax.broken_barh(spans, (place - 0.4, 0.8), color=colour, edgecolor="white", linewidth=1)
            for begin, end, label in bars:
                if label and (end - begin) / max(ends) > 0.016 * len(label):
                    ax.text((begin + end) / 2, place, label, color="white", fontsize=7,
                            ha="center", va="center")  # fmt: skip
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(title=title, ylim=(len(rows) - 0.5, -0.5), xlim=(0, max(ends, default=1)))
        ax.grid(visible=False, axis="y")
    axes[-1].set_xlabel(xlabel)
    show(fig, caption=caption, alt=alt)


@_styled
def exchange(
    panels: Mapping[str, tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]],
    *,
    caption: str,
    alt: str,
    columns: int = 2,
) -> None:
    """What each process holds before and after: {title: (before, after)}, `columns` panels a row.

    before, after: for each rank a list of strings, one a cell, "" for an empty one. A string that
    stands somewhere before has the colour of the first rank that has it there; one that is new is
    set in white on black.
    """
    rows = math.ceil(len(panels) / columns)
    ranks = max(len(before) for before, _ in panels.values())
    fig = Figure(figsize=(WIDTH, min(HEIGHT, rows * (0.35 + 0.27 * ranks))))
    for ax in fig.subplots(rows, columns, squeeze=False).flat:
        ax.set_axis_off()
    for ax, (title, (before, after)) in zip(fig.axes, panels.items(), strict=False):
        owner = {text: rank for rank in reversed(range(len(before))) for text in before[rank]}
        start = max(map(len, before)) + 1.2
        end = start + max(map(len, after))
        for left, side in ((0, before), (start, after)):
            for rank, cells in enumerate(side):
                for place, text in enumerate(cells):
                    new = text not in owner
                    colour = "white" if not text else "black" if new else COLOURS[owner[text]]
                    ax.add_patch(
                        matplotlib.patches.Rectangle(
                            (left + place, rank + 0.08), 0.94, 0.84, facecolor=colour,
                            alpha=1 if new else 0.35, edgecolor=GREY, linewidth=0.6,
                        )
                    )  # fmt: skip
                    ax.text(left + place + 0.47, rank + 0.5, text, ha="center", va="center",
                            fontsize=7, color="white" if new and text else "black")  # fmt: skip
        ax.annotate("", (start - 0.2, len(before) / 2), (start - 1.1, len(before) / 2),
                    arrowprops={"arrowstyle": "-|>", "color": "black"})  # fmt: skip
        for rank in range(len(before)):
            ax.text(-0.15, rank + 0.5, f"rank {rank}", ha="right", va="center", fontsize=7)
        ax.set(title=title, xlim=(-1.2, end), ylim=(len(before), 0))
    show(fig, caption=caption, alt=alt)


@_styled
def image_grid(
    images,
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    wrong: Sequence[bool] | None = None,
    caption: str,
    alt: str,
) -> None:
    """Small grey images (n, height, width), 0 is paper; one scale for all of them.

    `titles` has n strings; those where `wrong` is true are set in vermilion with a cross.
    """
    pixels = _numbers(images)
    if pixels.ndim != 3:
        raise ValueError(f"images has the shape {pixels.shape}: give (n, height, width).")
    if titles is not None and len(titles) != len(pixels):
        raise ValueError(f"There are {len(pixels)} images and {len(titles)} titles.")
    rows = math.ceil(len(pixels) / columns)
    cell = min(WIDTH / columns, HEIGHT / rows)
    fig = Figure(figsize=(cell * columns, cell * rows))
    low, high = pixels.min(), pixels.max()
    for i, ax in enumerate(fig.subplots(rows, columns, squeeze=False).flat):
        ax.set_axis_off()
        if i < len(pixels):
            ax.imshow(pixels[i], vmin=low, vmax=high)
            if titles is not None:
                cross = wrong is not None and bool(wrong[i])
                ax.set_title(f"{titles[i]}{' ✗' if cross else ''}", fontsize=8, pad=2,
                             color=VERMILION if cross else "black")  # fmt: skip
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.05, hspace=0.05)
    show(fig, caption=caption, alt=alt)


@_styled
def histograms(
    series: Mapping,
    xlabel: str,
    *,
    caption: str,
    alt: str,
    bins: int = 40,
    logy: bool = False,
    columns: int = 4,
) -> None:
    """One small histogram for each {title: tensor of any shape}, all over the same x axis.

    Each panel says the mean and the standard deviation of its values.
    """
    values = {title: _numbers(value).ravel() for title, value in series.items()}
    low = min(value.min() for value in values.values())
    high = max(value.max() for value in values.values())
    columns = min(columns, len(values))
    rows = math.ceil(len(values) / columns)
    fig = Figure(figsize=(WIDTH, min(HEIGHT, 0.6 + 1.3 * rows)))
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i >= len(values):
            ax.set_axis_off()
            continue
        title, value = list(values.items())[i]
        ax.hist(value, bins=bins, range=(low, high), color=BLUE, log=logy)
        ax.set_title(f"{title}\n{value.mean():.2g} ± {value.std():.2g}", fontsize=8)
        ax.grid(visible=False)
    fig.supxlabel(f"{xlabel}  (above each: mean ± standard deviation)", fontsize=9)
    fig.supylabel("count", fontsize=9)
    show(fig, caption=caption, alt=alt)


@_styled
def heatmap(
    matrix,
    xlabel: str,
    ylabel: str,
    *,
    caption: str,
    alt: str,
    xticks: Sequence | None = None,
    yticks: Sequence | None = None,
    fmt: str | None = None,
    colourbar: str = "value",
    diverging: bool = False,
) -> None:
    """A matrix (rows, columns) as colours, dark is large; `fmt` ("{:.2f}") writes the numbers too.

    `diverging` takes a scale around 0, violet below it and orange above. `colourbar` names the
    quantity and its unit.
    """
    cells = _numbers(matrix)
    if cells.ndim != 2:
        raise ValueError(f"matrix has the shape {cells.shape}: give (rows, columns).")
    bound = abs(cells).max() if diverging else None
    fig = Figure(figsize=(min(WIDTH, 1.8 + HEIGHT * cells.shape[1] / cells.shape[0]), HEIGHT))
    ax = fig.subplots()
    image = ax.imshow(
        cells,
        cmap="PuOr_r" if diverging else "Blues",
        vmin=-bound if diverging else None,
        vmax=bound,
        aspect="auto",
    )
    for axis, ticks in ((ax.xaxis, xticks), (ax.yaxis, yticks)):
        if ticks is not None:
            axis.set_ticks(range(len(ticks)), [str(tick) for tick in ticks])
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
    if fmt is not None:
        _write_numbers(ax, image, cells, fmt)
    ax.grid(visible=False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    fig.colorbar(image, label=colourbar)
    show(fig, caption=caption, alt=alt)


@_styled
def confusion_matrix(matrix, classes: Sequence | None = None, *, caption: str, alt: str) -> None:
    """Counts (classes, classes): row is the true class, column the predicted one.

    Only the mistakes are coloured: the diagonal would outshine them. Zeros are left out.
    """
    counts = _numbers(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"matrix has the shape {counts.shape}: give (classes, classes).")
    mistakes = counts.copy()
    mistakes[range(len(counts)), range(len(counts))] = 0
    fig = Figure(figsize=(4.2, HEIGHT))
    ax = fig.subplots()
    image = ax.imshow(mistakes, cmap="Oranges", vmin=0, vmax=max(1, mistakes.max()), aspect="auto")
    _write_numbers(ax, image, counts, "{:.0f}", colours=mistakes)
    names = [str(name) for name in (classes if classes is not None else range(len(counts)))]
    ax.set_xticks(range(len(counts)), names)
    ax.set_yticks(range(len(counts)), names)
    ax.grid(visible=False)
    ax.set(xlabel="predicted class", ylabel="true class")
    fig.colorbar(image, label="mistakes (number of examples)", ticks=MaxNLocator(5, integer=True))
    show(fig, caption=caption, alt=alt)


def _write_numbers(ax, image, cells, fmt: str, colours=None) -> None:
    """Write each number in its cell, white on dark colours; a bare "0" is left out."""
    colours = cells if colours is None else colours
    for row in range(cells.shape[0]):
        for column in range(cells.shape[1]):
            text = fmt.format(cells[row, column])
            if text == "0":
                continue
            red, green, blue, _ = image.cmap(image.norm(colours[row, column]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ax.text(column, row, text, ha="center", va="center", fontsize=7,
                    color="white" if dark else "black")  # fmt: skip


@_styled
def attention_heads(
    weights,
    keys: Sequence[str],
    queries: Sequence[str] | None = None,
    *,
    caption: str,
    alt: str,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    xlabel: str = "key",
    ylabel: str = "query",
) -> None:
    """Attention weights (heads, query, key), a small heatmap for each head; dark is large.

    `keys` labels the columns, `queries` the rows (None: the keys again); a matrix (query, key) is
    one head. All have one scale, from 0 to the largest weight. `titles` has one string a head
    (None: "head 0" and so on). Raises ValueError where numbers and labels do not fit, and where
    labels would stand too close to be read: 12 heads of 7 short tokens have room, 6 of 9, 4 of 10,
    3 of 13, 1 or 2 of 20, or 1 head of 15 queries and 40 keys.
    """
    maps, keys, queries = _attention(weights, keys, queries)
    count, n, m = maps.shape
    titles = [f"head {i}" for i in range(count)] if titles is None else list(titles)
    if len(titles) != count:
        raise ValueError(f"There are {count} heads and {len(titles)} titles.")
    columns = columns or (count if count <= 4 else math.ceil(count / 2))
    rows = math.ceil(count / columns)
    upright = max(map(len, keys)) == 1
    # Inches beside the panels: labels, names of the axes, the scale; labels, name, titles.
    aside = 1.2 + 0.055 * max(map(len, queries))
    above = 0.3 + 0.2 * rows + (0.1 if upright else 0.055 * max(map(len, keys)))
    cell = min((WIDTH - aside) / (columns * m), (HEIGHT - above) / (rows * n), 0.28)
    width, height = max(aside + cell * columns * m, 2.6), max(above + cell * rows * n, 1.2)
    fig = Figure(figsize=(min(width, WIDTH), min(height, HEIGHT)))
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i >= count:
            ax.set_axis_off()
            continue
        image = _attention_panel(ax, maps[i], keys, queries, maps.max())
        ax.set_title(titles[i], fontsize=8, pad=3)
        if i + columns >= count:  # the lowest of its column
            ax.xaxis.set_tick_params(labelbottom=True)
    fig.supxlabel(xlabel, fontsize=8)
    fig.supylabel(ylabel, fontsize=8)
    fig.colorbar(image, ax=axes, label="weight", ticks=MaxNLocator(4))
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0.02, hspace=0.02)
    _check_pitch(fig, axes[0, 0], n, m, count)
    show(fig, caption=caption, alt=alt)


def attention_explorer(
    attention: Mapping[str, tuple[Sequence[str], object]],
    *,
    caption: str,
    alt: str,
    layer: int = 0,
    head: int = 0,
) -> None:
    """Attention weights to walk through: a menu of sentences, a slider for layer and for head.

    `attention` maps each sentence to its tokens, n strings, and its weights (layers, heads, n, n);
    layers and heads are counted from 0, as in `encoder.layer.0`. The chosen head is drawn large,
    all heads of its layer small beside it. What is stored in a notebook, and shown where there is
    no kernel or no ipywidgets, is the picture of the first sentence at `layer` and `head`, which
    `alt` describes. Raises ValueError where numbers and labels do not fit, and for more than 20
    tokens, which could not be read.
    """
    _check_words(caption, alt)
    attention = {
        sentence: _attention_layers(sentence, tokens, weights)
        for sentence, (tokens, weights) in attention.items()
    }
    if len({weights.shape[:2] for _, weights in attention.values()}) != 1:
        raise ValueError("Give at least one sentence, and all with the same layers and heads.")
    tokens, weights = next(iter(attention.values()))
    if not (0 <= layer < len(weights) and 0 <= head < weights.shape[1]):
        raise ValueError(
            f"There is no layer {layer} with a head {head}: the weights have {len(weights)} layers "
            f"of {weights.shape[1]} heads, counted from 0."
        )
    png, view = _explorer_png(tokens, weights[layer], layer, head), None
    from IPython import get_ipython

    if getattr(get_ipython(), "kernel", None) is None:
        caption += " In a notebook you choose sentence, layer and head."
    else:
        try:
            view = _widget_view(_explorer(attention, layer, head))
            caption += " Sentence, layer and head can be chosen while the kernel runs."
        except ImportError:
            caption += " With ipywidgets installed you choose sentence, layer and head."
    _display(png, caption, alt, view)


def _widget_view(widget) -> dict:
    """What a front end needs to draw a widget; one without widgets draws the PNG beside it."""
    return {
        "application/vnd.jupyter.widget-view+json": {
            "model_id": widget.model_id,
            "version_major": 2,
            "version_minor": 0,
        }
    }


def _explorer(attention: Mapping, layer: int, head: int):
    """The widget of `attention_explorer`: controls, the picture, and the picture in words."""
    import ipywidgets as widgets

    first, (_, weights) = next(iter(attention.items()))

    def slider(name: str, value: int, count: int):
        return widgets.IntSlider(value, 0, count - 1, description=name, continuous_update=False)

    sentence = widgets.Dropdown(
        options=list(attention), value=first, description="sentence", layout={"width": "480px"}
    )
    layers, heads = slider("layer", layer, len(weights)), slider("head", head, weights.shape[1])
    picture = widgets.Image(format="png", layout={"width": "480px"})  # else it is stretched
    words = widgets.HTML()

    def draw(_=None) -> None:
        tokens, weights = attention[sentence.value]
        chosen = weights[layers.value]
        picture.value = _explorer_png(tokens, chosen, layers.value, heads.value)
        words.value = (
            f"<details><summary>Layer {layers.value}, head {heads.value} in words</summary>"
            f"{html.escape(_in_words(tokens, chosen[heads.value]))}</details>"
        )

    draw()
    for control in (sentence, layers, heads):
        control.observe(draw, names="value")
    return widgets.VBox([sentence, widgets.HBox([layers, heads]), picture, words])


def _in_words(tokens: Sequence[str], weights) -> str:
    """Where each token looks most."""
    best = weights.argmax(axis=1)
    return "The largest weight of each token: " + "; ".join(
        f"{token} → {tokens[k]} {weights[i, k]:.2f}"
        for i, (token, k) in enumerate(zip(tokens, best, strict=True))
    )


@_styled
def _explorer_png(tokens: Sequence[str], weights, layer: int, head: int) -> bytes:
    """Left the chosen head with its tokens, right all heads (heads, n, n), each on its scale."""
    heads, n, _ = weights.shape
    fig = Figure()
    left, right = fig.subplots(1, 2, width_ratios=(1, 1))
    image = _attention_panel(left, weights[head], tokens, tokens, weights[head].max())
    left.set_title(f"layer {layer}, head {head}", pad=3)
    left.set_xlabel("key", fontsize=8)
    left.set_ylabel("query", fontsize=8)
    fig.colorbar(image, ax=left, label="weight", ticks=MaxNLocator(4))

    columns = math.ceil(math.sqrt(heads * 4 / 3))
    gap = 0.3 * n  # above each small map, for its number
    edge = 0.04 * n  # around it, so that its frame covers no cell
    for i, one in enumerate(weights):
        x, y = i % columns * (n + gap / 2), i // columns * (n + gap)
        right.imshow(one, extent=(x, x + n, y + n, y), cmap="Blues", vmin=0, vmax=one.max() or 1)
        right.text(x, y - gap / 8, str(i), fontsize=7, va="bottom",
                   fontweight="bold" if i == head else "normal")  # fmt: skip
        right.add_patch(
            matplotlib.patches.Rectangle((x - edge, y - edge), n + 2 * edge, n + 2 * edge,
                                         fill=False, clip_on=False,
                                         edgecolor=VERMILION if i == head else GREY,
                                         linewidth=2 if i == head else 0.5)
        )  # fmt: skip
    right.set(
        xlim=(0, columns * (n + gap / 2)),
        ylim=(math.ceil(heads / columns) * (n + gap) - gap, -gap),
    )
    right.set_axis_off()
    right.set_anchor("N")
    right.set_title(f"all heads of layer {layer}, each on its scale", pad=3, fontsize=8)
    return _png(fig)


def _attention(weights, keys: Sequence[str], queries: Sequence[str] | None):
    """Weights as an array (heads, query, key), and both lists of labels, long ones cut."""
    maps = numbers = _numbers(weights)
    if maps.ndim == 2:
        maps = maps[None]
    keys, queries = _labels(keys), _labels(keys if queries is None else queries)
    if maps.ndim != 3 or maps.shape[1:] != (len(queries), len(keys)) or 0 in maps.shape:
        raise ValueError(
            f"weights has the shape {numbers.shape}, and there are {len(queries)} "
            f"queries and {len(keys)} keys: give (heads, query, key) and a label for each."
        )
    return maps, keys, queries


def _attention_layers(sentence: str, tokens: Sequence[str], weights):
    tokens, maps = _labels(tokens), _numbers(weights)
    if maps.ndim != 4 or maps.shape[2:] != (len(tokens), len(tokens)) or 0 in maps.shape:
        raise ValueError(
            f"The weights of {sentence!r} have the shape {maps.shape}, and it has {len(tokens)} "
            "tokens: give (layers, heads, tokens, tokens)."
        )
    if len(tokens) > 20:
        raise ValueError(
            f"{sentence!r} has {len(tokens)} tokens; 20 is the most that can be read in the "
            "picture: give a shorter sentence."
        )
    return tokens, maps


def _labels(tokens: Sequence[str]) -> list[str]:
    names = [str(token) for token in tokens]
    return [name if len(name) <= 12 else f"{name[:11]}…" for name in names]


def _attention_panel(ax, weights, keys: Sequence[str], queries: Sequence[str], largest: float):
    image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=largest or 1, aspect="auto")
    turned = 0 if max(map(len, keys)) == 1 else 90
    ax.set_xticks(range(len(keys)), keys, fontsize=7, rotation=turned)
    ax.set_yticks(range(len(queries)), queries, fontsize=7)
    ax.tick_params(length=0, pad=2)
    ax.grid(visible=False)
    ax.spines[:].set(visible=True, color=GREY, linewidth=0.5)
    return image


def _check_pitch(fig: Figure, ax, n: int, m: int, heads: int) -> None:
    """Raise ValueError where labels of a drawn panel would stand too close to be read."""
    fig.set_dpi(STYLE["savefig.dpi"])
    FigureCanvasAgg(fig).draw()  # the layout is settled now
    box = ax.get_window_extent()
    for name, size, count in (("key", box.width, m), ("query", box.height, n)):
        if count > 1 and size / count < MIN_PITCH:
            raise ValueError(
                f"{heads} heads with {count} labels on the {name} axis do not fit into 6 × 3 "
                f"inches: the labels would stand {size / count:.1f} pixels apart; {MIN_PITCH} is "
                "the least that can be read. Show fewer heads or a shorter sentence."
            )


@_styled
def graph(
    tensor: torch.Tensor,
    params: nn.Module | Mapping[str, torch.Tensor] | None = None,
    *,
    caption: str,
    alt: str | None = None,
) -> None:
    """The graph that autograd recorded for `tensor`, read from `grad_fn` and `next_functions`.

    Each box is a backward function, each arrow a gradient handed on; an orange box is a leaf, in
    whose `.grad` the gradient is accumulated. `params` names the leaves. With alt=None the edges
    are told in words. Raises ValueError where there is no graph, or more than 40 nodes.
    """
    labels, edges = graph_edges(tensor, params)
    depth = _depths(len(labels), edges)
    hops = _hops(edges, depth)  # from here on depth has the turning points of long edges too
    layers = [[i for i in range(len(depth)) if depth[i] == d] for d in range(max(depth) + 1)]
    place = _places(layers, hops, len(labels))
    widest = max(_width(layer, len(labels)) for layer in layers)
    height = max(min(HEIGHT, 0.65 * len(layers)), 0.42 * len(layers))
    fig = Figure(figsize=(min(WIDTH, max(3.0, 1.4 * widest)), height), layout="none")
    canvas = FigureCanvasAgg(fig)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5))
    for i, label in enumerate(labels):
        leaf = label.startswith("AccumulateGrad")
        ax.text(
            *place[i], label, ha="center", va="center", zorder=3, linespacing=1.1,
            fontsize=8 if widest <= 4.5 else max(5, 36 / widest),
            bbox={"boxstyle": "round", "facecolor": "#FBE3B5" if leaf else "white",
                  "edgecolor": "black", "linewidth": 1.8 if i == 0 else 0.8},
        )  # fmt: skip
    canvas.draw()  # now the boxes have a size, and arrows can end at their rims
    boxes = dict(enumerate(text.get_bbox_patch() for text in ax.texts))

    def at(node: int, aside: float) -> tuple[float, float]:
        """A long edge passes a layer upright, from 0.35 above its middle to 0.35 below."""
        x, y = place[node]
        return (x, y) if node in boxes else (x, y + aside)

    for node in range(len(labels), len(depth)):
        ax.plot(*zip(at(node, -0.35), at(node, 0.35), strict=True), color="black", linewidth=1)
    for n, (start, end) in enumerate(hops):
        # x * x hands two gradients to x: side by side, both are seen
        bend = 0.4 * (hops[:n].count((start, end)) - (hops.count((start, end)) - 1) / 2)
        ax.annotate(
            "", at(end, -0.35), at(start, 0.35), zorder=2,
            arrowprops={"arrowstyle": "-|>" if end in boxes else "-", "color": "black",
                        "patchA": boxes.get(start), "patchB": boxes.get(end),
                        "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    if alt is None:
        names = [label.replace("\n", " ") for label in labels]
        alt = "; ".join(f"{names[start]} → {names[end]}" for start, end in edges)
        alt = f"the backward graph from {names[0]}: {alt or 'no further nodes'}."
    show(fig, caption=caption, alt=alt)


def graph_edges(
    tensor: torch.Tensor, params: nn.Module | Mapping[str, torch.Tensor] | None = None
) -> tuple[list[str], list[tuple[int, int]]]:
    """The nodes' labels, the root's first, and the edges (from, to) between their positions."""
    root = getattr(tensor, "grad_fn", None)
    if root is None:
        raise ValueError(
            "This tensor has no grad_fn, so there is no graph to draw: it is a leaf, or it was "
            "computed under no_grad() or from tensors that need no gradient."
        )
    named = params.named_parameters() if hasattr(params, "named_parameters") else params or {}
    names = {id(leaf): name for name, leaf in dict(named).items()}
    nodes, labels, edges = [root], [], []
    number = {root: 0}  # holds the nodes, so that Python gives no two of them the same id
    for node in nodes:  # grows while it is gone through
        labels.append(_label(node, names))
        for following, _ in node.next_functions:
            if following is None:  # an input that needs no gradient
                continue
            if following not in number:
                number[following] = len(nodes)
                nodes.append(following)
            edges.append((number[node], number[following]))
        if len(nodes) > 40:
            raise ValueError(
                "This graph has more than 40 nodes, too many to read: draw a smaller computation, "
                "one layer of the network for instance."
            )
    return labels, edges


def _label(node, names: Mapping[int, str]) -> str:
    leaf = getattr(node, "variable", None)
    if leaf is None:
        return type(node).__name__
    return f"AccumulateGrad\n{names.get(id(leaf), 'leaf')} {tuple(leaf.shape)}"


def _depths(count: int, edges: list[tuple[int, int]]) -> list[int]:
    """The length of the longest way from the root to each node: arrows then only point down."""
    depth = [0] * count
    changed = True
    while changed:
        changed = False
        for start, end in edges:
            if depth[end] <= depth[start]:
                depth[end] = depth[start] + 1
                changed = True
    return depth


def _hops(edges: list[tuple[int, int]], depth: list[int]) -> list[tuple[int, int]]:
    """The edges cut at every layer they pass, so that they can lead around the boxes there.

    The turning points are numbered on from the nodes, and their layers appended to `depth`.
    """
    hops = []
    for start, end in edges:
        for layer in range(depth[start] + 1, depth[end]):
            depth.append(layer)
            hops.append((start, len(depth) - 1))
            start = len(depth) - 1
        hops.append((start, end))
    return hops


def _width(layer: list[int], count: int) -> float:
    """The width of a layer in boxes; a turning point, numbered from `count` on, needs less."""
    return sum(1 if node < count else 0.3 for node in layer)


def _places(
    layers: list[list[int]], hops: list[tuple[int, int]], count: int
) -> list[tuple[float, float]]:
    """x in 0..1 and the layer as y, nodes in the order of the mean place of what points to them."""
    place = {}
    for y, layer in enumerate(layers):
        pull = {}
        for node in layer:
            above = [place[start][0] for start, end in hops if end == node]
            pull[node] = sum(above) / len(above) if above else 0.5
        layer = sorted(layer, key=lambda node: (pull[node], node))
        for i, node in enumerate(layer):
            middle = _width(layer[:i], count) + _width([node], count) / 2
            place[node] = (middle / _width(layer, count), y)
    return [place[node] for node in sorted(place)]
