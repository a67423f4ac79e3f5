"""Figures: what they draw, how large they are, and what is stored of them in a notebook."""

import io
import itertools
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import nn

from course_utils import notebooks, plots
from course_utils.notebook_rules import check

WORDS = {"caption": "the < sign", "alt": "two curves & a dot"}


@pytest.fixture
def shown(monkeypatch):
    """The figures shown so far, and their words; each is drawn, small, and within 6 × 3 inches."""
    figures = []

    def show(fig, *, caption, alt):
        png = plots._png(fig)
        width, height = Image.open(io.BytesIO(png)).size
        assert width <= 480 and height <= 240, (width, height)
        assert len(png) < 20_000
        fig.words = {"caption": caption, "alt": alt}
        figures.append(fig)

    monkeypatch.setattr(plots, "show", show)
    return figures


def texts(fig):
    return [text.get_text() for text in fig.findobj(matplotlib.text.Text) if text.get_text()]


def test_lines(shown):
    band = ([1, 10, 100], torch.tensor([1.0, 2.0, 3.0], requires_grad=True), [0.5, 0.5, 0.5])
    plots.lines(
        {"plain": [3.0, 2.0, 4.0], "band": band}, "epoch", "loss (nats)", **WORDS, logx=True,
        highlight="band", hlines={"ln 10": 2.3}, vlines={"best": 10}, ylim=(0, 5),
    )  # fmt: skip
    (ax,) = shown[0].axes
    plain, band, level, moment = ax.lines
    assert plain.get_xdata().tolist() == [1, 2, 3] and plain.get_ydata().tolist() == [3, 2, 4]
    assert band.get_xdata().tolist() == [1, 10, 100] and band.get_ydata().tolist() == [1, 2, 3]
    assert plain.get_color() == plots.GREY and band.get_color() == plots.BLUE
    (area,) = ax.collections
    assert area.get_datalim(ax.transData).y0 == 0.5 and area.get_datalim(ax.transData).y1 == 3.5
    assert set(level.get_ydata()) == {2.3} and set(moment.get_xdata()) == {10}
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylim()) == ("log", "linear", (0, 5))
    assert {"epoch", "loss (nats)", "plain", "band", "ln 10", "best"} <= set(texts(shown[0]))
    assert shown[0].words == WORDS


def test_lines_side_by_side_share_the_y_axis_and_the_legend(shown):
    curves = {"training": [1.0, 0.5], "validation": [1.0, 0.8]}
    better = {"training": [0.3, 0.2], "validation": [0.3, 0.1]}
    plots.lines({"plain": curves, "dropout": better}, "epoch", "loss", **WORDS, logy=True)
    left, right = shown[0].axes
    assert left.get_ylim() == right.get_ylim() and right.get_yscale() == "log"
    assert (left.get_title(), right.get_title()) == ("plain", "dropout")
    assert texts(shown[0]).count("validation") == 1
    assert [line.get_color() for line in right.lines] == [plots.BLUE, plots.ORANGE]


def test_more_lines_than_colours_can_still_be_told_apart(shown):
    plots.lines({str(i): [i, i + 1.0] for i in range(9)}, "x", "y", **WORDS, markers=True)
    looks = [(line.get_color(), line.get_marker()) for line in shown[0].axes[0].lines]
    assert len(looks) == 9 and len(set(looks[:8])) == 8


@pytest.mark.parametrize(
    ("curve", "told"),
    [
        (([1, 2], [1.0, 2.0, 3.0]), r"'a' has x of shape \(2,\) and y of shape \(3,\)"),
        (torch.zeros(2, 2), r"y of shape \(2, 2\)"),
        (([1], [1], [1], [1]), "'a' has 4 parts"),
    ],
)
def test_lines_say_what_does_not_fit(shown, curve, told):
    with pytest.raises(ValueError, match=told):
        plots.lines({"a": curve}, "x", "y", **WORDS)


