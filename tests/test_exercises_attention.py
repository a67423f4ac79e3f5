"""The references of chapter 3 against torch and transformers, and the figures in its symptoms."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils import notebooks
from course_utils.exercises import attention as catalogue
from course_utils.exercises import find
from course_utils.reference import attention

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "03_attention.ipynb"
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def randomised(module, seed=0):
    """Every parameter drawn anew, the norms' too, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p.shape[-1])
            )
    return module


# --- attention ----------------------------------------------------------------------------------


def masks(kind, queries, keys):
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if kind == "padding":
        return attention.padding_mask(torch.tensor([keys, 2]), keys)
    mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1, 0, 2] = False  # a query that may look nowhere
    return mask


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "random"])
def test_attention_is_torch_s(kind, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4, dtype=dtype), torch.randn(2, 3, 7, 4, dtype=dtype)
    v = torch.randn(2, 3, 7, 6, dtype=dtype)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    mask = masks(kind, 5, 7)
    ours = attention.scaled_dot_product_attention(*inputs, mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    close(ours, theirs, TOLERANCE[dtype])
    upstream = torch.randn_like(theirs)
    for one, other in zip(
        *(torch.autograd.grad(out, inputs, upstream) for out in (ours, theirs)), strict=True
    ):
        close(one, other, TOLERANCE[dtype])


def test_a_query_that_may_look_nowhere_gets_zeros_and_finite_gradients():
    q, k, v = (torch.randn(1, 1, 3, 2, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    out = attention.scaled_dot_product_attention(q, k, v, mask)
    assert (out[0, 0, 1] == 0).all() and (out[0, 0, 0] != 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_works_in_half_precision(dtype):
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=dtype) for _ in range(3))
    mask = attention.causal_mask(4)
    out = attention.scaled_dot_product_attention(q, k, v, mask)
    assert out.dtype == dtype
    close(out.float(), F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float(), 2e-2)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_multi_head_attention_is_torch_s(num_heads):
    ours = randomised(attention.MultiHeadAttention(12, num_heads))
    theirs = nn.MultiheadAttention(12, num_heads, batch_first=True).double()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            packed = [getattr(part, kind) for part in (ours.query, ours.key, ours.value)]
            getattr(theirs, f"in_proj_{kind}").copy_(torch.cat(packed))
            getattr(theirs.out_proj, kind).copy_(getattr(ours.output, kind))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    close(ours(x), theirs(x, x, x)[0])
    lengths = torch.tensor([5, 3])
    key_padding = torch.arange(5) >= lengths[:, None]  # torch's convention: True is left out
    expected = theirs(x, x, x, key_padding_mask=key_padding, attn_mask=~attention.causal_mask(5))[0]
    mask = attention.padding_mask(lengths, 5) & attention.causal_mask(5)
    close(ours(x, mask), expected)
    cross = attention.CrossAttention(12, num_heads).double()
    cross.load_state_dict(ours.state_dict())
    memory = torch.randn(2, 7, 12, dtype=torch.float64)
    close(cross(x, memory), theirs(x, memory, memory)[0])


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_block_is_torch_s(norm_first):
    ours = randomised(attention.EncoderBlock(12, 3, 20, norm_first=norm_first)).eval()
    theirs = nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    )
    theirs = theirs.double().eval()
    pairs = {
        "self_attn.out_proj": ours.attention.output,
        "linear1": ours.feed_forward.expand,
        "linear2": ours.feed_forward.contract,
        "norm1": ours.norm1,
        "norm2": ours.norm2,
    }
    state = {f"{k}.{n}": p for k, module in pairs.items() for n, p in module.named_parameters()}
    parts = (ours.attention.query, ours.attention.key, ours.attention.value)
    for kind in ("weight", "bias"):
        state[f"self_attn.in_proj_{kind}"] = torch.cat([getattr(part, kind) for part in parts])
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    close(ours(x), theirs(x))
    upstream = torch.randn(2, 5, 12, dtype=torch.float64)
    close(*(torch.autograd.grad(f(x), x, upstream)[0] for f in (ours, theirs)))


def test_layer_norm_is_torch_s():
    ours, theirs = randomised(attention.LayerNorm(6, eps=1e-3)), nn.LayerNorm(6, eps=1e-3).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    close(ours(x), theirs(x))


def test_sinusoidal_positions_are_the_paper_s():
    table = attention.sinusoidal_positions(50, 8)
    for p, i in ((0, 0), (7, 1), (49, 3)):
        angle = p / 10000 ** (2 * i / 8)
        assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


# --- a real model's arithmetic ------------------------------------------------------------------


def bert(**sizes):
    """A BERT of bert-base-uncased's configuration, with few layers and random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    with torch.no_grad():  # the initial norms and biases would hide that they were mixed up
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def own_encoder(model, dtype=torch.float32):
    config, state = model.config, model.state_dict()
    blocks = []
    for i in range(config.num_hidden_layers):
        blocks.append(
            attention.EncoderBlock(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                eps=config.layer_norm_eps,
            )
        )
        attention.load_bert_layer(blocks[-1], state, i)
    return attention.BertEncoder(config, blocks, state).to(dtype).eval()


def test_the_encoder_is_hugging_face_s_layer_by_layer():
    model = bert(num_hidden_layers=2, vocab_size=1000)  # 768 wide, 12 heads, as the base model
    ids = torch.randint(1, 1000, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    with torch.no_grad():
        ours = own_encoder(model)(ids, mask)
        theirs = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        close(one[mask], other[mask], 1e-5)


def test_too_long_a_text_is_told():
    model = bert(num_hidden_layers=1, vocab_size=10, max_position_embeddings=6)
    with pytest.raises(ValueError, match="7 tokens, but only 6 positions"):
        own_encoder(model)(torch.ones(1, 7, dtype=torch.long), torch.ones(1, 7, dtype=torch.bool))


def test_loading_copies_and_leaves_the_state_dict_alone():
    model = bert(num_hidden_layers=1, vocab_size=10, hidden_size=24, intermediate_size=30)
    encoder = own_encoder(model)
    with torch.no_grad():
        encoder.blocks[0].attention.query.weight.zero_()
    assert model.encoder.layer[0].attention.self.query.weight.abs().sum() > 0


# --- decoding and tiles -------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(1,) * 7, (7,), (3, 1, 2, 1)])
def test_cached_attention_is_the_whole_at_once(pieces):
    layer = randomised(attention.MultiHeadAttention(12, 3))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    cache = attention.KVCache()
    parts = [attention.cached_attention(layer, part, cache) for part in x.split(pieces, dim=1)]
    close(torch.cat(parts, dim=1), layer(x, attention.causal_mask(7)))
    assert len(cache) == 7


@pytest.mark.parametrize("block", [1, 3, 8, 11, 50])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_tiled_attention_is_exact(block, scale):
    torch.manual_seed(0)
    q = (scale * torch.randn(2, 3, 9, 4, dtype=torch.float64)).requires_grad_()
    k, v = (torch.randn(2, 3, 11, d, dtype=torch.float64, requires_grad=True) for d in (4, 5))
    ours = attention.tiled_attention(q, k, v, block)
    theirs = F.scaled_dot_product_attention(q, k, v)
    close(ours, theirs)
    upstream = torch.randn_like(theirs)
    for one, other in zip(
        *(torch.autograd.grad(out, (q, k, v), upstream) for out in (ours, theirs)), strict=True
    ):
        close(one, other)


# --- the figures in the symptoms ----------------------------------------------------------------

# Where the chapter shows the symptom; its stored outputs are compared with fresh ones elsewhere.
SHOWN = {
    "fix_softmax_over_queries": "symptom-queries",
    "fix_mask_after_softmax": "symptom-after",
    "fix_heads_not_transposed_back": "symptom-merge",
    "fix_order_blindness": "symptom-order",
}


@pytest.mark.parametrize("slug", SHOWN)
def test_the_chapter_shows_the_figures_of_the_symptom(slug):
    cells = {cell["id"]: cell for cell in notebooks.read(NOTEBOOK).cells}
    shown = "".join(output.get("text", "") for output in cells[SHOWN[slug]].outputs)
    figures = re.findall(r"-?\d+\.\d+", find(slug).symptom)
    assert len(figures) >= 1
    assert all(figure in shown.split() for figure in figures), (figures, shown)


def test_symptom_of_the_missing_padding_mask():
    exercise = find("fix_missing_padding_mask")
    torch.manual_seed(0)
    parts = nn.Embedding(20, 16), attention.EncoderBlock(16, 2, 32)
    short, long = [3, 7, 5], [4, 1, 9, 2, 8, 6, 10, 12, 11, 15]
    moved = []
    for encode in (exercise.shipped, exercise.reference):
        alone, beside = encode(*parts, [short]), encode(*parts, [short, long])
        moved.append((alone[0] - beside[0]).abs().max().item())
    assert "3 7 5" in exercise.symptom and "0.30" in exercise.symptom
    assert moved[0] == pytest.approx(0.30, abs=0.006) and moved[1] < 1e-6


# --- the catalogue ------------------------------------------------------------------------------

MUSEUM = [f"3.{row}" for row in range(1, 27)] + ["F8", "F9", "F10", "F11", "C1", "C2", "C3", "C7"]


@pytest.mark.parametrize("row", MUSEUM)
def test_each_known_defect_of_attention_is_in_the_catalogue(row):
    source = Path(catalogue.__file__).read_text("utf-8")
    listed = re.findall(r"# museum (.+)", source)
    assert any(row in re.split(r"[ ,;]+", line) for line in listed), f"no mistake is row {row}"