def test_bars(shown):
    plots.bars(
        {"slow": torch.tensor(4.7), "fast": 0.7}, "time (s)", **WORDS, errors={"fast": 0.1},
        highlight="fast", fmt="{:.1f} s", vline={"budget": 3},
    )  # fmt: skip
    (ax,) = shown[0].axes
    slow, fast = ax.patches
    assert slow.get_width() == pytest.approx(4.7) and fast.get_width() == 0.7
    assert ax.transData.transform((0, slow.get_y()))[1] > ax.transData.transform((0, 1))[1]
    assert matplotlib.colors.same_color(fast.get_facecolor(), plots.BLUE)
    assert matplotlib.colors.same_color(slow.get_facecolor(), plots.GREY)
    assert {"4.7 s", "0.7 s", "slow", "fast", "time (s)", "budget"} <= set(texts(shown[0]))


def test_timeline(shown):
    fast = {"compute": [(0.0, 4.0, "layer 1"), (4.0, 4.1, "layer 2")], "send": [(4.0, 6.0, "")]}
    slow = {"compute": [(0.0, 5.0, "all")], "send": []}
    plots.timeline({"fast": fast, "slow": slow}, "milliseconds", **WORDS)
    upper, lower = shown[0].axes
    assert (upper.get_title(), lower.get_title()) == ("fast", "slow")
    assert upper.get_xlim() == lower.get_xlim() == (0, 6)
    computed, sent = upper.collections
    boxes = [path.get_extents() for path in computed.get_paths()]
    assert [(box.x0, box.x1) for box in boxes] == [(0.0, 4.0), (4.0, 4.1)]
    assert not (computed.get_facecolor() == sent.get_facecolor()).all()
    assert (computed.get_facecolor() == lower.collections[0].get_facecolor()).all()
    assert {"layer 1", "all", "milliseconds"} <= set(texts(shown[0]))
    assert "layer 2" not in texts(shown[0])  # no room in its bar


def test_exchange(shown):
    plots.exchange(
        {
            "all": ([["a"], ["b"]], [["a+b"], ["a+b"]]),
            "gather": ([["a", ""], ["", "b"]], [["a", "b"], ["a", "b"]]),
        },
        **WORDS,
    )
    left, right = shown[0].axes
    assert (left.get_title(), right.get_title()) == ("all", "gather")
    a, b, *sums = (patch.get_facecolor()[:3] for patch in left.patches)
    assert (a, b) == tuple(map(matplotlib.colors.to_rgb, plots.COLOURS[:2]))
    assert sums == [(0, 0, 0)] * 2  # new
    cells = [patch.get_facecolor()[:3] for patch in right.patches]
    assert cells == [a, (1, 1, 1), (1, 1, 1), b, a, b, a, b]
    assert texts(shown[0]).count("a+b") == 2 and texts(shown[0]).count("rank 1") == 2


def test_image_grid(shown):
    images = torch.arange(3 * 4 * 5).view(3, 4, 5).to(torch.uint8)
    plots.image_grid(images, ["7", "1 as 7", "2"], columns=2, wrong=[False, True, False], **WORDS)
    axes = shown[0].axes
    assert len(axes) == 4
    for ax, image in zip(axes, images, strict=False):
        assert ax.images[0].get_array().tolist() == image.tolist()
        assert ax.images[0].get_clim() == (0, 59), "one scale, so that images can be compared"
    assert [ax.get_title() for ax in axes] == ["7", "1 as 7 ✗", "2", ""]
    assert axes[1].title.get_color() == plots.VERMILION
    with pytest.raises(ValueError, match=r"shape \(4, 5\): give \(n, height, width\)"):
        plots.image_grid(images[0], **WORDS)
    with pytest.raises(ValueError, match="3 images and 1 titles"):
        plots.image_grid(images, ["7"], **WORDS)


def test_histograms(shown):
    values = {"narrow": torch.tensor([[-1.0, 1.0]]), "wide": torch.tensor([-4.0, 6.0, 1.0])}
    plots.histograms(values, "activation", **WORDS, bins=10)
    narrow, wide = shown[0].axes
    assert narrow.get_xlim() == wide.get_xlim()
    assert [patch.get_height() for patch in wide.patches] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert (narrow.get_title(), wide.get_title()) == ("narrow\n0 ± 1", "wide\n1 ± 4.1")
    plots.histograms({str(i): torch.randn(100) for i in range(7)}, "x", **WORDS, logy=True)
    assert shown[1].axes[0].get_yscale() == "log"


def test_heatmap(shown):
    matrix = torch.tensor([[1.0, -2.0, 0.0], [0.5, 1.5, -0.5]])
    plots.heatmap(
        matrix, "key", "query", **WORDS, yticks=["a", "b"], fmt="{:.1f}", diverging=True,
        colourbar="weight",
    )  # fmt: skip
    ax = shown[0].axes[0]
    assert ax.images[0].get_array().tolist() == matrix.tolist()
    assert ax.images[0].get_clim() == (-2, 2), "0 is in the middle of the colours"
    plots.heatmap(-matrix, "key", "query", **WORDS, diverging=True)
    assert shown[1].axes[0].images[0].get_clim() == (-2, 2)
    assert {"-2.0", "1.5", "0.0", "a", "b", "key", "query", "weight"} <= set(texts(shown[0]))
    with pytest.raises(ValueError, match=r"shape \(3,\): give \(rows, columns\)"):
        plots.heatmap(matrix[0], "x", "y", **WORDS)


def test_a_confusion_matrix_colours_the_mistakes_only(shown):
    counts = torch.tensor([[50, 2, 0], [1, 40, 0], [0, 7, 60]])
    plots.confusion_matrix(counts, ["cat", "dog", "eel"], **WORDS)
    ax = shown[0].axes[0]
    assert ax.images[0].get_array().tolist() == [[0, 2, 0], [1, 0, 0], [0, 7, 0]]
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {
        (0, 0): "50",
        (1, 0): "2",
        (0, 1): "1",
        (1, 1): "40",
        (1, 2): "7",
        (2, 2): "60",
    }
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted class", "true class")
    assert {"cat", "dog", "eel"} <= set(texts(shown[0]))
    with pytest.raises(ValueError, match=r"shape \(2, 3\): give \(classes, classes\)"):
        plots.confusion_matrix(counts[:2], **WORDS)


def _maps(*shape):
    return torch.softmax(torch.arange(float(torch.Size(shape).numel())).sin().view(shape), -1)


def test_attention_heads(shown):
    maps = _maps(5, 3, 4)
    plots.attention_heads(
        maps.requires_grad_(), ["der", "Hund", "bellt", "."], ["the", "dog", "barks"], **WORDS
    )
    *panels, rest, bar = shown[0].axes
    assert len(panels) == 5 and not rest.images and bar.get_ylabel() == "weight"
    for i, (ax, one) in enumerate(zip(panels, maps, strict=True)):
        assert ax.images[0].get_array().tolist() == one.tolist()
        assert ax.images[0].get_clim() == (0, maps.max()), (
            "one scale, so that heads can be compared"
        )
        assert ax.get_title() == f"head {i}"
        below, beside = (
            [label.get_text() for label in labels if label.get_visible() and label.get_text()]
            for labels in (ax.get_xticklabels(), ax.get_yticklabels())
        )
        assert below == (["der", "Hund", "bellt", "."] if i >= 2 else []), "the lowest ones only"
        assert beside == (["the", "dog", "barks"] if i % 3 == 0 else [])
    assert {"key", "query"} <= set(texts(shown[0]))


def test_attention_heads_of_one_map_with_its_own_titles(shown):
    tokens = ["a", "translation", "incomprehensible"]
    plots.attention_heads(_maps(3, 3), tokens, titles=["layer 2"], **WORDS, xlabel="input")
    ax, _ = shown[0].axes
    assert ax.get_title() == "layer 2" and "input" in texts(shown[0])
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "a",
        "translation",
        "incomprehen…",
    ]


@pytest.mark.parametrize(
    ("heads", "queries", "keys"),
    [(12, 7, 7), (6, 9, 9), (4, 10, 10), (3, 13, 13), (2, 20, 20), (1, 20, 20), (1, 15, 40)],
)
def test_attention_heads_have_room_for_what_the_docstring_says(shown, heads, queries, keys):
    plots.attention_heads(
        _maps(heads, queries, keys), ["token"] * keys, ["token"] * queries, **WORDS
    )
    ax = shown[0].axes[0]
    box = ax.get_window_extent()
    assert min(box.width / keys, box.height / queries) >= plots.MIN_PITCH
    names = [text for text in ax.get_yticklabels() if text.get_visible()]
    extents = [text.get_window_extent() for text in names]
    for above, below in itertools.pairwise(extents):
        assert above.y0 - below.y1 > -1.5, "labels lie on one another"
    assert min(box.x0 for box in extents) >= 0, "cut off at the rim"


def test_attention_heads_say_what_does_not_fit(shown):
    for maps, keys in ((_maps(2, 3, 4), ["a"] * 3), (_maps(1, 2, 3, 3), ["a"] * 3)):
        with pytest.raises(ValueError, match=r"give \(heads, query, key\) and a label for each"):
            plots.attention_heads(maps, keys, **WORDS)
    with pytest.raises(ValueError, match="There are 2 heads and 1 titles"):
        plots.attention_heads(_maps(2, 3, 3), list("abc"), titles=["one"], **WORDS)
    with pytest.raises(ValueError, match="12 heads with 14 labels on the key axis do not fit"):
        plots.attention_heads(_maps(12, 14, 14), ["token"] * 14, **WORDS)
    assert shown == []


SENTENCES = {
    "The cat sat.": (["the", "cat", "sat", "."], _maps(2, 5, 4, 4)),
    "A < b": (["a", "<", "b"], _maps(2, 5, 3, 3).flip(0)),
}


def test_the_controls_of_the_explorer_change_the_picture_and_its_words():
    box = plots._explorer(
        {s: (tokens, maps.numpy()) for s, (tokens, maps) in SENTENCES.items()}, 1, 3
    )
    sentence, sliders, picture, words = box.children
    layer, head = sliders.children
    assert [c.description for c in (sentence, layer, head)] == ["sentence", "layer", "head"]
    assert (layer.min, layer.value, layer.max) == (0, 1, 1)
    assert (head.min, head.value, head.max) == (0, 3, 4)
    seen = [bytes(picture.value)]
    for control, value in ((head, 4), (layer, 0), (sentence, "A < b"), (head, 0)):
        control.value = value
        seen.append(bytes(picture.value))
        png = Image.open(io.BytesIO(seen[-1]))
        assert png.format == "PNG" and png.size == (480, 240) and len(seen[-1]) < 20_000
        place = f"Layer {layer.value}, head {head.value} in words"
        assert words.value.startswith(f"<details><summary>{place}</summary>")
    assert len(set(seen)) == 5
    best = SENTENCES["A < b"][1][0, 0].argmax(-1)
    tokens = ["a", "&lt;", "b"]
    assert f"{tokens[1]} → {tokens[best[1]]} " in words.value
    head.value, layer.value, sentence.value = 3, 1, "The cat sat."
    assert bytes(picture.value) == seen[0]


@pytest.mark.filterwarnings("error")
def test_a_head_that_looks_nowhere_is_drawn_blank(shown):
    plots.attention_heads(torch.zeros(2, 3, 3), list("abc"), **WORDS)
    assert shown[0].axes[0].images[0].get_clim() == (0, 1)
    assert plots._explorer_png(list("abc"), torch.zeros(2, 3, 3).numpy(), 0, 0)


@pytest.fixture
def displayed(monkeypatch):
    """What the explorer hands to the front end: (png, caption, alt, view)."""
    calls = []
    monkeypatch.setattr(plots, "_display", lambda *call: calls.append(call))
    return calls


def test_the_explorer_without_a_front_end_or_ipywidgets_is_a_picture_and_a_sentence(
    displayed, monkeypatch
):
    plots.attention_explorer(SENTENCES, **WORDS, layer=1)
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # its import fails
    plots.attention_explorer(SENTENCES, **WORDS, layer=1)
    for (png, caption, alt, view), told in zip(
        displayed, ("In a notebook you", "With ipywidgets installed you"), strict=True
    ):
        assert png == displayed[0][0] and png.startswith(b"\x89PNG")
        assert caption == f"the < sign {told} choose sentence, layer and head."
        assert alt == WORDS["alt"] and view is None


@pytest.mark.parametrize(
    ("attention", "where", "told"),
    [
        ({}, {}, "at least one sentence"),
        ({"a b": (["a", "b"], _maps(2, 5, 3, 3))}, {}, "the shape \\(2, 5, 3, 3\\), and it has 2"),
        ({"a b": (["a", "b"], _maps(5, 2, 2))}, {}, "give \\(layers, heads, tokens, tokens\\)"),
        ({"long": (["a"] * 21, _maps(1, 1, 21, 21))}, {}, "'long' has 21 tokens; 20 is the most"),
        ({**SENTENCES, "c": (["c"], _maps(3, 5, 1, 1))}, {}, "all with the same layers and heads"),
        (SENTENCES, {"layer": 2}, "no layer 2 with a head 0: the weights have 2 layers of 5 heads"),
        (SENTENCES, {"head": -1}, "no layer 0 with a head -1"),
    ],
)
def test_the_explorer_says_what_does_not_fit(displayed, attention, where, told):
    with pytest.raises(ValueError, match=told):
        plots.attention_explorer(attention, **WORDS, **where)
    assert displayed == []


EXPLORER = """import numpy as np
from course_utils import plots

tokens = ["the", "cat", "sat"]
weights = np.arange(72.0).reshape(2, 4, 3, 3) / 72
plots.attention_explorer({"The cat sat.": (tokens, weights)}, caption="the cat.", alt="two maps")"""


def test_a_widget_is_stored_as_picture_and_sentence_and_stays_so(tmp_path, empty_record):
    """A kernel gives a view of the widget; the file has none, and running again changes nothing."""
    path = tmp_path / "explorer.ipynb"
    cell = nbformat.v4.new_code_cell(EXPLORER, id="explore")
    notebooks.write(nbformat.v4.new_notebook(cells=[cell]), path)
    notebooks.run(path)
    stored = path.read_bytes()
    (cell,) = notebooks.read(path).cells
    picture, caption = cell.outputs
    assert set(picture.data) == {"image/png", "text/plain"}
    assert picture.data["text/plain"] == "Figure: two maps"
    assert caption.data["text/plain"] == (
        "Look at: the cat. Sentence, layer and head can be chosen while the kernel runs."
    )
    assert check([path]) == []
    fresh = notebooks.execute(notebooks.read(path), tmp_path).notebook
    view = fresh.cells[0].outputs[0].data["application/vnd.jupyter.widget-view+json"]
    states = fresh.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert states[view["model_id"]]["model_name"] == "VBoxModel"
    assert notebooks.compare(notebooks.read(path), fresh) == []
    notebooks.write(notebooks.canonical(fresh), path)
    assert path.read_bytes() == stored
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-p"]
    done = subprocess.run(
        [*command, "no:xdist", "-p", "no:cacheprovider", path.name], cwd=tmp_path,
        env=notebooks.environment(empty_record), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.fixture
def leaves():
    return torch.randn(3, requires_grad=True), torch.randn(2, 3, requires_grad=True)


def test_graph_edges_are_those_of_autograd(leaves):
    a, b = leaves
    labels, edges = plots.graph_edges((a * a + b).sum() * 2.0, {"a": a})
    named = [(labels[start].split("\n")[-1], labels[end].split("\n")[-1]) for start, end in edges]
    assert named == [
        ("MulBackward0", "SumBackward0"),  # the 2.0 needs no gradient and is not drawn
        ("SumBackward0", "AddBackward0"),
        ("AddBackward0", "MulBackward0"),
        ("AddBackward0", "leaf (2, 3)"),
        ("MulBackward0", "a (3,)"),
        ("MulBackward0", "a (3,)"),  # twice: a is used twice
    ]
    assert [label for label in labels if "\n" in label] == [
        "AccumulateGrad\nleaf (2, 3)",
        "AccumulateGrad\na (3,)",
    ]


def test_graph_draws_every_node_apart_and_every_arrow_downward(shown, leaves):
    a, b = leaves
    hidden = a * 2
    out = (hidden + torch.tanh(torch.exp(hidden) * b)).sum()  # a shortcut past three layers
    plots.graph(out, {"a": a, "b": b}, caption="the shortcut")
    (ax,) = shown[0].axes
    labels, edges = plots.graph_edges(out, {"a": a, "b": b})
    drawn = [text for text in ax.texts if text.get_text()]
    assert [text.get_text() for text in drawn] == labels
    extents = [text.get_bbox_patch().get_window_extent() for text in drawn]
    for one, other in itertools.combinations(extents, 2):
        assert not one.overlaps(other)
    for box in extents:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= shown[0].bbox.x1, "cut off at the rim"
    for start, end in edges:
        assert extents[start].y0 > extents[end].y1
    heads = [
        isinstance(text.arrow_patch.get_arrowstyle(), matplotlib.patches.ArrowStyle.CurveFilledB)
        for text in ax.texts
        if not text.get_text()
    ]
    assert heads.count(True) == len(edges) and heads.count(False) == 3
    assert shown[0].words["alt"].startswith("the backward graph from SumBackward0: Sum")
    assert "MulBackward0 → AccumulateGrad a (3,)" in shown[0].words["alt"]


def test_graph_of_a_network_names_its_parameters(shown):
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    plots.graph(nn.functional.cross_entropy(net(torch.randn(5, 8)), torch.arange(5) % 3), net,
                caption="the leaves")  # fmt: skip
    assert {"AccumulateGrad\n0.weight (4, 8)", "AccumulateGrad\n2.bias (3,)"} <= set(
        texts(shown[0])
    )


def test_graph_says_why_there_is_none(leaves):
    with pytest.raises(ValueError, match="has no grad_fn"):
        plots.graph(leaves[0], caption="a leaf")
    x = leaves[0]
    for _ in range(45):
        x = x * 2
    with pytest.raises(ValueError, match="more than 40 nodes"):
        plots.graph(x, caption="too long")


@pytest.mark.parametrize("words", [{"caption": "", "alt": "a"}, {"caption": "c", "alt": " "}])
def test_a_figure_without_words_is_refused(words):
    for draw in (
        lambda: plots.lines({"a": [1.0, 2.0]}, "x", "y", **words),
        lambda: plots.attention_explorer(SENTENCES, **words),
    ):
        with pytest.raises(ValueError, match=r"A figure needs (caption|alt)= in words"):
            draw()


def test_the_readers_own_settings_stay_what_they_are(shown):
    with matplotlib.rc_context({"font.size": 23, "lines.linewidth": 7}):
        before = dict(matplotlib.rcParams)
        plots.lines({"a": [1.0, 2.0]}, "x", "y", **WORDS)
        assert dict(matplotlib.rcParams) == before
        assert shown[0].axes[0].lines[0].get_linewidth() == plots.STYLE["lines.linewidth"]
        plots.use_style()
        assert matplotlib.rcParams["font.size"] == plots.STYLE["font.size"]


def test_neighbouring_colours_differ_in_lightness():
    def lightness(colour):
        red, green, blue = matplotlib.colors.to_rgb(colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue  # as Rec. 709 weighs them

    for one, other in itertools.pairwise(plots.COLOURS):
        assert abs(lightness(one) - lightness(other)) > 0.07, (one, other)


def test_outside_a_notebook_the_words_are_printed(capsys):
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    plots.show(fig, **WORDS)
    assert capsys.readouterr().out == "Figure: two curves & a dot\nLook at: the < sign\n"
    assert plt.get_fignums() == [], "closed, so that no back end shows it again"


CELLS = (
    "from course_utils import plots",
    "plots.lines({'a': [1.0, 2.0]}, 'x', 'y', caption='the < sign', alt='two curves & a dot')",
    "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n_ = ax.plot([1, 2])\n"
    "plots.show(fig, caption='the < sign', alt='two curves & a dot')",
    "import time, torch\nfrom course_utils.training import fit\n"
    "_ = fit(torch.nn.Linear(1, 1), [torch.zeros(1, 1)] * 3, None, None, 1,\n"
    "        train_step=lambda *_: time.sleep(1) or 0.0)",
)


def test_what_a_notebook_stores(monkeypatch):
    monkeypatch.setenv("COURSE_PROGRESS", "0")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    imports, figure, own, training = (cell.outputs for cell in book.cells)
    assert imports == [] and training == [], "a long training leaves nothing behind"
    for picture, caption in (figure, own):
        assert picture.data["text/plain"] == "Figure: two curves & a dot"
        assert picture.metadata["image/png"]["alt"] == "two curves & a dot"
        assert set(picture.data) == {"image/png", "text/plain"}
        assert caption.data == {
            "text/plain": "Look at: the < sign",
            "text/html": "<details><summary>Look at: the &lt; sign</summary>"
            "Figure: two curves &amp; a dot</details>",
        }
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(template_name="classic").from_notebook_node(book)
    assert page.count('alt="two curves &amp; a dot"') == 2
