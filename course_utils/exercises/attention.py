"""Exercises of chapter 3: attention, the Transformer's blocks, and decoding.

`# museum 3.n` beside a misconception is the row of the defects found in published tutorials,
`# museum C1` a wrong sentence of theirs, `# museum §5` an answer that popular checkers accept.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from course_utils.exercises.engine import Exercise, Misconception
from course_utils.reference import attention as reference

# --- what several exercises observe with --------------------------------------------------------


def _linear(*layers: str) -> tuple[str, ...]:
    """The parameter names of linear layers (or norms): weight and bias of each."""
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


def _with_weights(see, module, names: tuple[str, ...]):
    """Observes which parameters `module` has, gives `names` random values; returns it in float64.

    The values are the same in every implementation, whatever it drew when it was made. A parameter
    that is missing or has another shape ends the probe.
    """
    see.fact("what it makes is an nn.Module", isinstance(module, nn.Module))
    found = dict(module.named_parameters(remove_duplicate=False))
    further = {name for name, p in found.items() if not any(p is found.get(n) for n in names)}
    for kind, some in (("missing", set(names) - set(found)), ("further", further)):
        see(f"the list of its {kind} parameters", ", ".join(sorted(some)) or "none")
    frozen = [name for name in names if name in found and not found[name].requires_grad]
    see("the list of its parameters with requires_grad=False", ", ".join(frozen) or "none")
    for name in names:
        p = found.get(name)
        blank = "missing" if p is None else torch.zeros_like(p, requires_grad=p.requires_grad)
        see(f"its parameter {name}", blank)
    matrices = [found[name] for name in names if found[name].ndim > 1]
    if matrices:
        random = all((p != p.flatten()[0]).any() or p.numel() == 1 for p in matrices)
        see.fact("the weights of a new layer differ from one another", random)
    return _filled(see, module, names)


def _filled(see, module, names: tuple[str, ...]):
    """The random values alone, where another probe has observed the parameters already."""
    module.double()
    with torch.no_grad():
        for p in _parameters(module, names).values():
            fan_in = p.shape[-1] if p.ndim > 1 else 4
            p.copy_(1.3 * see.randn(*p.shape) / math.sqrt(fan_in))
    return module


def _parameters(module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The parameters `names` of a module, to ask for their gradients by name."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return {name: found[name] for name in names}


class _Called(TorchFunctionMode):
    """While it is active, keeps the names of the torch functions and methods that are called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def _near(got, exact: torch.Tensor, tolerance: float) -> bool:
    """Whether `got` is a tensor of `exact`'s shape with no value further off than `tolerance`."""
    same = isinstance(got, torch.Tensor) and got.shape == exact.shape
    return same and torch.allclose(got.double(), exact.double(), rtol=0, atol=tolerance)


_SIX_DIGITS = "the output is right to six digits, also where d_k is no square"


# --- scaled_dot_product_attention ---------------------------------------------------------------


def _random_mask(see, *shape: int) -> torch.Tensor:
    """bool, True in about two thirds of the places; key j of query j is always seen."""
    mask = see.rand(*shape) < 0.66
    diagonal = torch.arange(shape[-2]) % shape[-1]
    mask[..., torch.arange(shape[-2]), diagonal] = True
    return mask


def _far_below(see, *sizes, queries, keys, seen):
    """q, k, v with d_k = 4: scores of about −2000 for keys that are `seen`, of 0 for the others."""
    shapes = (*sizes, queries, 4), (*sizes, keys, 4), (*sizes, keys, 3)
    q, k, v = (see.randn(*shape) for shape in shapes)
    q[..., 0], k[..., 0] = 80.0, -50.0 * seen
    return [t.requires_grad_() for t in (q, k, v)]


def _observe_scaled_dot_product_attention(attention, see):
    # d_k is a square but once: √d_k is exact in float32 too, in which many compute it
    def attend(q, k, v, *mask):
        with _Called() as called:
            out = see.call("the output", attention, q, k, v, *mask)
        see.fact(
            "it works attention out itself, without torch's own functions for it",
            not any("attention" in name for name in called.names),
        )
        see.gradients("the output", out, q=q, k=k, v=v)

    def qkv(*sizes, queries, keys, d_k, d_v):
        shapes = (*sizes, queries, d_k), (*sizes, keys, d_k), (*sizes, keys, d_v)
        return [see.randn(*shape, requires_grad=True) for shape in shapes]

    with see.probe("q (2, 5, 4), k (2, 7, 4), no mask, the identity for v: the weights come out"):
        q, k = see.randn(2, 5, 4), see.randn(2, 7, 4)
        weights = attention(q.clone(), k.clone(), torch.eye(7, dtype=q.dtype).repeat(2, 1, 1))
        sums = weights.sum(-1) if _near(weights, q.new_zeros(2, 5, 7), math.inf) else None
        rightly = sums is None or _near(sums, torch.ones_like(sums), 1e-6)
        see.fact("the weights of each query add up to 1", rightly)
        undivided = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        see.fact("the scores are divided by √d_k", not _near(weights, undivided, 1e-9))
    with see.probe("q (2, 5, 4), k (2, 7, 4), v (2, 7, 3), no mask"):
        attend(*qkv(2, queries=5, keys=7, d_k=4, d_v=3))
    with see.probe("as many queries as keys: q, k (2, 6, 4), v (2, 6, 3), no mask"):
        attend(*qkv(2, queries=6, keys=6, d_k=4, d_v=3))
    with see.probe("axes of size 1: q (1, 1, 1, 4), k (1, 1, 3, 4), v (1, 1, 3, 2), no mask"):
        attend(*qkv(1, 1, queries=1, keys=3, d_k=4, d_v=2))
    with see.probe("q (2, 3, 5, 9), k (2, 3, 4, 9), v (2, 3, 4, 6), no mask"):
        attend(*qkv(2, 3, queries=5, keys=4, d_k=9, d_v=6))
    with see.probe("no batch: q (3, 16), k (5, 16), v (5, 2), no mask"):
        attend(*qkv(queries=3, keys=5, d_k=16, d_v=2))
    with see.probe("a mask (query, key) of shape (5, 7) for q (2, 5, 4), k (2, 7, 4)"):
        attend(*qkv(2, queries=5, keys=7, d_k=4, d_v=3), _random_mask(see, 5, 7))
    with see.probe("a mask that hides nothing"):
        attend(*qkv(2, queries=5, keys=7, d_k=4, d_v=3), torch.ones(2, 5, 7, dtype=torch.bool))
    with see.probe("a causal mask of shape (5, 5) for q, k, v (2, 3, 5, 4)"):
        attend(*qkv(2, 3, queries=5, keys=5, d_k=4, d_v=4), reference.causal_mask(5))
    with see.probe("a padding mask of shape (2, 1, 1, 6) for q (2, 3, 5, 4), k (2, 3, 6, 4)"):
        mask = reference.padding_mask(torch.tensor([6, 2]), 6)
        attend(*qkv(2, 3, queries=5, keys=6, d_k=4, d_v=3), mask)
    with see.probe("a padding mask of shape (3, 1, 1, 5) for q, k (3, 2, 5, 4), v (3, 2, 5, 6)"):
        mask = reference.padding_mask(torch.tensor([2, 5, 3]), 5)
        attend(*qkv(3, 2, queries=5, keys=5, d_k=4, d_v=6), mask)
    with see.probe("v (6, 3) for q (2, 1, 4, 9), k (2, 1, 6, 9) and a mask of shape (2, 1, 1, 6)"):
        q, k, _ = qkv(2, 1, queries=4, keys=6, d_k=9, d_v=3)
        v = see.randn(6, 3, requires_grad=True)
        attend(q, k, v, reference.padding_mask(torch.tensor([6, 4]), 6))
    with see.probe("a mask (batch, heads, query, key) of shape (2, 3, 5, 4)"):
        mask = _random_mask(see, 2, 3, 5, 4)
        attend(*qkv(2, 3, queries=5, keys=4, d_k=9, d_v=7), mask)
    with see.probe("scores of about 1000, no mask"):
        q, k, v = qkv(2, queries=5, keys=7, d_k=4, d_v=3)
        sizes = torch.tensor([1.0, 900.0, 30.0, 1.0, 300.0], dtype=torch.float64)
        attend((q * sizes[:, None]).detach().requires_grad_(), k, v)
    with see.probe("scores of about 1000 and a mask of shape (5, 7)"):
        q, k, v = qkv(2, queries=5, keys=7, d_k=4, d_v=3)
        attend((900 * q).detach().requires_grad_(), k, v, _random_mask(see, 5, 7))
    with see.probe("scores of about −2000 in sight, of about 0 hidden, by a mask (2, 1, 1, 6)"):
        mask = reference.padding_mask(torch.tensor([4, 3]), 6)
        attend(*_far_below(see, 2, 3, queries=5, keys=6, seen=mask[..., 0, :]), mask)
    with see.probe("a mask of shape (2, 5, 7) with a query that may look nowhere"):
        mask = _random_mask(see, 2, 5, 7)
        mask[1, 3] = False
        attend(*qkv(2, queries=5, keys=7, d_k=4, d_v=3), mask)
    with see.probe("a padding mask of shape (2, 1, 1, 6) with a sentence without tokens"):
        mask = reference.padding_mask(torch.tensor([0, 4]), 6)
        attend(*qkv(2, 3, queries=5, keys=6, d_k=4, d_v=3), mask)
    with see.probe("q, k, v that are transposed views"):
        q, k, v = (see.randn(2, n, 3, 4).transpose(1, 2) for n in (5, 7, 7))
        see.call("the output", attention, q, k, v, _random_mask(see, 5, 7))
    with see.probe("float16, with a mask of shape (5, 7)"):
        mask = _random_mask(see, 5, 7)
        q, k, v = (see.randn(2, n, 4).half() for n in (5, 7, 7))
        out = attention(q, k, v, mask)
        see("the dtype of the output", out.dtype)
        exact = reference.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
        see.fact("the output is that of float64, within 0.02", _near(out, exact, 0.02))
    with see.probe("q (2, 3, 5), k (2, 6, 5), v (2, 6, 4), a mask of shape (3, 6)"):
        mask = _random_mask(see, 3, 6)
        q, k, v = see.randn(2, 3, 5), see.randn(2, 6, 5), see.randn(2, 6, 4)
        exact = reference.scaled_dot_product_attention(q, k, v, mask)
        see.fact(_SIX_DIGITS, _near(attention(q, k, v, mask), exact, 1e-6))


def _scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def _masked_softmax(scores, mask, dim=-1, zeros=True):
    """Softmax with masked scores −inf; with `zeros`, rows that are masked whole become zeros."""
    if mask is None:
        return scores.softmax(dim=dim)
    scores = scores.masked_fill(~mask, -math.inf)
    if not zeros:
        return scores.softmax(dim=dim)
    blind = ~mask.any(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(dim=dim).masked_fill(blind, 0.0)


def _attention(divisor=lambda q, k, v: math.sqrt(q.shape[-1]), dim=-1, zeros=True):
    """Attention with another divisor, softmax axis or treatment of rows that are masked whole."""

    def attention(q, k, v, mask=None):
        scores = q @ k.transpose(-2, -1) / divisor(q, k, v)
        return _masked_softmax(scores, mask, dim, zeros) @ v

    return attention


_sdpa_undivided = _attention(lambda q, k, v: 1)
_sdpa_by_d_k = _attention(lambda q, k, v: q.shape[-1])
_sdpa_times_root = _attention(lambda q, k, v: q.shape[-1] ** -0.5)
_sdpa_times_d_k = _attention(lambda q, k, v: 1 / q.shape[-1])
_sdpa_over_queries = _attention(dim=-2)


def _sdpa_times_mask(value=None, dim=-1):
    """Hidden scores get a number, None for the smallest there is; hidden weights 0 afterwards."""

    def attention(q, k, v, mask=None):
        scores = _scores(q, k)
        if mask is None:
            return scores.softmax(dim=dim) @ v
        hidden = torch.finfo(scores.dtype).min if value is None else value
        return (scores.masked_fill(~mask, hidden).softmax(dim=dim) * mask) @ v

    return attention


def _sdpa_softmax_without_dim(q, k, v, mask=None):
    dim = 0 if q.ndim == 3 else 1  # what softmax assumes, with a warning
    return _masked_softmax(_scores(q, k), mask, dim) @ v


def _sdpa_flat_softmax(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.flatten(-2).softmax(dim=-1).view_as(scores) @ v


def _sdpa_no_softmax(q, k, v, mask=None):
    scores = _scores(q, k)
    return (scores if mask is None else scores.masked_fill(~mask, 0.0)) @ v


def _sdpa_hardest(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return F.one_hot(scores.argmax(dim=-1), k.shape[-2]).to(v.dtype) @ v


def _sdpa_uniform(q, k, v, mask=None):
    return _masked_softmax(0 * _scores(q, k), mask) @ v


def _sdpa_divided_afterwards(q, k, v, mask=None):
    weights = _masked_softmax(q @ k.transpose(-2, -1), mask)
    return weights / math.sqrt(q.shape[-1]) @ v


def _sdpa_keys_as_values(q, k, v, mask=None):
    return _masked_softmax(_scores(q, k), mask) @ k


def _sdpa_with_weights(q, k, v, mask=None):
    weights = _masked_softmax(_scores(q, k), mask)
    return weights @ v, weights


def _sdpa_weights_alone(q, k, v, mask=None):
    return _masked_softmax(_scores(q, k), mask)


def _sdpa_axes(one, other, zeros=True):
    def attention(q, k, v, mask=None):
        scores = torch.matmul(q, k.transpose(one, other)) / math.sqrt(q.shape[-1])
        return _masked_softmax(scores, mask, zeros=zeros) @ v

    return attention


def _sdpa_all_axes(q, k, v, mask=None):
    return _masked_softmax(q @ k.T / math.sqrt(q.shape[-1]), mask) @ v


def _sdpa_flattened(q, k, v, mask=None):
    q_flat, k_flat, v_flat = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    scores = torch.bmm(q_flat, k_flat.transpose(1, 2)) / math.sqrt(q.shape[-1])
    weights = _masked_softmax(scores.view(*q.shape[:-1], k.shape[-2]), mask)
    out = torch.bmm(weights.reshape(-1, *weights.shape[-2:]), v_flat)
    return out.view(*q.shape[:-1], v.shape[-1])


def _sdpa_squeezed(q, k, v, mask=None):
    return (_masked_softmax(_scores(q, k), mask) @ v).squeeze()


def _sdpa_causal_by_default(zeros):
    def attention(q, k, v, mask=None):
        if mask is None and q.shape[-2] == k.shape[-2]:
            mask = reference.causal_mask(q.shape[-2])
        return _masked_softmax(_scores(q, k), mask, zeros=zeros) @ v

    return attention


def _sdpa_batch_swapped(q, k, v, mask=None):
    scores = torch.einsum("...qd,...kd->...kq", q, k) / math.sqrt(q.shape[-1])
    return _masked_softmax(scores, mask).transpose(-2, -1) @ v


def _sdpa_mask_ignored(q, k, v, mask=None):
    return _scores(q, k).softmax(dim=-1) @ v


def _sdpa_mask_as_condition(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


def _sdpa_mask_required(q, k, v, mask=None):
    return _scores(q, k).masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


def _sdpa_mask_after_softmax(q, k, v, mask=None):
    weights = _scores(q, k).softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ v


def _sdpa_minus_inf_after_softmax(q, k, v, mask=None):
    weights = _scores(q, k).softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    return weights @ v


def _sdpa_renormalised(q, k, v, mask=None):
    weights = _scores(q, k).softmax(dim=-1)
    if mask is not None:
        weights = weights * mask
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights @ v


def _sdpa_renormalised_patched(q, k, v, mask=None):
    weights = _scores(q, k).softmax(dim=-1)
    if mask is not None:
        weights = weights * mask
        weights = (weights / weights.sum(dim=-1, keepdim=True)).nan_to_num()
    return weights @ v


def _sdpa_normalised(q, k, v, mask=None):
    weights = _scores(q, k).softmax(dim=-1)
    if mask is not None:
        weights = F.normalize(weights * mask, p=1, dim=-1)
    return weights @ v


def _sdpa_renormalised_epsilon(q, k, v, mask=None):
    weights = _scores(q, k).softmax(dim=-1)
    if mask is not None:
        weights = weights * mask
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-9)
    return weights @ v


def _sdpa_zeroed_in_place(hide):
    def attention(q, k, v, mask=None):
        scores = _scores(q, k)
        if mask is None:
            return scores.softmax(dim=-1) @ v
        if hide:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        weights.masked_fill_(~mask, 0.0)
        return weights @ v

    return attention


def _sdpa_masked_values(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, 0.0)
    return scores.softmax(dim=-1) @ v


def _sdpa_inverted(zeros):
    def attention(q, k, v, mask=None):
        return _masked_softmax(_scores(q, k), None if mask is None else ~mask, zeros=zeros) @ v

    return attention


def _sdpa_mask_added(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1) @ v


def _sdpa_mask_transposed(q, k, v, mask=None):
    mask = None if mask is None else mask.transpose(-2, -1)
    return _masked_softmax(_scores(q, k), mask) @ v


def _sdpa_filled(value, zeros=False):
    def attention(q, k, v, mask=None):
        scores = _scores(q, k)
        if mask is None:
            return scores.softmax(dim=-1) @ v
        hidden = torch.finfo(scores.dtype).min if value is None else value
        weights = scores.masked_fill(~mask, hidden).softmax(dim=-1)
        if zeros:
            weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
        return weights @ v

    return attention


def _sdpa_minus_1e9_added(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask is not None:
        scores = scores + (~mask).to(scores.dtype) * -1e9
    return scores.softmax(dim=-1) @ v


def _sdpa_zero_times_infinity(cast, patch):
    def attention(q, k, v, mask=None):
        scores = _scores(q, k)
        if mask is not None:
            hidden = (~mask).to(scores.dtype) if cast else ~mask
            scores = scores + hidden * -math.inf
        weights = scores.softmax(dim=-1)
        return (weights.nan_to_num() if patch else weights) @ v

    return attention


def _sdpa_minus_inf(q, k, v, mask=None):
    return _masked_softmax(_scores(q, k), mask, zeros=False) @ v


def _sdpa_nan_patched(q, k, v, mask=None):
    scores = _scores(q, k)
    if mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1).nan_to_num(0.0) @ v


def _sdpa_nan_patched_at_the_end(q, k, v, mask=None):
    return (_masked_softmax(_scores(q, k), mask, zeros=False) @ v).nan_to_num(0.0)


def _sdpa_blind_sees_all(q, k, v, mask=None):
    if mask is not None:
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    return _masked_softmax(_scores(q, k), mask) @ v


def _sdpa_naive(q, k, v, mask=None):
    weights = torch.exp(_scores(q, k))
    if mask is not None:
        weights = weights * mask
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def _sdpa_global_maximum(q, k, v, mask=None):
    scores = _scores(q, k)
    weights = torch.exp(scores - scores.max())
    if mask is not None:
        weights = weights * mask
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def _sdpa_maximum_of_hidden_too(q, k, v, mask=None):
    scores = _scores(q, k)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    if mask is not None:
        weights = weights * mask
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def _sdpa_dropout(q, k, v, mask=None):
    return F.dropout(_masked_softmax(_scores(q, k), mask), 0.1) @ v


def _sdpa_in_float32(q, k, v, mask=None):
    return _masked_softmax(_scores(q, k).float(), mask).to(v.dtype) @ v


def _sdpa_without_gradient(q, k, v, mask=None):
    with torch.no_grad():
        weights = _masked_softmax(_scores(q, k), mask)
    return weights @ v


def _sdpa_in_place(q, k, v, mask=None):
    q /= math.sqrt(q.shape[-1])
    return _masked_softmax(q @ k.transpose(-2, -1), mask) @ v


def _sdpa_library(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, mask)


def _sdpa_einsum(q, k, v, mask=None):
    scores = torch.einsum("...qd,...kd->...qk", q, k) * q.size(-1) ** -0.5
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    mask = mask.expand(scores.shape)
    blind = ~mask.any(-1, keepdim=True)
    weights = torch.where(mask | blind, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("...qk,...kv->...qv", torch.where(blind, 0, weights), v)


def _sdpa_by_exp(q, k, v, mask=None, dropout_p=0.0, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    if mask is not None:
        weights = weights * mask
    total = weights.sum(-1, keepdim=True)
    return F.dropout(weights / total.masked_fill(total == 0, 1), dropout_p) @ v


class _SdpaModule(nn.Module):
    def __init__(self, *, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, q, k, v, mask=None):
        scores = torch.matmul(q / q.shape[-1] ** 0.25, (k / k.shape[-1] ** 0.25).mT)
        bias = torch.zeros_like(scores)
        if mask is not None:
            mask = mask | torch.zeros_like(scores, dtype=torch.bool)
            seen = mask.any(dim=-1, keepdim=True)
            bias = bias.masked_fill(~mask & seen, -math.inf)
            return (F.softmax(scores + bias, dim=-1) * seen) @ v
        return self.dropout(F.softmax(scores + bias, dim=-1)) @ v


def _sdpa_nan_to_num(q, k, v, mask=None):
    if mask is None:
        mask = torch.ones((), dtype=torch.bool)
    scores = _scores(q, k).masked_fill(mask == 0, float("-inf"))
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ v


def _sdpa_query_by_query(q, k, v, mask=None):
    outputs = []
    for i in range(q.shape[-2]):
        scores = (k * q[..., i : i + 1, :]).sum(-1) / math.sqrt(k.shape[-1])  # (..., key)
        if mask is None:
            weights = scores.softmax(-1)
        else:
            row = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])[..., i, :]
            row = row.expand(scores.shape)
            log_weights = scores.masked_fill(~row, -30_000.0).log_softmax(-1)
            weights = log_weights.exp().masked_fill(~row, 0.0)
        outputs.append((weights[..., None] * v).sum(-2))
    return torch.stack(outputs, dim=-2)


_NAN_TOO = (
    " And with a mask, a query that may look nowhere makes your function return NaN: there the "
    "result should be zeros."
)
_NOT_SCALED = (
    "You do not divide the scores by √d_k. Their variance grows with d_k, so that for long "
    "vectors softmax picks one key, and its gradient vanishes."
)
_BY_D_K = (
    "You divide the scores by d_k, in all. Their standard deviation grows with the root of d_k, "
    "so this is too much: the weights become nearly equal."
)
_OVER_QUERIES = (
    "Your softmax runs over the queries. So the weights of each key add up to 1, and those of a "
    "query do not: what one query gets depends on the other queries. A query distributes its "
    "attention over the keys."
)
_A_CONSTANT = (
    "You divide by a constant. It fits one d_k only; take the number of features from the tensors."
)
_ROUNDED = (
    "Your divisor is √d_k where that is a whole number, and something else where it is not: a root "
    "that is rounded, or kept with few digits, does that. √5 is 2.236…"
)
_AXIS_1 = (
    "Your softmax runs over axis 1. That is the keys only where there is no batch; with heads in "
    "front it lets the heads compete for a key. Count axes from the end."
)
_AXIS_2 = (
    "Your softmax runs over axis 2. Those are the keys where the batch is the only axis in front; "
    "with heads they are the queries. Count axes from the end."
)
_OVER_THE_BATCH = (
    "Your softmax runs over axis 0, the batch. So the weights of one sample depend on the others; "
    "each query should distribute its attention over the keys of its own sample."
)
_OTHER_AXES = (
    "You exchange axes {} of the keys. That is right for {} alone; with more axes in front or "
    "fewer, those are others. Count from the end."
)
_NAN_SOMEWHERE = " And where a mask hides all that your softmax runs over, NaN comes out."
_MINUS_100 = (
    "You give the hidden scores a fixed number such as −100. Next to scores of −2000 that is the "
    "largest of the row, and the hidden keys get the weight"
)
_ZERO_TIMES_INFINITY = (
    "You multiply −∞ by the inverted mask and add it. Where the mask lets a key through that is "
    "0 · ∞, which is NaN: choose between values, do not multiply."
)
_RENORMALISED = (
    "You mask after the softmax and divide by what is left. On paper that is the same; in floats, "
    "a hidden key with a far larger score leaves only zeros, "
)
_IN_PLACE = (
    "You set weights to 0 in place, in the tensor that softmax returned. Backward needs that "
    "tensor as it was and refuses: make a new one."
)

SCALED_DOT_PRODUCT_ATTENTION = Exercise(
    slug="scaled_dot_product_attention",
    chapter=3,
    title="Scaled dot-product attention",
    minutes=20,
    difficulty=3,
    reference=reference.scaled_dot_product_attention,
    observe=_observe_scaled_dot_product_attention,
    misconceptions=(
        Misconception(
            "not_scaled",  # museum 3.3, §5
            _sdpa_undivided,
            _NOT_SCALED,
        ),
        Misconception(
            "not_scaled_and_nan",
            _attention(lambda q, k, v: 1, zeros=False),
            _NOT_SCALED + _NAN_TOO,
        ),
        Misconception("divided_by_d_k", _sdpa_by_d_k, _BY_D_K),  # museum 3.4, §5
        Misconception(
            "divided_by_d_k_and_nan",
            _attention(lambda q, k, v: q.shape[-1], zeros=False),
            _BY_D_K + _NAN_TOO,
        ),
        Misconception(
            "multiplied_by_the_root",  # museum 3.4, §5
            _sdpa_times_root,
            "You multiply the scores by √d_k. They should be divided by it: the larger d_k, the "
            "larger they are already.",
        ),
        Misconception(
            "multiplied_by_d_k",  # museum 3.4
            _sdpa_times_d_k,
            "You multiply the scores by d_k. They should become smaller and not larger, and by "
            "the root of d_k.",
        ),
        Misconception(
            "root_of_d_v",  # museum C6
            _attention(lambda q, k, v: math.sqrt(v.shape[-1])),
            "You take the number of features from the values. The scores are sums over the "
            "features of a query and a key, so their number counts; values may have another.",
        ),
        Misconception(
            "root_of_the_number_of_keys",
            _attention(lambda q, k, v: math.sqrt(k.shape[-2])),
            "You divide by the root of the number of keys. A score is a sum over the features of "
            "one query and one key: how many keys there are does not make it larger.",
        ),
        Misconception(
            "root_of_axis_1",
            _attention(lambda q, k, v: math.sqrt(q.shape[1])),
            "You take d_k from axis 1 of the queries. That is their number, or with heads the "
            "number of heads; the features are the last axis, however many come before it.",
        ),
        Misconception(
            "root_rounded",
            _attention(lambda q, k, v: math.isqrt(q.shape[-1])),
            _ROUNDED,
        ),
        Misconception(
            "root_rounded_and_nan",
            _attention(lambda q, k, v: math.isqrt(q.shape[-1]), zeros=False),
            _ROUNDED + _NAN_TOO,
        ),
        Misconception(
            "divided_by_the_root_of_2",
            _attention(lambda q, k, v: math.sqrt(2)),
            _A_CONSTANT,
        ),
        Misconception(
            "divided_by_the_root_of_2_and_nan",
            _attention(lambda q, k, v: math.sqrt(2), zeros=False),
            _A_CONSTANT + _NAN_TOO,
        ),
        Misconception("divided_by_8", _attention(lambda q, k, v: 8), _A_CONSTANT),
        Misconception(
            "divided_by_16",  # museum §5
            _attention(lambda q, k, v: 16),
            _A_CONSTANT,
        ),
        Misconception(
            "divided_after_softmax",
            _sdpa_divided_afterwards,
            "You divide the weights, after the softmax. Then they no longer add up to 1, and the "
            "softmax has already worked on the scores that were too large.",
        ),
        Misconception("softmax_over_queries", _sdpa_over_queries, _OVER_QUERIES),  # museum 3.1, §5
        Misconception(
            "softmax_over_queries_and_nan",  # museum 3.1
            _attention(dim=-2, zeros=False),
            _OVER_QUERIES
            + " And where a mask hides a whole row or column of scores, NaN comes out: a query "
            "that may look nowhere should get zeros.",
        ),
        Misconception(
            "softmax_over_queries_hidden_weights_zero",  # museum 3.1
            _sdpa_times_mask(dim=-2),
            _OVER_QUERIES,
        ),
        Misconception("softmax_over_axis_1", _attention(dim=1), _AXIS_1),  # museum 3.2
        Misconception(
            "softmax_over_axis_1_and_nan",  # museum 3.2
            _attention(dim=1, zeros=False),
            _AXIS_1 + _NAN_SOMEWHERE,
        ),
        Misconception(
            "softmax_over_axis_1_hidden_weights_zero",  # museum 3.2
            _sdpa_times_mask(dim=1),
            _AXIS_1,
        ),
        Misconception("softmax_over_axis_2", _attention(dim=2), _AXIS_2),
        Misconception(
            "softmax_over_axis_2_and_nan",
            _attention(dim=2, zeros=False),
            _AXIS_2 + _NAN_SOMEWHERE,
        ),
        Misconception("softmax_over_the_batch", _attention(dim=0), _OVER_THE_BATCH),  # museum 3.2
        Misconception(
            "softmax_over_the_batch_and_nan",  # museum 3.2
            _attention(dim=0, zeros=False),
            _OVER_THE_BATCH + _NAN_SOMEWHERE,
        ),
        Misconception(
            "softmax_without_dim",  # museum 3.2
            _sdpa_softmax_without_dim,
            "You give softmax no axis. It then guesses one from the number of axes, and it guesses "
            "the batch or the heads. Say which axis holds the keys.",
        ),
        Misconception(
            "softmax_over_everything",  # museum §5
            _sdpa_flat_softmax,
            "Your softmax runs over all queries and keys together, so that only the sum of the "
            "whole table is 1. Each query has a sum of 1 of its own.",
        ),
        Misconception(
            "no_softmax",
            _sdpa_no_softmax,
            "You multiply the scores with the values directly. Without softmax the weights may be "
            "negative and add up to anything: the result is no mean of the values.",
        ),
        Misconception(
            "hardest_attention",  # museum §5
            _sdpa_hardest,
            "You take the value of the best key alone. That is a look-up that no gradient passes "
            "through; attention is its soft form, a mean with weights between 0 and 1.",
        ),
        Misconception(
            "scores_without_effect",  # museum §5, running mean of V
            _sdpa_uniform,
            "All visible keys get the same weight in your result, so it is a plain mean of the "
            "values. The scores must decide how much each key counts.",
        ),
        Misconception(
            "keys_taken_for_values",  # museum §5, C6
            _sdpa_keys_as_values,
            "You average the keys. They only say where to look; what is fetched there are the "
            "values, which may have another number of features.",
        ),
        Misconception(
            "weights_returned_too",
            _sdpa_with_weights,
            "You return the weights beside the output. The function returns the output alone, a "
            "single tensor; to see the weights one hands it the identity as values.",
        ),
        Misconception(
            "weights_alone",
            _sdpa_weights_alone,
            "You return the weights. They are one step short of the result, the mean of the values "
            "with these weights.",
        ),
        Misconception(
            "axes_1_and_2_transposed",
            _sdpa_axes(1, 2),
            _OTHER_AXES.format("1 and 2", "(batch, key, d_k)"),
        ),
        Misconception(
            "axes_1_and_2_transposed_and_nan",
            _sdpa_axes(1, 2, zeros=False),
            _OTHER_AXES.format("1 and 2", "(batch, key, d_k)") + _NAN_TOO,
        ),
        Misconception(
            "axes_2_and_3_transposed",
            _sdpa_axes(2, 3),
            _OTHER_AXES.format("2 and 3", "(batch, heads, key, d_k)"),
        ),
        Misconception(
            "axes_2_and_3_transposed_and_nan",
            _sdpa_axes(2, 3, zeros=False),
            _OTHER_AXES.format("2 and 3", "(batch, heads, key, d_k)") + _NAN_TOO,
        ),
        Misconception(
            "all_axes_reversed",
            _sdpa_all_axes,
            "You transpose the keys with `.T`, which reverses all axes, the batch among them. Only "
            "the last two should trade places, however many come before them.",
        ),
        Misconception(
            "leading_axes_flattened",
            _sdpa_flattened,
            "You flatten the leading axes of each tensor for a product of three-dimensional "
            "ones. Leading axes broadcast, as those of `@` do: the values may come without a "
            "batch, for example, and then the numbers of tables no longer agree.",
        ),
        Misconception(
            "squeezed",
            _sdpa_squeezed,
            "You squeeze the result. That removes every axis of size 1, also a batch of one sample "
            "or a single query; the output has as many axes as the queries.",
        ),
        Misconception(
            "scores_by_key",
            _sdpa_batch_swapped,
            "Your table of scores has the keys as rows, and the queries as the axis that is masked "
            "and normalised. Rows are queries: each of them adds up to 1 over the keys.",
        ),
        Misconception(
            "mask_ignored",
            _sdpa_mask_ignored,
            "You never use the mask. Every query looks everywhere, into the future and at padding.",
        ),
        Misconception(
            "causal_without_a_mask",
            _sdpa_causal_by_default(zeros=True),
            "You hide the future where no mask is given. Without a mask every query sees every "
            "key: who wants a causal one hands it in.",
        ),
        Misconception(
            "causal_without_a_mask_and_nan",
            _sdpa_causal_by_default(zeros=False),
            "You hide the future where no mask is given. Without a mask every query sees every "
            "key: who wants a causal one hands it in." + _NAN_TOO,
        ),
        Misconception(
            "mask_as_a_condition",
            _sdpa_mask_as_condition,
            "You ask `if mask`. A tensor of many values is neither true nor false as a whole; what "
            "you want to know is whether there is a mask.",
        ),
        Misconception(
            "mask_always_expected",
            _sdpa_mask_required,
            "You use the mask without asking whether there is one. It may be None, and then every "
            "query sees every key.",
        ),
        Misconception(
            "mask_after_softmax",  # museum 3.5, §5
            _sdpa_mask_after_softmax,
            "You mask after the softmax. The hidden keys have had their share of the sum by then: "
            "the weights that remain add up to less than 1, and depend on what was hidden.",
        ),
        Misconception(
            "minus_infinity_after_softmax",  # museum 3.5
            _sdpa_minus_inf_after_softmax,
            "You put −∞ among the weights, after the softmax. What turns a score of −∞ into a "
            "weight of 0 is the softmax itself, so the mask has to come before it.",
        ),
        Misconception(
            "masked_then_renormalised",
            _sdpa_renormalised,
            _RENORMALISED + "and 0 / 0 is NaN, as in a row where everything is hidden.",
        ),
        Misconception(
            "masked_then_renormalised_and_patched",
            _sdpa_renormalised_patched,
            _RENORMALISED + "and 0 / 0 is NaN. Replacing the NaN makes zeros of a query that may "
            "look somewhere, and leaves NaN in the gradient.",
        ),
        Misconception(
            "masked_then_normalised",
            _sdpa_normalised,
            _RENORMALISED + "and a sum of zeros cannot be made 1: such a query gets zeros though "
            "it may look somewhere.",
        ),
        Misconception(
            "masked_then_divided_by_a_little_more",
            _sdpa_renormalised_epsilon,
            _RENORMALISED + "and with a small number added below them such a query gets zeros "
            "though it may look somewhere; where little is left, its weights do not reach 1.",
        ),
        Misconception(
            "mask_after_softmax_in_place",  # museum 3.5
            _sdpa_zeroed_in_place(hide=False),
            "You mask after the softmax, when the hidden keys have had their share of the sum, so "
            "that the weights which remain add up to less than 1. And you do it in place, in a "
            "tensor that backward needs as it was.",
        ),
        Misconception("weights_changed_in_place", _sdpa_zeroed_in_place(hide=True), _IN_PLACE),
        Misconception(
            "masked_scores_zero",  # museum 3.6
            _sdpa_masked_values,
            "You set the hidden scores to 0. Softmax turns that into e⁰ = 1 before it normalises, "
            "a weight like any other; which score has a weight of 0?",
        ),
        Misconception(
            "mask_inverted",  # museum 3.7
            _sdpa_inverted(zeros=True),
            "You hide the keys where the mask is True. Here True means: may look.",
        ),
        Misconception(
            "mask_inverted_and_nan",  # museum 3.7
            _sdpa_inverted(zeros=False),
            "You hide the keys where the mask is True. Here True means: may look." + _NAN_TOO,
        ),
        Misconception(
            "mask_added",  # museum 3.8
            _sdpa_mask_added,
            "You add the boolean mask to the scores, where True counts as 1. That favours the "
            "visible keys by a factor e and hides none.",
        ),
        Misconception(
            "mask_transposed",  # museum 3.11, §5
            _sdpa_mask_transposed,
            "You exchange the last two axes of the mask. Its rows are the queries and its columns "
            "the keys, as in the table of scores; transposed, a causal mask shows the future.",
        ),
        Misconception(
            "filled_with_minus_10",  # museum 3.22
            _sdpa_filled(-10.0),
            "You give the hidden scores the value −10. That leaves a weight of e⁻¹⁰ or more: a "
            "little of the hidden keys leaks through, and much where the other scores are low.",
        ),
        Misconception(
            "filled_with_minus_100",  # museum 3.22
            _sdpa_filled(-100.0),
            _MINUS_100 + "; and a query that may look nowhere gets the mean of all it must not "
            "see, where it should get zeros.",
        ),
        Misconception(
            "filled_with_minus_100_zeros_where_all_is_hidden",  # museum 3.22
            _sdpa_filled(-100.0, zeros=True),
            _MINUS_100 + ". Only −∞, or the smallest number of the dtype, is below every score.",
        ),
        Misconception(
            "filled_with_minus_100_hidden_weights_zero",  # museum 3.22
            _sdpa_times_mask(-100.0),
            _MINUS_100 + "; you take it from them afterwards, and the query is left with zeros "
            "though it may look somewhere.",
        ),
        Misconception(
            "filled_with_minus_1e9",  # museum 3.21, 3.22
            _sdpa_filled(-1e9),
            "You give the hidden scores the value −10⁹. A query that may look nowhere then gets "
            "the plain mean of all it must not see, and float16 ends at 65504, so that there the "
            "call fails.",
        ),
        Misconception(
            "filled_with_minus_1e9_in_float16",  # museum 3.22
            _sdpa_filled(-1e9, zeros=True),
            "Your −10⁹ for hidden scores is right in float64 and too large for float16, which ends "
            "at 65504. There is a value that every float type has.",
        ),
        Misconception(
            "minus_1e9_added",  # museum 3.21, 3.22
            _sdpa_minus_1e9_added,
            "You subtract 10⁹ from the hidden scores. Where all keys are hidden this shifts the "
            "whole row, which softmax does not see, so the query looks everywhere; and float16 "
            "cannot hold the number.",
        ),
        Misconception(
            "zero_times_infinity",
            _sdpa_zero_times_infinity(cast=True, patch=False),
            _ZERO_TIMES_INFINITY,
        ),
        Misconception(
            "zero_times_infinity_in_float32",
            _sdpa_zero_times_infinity(cast=False, patch=False),
            _ZERO_TIMES_INFINITY,
        ),
        Misconception(
            "zero_times_infinity_patched",
            _sdpa_zero_times_infinity(cast=True, patch=True),
            _ZERO_TIMES_INFINITY + " Replacing the NaN afterwards leaves nothing but zeros.",
        ),
        Misconception(
            "zero_times_infinity_patched_in_float32",
            _sdpa_zero_times_infinity(cast=False, patch=True),
            _ZERO_TIMES_INFINITY + " Replacing the NaN afterwards leaves nothing but zeros.",
        ),
        Misconception(
            "mean_of_hidden_values",  # museum 3.21
            _sdpa_filled(None),
            "In your answer a query that may look nowhere gets the plain mean of all the values "
            "that are hidden from it. It should get zeros: with every score of its row alike, "
            "softmax shares evenly, so the weights of such a row need attention after the softmax "
            "too.",
        ),
        Misconception(
            "nan_where_all_is_hidden",  # museum 3.21
            _sdpa_minus_inf,
            "A query that may look nowhere has a row of −∞ alone. Softmax subtracts the largest "
            "score, and −∞ − (−∞) is NaN; multiplied by 0 that is NaN as well. Such a query should "
            "get zeros.",
        ),
        Misconception(
            "nan_in_the_gradient",  # museum 3.21
            _sdpa_nan_patched,
            "Your output is right, and the gradient is NaN where a query may look nowhere: you "
            "add −∞ before the softmax and replace the NaN after it, and backward goes through the "
            "softmax in between. Take the row of −∞ away before.",
        ),
        Misconception(
            "nan_in_the_gradient_of_the_values",  # museum 3.21
            _sdpa_nan_patched_at_the_end,
            "Your output is right, and the gradient of the values is NaN where a query may look "
            "nowhere: you replace NaN in the output, and the weights behind it, with which "
            "backward multiplies, are still NaN.",
        ),
        Misconception(
            "nowhere_becomes_everywhere",
            _sdpa_blind_sees_all,
            "A query that may look nowhere looks everywhere in your answer. You avoid the NaN, and "
            "what was hidden is shown; it should get zeros.",
        ),
        Misconception(
            "naive_softmax",  # museum §5, Softmax: no max
            _sdpa_naive,
            "You exponentiate the scores as they are. A score of 710 overflows in float64, and "
            "∞ / ∞ is NaN: subtract the largest score of each row before.",
        ),
        Misconception(
            "largest_of_all_subtracted",
            _sdpa_global_maximum,
            "You subtract the largest score of the whole tensor. In a row whose scores lie far "
            "below it all exponentials become 0, hence 0 / 0 or zeros: each row has a largest "
            "score of its own.",
        ),
        Misconception(
            "maximum_over_hidden_keys",
            _sdpa_maximum_of_hidden_too,
            "A query whose visible scores lie far below the hidden ones gets zeros in your answer. "
            "Hidden scores still take part, in the maximum or in a first softmax, and next to them "
            "what is visible becomes 0 in floats: take them out before.",
        ),
        Misconception(
            "dropout_always_on",  # museum 3.18
            _sdpa_dropout,
            "You drop weights at random. Nobody asked for it here, and F.dropout does it in "
            "evaluation as well unless it is told: the same input gives another output each time.",
        ),
        Misconception(
            "computed_in_float32",
            _sdpa_in_float32,
            "You compute softmax in float32 whatever you are given. For float64 that throws away "
            "half of the digits; work in the dtype of the inputs.",
        ),
        Misconception(
            "weights_without_gradient",
            _sdpa_without_gradient,
            "You compute the weights without a graph. The gradient then reaches the values alone, "
            "and the queries and keys never learn where to look.",
        ),
        Misconception(
            "queries_scaled_in_place",
            _sdpa_in_place,
            "You scale the queries in place. The tensor belongs to the caller, and torch refuses "
            "where it is a leaf that needs a gradient: make a new one.",
        ),
        Misconception(
            "the_librarys_own",
            _sdpa_library,
            "You let torch's own function do the work. That is what one uses afterwards; here you "
            "build it from a matrix product, a softmax and a second product, and the chapter "
            "proves that the two are equal.",
        ),
    ),
    alternatives=(
        _sdpa_einsum,
        _sdpa_by_exp,
        _SdpaModule(),
        _sdpa_nan_to_num,
        _sdpa_query_by_query,
        _attention(lambda q, k, v: torch.tensor(q.shape[-1]).sqrt()),
    ),
    hints=(
        "Three steps: a table of scores (query, key), weights whose rows add up to 1, and the mean "
        "of the values with these weights. Write the shape of each beside it.",
        "The keys are transposed in their last two axes, the softmax runs over the last one. "
        "Hidden scores become −∞ before the softmax. What does softmax make of a row that holds "
        "nothing else?",
        "`blind = ~mask.any(dim=-1, keepdim=True)` says which rows are hidden whole. Give them "
        "harmless scores before the softmax and weights of 0 after it; then no NaN ever arises, "
        "neither forward nor backward.",
    ),
)


# --- causal_mask --------------------------------------------------------------------------------


def _observe_causal_mask(causal_mask, see):
    for n in (5, 2, 7, 1, 129):
        with see.probe(f"n = {n}"):
            see.call("the mask", causal_mask, n)


def _square(n, value=True):
    return torch.full((n, n), value)


def _causal_upper(n):
    return torch.triu(torch.ones(n, n)).bool()


def _causal_strict(n):
    return torch.ones(n, n).tril(-1) == 1


def _causal_one_ahead(n):
    return torch.ones(n, n).tril(1) == 1


def _causal_inverted(n):
    return torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)


def _causal_float(n):
    return torch.tril(torch.ones(n, n))


def _causal_int(n):
    return torch.tril(torch.ones(n, n, dtype=torch.long))


def _causal_bytes(n):
    return torch.tril(torch.ones(n, n, dtype=torch.uint8))


def _causal_additive(n):
    return torch.triu(torch.full((n, n), -math.inf), diagonal=1)


def _causal_batched(n):
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


def _causal_one_batch_axis(n):
    return torch.ones(1, n, n, dtype=torch.bool).tril()


def _causal_none(n):
    return torch.ones(n, n, dtype=torch.bool)


def _causal_diagonal(n):
    return torch.eye(n, dtype=torch.bool)


def _causal_last_two(n):
    return _square(n).tril().triu(-1)


def _causal_first_row(n):
    return torch.arange(n) <= n - 1


def _causal_from_the_end(n):
    return _square(n).tril().flip(1)


def _causal_one_too_many(n):
    return _square(n + 1).tril()


def _causal_strict_but_first(n):
    mask = _square(n).tril(-1)
    mask[0, 0] = True
    return mask


def _causal_list(n):
    return [[j <= i for j in range(n)] for i in range(n)]


def _causal_numpy(n):
    return np.tril(np.ones((n, n), dtype=bool))


def _causal_arange(n):
    position = torch.arange(n)
    return position[None, :] <= position[:, None]


def _causal_loop(n, dtype=torch.bool):
    mask = torch.zeros(n, n, dtype=dtype)
    for i in range(n):
        mask[i, : i + 1] = True
    return mask


def _causal_not_upper(n, device=None):
    return ~torch.triu(torch.ones(n, n, device=device), diagonal=1).bool()


def _causal_from_infinities(n):
    return nn.Transformer.generate_square_subsequent_mask(n) == 0


CAUSAL_MASK = Exercise(
    slug="causal_mask",
    chapter=3,
    title="Hide the future",
    minutes=5,
    difficulty=1,
    reference=reference.causal_mask,
    observe=_observe_causal_mask,
    misconceptions=(
        Misconception(
            "transposed",  # museum §5, transposed mask
            _causal_upper,
            "Your mask is the transpose: each query sees itself and the future, and no past. Row i "
            "is a query; which columns come before it?",
        ),
        Misconception(
            "itself_hidden",  # museum 3.9, §5
            _causal_strict,
            "You hide each position from itself. The first one then sees nothing at all, and its "
            "softmax has nothing to normalise. The present belongs to what may be seen.",
        ),
        Misconception(
            "itself_hidden_but_for_the_first",
            _causal_strict_but_first,
            "You hide each position from itself, the first one excepted. A token may always look "
            "at itself: what it must not see comes after it.",
        ),
        Misconception(
            "one_step_ahead",  # museum 3.10
            _causal_one_ahead,
            "You let each position see the next one. That is the very token it should predict: the "
            "training loss falls below what is possible, and nothing is learned.",
        ),
        Misconception(
            "inverted",  # museum 3.7
            _causal_inverted,
            "Your True means: hidden. Here, as in scaled_dot_product_attention, True means: may "
            "look. (nn.MultiheadAttention has it the other way round.)",
        ),
        Misconception(
            "float_instead_of_bool",  # museum 3.8
            _causal_float,
            "Your ones and zeros are floats. Torch takes a float mask for something to add to the "
            "scores, and then 0 and 1 hide nothing; return booleans.",
        ),
        Misconception(
            "integers_instead_of_bool",
            _causal_int,
            "Your ones and zeros are integers. `~` turns 1 into −2 and 0 into −1, both of which "
            "count as true; return booleans.",
        ),
        Misconception(
            "bytes_instead_of_bool",
            _causal_bytes,
            "Your ones and zeros are uint8, as masks were before torch had booleans. `~` turns "
            "them into 254 and 255, both of which count as true; return booleans.",
        ),
        Misconception(
            "minus_infinity_instead_of_bool",
            _causal_additive,
            "You return 0 and −∞, a mask to be added to scores. That is the other kind; the one of "
            "this chapter is boolean, True where a query may look.",
        ),
        Misconception(
            "axes_for_batch_and_heads",
            _causal_batched,
            "You add axes for batch and heads. The mask is the same for all of them and "
            "broadcasts by itself: (n, n) is enough.",
        ),
        Misconception(
            "an_axis_for_the_batch",
            _causal_one_batch_axis,
            "You add an axis of size 1 in front. Against scores (batch, heads, n, n) it would "
            "stand for the heads; the mask broadcasts without it, so (n, n) is enough.",
        ),
        Misconception(
            "nothing_hidden",  # museum C43
            _causal_none,
            "Your mask hides nothing. A model that sees the token which it should predict copies "
            "it: its loss becomes small, and it has learned to predict nothing.",
        ),
        Misconception(
            "only_itself",
            _causal_diagonal,
            "Each position sees itself alone. The whole past is allowed too, or attention has "
            "nothing to attend to.",
        ),
        Misconception(
            "itself_and_one_before",
            _causal_last_two,
            "Each position sees itself and its neighbour on the left. The whole past is allowed, "
            "however far back.",
        ),
        Misconception(
            "a_single_row",
            _causal_first_row,
            "You return one row of n. What may be seen differs from query to query: n queries by n "
            "keys.",
        ),
        Misconception(
            "mirrored",
            _causal_from_the_end,
            "Your triangle leans the other way: the first query sees the last key. Columns are "
            "positions in the same order as rows.",
        ),
        Misconception(
            "one_position_too_many",
            _causal_one_too_many,
            "Your mask has n + 1 rows and columns. There are n positions, from 0 to n − 1.",
        ),
        Misconception(
            "lists_instead_of_a_tensor",
            _causal_list,
            "Your values are right, and stand in lists. Torch cannot mask with lists; make it a "
            "tensor of booleans.",
        ),
        Misconception(
            "numpy_instead_of_a_tensor",
            _causal_numpy,
            "Your values are right, and stand in a NumPy array. `masked_fill` wants a tensor of "
            "torch.",
        ),
    ),
    alternatives=(_causal_arange, _causal_loop, _causal_not_upper, _causal_from_infinities),
    hints=(
        "Write down the table for n = 3: a row for each query, a column for each key. Where may "
        "query 0 look, and where query 2?",
        "It is a triangle with its diagonal. Which half holds the keys that are not later than "
        "the query?",
        "`torch.tril` keeps the lower triangle, diagonal included; start from a square of True.",
    ),
)


# --- padding_mask -------------------------------------------------------------------------------


def _observe_padding_mask(padding_mask, see):
    cases = ([3, 5, 1, 4], 5), ([2, 0, 4], 6), ([4, 4], 4), ([1, 2, 2, 1, 2, 2], 3), ([2], 5)
    for lengths, n in (*cases, ([1, 0], 1)):
        with see.probe(f"lengths {lengths}, n = {n}"):
            see.call("the mask", padding_mask, torch.tensor(lengths), n)


def _before(lengths, n):
    """(batch, n), True for the first lengths[b] positions of row b."""
    return torch.arange(n) < lengths[:, None]


def _padding_two_axes(lengths, n):
    return _before(lengths, n)


def _padding_one_axis_in_between(lengths, n):
    return _before(lengths, n).unsqueeze(1)


def _padding_queries(lengths, n):
    return _before(lengths, n)[:, None, :, None]


def _padding_as_heads(lengths, n):
    return _before(lengths, n)[:, :, None, None]


def _padding_batch_as_query(lengths, n):
    return _before(lengths, n)[None, None]


def _padding_both(lengths, n):
    seen = _before(lengths, n)
    return (seen[:, :, None] & seen[:, None, :])[:, None]


def _padding_expanded(lengths, n):
    return _before(lengths, n)[:, None, None, :].expand(-1, 1, n, n)


def _padding_inverted(lengths, n):
    return ~_before(lengths, n)[:, None, None, :]


def _padding_inclusive(lengths, n):
    return (torch.arange(n) <= lengths[:, None])[:, None, None, :]


def _padding_one_short(lengths, n):
    return (torch.arange(n) < lengths[:, None] - 1)[:, None, None, :]


def _padding_from_1(lengths, n):
    return (torch.arange(1, n + 1) < lengths[:, None])[:, None, None, :]


def _padding_left(lengths, n):
    return (torch.arange(n) >= n - lengths[:, None])[:, None, None, :]


def _padding_longest(lengths, n):
    return _before(lengths, int(lengths.max()))[:, None, None, :]


def _padding_float(lengths, n):
    return _before(lengths, n)[:, None, None, :].float()


def _padding_int(lengths, n):
    return _before(lengths, n)[:, None, None, :].long()


def _padding_additive(lengths, n):
    blank = torch.zeros(len(lengths), 1, 1, n)
    return blank.masked_fill(~_before(lengths, n)[:, None, None, :], -math.inf)


def _padding_first(lengths, n):
    return _before(lengths[:1].expand(len(lengths)), n)[:, None, None, :]


def _padding_of_the_longest(lengths, n):
    return _before(lengths.max().expand(len(lengths)), n)[:, None, None, :]


def _padding_exactly(lengths, n):
    return (torch.arange(n) == lengths[:, None])[:, None, None, :]


def _padding_last_token(lengths, n):
    return (torch.arange(n) == lengths[:, None] - 1)[:, None, None, :]


def _padding_no_broadcast(lengths, n):
    return (torch.arange(n) < lengths)[:, None, None, :]


def _padding_other_way(lengths, n):
    return (torch.arange(n)[:, None] < lengths)[None, None]


def _padding_all(lengths, n):
    return torch.ones(len(lengths), 1, 1, n, dtype=torch.bool)


def _padding_causal(lengths, n):
    return _before(lengths, n)[:, None, None, :] & reference.causal_mask(n)


def _padding_negative_slice(lengths, n):
    mask = torch.ones(len(lengths), 1, 1, n, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        mask[row, ..., -(n - length) :] = False
    return mask


def _padding_squeezed(lengths, n):
    return _before(lengths, n).squeeze()[:, None, None]


def _padding_never_empty(lengths, n):
    return _before(lengths.clamp(min=1), n)[:, None, None, :]


def _padding_loop(lengths, n):
    mask = torch.zeros(len(lengths), n, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    return mask[:, None, None, :]


def _padding_stacked(lengths, n, device=None):
    rows = [[position < length for position in range(n)] for length in lengths.tolist()]
    return torch.tensor(rows, device=device).view(-1, 1, 1, n)


def _padding_cumulative(lengths, n):
    ends = F.one_hot(lengths, n + 1)[:, :n]  # (batch, n): 1 at the first padding
    return (ends.cumsum(dim=1) == 0).reshape(lengths.shape[0], 1, 1, n)


def _padding_triangle(lengths, n):
    return torch.ones(n + 1, n).tril(-1).bool()[lengths].unsqueeze(1).unsqueeze(1)


PADDING_MASK = Exercise(
    slug="padding_mask",
    chapter=3,
    title="Hide the padding",
    minutes=8,
    difficulty=2,
    reference=reference.padding_mask,
    observe=_observe_padding_mask,
    misconceptions=(
        Misconception(
            "batch_and_key_alone",  # museum 3.20
            _padding_two_axes,
            "Your mask has the shape (batch, n). Scores are (batch, heads, query, key), and axes "
            "are matched from the end: your batch would be taken for the queries, with an error if "
            "you are lucky, and silently where batch and n are equal.",
        ),
        Misconception(
            "one_axis_in_between",
            _padding_one_axis_in_between,
            "Your mask has the shape (batch, 1, n). Against scores (batch, heads, query, key) the "
            "batch would be taken for the heads: two axes belong in between.",
        ),
        Misconception(
            "queries_hidden",  # museum 3.11
            _padding_queries,
            "You put the positions on the axis of the queries. That silences the padding and lets "
            "every token look at it; it is the keys that must be hidden.",
        ),
        Misconception(
            "positions_on_the_axis_of_heads",
            _padding_as_heads,
            "You put the positions on the second axis, which belongs to the heads. Keys are the "
            "last one.",
        ),
        Misconception(
            "batch_on_the_axis_of_queries",  # museum 3.20
            _padding_batch_as_query,
            "You add both axes in front, so that the batch stands where the queries belong. It "
            "comes first; the two axes of size 1 stand between batch and keys.",
        ),
        Misconception(
            "queries_hidden_too",
            _padding_both,
            "You hide the padding as query as well as key. What padding sees does not matter, and "
            "its queries may now look nowhere, each a row of zeros; the keys are enough.",
        ),
        Misconception(
            "expanded_to_a_square",
            _padding_expanded,
            "You repeat the same row for every query. It is right in effect and n times as large "
            "as needed: an axis of size 1 broadcasts.",
        ),
        Misconception(
            "inverted",  # museum 3.7
            _padding_inverted,
            "Your True marks the padding. Here True means: may look. (`key_padding_mask` of "
            "nn.MultiheadAttention has it the other way round.)",
        ),
        Misconception(
            "one_too_many",
            _padding_inclusive,
            "You show one position too many: positions count from 0, so a sentence of 3 tokens "
            "ends at position 2.",
        ),
        Misconception(
            "one_too_few",
            _padding_one_short,
            "You hide the last token of each sentence: of 3 tokens, positions 0, 1 and 2 are to be "
            "seen.",
        ),
        Misconception(
            "left_padding",
            _padding_left,
            "You show the last tokens of each row, as if the padding came first. Here the tokens "
            "come first and the padding behind them.",
        ),
        Misconception(
            "as_wide_as_the_longest",
            _padding_longest,
            "Your mask is as wide as the longest sentence. The tensor may be padded further than "
            "that: n says how far.",
        ),
        Misconception(
            "float_instead_of_bool",  # museum 3.8
            _padding_float,
            "Your ones and zeros are floats. Torch takes a float mask for something to add to the "
            "scores, and then 0 and 1 hide nothing; return booleans.",
        ),
        Misconception(
            "integers_instead_of_bool",
            _padding_int,
            "Your ones and zeros are integers. `~` turns 1 into −2 and 0 into −1, both of which "
            "count as true; return booleans.",
        ),
        Misconception(
            "minus_infinity_instead_of_bool",
            _padding_additive,
            "You return 0 and −∞, a mask to be added to scores. That is the other kind; the one of "
            "this chapter is boolean, True where a query may look.",
        ),
        Misconception(
            "length_of_the_first_for_all",
            _padding_first,
            "Every row of your mask has the length of the first sentence. Each has its own.",
        ),
        Misconception(
            "length_of_the_longest_for_all",
            _padding_of_the_longest,
            "Every row of your mask has the length of the longest sentence. Each has its own.",
        ),
        Misconception(
            "one_position_alone",
            _padding_exactly,
            "You compare for equality, which marks a single position, the one behind the last "
            "token. All positions before it are to be seen.",
        ),
        Misconception(
            "last_token_alone",
            _padding_last_token,
            "You mark the last token of each sentence alone. All tokens up to it are to be seen.",
        ),
        Misconception(
            "no_axis_for_the_positions",
            _padding_no_broadcast,
            "You compare n positions with the lengths one by one, which fits only where the batch "
            "happens to have n rows. Each length is to be compared with all positions: give one "
            "of the two an axis more.",
        ),
        Misconception(
            "positions_by_batch",
            _padding_other_way,
            "Your table has the positions as rows and the sentences as columns. The batch is the "
            "first axis and the positions, the keys, are the last.",
        ),
        Misconception(
            "nothing_hidden",
            _padding_all,
            "Your mask hides nothing, whatever the lengths. Then a sentence's vectors depend on "
            "how far it was padded.",
        ),
        Misconception(
            "causal_too",
            _padding_causal,
            "You hide the future as well. That is the work of the other mask; where both are "
            "wanted, they are combined with `&`.",
        ),
        Misconception(
            "nothing_left_of_full_rows",
            _padding_negative_slice,
            "Your rows are right where there is padding, and empty where there is none. A slice "
            "that counts from the end does that: with 0 positions to count, −0 is 0, the "
            "beginning. Count from the front.",
        ),
        Misconception(
            "squeezed",
            _padding_squeezed,
            "You squeeze the table. That removes every axis of size 1, also a batch of one "
            "sentence or a length of one token; name the axes that you want to add or remove.",
        ),
        Misconception(
            "never_empty",
            _padding_never_empty,
            "You show one position of an empty sentence. A length of 0 means that nothing is "
            "there; scaled_dot_product_attention gives zeros in that case.",
        ),
    ),
    alternatives=(_padding_loop, _padding_stacked, _padding_cumulative, _padding_triangle),
    hints=(
        "For one sentence of length 3 and n = 5 the row is True, True, True, False, False: which "
        "comparison gives that, out of the positions 0 … 4?",
        "Compare all lengths with all positions at once: one of them as a column, the other as a "
        "row. Then think of the axes of the scores, (batch, heads, query, key).",
        "`torch.arange(n) < lengths[:, None]` is (batch, n). Indexing with None adds an axis of "
        "size 1 in the place where it stands.",
    ),
)


# --- fix_softmax_over_queries -------------------------------------------------------------------


class SelfAttention(nn.Module):
    """One head of self-attention: x (batch, n, d_model), mask (n, n) → (batch, n, d_head)."""

    def __init__(self, d_model, d_head):
        super().__init__()
        self.query = nn.Linear(d_model, d_head, bias=False)
        self.key = nn.Linear(d_model, d_head, bias=False)
        self.value = nn.Linear(d_model, d_head, bias=False)

    def forward(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5  # (batch, query, key)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = torch.softmax(scores, dim=1)
        return weights @ v


_ONE_HEAD = ("query.weight", "key.weight", "value.weight")


def _observe_self_attention(SelfAttention, see):
    for d_model, d_head, batch, n, masked in (
        (6, 4, 2, 5, False),
        (6, 4, 2, 5, True),
        (8, 9, 4, 3, False),
        (10, 16, 3, 7, True),
        (8, 9, 1, 4, True),
    ):
        given = f"x ({batch}, {n}, {d_model}), {f'mask ({n}, {n})' if masked else 'no mask'}"
        with see.probe(f"SelfAttention({d_model}, {d_head}), {given}"):
            module = _with_weights(see, SelfAttention(d_model, d_head), _ONE_HEAD)
            x = see.randn(batch, n, d_model, requires_grad=True)
            mask = (_random_mask(see, n, n),) if masked else ()
            if not masked:
                shipped = _sdpa_over_queries(module.query(x), module.key(x), module.value(x))
                unlike = not _near(module(x.detach().clone()), shipped, 1e-9)
                see.fact("the softmax no longer runs over the queries", unlike)
            out = see.call("the output", module, x, *mask)
            see.gradients("the output", out, x=x, **_parameters(module, _ONE_HEAD))
    with see.probe("in evaluation mode, with a causal mask"):
        module = _with_weights(see, SelfAttention(6, 4), _ONE_HEAD).eval()
        see.call("the output", module, see.randn(3, 5, 6), mask=reference.causal_mask(5))
    with see.probe("SelfAttention(7, 5), x (2, 4, 7), no mask"):
        module, x = _with_weights(see, SelfAttention(7, 5), _ONE_HEAD), see.randn(2, 4, 7)
        parts = module.query(x), module.key(x), module.value(x)
        exact = reference.scaled_dot_product_attention(*parts)
        see.fact(_SIX_DIGITS, _near(module(x), exact, 1e-6))


class _OneHead(reference.SelfAttention):
    """One head, of which a subclass computes the weights or the output in its own way."""

    def scores(self, q, k):
        return q @ k.transpose(1, 2) / q.shape[-1] ** 0.5

    def weights(self, scores, mask):
        return torch.softmax(self.masked(scores, mask), dim=2)

    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(~mask, -math.inf)

    def forward(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.weights(self.scores(q, k), mask) @ v


class _OneHeadOverQueries(_OneHead):
    def weights(self, scores, mask):
        return self.masked(scores, mask).softmax(dim=-2)


class _OneHeadOverQueriesMaskTransposed(_OneHead):
    def weights(self, scores, mask):
        return self.masked(scores, None if mask is None else mask.T).softmax(dim=1)


class _OneHeadMendedWithMask(_OneHead):
    def weights(self, scores, mask):
        return torch.softmax(self.masked(scores, mask), dim=1 if mask is None else 2)


class _OneHeadMendedWithoutMask(_OneHead):
    def weights(self, scores, mask):
        return torch.softmax(self.masked(scores, mask), dim=2 if mask is None else 1)


class _OneHeadSqueezed(_OneHead):
    def forward(self, x, mask=None):
        return super().forward(x, mask).squeeze(0)


class _OneHeadRounded(_OneHead):
    def scores(self, q, k):
        return q @ k.transpose(1, 2) / math.isqrt(q.shape[-1])


class _OneHeadOverBatch(_OneHead):
    def weights(self, scores, mask):
        return torch.softmax(self.masked(scores, mask), dim=0)


class _OneHeadFlat(_OneHead):
    def weights(self, scores, mask):
        return self.masked(scores, mask).flatten(1).softmax(dim=1).view_as(scores)


class _OneHeadWholeTensor(_OneHead):
    def weights(self, scores, mask):
        return self.masked(scores, mask).flatten().softmax(dim=0).view_as(scores)


class _OneHeadWeightsTransposed(_OneHead):
    def weights(self, scores, mask):
        return torch.softmax(self.masked(scores, mask), dim=1).transpose(1, 2)


class _OneHeadScoresTransposed(_OneHead):
    def scores(self, q, k):
        return k @ q.transpose(1, 2) / q.shape[-1] ** 0.5


class _OneHeadRescaled(_OneHead):
    def weights(self, scores, mask):
        weights = torch.softmax(self.masked(scores, mask), dim=1)
        return weights / weights.sum(dim=2, keepdim=True)


class _OneHeadTwice(_OneHead):
    def weights(self, scores, mask):
        return torch.softmax(torch.softmax(self.masked(scores, mask), dim=1), dim=2)


class _OneHeadOtherOrder(_OneHead):
    def weights(self, scores, mask):
        return torch.softmax(torch.softmax(self.masked(scores, mask), dim=2), dim=1)


class _OneHeadOverFeatures(_OneHead):
    def forward(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = self.masked(self.scores(q, k), mask).nan_to_num(neginf=0.0)
        return torch.softmax(scores @ v, dim=2)


class _OneHeadNoSoftmax(_OneHead):
    def weights(self, scores, mask):
        return scores if mask is None else scores.masked_fill(~mask, 0.0)


class _OneHeadNoMask(_OneHead):
    def masked(self, scores, mask):
        return scores


class _OneHeadMaskAfter(_OneHead):
    def weights(self, scores, mask):
        weights = torch.softmax(scores, dim=2)
        return weights if mask is None else weights.masked_fill(~mask, 0.0)


class _OneHeadMaskInverted(_OneHead):
    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(mask, -math.inf)


class _OneHeadMaskTransposed(_OneHead):
    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(~mask.T, -math.inf)


class _OneHeadUndivided(_OneHead):
    def scores(self, q, k):
        return q @ k.transpose(1, 2)


class _OneHeadTimesRoot(_OneHead):
    def scores(self, q, k):
        return q @ k.transpose(1, 2) * q.shape[-1] ** 0.5


class _OneHeadDividedByNumber(_OneHead):
    def scores(self, q, k):
        return q @ k.transpose(1, 2) / q.shape[1] ** 0.5


class _OneHeadKeysAveraged(_OneHead):
    def forward(self, x, mask=None):
        q, k = self.query(x), self.key(x)
        return self.weights(self.scores(q, k), mask) @ k


class _OneHeadEinsum(nn.Module):
    def __init__(self, d_model, d_head, dropout=0.0):
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Linear(d_model, d_head, bias=False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        scores = torch.einsum("bid,bjd->bij", self.query(x), self.key(x))
        scores = scores / math.sqrt(self.query.out_features)
        if mask is not None:
            scores = torch.where(mask, scores, -torch.inf)
        return torch.einsum("bij,bjd->bid", self.dropout(scores.softmax(2)), self.value(x))


class _OneHeadByKeys(_OneHead):
    def forward(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = k @ q.mT / math.sqrt(q.size(2))  # (batch, key, query)
        if mask is not None:
            scores = scores.masked_fill(~mask.T, -1e9)
        return F.softmax(scores, dim=1).transpose(1, 2) @ v


class _OneHeadLibrary(_OneHead):
    def forward(self, x, mask=None):
        parts = self.query(x), self.key(x), self.value(x)
        return F.scaled_dot_product_attention(*parts, attn_mask=mask)


class _OneHeadOwn(_OneHead):
    def forward(self, x, mask=None):
        parts = self.query(x), self.key(x), self.value(x)
        return reference.scaled_dot_product_attention(*parts, mask)


FIX_SOFTMAX_OVER_QUERIES = Exercise(
    slug="fix_softmax_over_queries",
    chapter=3,
    title="Find the bug: a token that knows what comes later",
    minutes=10,
    difficulty=2,
    reference=reference.SelfAttention,
    observe=_observe_self_attention,
    shipped=SelfAttention,
    symptom="Under a causal mask no token may see a later one. When the last word of the cat saw "
    "its dog becomes cat, the outputs of earlier words change all the same: that of saw by 0.128, "
    "that of its by 0.195.",
    misconceptions=(
        Misconception(
            "still_over_queries",  # museum 3.1, §5
            _OneHeadOverQueries,
            "The softmax still runs over the queries: the weights of each key add up to 1. Scores "
            "are (batch, query, key), and each query distributes its attention over the keys.",
        ),
        Misconception(
            "still_over_queries_mask_transposed",  # museum 3.1
            _OneHeadOverQueriesMaskTransposed,
            "The softmax still runs over the queries, and the mask is now transposed. The mask was "
            "right in the cell: rows are queries. What has to change is the axis that adds up to "
            "1.",
        ),
        Misconception(
            "mended_with_a_mask_alone",
            _OneHeadMendedWithMask,
            "With a mask your softmax runs over the keys; without one it still runs over the "
            "queries. The axis has nothing to do with the mask.",
        ),
        Misconception(
            "mended_without_a_mask_alone",
            _OneHeadMendedWithoutMask,
            "Without a mask your softmax runs over the keys; with one it still runs over the "
            "queries. The axis has nothing to do with the mask.",
        ),
        Misconception(
            "over_the_batch",  # museum 3.2
            _OneHeadOverBatch,
            "The softmax now runs over the batch, as it also does where it is given no axis for "
            "three. So a sample's weights depend on the other samples; the keys are another axis.",
        ),
        Misconception(
            "over_queries_and_keys",
            _OneHeadFlat,
            "The softmax now runs over queries and keys together, so that a whole table adds up to "
            "1. Each query, each row of the table, has a sum of 1 of its own.",
        ),
        Misconception(
            "over_the_whole_tensor",
            _OneHeadWholeTensor,
            "The softmax now runs over the whole tensor, samples included. Each query, each row "
            "of each sample's table, has a sum of 1 of its own.",
        ),
        Misconception(
            "weights_transposed",
            _OneHeadWeightsTransposed,
            "You transpose the weights after the softmax. Their rows add up to 1 now, and each "
            "holds what its token is asked as a key, not where it looks as a query; the mask is "
            "transposed with them.",
        ),
        Misconception(
            "scores_transposed",
            _OneHeadScoresTransposed,
            "The result is as if queries and keys had changed places in the scores: each row "
            "belongs to a key and is normalised and used like a query's, while the rows of the "
            "mask still are queries.",
        ),
        Misconception(
            "rows_rescaled",
            _OneHeadRescaled,
            "You divide each row by its sum after the softmax over the queries. The rows add up "
            "to 1 now, and each weight still carries the sum of its column, in which the other "
            "queries stand.",
        ),
        Misconception(
            "a_second_softmax",
            _OneHeadTwice,
            "You added a second softmax. The rows add up to 1 now, but out of numbers between 0 "
            "and 1, nearly equal, and what the mask hid has a weight again: e⁰ is 1.",
        ),
        Misconception(
            "softmax_in_front",
            _OneHeadOtherOrder,
            "You put a softmax over the keys before the one over the queries. The last one decides "
            "what adds up to 1, and it still is the column.",
        ),
        Misconception(
            "over_the_features_of_the_output",
            _OneHeadOverFeatures,
            "Your softmax normalises the features of the output. What should add up to 1 are the "
            "weights, before they meet the values.",
        ),
        Misconception(
            "no_softmax",
            _OneHeadNoSoftmax,
            "You took the softmax away. The scores themselves may be negative and add up to "
            "anything; they need a softmax, along the right axis.",
        ),
        Misconception(
            "mask_lost",
            _OneHeadNoMask,
            "The softmax is right, and the mask is no longer applied: every token sees all others.",
        ),
        Misconception(
            "mask_after_softmax",  # museum 3.5
            _OneHeadMaskAfter,
            "The softmax is right, and the mask now comes after it. Then hidden keys have had "
            "their share of the sum, and the weights that remain add up to less than 1.",
        ),
        Misconception(
            "mask_inverted",  # museum 3.7
            _OneHeadMaskInverted,
            "The softmax is right, and the mask is now inverted: True means that a query may look. "
            "It was applied rightly in the cell.",
        ),
        Misconception(
            "mask_transposed",  # museum §5
            _OneHeadMaskTransposed,
            "The softmax is right, and the mask is now transposed: its rows are queries, as those "
            "of the scores. It was applied rightly in the cell.",
        ),
        Misconception(
            "not_scaled",  # museum 3.3
            _OneHeadUndivided,
            "The softmax is right, and the division by √d_head is lost. It was right in the cell.",
        ),
        Misconception(
            "multiplied_by_the_root",  # museum 3.4
            _OneHeadTimesRoot,
            "The softmax is right, and the scores are now multiplied by √d_head. The division in "
            "the cell was right.",
        ),
        Misconception(
            "root_rounded",
            _OneHeadRounded,
            "The softmax is right, and you changed the divisor: it is √d_head only where that is a "
            "whole number, as a rounded root is. The division in the cell was right.",
        ),
        Misconception(
            "squeezed",
            _OneHeadSqueezed,
            "The softmax is right, and you squeeze the result: a batch of one sample loses its "
            "first axis. The output is (batch, n, d_head), whatever the batch.",
        ),
        Misconception(
            "divided_by_the_number_of_tokens",
            _OneHeadDividedByNumber,
            "The softmax is right, and you changed the scale: axis 1 of the queries is the number "
            "of tokens. The division in the cell was right; a score sums over features.",
        ),
        Misconception(
            "keys_averaged",  # museum §5
            _OneHeadKeysAveraged,
            "The softmax is right, and the weights now average the keys. What is fetched are the "
            "values.",
        ),
    ),
    alternatives=(_OneHeadEinsum, _OneHeadByKeys, _OneHeadLibrary, _OneHeadOwn),
    hints=(
        "Under a causal mask the first token may look at itself alone. Which weight must it give "
        "itself, and which does it give itself here?",
        "The weights with which one query averages the values should add up to 1. Sum the table "
        "of weights along each of its axes and see which sums are 1.",
        "The scores are (batch, query, key), so axis 1 counts queries. A query distributes its "
        "attention over the keys.",
    ),
)


# --- fix_mask_after_softmax ---------------------------------------------------------------------


def causal_attention(q, k, v):
    """Attention in which no position looks ahead; q, k, v (batch, heads, n, d_head)."""
    n, d_head = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(d_head)  # (batch, heads, query, key)
    visible = torch.ones(n, n, device=q.device).tril()
    weights = F.softmax(scores, dim=-1)
    weights = weights.masked_fill(visible == 0, 0.0)
    return weights @ v


def _observe_causal_attention(causal_attention, see):
    for shape in ((2, 3, 5, 4), (3, 2, 4, 9), (1, 4, 7, 16)):
        with see.probe(f"q, k, v of shape {shape}"):
            q, k, v = (see.randn(*shape, requires_grad=True) for _ in range(3))
            out = see.call("the output", causal_attention, q, k, v)
            see.gradients("the output", out, q=q, k=k, v=v)
    with see.probe("scores of about 1000, q, k, v of shape (2, 3, 5, 4)"):
        q, k, v = (see.randn(2, 3, 5, 4) for _ in range(3))
        see.call("the output", causal_attention, 900 * q, k, v)
    with see.probe("scores of about −2000 for the first 4 of 6 keys, of about 0 for the others"):
        q, k, v = _far_below(see, 2, 3, queries=6, keys=6, seen=torch.arange(6) < 4)
        out = see.call("the output", causal_attention, q, k, v)
        see.gradients("the output", out, q=q, k=k, v=v)
    with see.probe("q, k, v that are transposed views"):
        q, k, v = (see.randn(2, 6, 3, 4).transpose(1, 2) for _ in range(3))
        see.call("the output", causal_attention, q, k, v)
    with see.probe("q, k, v of shape (2, 3, 4, 5)"):
        q, k, v = (see.randn(2, 3, 4, 5) for _ in range(3))
        exact = reference.causal_attention(q, k, v)
        see.fact(_SIX_DIGITS, _near(causal_attention(q, k, v), exact, 1e-6))


def _visible(q):
    return torch.ones(q.shape[-2], q.shape[-2], device=q.device).tril()


def _ca_afterwards(q, k, v):
    return _scores(q, k).softmax(dim=-1) * _visible(q) @ v


def _ca_minus_inf_afterwards(q, k, v):
    weights = _scores(q, k).softmax(dim=-1)
    return weights.masked_fill(_visible(q) == 0, -math.inf) @ v


def _ca_renormalised(q, k, v):
    weights = _scores(q, k).softmax(dim=-1).masked_fill(_visible(q) == 0, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def _ca_normalised(q, k, v):
    weights = _scores(q, k).softmax(dim=-1).masked_fill(_visible(q) == 0, 0.0)
    return F.normalize(weights, p=1, dim=-1) @ v


def _ca_renormalised_epsilon(q, k, v):
    weights = _scores(q, k).softmax(dim=-1).masked_fill(_visible(q) == 0, 0.0)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-9) @ v


def _ca_naive(q, k, v):
    weights = torch.exp(_scores(q, k)) * _visible(q)
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def _ca_in_place(q, k, v):
    weights = _scores(q, k).softmax(dim=-1)
    weights.masked_fill_(_visible(q) == 0, 0.0)
    return weights @ v


def _ca_softmax_again(q, k, v):
    weights = _scores(q, k).softmax(dim=-1).masked_fill(_visible(q) == 0, 0.0)
    return weights.softmax(dim=-1) @ v


def _ca_minus_100(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, -100.0).softmax(dim=-1) @ v


def _ca_minus_1000(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, -1000.0).softmax(dim=-1) @ v


def _ca_rounded(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.isqrt(q.shape[-1])
    return scores.masked_fill(_visible(q) == 0, -math.inf).softmax(dim=-1) @ v


def _ca_softmax_twice(q, k, v):
    weights = _scores(q, k).softmax(dim=-1).masked_fill(_visible(q) == 0, -math.inf)
    return weights.softmax(dim=-1) @ v


def _ca_zero_scores(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, 0.0).softmax(dim=-1) @ v


def _ca_zero_scores_and_weights(q, k, v):
    visible = _visible(q)
    return (_scores(q, k) * visible).softmax(dim=-1) * visible @ v


def _ca_minus_10(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, -10.0).softmax(dim=-1) @ v


def _ca_minus_1(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, -1.0).softmax(dim=-1) @ v


def _ca_added(q, k, v):
    return (_scores(q, k) + _visible(q)).softmax(dim=-1) @ v


def _ca_inverted(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 1, -math.inf).softmax(dim=-1) @ v


def _ca_transposed(q, k, v):
    return _scores(q, k).masked_fill(_visible(q).T == 0, -math.inf).softmax(dim=-1) @ v


def _ca_strict(q, k, v):
    visible = torch.ones(q.shape[-2], q.shape[-2]).tril(-1)
    return _scores(q, k).masked_fill(visible == 0, -math.inf).softmax(dim=-1) @ v


def _ca_one_ahead(q, k, v):
    visible = torch.ones(q.shape[-2], q.shape[-2]).tril(1)
    return _scores(q, k).masked_fill(visible == 0, -math.inf).softmax(dim=-1) @ v


def _ca_no_mask(q, k, v):
    return _scores(q, k).softmax(dim=-1) @ v


def _ca_not_scaled(q, k, v):
    scores = q @ k.transpose(-2, -1)
    return scores.masked_fill(_visible(q) == 0, -math.inf).softmax(dim=-1) @ v


def _ca_times_root(q, k, v):
    scores = q @ k.transpose(-2, -1) * math.sqrt(q.shape[-1])
    return scores.masked_fill(_visible(q) == 0, -math.inf).softmax(dim=-1) @ v


def _ca_running_mean(q, k, v):
    visible = _visible(q).to(v.dtype)
    return visible / visible.sum(dim=-1, keepdim=True) @ v


def _ca_over_queries(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, -math.inf).softmax(dim=-2) @ v


def _ca_no_softmax(q, k, v):
    return _scores(q, k).masked_fill(_visible(q) == 0, 0.0) @ v


def _ca_minus_inf_multiplied(q, k, v):
    hidden = (1 - _visible(q)) * -math.inf
    return (_scores(q, k) + hidden).softmax(dim=-1) @ v


def _ca_library(q, k, v, dropout_p=0.0):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


def _ca_added_bias(q, k, v):
    n = q.shape[-2]
    bias = torch.full((n, n), -math.inf, dtype=q.dtype).triu(1)
    return ((q @ k.mT) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def _ca_row_by_row(q, k, v):
    rows = []
    for i in range(q.shape[2]):
        scores = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, : i + 1])
        weights = (scores / math.sqrt(q.shape[3])).softmax(dim=2)
        rows.append(torch.einsum("bhj,bhjd->bhd", weights, v[:, :, : i + 1]))
    return torch.stack(rows, dim=2)


def _ca_before_and_after(q, k, v):
    visible = _visible(q)
    scores = _scores(q, k).masked_fill(visible == 0, -1e9)
    return scores.softmax(dim=-1).masked_fill(visible == 0, 0.0) @ v


def _ca_own(q, k, v):
    return reference.scaled_dot_product_attention(q, k, v, reference.causal_mask(q.shape[-2]))


FIX_MASK_AFTER_SOFTMAX = Exercise(
    slug="fix_mask_after_softmax",
    chapter=3,
    title="Find the bug: hidden keys that still count",
    minutes=8,
    difficulty=2,
    reference=reference.causal_attention,
    observe=_observe_causal_attention,
    shipped=causal_attention,
    symptom="The weights of each query should add up to 1. Under this causal mask those of the "
    "first five words add up to 0.114, 0.247, 0.557, 0.576 and 1.000.",
    misconceptions=(
        Misconception(
            "still_after_softmax",  # museum 3.5, §5
            _ca_afterwards,
            "The mask still comes after the softmax. By then the future has had its share of the "
            "sum, so that the weights of the past add up to less than 1 and depend on what comes "
            "later.",
        ),
        Misconception(
            "minus_infinity_after_softmax",  # museum 3.5
            _ca_minus_inf_afterwards,
            "You changed the number and left it in its place. −∞ is for scores: it is the softmax "
            "that turns it into 0. Among the weights it makes the output infinite.",
        ),
        Misconception(
            "renormalised_afterwards",
            _ca_renormalised,
            "You divide the remaining weights by their sum. On paper that is right; where a hidden "
            "score is larger by some hundreds, all weights of the past have become 0 in floats, "
            "and 0 / 0 is NaN. Hide the scores before they compete.",
        ),
        Misconception(
            "normalised_afterwards",
            _ca_normalised,
            "You normalise the remaining weights. On paper that is right; where a hidden score is "
            "larger by some hundreds, all weights of the past have become 0 in floats, and zeros "
            "cannot be made to add up to 1. Hide the scores before they compete.",
        ),
        Misconception(
            "renormalised_with_a_little_more",
            _ca_renormalised_epsilon,
            "You divide the remaining weights by their sum and a small number more. Where a hidden "
            "score is much larger, next to nothing remains, and the small number decides: the row "
            "does not reach 1. Hide the scores before they compete.",
        ),
        Misconception(
            "naive_softmax",  # museum §5, Softmax: no max
            _ca_naive,
            "You exponentiate the scores yourself, as they are. The mask is right that way, and a "
            "score of 710 overflows in float64, 89 in float32: F.softmax, as in the cell, "
            "subtracts the largest score before.",
        ),
        Misconception(
            "still_after_softmax_in_place",  # museum 3.5
            _ca_in_place,
            "The mask still comes after the softmax, when the future has had its share of the sum. "
            "And it now changes in place what softmax returned, which backward needs as it was.",
        ),
        Misconception(
            "softmax_again",
            _ca_softmax_again,
            "You apply softmax again to the masked weights. What the mask set to 0 gets e⁰ = 1 "
            "that way, about as much as the rest: hidden keys are back. One softmax, behind the "
            "mask, is enough.",
        ),
        Misconception(
            "a_second_softmax",
            _ca_softmax_twice,
            "You apply softmax twice, before the mask and after it. The second one works on "
            "numbers between 0 and 1, so its weights are nearly equal; one softmax behind the mask "
            "is enough.",
        ),
        Misconception(
            "masked_scores_zero",  # museum 3.6
            _ca_zero_scores,
            "The mask is in its place now, and the hidden scores become 0. Softmax makes e⁰ = 1 of "
            "that, a weight like any other: which score has a weight of 0?",
        ),
        Misconception(
            "scores_and_weights_zero",  # museum 3.5, 3.6
            _ca_zero_scores_and_weights,
            "You set hidden scores to 0 before the softmax and hidden weights to 0 after it. In "
            "between each hidden key takes e⁰ = 1 of the sum, so the rest adds up to less than 1.",
        ),
        Misconception(
            "filled_with_minus_10",  # museum 3.22
            _ca_minus_10,
            "The mask is in its place now, and −10 is too close: hidden keys keep a weight of "
            "e⁻¹⁰, or a large one where the other scores are low.",
        ),
        Misconception(
            "filled_with_minus_100",  # museum 3.22
            _ca_minus_100,
            "The mask is in its place now, and the number for the hidden scores is one that others "
            "may have. Where those of the past are lower still, the hidden keys get the weight: "
            "which score is below every other?",
        ),
        Misconception(
            "filled_with_minus_1000",  # museum 3.22
            _ca_minus_1000,
            "The mask is in its place now, and the number for the hidden scores is one that others "
            "may have, if seldom. Where those of the past are lower still, the hidden keys get the "
            "weight: which score is below every other?",
        ),
        Misconception(
            "filled_with_minus_1",
            _ca_minus_1,
            "The mask is in its place now, and −1 is a score like any other: hidden keys keep a "
            "weight of e⁻¹. Only one score gives a weight of exactly 0.",
        ),
        Misconception(
            "mask_added",  # museum 3.8
            _ca_added,
            "You add the mask's ones and zeros to the scores. That favours the visible keys by a "
            "factor e and hides none.",
        ),
        Misconception(
            "inverted",  # museum 3.7
            _ca_inverted,
            "The mask is in its place now, and inverted: you hide the past and the present. The "
            "last token, which may see everything, has nothing left, and that is NaN.",
        ),
        Misconception(
            "transposed",  # museum §5, transposed mask
            _ca_transposed,
            "The mask is in its place now, and transposed: each token sees itself and the future. "
            "It was the lower triangle in the cell, and that was right.",
        ),
        Misconception(
            "itself_hidden",  # museum 3.9, §5
            _ca_strict,
            "The mask is in its place now, and hides each token from itself as well. The first one "
            "sees nothing then, which gives NaN. The triangle in the cell was right.",
        ),
        Misconception(
            "one_step_ahead",  # museum 3.10
            _ca_one_ahead,
            "The mask is in its place now, and shows each token the next one, which it is meant to "
            "predict. The triangle in the cell was right.",
        ),
        Misconception(
            "mask_lost",
            _ca_no_mask,
            "The mask has no effect any more: every token sees the whole future. It should act on "
            "the scores.",
        ),
        Misconception(
            "not_scaled",  # museum 3.3, §5
            _ca_not_scaled,
            "The mask is right now, and the division by √d_head is lost. It was right in the cell.",
        ),
        Misconception(
            "root_rounded",
            _ca_rounded,
            "The mask is right now, and you changed the divisor: it is √d_head only where that is "
            "a whole number, as a rounded root is. The division in the cell was right.",
        ),
        Misconception(
            "multiplied_by_the_root",  # museum §5
            _ca_times_root,
            "The mask is right now, and the scores are multiplied by √d_head. The division in the "
            "cell was right.",
        ),
        Misconception(
            "running_mean",  # museum §5
            _ca_running_mean,
            "Your output is the plain mean of the values so far. Nothing leaks from the future, "
            "and the queries and keys decide nothing.",
        ),
        Misconception(
            "softmax_over_queries",  # museum 3.1
            _ca_over_queries,
            "The mask is in its place now, and the softmax runs over the queries. It ran over the "
            "keys in the cell, and that was right.",
        ),
        Misconception(
            "no_softmax",
            _ca_no_softmax,
            "The softmax is gone: you average with the scores themselves, which may be negative "
            "and add up to anything. It belongs behind the mask.",
        ),
        Misconception(
            "zero_times_infinity",
            _ca_minus_inf_multiplied,
            "You multiply −∞ by 0 for the visible keys, which is NaN. Choose between two values "
            "instead of multiplying.",
        ),
    ),
    alternatives=(_ca_library, _ca_added_bias, _ca_row_by_row, _ca_before_and_after, _ca_own),
    hints=(
        "The first token sees itself alone, so its output should be its own value vector. What "
        "does it get here, and why does that change when a later token changes?",
        "Add up the weights of each row. Where has the missing part gone?",
        "Softmax divides by the sum over all keys. What is hidden must be out before that sum is "
        "taken: with a score whose exponential is 0.",
    ),
)


# --- split_heads --------------------------------------------------------------------------------


def _see_what_is_raised(see, function, *args):
    """Observes the name of the exception that a call raises, or what it returns instead."""
    text = ""
    try:
        result = function(*args)
        shape = f" of shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else ""
        raised = f"nothing: a {type(result).__name__}{shape} comes back"
    except Exception as error:
        raised = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        text = str(error)
    see("what is raised", raised)
    says_it = len(text) >= 10 and any(character.isalpha() for character in text)
    see.fact("the ValueError says what does not fit", raised != "ValueError" or says_it)


def _observe_split_heads(split_heads, see):
    sizes = (2, 5, 12, 3), (3, 4, 10, 5), (4, 3, 7, 1), (2, 3, 6, 6), (1, 1, 8, 4)
    for batch, n, d_model, num_heads in sizes:
        with see.probe(f"x of shape ({batch}, {n}, {d_model}), num_heads = {num_heads}"):
            x = see.randn(batch, n, d_model, requires_grad=True)
            out = see.call("the result", split_heads, x, num_heads)
            see.gradients("the result", out, x=x)
    with see.probe("x that is a transposed view of shape (2, 6, 8), num_heads = 4"):
        see.call("the result", split_heads, see.randn(2, 8, 6).transpose(1, 2), 4)
    with see.probe("float32, x of shape (2, 3, 8), num_heads = 4"):
        see.call("the result", split_heads, see.randn(2, 3, 8, dtype=torch.float32), 4)
    with see.probe("x of shape (2, 4, 10), num_heads = 4"):
        _see_what_is_raised(see, split_heads, see.randn(2, 4, 10), 4)
    with see.probe("x of shape (2, 8, 3), num_heads = 4"):
        _see_what_is_raised(see, split_heads, see.randn(2, 8, 3), 4)


def _d_head(x, num_heads):
    """The features of one head; ValueError where they do not come out even."""
    if x.shape[-1] % num_heads:
        raise ValueError("d_model must be divisible by num_heads")
    return x.shape[-1] // num_heads


def _split_by_view(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, num_heads, n, _d_head(x, num_heads))


def _split_by_view_unchecked(x, num_heads):
    batch, n, d_model = x.shape
    return x.reshape(batch, num_heads, n, d_model // num_heads)


def _split_interleaved(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, n, _d_head(x, num_heads), num_heads).permute(0, 3, 1, 2)


def _split_interleaved_unchecked(x, num_heads):
    batch, n, d_model = x.shape
    return x.reshape(batch, n, d_model // num_heads, num_heads).permute(0, 3, 1, 2)


def _split_not_transposed(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, n, num_heads, _d_head(x, num_heads))


def _split_not_transposed_unchecked(x, num_heads):
    batch, n, d_model = x.shape
    return x.view(batch, n, num_heads, d_model // num_heads)


def _split_into_the_batch(x, num_heads):
    batch, n, _ = x.shape
    heads = x.reshape(batch, n, num_heads, _d_head(x, num_heads)).transpose(1, 2)
    return heads.reshape(batch * num_heads, n, -1)


def _split_heads_first(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, n, num_heads, _d_head(x, num_heads)).permute(2, 0, 1, 3)


def _split_last_axes(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, n, num_heads, _d_head(x, num_heads)).transpose(2, 3)


def _split_keys_transposed(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, n, num_heads, _d_head(x, num_heads)).permute(0, 2, 3, 1)


def _split_num_heads_as_size(x, num_heads):
    batch, n, _ = x.shape
    return x.reshape(batch, n, _d_head(x, num_heads), num_heads).transpose(1, 2)


def _split_transposed_then_viewed(x, num_heads):
    batch, n, _ = x.shape
    return x.transpose(1, 2).reshape(batch, num_heads, n, _d_head(x, num_heads))


def _split_tuple(x, num_heads):
    _d_head(x, num_heads)
    return x.chunk(num_heads, dim=-1)


def _split_copies(x, num_heads):
    _d_head(x, num_heads)
    return x[:, None].expand(-1, num_heads, -1, -1)


def _split_sequence(x, num_heads):
    _d_head(x, num_heads)
    return torch.stack(x.chunk(num_heads, dim=1), dim=1)


def _split_unchecked(x, num_heads):
    batch, n, d_model = x.shape
    return x.view(batch, n, num_heads, d_model // num_heads).transpose(1, 2)


def _split_unchecked_length_free(x, num_heads):
    batch, n, d_model = x.shape
    return x.reshape(batch, -1, num_heads, d_model // num_heads).transpose(1, 2)


def _split_remainder_dropped(x, num_heads):
    d_head = x.shape[-1] // num_heads
    parts = [x[:, :, h * d_head : (h + 1) * d_head] for h in range(num_heads)]
    return torch.stack(parts, dim=1)


def _split_assert(x, num_heads):
    batch, n, d_model = x.shape
    assert d_model % num_heads == 0, "d_model must be divisible by num_heads"
    return x.view(batch, n, num_heads, d_model // num_heads).transpose(1, 2)


def _split_true_division(x, num_heads):
    batch, n, d_model = x.shape
    if d_model % num_heads:
        raise ValueError("d_model must be divisible by num_heads")
    return x.view(batch, n, num_heads, d_model / num_heads).transpose(1, 2)


def _split_detached(x, num_heads):
    return reference.split_heads(x.detach(), num_heads)


def _split_wordless_error(x, num_heads):
    if x.shape[-1] % num_heads:
        raise ValueError(x.shape[-1], num_heads)
    return reference.split_heads(x, num_heads)


def _split_in_float32(x, num_heads):
    return reference.split_heads(x, num_heads).float()


def _split_in_float64(x, num_heads):
    return reference.split_heads(x, num_heads).double()


def _split_reversed(x, num_heads):
    return reference.split_heads(x, num_heads).flip(1)


def _split_stacked(x, num_heads):
    if x.size(-1) % num_heads != 0:
        raise ValueError(f"{num_heads} heads do not fit")
    return torch.stack(x.chunk(num_heads, dim=-1), dim=1)


def _split_permuted(x, num_heads):
    d_head, rest = divmod(x.shape[2], num_heads)
    if rest:
        raise ValueError(f"{rest} features left over")
    return x.unflatten(-1, (num_heads, d_head)).permute(0, 2, 1, 3).contiguous()


def _split_features_first(x, num_heads, d_head=None):
    d_head = d_head or _d_head(x, num_heads)
    return x.mT.reshape(x.shape[0], num_heads, d_head, x.shape[1]).transpose(-1, -2)


_SPLIT_BY_VIEW = (
    "You cut the numbers into heads in the order in which they lie in memory. So a head gets all "
    "features of a few tokens instead of a few features of all tokens: the shape is right, and the "
    "tokens are mixed. First split the feature axis, then exchange axes."
)
_SPLIT_INTERLEAVED = (
    "You give head h every num_heads-th feature. A model trained that way would be as good; the "
    "weights of others have the features of a head side by side, so head h should get features "
    "h·d_head to (h + 1)·d_head − 1."
)
_SPLIT_NOT_TRANSPOSED = (
    "You split the features and leave the heads behind the tokens. A matrix product works on the "
    "last two axes, which should be tokens and features, so the heads have to move in front of "
    "the tokens."
)
_NO_VALUE_ERROR = " And where the features do not come out even, ValueError should be raised."

SPLIT_HEADS = Exercise(
    slug="split_heads",
    chapter=3,
    title="Split the features among heads",
    minutes=10,
    difficulty=2,
    reference=reference.split_heads,
    observe=_observe_split_heads,
    misconceptions=(
        Misconception("viewed_without_transposing", _split_by_view, _SPLIT_BY_VIEW),  # museum 3.12
        Misconception(
            "viewed_without_transposing_unchecked",  # museum 3.12, C2
            _split_by_view_unchecked,
            _SPLIT_BY_VIEW + _NO_VALUE_ERROR,
        ),
        Misconception("interleaved", _split_interleaved, _SPLIT_INTERLEAVED),  # museum 3.15, §4
        Misconception(
            "interleaved_unchecked",  # museum 3.15, §4
            _split_interleaved_unchecked,
            _SPLIT_INTERLEAVED + _NO_VALUE_ERROR,
        ),
        Misconception("heads_behind_tokens", _split_not_transposed, _SPLIT_NOT_TRANSPOSED),
        Misconception(
            "heads_behind_tokens_unchecked",
            _split_not_transposed_unchecked,
            _SPLIT_NOT_TRANSPOSED + _NO_VALUE_ERROR,
        ),
        Misconception(
            "heads_in_the_batch",
            _split_into_the_batch,
            "You merge the heads into the batch axis. Some libraries do; here they have an axis of "
            "their own, so that masks (batch, heads, query, key) broadcast.",
        ),
        Misconception(
            "heads_first",
            _split_heads_first,
            "You put the heads in front of the batch. The batch stays the first axis, the heads "
            "are the second.",
        ),
        Misconception(
            "features_and_heads_exchanged",
            _split_last_axes,
            "You exchange the last two axes, heads and features. The heads have to trade places "
            "with the tokens.",
        ),
        Misconception(
            "features_before_tokens",
            _split_keys_transposed,
            "Your last two axes are (features, tokens), as if the keys were transposed already. "
            "Attention does that itself; return (tokens, features).",
        ),
        Misconception(
            "num_heads_taken_for_d_head",
            _split_num_heads_as_size,
            "You make heads of num_heads features each. num_heads is how many heads there are; the "
            "features of one are d_model / num_heads.",
        ),
        Misconception(
            "transposed_before_splitting",
            _split_transposed_then_viewed,
            "You exchange tokens and features first and then cut into heads of (n, d_head). The "
            "numbers now lie feature by feature, so what is cut does not belong to one token. "
            "Split the feature axis while it is whole.",
        ),
        Misconception(
            "a_tuple_of_heads",
            _split_tuple,
            "You return a tuple of heads, each with the right features. One tensor with an axis "
            "for the heads lets a single matrix product serve all of them.",
        ),
        Misconception(
            "all_features_for_every_head",
            _split_copies,
            "Every head gets all the features. They are divided among the heads: d_model / "
            "num_heads for each.",
        ),
        Misconception(
            "the_sequence_is_split",  # museum C2
            _split_sequence,
            "You cut the sequence into pieces, one for each head. Every head sees all tokens; what "
            "is divided are the features.",
        ),
        Misconception(
            "no_value_error",
            _split_unchecked,
            "Your heads are right. Where d_model is not a multiple of num_heads a RuntimeError "
            "comes out: left to itself, torch complains about a shape that the caller has never "
            "seen. Raise ValueError with a sentence.",
        ),
        Misconception(
            "no_value_error_and_another_length",
            _split_unchecked_length_free,
            "Your heads are right. Where d_model is not a multiple of num_heads, the −1 in your "
            "shape may take the features that are left over for more tokens, without a word: raise "
            "ValueError with a sentence.",
        ),
        Misconception(
            "features_left_over",
            _split_remainder_dropped,
            "Where d_model is not a multiple of num_heads you silently leave features out. Raise "
            "ValueError instead.",
        ),
        Misconception(
            "assert_for_an_error",
            _split_assert,
            "You check with `assert`, which raises AssertionError and vanishes under `python -O`. "
            "What a caller did wrong is told by ValueError.",
        ),
        Misconception(
            "divided_into_a_float",
            _split_true_division,
            "You divide with `/`, which gives a float also where it comes out even. Sizes are "
            "whole numbers: divide with `//`.",
        ),
        Misconception(
            "a_value_error_without_words",
            _split_wordless_error,
            "You raise ValueError, and its message says too little. Who reads it wants to know "
            "what does not fit: tell in a sentence how many features there were and how many "
            "heads.",
        ),
        Misconception(
            "cut_from_the_graph",
            _split_detached,
            "Your values are right and no gradient passes through them: you cut the tensor off "
            "from the graph, or make a new one out of numbers. Rearrange the one you are given.",
        ),
        Misconception(
            "in_float32",
            _split_in_float32,
            "You convert the numbers to float32. They are only to be moved: what comes in as "
            "float64 goes out as float64.",
        ),
        Misconception(
            "in_float64",
            _split_in_float64,
            "You convert the numbers to float64. They are only to be moved: what comes in as "
            "float32 goes out as float32.",
        ),
        Misconception(
            "heads_in_reverse",
            _split_reversed,
            "Your heads come in reverse order. Head 0 gets the first features.",
        ),
    ),
    alternatives=(_split_stacked, _split_permuted, _split_features_first),
    hints=(
        "Only the last axis is split: (batch, n, d_model) → (batch, n, num_heads, d_head). Then "
        "which two axes trade places?",
        "Try it on `torch.arange(12).view(1, 2, 6)` with 3 heads: head 0 should hold 0, 1 of the "
        "first token and 6, 7 of the second.",
        "`view` to four axes, `transpose(1, 2)`; before both, a ValueError if "
        "d_model % num_heads is not 0.",
    ),
)


# --- merge_heads --------------------------------------------------------------------------------


def _observe_merge_heads(merge_heads, see):
    for shape in ((2, 3, 5, 4), (4, 5, 3, 2), (3, 1, 2, 6), (2, 6, 3, 1), (1, 4, 1, 3)):
        with see.probe(f"x of shape {shape}"):
            x = see.randn(*shape, requires_grad=True)
            out = see.call("the result", merge_heads, x)
            see.gradients("the result", out, x=x)
    with see.probe("what split_heads makes of (2, 5, 12) and 3 heads"):
        x = reference.split_heads(see.randn(2, 5, 12), 3)
        see.call("the result", merge_heads, x)
    with see.probe("float32, x of shape (2, 3, 4, 5)"):
        see.call("the result", merge_heads, see.randn(2, 3, 4, 5, dtype=torch.float32))


def _merge_not_transposed(x):
    batch, num_heads, n, d_head = x.shape
    return x.reshape(batch, n, num_heads * d_head)


def _merge_view_not_transposed(x):
    batch, num_heads, n, d_head = x.shape
    return x.view(batch, n, num_heads * d_head)


def _merge_view(x):
    batch, num_heads, n, d_head = x.shape
    return x.transpose(1, 2).view(batch, n, num_heads * d_head)


def _merge_interleaved(x):
    return x.permute(0, 2, 3, 1).flatten(2)


def _merge_other_axes(x):
    batch, num_heads, n, d_head = x.shape
    return x.transpose(2, 3).reshape(batch, n, num_heads * d_head)


def _merge_first_axes(x):
    batch, num_heads, n, d_head = x.shape
    return x.transpose(0, 1).reshape(batch, n, num_heads * d_head)


def _merge_ends(x):
    batch, num_heads, n, d_head = x.shape
    return x.transpose(1, 3).reshape(batch, n, num_heads * d_head)


def _merge_mean(x):
    return x.mean(dim=1)


def _merge_sum(x):
    return x.sum(dim=1)


def _merge_mean_repeated(x):
    return x.mean(dim=1).repeat(1, 1, x.shape[1])


def _merge_along_the_sequence(x):
    return torch.cat(x.unbind(dim=1), dim=1)


def _merge_four_axes(x):
    return x.transpose(1, 2)


def _merge_one_head(x):
    return x[:, 0]


def _merge_whole(x):
    batch, num_heads, n, d_head = x.shape
    return x.transpose(1, 2).reshape(batch, num_heads * n, d_head)


def _merge_tokens_gone(x):
    return x.transpose(1, 2).flatten(1)


def _merge_batch_looped(x):
    return torch.cat(tuple(x), dim=-1)


def _merge_reversed(x):
    return torch.cat(x.unbind(dim=1)[::-1], dim=-1)


def _merge_detached(x):
    batch, num_heads, n, d_head = x.shape
    return torch.tensor(x.transpose(1, 2).tolist(), dtype=x.dtype).view(batch, n, -1)


def _merge_cat(x):
    return torch.cat(x.unbind(dim=1), dim=-1)


def _merge_contiguous(x, num_heads=None):
    batch, num_heads, n, d_head = x.size()
    return x.permute(0, 2, 1, 3).contiguous().view(batch, n, -1)


def _merge_flatten(x):
    return x.swapaxes(1, 2).flatten(start_dim=2)


def _merge_in_place(x):
    batch, num_heads, n, d_head = x.shape
    merged = x.new_empty(batch, n, num_heads * d_head)
    for h in range(num_heads):
        merged[..., h * d_head : (h + 1) * d_head] = x[:, h]
    return merged


MERGE_HEADS = Exercise(
    slug="merge_heads",
    chapter=3,
    title="Put the heads side by side again",
    minutes=5,
    difficulty=2,
    reference=reference.merge_heads,
    observe=_observe_merge_heads,
    misconceptions=(
        Misconception(
            "not_transposed_back",  # museum 3.13, §5
            _merge_not_transposed,
            "You reshape with the heads still in front of the tokens. The shape is right, and a "
            "row then holds pieces of several tokens of one head instead of all heads of one "
            "token.",
        ),
        Misconception(
            "viewed_and_not_transposed_back",  # museum 3.13
            _merge_view_not_transposed,
            "You view with the heads still in front of the tokens, so that a row holds pieces of "
            "several tokens; and `view` refuses altogether what split_heads returns, whose numbers "
            "lie in another order.",
        ),
        Misconception(
            "view_after_transpose",
            _merge_view,
            "You transpose and then call `view`. After a transpose the numbers of a row no longer "
            "lie side by side, so that view fails; something has to copy them.",
        ),
        Misconception(
            "interleaved",  # museum 3.15
            _merge_interleaved,
            "You let the features of the heads alternate. They should stand head after head, as "
            "split_heads took them.",
        ),
        Misconception(
            "other_axes_transposed",
            _merge_other_axes,
            "You exchange the last two axes, tokens and features. What has to trade places are "
            "heads and tokens, as in split_heads.",
        ),
        Misconception(
            "batch_and_heads_transposed",
            _merge_first_axes,
            "You exchange batch and heads, so that samples are mixed. What has to trade places are "
            "heads and tokens.",
        ),
        Misconception(
            "heads_and_features_transposed",
            _merge_ends,
            "You exchange heads and features. What has to trade places are heads and tokens.",
        ),
        Misconception(
            "averaged",  # museum 3.17
            _merge_mean,
            "You average the heads. They have found different things, which a mean throws "
            "together; put them side by side.",
        ),
        Misconception(
            "summed",  # museum F8, C1
            _merge_sum,
            "You add the heads up. They have found different things, which a sum throws together; "
            "put them side by side.",
        ),
        Misconception(
            "averaged_and_repeated",  # museum 3.17
            _merge_mean_repeated,
            "You average the heads and repeat the mean to get the shape. Only d_head different "
            "numbers are left for each token; put the heads side by side.",
        ),
        Misconception(
            "along_the_sequence",  # museum C2
            _merge_along_the_sequence,
            "You put the heads one after the other along the sequence, so that there are num_heads "
            "times as many tokens. They belong side by side along the features.",
        ),
        Misconception(
            "heads_and_tokens_merged",
            _merge_whole,
            "You merge the axes of heads and tokens. Merge heads and features: each token keeps a "
            "row of its own.",
        ),
        Misconception(
            "not_merged",
            _merge_four_axes,
            "You transpose and stop there, with four axes. The last two, heads and features, "
            "become one.",
        ),
        Misconception(
            "tokens_merged_too",
            _merge_tokens_gone,
            "You flatten from axis 1 on, and the tokens with it. Only heads and features become "
            "one axis.",
        ),
        Misconception(
            "first_head_alone",
            _merge_one_head,
            "You return the first head alone. All of them belong side by side.",
        ),
        Misconception(
            "samples_side_by_side",
            _merge_batch_looped,
            "You iterate over the tensor itself, which yields samples and not heads. The heads are "
            "axis 1.",
        ),
        Misconception(
            "heads_in_reverse",
            _merge_reversed,
            "You put the heads together in reverse order. Head 0 holds the first features.",
        ),
        Misconception(
            "cut_from_the_graph",
            _merge_detached,
            "Your values are right and no gradient passes through them: you make a new tensor out "
            "of numbers. Rearrange the one you are given.",
        ),
    ),
    alternatives=(_merge_cat, _merge_contiguous, _merge_flatten, _merge_in_place),
    hints=(
        "It undoes split_heads: run its two steps backwards, the last one first.",
        "After the transpose the shape is (batch, n, num_heads, d_head), and the last two axes "
        "become one. Why may `view` not do that, and what may?",
        "`transpose(1, 2)`, then `reshape`, which copies where it has to.",
    ),
)


# --- multi_head_attention -----------------------------------------------------------------------

_PROJECTIONS = _linear("query", "key", "value", "output")


def _observe_multi_head_attention(MultiHeadAttention, see):
    def attend(d_model, num_heads, x, *mask, gradients=True, **keywords):
        module = _with_weights(see, MultiHeadAttention(d_model, num_heads), _PROJECTIONS)
        see("its num_heads", getattr(module, "num_heads", "missing"))
        out = see.call("the output", module, x, *mask, **keywords)
        if gradients:
            see.gradients("the output", out, x=x, **_parameters(module, _PROJECTIONS))
        return module

    with see.probe("MultiHeadAttention(12, 3), x (2, 5, 12), no mask"):
        attend(12, 3, see.randn(2, 5, 12, requires_grad=True))
    with see.probe("MultiHeadAttention(20, 5), x (3, 6, 20), no mask"):
        attend(20, 5, see.randn(3, 6, 20, requires_grad=True))
    with see.probe("MultiHeadAttention(9, 1), x (4, 3, 9), no mask"):
        attend(9, 1, see.randn(4, 3, 9, requires_grad=True), gradients=False)
    with see.probe("MultiHeadAttention(12, 3), x (2, 5, 12), causal mask (5, 5)"):
        attend(12, 3, see.randn(2, 5, 12, requires_grad=True), reference.causal_mask(5))
    with see.probe("MultiHeadAttention(12, 3), x (4, 5, 12), padding mask (4, 1, 1, 5)"):
        mask = reference.padding_mask(torch.tensor([3, 5, 1, 4]), 5)
        attend(12, 3, see.randn(4, 5, 12, requires_grad=True), mask=mask)
    with see.probe("MultiHeadAttention(18, 2), x (3, 5, 18), a mask (3, 2, 5, 5) for each head"):
        attend(18, 2, see.randn(3, 5, 18), _random_mask(see, 3, 2, 5, 5), gradients=False)
    with see.probe("MultiHeadAttention(12, 3), x (2, 5, 12), a sentence without tokens"):
        mask = reference.padding_mask(torch.tensor([0, 3]), 5) & reference.causal_mask(5)
        attend(12, 3, see.randn(2, 5, 12, requires_grad=True), mask)
    with see.probe("MultiHeadAttention(16, 4), x (1, 1, 16): a single token"):
        attend(16, 4, see.randn(1, 1, 16), gradients=False)
    with see.probe("MultiHeadAttention(12, 3), x a transposed view, evaluation mode"):
        x = see.randn(2, 12, 5).transpose(1, 2)
        module = attend(12, 3, x, gradients=False).eval()
        see.call("the output in evaluation mode", module, x)
    with see.probe("one MultiHeadAttention(12, 3) for three calls: causal mask, no mask, n = 4"):
        module = attend(12, 3, see.randn(2, 5, 12), reference.causal_mask(5), gradients=False)
        see.call("the output of the second call, without a mask", module, see.randn(2, 5, 12))
        see.call("the output of the third call, with fewer tokens", module, see.randn(2, 4, 12))
    with see.probe("MultiHeadAttention(10, 2), x (3, 4, 10), no mask"):
        module = _with_weights(see, MultiHeadAttention(10, 2), _PROJECTIONS)
        x = see.randn(3, 4, 10)
        parts = module.query(x), module.key(x), module.value(x)
        heads = (reference.split_heads(part, 2) for part in parts)
        merged = reference.merge_heads(reference.scaled_dot_product_attention(*heads))
        see.fact(_SIX_DIGITS, _near(module(x), module.output(merged), 1e-6))


class _Heads(reference.MultiHeadAttention):
    """Multi-head attention, of which a subclass does one step in its own way."""

    def projected(self, x):
        return self.query(x), self.key(x), self.value(x)

    def split(self, x):
        return reference.split_heads(x, self.num_heads)

    def attend(self, q, k, v, mask):
        return reference.scaled_dot_product_attention(q, k, v, mask)

    def merge(self, heads):
        return reference.merge_heads(heads)

    def finish(self, x, merged):
        return self.output(merged)

    def forward(self, x, mask=None):
        q, k, v = (self.split(part) for part in self.projected(x))
        return self.finish(x, self.merge(self.attend(q, k, v, mask)))


def _heads_that_attend(attention):
    """A MultiHeadAttention whose heads use another function for attention."""

    class MultiHeadAttention(_Heads):
        def attend(self, q, k, v, mask):
            return attention(q, k, v, mask)

    return MultiHeadAttention


def _attention_by_hand(fill, divisor=lambda q, k, v: math.sqrt(q.shape[-1]), dim=-1, patch=False):
    """Attention in which nobody thought of rows that are masked whole, or patched them late."""

    def attention(q, k, v, mask=None):
        scores = q @ k.transpose(-2, -1) / divisor(q, k, v)
        if mask is not None:
            scores = scores.masked_fill(~mask, fill)
        weights = scores.softmax(dim=dim)
        return (weights.nan_to_num(0.0) if patch else weights) @ v

    return attention


def _heads_divided_by(slug, divisor, message):
    """The mistake alone, and with each of the two that go with it in an answer by hand."""
    blind = "And a query that may look nowhere {}; its heads should be zeros."
    nan, mean = (blind.format(what) for what in ("becomes NaN", "gets the mean of hidden values"))
    return (
        Misconception(slug, _heads_that_attend(_attention(divisor)), message),
        Misconception(
            f"{slug}_and_nan",
            _heads_that_attend(_attention_by_hand(-math.inf, divisor)),
            f"{message} {nan}",
        ),
        Misconception(
            f"{slug}_and_uniform",
            _heads_that_attend(_attention_by_hand(-1e9, divisor)),
            f"{message} {mean}",
        ),
    )


def _heads_softmax_over(slug, dim, message):
    """Softmax over another axis, with four ways to hide scores."""
    ways = {
        slug: _attention(dim=dim),
        f"{slug}_minus_infinity": _attention_by_hand(-math.inf, dim=dim),
        f"{slug}_finite_fill": _attention_by_hand(-1e9, dim=dim),
        f"{slug}_patched": _attention_by_hand(-math.inf, dim=dim, patch=True),
    }
    return (Misconception(s, _heads_that_attend(way), message) for s, way in ways.items())


class _HeadsSplitByView(_Heads):
    def split(self, x):
        return _split_by_view(x, self.num_heads)


class _HeadsMergedByView(_Heads):
    def merge(self, heads):
        return _merge_not_transposed(heads)


class _HeadsByViewTwice(_HeadsSplitByView, _HeadsMergedByView):
    pass


class _HeadsInterleaved(_Heads):
    def split(self, x):
        return _split_interleaved(x, self.num_heads)

    def merge(self, heads):
        return _merge_interleaved(heads)


class _HeadsInterleavedOnce(_Heads):
    def split(self, x):
        return _split_interleaved(x, self.num_heads)


class _HeadsMergedInterleaved(_Heads):
    def merge(self, heads):
        return _merge_interleaved(heads)


class _HeadsMergedInReverse(_Heads):
    def merge(self, heads):
        return _merge_reversed(heads)


class _HeadsNeverSplit(_Heads):
    def split(self, x):
        return x[:, None]


class _HeadsWithoutHeads(reference.MultiHeadAttention):
    def forward(self, x, mask=None):
        parts = self.query(x), self.key(x), self.value(x)
        return self.output(reference.scaled_dot_product_attention(*parts, mask))


class _HeadsFirstMaskOnly(reference.MultiHeadAttention):
    def forward(self, x, mask=None):
        parts = self.query(x), self.key(x), self.value(x)
        if mask is not None and mask.ndim == 4:
            mask = mask[:, 0]
        return self.output(reference.scaled_dot_product_attention(*parts, mask))


class _HeadsMaskKept(_Heads):
    def forward(self, x, mask=None):
        self.mask = getattr(self, "mask", None) if mask is None else mask
        return super().forward(x, self.mask)


class _HeadsAllAlike(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        for p in self.parameters():
            nn.init.zeros_(p)


class _HeadsAmongThemselves(_Heads):
    def split(self, x):
        return _split_not_transposed(x, self.num_heads)

    def attend(self, q, k, v, mask):
        return reference.scaled_dot_product_attention(q, k, v)

    def merge(self, heads):
        return heads.flatten(2)


class _HeadsNoOutput(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        del self.output

    def finish(self, x, merged):
        return merged


class _HeadsOutputUnused(_Heads):
    def finish(self, x, merged):
        return merged


class _HeadsKeysFromQuery(_Heads):
    def projected(self, x):
        return self.query(x), self.query(x), self.value(x)


class _HeadsQueriesFromKey(_Heads):
    def projected(self, x):
        return self.key(x), self.key(x), self.value(x)


class _HeadsAllFromQuery(_Heads):
    def projected(self, x):
        return self.query(x), self.query(x), self.query(x)


class _HeadsValuesNotProjected(_Heads):
    def projected(self, x):
        return self.query(x), self.key(x), x


class _HeadsNotProjected(_Heads):
    def projected(self, x):
        return x, x, x


class _HeadsValuesFromKey(_Heads):
    def projected(self, x):
        return self.query(x), self.key(x), self.key(x)


class _HeadsKeyValueSwapped(_Heads):
    def projected(self, x):
        return self.query(x), self.value(x), self.key(x)


class _HeadsQueryKeySwapped(_Heads):
    def projected(self, x):
        return self.key(x), self.query(x), self.value(x)


class _HeadsOneLayer(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        self.key = self.value = self.query


class _HeadsAveraged(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        self.output = nn.Linear(d_model // num_heads, d_model)

    def merge(self, heads):
        return heads.mean(dim=1)


class _HeadsAveragedAndRepeated(_Heads):
    def merge(self, heads):
        return _merge_mean_repeated(heads)


class _HeadsWeightsSummed(_Heads):
    def attend(self, q, k, v, mask):
        return _masked_softmax(_scores(q, k), mask).sum(dim=1, keepdim=True) @ v


class _HeadsWeightsAveraged(_Heads):
    def attend(self, q, k, v, mask):
        return _masked_softmax(_scores(q, k), mask).mean(dim=1, keepdim=True) @ v


class _HeadsScoresSummed(_Heads):
    def attend(self, q, k, v, mask):
        scores = _scores(q, k).sum(dim=1, keepdim=True)
        return _masked_softmax(scores, mask) @ v


class _HeadsDropoutInTraining(_Heads):
    def attend(self, q, k, v, mask):
        weights = F.dropout(_masked_softmax(_scores(q, k), mask), 0.1, self.training)
        return weights @ v


class _HeadsBatchSecond(_Heads):
    def forward(self, x, mask=None):
        return super().forward(x.transpose(0, 1), mask).transpose(0, 1)


class _HeadsWithoutBias(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        for name in ("query", "key", "value", "output"):
            self.add_module(name, nn.Linear(d_model, d_model, bias=False))


class _HeadsInputsWithoutBias(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Linear(d_model, d_model, bias=False))


class _HeadsOutputWithoutBias(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        self.output = nn.Linear(d_model, d_model, bias=False)


class _HeadsPacked(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        q, k, v = (reference.split_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        heads = reference.scaled_dot_product_attention(q, k, v, mask)
        return self.output(reference.merge_heads(heads))


class _HeadsOfTheirOwnSlice(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.query = nn.Linear(self.d_head, self.d_head)
        self.key = nn.Linear(self.d_head, self.d_head)
        self.value = nn.Linear(self.d_head, self.d_head)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        x = reference.split_heads(x, self.num_heads)
        parts = self.query(x), self.key(x), self.value(x)
        heads = reference.scaled_dot_product_attention(*parts, mask)
        return self.output(reference.merge_heads(heads))


class _HeadsShareAProjection(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, d_head = num_heads, d_model // num_heads
        self.query = nn.Linear(d_model, d_head)
        self.key = nn.Linear(d_model, d_head)
        self.value = nn.Linear(d_model, d_head)
        self.output = nn.Linear(d_head * num_heads, d_model)

    def forward(self, x, mask=None):
        parts = self.query(x), self.key(x), self.value(x)
        heads = [reference.scaled_dot_product_attention(*parts, mask)] * self.num_heads
        return self.output(torch.cat(heads, dim=-1))


class _HeadsOfFullWidth(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model * num_heads)
        self.key = nn.Linear(d_model, d_model * num_heads)
        self.value = nn.Linear(d_model, d_model * num_heads)
        self.output = nn.Linear(d_model * num_heads, d_model)

    forward = _Heads.forward


class _HeadsInAList(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.layers = [nn.Linear(d_model, d_model) for _ in range(3)]
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        q, k, v = (reference.split_heads(layer(x), self.num_heads) for layer in self.layers)
        heads = reference.scaled_dot_product_attention(q, k, v, mask)
        return self.output(reference.merge_heads(heads))


class _HeadsResidual(_Heads):
    def finish(self, x, merged):
        return x + self.output(merged)


class _HeadsResidualAndNorm(_Heads):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        self.norm = nn.LayerNorm(d_model)

    def finish(self, x, merged):
        return self.norm(x + self.output(merged))


class _HeadsWithWeights(_Heads):
    def forward(self, x, mask=None):
        q, k, v = (self.split(part) for part in self.projected(x))
        weights = _masked_softmax(_scores(q, k), mask)
        return self.finish(x, self.merge(weights @ v)), weights


class _HeadsNumHeadsAsSize(_Heads):
    def split(self, x):
        return x.view(*x.shape[:2], -1, self.num_heads).transpose(1, 2)


class _HeadsActivated(_Heads):
    def projected(self, x):
        return [F.relu(part) for part in super().projected(x)]


class _HeadsProjectedAtTheEnd(_Heads):
    def merge(self, heads):
        return heads

    def finish(self, x, heads):
        weight = self.output.weight.view(-1, self.num_heads, heads.shape[-1])
        return torch.einsum("bhnd,ohd->bno", heads, weight) + self.output.bias


class _HeadsOneByOne(nn.Module):
    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        q, k, v = self.query(x), self.key(x), self.value(x)
        heads = []
        for h in range(self.num_heads):
            own = slice(h * self.d_head, (h + 1) * self.d_head)
            seen = mask
            if mask is not None and mask.ndim == 4:
                seen = mask[:, h if mask.shape[1] > 1 else 0]
            heads.append(_sdpa_einsum(q[..., own], k[..., own], v[..., own], seen))
        return self.output(self.dropout(torch.cat(heads, dim=-1)))


class _HeadsByTorch(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(d_model, d_model))

    def forward(self, x, mask=None):
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(heads.transpose(1, 2).flatten(2))


class _HeadsPackedOnTheFly(nn.Module):
    def __init__(self, d_model, num_heads, **unused):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)
        self.register_buffer("scale", torch.tensor((d_model // num_heads) ** -0.5), False)

    def forward(self, x, mask=None):
        layers = self.query, self.key, self.value
        weight = torch.cat([layer.weight for layer in layers])
        packed = F.linear(x, weight, torch.cat([layer.bias for layer in layers]))
        q, k, v = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(k.shape[-1])
        if mask is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
        return self.output((weights @ v).permute(0, 2, 1, 3).reshape(x.shape))


MULTI_HEAD_ATTENTION = Exercise(
    slug="multi_head_attention",
    chapter=3,
    title="Multi-head attention",
    minutes=25,
    difficulty=3,
    reference=reference.MultiHeadAttention,
    observe=_observe_multi_head_attention,
    misconceptions=(
        *_heads_divided_by(
            "not_scaled",  # museum 3.3, §5
            lambda q, k, v: 1,
            "The scores of your heads are not divided by the root of d_head. Their variance is "
            "d_head then, and softmax picks single keys.",
        ),
        *_heads_divided_by(
            "root_of_d_model",  # museum 3.4, §5
            lambda q, k, v: math.sqrt(q.shape[1] * q.shape[3]),
            "You divide the scores by √d_model. Each head's score is a sum over its own d_head "
            "features only, so d_head counts.",
        ),
        *_heads_divided_by(
            "root_of_n",  # museum 3.4
            lambda q, k, v: math.sqrt(q.shape[2]),
            "You divide the scores by the root of the number of tokens. A score is a sum over "
            "d_head products, whatever the length of the sentence is.",
        ),
        *_heads_divided_by(
            "root_of_num_heads",
            lambda q, k, v: math.sqrt(q.shape[1]),
            "You divide the scores by the root of the number of heads. A head's score is a sum "
            "over its d_head features: how many other heads there are does not matter to it.",
        ),
        *_heads_divided_by(
            "divided_by_d_head",  # museum 3.4
            lambda q, k, v: q.shape[-1],
            "Your scores are divided by d_head in all, and should be by its root. Either the root "
            "is missing, or two places scale: you, and the attention function again.",
        ),
        *_heads_divided_by(
            "multiplied_by_the_root",  # museum 3.4
            lambda q, k, v: q.shape[-1] ** -0.5,
            "You multiply the scores by √d_head. They should be divided by it.",
        ),
        *_heads_softmax_over(
            "softmax_over_queries",  # museum 3.1, §5
            -2,
            "Your softmax runs over the queries: the weights of each key add up to 1, instead of "
            "those of each query. Scores are (batch, heads, query, key).",
        ),
        *_heads_softmax_over(
            "softmax_over_heads",  # museum 3.2
            1,
            "Your softmax runs over the heads, which then compete for each key. Each head has a "
            "softmax of its own, over the keys.",
        ),
        *_heads_softmax_over(
            "softmax_over_the_batch",  # museum 3.2
            0,
            "Your softmax runs over the batch, so that a sample's weights depend on the others. "
            "It belongs to the keys of one sample.",
        ),
        Misconception(
            "mask_kept",
            _HeadsMaskKept,
            "You keep the mask of an earlier call and use it where none is given. A call without "
            "a mask hides nothing: store neither the mask nor what was computed with it.",
        ),
        Misconception(
            "mask_ignored",
            _heads_that_attend(_sdpa_mask_ignored),
            "You take a mask and do not pass it on. Every query sees everything.",
        ),
        Misconception(
            "mask_after_softmax",  # museum 3.5
            _heads_that_attend(_sdpa_mask_after_softmax),
            "You mask after the softmax, so that the weights which remain add up to less than 1 "
            "and depend on what is hidden.",
        ),
        Misconception(
            "masked_scores_zero",  # museum 3.6
            _heads_that_attend(_sdpa_masked_values),
            "You set hidden scores to 0, from which softmax makes e⁰ = 1 before it normalises: "
            "hidden keys keep a weight.",
        ),
        Misconception(
            "mask_inverted",  # museum 3.7
            _heads_that_attend(_sdpa_inverted(zeros=True)),
            "You use the mask the wrong way round: True means that a query may look. "
            "(nn.MultiheadAttention hides where its boolean mask is True.)",
        ),
        Misconception(
            "mask_inverted_and_nan",  # museum 3.7
            _heads_that_attend(_sdpa_inverted(zeros=False)),
            "You use the mask the wrong way round: True means that a query may look. And a query "
            "that may look nowhere becomes NaN; it should get zeros from each head.",
        ),
        Misconception(
            "mask_added",  # museum 3.8
            _heads_that_attend(_sdpa_mask_added),
            "You add the boolean mask to the scores. True counts as 1, which favours the visible "
            "keys a little and hides none.",
        ),
        Misconception(
            "mask_transposed",  # museum 3.11
            _heads_that_attend(_sdpa_mask_transposed),
            "You exchange the axes of queries and keys in the mask. A padding mask then silences "
            "the padding's queries and leaves its keys in sight.",
        ),
        Misconception(
            "nan_where_all_is_hidden",  # museum 3.21
            _heads_that_attend(_sdpa_minus_inf),
            "A query that may look nowhere becomes NaN: softmax of a row of −∞ alone computes "
            "−∞ − (−∞), and NaN times 0 is NaN as well. Its heads should be zeros, as in "
            "scaled_dot_product_attention.",
        ),
        Misconception(
            "nan_in_the_gradient",  # museum 3.21
            _heads_that_attend(_sdpa_nan_patched),
            "Your output is right, and the gradient is NaN where a query may look nowhere: −∞ is "
            "added before the softmax and the NaN replaced after it, and backward goes through the "
            "softmax in between. Take the row of −∞ away before.",
        ),
        Misconception(
            "nan_in_the_gradient_of_the_values",  # museum 3.21
            _heads_that_attend(_sdpa_nan_patched_at_the_end),
            "Your output is right, and gradients are NaN where a query may look nowhere: the NaN "
            "is replaced in what the heads return, and the weights behind it, with which backward "
            "multiplies, are still NaN.",
        ),
        Misconception(
            "uniform_where_all_is_hidden",  # museum 3.21
            _heads_that_attend(_sdpa_filled(None)),
            "A query that may look nowhere gets the mean of all hidden values: a row of equal, "
            "very negative scores is uniform after softmax. Its heads should be zeros.",
        ),
        Misconception(
            "split_by_view",  # museum 3.12, C2
            _HeadsSplitByView,
            "You split into heads by `view` alone. The features of a head then come from other "
            "tokens; the shape is right, the tokens are mixed. Use split_heads.",
        ),
        Misconception(
            "merged_by_view",  # museum 3.13, §5
            _HeadsMergedByView,
            "You merge the heads without transposing back, so that a row holds pieces of several "
            "tokens. Use merge_heads.",
        ),
        Misconception(
            "split_and_merged_by_view",  # museum 3.14
            _HeadsByViewTwice,
            "You split and merge by `view` alone. The two undo each other, so nothing looks out of "
            "place, and in between each head attends among pieces of a few tokens.",
        ),
        Misconception(
            "interleaved",  # museum 3.15, §4
            _HeadsInterleaved,
            "Your heads take every num_heads-th feature. Trained from scratch that is as good; "
            "with the weights of others, whose heads hold neighbouring features, it is another "
            "function.",
        ),
        Misconception(
            "interleaved_in_the_split_alone",  # museum 3.15
            _HeadsInterleavedOnce,
            "You split the features interleaved, every num_heads-th to a head, and merge them head "
            "after head. Both belong together, and copied weights expect neighbours in one head.",
        ),
        Misconception(
            "interleaved_in_the_merge_alone",  # museum 3.15
            _HeadsMergedInterleaved,
            "You split rightly and merge interleaved, so that the features of the heads alternate "
            "within a row. They should stand head after head: heads before features.",
        ),
        Misconception(
            "merged_in_reverse",
            _HeadsMergedInReverse,
            "Your heads are merged in reverse order. Head 0 holds the first features of a row, as "
            "it got them in the split.",
        ),
        Misconception(
            "num_heads_taken_for_d_head",
            _HeadsNumHeadsAsSize,
            "You make d_head heads of num_heads features each. Exchange the two: num_heads says "
            "how many heads there are.",
        ),
        Misconception(
            "a_single_head",
            _HeadsNeverSplit,
            "You attend with all features at once, as a single head. Without the split there is "
            "one table of weights where there should be num_heads.",
        ),
        Misconception(
            "a_single_head_in_three_axes",
            _HeadsWithoutHeads,
            "You attend with all features at once, as a single head, and never split. There should "
            "be num_heads tables of weights; a mask with an axis for heads does not fit either.",
        ),
        Misconception(
            "a_single_head_with_one_mask",
            _HeadsFirstMaskOnly,
            "You attend with all features at once, as a single head, and use the first head's "
            "mask. There should be num_heads tables of weights, each with its own mask.",
        ),
        Misconception(
            "heads_attend_to_heads",
            _HeadsAmongThemselves,
            "Your attention runs over the heads of one token: the head axis stands where the "
            "tokens belong. No token sees another one.",
        ),
        Misconception(
            "no_output_layer",  # museum 3.16, C7
            _HeadsNoOutput,
            "There is no `output` layer. Without it the heads lie side by side and never meet; it "
            "mixes what they found.",
        ),
        Misconception(
            "output_layer_not_used",  # museum 3.16, C7
            _HeadsOutputUnused,
            "You have an `output` layer and return the merged heads without it. Its weights would "
            "never receive a gradient.",
        ),
        Misconception(
            "keys_from_the_query_layer",  # museum 3.16
            _HeadsKeysFromQuery,
            "You make the keys with the `query` layer. Then what a token asks and what it offers "
            "are the same, and the `key` layer learns nothing.",
        ),
        Misconception(
            "queries_from_the_key_layer",  # museum 3.16
            _HeadsQueriesFromKey,
            "You make the queries with the `key` layer. Then what a token asks and what it offers "
            "are the same, and the `query` layer learns nothing.",
        ),
        Misconception(
            "all_from_the_query_layer",  # museum 3.16
            _HeadsAllFromQuery,
            "You use the `query` layer for queries, keys and values alike. The layers `key` and "
            "`value` are there, and nothing goes through them.",
        ),
        Misconception(
            "values_not_projected",  # museum 3.16
            _HeadsValuesNotProjected,
            "You take the input itself for the values. They have a layer of their own, which in "
            "your answer learns nothing.",
        ),
        Misconception(
            "nothing_projected",
            _HeadsNotProjected,
            "You attend with the input itself as queries, keys and values. The three layers are "
            "there and unused: without them there is nothing to learn in attention.",
        ),
        Misconception(
            "keys_taken_for_values",  # museum §5
            _HeadsValuesFromKey,
            "You average the keys. Keys say where to look; what is fetched are the values, which "
            "have a layer of their own.",
        ),
        Misconception(
            "keys_and_values_exchanged",
            _HeadsKeyValueSwapped,
            "You use the values to compute the scores and average the keys. With copied weights "
            "the two layers are not interchangeable.",
        ),
        Misconception(
            "queries_and_keys_exchanged",
            _HeadsQueryKeySwapped,
            "You use the `key` layer for the queries and the `query` layer for the keys. Trained "
            "from scratch that is as good; with copied weights it is another function.",
        ),
        Misconception(
            "one_layer_for_all_three",  # museum 3.16
            _HeadsOneLayer,
            "Queries, keys and values come from one and the same layer under three names. They are "
            "three layers, each with weights of its own.",
        ),
        Misconception(
            "heads_averaged",  # museum 3.17
            _HeadsAveraged,
            "Your `output` layer takes d_head features, so that the heads must have been thrown "
            "together before it. They belong side by side, d_model features in all.",
        ),
        Misconception(
            "heads_averaged_and_repeated",  # museum 3.17
            _HeadsAveragedAndRepeated,
            "You average the heads and repeat the mean. Only d_head different numbers are left for "
            "each token; put the heads side by side.",
        ),
        Misconception(
            "weights_summed_over_heads",  # museum F8, C1
            _HeadsWeightsSummed,
            "You add up the weights of all heads and use the sum in each of them. Its rows add up "
            "to num_heads, and all heads look at the same places; every head has weights of its "
            "own.",
        ),
        Misconception(
            "weights_averaged_over_heads",  # museum F8, C1
            _HeadsWeightsAveraged,
            "You average the weights over the heads and use the mean in each of them. Then all "
            "heads look at the same places; every head has weights of its own.",
        ),
        Misconception(
            "scores_summed_over_heads",  # museum C1
            _HeadsScoresSummed,
            "You add up the scores of all heads before the softmax, which is one head that sees "
            "all features. Every head has a softmax of its own.",
        ),
        Misconception(
            "dropout_in_training",  # museum 3.18
            _HeadsDropoutInTraining,
            "You drop attention weights in training mode. Many models do; this class has no "
            "argument for it, and two calls on the same input should agree.",
        ),
        Misconception(
            "dropout_always_on",  # museum 3.18
            _heads_that_attend(_sdpa_dropout),
            "You drop attention weights at random, in evaluation mode as well: F.dropout has to be "
            "told the mode. This class has no dropout at all.",
        ),
        Misconception(
            "batch_taken_for_tokens",  # museum 3.19
            _HeadsBatchSecond,
            "You treat the input as (n, batch, d_model), so that each token attends to the same "
            "position of the other samples. Here the batch comes first.",
        ),
        Misconception(
            "no_bias",
            _HeadsWithoutBias,
            "Your four layers have no bias. Some models leave it out; BERT has it, and so do "
            "torch's attention and this class.",
        ),
        Misconception(
            "no_bias_before_the_heads",
            _HeadsInputsWithoutBias,
            "Your query, key and value layers have no bias. Some models leave it out; BERT has it, "
            "and so do torch's attention and this class.",
        ),
        Misconception(
            "no_bias_behind_the_heads",
            _HeadsOutputWithoutBias,
            "Your output layer has no bias. Some models leave it out; BERT has it, and so do "
            "torch's attention and this class.",
        ),
        Misconception(
            "projections_in_one_matrix",
            _HeadsPacked,
            "Your three projections lie in one matrix. It computes the same, and faster; this "
            "class has layers called query, key and value, into which the weights of BERT are "
            "copied by name.",
        ),
        Misconception(
            "each_head_sees_its_slice",
            _HeadsOfTheirOwnSlice,
            "You split the input first and project d_head features by layers of d_head × d_head. "
            "Each head then sees a slice of the input, and all use the same weights. Project all "
            "d_model features, then split.",
        ),
        Misconception(
            "heads_share_a_projection",
            _HeadsShareAProjection,
            "Your query, key and value layers give d_head features in all, enough for one head. "
            "d_model features have to come out, d_head for each of the num_heads heads.",
        ),
        Misconception(
            "heads_as_wide_as_the_model",
            _HeadsOfFullWidth,
            "Your heads are d_model features wide each, which costs num_heads times as much. They "
            "divide d_model among themselves: all four layers are d_model × d_model.",
        ),
        Misconception(
            "layers_in_a_list",
            _HeadsInAList,
            "You keep the projections in a Python list, where the module does not find them: no "
            "optimizer would train them. They are attributes called query, key and value.",
        ),
        Misconception(
            "residual_inside",  # museum C7
            _HeadsResidual,
            "You add the input to the result. The residual connection belongs to the block around "
            "attention, which adds it itself.",
        ),
        Misconception(
            "residual_and_norm_inside",  # museum C7
            _HeadsResidualAndNorm,
            "Residual connection and layer norm are in your class. They belong to the block around "
            "attention, which has its own.",
        ),
        Misconception(
            "weights_returned_too",
            _HeadsWithWeights,
            "You return the weights beside the output, as nn.MultiheadAttention does. This class "
            "returns the output alone, a single tensor.",
        ),
        Misconception(
            "projections_activated",
            _HeadsActivated,
            "You apply ReLU to queries, keys and values. They are linear projections: a score must "
            "be free to be negative in every term.",
        ),
        Misconception(
            "weights_all_alike",
            _HeadsAllAlike,
            "In one of your layers all weights start with the same number, so that its features "
            "all compute the same. nn.Linear draws its weights at random: leave them as drawn.",
        ),
    ),
    alternatives=(_HeadsOneByOne, _HeadsByTorch, _HeadsPackedOnTheFly, _HeadsProjectedAtTheEnd),
    hints=(
        "You have the parts: split_heads, scaled_dot_product_attention, merge_heads. Which four "
        "linear layers stand around them?",
        "Project all d_model features three times, then split each result. The heads are one more "
        "axis in front, which scaled_dot_product_attention takes as it is, and so does the mask.",
        "`forward` has three steps. Three times: a layer, then split_heads with self.num_heads. "
        "Then attention on the three results, with the mask as it came, (batch, heads, n, d_head). "
        "Then merge_heads, and the one layer that is left.",
    ),
)


# --- fix_heads_not_transposed_back --------------------------------------------------------------


class PackedAttention(nn.Module):
    """Multi-head self-attention with its three projections in one matrix; x (batch, n, d_model)."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x):
        batch, n, d_model = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (batch, n, d_model) each
        q = q.view(batch, n, self.num_heads, self.d_head).transpose(1, 2)
        k = k.view(batch, n, self.num_heads, self.d_head).transpose(1, 2)
        v = v.view(batch, n, self.num_heads, self.d_head).transpose(1, 2)
        heads = F.scaled_dot_product_attention(q, k, v)  # (batch, heads, n, d_head)
        return self.output(heads.reshape(batch, n, d_model))


_PACKED = _linear("qkv", "output")


def _observe_packed_attention(PackedAttention, see):
    sizes = (12, 3, 2, 5), (20, 5, 3, 6), (9, 1, 4, 3), (18, 2, 5, 3), (8, 2, 1, 3)
    for d_model, num_heads, batch, n in sizes:
        with see.probe(f"PackedAttention({d_model}, {num_heads}), x ({batch}, {n}, {d_model})"):
            module = _with_weights(see, PackedAttention(d_model, num_heads), _PACKED)
            x = see.randn(batch, n, d_model, requires_grad=True)
            out = see.call("the output", module, x)
            see.gradients("the output", out, x=x, **_parameters(module, _PACKED))
    with see.probe("one PackedAttention(12, 3) for two calls, x (2, 5, 12) and x (3, 4, 12)"):
        module = _with_weights(see, PackedAttention(12, 3), _PACKED)
        see.call("the output", module, see.randn(2, 5, 12))
        see.call("the output of the second call", module, see.randn(3, 4, 12))
    with see.probe("PackedAttention(10, 2), x (3, 4, 10)"):
        module = _with_weights(see, PackedAttention(10, 2), _PACKED)
        x = see.randn(3, 4, 10)
        heads = (reference.split_heads(part, 2) for part in module.qkv(x).chunk(3, dim=-1))
        merged = reference.merge_heads(reference.scaled_dot_product_attention(*heads))
        see.fact(_SIX_DIGITS, _near(module(x), module.output(merged), 1e-6))


class _Packed(reference.PackedAttention):
    """Packed attention, of which a subclass does one step in its own way."""

    def parts(self, x):
        return self.qkv(x).chunk(3, dim=-1)

    def split(self, part):
        return reference.split_heads(part, self.num_heads)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def merge(self, heads):
        return reference.merge_heads(heads)

    def forward(self, x):
        q, k, v = (self.split(part) for part in self.parts(x))
        return self.output(self.merge(self.attend(q, k, v)))


class _PackedNotTransposed(_Packed):
    def merge(self, heads):
        return _merge_not_transposed(heads)


class _PackedByViewTwice(_PackedNotTransposed):
    def split(self, part):
        return _split_by_view(part, self.num_heads)


class _PackedView(_Packed):
    def merge(self, heads):
        return heads.contiguous().transpose(1, 2).view(len(heads), heads.shape[2], -1)


class _PackedInterleaved(_Packed):
    def merge(self, heads):
        return _merge_interleaved(heads)


class _PackedInterleavedTwice(_PackedInterleaved):
    def split(self, part):
        return _split_interleaved(part, self.num_heads)


class _PackedTransposedAfterwards(_Packed):
    def merge(self, heads):
        shape = len(heads), heads.shape[2], -1
        return heads.reshape(shape).transpose(1, 2).reshape(shape)


class _PackedLengthKept(_Packed):
    def merge(self, heads):
        self.n = getattr(self, "n", heads.shape[2])
        d_model = self.output.in_features
        return heads.transpose(1, 2).reshape(len(heads), self.n, d_model)


class _PackedOtherAxes(_Packed):
    def merge(self, heads):
        return _merge_other_axes(heads)


class _PackedFirstAxes(_Packed):
    def merge(self, heads):
        return _merge_first_axes(heads)


class _PackedEnds(_Packed):
    def merge(self, heads):
        return _merge_ends(heads)


class _PackedHeadsAmongThemselves(_Packed):
    def split(self, part):
        return _split_not_transposed(part, self.num_heads)

    def merge(self, heads):
        return heads.flatten(2)


class _PackedHeadsThenTransposed(_Packed):
    def split(self, part):
        return _split_not_transposed(part, self.num_heads)

    def merge(self, heads):
        return heads.transpose(1, 2).reshape(len(heads), heads.shape[1], -1)


class _PackedMean(_Packed):
    def merge(self, heads):
        return _merge_mean_repeated(heads)


class _PackedAlongTheSequence(_Packed):
    def merge(self, heads):
        return _merge_along_the_sequence(heads)


class _PackedReversed(_Packed):
    def merge(self, heads):
        return _merge_reversed(heads)


class _PackedByHead(_Packed):
    def parts(self, x):
        by_head = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.d_head))
        return [part.flatten(2) for part in by_head.unbind(dim=3)]


class _PackedNoOutput(_Packed):
    def forward(self, x):
        q, k, v = (self.split(part) for part in self.parts(x))
        return self.merge(self.attend(q, k, v))


class _PackedCausal(_Packed):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _PackedNotScaled(_Packed):
    def attend(self, q, k, v):
        return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class _PackedScaledTwice(_Packed):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q / self.d_head**0.5, k, v)


class _PackedOneHead(_Packed):
    def split(self, part):
        return part[:, None]


class _PackedPermuted(nn.Module):
    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.output = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = _sdpa_einsum(q, k, v)
        return self.dropout(self.output(heads.permute(0, 2, 1, 3).contiguous().view(x.shape)))


class _PackedConcatenated(_Packed):
    def merge(self, heads):
        return torch.cat(heads.unbind(1), dim=2)


class _PackedHeadByHead(_Packed):
    def forward(self, x):
        q, k, v = (part.split(self.d_head, dim=2) for part in self.qkv(x).chunk(3, dim=-1))
        heads = [self.attend(*parts) for parts in zip(q, k, v, strict=True)]
        return self.output(torch.cat(heads, dim=2))


FIX_HEADS_NOT_TRANSPOSED_BACK = Exercise(
    slug="fix_heads_not_transposed_back",
    chapter=3,
    title="Find the bug: rows of the wrong tokens",
    minutes=8,
    difficulty=2,
    reference=reference.PackedAttention,
    observe=_observe_packed_attention,
    shipped=PackedAttention,
    symptom="When the first two tokens of a sentence change places, their outputs should change "
    "places too, and nothing else should happen. Here other tokens' outputs change by up to 0.602.",
    misconceptions=(
        Misconception(
            "still_not_transposed_back",  # museum 3.13, §5
            _PackedNotTransposed,
            "The heads are still merged with their axis in front of the tokens: a row of the "
            "result holds pieces of several tokens. `reshape`, `view` and `contiguous` change no "
            "order.",
        ),
        Misconception(
            "split_by_view_too",  # museum 3.14, C2
            _PackedByViewTwice,
            "You took the transposes away from the split, so that both ends agree. Now each head "
            "attends among pieces of a few tokens; the split was right, and the merge has to undo "
            "it.",
        ),
        Misconception(
            "view_after_transpose",
            _PackedView,
            "You transpose back, which is right, and `view` fails because the numbers of a row no "
            "longer lie side by side. Something has to copy them.",
        ),
        Misconception(
            "interleaved",  # museum 3.15
            _PackedInterleaved,
            "The tokens are right now, and the features of the heads alternate within a row. They "
            "should stand head after head: heads before features.",
        ),
        Misconception(
            "interleaved_at_both_ends",  # museum 3.15
            _PackedInterleavedTwice,
            "Split and merge fit one another now, and your heads take every num_heads-th feature. "
            "The split was right in the cell: a head's features are neighbours.",
        ),
        Misconception(
            "transposed_after_the_reshape",
            _PackedTransposedAfterwards,
            "You reshape first and transpose afterwards. Heads and tokens are mixed by then, and "
            "an exchange of tokens and features does not undo it: look at the axes before the "
            "reshape.",
        ),
        Misconception(
            "length_kept",
            _PackedLengthKept,
            "The heads are merged rightly in the first call, and you keep its n: a sentence of "
            "another length does not fit. Take every size from the x of the call.",
        ),
        Misconception(
            "tokens_and_features_transposed",
            _PackedOtherAxes,
            "You exchange the last two axes, tokens and features. Heads and tokens have to trade "
            "places.",
        ),
        Misconception(
            "batch_and_heads_transposed",
            _PackedFirstAxes,
            "You exchange batch and heads, so that samples are mixed. Heads and tokens have to "
            "trade places.",
        ),
        Misconception(
            "heads_and_features_transposed",
            _PackedEnds,
            "You exchange heads and features. Heads and tokens have to trade places.",
        ),
        Misconception(
            "heads_attend_to_heads",
            _PackedHeadsAmongThemselves,
            "You took the transposes away from the split, so that the merge fits. Attention works "
            "on the last two axes, which are heads and features now: each token looks only at its "
            "own heads, and none at another.",
        ),
        Misconception(
            "heads_attend_to_heads_transposed",
            _PackedHeadsThenTransposed,
            "You moved the transpose from the split to the merge. Attention then runs over the "
            "heads of one token, and the rows are mixed as before; it has to stand in both places.",
        ),
        Misconception(
            "heads_averaged",  # museum 3.17
            _PackedMean,
            "You average the heads and repeat the mean to get the shape. They belong side by side, "
            "each with its own features.",
        ),
        Misconception(
            "along_the_sequence",  # museum C2
            _PackedAlongTheSequence,
            "You put the heads one after the other along the sequence. They belong side by side "
            "along the features, so that a token has d_model of them again.",
        ),
        Misconception(
            "heads_in_reverse",
            _PackedReversed,
            "The tokens are right now, and the heads stand in reverse order. Head 0 holds the "
            "first features.",
        ),
        Misconception(
            "packed_by_head",
            _PackedByHead,
            "The merge is right, and you changed how the packed matrix is read: query, key and "
            "value of head 0 first. In the cell all queries come first, then keys, then values, "
            "and that was right.",
        ),
        Misconception(
            "output_layer_lost",  # museum 3.16
            _PackedNoOutput,
            "The heads are merged rightly, and the output layer is lost. It was right in the cell: "
            "it mixes what the heads found.",
        ),
        Misconception(
            "causal",
            _PackedCausal,
            "The merge is right, and your attention is causal now. Every token may see every "
            "other here.",
        ),
        Misconception(
            "not_scaled",  # museum 3.3
            _PackedNotScaled,
            "The merge is right, and your attention no longer divides by √d_head. That was done in "
            "the cell, inside F.scaled_dot_product_attention.",
        ),
        Misconception(
            "divided_by_d_head",  # museum 3.4
            _PackedScaledTwice,
            "The merge is right, and your scores are divided by d_head in all, where its root is "
            "asked for. F.scaled_dot_product_attention divides by the root itself.",
        ),
        Misconception(
            "a_single_head",
            _PackedOneHead,
            "You took the heads away: attention with all features at once has one table of weights "
            "where there should be num_heads.",
        ),
    ),
    alternatives=(_PackedPermuted, _PackedConcatenated, _PackedHeadByHead),
    hints=(
        "Shuffle the tokens of the input: the rows of the output should be shuffled in the same "
        "way. Which step could tie a token to its place?",
        "Write the shape behind every line. `reshape` reads the numbers in the order of the axes; "
        "in which order do heads and tokens stand when it is called?",
        "The split exchanged heads and tokens. The merge has to exchange them back before heads "
        "and features become one axis.",
    ),
)


# --- sinusoidal_positions -----------------------------------------------------------------------


def _observe_sinusoidal_positions(sinusoidal_positions, see):
    for n, d_model in ((5, 8), (9, 4), (1, 6), (7, 2), (6, 6)):
        with see.probe(f"n = {n}, d_model = {d_model}"):
            table = see.call("the table", sinusoidal_positions, n, d_model)
            see.fact("the table is a constant, without a gradient", not table.requires_grad)
            exact = _sinus_float64(n, d_model)
            see.fact("each number is right to four digits", _near(table, exact, 1e-4))
    long = (90, 10, "four"), (300, 6, "four"), (3_000, 4, "three"), (6_000, 2, "three")
    for n, d_model, digits in long:
        with see.probe(f"a long text: n = {n:,}, d_model = {d_model}"):
            table, exact = sinusoidal_positions(n, d_model), _sinus_float64(n, d_model)
            see.fact(f"its shape is ({n:,}, {d_model})", table.shape == exact.shape)
            if table.shape == exact.shape:
                near = (table - exact).abs().amax(dim=1) < (1e-4 if digits == "four" else 2e-3)
                first = "none" if near.all() else str(int((~near).int().argmax()))
                see(f"the first row that is not right to {digits} digits", first)


def _sinus_frequency(d_model, step=2, dtype=torch.float32):
    return 10000.0 ** (-torch.arange(0, d_model, step, dtype=dtype) / d_model)


def _sinus_table(angle):
    """sin and cos of (n, d_model / 2) angles in turn."""
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(start_dim=1)


def _sinus_positions(n):
    return torch.arange(n, dtype=torch.float32)[:, None]


def _sinus_exponent_doubled(n, d_model):
    i = torch.arange(0, d_model, 2)
    return _sinus_table(_sinus_positions(n) / 10000 ** (2 * i / d_model))


def _sinus_exponent_halved(n, d_model):
    i = torch.arange(d_model // 2)
    return _sinus_table(_sinus_positions(n) / 10000 ** (i / d_model))


def _sinus_halves(n, d_model):
    angle = _sinus_positions(n) * _sinus_frequency(d_model)
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def _sinus_only_sine(n, d_model):
    angle = _sinus_positions(n) * _sinus_frequency(d_model)
    return angle.sin().repeat_interleave(2, dim=1)


def _sinus_only_sine_of_every_feature(n, d_model):
    return (_sinus_positions(n) * _sinus_frequency(d_model, step=1)).sin()


def _sinus_cosine_first(n, d_model):
    angle = _sinus_positions(n) * _sinus_frequency(d_model)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(start_dim=1)


def _sinus_own_frequency_for_the_cosine(n, d_model):
    table = _sinus_positions(n) * _sinus_frequency(d_model, step=1)
    table[:, 0::2] = table[:, 0::2].sin()
    table[:, 1::2] = table[:, 1::2].cos()
    return table


def _sinus_every_feature_doubled(n, d_model):
    j = torch.arange(d_model)
    angle = _sinus_positions(n) / 10000.0 ** (2 * j / d_model)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos())


def _sinus_base_1000(n, d_model):
    return _sinus_table(_sinus_positions(n) / 1000 ** (torch.arange(0, d_model, 2) / d_model))


def _sinus_base_e(n, d_model):
    return _sinus_table(_sinus_positions(n) * torch.exp(-torch.arange(0, d_model, 2) / d_model))


def _sinus_multiplied(n, d_model):
    return _sinus_table(_sinus_positions(n) * 10000.0 ** (torch.arange(0, d_model, 2) / d_model))


def _sinus_from_one(n, d_model):
    return _sinus_table((_sinus_positions(n) + 1) * _sinus_frequency(d_model))


def _sinus_relative(n, d_model):
    return _sinus_table(_sinus_positions(n) / n * _sinus_frequency(d_model))


def _sinus_two_pi(n, d_model):
    return _sinus_table(2 * math.pi * _sinus_positions(n) * _sinus_frequency(d_model))


def _sinus_integer_division(n, d_model):
    frequency = 10000.0 ** -(torch.arange(0, d_model, 2) // d_model)
    return _sinus_table(_sinus_positions(n) * frequency)


def _sinus_endpoint_included(n, d_model):
    frequency = 10000.0 ** -torch.linspace(0, 1, d_model // 2)
    return _sinus_table(_sinus_positions(n) * frequency)


def _sinus_stacked_first(n, d_model):
    angle = _sinus_positions(n) * _sinus_frequency(d_model)
    return torch.stack((angle.sin(), angle.cos())).reshape(n, d_model)


def _sinus_alternating_positions(n, d_model):
    angle = _sinus_positions(n) * _sinus_frequency(d_model).repeat_interleave(2)
    table = torch.zeros(n, d_model)
    table[0::2] = angle[0::2].sin()
    table[1::2] = angle[1::2].cos()
    return table


def _sinus_transposed(n, d_model):
    return reference.sinusoidal_positions(n, d_model).T.contiguous()


def _sinus_batch_axis(n, d_model):
    return reference.sinusoidal_positions(n, d_model)[None]


def _sinus_sines_alone(n, d_model):
    table = torch.zeros(n, d_model)
    table[:, 0::2] = (_sinus_positions(n) * _sinus_frequency(d_model)).sin()
    return table


def _sinus_base_100000(n, d_model):
    return _sinus_table(_sinus_positions(n) / 100_000 ** (torch.arange(0, d_model, 2) / d_model))


def _sinus_one_step_slower(n, d_model):
    exponent = torch.arange(2, d_model + 2, 2) / d_model
    return _sinus_table(_sinus_positions(n) / 10000**exponent)


def _sinus_logarithm_to_10(n, d_model):
    exponent = -torch.arange(0, d_model, 2) * math.log10(10000) / d_model
    return _sinus_table(_sinus_positions(n) * torch.exp(exponent))


def _sinus_fixed_length(length):
    return lambda n, d_model: reference.sinusoidal_positions(length, d_model)[:n]


def _sinus_rounded_to_16_bits(n, d_model):
    return reference.sinusoidal_positions(n, d_model).half().float()


def _sinus_positions_of(dtype):
    """Positions in a dtype that does not hold all of them."""

    def sinusoidal_positions(n, d_model):
        position = torch.arange(n).to(dtype).float()[:, None]
        return _sinus_table(position * _sinus_frequency(d_model))

    return sinusoidal_positions


def _sinus_parameter(n, d_model):
    return nn.Parameter(reference.sinusoidal_positions(n, d_model))


def _sinus_float64(n, d_model):
    angle = _sinus_positions(n).double() * _sinus_frequency(d_model, dtype=torch.float64)
    return _sinus_table(angle)


def _sinus_axes_exchanged(n, d_model):
    features = torch.arange(d_model // 2, dtype=torch.float32)
    frequency = 10000.0 ** (-2 * _sinus_positions(n) / d_model)
    return _sinus_table(frequency * features)


def _sinus_by_slices(n, d_model, base=10000.0):
    table = torch.zeros(n, d_model)
    frequency = torch.exp(torch.arange(0, d_model, 2) * (-math.log(base) / d_model))
    table[:, 0::2] = torch.sin(torch.arange(n).unsqueeze(1) * frequency)
    table[:, 1::2] = torch.cos(torch.arange(n).unsqueeze(1) * frequency)
    return table


def _sinus_by_loops(n, d_model):
    rows = []
    for p in range(n):
        angles = [p / 10000 ** (2 * (j // 2) / d_model) for j in range(d_model)]
        rows.append([math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(angles)])
    return torch.tensor(rows)


def _sinus_by_numpy(n, d_model):
    angle = np.arange(n)[:, None] / np.power(10000, 2 * (np.arange(d_model) // 2) / d_model)
    shift = np.pi / 2 * (np.arange(d_model) % 2)  # cos(a) = sin(a + π / 2)
    return torch.from_numpy(np.sin(angle + shift)).float()


def _sinus_by_complex_numbers(n, d_model):
    angle = torch.outer(torch.arange(n).double(), _sinus_frequency(d_model, dtype=torch.float64))
    pairs = torch.view_as_real(torch.polar(torch.ones_like(angle), angle)).flip(-1)
    return pairs.reshape(n, d_model).to(torch.float32)


SINUSOIDAL_POSITIONS = Exercise(
    slug="sinusoidal_positions",
    chapter=3,
    title="Waves that tell positions apart",
    minutes=15,
    difficulty=2,
    reference=reference.sinusoidal_positions,
    observe=_observe_sinusoidal_positions,
    misconceptions=(
        Misconception(
            "exponent_doubled",  # museum 3.23
            _sinus_exponent_doubled,
            "You multiply by 2 a number that counts in steps of 2 already, so that the exponent "
            "is 4i / d_model and the waves become far too long. In the formula 2i is the number "
            "of the feature: 0, 2, 4 …",
        ),
        Misconception(
            "exponent_halved",
            _sinus_exponent_halved,
            "Your exponent is i / d_model, where i counts the pairs of features. The formula has "
            "2i / d_model: with half of it, the slow waves are up to a "
            "hundred times too fast.",
        ),
        Misconception(
            "halves",  # museum 3.23
            _sinus_halves,
            "You put all sines first and all cosines behind them. The same numbers are there, and "
            "a model trained so works as well; but the paper's order takes them in turn, sine and "
            "cosine of one angle side by side, and stored weights fit one order only.",
        ),
        Misconception(
            "only_sines",  # museum 3.23
            _sinus_only_sine,
            "You use the sine for both features of a pair, so that each number stands there twice. "
            "The sine alone does not tell where on its wave a position is (it has the same value "
            "going up and coming down): the second of the pair is the cosine.",
        ),
        Misconception(
            "cosines_left_at_0",
            _sinus_sines_alone,
            "You fill the even features with sines and leave the odd ones at 0. They hold the "
            "cosines of the same angles.",
        ),
        Misconception(
            "sine_of_every_feature",  # museum 3.23
            _sinus_only_sine_of_every_feature,
            "You give every feature a wave of its own and take the sine of all. The features come "
            "in pairs: sine and cosine of one angle, so that a shift of the position is a rotation "
            "of the pair.",
        ),
        Misconception(
            "cosine_first",
            _sinus_cosine_first,
            "Sine and cosine have changed places in each pair. Even features (0, 2, 4 …) are "
            "sines: the row of position 0 begins with 0 and 1, in that order.",
        ),
        Misconception(
            "a_frequency_of_its_own_for_the_cosine",  # museum 3.23
            _sinus_own_frequency_for_the_cosine,
            "Your cosines run at other frequencies than the sines beside them, because the number "
            "of every single feature went into the exponent. The two features of a pair share one "
            "angle: feature 2i + 1 has the exponent of feature 2i.",
        ),
        Misconception(
            "number_of_the_feature_taken_for_i",
            _sinus_every_feature_doubled,
            "You take i for the number of the feature. In the formula i counts the pairs: feature "
            "2i is a sine and feature 2i + 1 a cosine, both with the exponent 2i / d_model, which "
            "stays below 1.",
        ),
        Misconception(
            "base_1000",
            _sinus_base_1000,
            "Your base is 1,000 where the paper has 10,000, so the slow waves are too fast. Count "
            "the zeros.",
        ),
        Misconception(
            "base_100_000",
            _sinus_base_100000,
            "Your base is 100,000 where the paper has 10,000, so the slow waves are too slow. "
            "Count the zeros.",
        ),
        Misconception(
            "exponents_from_the_second",
            _sinus_one_step_slower,
            "Your exponents begin with 2 / d_model, one step too far. The first pair has the "
            "exponent 0: its angle is the position itself.",
        ),
        Misconception(
            "logarithm_to_10",
            _sinus_logarithm_to_10,
            "You take the logarithm of 10,000 to the base 10, which is 4, and `exp` raises e. The "
            "two belong to different bases; `math.log` is the one for `exp`.",
        ),
        Misconception(
            "base_e",
            _sinus_base_e,
            "You raise e to the power where the paper raises 10,000. With `exp`, the logarithm of "
            "10,000 belongs into the exponent as a factor.",
        ),
        Misconception(
            "multiplied_instead_of_divided",
            _sinus_multiplied,
            "You multiply the position by 10000^(2i / d_model). The formula divides: each pair is "
            "slower than the one before it; yours are faster, up to thousands of turns from one "
            "position to the next.",
        ),
        Misconception(
            "positions_from_one",
            _sinus_from_one,
            "You count positions from 1. The first token has position 0: all its sines are 0 and "
            "all its cosines 1.",
        ),
        Misconception(
            "position_divided_by_the_length",
            _sinus_relative,
            "You divide the position by n. Then the same place has another vector in every text "
            "of another length, and the step from one token to the next is never the same.",
        ),
        Misconception(
            "times_two_pi",
            _sinus_two_pi,
            "You multiply the angle by 2π. The paper does not: its fastest wave takes 2π ≈ 6.28 "
            "positions for a turn, while yours is back at its start at every whole position.",
        ),
        Misconception(
            "one_frequency_for_all",
            _sinus_integer_division,
            "All your pairs run at the same speed, one radian per position, as if every exponent "
            "were 0; dividing as integers, with `//`, makes it so. It takes the slow waves to tell "
            "positions apart that are far from one another.",
        ),
        Misconception(
            "last_frequency_included",
            _sinus_endpoint_included,
            "You spread the exponents evenly from 0 to 1 with both ends. The formula's last one is "
            "(d_model − 2) / d_model, a step short of 1; your waves are all a little too slow, but "
            "for the first.",
        ),
        Misconception(
            "positions_mixed",
            _sinus_stacked_first,
            "You stack the sines on top of the cosines and reshape. The shape comes out right, and "
            "a row now holds sines of several positions. Stack along a new last axis, so that the "
            "two of a pair lie side by side.",
        ),
        Misconception(
            "positions_alternate",
            _sinus_alternating_positions,
            "You take sines for the even positions and cosines for the odd ones. It is the "
            "features that alternate: every row holds both.",
        ),
        Misconception(
            "transposed",
            _sinus_transposed,
            "Your table has a column for each position. It should have a row for each: axis 0 "
            "holds the n positions, axis 1 the d_model features.",
        ),
        Misconception(
            "extra_batch_axis",
            _sinus_batch_axis,
            "Your table has a third axis of size 1 in front. Asked for is (n, d_model): added to a "
            "batch, it broadcasts without that axis.",
        ),
        Misconception(
            "float64",
            _sinus_float64,
            "The numbers are right, and they are float64. Added to float32 embeddings they would "
            "turn everything behind them into float64; return float32.",
        ),
        Misconception(
            "rounded_to_16_bits",
            _sinus_rounded_to_16_bits,
            "Your numbers carry the rounding of 16-bit floats, two or three digits. Compute in "
            "float32; it is not enough to return it.",
        ),
        *(
            Misconception(
                f"positions_in_{name}",
                _sinus_positions_of(dtype),
                f"Your positions go wrong in a long text: {name} {what}. float32 holds all whole "
                "numbers up to 16 million.",
            )
            for name, dtype, what in (
                ("int8", torch.int8, "ends at 127 and goes on with −128"),
                ("uint8", torch.uint8, "ends at 255 and starts anew with 0"),
                ("bfloat16", torch.bfloat16, "has no odd numbers above 256"),
                ("float16", torch.float16, "has no odd numbers above 2,048"),
            )
        ),
        *(
            Misconception(
                slug,
                _sinus_fixed_length(length),
                "Your table has a fixed number of rows, of which the first n are returned. However "
                "many they are, a longer text gets too few: make n rows.",
            )
            for slug, length in (("fixed_length", 512), ("fixed_length_of_thousands", 5_000))
        ),
        Misconception(
            "learned",
            _sinus_parameter,
            "Your table requires a gradient. These waves are computed and stay as they are: return "
            "a plain tensor, and no parameter.",
        ),
        Misconception(
            "position_in_the_exponent",
            _sinus_axes_exchanged,
            "Position and feature have changed roles: the position stands in your exponent, and "
            "the number of the pair is what is multiplied. It is the feature that sets the "
            "frequency, and the position that runs along the wave.",
        ),
    ),
    alternatives=(
        _sinus_by_slices,
        _sinus_by_loops,
        _sinus_by_numpy,
        _sinus_by_complex_numbers,
    ),
    hints=(
        "Make the angles first, as a table (n, d_model / 2): a column of positions times a row of "
        "frequencies broadcasts to it.",
        "The row of frequencies is 10000 ** (−e / d_model) with e = 0, 2, 4 … up to d_model − 2: "
        "`torch.arange(0, d_model, 2)`.",
        "Sine and cosine of one angle have to lie side by side. Stack them along a new last axis, "
        "(n, d_model / 2, 2), and think of the order in which its numbers are read when the last "
        "two axes become one. Or fill every second column of an empty table.",
    ),
    rtol=1e-2,  # of large angles, which float32 rounds; the facts ask for four digits
    atol=1e-2,
)


# --- find the bug: order blindness --------------------------------------------------------------


class PositionalEncoding(nn.Module):
    """Adds a learned vector for its position to each token; x (batch, n, d_model)."""

    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Parameter(torch.randn(max_length, 1, d_model))

    def forward(self, x):
        return x + self.table[: x.size(0)]


def _observe_positional_encoding(PositionalEncoding, see):
    def made(max_length, d_model):
        """The layer, its one parameter filled with the same values in every implementation."""
        layer = PositionalEncoding(max_length, d_model)
        see.fact("what it makes is an nn.Module", isinstance(layer, nn.Module))
        sizes = [p.numel() for p in layer.parameters()]
        see("the sizes of its learned parameters", sizes)
        trained = all(p.requires_grad for p in layer.parameters())
        see.fact("its table can be trained: requires_grad is True", trained)
        values = see.randn(max_length, d_model)
        table = next(layer.parameters(), None)
        if table is not None and table.numel() == values.numel():
            with torch.no_grad():
                table.copy_(values.reshape(table.shape))
        return layer.double(), table

    sizes = (3, 5, 4, 9), (2, 7, 6, 7), (6, 2, 3, 8), (1, 4, 5, 6), (4, 4, 3, 5), (8, 3, 2, 4)
    for batch, n, d_model, max_length in sizes:
        with see.probe(f"max_length {max_length}, x of shape ({batch}, {n}, {d_model})"):
            layer, table = made(max_length, d_model)
            see.call("the output", layer, see.randn(batch, n, d_model))
            x = see.randn(batch, n, d_model, requires_grad=True)
            out = layer(x)
            see("the output when x requires a gradient", out)
            grads = see.randn(*out.shape)
            gradients = torch.autograd.grad(out, (x, table), grads, allow_unused=True)
            see("gradient of x", gradients[0])
            learned = gradients[1]
            see("gradient of the table", learned if learned is None else learned.reshape(-1))
    with see.probe("evaluation mode, max_length 7, x of shape (2, 5, 3)"):
        layer, _ = made(7, 3)
        see.call("the output", layer.eval(), see.randn(2, 5, 3))
    with see.probe("one layer for four calls, max_length 9, x of several lengths"):
        layer, table = made(9, 3)
        see.call("the output", layer, see.randn(2, 4, 3))
        see.call("the output for 2 tokens", layer, see.randn(3, 2, 3))
        see.call("the output for 7 tokens", layer, see.randn(2, 7, 3))
        with torch.no_grad():
            table.mul_(-2)  # as a step of an optimizer would
        see.call("the output after its table has changed", layer, see.randn(2, 4, 3))
    with see.probe("the same tokens in the order 2, 0, 3, 1, and the same sentence three times"):
        layer, _ = made(6, 4)
        sentence = see.randn(1, 4, 4)
        out, turned = layer(sentence), layer(sentence[:, [2, 0, 3, 1]])
        moved = (turned - out[:, [2, 0, 3, 1]]).abs().amax() > 1e-6
        see.fact("a token gets another vector at another place of its sentence", moved)
        thrice = layer(sentence.expand(3, 4, 4))
        equal = all(torch.allclose(one, thrice[0]) for one in thrice)
        see.fact("a sentence gets the same vectors wherever in the batch it is", equal)


class _OrderWith(reference.PositionalEncoding):
    """The table, of which a subclass takes its own piece."""

    def positions(self, x):
        return self.table[: x.shape[1]].transpose(0, 1)  # (1, n, d_model)

    def forward(self, x):
        return x + self.positions(x)


class _OrderBySample(_OrderWith):
    def positions(self, x):
        return self.table[: len(x)]


class _OrderNotTransposed(_OrderWith):
    def positions(self, x):
        return self.table[: x.size(1)]


class _OrderByFeatures(_OrderWith):
    def positions(self, x):
        return self.table[: x.size(2)]


class _OrderLastOnly(_OrderWith):
    def positions(self, x):
        return self.table[x.size(1) - 1]


class _OrderFirstOnly(_OrderWith):
    def positions(self, x):
        return self.table[0]


class _OrderReversed(_OrderWith):
    def positions(self, x):
        return super().positions(x).flip(1)


class _OrderWholeTable(_OrderWith):
    def positions(self, x):
        return self.table.transpose(0, 1)


class _OrderFromTheEnd(_OrderWith):
    def positions(self, x):
        return self.table[-x.shape[1] :].transpose(0, 1)


class _OrderFromOne(_OrderWith):
    def positions(self, x):
        return self.table[1 : x.shape[1] + 1].transpose(0, 1)


class _OrderCountsOn(_OrderWith):
    def positions(self, x):
        return self.table[: x.shape[0] * x.shape[1]].reshape(x.shape)


class _OrderRunningCount(_OrderWith):
    def positions(self, x):
        start = getattr(self, "count", 0)
        self.count = start + x.shape[1]
        return self.table[start : self.count].transpose(0, 1)


class _OrderCopiedOnce(_OrderWith):
    def positions(self, x):
        if not hasattr(self, "rows"):
            self.rows = self.table[:, 0] + 0
        return self.rows[: x.shape[1]]


class _OrderFrozen(reference.PositionalEncoding):
    def __init__(self, max_length, d_model):
        super().__init__(max_length, d_model)
        self.table.requires_grad_(False)


class _OrderBoth(_OrderWith):
    def positions(self, x):
        return self.table[: x.size(0)] + super().positions(x)


class _OrderSummed(_OrderWith):
    def positions(self, x):
        return super().positions(x).sum(dim=1, keepdim=True)


class _OrderDetached(_OrderWith):
    def positions(self, x):
        return super().positions(x).detach()


class _OrderConcatenated(_OrderWith):
    def forward(self, x):
        return torch.cat((x, self.positions(x).expand_as(x)), dim=-1)


class _OrderMultiplied(_OrderWith):
    def forward(self, x):
        return x * self.positions(x)


class _OrderPositionsAlone(_OrderWith):
    def forward(self, x):
        return self.positions(x).expand_as(x)


class _OrderBatchSecond(_OrderWith):
    def forward(self, x):
        x = x.transpose(0, 1)
        return x + self.table[: x.size(0)]


class _OrderViewed(_OrderWith):
    def forward(self, x):
        batch, n, d_model = x.shape
        return (x.reshape(n, batch, d_model) + self.table[:n]).reshape(batch, n, d_model)


class _OrderScaled(_OrderWith):
    def forward(self, x):
        return x * x.shape[-1] ** 0.5 + self.positions(x)


class _OrderInTraining(_OrderWith):
    def forward(self, x):
        return super().forward(x) if self.training else x


class _OrderInPlace(_OrderWith):
    def forward(self, x):
        x += self.positions(x)
        return x


class _OrderNotLearned(_OrderWith):
    def __init__(self, max_length, d_model):
        super().__init__(max_length, d_model)
        del self.table
        self.table = torch.randn(max_length, 1, d_model)


class _OrderDrawnInForward(_OrderWith):
    def positions(self, x):
        return torch.randn(x.shape[1], x.shape[2], dtype=x.dtype)


class _OrderTableOfRows(nn.Module):
    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(max_length, d_model))

    def forward(self, x):
        return x + self.table[: x.size(-2)]


class _OrderEmbedding(nn.Module):
    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Embedding(max_length, d_model)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1], device=x.device))


class _OrderBatchFirst(nn.Module):
    def __init__(self, max_length, d_model, scale=0.02):
        super().__init__()
        self.positions = nn.Parameter(scale * torch.randn(1, max_length, d_model))

    def forward(self, x):
        if x.shape[1] > self.positions.shape[1]:
            raise ValueError("longer than the table")
        return torch.stack([sample + self.positions[0, : len(sample)] for sample in x])


class _OrderTurned(_OrderWith):
    def forward(self, x):
        x = x.transpose(0, 1)
        return (x + self.table[: x.size(0)]).transpose(0, 1)


class _OrderSqueezed(_OrderWith):
    def positions(self, x):
        return self.table.squeeze(1)[: x.shape[1]].expand(x.shape)


FIX_ORDER_BLINDNESS = Exercise(
    slug="fix_order_blindness",
    chapter=3,
    title="Find the bug: an encoder that does not see the order",
    minutes=10,
    difficulty=2,
    reference=reference.PositionalEncoding,
    observe=_observe_positional_encoding,
    shipped=PositionalEncoding,
    symptom="All words of a sentence get the same vector, so that their order stays invisible, "
    "and the same sentence gets different ones in one batch: with a mean of -0.741 as its row 0, "
    "of -0.223 as its row 1.",
    misconceptions=(
        Misconception(
            "position_in_the_batch",  # museum F10
            _OrderBySample,
            "All tokens of a sentence still get the same vector: what is counted is the place of "
            "the sentence in the batch, not that of the token in the sentence. Look at which axis "
            "of x the length is taken from, and at which axis the table then lies along.",
        ),
        Misconception(
            "rows_along_the_batch_axis",
            _OrderNotTransposed,
            "You take as many rows as there are tokens now, and they still lie along axis 0, which "
            "is the batch. With another batch size this fails, or broadcasts to something larger; "
            "where batch and n agree it runs and is wrong. The rows have to lie along axis 1.",
        ),
        Misconception(
            "counted_by_features",
            _OrderByFeatures,
            "You take as many rows as a token has features. In x (batch, n, d_model) the tokens of "
            "a sentence are counted by axis 1.",
        ),
        Misconception(
            "one_row_for_all",
            _OrderLastOnly,
            "You take the one row with the number n − 1 and add it to every token. A slice, up to "
            "n, gives each token a row of its own.",
        ),
        Misconception(
            "first_row_for_all",
            _OrderFirstOnly,
            "You add the table's first row to every token of every sentence. The batch no longer "
            "matters, and the order does not either: each token needs the row of its position.",
        ),
        Misconception(
            "reversed",
            _OrderReversed,
            "You add the rows in reverse: the last token gets row 0. Then a token's row depends on "
            "the length of its sentence; position p gets row p.",
        ),
        Misconception(
            "whole_table",
            _OrderWholeTable,
            "You add the whole table, max_length rows. A sentence has n tokens, as a rule fewer: "
            "take the first n rows.",
        ),
        Misconception(
            "last_rows",
            _OrderFromTheEnd,
            "You take the last n rows of the table where the first n are meant. Then a token's "
            "row depends on the length of its sentence; position p gets row p.",
        ),
        Misconception(
            "positions_from_one",
            _OrderFromOne,
            "You start with row 1. Positions count from 0; besides, the longest sentence would "
            "need a row that is not there.",
        ),
        Misconception(
            "counted_on_through_the_batch",
            _OrderCountsOn,
            "Your count goes on from one sentence to the next, so that the same sentence gets "
            "other vectors at another place of the batch. Each sentence starts at position 0.",
        ),
        Misconception(
            "counted_on_from_call_to_call",
            _OrderRunningCount,
            "Your layer goes on counting from one call to the next. Each call holds whole "
            "sentences, which start at position 0.",
        ),
        Misconception(
            "rows_kept_from_the_first_call",
            _OrderCopiedOnce,
            "You compute the rows in the first call and keep them. The table is learned: after a "
            "step of the optimizer the kept rows are old, so take them anew in each call.",
        ),
        Misconception(
            "table_frozen",
            _OrderFrozen,
            "Your table is a parameter with requires_grad=False, which no training changes. The "
            "vectors of this layer are learned.",
        ),
        Misconception(
            "both",
            _OrderBoth,
            "You add the rows of the tokens' positions, and still those of the sentences' places "
            "in the batch as well. A sentence's vectors must not depend on what else is there.",
        ),
        Misconception(
            "rows_summed",
            _OrderSummed,
            "You add up the rows of all positions and add the sum to every token. All tokens then "
            "get the same vector, and the order is lost again.",
        ),
        Misconception(
            "table_gets_no_gradient",
            _OrderDetached,
            "The output is right, and the table is cut off from the graph. Its vectors are to be "
            "learned: they need their gradient.",
        ),
        Misconception(
            "concatenated",
            _OrderConcatenated,
            "You put the position's vector behind the token's. That doubles the features; here "
            "the two are added, so that the shape stays.",
        ),
        Misconception(
            "multiplied",
            _OrderMultiplied,
            "You multiply the token's vector by the position's. They are added.",
        ),
        Misconception(
            "positions_alone",
            _OrderPositionsAlone,
            "You return the positions' vectors alone: what the tokens are is lost. Add them to x.",
        ),
        Misconception(
            "axes_left_exchanged",
            _OrderBatchSecond,
            "You exchange the first two axes of x so that the table fits, and return the result "
            "that way. It has to come back as (batch, n, d_model).",
        ),
        Misconception(
            "reshaped_where_axes_should_be_exchanged",
            _OrderViewed,
            "You reshape x to (n, batch, d_model). That cuts the same numbers anew and exchanges "
            "no axes, so tokens of one sentence get rows that belong to another's.",
        ),
        Misconception(
            "scaled_by_the_root_of_d_model",
            _OrderScaled,
            "The positions are right, and x is multiplied by √d_model. The paper does that to its "
            "embeddings; this layer adds positions and nothing else.",
        ),
        Misconception(
            "in_training_mode_only",
            _OrderInTraining,
            "Your layer adds positions in training mode only. In evaluation mode the order is lost "
            "again: positions belong to what the layer computes, whatever the mode.",
        ),
        Misconception(
            "in_place",
            _OrderInPlace,
            "You add the positions into x itself. Whoever else holds that tensor finds other "
            "numbers in it, and autograd refuses it where x is a leaf that requires a gradient.",
        ),
        Misconception(
            "table_not_learned",
            _OrderNotLearned,
            "Your layer has no parameter: its table is a plain tensor, a buffer, or computed, so "
            "that no optimizer changes it. The vectors of this layer are learned.",
        ),
        Misconception(
            "drawn_in_forward",
            _OrderDrawnInForward,
            "You draw new vectors at every call, so that a position means something else each "
            "time. The table is made once and kept.",
        ),
    ),
    alternatives=(
        _OrderTableOfRows,
        _OrderEmbedding,
        _OrderBatchFirst,
        _OrderTurned,
        _OrderSqueezed,
    ),
    hints=(
        "Print `layer(x) - x` for a batch of two sentences. What differs from token to token, and "
        "what from sentence to sentence?",
        "x is (batch, n, d_model), and the table is (max_length, 1, d_model). Which size of x is "
        "the number of positions, and to which axis of x does the table's axis 0 have to go?",
        "Take the first x.size(1) rows, and exchange their first two axes before you add: "
        "(n, 1, d_model) has to become (1, n, d_model).",
    ),
)


# --- LayerNorm ----------------------------------------------------------------------------------


def _observe_layer_norm(LayerNorm, see):
    def made(d_model, **options):
        return _with_weights(see, LayerNorm(d_model, **options), ("weight", "bias"))

    def run(layer, x):
        x = x.detach().requires_grad_()
        out = see.call("the output", layer, x)
        see.gradients("the output", out, x=x, **_parameters(layer, ("weight", "bias")))

    with see.probe("a new layer for 6 features, x of shape (2, 3, 6)"):
        layer = LayerNorm(6)
        see.fact("what it makes is an nn.Module", isinstance(layer, nn.Module))
        see("its parameters", dict(sorted(layer.named_parameters())))
        out = layer.double()(3 * see.randn(2, 3, 6) + 1)
        see("the output", out)
    for shape in ((4, 3, 5), (6, 4), (2, 3, 4, 7), (8,)):
        with see.probe(f"x of shape {shape}, values around 2"):
            run(made(shape[-1]), 3 * see.randn(*shape) + 2)
    with see.probe("eps = 0.1, x of shape (3, 4, 6) with values of size 0.3"):
        run(made(6, eps=0.1), 0.3 * see.randn(3, 4, 6) - 0.2)
    with see.probe("x of shape (2, 3, 4), where all features of a token are equal"):
        run(made(4), see.randn(2, 3, 1).expand(2, 3, 4))
    with see.probe("x of shape (5, 3, 4), not contiguous"):
        run(made(4), (see.randn(5, 4, 3) + 1).transpose(1, 2))
    with see.probe("evaluation mode, x of shape (3, 2, 5)"):
        run(made(5).eval(), 2 * see.randn(3, 2, 5) + 1)
    with see.probe("float32, x of shape (4, 16) with values around 10,000"):
        layer = LayerNorm(16)
        out = layer(10_000 + see.randn(4, 16, dtype=torch.float32))
        see("the dtype of the output", out.dtype)
        out = out.double()
        off = (out.var(dim=-1, correction=0) - 1).abs().amax()
        see.fact("each token's features have variance 1, within 1 %", bool(off < 0.01))


class _LNWith(reference.LayerNorm):
    """Layer norm in pieces, of which a subclass changes one."""

    def mean(self, x):
        return x.mean(dim=-1, keepdim=True)

    def variance(self, x):
        return x.var(dim=-1, correction=0, keepdim=True)

    def normalise(self, x, mean, variance):
        return (x - mean) / torch.sqrt(variance + self.eps)

    def affine(self, x):
        return self.weight * x + self.bias

    def forward(self, x):
        return self.affine(self.normalise(x, self.mean(x), self.variance(x)))


class _LNUnbiased(_LNWith):
    def variance(self, x):
        return x.var(dim=-1, keepdim=True)


class _LNStdPlusEps(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / (x.std(dim=-1, keepdim=True) + self.eps)


class _LNEpsOutside(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / (variance.sqrt() + self.eps)


class _LNDeviationPlusEps(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / (x.std(dim=-1, correction=0, keepdim=True) + self.eps)


class _LNEpsTwice(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / (torch.sqrt(variance + self.eps) + self.eps)


class _LNSumOfSquares(_LNWith):
    def variance(self, x):
        return (x - self.mean(x)).square().sum(dim=-1, keepdim=True)


class _LNInFloat64(reference.LayerNorm):
    def forward(self, x):
        return super().forward(x.double())


class _LNNoEps(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / variance.sqrt()


class _LNFixedEps(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / torch.sqrt(variance + 1e-5)


class _LNEpsOfBert(reference.LayerNorm):
    def __init__(self, d_model, eps=1e-12):
        super().__init__(d_model, eps)


class _LNEpsSquared(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / torch.sqrt(variance + self.eps**2)


class _LNDetached(_LNWith):
    def normalise(self, x, mean, variance):
        return super().normalise(x, mean.detach(), variance.detach())


class _LNMeanDetached(_LNWith):
    def normalise(self, x, mean, variance):
        return super().normalise(x, mean.detach(), variance)


class _LNVarianceDetached(_LNWith):
    def normalise(self, x, mean, variance):
        return super().normalise(x, mean, variance.detach())


class _LNNotCentred(_LNWith):
    def normalise(self, x, mean, variance):
        return x / torch.sqrt(variance + self.eps)


class _LNRootMeanSquare(_LNWith):
    def normalise(self, x, mean, variance):
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)


class _LNMeanSquareForVariance(_LNWith):
    def variance(self, x):
        return x.pow(2).mean(dim=-1, keepdim=True)


class _LNDifferenceOfSquares(_LNWith):
    def variance(self, x):
        return x.pow(2).mean(dim=-1, keepdim=True) - self.mean(x) ** 2


class _LNMeanOnly(_LNWith):
    def normalise(self, x, mean, variance):
        return x - mean


class _LNByVariance(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / (variance + self.eps)


class _LNAbsoluteDeviation(_LNWith):
    def normalise(self, x, mean, variance):
        return (x - mean) / ((x - mean).abs().mean(dim=-1, keepdim=True) + self.eps)


class _LNAlong(_LNWith):
    """Statistics along other axes."""

    def axes(self, x):
        raise NotImplementedError

    def mean(self, x):
        return x.mean(dim=self.axes(x), keepdim=True)

    def variance(self, x):
        return x.var(dim=self.axes(x), correction=0, keepdim=True)


class _LNOverSentence(_LNAlong):
    def axes(self, x):
        return tuple(range(1, x.ndim)) or (0,)


class _LNOverAllButFirst(_LNAlong):
    def axes(self, x):
        return tuple(range(1, x.ndim))


class _LNOverLastTwo(_LNAlong):
    def axes(self, x):
        return -2, -1


class _LNOverLastTwoIfAny(_LNAlong):
    def axes(self, x):
        return tuple(range(x.ndim))[-2:]


class _LNOverOneAndTwo(_LNAlong):
    def axes(self, x):
        return 1, 2


class _LNOverShape(reference.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[1:], eps=self.eps) * self.weight + self.bias


class _LNOverFlattened(reference.LayerNorm):
    def forward(self, x):
        flat = x.flatten(1)
        shape = len(x), *[1] * (x.ndim - 1)
        mean, variance = flat.mean(1).view(shape), flat.var(1, correction=0).view(shape)
        return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


class _LNOverAll(_LNAlong):
    def axes(self, x):
        return tuple(range(x.ndim))


class _LNOverBatch(_LNAlong):
    def axes(self, x):
        return (0,)


class _LNLikeBatchNorm(_LNAlong):
    def axes(self, x):
        return tuple(range(x.ndim - 1))


class _LNOverFirstTwo(_LNAlong):
    def axes(self, x):
        return 0, 1


class _LNByBatchNorm(reference.LayerNorm):
    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        statistics = None, None  # none are kept
        return F.batch_norm(flat, *statistics, self.weight, self.bias, True, 0.1, self.eps).view(
            x.shape
        )


class _LNOverTokens(_LNAlong):
    def axes(self, x):
        return (-2,)


class _LNThirdAxis(_LNAlong):
    def axes(self, x):
        return (2,)


class _LNSecondAxis(_LNAlong):
    def axes(self, x):
        return (1,)


class _LNNoKeepdim(_LNWith):
    def mean(self, x):
        return x.mean(dim=-1)

    def variance(self, x):
        return x.var(dim=-1, correction=0)


class _LNNoAffine(_LNWith):
    def affine(self, x):
        return x


class _LNShiftedFirst(_LNWith):
    def affine(self, x):
        return self.weight * (x + self.bias)


class _LNNoShift(_LNWith):
    def affine(self, x):
        return self.weight * x


class _LNScaleFirst(_LNWith):
    def forward(self, x):
        x = self.weight * x + self.bias
        return self.normalise(x, self.mean(x), self.variance(x))


class _LNOnePlusWeight(_LNWith):
    def affine(self, x):
        return (1 + self.weight) * x + self.bias


class _LNWeightsRandom(reference.LayerNorm):
    def __init__(self, d_model, eps=1e-5):
        super().__init__(d_model, eps)
        nn.init.normal_(self.weight)


class _LNWeightsZero(reference.LayerNorm):
    def __init__(self, d_model, eps=1e-5):
        super().__init__(d_model, eps)
        nn.init.zeros_(self.weight)


class _LNPlainTensors(reference.LayerNorm):
    def __init__(self, d_model, eps=1e-5):
        super().__init__(d_model, eps)
        del self.weight, self.bias
        self.weight, self.bias = torch.ones(d_model), torch.zeros(d_model)


class _LNScalars(reference.LayerNorm):
    def __init__(self, d_model, eps=1e-5):
        super().__init__(d_model, eps)
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))


class _LNOnlyInTraining(reference.LayerNorm):
    def forward(self, x):
        return super().forward(x) if self.training else self.weight * x + self.bias


class _LNInPlace(_LNWith):
    def normalise(self, x, mean, variance):
        x -= mean
        return x / torch.sqrt(variance + self.eps)


class _LNFunctional(reference.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _LNFromTorch(nn.LayerNorm):
    pass


class _LNByHand(nn.Module):
    def __init__(self, d_model, eps=1e-5, device=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon, self.d_model = eps, d_model

    def forward(self, x):
        centred = x - x.sum(-1, keepdim=True) / self.d_model
        squares = torch.einsum("...d,...d->...", centred, centred) / self.d_model
        return torch.addcmul(
            self.bias, centred * torch.rsqrt(squares + self.epsilon).unsqueeze(-1), self.weight
        )


class _LNTokenByToken(reference.LayerNorm):
    def forward(self, x):
        rows = [row - row.mean() for row in x.reshape(-1, x.shape[-1])]
        rows = [row / ((row * row).mean() + self.eps) ** 0.5 for row in rows]
        return torch.stack(rows).view_as(x) * self.weight + self.bias


LAYER_NORM = Exercise(
    slug="layer_norm",
    chapter=3,
    title="Layer normalisation",
    minutes=15,
    difficulty=2,
    reference=reference.LayerNorm,
    observe=_observe_layer_norm,
    misconceptions=(
        Misconception(
            "unbiased_variance",  # museum 3.24, museum §5
            _LNUnbiased,
            "Your variance divides by d_model − 1, torch's default. Layer norm divides by d_model: "
            "nothing is estimated here, these features are all there are.",
        ),
        Misconception(
            "unbiased_deviation_plus_eps",  # museum 3.24, museum §5
            _LNStdPlusEps,
            "You divide by the unbiased standard deviation plus eps. A much copied page does so; "
            "the paper and torch take the variance that divides by d_model, and eps goes under "
            "the root with it.",
        ),
        Misconception(
            "eps_outside_the_root",  # museum §5
            _LNEpsOutside,
            "You add eps to the standard deviation. It belongs under the root, with the variance; "
            "where the features of a token are all equal the slope of your root is infinite, and "
            "the gradient is NaN.",
        ),
        Misconception(
            "deviation_plus_eps",  # museum §5
            _LNDeviationPlusEps,
            "You add eps to the standard deviation. It belongs under the root, added to the "
            "variance: the two differ most where a token's features are nearly equal.",
        ),
        Misconception(
            "eps_twice",
            _LNEpsTwice,
            "You add eps in two places, under the root and behind it. Under the root is enough.",
        ),
        Misconception(
            "sum_of_squares",
            _LNSumOfSquares,
            "You add up the squares of the distances from the mean and do not divide by d_model: "
            "the variance is their mean.",
        ),
        Misconception(
            "float64_returned",
            _LNInFloat64,
            "You compute in float64 and return it so. A float32 x should give a float32 result: "
            "otherwise every layer behind it computes in float64, or fails.",
        ),
        Misconception(
            "no_eps",  # museum §5
            _LNNoEps,
            "You never use eps. A token whose features are all equal is then 0/0: NaN.",
        ),
        Misconception(
            "eps_fixed",
            _LNFixedEps,
            "You write 1e-5 where the constructor's `eps` belongs, so that no other value has an "
            "effect. BERT, for one, uses 1e-12.",
        ),
        Misconception(
            "eps_of_bert_as_default",
            _LNEpsOfBert,
            "Your default for eps is 1e-12, BERT's. Here it is 1e-5, torch's; BERT's own is "
            "handed over where BERT is loaded.",
        ),
        Misconception(
            "eps_squared",
            _LNEpsSquared,
            "You square eps before you add it to the variance. It is added as it is.",
        ),
        Misconception(
            "statistics_detached",  # museum §5
            _LNDetached,
            "Your output is right, and its gradient takes mean and variance for constants. Both "
            "depend on x: a change of one feature moves them, and with them all other features.",
        ),
        Misconception(
            "mean_detached",  # museum §5
            _LNMeanDetached,
            "Your output is right, and its gradient takes the mean for a constant. It depends on "
            "x: a change of one feature moves it, and with it all other features.",
        ),
        Misconception(
            "variance_detached",  # museum §5
            _LNVarianceDetached,
            "Your output is right, and its gradient takes the variance for a constant. It depends "
            "on x as the mean does.",
        ),
        Misconception(
            "mean_not_subtracted",  # museum 3.24
            _LNNotCentred,
            "You divide by the deviation and do not subtract the mean. The features of a token "
            "should have mean 0 before `weight` and `bias` act on them.",
        ),
        Misconception(
            "root_mean_square",  # museum 3.24
            _LNRootMeanSquare,
            "You divide by the root of the mean square, without subtracting the mean. That is "
            "RMSNorm, which newer models use and which has no bias; layer norm subtracts the mean "
            "first.",
        ),
        Misconception(
            "mean_square_for_variance",
            _LNMeanSquareForVariance,
            "You subtract the mean from the features and forget it in the variance, which is the "
            "mean square of what is left after the mean is gone. Yours is too large by mean².",
        ),
        Misconception(
            "difference_of_squares",
            _LNDifferenceOfSquares,
            "You take the variance as the mean of the squares minus the square of the mean. On "
            "paper that is the same; in float32, with values around 10,000, it subtracts two "
            "numbers around 100,000,000 whose difference is 1, and nothing of it is left.",
        ),
        Misconception(
            "only_the_mean",
            _LNMeanOnly,
            "You subtract the mean and do not divide by the deviation. The features of a token "
            "should have variance 1 before `weight` and `bias` act on them.",
        ),
        Misconception(
            "divided_by_the_variance",
            _LNByVariance,
            "You divide by the variance. Its root, the standard deviation, is what brings a token "
            "to variance 1.",
        ),
        Misconception(
            "mean_absolute_deviation",
            _LNAbsoluteDeviation,
            "You divide by the mean distance from the mean. The standard deviation is the root of "
            "the mean squared distance.",
        ),
        *(
            Misconception(
                slug,
                implementation,
                "You take one mean and one variance over more than one axis, for a whole sentence "
                "where x is (batch, n, d_model). Then a token depends on its neighbours, padding "
                "among them; each token has its own, over its features alone.",
            )
            for slug, implementation in (  # museum 3.24: they differ in how they fail elsewhere
                ("over_the_sentence", _LNOverSentence),
                ("over_all_axes_but_the_first", _LNOverAllButFirst),
                ("over_the_last_two_axes", _LNOverLastTwo),
                ("over_the_last_two_axes_if_any", _LNOverLastTwoIfAny),
                ("over_axes_1_and_2", _LNOverOneAndTwo),
                ("over_the_shape_of_a_sentence", _LNOverShape),
                ("over_a_flattened_sentence", _LNOverFlattened),
            )
        ),
        Misconception(
            "over_everything",  # museum 3.24
            _LNOverAll,
            "You take one mean and one variance over the whole batch. Each token has its own, over "
            "its features alone.",
        ),
        Misconception(
            "over_the_batch",  # museum 3.24
            _LNOverBatch,
            "You take the statistics along axis 0, over the samples, so that what comes out for "
            "one depends on the others. Layer norm takes them over the features of a token.",
        ),
        Misconception(
            "like_batch_norm",  # museum 3.24
            _LNLikeBatchNorm,
            "You normalise each feature over all tokens of the batch, which is batch norm. Layer "
            "norm is the other way round: each token, over its features.",
        ),
        Misconception(
            "like_batch_norm_in_three_axes",  # museum 3.24
            _LNOverFirstTwo,
            "You reduce axes 0 and 1, batch and tokens where x has three axes, which is batch "
            "norm. Layer norm is the other way round: each token, over its features, however many "
            "axes stand before them.",
        ),
        Misconception(
            "by_torchs_batch_norm",  # museum 3.24
            _LNByBatchNorm,
            "You call F.batch_norm, which normalises each feature over all tokens, and cannot do "
            "it for a single one. Layer norm is the other way round: each token, over its "
            "features.",
        ),
        Misconception(
            "over_the_tokens",  # museum 3.24
            _LNOverTokens,
            "You normalise each feature over the tokens of its sentence. Layer norm looks at one "
            "token at a time, over its features.",
        ),
        Misconception(
            "always_the_third_axis",
            _LNThirdAxis,
            "You reduce axis 2, which holds the features only where x has three axes. x may have "
            "any number of them: the features are the last.",
        ),
        Misconception(
            "always_the_second_axis",
            _LNSecondAxis,
            "You reduce axis 1, which holds the features only where x has two axes. x may have any "
            "number of them: the features are the last.",
        ),
        Misconception(
            "reduced_axis_dropped",
            _LNNoKeepdim,
            "Your mean or your variance loses the last axis, so that it no longer lines up with "
            "x: it fails to broadcast, or broadcasts along the wrong axis. Keep it, with size 1.",
        ),
        Misconception(
            "no_weight_and_bias",
            _LNNoAffine,
            "You normalise and stop. The result is scaled by `weight` and shifted by `bias`, "
            "feature by feature.",
        ),
        Misconception(
            "shifted_before_scaling",
            _LNShiftedFirst,
            "You add `bias` first and then multiply by `weight`, so that the bias is scaled too. "
            "Scale first, shift afterwards.",
        ),
        Misconception(
            "bias_not_added",
            _LNNoShift,
            "You scale by `weight` and never add `bias`, so that it gets no "
            "gradient and is never learned.",
        ),
        Misconception(
            "normalised_after_weight_and_bias",
            _LNScaleFirst,
            "You apply `weight` and `bias` to x and normalise afterwards, which takes back part of "
            "what they did. They come after the normalising.",
        ),
        Misconception(
            "one_plus_weight",
            _LNOnePlusWeight,
            "You multiply by 1 + weight. The weight starts at one and is the factor itself.",
        ),
        Misconception(
            "weight_starts_random",
            _LNWeightsRandom,
            "Your weight starts with random numbers. It starts with ones, and the bias with zeros, "
            "so that a new layer normalises and does nothing else.",
        ),
        Misconception(
            "weight_starts_at_0",
            _LNWeightsZero,
            "Your weight starts with zeros, so that a new layer returns zeros whatever it is given."
            " It starts with ones.",
        ),
        Misconception(
            "plain_tensors",
            _LNPlainTensors,
            "Your weight and bias are not parameters, so that no optimizer finds them and they are "
            "never learned.",
        ),
        Misconception(
            "one_weight_for_all",
            _LNScalars,
            "You have one weight and one bias for all features. Each feature has its own: both "
            "have the shape (d_model,).",
        ),
        Misconception(
            "only_in_training_mode",
            _LNOnlyInTraining,
            "Your layer normalises in training mode only. Layer norm, unlike batch norm and "
            "dropout, does the same in both modes.",
        ),
        Misconception(
            "in_place",
            _LNInPlace,
            "You subtract the mean from x in place. The residual connection of a block uses "
            "the same tensor, and autograd refuses it where x is a leaf that requires a gradient.",
        ),
    ),
    alternatives=(_LNFunctional, _LNFromTorch, _LNByHand, _LNTokenByToken),
    hints=(
        "Each token has its own mean and variance, over its features: over which axis do you "
        "reduce, however many axes x has?",
        "`x.mean(dim=-1, keepdim=True)` keeps an axis of size 1, so that it broadcasts. "
        "`x.var(dim=-1, correction=0, keepdim=True)` divides by d_model.",
        "weight · (x − mean) / √(variance + eps) + bias, with weight = nn.Parameter(torch.ones("
        "d_model)) and bias = nn.Parameter(torch.zeros(d_model)).",
    ),
    rtol=1e-7,
    atol=1e-7,
)


# --- FeedForward --------------------------------------------------------------------------------

_FF_PARAMETERS = _linear("expand", "contract")


def _observe_feed_forward(FeedForward, see):
    for d_model, d_ff, shape in ((4, 10, (2, 3, 4)), (5, 3, (7, 5)), (6, 6, (2, 1, 3, 6))):
        with see.probe(f"FeedForward({d_model}, {d_ff}), x of shape {shape}"):
            layer = _with_weights(see, FeedForward(d_model, d_ff), _FF_PARAMETERS)
            x = see.randn(*shape, requires_grad=True)
            out = see.call("the output", layer, x)
            see.gradients("the output", out, x=x, **_parameters(layer, _FF_PARAMETERS))
    with see.probe("the same token at five positions of FeedForward(3, 7)"):
        layer = _with_weights(see, FeedForward(3, 7), _FF_PARAMETERS)
        out = layer(see.randn(2, 1, 3).expand(2, 5, 3))
        alike = torch.allclose(out, out[:, :1].expand(2, 5, 3))
        see.fact("a token gives the same vector at every position", alike)
    with see.probe("FeedForward(4, 9) in evaluation mode, x of shape (3, 5, 4), not contiguous"):
        layer = _with_weights(see, FeedForward(4, 9), _FF_PARAMETERS).eval()
        see.call("the output", layer, see.randn(3, 4, 5).transpose(1, 2))


class _FFWith(reference.FeedForward):
    """The two layers, joined by a subclass in its own way."""

    def activation(self, x):
        return F.gelu(x)

    def forward(self, x):
        return self.contract(self.activation(self.expand(x)))


class _FFLinear(_FFWith):
    def activation(self, x):
        return x


class _FFRelu(_FFWith):
    def activation(self, x):
        return F.relu(x)


class _FFTanhGelu(_FFWith):
    def activation(self, x):
        return F.gelu(x, approximate="tanh")


class _FFSigmoidGelu(_FFWith):
    def activation(self, x):
        return x * torch.sigmoid(1.702 * x)


class _FFSilu(_FFWith):
    def activation(self, x):
        return F.silu(x)


class _FFSoftmax(_FFWith):
    def activation(self, x):
        return x.softmax(dim=-1)


class _FFProbabilityOnly(_FFWith):
    def activation(self, x):
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


class _FFErfWithoutRoot(_FFWith):
    def activation(self, x):
        return 0.5 * x * (1 + torch.erf(x))


class _FFDropout(_FFWith):
    def activation(self, x):
        return F.dropout(F.gelu(x), 0.1, self.training)


class _FFModuleMisused(_FFWith):
    def activation(self, x):
        return nn.GELU(x)


class _FFDetached(_FFWith):
    def activation(self, x):
        return F.gelu(x).detach()


class _FFInTraining(_FFWith):
    def activation(self, x):
        return F.gelu(x) if self.training else x


class _FFActivationOnOutput(reference.FeedForward):
    def forward(self, x):
        return F.gelu(self.contract(self.expand(x)))


class _FFActivationTwice(reference.FeedForward):
    def forward(self, x):
        return F.gelu(self.contract(F.gelu(self.expand(x))))


class _FFActivationFirst(reference.FeedForward):
    def forward(self, x):
        return self.contract(self.expand(F.gelu(x)))


class _FFResidual(reference.FeedForward):
    def forward(self, x):
        return x + super().forward(x)


class _FFAllAlike(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_model, d_ff)
        nn.init.zeros_(self.contract.weight)


class _FFTwoGelus(_FFWith):
    def activation(self, x):
        return F.gelu(F.gelu(x))


class _FFErfWithoutHalf(_FFWith):
    def activation(self, x):
        return x * (1 + torch.erf(x / math.sqrt(2)))


class _FFTanh(_FFWith):
    def activation(self, x):
        return x.tanh()


class _FFSequence(reference.FeedForward):
    """Mixes the tokens of a sentence."""

    def forward(self, x):
        return super().forward(x.mean(dim=-2, keepdim=True).expand_as(x))


class _FFTied(reference.FeedForward):
    def forward(self, x):
        return F.linear(F.gelu(self.expand(x)), self.expand.weight.T, self.contract.bias)


class _FFOneMatrixTwice(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff)

    def forward(self, x):
        return self.expand(F.gelu(self.expand(x)))


class _FFExpandUsedTwice(reference.FeedForward):
    def forward(self, x):
        return self.expand(F.gelu(self.expand(x)))


class _FFPerPosition(nn.Module):
    def __init__(self, d_model, d_ff, max_length=16):
        super().__init__()
        self.layers = nn.ModuleList(reference.FeedForward(d_model, d_ff) for _ in range(max_length))

    def forward(self, x):
        positions = range(x.shape[-2])
        return torch.stack([self.layers[p](x[..., p, :]) for p in positions], dim=-2)


class _FFPositionBias(reference.FeedForward):
    def __init__(self, d_model, d_ff, max_length=16):
        super().__init__(d_model, d_ff)
        self.shift = nn.Parameter(torch.randn(max_length, d_ff))

    def forward(self, x):
        return self.contract(F.gelu(self.expand(x) + self.shift[: x.shape[-2]]))


class _FFFourTimes(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_model, 4 * d_model)


class _FFSizesSwapped(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_ff, d_model)


class _FFNamesSwapped(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.contract = nn.Linear(d_model, d_ff)
        self.expand = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.expand(F.gelu(self.contract(x)))


class _FFNoBias(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff, bias=False)
        self.contract = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x):
        return self.contract(F.gelu(self.expand(x)))


class _FFNormToo(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_model, d_ff)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x):
        return self.norm(x + super().forward(x))


class _FFGated(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_model, d_ff)
        self.gate = nn.Linear(d_model, d_ff)

    def forward(self, x):
        return self.contract(F.gelu(self.gate(x)) * self.expand(x))


class _FFThreeLayers(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_model, d_ff)
        self.hidden = nn.Linear(d_ff, d_ff)

    def forward(self, x):
        return self.contract(F.gelu(self.hidden(F.gelu(self.expand(x)))))


def _ff_sequential(d_model, d_ff):
    layers = nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model)
    return nn.Sequential(OrderedDict(zip(("expand", "gelu", "contract"), layers, strict=True)))


class _FFByErf(nn.Module):
    def __init__(self, d_model, d_ff, bias=True):
        super().__init__()
        self.contract = nn.Linear(d_ff, d_model, bias)
        self.expand = nn.Linear(d_model, d_ff, bias)

    def forward(self, x):
        hidden = torch.einsum("...d,fd->...f", x, self.expand.weight) + self.expand.bias
        hidden = hidden * torch.special.ndtr(hidden)  # x · Φ(x)
        return torch.einsum("...f,df->...d", hidden, self.contract.weight) + self.contract.bias


class _FFTokenByToken(reference.FeedForward):
    def __init__(self, d_model, d_ff):
        super().__init__(d_model, d_ff)
        self.activation = nn.GELU()

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        out = [self.contract(self.activation(self.expand(token))) for token in tokens]
        return torch.stack(out).reshape(x.shape)


FEED_FORWARD = Exercise(
    slug="feed_forward",
    chapter=3,
    title="The feed-forward network",
    minutes=10,
    difficulty=1,
    reference=reference.FeedForward,
    observe=_observe_feed_forward,
    misconceptions=(
        Misconception(
            "no_activation",
            _FFLinear,
            "Nothing stands between your two layers, so they multiply out to one matrix, however "
            "wide d_ff is. GELU goes between them.",
        ),
        Misconception(
            "activation_on_the_output",
            _FFActivationOnOutput,
            "Your GELU comes after the second layer and none between the two, which multiply out "
            "to one matrix. It also cuts what the residual connection is given down to values "
            "above −0.17.",
        ),
        Misconception(
            "activation_on_the_output_too",
            _FFActivationTwice,
            "You apply GELU to the output as well. The block adds this output to x, and has to be "
            "able to lower x as well as to raise it: nothing follows the second layer.",
        ),
        Misconception(
            "activation_on_the_input",
            _FFActivationFirst,
            "Your GELU comes before the first layer, where it wipes out most of what is negative "
            "in x; the two layers behind it multiply out to one matrix.",
        ),
        Misconception(
            "relu",  # museum C3
            _FFRelu,
            "You use ReLU, as the first paper did. Here GELU is asked for, as in BERT, whose "
            "weights this network will be given: with ReLU they compute something else.",
        ),
        Misconception(
            "tanh_approximation",
            _FFTanhGelu,
            "You use the tanh approximation of GELU, as GPT-2 does. It is up to 0.0005 off the "
            "exact x · Φ(x), layer after layer, and BERT's weights were trained with the exact "
            "one, which is torch's default.",
        ),
        Misconception(
            "sigmoid_approximation",
            _FFSigmoidGelu,
            "You use the approximation x · σ(1.702x). It is up to 0.02 off the exact x · Φ(x), "
            "which is asked for.",
        ),
        Misconception(
            "silu",
            _FFSilu,
            "You use x · σ(x), which is SiLU. It resembles GELU and is up to 0.2 off; GELU "
            "multiplies x by Φ(x), the normal distribution function.",
        ),
        Misconception(
            "softmax_between",
            _FFSoftmax,
            "You use softmax between the layers. It makes the hidden values of a token compete for "
            "a sum of 1, as attention weights do; GELU acts on each value alone.",
        ),
        Misconception(
            "factor_x_forgotten",
            _FFProbabilityOnly,
            "You compute Φ(x) and forget the factor x: GELU is x · Φ(x). Yours only lies between "
            "0 and 1, as a sigmoid does.",
        ),
        Misconception(
            "erf_without_the_root",
            _FFErfWithoutRoot,
            "You pass x to erf where x / √2 belongs. Φ(x) = (1 + erf(x / √2)) / 2.",
        ),
        Misconception(
            "tied_matrix",  # museum F9, museum C3
            _FFTied,
            "Your second layer uses the first one's matrix, transposed, and `contract.weight` is "
            "never used. Two matrices are needed: fitting y = −|x|, one tied matrix ends with a "
            "mean squared error of 0.34 where two reach 0.00006.",
        ),
        Misconception(
            "expand_used_twice",  # museum F9, museum C3
            _FFExpandUsedTwice,
            "You send the values through `expand` twice and never through `contract`. That fails "
            "unless d_ff equals d_model, and there it ties the two matrices to be one.",
        ),
        Misconception(
            "only_one_layer",  # museum F9, museum C3
            _FFOneMatrixTwice,
            "You have a single linear layer and use it twice. There are two, with weights of their "
            "own: `expand`, d_model → d_ff, and `contract`, d_ff → d_model.",
        ),
        Misconception(
            "weights_for_each_position",  # museum C4
            _FFPerPosition,
            "You have a network of its own for each position. The same weights act on every "
            "token: so the number of parameters does not grow with n, and a sentence may be of any "
            "length.",
        ),
        Misconception(
            "shift_for_each_position",  # museum C4
            _FFPositionBias,
            "You add a learned vector for the position inside. All positions are treated alike "
            "here; telling them apart is the work of the positions added to the embeddings.",
        ),
        Misconception(
            "tokens_mixed",  # museum C4
            _FFSequence,
            "You average the tokens before the layers. Each token goes through alone: mixing them "
            "is attention's work.",
        ),
        Misconception(
            "always_four_times_as_wide",
            _FFFourTimes,
            "You make the hidden layer 4 · d_model wide, whatever `d_ff` says. Four times is the "
            "paper's choice; the argument decides.",
        ),
        Misconception(
            "sizes_exchanged",
            _FFSizesSwapped,
            "You exchanged d_model and d_ff, so that your network takes d_ff features. x has "
            "d_model: `expand` takes those.",
        ),
        Misconception(
            "names_exchanged",
            _FFNamesSwapped,
            "Your two layers have exchanged names. `expand` comes first and goes from d_model to "
            "d_ff; the names matter where weights are loaded.",
        ),
        Misconception(
            "no_bias",
            _FFNoBias,
            "Your layers have no bias. Both have one, which nn.Linear has unless told otherwise.",
        ),
        Misconception(
            "residual_inside",
            _FFResidual,
            "You add x to the output. The residual connection belongs to the encoder block, which "
            "would add x a second time.",
        ),
        Misconception(
            "norm_inside",
            _FFNormToo,
            "You put the residual connection and the norm inside. Both belong to the encoder "
            "block: this network is the two layers alone.",
        ),
        Misconception(
            "gated",
            _FFGated,
            "You added a third matrix that gates the hidden values, as newer models do. The "
            "network asked for has two layers.",
        ),
        Misconception(
            "three_layers",
            _FFThreeLayers,
            "Your network has a third layer in the middle. It has two: one that expands and one "
            "that contracts.",
        ),
        Misconception(
            "dropout_inside",
            _FFDropout,
            "You drop out hidden values in training mode. Dropout is the block's work, on the "
            "output of each sub-layer; here nothing is random.",
        ),
        Misconception(
            "activation_in_training_mode_only",
            _FFInTraining,
            "Your network has its GELU in training mode only. In evaluation mode its layers "
            "multiply out to one matrix.",
        ),
        Misconception(
            "gelu_module_misused",
            _FFModuleMisused,
            "You write `nn.GELU(x)`. That makes a layer and computes nothing; call a layer that "
            "is made already, `nn.GELU()(x)`, or the function, `F.gelu(x)`.",
        ),
        Misconception(
            "gelu_twice_between",
            _FFTwoGelus,
            "You apply GELU twice between the layers, perhaps once as a layer and once as a "
            "function. Once is what BERT's weights were trained with.",
        ),
        Misconception(
            "erf_without_the_half",
            _FFErfWithoutHalf,
            "You forget the half: Φ(x) is (1 + erf(x / √2)) / 2. Your hidden values are twice "
            "those of GELU.",
        ),
        Misconception(
            "tanh",
            _FFTanh,
            "You use tanh between the layers, which squeezes every value between −1 and 1. GELU is "
            "asked for; its approximation contains a tanh, and is more than that.",
        ),
        Misconception(
            "weights_all_alike",
            _FFAllAlike,
            "In one of your layers all weights start with the same number, so that its features "
            "all compute the same. nn.Linear draws its weights at random: leave them as drawn.",
        ),
        Misconception(
            "graph_cut",
            _FFDetached,
            "Your output is right, and between the two layers the values are cut off from the "
            "graph: neither x nor `expand` receives a gradient.",
        ),
    ),
    alternatives=(_ff_sequential, _FFByErf, _FFTokenByToken),
    hints=(
        "An nn.Linear acts on the last axis, whatever stands before it: it treats every token "
        "alike without further ado.",
        "Two layers, `expand` from d_model to d_ff and `contract` from d_ff to d_model, and "
        "between them F.gelu as it is by default.",
        "forward: expand, F.gelu, contract; nothing after it. The residual connection and the "
        "norm come with the block.",
    ),
)


# --- EncoderBlock -------------------------------------------------------------------------------

_BLOCK_PARAMETERS = _linear(
    *(f"attention.{name}" for name in ("query", "key", "value", "output")),
    *("norm1", "feed_forward.expand", "feed_forward.contract", "norm2"),
)


def _observe_encoder_block(EncoderBlock, see):
    def made(d_model, num_heads, d_ff, **options):
        return _filled(see, EncoderBlock(d_model, num_heads, d_ff, **options), _BLOCK_PARAMETERS)

    def run(block, shape, *mask):
        x = see.randn(*shape, requires_grad=True)
        torch.manual_seed(0)  # whatever was drawn when the block was made
        out = see.call("the output", block, x, *mask)
        learned = {} if mask else _parameters(block, _BLOCK_PARAMETERS)
        see.gradients("the output", out, x=x, **learned)

    orders = ("post-norm", {}), ("pre-norm", {"norm_first": True})
    for order, options in orders:
        with see.probe(f"{order}: EncoderBlock(6, 3, 8), x of shape (2, 5, 6), no mask"):
            block = _with_weights(see, EncoderBlock(6, 3, 8, **options), _BLOCK_PARAMETERS)
            own = block.norm1.weight is not block.norm2.weight
            see.fact("norm1 and norm2 are two norms, with weights of their own", own)
            run(block, (2, 5, 6))
    for order, options in orders:  # tells many mistakes apart, so it comes early
        with see.probe(f"{order}: dropout = 1 in training mode, x of shape (4, 3, 6)"):
            block = made(6, 3, 8, dropout=1.0, **options)
            see.call("the output, with all of both sub-layers dropped", block, see.randn(4, 3, 6))
    for order, options in orders:
        with see.probe(f"{order}: x given without a gradient, shape (3, 4, 6)"):
            see.call("the output", made(6, 2, 10, **options), see.randn(3, 4, 6))
        with see.probe(f"{order}: mask for padding, x of shape (3, 5, 4)"):
            lengths = torch.tensor([5, 2, 3])
            run(made(4, 2, 7, **options), (3, 5, 4), reference.padding_mask(lengths, 5))
        with see.probe(f"{order}: eps = 0.5, causal mask, x of shape (3, 4, 6)"):
            run(made(6, 2, 5, eps=0.5, **options), (3, 4, 6), reference.causal_mask(4))
        with see.probe(f"{order}: one block for three calls: causal mask, no mask, n = 3"):
            block = made(6, 2, 7, **options)
            see.call("the output", block, see.randn(2, 4, 6), reference.causal_mask(4))
            see.call("the output of the second call, without a mask", block, see.randn(2, 4, 6))
            see.call("the output of the third call, with fewer tokens", block, see.randn(2, 3, 6))
    with see.probe("EncoderBlock(6, 2, 7, 0.0, True, 1e-3): arguments without their names"):
        block = _filled(see, EncoderBlock(6, 2, 7, 0.0, True, 1e-3), _BLOCK_PARAMETERS)
        see.call("the output", block, see.randn(2, 4, 6))
    with see.probe("a mask for every query, one query may look nowhere, x of shape (2, 3, 4)"):
        hidden = torch.tensor([[0], [2], [1]])  # how many keys are hidden from each query, less 1
        run(made(4, 2, 6), (2, 3, 4), see.rand(2, 1, 3, 3).argsort(-1) > hidden)
    for order, options in orders:
        with see.probe(f"{order}: dropout = 0.5 in evaluation mode, x of shape (4, 3, 6)"):
            block = made(6, 3, 8, dropout=0.5, **options).eval()
            torch.manual_seed(0)
            see.call("the output", block, see.randn(4, 3, 6))
        with see.probe(f"{order}: dropout = 0.3 in training mode, x of shape (5, 9, 4)"):
            block, x = made(4, 2, 6, dropout=0.3, **options), see.randn(5, 9, 4)
            out = block(x.clone())
            see("the output (its kind)", torch.zeros_like(out) + 0 * out.sum())
            see.fact("two calls in training mode differ", not torch.equal(block(x.clone()), out))
    sublayers = ("attention", "feed_forward.contract"), ("feed-forward", "attention.output")
    either = "each value is either dropped or divided by 0.7"
    scales = torch.tensor([0, 1 / 0.7], dtype=torch.float64)
    kept = torch.cartesian_prod(*[scales] * 4)[:, None, None]  # all cases: (16, 1, 1, 4)

    def draws(dropped):
        axes = "the samples of a batch", "the tokens of a sample", "the features of a token"
        for axis, what in enumerate(axes):
            share = dropped.double().mean(dim=axis)
            mixed = ((share > 0) & (share < 1)).any()
            see.fact(f"dropout: {what} have draws of their own", mixed)

    def without_dropout(block):
        """The reference's post-norm block, with the weights of `block`."""
        twin = reference.EncoderBlock(4, 2, 6).double()
        twin.load_state_dict(_parameters(block, _BLOCK_PARAMETERS))
        return twin

    for name, silenced in sublayers:
        with (
            see.probe(f"post-norm: dropout = 0.3 on what the {name} sub-layer adds"),
            torch.no_grad(),
        ):
            block, x = made(4, 2, 6, dropout=0.3), see.randn(6, 9, 4)
            for p in block.get_submodule(silenced).parameters():
                nn.init.zeros_(p)
            twin = without_dropout(block)
            if name == "attention":
                cases = twin.norm2(twin.norm1(x + kept * twin.attention(x)))
            else:
                y = twin.norm1(x)
                cases = twin.norm2(y + kept * twin.feed_forward(y))  # (16, batch, n, d_model)
            same = torch.isclose(block(x.clone()), cases, rtol=1e-6).all(-1)
            see.fact(either, same.any(0).all())
            draws(kept[same.int().argmax(0), 0, 0] == 0)
    for name, silenced in sublayers:
        with see.probe(f"pre-norm: dropout = 0.3 on what the {name} sub-layer adds"):
            block, x = made(8, 2, 12, dropout=0.3, norm_first=True), see.randn(15, 20, 8)
            for p in block.get_submodule(silenced).parameters():
                nn.init.zeros_(p)
            added, some = block.eval()(x.clone()) - x, block.train()(x.clone()) - x
            dropped = some.abs() < 1e-9
            scaled = torch.isclose(some, added / 0.7, rtol=1e-6, atol=1e-9)
            see.fact(either, (dropped | scaled).all())
            draws(dropped)
            share = dropped.double().mean()  # 5 sigma is 0.18 with a draw for each of 160 values
            see.fact("about 30 % of the values are dropped", bool((share - 0.3).abs() < 0.18))
    own = "the two sub-layers have draws of their own"
    with see.probe("post-norm: dropout = 0.3 on what both sub-layers add"), torch.no_grad():
        block, x = made(4, 2, 6, dropout=0.3), see.randn(3, 5, 4)
        twin = without_dropout(block)
        y = twin.norm1(x + kept * twin.attention(x))[:, None]  # (16, 1, batch, n, d_model)
        cases = twin.norm2(y + kept * twin.feed_forward(y))  # (16, 16, batch, n, d_model)
        same = torch.isclose(block(x.clone()), cases, rtol=1e-6).all(-1).flatten(0, 1)
        case = same.int().argmax(0)  # 16 · the case of attention + that of the feed-forward part
        see.fact(own, (case // 16 != case % 16).any())
    with see.probe("pre-norm: dropout = 0.3 on what both sub-layers add"), torch.no_grad():
        block, x = made(4, 2, 6, dropout=0.3, norm_first=True), see.randn(3, 5, 4)
        for name, size in (("attention.output", 1.0), ("feed_forward.contract", 10.0)):
            nn.init.zeros_(block.get_parameter(f"{name}.weight"))
            nn.init.constant_(block.get_parameter(f"{name}.bias"), size)
        added = block(x.clone()) - x  # 0 or 1 / 0.7, plus 0 or 10 / 0.7
        see.fact(own, ((added > 1) & (added < 15)).any())


class _EncWith(reference.EncoderBlock):
    """The block in pieces, of which a subclass changes one."""

    def attend(self, x, mask):
        return self.attention(x, mask)

    def around(self, x, sublayer, norm):
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))

    def forward(self, x, mask=None):
        x = self.around(x, lambda y: self.attend(y, mask), self.norm1)
        return self.around(x, self.feed_forward, self.norm2)


class _EncNoResidual(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return self.dropout(sublayer(norm(x)))
        return norm(self.dropout(sublayer(x)))


class _EncResidualOnce(_EncWith):
    """One of the two sub-layers lacks its residual connection."""

    without = None

    def around(self, x, sublayer, norm):
        if norm is not getattr(self, self.without):
            return super().around(x, sublayer, norm)
        if self.norm_first:
            return self.dropout(sublayer(norm(x)))
        return norm(self.dropout(sublayer(x)))


class _EncNoResidualAttention(_EncResidualOnce):
    without = "norm1"


class _EncNoResidualFeedForward(_EncResidualOnce):
    without = "norm2"


class _EncNormBeforeAdding(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return super().around(x, sublayer, norm)
        return x + norm(self.dropout(sublayer(x)))


class _EncNormTwiceAdded(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return super().around(x, sublayer, norm)
        return x + norm(x + self.dropout(sublayer(x)))


class _EncAlwaysPost(_EncWith):
    def around(self, x, sublayer, norm):
        return norm(x + self.dropout(sublayer(x)))


class _EncAlwaysPre(_EncWith):
    def around(self, x, sublayer, norm):
        return x + self.dropout(sublayer(norm(x)))


class _EncInverted(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return norm(x + self.dropout(sublayer(x)))
        return x + self.dropout(sublayer(norm(x)))


class _EncPreFirstOnly(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first and norm is self.norm1:
            return x + self.dropout(sublayer(norm(x)))
        return norm(x + self.dropout(sublayer(x)))


class _EncResidualOfNormed(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            x = norm(x)
            return x + self.dropout(sublayer(x))
        return super().around(x, sublayer, norm)


class _EncNormBothSides(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return norm(x + self.dropout(sublayer(norm(x))))
        return super().around(x, sublayer, norm)


class _EncNoNorm(_EncWith):
    def around(self, x, sublayer, norm):
        return x + self.dropout(sublayer(x))


class _EncNorm1Unused(_EncWith):
    def around(self, x, sublayer, norm):
        return super().around(x, sublayer, norm if norm is self.norm2 else nn.Identity())


class _EncNorm2Unused(_EncWith):
    def around(self, x, sublayer, norm):
        return super().around(x, sublayer, norm if norm is self.norm1 else nn.Identity())


class _EncFinalNorm(reference.EncoderBlock):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return self.norm2(out) if self.norm_first else out


class _EncMaskKept(_EncWith):
    def forward(self, x, mask=None):
        self.mask = getattr(self, "mask", None) if mask is None else mask
        return super().forward(x, self.mask)


class _EncAllAlike(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        nn.init.zeros_(self.attention.output.weight)


class _EncNormAtTheEnd(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return super().around(x, sublayer, norm)
        x = x + self.dropout(sublayer(x))
        return norm(x) if norm is self.norm2 else x


class _EncDropoutOnSum(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return self.dropout(x + sublayer(norm(x)))
        return norm(self.dropout(x + sublayer(x)))


class _EncDropoutAfterNorm(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return x + sublayer(self.dropout(norm(x)))
        return self.dropout(norm(x + sublayer(x)))


class _EncDropoutOnInput(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return x + sublayer(self.dropout(norm(x)))
        return norm(x + sublayer(self.dropout(x)))


class _EncDropoutOnResidual(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            return self.dropout(x) + sublayer(norm(x))
        return norm(self.dropout(x) + sublayer(x))


class _EncDropoutForgotten(_EncWith):
    def around(self, x, sublayer, norm):
        return x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))


class _EncDropoutAtTheEnd(_EncDropoutForgotten):
    def forward(self, x, mask=None):
        return self.dropout(super().forward(x, mask))


class _EncOneDraw(_EncWith):
    def forward(self, x, mask=None):
        self.kept = self.dropout(torch.ones_like(x))
        return super().forward(x, mask)

    def around(self, x, sublayer, norm):
        if self.norm_first:
            return x + self.kept * sublayer(norm(x))
        return norm(x + self.kept * sublayer(x))


class _EncOneDrawForTheBatch(_EncWith):
    def around(self, x, sublayer, norm):
        kept = self.dropout(torch.ones_like(x[:1]))
        return x + kept * sublayer(norm(x)) if self.norm_first else norm(x + kept * sublayer(x))


class _EncDropoutAlways(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        del self.dropout
        self.p = dropout

    def dropout(self, x):
        return F.dropout(x, self.p)


class _EncDropoutFixed(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, 0.1, norm_first, eps)


class _EncDropoutOfAHalf(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, 0.5, norm_first, eps)


class _EncDropoutByDefault(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.1, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)


class _EncDropoutKeeps(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, 1 - dropout, norm_first, eps)


class _EncDropoutAttentionOnly(_EncWith):
    def around(self, x, sublayer, norm):
        if norm is self.norm1:
            return super().around(x, sublayer, norm)
        return x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))


class _EncDropoutFeedForwardOnly(_EncWith):
    def around(self, x, sublayer, norm):
        if norm is self.norm2:
            return super().around(x, sublayer, norm)
        return x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))


class _EncDropoutTokens(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        self.dropout = nn.Dropout1d(dropout)


class _EncDropoutNotScaled(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        del self.dropout
        self.p = dropout

    def dropout(self, x):
        return x * (torch.rand_like(x) >= self.p) if self.training else x


class _EncDropoutInside(_EncWith):
    def forward(self, x, mask=None):
        x = self.around(x, lambda y: self.attention(y, mask), self.norm1)
        ff = self.feed_forward
        return self.around(x, lambda y: ff.contract(self.dropout(F.gelu(ff.expand(y)))), self.norm2)


class _EncFedByInput(reference.EncoderBlock):
    def forward(self, x, mask=None):
        if self.norm_first:
            attended = x + self.dropout(self.attention(self.norm1(x), mask))
            return attended + self.dropout(self.feed_forward(self.norm2(x)))
        attended = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(attended + self.dropout(self.feed_forward(x)))


class _EncSecondResidualOfInput(reference.EncoderBlock):
    def forward(self, x, mask=None):
        if self.norm_first:
            attended = x + self.dropout(self.attention(self.norm1(x), mask))
            return x + self.dropout(self.feed_forward(self.norm2(attended)))
        attended = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(attended)))


class _EncOnlyAttention(_EncWith):
    def forward(self, x, mask=None):
        return self.around(x, lambda y: self.attention(y, mask), self.norm1)


class _EncFeedForwardFirst(_EncWith):
    def forward(self, x, mask=None):
        x = self.around(x, self.feed_forward, self.norm2)
        return self.around(x, lambda y: self.attention(y, mask), self.norm1)


class _EncOneNormUsed(_EncWith):
    def forward(self, x, mask=None):
        x = self.around(x, lambda y: self.attention(y, mask), self.norm1)
        return self.around(x, self.feed_forward, self.norm1)


class _EncOneNormShared(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        self.norm2 = self.norm1


class _EncNormsSwapped(_EncWith):
    def forward(self, x, mask=None):
        x = self.around(x, lambda y: self.attention(y, mask), self.norm2)
        return self.around(x, self.feed_forward, self.norm1)


class _EncNoMask(_EncWith):
    def attend(self, x, mask):
        return self.attention(x)


class _EncMaskInverted(_EncWith):
    def attend(self, x, mask):
        return self.attention(x, None if mask is None else ~mask)


class _EncMaskPreOnly(_EncWith):
    def attend(self, x, mask):
        return self.attention(x, mask if self.norm_first else None)


class _EncMaskPostOnly(_EncWith):
    def attend(self, x, mask):
        return self.attention(x, None if self.norm_first else mask)


class _EncNoEps(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first)


class _EncEpsOfBert(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-12):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)


class _EncEpsOnce(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        self.norm2 = reference.LayerNorm(d_model)


class _EncOneHead(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, 1, d_ff, dropout, norm_first, eps)


class _EncFourTimes(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, 4 * d_model, dropout, norm_first, eps)


class _EncNoOutputMatrix(_EncWith):
    def attend(self, x, mask):
        layers = self.attention.query, self.attention.key, self.attention.value
        heads = [reference.split_heads(layer(x), self.attention.num_heads) for layer in layers]
        return reference.merge_heads(reference.scaled_dot_product_attention(*heads, mask))


class _EncInPlace(_EncWith):
    def around(self, x, sublayer, norm):
        if self.norm_first:
            x += self.dropout(sublayer(norm(x)))
            return x
        x += self.dropout(sublayer(x))
        return norm(x)


class _EncTorchNorms(_EncWith):
    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff)
        self.norm_first = norm_first
        self.norm1, self.norm2 = (nn.LayerNorm(d_model, eps=eps) for _ in range(2))
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        del self.dropout

    def forward(self, src, mask=None):
        if self.norm_first:
            src = self.dropout1(self.attention(self.norm1(src), mask)) + src
            return self.dropout2(self.feed_forward(self.norm2(src))) + src
        src = self.norm1(self.dropout1(self.attention(src, mask)) + src)
        return self.norm2(self.dropout2(self.feed_forward(src)) + src)


class _EncFunctionalDropout(_EncWith):
    def __init__(
        self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5, device=None
    ):
        super().__init__(d_model, num_heads, d_ff, 0.0, norm_first, eps)
        self.p = dropout
        del self.dropout

    def dropout(self, x):
        return F.dropout(x, self.p, training=self.training)


class _EncOwnDropout(_EncWith):
    """With a dropout layer that makes its own draws, as in chapter 2."""

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first, eps)
        del self.dropout
        self.p = dropout

    def dropout(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand_like(x) >= self.p
        return x * keep / max(1 - self.p, 1e-9)


class _EncFactored(nn.Module):
    """The sub-layers in a loop, and the parts under the names asked for."""

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__()
        parts = {
            "norm2": nn.LayerNorm(d_model, eps),
            "norm1": nn.LayerNorm(d_model, eps),
            "feed_forward": reference.FeedForward(d_model, d_ff),
            "attention": reference.MultiHeadAttention(d_model, num_heads),
        }
        for name, part in parts.items():
            self.add_module(name, part)
        self.drop, self.before = nn.Dropout(dropout), norm_first

    def forward(self, x, mask=None):
        steps = (self.norm1, lambda y: self.attention(y, mask)), (self.norm2, self.feed_forward)
        for norm, step in steps:
            y = x + self.drop(step(norm(x) if self.before else x))
            x = y if self.before else norm(y)
        return x


# What may be wrong in both orders, or in one branch alone.
_ENC_MISTAKES = (
    Misconception(
        "no_residual",  # museum 3.25
        _EncNoResidual,
        "There are no residual connections: what comes out of a sub-layer replaces x where it "
        "should be added to it. Where a sub-layer returns zero, x should still come through.",
    ),
    Misconception(
        "no_residual_around_attention",  # museum 3.25
        _EncNoResidualAttention,
        "The residual connection around attention is missing, so that a token keeps nothing of "
        "itself but what attention brings back. Each of the two sub-layers is added to its "
        "input.",
    ),
    Misconception(
        "no_residual_around_feed_forward",  # museum 3.25, museum C7
        _EncNoResidualFeedForward,
        "The residual connection around the feed-forward network is missing. It is not "
        "attention's own: each of the two sub-layers is added to its input.",
    ),
    Misconception(
        "norms_not_used",
        _EncNoNorm,
        "You make the two norms and use neither. Without them the values grow from block to block.",
    ),
    Misconception(
        "dropout_on_the_sum",
        _EncDropoutOnSum,
        "You drop out the sum, and so parts of x itself. Dropout acts on what the sub-layer "
        "returns, before it is added: the residual connection stays whole.",
    ),
    Misconception(
        "dropout_after_the_norm",
        _EncDropoutAfterNorm,
        "There is a dropout right behind a norm. Its place is right behind the sub-layer, on what "
        "is about to be added to x, and nowhere else.",
    ),
    Misconception(
        "dropout_on_the_input",
        _EncDropoutOnInput,
        "You drop out the sub-layer's input. Dropout acts on what the sub-layer returns, before "
        "it is added to x.",
    ),
    Misconception(
        "dropout_never",
        _EncDropoutForgotten,
        "Your block drops nothing, whatever `dropout` says. In training mode what each of the "
        "two sub-layers returns goes through dropout before it is added.",
    ),
    Misconception(
        "dropout_after_attention_only",
        _EncDropoutAttentionOnly,
        "Only what attention returns goes through dropout. What the feed-forward network "
        "returns does so too.",
    ),
    Misconception(
        "dropout_after_feed_forward_only",
        _EncDropoutFeedForwardOnly,
        "Only what the feed-forward network returns goes through dropout. What attention "
        "returns does so too.",
    ),
    Misconception(
        "dropout_inside_the_feed_forward",
        _EncDropoutInside,
        "You drop out the hidden values of the feed-forward network as well, which torch's "
        "own layer does too. The paper, and this block, drop what each sub-layer returns and "
        "nothing inside it.",
    ),
    Misconception(
        "feed_forward_of_the_input",
        _EncFedByInput,
        "Your feed-forward network is fed by the block's input. It takes what attention and "
        "its residual connection have made of it: the sub-layers come one after the other.",
    ),
    Misconception(
        "second_residual_of_the_input",
        _EncSecondResidualOfInput,
        "Around the feed-forward network you add the block's input. Each residual connection "
        "adds the input of its own sub-layer, and that is what attention's part has returned.",
    ),
    Misconception(
        "no_feed_forward",  # museum C7
        _EncOnlyAttention,
        "Your block ends after attention. The feed-forward network, with its own residual "
        "connection and norm, is the second half.",
    ),
    Misconception(
        "feed_forward_first",
        _EncFeedForwardFirst,
        "Your feed-forward network comes before attention. Attention gathers first, and the "
        "feed-forward network works on what was gathered.",
    ),
    Misconception(
        "one_norm_used_twice",
        _EncOneNormUsed,
        "You use norm1 in both places, and norm2 nowhere. Each sub-layer has its own norm, with "
        "weights of its own.",
    ),
    Misconception(
        "norms_exchanged",
        _EncNormsSwapped,
        "norm1 and norm2 have changed places. With new weights nothing shows; loaded weights "
        "end up in the wrong one. norm1 belongs to attention.",
    ),
    Misconception(
        "mask_inverted",
        _EncMaskInverted,
        "You invert the mask. True means that a query may look there, for the block as for "
        "the attention inside it: hand it on as it is.",
    ),
    Misconception(
        "no_output_matrix",  # museum C7
        _EncNoOutputMatrix,
        "You leave out attention's output matrix, and add the heads side by side to x. What "
        "the heads found has to be mixed first; use your MultiHeadAttention as it is.",
    ),
    Misconception(
        "in_place",
        _EncInPlace,
        "You add to x in place, and so change the tensor of whoever called the block; autograd "
        "refuses it where x is a leaf that requires a gradient. `x = x + …` makes a new one.",
    ),
    Misconception(
        "norm1_not_used",
        _EncNorm1Unused,
        "You never use norm1. Attention has a norm of its own, as the feed-forward network has "
        "norm2.",
    ),
    Misconception(
        "norm2_not_used",
        _EncNorm2Unused,
        "You never use norm2. The feed-forward network has a norm of its own, as attention has "
        "norm1.",
    ),
    Misconception(
        "dropout_on_the_residual",
        _EncDropoutOnResidual,
        "You drop out x, and add what the sub-layer returns whole. It is the other way round: "
        "the residual connection stays whole.",
    ),
    Misconception(
        "dropout_at_the_end",
        _EncDropoutAtTheEnd,
        "There is a dropout at the end of the block, and so on x itself. Its place is right behind "
        "each sub-layer, on what is about to be added to x, and nowhere else.",
    ),
    Misconception(
        "one_draw_for_both_sub_layers",
        _EncOneDraw,
        "You draw once what to drop and use it for both sub-layers. Each of them has draws of "
        "its own.",
    ),
)


def _in_one_order(mistake, norm_first):
    """The same mistake in one branch of an answer whose other branch is right."""

    class EncoderBlock(mistake.implementation):
        def forward(self, x, mask=None):
            if self.norm_first is norm_first:
                return super().forward(x, mask)
            return reference.EncoderBlock.forward(self, x, mask)

    order = "pre_norm" if norm_first else "post_norm"
    message = f"{mistake.message[0].lower()}{mistake.message[1:]}"
    branch = order.replace("_", "-")
    return Misconception(
        f"{mistake.slug}_in_{order}", EncoderBlock, f"In your {branch} branch: {message}"
    )


_ENC_THE_SAME = (  # in one branch alone, these are others of the list
    ("norm1_not_used", False),
    ("dropout_after_the_norm", True),
    ("dropout_at_the_end", False),
    ("dropout_at_the_end", True),
)
_ENC_IN_ONE_ORDER = tuple(
    _in_one_order(mistake, norm_first)
    for mistake in _ENC_MISTAKES
    for norm_first in (False, True)
    if (mistake.slug, norm_first) not in _ENC_THE_SAME
)


ENCODER_BLOCK = Exercise(
    slug="encoder_block",
    chapter=3,
    title="The encoder block",
    minutes=25,
    difficulty=3,
    reference=reference.EncoderBlock,
    observe=_observe_encoder_block,
    misconceptions=(
        *_ENC_MISTAKES,
        *_ENC_IN_ONE_ORDER,
        Misconception(
            "norm_on_the_sublayer_alone",  # museum C7
            _EncNormBeforeAdding,
            "In post-norm you normalise what the sub-layer returns and add x afterwards, so that "
            "the sum itself is never normalised. Post-norm is norm(x + sublayer(x)).",
        ),
        Misconception(
            "x_added_twice",
            _EncNormTwiceAdded,
            "In post-norm you add x before the norm and once more after it. The residual "
            "connection ends at the norm: what the norm returns is the new x.",
        ),
        Misconception(
            "norm_first_ignored",
            _EncAlwaysPost,
            "Your block is post-norm whatever `norm_first` says. With norm_first=True each norm "
            "moves in front of its sub-layer, inside the residual connection.",
        ),
        Misconception(
            "always_pre_norm",
            _EncAlwaysPre,
            "Your block is pre-norm where `norm_first` is not given: it always is, or the default "
            "is True. By default the norm comes last: norm(x + sublayer(x)), as in the paper and "
            "in BERT.",
        ),
        Misconception(
            "pre_and_post_exchanged",
            _EncInverted,
            "You exchanged the two orders. norm_first=True means that x goes through the norm "
            "first and through the sub-layer afterwards; by default the norm comes last.",
        ),
        Misconception(
            "pre_norm_for_attention_only",
            _EncPreFirstOnly,
            "With norm_first=True only your attention is pre-norm; the feed-forward network is "
            "post-norm still. Both sub-layers follow the same order.",
        ),
        Misconception(
            "residual_of_the_normed_x",
            _EncResidualOfNormed,
            "In pre-norm you overwrite x with its norm and add that. The residual connection takes "
            "x as it was: that straight way from the bottom to the top of the stack is what "
            "pre-norm is for.",
        ),
        Misconception(
            "normed_before_and_after",
            _EncNormBothSides,
            "In pre-norm you apply the norm before the sub-layer and after the sum as well. There "
            "it comes before the sub-layer only; the sum stays as it is.",
        ),
        Misconception(
            "norm_at_the_end_of_pre_norm",
            _EncFinalNorm,
            "In pre-norm you normalise once more at the end of the block, with norm2. Its output "
            "is the bare sum: some models have such a norm, once, behind their last block.",
        ),
        Misconception(
            "one_norm_at_the_end",  # museum C7
            _EncNormAtTheEnd,
            "In post-norm you normalise once, at the end of the block. There are two norms: the "
            "one after attention comes before the feed-forward network.",
        ),
        Misconception(
            "dropout_in_evaluation",  # museum 3.18
            _EncDropoutAlways,
            "Your dropout is active in evaluation mode too, so that the same sentence gives other "
            "vectors at every call. `F.dropout` does not know the mode unless it is told; an "
            "nn.Dropout does.",
        ),
        Misconception(
            "dropout_fixed",
            _EncDropoutFixed,
            "You write 0.1 where the argument `dropout` belongs. That is the paper's value; here "
            "the argument decides, and its default is 0.",
        ),
        Misconception(
            "dropout_of_a_half",
            _EncDropoutOfAHalf,
            "Your block drops half of the values, whatever `dropout` says. That is what nn.Dropout "
            "does when it is given no number: hand the argument on.",
        ),
        Misconception(
            "dropout_by_default",
            _EncDropoutByDefault,
            "Your block drops 10 % unless told otherwise. The default of `dropout` is 0 here, so "
            "that a block is the same in both modes until dropout is asked for.",
        ),
        Misconception(
            "dropout_keeps",
            _EncDropoutKeeps,
            "You hand on 1 − dropout. In torch p is the probability to drop, not to keep.",
        ),
        Misconception(
            "dropout_of_whole_tokens",
            _EncDropoutTokens,
            "You drop whole tokens: one draw decides for all features. Each value has a draw of "
            "its own.",
        ),
        Misconception(
            "one_draw_for_the_batch",
            _EncOneDrawForTheBatch,
            "One draw decides for a place in all samples of the batch. Each value has a draw of "
            "its own.",
        ),
        Misconception(
            "dropout_not_scaled",
            _EncDropoutNotScaled,
            "You zero some values and leave the others as they are, so that what is added is "
            "smaller in training than in evaluation. What is kept is divided by 1 − p.",
        ),
        Misconception(
            "one_norm_under_two_names",
            _EncOneNormShared,
            "norm1 and norm2 are one norm under two names, with one set of weights. Each sub-layer "
            "has its own.",
        ),
        Misconception(
            "mask_not_handed_on",  # museum F11
            _EncNoMask,
            "You take the mask and do not hand it on to attention, so that padding is looked at "
            "like words.",
        ),
        Misconception(
            "mask_kept",
            _EncMaskKept,
            "You keep the mask of an earlier call and use it where none is given. A call without "
            "a mask hides nothing: hand on what this call was given.",
        ),
        Misconception(
            "weights_all_alike",
            _EncAllAlike,
            "In one of your layers all weights start with the same number, so that its features "
            "all compute the same. nn.Linear draws its weights at random: leave them as drawn.",
        ),
        Misconception(
            "mask_in_pre_norm_only",
            _EncMaskPreOnly,
            "You hand the mask on in pre-norm and forget it in post-norm.",
        ),
        Misconception(
            "mask_in_post_norm_only",
            _EncMaskPostOnly,
            "You hand the mask on in post-norm and forget it in pre-norm.",
        ),
        Misconception(
            "eps_not_handed_on",
            _EncNoEps,
            "You take eps and do not hand it on to the norms, which keep their own default. "
            "BERT's is 1e-12.",
        ),
        Misconception(
            "eps_of_bert_as_default",
            _EncEpsOfBert,
            "Your default for eps is 1e-12, BERT's. Here it is 1e-5, torch's; BERT's own is "
            "handed over where BERT is loaded.",
        ),
        Misconception(
            "eps_for_norm1_only",
            _EncEpsOnce,
            "Only norm1 is given eps; norm2 keeps its own default. Both norms of a block share the "
            "argument.",
        ),
        Misconception(
            "always_one_head",
            _EncOneHead,
            "Your attention has one head, whatever `num_heads` says. The weights have the same "
            "shapes for any number of heads: only the numbers show it.",
        ),
        Misconception(
            "always_four_times_as_wide",
            _EncFourTimes,
            "You make the feed-forward network 4 · d_model wide, whatever `d_ff` says.",
        ),
    ),
    alternatives=(_EncTorchNorms, _EncFunctionalDropout, _EncOwnDropout, _EncFactored),
    rtol=1e-6,  # what it is made of may be the learner's own, right to float32's digits
    atol=1e-6,
    hints=(
        "Write post-norm first, sub-layer by sub-layer: what does attention return, what is it "
        "added to, and where does the norm go?",
        "Post-norm: norm(x + dropout(sublayer(x))). Pre-norm: x + dropout(sublayer(norm(x))). "
        "The second sub-layer starts from what the first has made of x, in both orders.",
        "Four lines are enough, two for each order. The first line of an order makes a new x with "
        "attention, which takes the mask as well, and norm1; the second does the same with "
        "feed_forward and norm2. One self.dropout serves all four, since each call draws anew.",
    ),
)


# --- load_bert_layer ----------------------------------------------------------------------------


def _bert_state_dict(see, layers: int, d_model: int, d_ff: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names, and in the order, of transformers.BertModel's state_dict."""
    shapes = {"embeddings.word_embeddings.weight": (9, d_model)}
    shapes["embeddings.position_embeddings.weight"] = (11, d_model)
    shapes["embeddings.token_type_embeddings.weight"] = (2, d_model)
    shapes |= {f"embeddings.LayerNorm.{kind}": (d_model,) for kind in ("weight", "bias")}
    for layer in range(layers):
        for name, sizes in (
            ("attention.self.query", (d_model, d_model)),
            ("attention.self.key", (d_model, d_model)),
            ("attention.self.value", (d_model, d_model)),
            ("attention.output.dense", (d_model, d_model)),
            ("attention.output.LayerNorm", (d_model,)),
            ("intermediate.dense", (d_ff, d_model)),
            ("output.dense", (d_model, d_ff)),
            ("output.LayerNorm", (d_model,)),
        ):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = sizes
            shapes[f"encoder.layer.{layer}.{name}.bias"] = sizes[:1]
    shapes |= {"pooler.dense.weight": (d_model, d_model), "pooler.dense.bias": (d_model,)}
    numbers = see.randn(sum(map(math.prod, shapes.values())), dtype=torch.float32)
    parts = numbers.split([math.prod(sizes) for sizes in shapes.values()])
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.view(sizes).clone() for (name, sizes), part in named}


def _observe_load_bert_layer(load_bert_layer, see):
    def run(layers, d_model, d_ff, layer, alphabetical=False):
        """Loads, and records what became of the block and of the state_dict."""
        fits = "each tensor has the shape of the parameter that it is copied into"
        block = reference.EncoderBlock(d_model, 2, d_ff)
        state = _bert_state_dict(see, layers, d_model, d_ff)
        if alphabetical:
            state = dict(sorted(state.items()))
        kept = {name: value.clone() for name, value in state.items()}
        before = dict(block.named_parameters())
        try:
            load_bert_layer(block, state, layer)
        except RuntimeError as error:
            if isinstance(error, NotImplementedError) or not re.search("size|shape", str(error)):
                raise
            see.fact(fits, False)
            return
        see.fact(fits, True)
        after = dict(block.named_parameters())
        for name in _BLOCK_PARAMETERS:
            value = after.get(name)
            see(f"{name} of the block", value if value is None else value.detach())
        same = all(after[name] is p for name, p in before.items())
        see.fact("the block's parameters are the ones that it was made with", same)
        grad = all(p.requires_grad for p in after.values())
        see.fact("the block's parameters still require a gradient", grad)
        see("the number of tensors in the state_dict", len(state))
        alike = all(torch.equal(state[name], value) for name, value in kept.items())
        see.fact("the tensors of the state_dict are as they were", alike)
        with torch.no_grad():
            for p in after.values():
                p.add_(1)
        alike = all(torch.equal(state[name], value) for name, value in kept.items())
        see.fact("the state_dict stays as it is when the block is trained further", alike)

    with see.probe("layer 1 of 0 to 11, d_model = d_ff = 4, so that all matrices are square"):
        run(12, 4, 4, 1)
    with see.probe("layer 10 of 0 to 11, d_model 4, d_ff 6"):
        run(12, 4, 6, 10)
    with see.probe("layer 1 of 0 to 11, d_model 6, d_ff 4"):
        run(12, 6, 4, 1)
    with see.probe("layer 0 of 0 to 2, the names of the state_dict in alphabetical order"):
        run(3, 4, 7, 0, alphabetical=True)

    def loads(block, state, layer):
        """Whether it returns; an exception is an answer here."""
        try:
            load_bert_layer(block, state, layer)
        except NotImplementedError:
            raise
        except Exception:
            return False
        return True

    def refuses(statement, change):
        """Asked of an answer that loads nothing else wrongly: one mistake at a time is told."""
        spoilt = dict(sorted(_bert_state_dict(see, 11, 4, 6).items()))
        state, kept = ({n: t.clone() for n, t in spoilt.items()} for _ in range(2))
        layer = change(spoilt)
        block = reference.EncoderBlock(4, 2, 6)
        before = dict(block.named_parameters())
        start = {name: p.detach().clone() for name, p in before.items()}
        right = loads(block, state, 1) and state.keys() == kept.keys()
        idle = all(torch.equal(p, start[name]) for name, p in block.named_parameters())
        with torch.no_grad():
            for p in block.parameters():
                p.mul_(2)  # and nothing of the state_dict with it
        right = (
            right
            and all(torch.equal(state[name], tensor) for name, tensor in kept.items())
            and all(p is before[name] and p.requires_grad for name, p in block.named_parameters())
            and all(torch.equal(before[n], 2 * t) for n, t in _bert_tensors(kept, 1).items())
        )
        see.fact("layer 1 is copied rightly where every tensor is as it should be", right)
        if right or idle:
            see.fact(statement, not loads(block, spoilt, layer))

    def without(name):
        return lambda state: state.pop(f"encoder.layer.1.{name}") is None or 1

    def changed(name, change):
        def of(state):
            state[f"encoder.layer.1.{name}"] = change(state[f"encoder.layer.1.{name}"]).clone()
            return 1

        return of

    def wider(state):
        state.update(_bert_state_dict(see, 2, 8, 6))
        return 1

    for name in ("output.dense.bias", "attention.self.key.weight", "output.LayerNorm.weight"):
        with see.probe(f"layer 1, and encoder.layer.1.{name} is missing"):
            refuses("an exception is raised where a tensor is missing", without(name))
    with see.probe("layer 11, where there are the layers 0 to 10"):
        refuses("an exception is raised where there is no such layer", lambda state: 11)
    misfit = "an exception is raised where a shape differs"
    with see.probe("layer 1, and its tensors are those of a wider network"):
        refuses(misfit, wider)
    for name, what, change in (
        ("output.dense.bias", "has shape (1,)", lambda t: t[:1]),
        ("intermediate.dense.weight", "is transposed", torch.t),
        ("intermediate.dense.weight", "has shape (8, 3)", lambda t: t.reshape(8, 3)),
        ("intermediate.dense.weight", "lacks a row", lambda t: t[:5]),
    ):
        with see.probe(f"layer 1, and encoder.layer.1.{name} {what}"):
            refuses(misfit, changed(name, change))


_BERT_NAMES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "feed_forward.expand": "intermediate.dense",
    "feed_forward.contract": "output.dense",
    "norm2": "output.LayerNorm",
}


def _bert_tensors(state_dict, layer, names=None):
    """The tensors of one layer under the block's names; `names` overrides some of the pairs."""
    return {
        f"{ours}.{kind}": state_dict[f"encoder.layer.{layer}.{theirs}.{kind}"]
        for ours, theirs in (_BERT_NAMES | (names or {})).items()
        for kind in ("weight", "bias")
    }


def _bert_copied(block, tensors):
    block.load_state_dict(block.state_dict() | tensors)


def _bert_transposed(block, state_dict, layer):
    tensors = _bert_tensors(state_dict, layer)
    square = [n for n, t in tensors.items() if t.ndim == 2 and t.shape[0] == t.shape[1]]
    _bert_copied(block, tensors | {name: tensors[name].T for name in square})


def _bert_attention_transposed(block, state_dict, layer):
    tensors = _bert_tensors(state_dict, layer)
    turned = {n: t.T for n, t in tensors.items() if n.startswith("attention.")}
    _bert_copied(block, tensors | turned)


def _bert_all_transposed(block, state_dict, layer):
    _bert_copied(block, {name: t.T for name, t in _bert_tensors(state_dict, layer).items()})


def _bert_query_key(block, state_dict, layer):
    names = {"attention.query": "attention.self.key", "attention.key": "attention.self.query"}
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_key_value(block, state_dict, layer):
    names = {"attention.key": "attention.self.value", "attention.value": "attention.self.key"}
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_query_thrice(block, state_dict, layer):
    names = dict.fromkeys(("attention.key", "attention.value"), "attention.self.query")
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_outputs_swapped(block, state_dict, layer):
    names = {
        "attention.output": "output.dense",
        "feed_forward.contract": "attention.output.dense",
    }
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_attention_output_twice(block, state_dict, layer):
    names = {"feed_forward.contract": "attention.output.dense"}
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_output_dense_twice(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, layer, {"attention.output": "output.dense"}))


def _bert_norms_swapped(block, state_dict, layer):
    names = {"norm1": "output.LayerNorm", "norm2": "attention.output.LayerNorm"}
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_norm1_twice(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, layer, {"norm2": "attention.output.LayerNorm"}))


def _bert_norm2_twice(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, layer, {"norm1": "output.LayerNorm"}))


def _bert_first_that_fits(block, state_dict, layer):
    start = f"encoder.layer.{layer}."
    keys = [key for key in state_dict if key.startswith(start)]
    tensors = {}
    for ours, theirs in _BERT_NAMES.items():
        for kind in ("weight", "bias"):
            found = next(key for key in keys if f"{theirs}.{kind}" in key)
            tensors[f"{ours}.{kind}"] = state_dict[found]
    _bert_copied(block, tensors)


def _bert_layers_swapped_in_ff(block, state_dict, layer):
    names = {"feed_forward.expand": "output.dense", "feed_forward.contract": "intermediate.dense"}
    _bert_copied(block, _bert_tensors(state_dict, layer, names))


def _bert_no_biases(block, state_dict, layer):
    tensors = _bert_tensors(state_dict, layer)
    _bert_copied(block, {n: t for n, t in tensors.items() if n.endswith("weight")})


def _bert_no_biases_of_linears(block, state_dict, layer):
    tensors = _bert_tensors(state_dict, layer)
    _bert_copied(block, {n: t for n, t in tensors.items() if n.endswith("weight") or "norm" in n})


def _bert_only(block, state_dict, layer, *parts):
    tensors = _bert_tensors(state_dict, layer)
    _bert_copied(block, {n: t for n, t in tensors.items() if n.startswith(parts)})


def _bert_attention_only(block, state_dict, layer):
    _bert_only(block, state_dict, layer, "attention.")


def _bert_no_norms(block, state_dict, layer):
    _bert_only(block, state_dict, layer, "attention.", "feed_forward.")


def _bert_no_feed_forward(block, state_dict, layer):
    _bert_only(block, state_dict, layer, "attention.", "norm")


def _bert_no_output_matrix(block, state_dict, layer):
    parts = [name for name in _BERT_NAMES if name != "attention.output"]
    _bert_only(block, state_dict, layer, *parts)


def _bert_layer_0(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, 0))


def _bert_layer_from_one(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, max(layer - 1, 0)))


def _bert_next_layer(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, layer + 1))


def _bert_last_layer(block, state_dict, layer):
    numbers = [int(key.split(".")[2]) for key in state_dict if key.startswith("encoder.layer.")]
    _bert_copied(block, _bert_tensors(state_dict, max(numbers)))


def _bert_prefix_without_dot(block, state_dict, layer):
    tensors = {}
    for key, value in state_dict.items():
        if key.startswith(f"encoder.layer.{layer}"):
            theirs, kind = key.split(".", 3)[3].rsplit(".", 1)
            ours = next(ours for ours, name in _BERT_NAMES.items() if name == theirs)
            tensors[f"{ours}.{kind}"] = value
    _bert_copied(block, tensors)


def _bert_nothing(block, state_dict, layer):
    block.load_state_dict(state_dict, strict=False)


def _bert_all_or_nothing_by_name(block, state_dict, layer):
    """Only the names that both happen to share."""
    prefix = f"encoder.layer.{layer}."
    tensors = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    block.load_state_dict(tensors)


def _bert_skips_missing(block, state_dict, layer):
    tensors = {
        f"{ours}.{kind}": state_dict.get(f"encoder.layer.{layer}.{theirs}.{kind}")
        for ours, theirs in _BERT_NAMES.items()
        for kind in ("weight", "bias")
    }
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    block.load_state_dict(found, strict=False)


def _bert_shape_ignored(block, state_dict, layer):
    params = dict(block.named_parameters())
    for name, tensor in _bert_tensors(state_dict, layer).items():
        if params[name].shape == tensor.shape:
            params[name].data.copy_(tensor)


def _bert_data_shared(block, state_dict, layer):
    params = dict(block.named_parameters())
    for name, tensor in _bert_tensors(state_dict, layer).items():
        params[name].data = tensor


def _bert_new_parameters(block, state_dict, layer):
    for name, tensor in _bert_tensors(state_dict, layer).items():
        module, kind = name.rsplit(".", 1)
        setattr(block.get_submodule(module), kind, nn.Parameter(tensor.clone()))


def _bert_new_parameters_shared(block, state_dict, layer):
    for name, tensor in _bert_tensors(state_dict, layer).items():
        module, kind = name.rsplit(".", 1)
        setattr(block.get_submodule(module), kind, nn.Parameter(tensor))


def _bert_frozen(block, state_dict, layer):
    _bert_copied(block, _bert_tensors(state_dict, layer))
    block.requires_grad_(False)


def _bert_popped(block, state_dict, layer):
    tensors = _bert_tensors(state_dict, layer)
    for name in [key for key in state_dict if key.startswith(f"encoder.layer.{layer}.")]:
        state_dict.pop(name)
    _bert_copied(block, tensors)


def _bert_into_a_copy(block, state_dict, layer):
    block = copy.deepcopy(block)
    _bert_copied(block, _bert_tensors(state_dict, layer))
    return block


def _bert_into_the_state_dict(block, state_dict, layer):
    """A state_dict() is a new dict: to write into it changes nothing."""
    own = block.state_dict()
    own.update(_bert_tensors(state_dict, layer))


def _bert_without_no_grad(block, state_dict, layer):
    params = dict(block.named_parameters())
    for name, tensor in _bert_tensors(state_dict, layer).items():
        params[name].copy_(tensor)


def _bert_by_order(block, state_dict, layer):
    tensors = [v for k, v in state_dict.items() if k.startswith(f"encoder.layer.{layer}.")]
    with torch.no_grad():
        for p, tensor in zip(block.parameters(), tensors, strict=True):
            p.copy_(tensor)


def _bert_each(fill):
    """Fills the parameters one by one, without comparing shapes first."""

    @torch.no_grad()
    def load(block, state_dict, layer):
        params = dict(block.named_parameters())
        for name, tensor in _bert_tensors(state_dict, layer).items():
            fill(params[name], tensor)

    return load


def _bert_fill_rows(p, tensor):
    p[: len(tensor)] = tensor


_bert_stretched = _bert_each(lambda p, t: p.copy_(t))
_bert_reshaped = _bert_each(lambda p, t: p.copy_(t.reshape(p.shape)))
_bert_turned_or_stretched = _bert_each(lambda p, t: p.copy_(t if t.shape == p.shape else t.T))
_bert_first_rows = _bert_each(_bert_fill_rows)


@torch.no_grad()
def _bert_skips_and_stretches(block, state_dict, layer):
    for ours, p in block.named_parameters():
        module, kind = ours.rsplit(".", 1)
        tensor = state_dict.get(f"encoder.layer.{layer}.{_BERT_NAMES[module]}.{kind}")
        if tensor is not None:
            p.copy_(tensor)


def _bert_turned_and_checked(block, state_dict, layer):
    shapes = {name: p.shape for name, p in block.named_parameters()}
    tensors = _bert_tensors(state_dict, layer)
    _bert_copied(block, {n: t if t.shape == shapes[n] else t.T for n, t in tensors.items()})


def _bert_renamed(block, state_dict, layer):
    prefix = f"encoder.layer.{layer}."
    tensors = {}
    for key, value in state_dict.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).replace("attention.self.", "attention.")
            name = name.replace("attention.output.dense", "attention.output")
            name = name.replace("attention.output.LayerNorm", "norm1")
            name = name.replace("intermediate.dense", "feed_forward.expand")
            name = re.sub("^output.dense", "feed_forward.contract", name)
            tensors[name.replace("output.LayerNorm", "norm2")] = value
    block.load_state_dict(tensors)
    return block


@torch.no_grad()
def _bert_by_hand(block, state_dict, layer, prefix="encoder.layer"):
    pairs = [
        (block.attention.query, "attention.self.query"),
        (block.attention.key, "attention.self.key"),
        (block.attention.value, "attention.self.value"),
        (block.attention.output, "attention.output.dense"),
        (block.norm1, "attention.output.LayerNorm"),
        (block.feed_forward.expand, "intermediate.dense"),
        (block.feed_forward.contract, "output.dense"),
        (block.norm2, "output.LayerNorm"),
    ]
    for module, name in pairs:
        for kind, p in module.named_parameters():
            tensor = state_dict[f"{prefix}.{layer}.{name}.{kind}"]
            assert tensor.shape == p.shape, f"{name} has shape {tuple(tensor.shape)}"
            p.copy_(tensor)


def _bert_by_data(block, state_dict, layer):
    for name, p in block.named_parameters():
        module, kind = name.rsplit(".", 1)
        tensor = state_dict[f"encoder.layer.{layer}.{_BERT_NAMES[module]}.{kind}"]
        if tensor.shape != p.shape:
            raise ValueError(f"{name} is {tuple(p.shape)}, and {tuple(tensor.shape)} is stored")
        p.data[:] = tensor


LOAD_BERT_LAYER = Exercise(
    slug="load_bert_layer",
    chapter=3,
    title="Load a layer of BERT",
    minutes=20,
    difficulty=3,
    reference=reference.load_bert_layer,
    observe=_observe_load_bert_layer,
    misconceptions=(
        Misconception(
            "square_matrices_transposed",
            _bert_transposed,
            "You transpose the matrices. nn.Linear and BERT both keep a weight as (out_features, "
            "in_features), so nothing is transposed; that the shapes agree either way where a "
            "matrix is square is what hides it.",
        ),
        Misconception(
            "attention_transposed",
            _bert_attention_transposed,
            "You transpose the four matrices of attention. They are square, so nothing complains; "
            "nn.Linear and BERT both keep a weight as (out_features, in_features), and nothing is "
            "transposed.",
        ),
        Misconception(
            "everything_transposed",
            _bert_all_transposed,
            "You transpose every matrix. nn.Linear and BERT both keep a weight as (out_features, "
            "in_features): copy it as it is.",
        ),
        Misconception(
            "query_and_key_exchanged",
            _bert_query_key,
            "Query and key have changed places. Both are square, so nothing complains; the scores "
            "come out transposed.",
        ),
        Misconception(
            "key_and_value_exchanged",
            _bert_key_value,
            "Key and value have changed places. Both are square, so nothing complains.",
        ),
        Misconception(
            "query_three_times",
            _bert_query_thrice,
            "The query's tensors went into key and value as well: a line was copied and its name "
            "left as it was.",
        ),
        Misconception(
            "output_matrices_exchanged",
            _bert_outputs_swapped,
            "Attention's output matrix and the feed-forward network's second one have changed "
            "places. BERT calls the first attention.output.dense and the second output.dense.",
        ),
        Misconception(
            "attention_output_twice",
            _bert_attention_output_twice,
            "attention.output.dense went into `contract` too. The feed-forward network's second "
            "matrix is BERT's output.dense, without `attention.` in front.",
        ),
        Misconception(
            "output_dense_twice",
            _bert_output_dense_twice,
            "output.dense went into attention's output too. That one's name in BERT is "
            "attention.output.dense; output.dense is the feed-forward network's second matrix.",
        ),
        Misconception(
            "norms_exchanged",
            _bert_norms_swapped,
            "The two norms have changed places. norm1 follows attention, and BERT calls it "
            "attention.output.LayerNorm; norm2 is its output.LayerNorm.",
        ),
        Misconception(
            "norm_of_attention_twice",
            _bert_norm1_twice,
            "Both norms got the tensors of attention.output.LayerNorm. norm2 is BERT's "
            "output.LayerNorm, without `attention.` in front.",
        ),
        Misconception(
            "last_norm_twice",
            _bert_norm2_twice,
            "Both norms got the tensors of output.LayerNorm. norm1 follows attention, and BERT "
            "calls it attention.output.LayerNorm.",
        ),
        Misconception(
            "first_name_that_contains_it",
            _bert_first_that_fits,
            "You take the first name that contains the one looked for. output.dense is contained "
            "in attention.output.dense as well, and output.LayerNorm likewise, so that both are "
            "taken from attention; compare whole names.",
        ),
        Misconception(
            "expand_and_contract_exchanged",
            _bert_layers_swapped_in_ff,
            "`expand` and `contract` have changed places. BERT calls the layer that widens "
            "intermediate.dense, and the one that narrows output.dense.",
        ),
        Misconception(
            "biases_forgotten",
            _bert_no_biases,
            "You copy the weights and leave all biases at their random start. Each linear layer, "
            "and each norm, has both.",
        ),
        Misconception(
            "biases_of_the_linear_layers_forgotten",
            _bert_no_biases_of_linears,
            "You copy weight and bias of the norms, and of the linear layers the weight only. "
            "Their biases stay at their random start.",
        ),
        Misconception(
            "attention_only",
            _bert_attention_only,
            "You load the four linear layers of attention, and neither the norms nor the "
            "feed-forward network.",
        ),
        Misconception(
            "norms_forgotten",
            _bert_no_norms,
            "You load the linear layers and leave the norms at ones and zeros. BERT has learned "
            "the weight and bias of its norms too.",
        ),
        Misconception(
            "feed_forward_forgotten",
            _bert_no_feed_forward,
            "You load attention and the norms, and leave the feed-forward network at its random "
            "start. It is called intermediate.dense and output.dense.",
        ),
        Misconception(
            "output_matrix_forgotten",
            _bert_no_output_matrix,
            "You load query, key and value, and leave attention's output matrix at its random "
            "start. It is called attention.output.dense.",
        ),
        Misconception(
            "always_layer_0",
            _bert_layer_0,
            "You load layer 0 whatever `layer` says. All layers have the same shapes, so a stack "
            "of six times layer 0 runs without a complaint.",
        ),
        Misconception(
            "layers_from_one",
            _bert_layer_from_one,
            "You load the layer before the one asked for. BERT counts its layers from 0, and so "
            "does `layer`.",
        ),
        Misconception(
            "next_layer",
            _bert_next_layer,
            "You load the layer after the one asked for. BERT counts its layers from 0, and so "
            "does `layer`.",
        ),
        Misconception(
            "always_the_last_layer",
            _bert_last_layer,
            "You end up with the last layer whatever `layer` says. That happens where names are "
            "compared without the number in them: the last one of each name is what stays.",
        ),
        Misconception(
            "layer_1_matches_layer_10",
            _bert_prefix_without_dot,
            "You look for names that start with encoder.layer.1, and encoder.layer.10 and 11 start "
            "so as well. The last of them stays; a dot at the end of the prefix tells them apart.",
        ),
        Misconception(
            "nothing_loaded",
            _bert_nothing,
            "Nothing arrives in the block, and nothing is said about it: its random start is what "
            "runs. With strict=False, `load_state_dict` passes over every name that is not one of "
            "the block's own, and none of BERT's is.",
        ),
        Misconception(
            "names_not_translated",
            _bert_all_or_nothing_by_name,
            "You take the prefix off BERT's names and hand over what is left. The block has names "
            "of its own: attention.query where BERT has attention.self.query, and so on for all "
            "eight.",
        ),
        Misconception(
            "missing_tensors_skipped",
            _bert_skips_missing,
            "What is there you load rightly. A tensor that is missing you skip without a word, and "
            "its part stays random; a layer that does not exist is 'loaded' that way too. Let it "
            "raise.",
        ),
        Misconception(
            "missing_skipped_and_small_stretched",
            _bert_skips_and_stretches,
            "What is there you load rightly. A tensor that is missing you skip without a word, and "
            "its part stays random; and `copy_` stretches a bias of a single number over all "
            "places. Let both raise.",
        ),
        Misconception(
            "other_shapes_go_by",
            _bert_shape_ignored,
            "The numbers are right. But a tensor of another shape goes by without a word, and the "
            "block is left with a part that is random still or no longer fits the others. Compare "
            "the shapes and raise where they differ; `load_state_dict` does both by itself.",
        ),
        Misconception(
            "small_tensors_stretched",
            _bert_stretched,
            "The numbers are right. But copying with `copy_` or by assignment broadcasts: a bias "
            "of a single number is stretched over all places without a word. Compare the shapes "
            "before you copy.",
        ),
        Misconception(
            "reshaped_to_fit",
            _bert_reshaped,
            "The numbers are right. But you reshape whatever comes to the shape of the parameter, "
            "so that a transposed matrix is taken in with its numbers in the wrong places. Where "
            "the shapes differ, raise.",
        ),
        Misconception(
            "transposed_to_fit",
            _bert_turned_and_checked,
            "The numbers are right. But a matrix whose shape does not fit you transpose until it "
            "does. Such a file is not what it is taken for, and square matrices tell nothing "
            "either way: raise.",
        ),
        Misconception(
            "transposed_or_stretched",
            _bert_turned_or_stretched,
            "The numbers are right. But a matrix whose shape does not fit you transpose, and "
            "`copy_` stretches a bias of a single number over all places. Such a file is not what "
            "it is taken for: raise where the shapes differ.",
        ),
        Misconception(
            "first_rows_filled",
            _bert_first_rows,
            "The numbers are right. But where a tensor has fewer rows than the parameter, you fill "
            "the first ones and leave the others random. Compare the shapes and raise where they "
            "differ.",
        ),
        Misconception(
            "storage_shared",
            _bert_data_shared,
            "The numbers are right, and the block's parameters now lie on the state_dict's own "
            "memory: training the block changes the state_dict, and with it every other block "
            "loaded from it. Copy the numbers.",
        ),
        Misconception(
            "parameters_replaced",
            _bert_new_parameters,
            "The numbers are right, and you put new parameters into the block. An optimizer that "
            "was made before still holds the old ones and trains those; copy into the parameters "
            "that are there.",
        ),
        Misconception(
            "parameters_replaced_and_shared",
            _bert_new_parameters_shared,
            "Your block gets new parameters which are the state_dict's own tensors; assign=True "
            "does that too. Training the block then changes the state_dict, and an optimizer made "
            "before trains the old parameters; copy into those that are there.",
        ),
        Misconception(
            "frozen",
            _bert_frozen,
            "The numbers are right, and the block's parameters no longer require a gradient. "
            "Whether it is trained further is for the caller to say.",
        ),
        Misconception(
            "state_dict_emptied",
            _bert_popped,
            "The numbers are right, and you take the tensors out of the state_dict. Whoever loads "
            "the same layer again finds nothing; read without removing.",
        ),
        Misconception(
            "loaded_into_a_copy",
            _bert_into_a_copy,
            "The block that was given stays as random as it was: you load into a copy, or into "
            "another block. It is to be changed in place.",
        ),
        Misconception(
            "written_into_state_dict",
            _bert_into_the_state_dict,
            "You look up the right tensors, and they do not arrive in the block. The dict that "
            "`block.state_dict()` returns is made anew at each call, and a variable is only a name:"
            " what is put there, the block does not notice. Copy into the parameters.",
        ),
        Misconception(
            "copied_with_gradients_on",
            _bert_without_no_grad,
            "You copy into parameters while autograd is recording, which it refuses: a leaf that "
            "requires a gradient must not change under it. Switch recording off while you copy.",
        ),
        Misconception(
            "by_order",
            _bert_by_order,
            "You go by the order of the tensors. In a BertModel it happens to be that of the "
            "block; a file may keep its names in alphabetical order, where biases come before "
            "weights. The names decide.",
        ),
    ),
    alternatives=(_bert_renamed, _bert_by_hand, _bert_by_data),
    hints=(
        "Print the names in the state_dict that start with encoder.layer.0. and the names in "
        "`block.state_dict()`, with the shapes, and pair them up: eight of each, times weight and "
        "bias.",
        "attention.self.query/key/value → attention.query/key/value; attention.output.dense → "
        "attention.output; attention.output.LayerNorm → norm1. What is left is the feed-forward "
        "network and norm2.",
        "A dict from the block's names to BERT's, and for each pair "
        "`block.get_submodule(ours).load_state_dict({'weight': …, 'bias': …})`, which copies, and "
        "raises where a shape differs.",
    ),
)


# --- find the bug: padding is looked at ---------------------------------------------------------


def encode_batch(embedding, block, sentences):
    """The vector of each sentence's first token, (batch, d_model).

    embedding: nn.Embedding whose row 0 stands for padding; block(x, mask) an encoder block;
    sentences: lists of token ids of unequal length.
    """
    n = max(len(sentence) for sentence in sentences)
    ids = torch.tensor([sentence + [0] * (n - len(sentence)) for sentence in sentences])
    return block(embedding(ids))[:, 0]


def _observe_encode_batch(encode_batch, see):
    def filled(module):
        with torch.no_grad():
            for p in module.double().parameters():
                p.copy_(1.3 * see.randn(*p.shape) / math.sqrt(p.shape[-1] if p.ndim > 1 else 4))
        return module

    def embedding_of(d_model):
        embedding = nn.Embedding(14, d_model).double()
        with torch.no_grad():
            embedding.weight.copy_(see.randn(14, d_model))
        return embedding

    def sentences_of(*lengths):
        return [see.randint(1, 14, length).tolist() for length in lengths]

    def run(label, embedding, block, sentences):
        kept, numbers = copy.deepcopy(sentences), copy.deepcopy((embedding.weight, block))
        out = see.call(label, encode_batch, embedding, block, sentences)
        see.fact(f"{label}: the sentences are left as they were", sentences == kept)
        pairs = zip(block.parameters(), numbers[1].parameters(), strict=True)
        same = torch.equal(embedding.weight, numbers[0]) and all(torch.equal(*p) for p in pairs)
        see.fact(f"{label}: the numbers in embedding and block are left as they were", same)
        see.fact(f"{label}: the block is still in training mode", block.training)
        return out

    with see.probe("sentences of 2, 5 and 3 tokens, d_model 6"):
        embedding, block = embedding_of(6), filled(reference.EncoderBlock(6, 2, 9))
        out = run("the result", embedding, block, sentences_of(2, 5, 3))
        weights = {"the embedding": embedding.weight, "the keys": block.attention.key.weight}
        see.gradients("the result", out, **weights)
    with see.probe("the same sentence alone, and with one of 9 tokens"):
        embedding, block = embedding_of(4), filled(reference.EncoderBlock(4, 2, 7))
        short, long = sentences_of(3, 9)
        run("the result alone", embedding, block, [short])
        run("the result beside a longer one", embedding, block, [short, long])
    with see.probe("four sentences of 4 tokens at most, as many as heads, in two orders"):
        embedding, block = embedding_of(8), filled(reference.EncoderBlock(8, 4, 5))
        sentences = sentences_of(3, 1, 4, 2)
        run("the result", embedding, block, sentences)
        run("the result of the other order", embedding, block, sentences[::-1])
    with see.probe("two blocks, one after the other"):
        block = _BlocksInARow(*(filled(reference.EncoderBlock(6, 3, 5)) for _ in range(2)))
        run("the result", embedding_of(6), block, sentences_of(7, 2, 4, 5))
    with see.probe("two sentences of 3 tokens"):
        block = filled(reference.EncoderBlock(6, 2, 9, norm_first=True))
        run("the result", embedding_of(6), block, sentences_of(3, 3))
    with see.probe("sentences of 41 and 6 tokens"):
        embedding, block = embedding_of(4), filled(reference.EncoderBlock(4, 2, 7))
        run("the result", embedding, block, sentences_of(41, 6))


class _BlocksInARow(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


def _vectors_padded(sentences, padding=0):
    n = max(len(sentence) for sentence in sentences)
    return torch.tensor([sentence + [padding] * (n - len(sentence)) for sentence in sentences])


def _vectors_first_of(embedding, block, ids, mask):
    return block(embedding(ids), mask)[:, 0]


def _vectors_no_mask(embedding, block, sentences):
    return block(embedding(_vectors_padded(sentences)))[:, 0]


def _vectors_inverted(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return _vectors_first_of(embedding, block, ids, (ids == 0)[:, None, None, :])


def _vectors_mask_of_queries(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return _vectors_first_of(embedding, block, ids, (ids != 0)[:, None, :, None])


def _vectors_mask_of_rows(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return _vectors_first_of(embedding, block, ids, ids != 0)


def _vectors_mask_without_heads(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return _vectors_first_of(embedding, block, ids, (ids != 0)[:, None, :])


def _vectors_causal(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return _vectors_first_of(embedding, block, ids, reference.causal_mask(ids.shape[1]))


def _vectors_mask_of_the_first(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return _vectors_first_of(embedding, block, ids, (ids != 0)[:1, None, None, :])


def _vectors_one_pad_seen(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    lengths = torch.tensor([len(s) for s in sentences])
    mask = torch.arange(ids.shape[1]) <= lengths[:, None]
    return _vectors_first_of(embedding, block, ids, mask[:, None, None, :])


def _vectors_last_token_hidden(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    lengths = torch.tensor([len(s) - 1 for s in sentences])
    mask = reference.padding_mask(lengths, ids.shape[1])
    return _vectors_first_of(embedding, block, ids, mask)


def _vectors_first_token_hidden(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    mask = ids != 0
    mask[:, 0] = False
    return _vectors_first_of(embedding, block, ids, mask[:, None, None, :])


def _vectors_number_mask(dtype):
    def encode_batch(embedding, block, sentences):
        ids = _vectors_padded(sentences)
        return _vectors_first_of(embedding, block, ids, (ids != 0).to(dtype)[:, None, None, :])

    return encode_batch


def _vectors_pads_zeroed(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    x = embedding(ids) * (ids != 0)[..., None]
    return block(x)[:, 0]


def _vectors_row_0_zeroed(mask):
    def encode_batch(embedding, block, sentences):
        with torch.no_grad():
            embedding.weight[0] = 0
        ids = _vectors_padded(sentences)
        return block(embedding(ids), (ids != 0)[:, None, None, :] if mask else None)[:, 0]

    return encode_batch


def _vectors_eval(embedding, block, sentences):
    block.eval()
    return reference.encode_batch(embedding, block, sentences)


def _vectors_padded_in_front(embedding, block, sentences):
    n = max(len(sentence) for sentence in sentences)
    ids = torch.tensor([[0] * (n - len(sentence)) + sentence for sentence in sentences])
    return _vectors_first_of(embedding, block, ids, (ids != 0)[:, None, None, :])


def _vectors_last_token_repeated(embedding, block, sentences):
    n = max(len(sentence) for sentence in sentences)
    ids = torch.tensor([s + [s[-1]] * (n - len(s)) for s in sentences])
    return block(embedding(ids))[:, 0]


def _vectors_cut_to_the_shortest(embedding, block, sentences):
    n = min(len(sentence) for sentence in sentences)
    return block(embedding(torch.tensor([sentence[:n] for sentence in sentences])))[:, 0]


def _vectors_last_position(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return block(embedding(ids), (ids != 0)[:, None, None, :])[:, -1]


def _vectors_mean(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return block(embedding(ids), (ids != 0)[:, None, None, :]).mean(dim=1)


def _vectors_masked_mean(embedding, block, sentences):
    real = (ids := _vectors_padded(sentences)) != 0
    out = block(embedding(ids), real[:, None, None, :]) * real[..., None]
    return out.sum(dim=1) / real.sum(dim=1, keepdim=True)


def _vectors_of_all_tokens(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return block(embedding(ids), (ids != 0)[:, None, None, :])


def _vectors_of_the_first_sentence(embedding, block, sentences):
    ids = _vectors_padded(sentences)
    return block(embedding(ids), (ids != 0)[:, None, None, :])[0]


def _vectors_lists_extended(embedding, block, sentences):
    n = max(len(sentence) for sentence in sentences)
    for sentence in sentences:
        sentence += [0] * (n - len(sentence))
    ids = torch.tensor(sentences)
    return _vectors_first_of(embedding, block, ids, (ids != 0)[:, None, None, :])


def _vectors_sorted(embedding, block, sentences):
    return reference.encode_batch(embedding, block, sorted(sentences, key=len, reverse=True))


def _vectors_without_graph(embedding, block, sentences):
    with torch.no_grad():
        return reference.encode_batch(embedding, block, sentences)


def _vectors_one_by_one(embedding, block, sentences):
    return torch.cat([block(embedding(torch.tensor([s])))[:, 0] for s in sentences])


def _vectors_by_lengths(embedding, block, sentences):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sentences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sentences])
    return block(embedding(ids), reference.padding_mask(lengths, ids.shape[1])).select(1, 0)


def _vectors_full_mask(embedding, block, sentences, padding=0):
    ids = _vectors_padded(sentences, padding)
    real = ids.ne(padding)
    mask = real[:, None, :, None] & real[:, None, None, :]  # (batch, 1, n, n)
    return block(embedding(ids), mask)[:, 0, :]


def _vectors_by_length(embedding, block, sentences):
    """Sentences of one length at a time, so that nothing is padded."""
    out = [None] * len(sentences)
    for length in {len(s) for s in sentences}:
        rows = [i for i, s in enumerate(sentences) if len(s) == length]
        vectors = block(embedding(torch.tensor([sentences[i] for i in rows])))[:, 0]
        for i, vector in zip(rows, vectors, strict=True):
            out[i] = vector
    return torch.stack(out)


FIX_MISSING_PADDING_MASK = Exercise(
    slug="fix_missing_padding_mask",
    chapter=3,
    title="Find the bug: a sentence that depends on its neighbours",
    minutes=10,
    difficulty=2,
    reference=reference.encode_batch,
    observe=_observe_encode_batch,
    shipped=encode_batch,
    symptom="The vector of the sentence 3 7 5 changes by 0.30 when a sentence of ten tokens is in "
    "the same batch. It should not change by more than rounding does, 0.000001.",
    misconceptions=(
        Misconception(
            "padding_still_seen",  # museum F11, F12, 4.1
            _vectors_no_mask,
            "The mask hides no padding, or there is none. The tokens still look at the padding "
            "after their sentence, of which there is the more, the longer the longest sentence "
            "is. Hiding it in the output comes too late: the block takes a mask that says where "
            "its tokens may look.",
        ),
        Misconception(
            "mask_inverted",  # museum 3.7, 4.1
            _vectors_inverted,
            "Your mask is True for the padding, so that the tokens look at nothing else. True "
            "means that a query may look there.",
        ),
        Misconception(
            "mask_on_the_queries",  # museum 3.11
            _vectors_mask_of_queries,
            "Your mask runs along the queries: it hides everything from the padding, and hides "
            "the padding from nobody. It has to run along the keys, the last axis.",
        ),
        Misconception(
            "mask_without_its_axes",  # museum 3.20
            _vectors_mask_of_rows,
            "Your mask is (batch, n), and is taken for (query, key): an error, unless batch and n "
            "agree, and then it is wrong without one. It has to broadcast to (batch, heads, query, "
            "key).",
        ),
        Misconception(
            "mask_without_the_axis_of_heads",  # museum 3.20
            _vectors_mask_without_heads,
            "Your mask is (batch, 1, n), so that its batch axis meets the axis of heads: an error, "
            "unless there are as many sentences as heads, and then it is wrong without one. It "
            "has to broadcast to (batch, heads, query, key).",
        ),
        Misconception(
            "causal_mask",
            _vectors_causal,
            "You hand on a causal mask. It hides the padding from the first token, and all the "
            "other tokens too: its vector no longer tells anything about the sentence.",
        ),
        Misconception(
            "mask_of_the_first_sentence",
            _vectors_mask_of_the_first,
            "You go by the length of the first sentence for all of them. Each has its own, and so "
            "a row of its own in the mask.",
        ),
        Misconception(
            "one_pad_seen",
            _vectors_one_pad_seen,
            "Your mask is one too long: with `<=`, the first padding after each sentence counts "
            "as a token. Positions count from 0, so a sentence of 3 tokens ends at position 2.",
        ),
        Misconception(
            "last_token_hidden",
            _vectors_last_token_hidden,
            "Your mask is one too short: the last token of each sentence is hidden with the "
            "padding.",
        ),
        Misconception(
            "first_token_hidden",
            _vectors_first_token_hidden,
            "Your mask hides the first token too. It may look at itself, as at all the others of "
            "its sentence.",
        ),
        Misconception(
            "mask_of_floats",
            _vectors_number_mask(torch.float32),
            "Your mask holds numbers. This chapter's masks are boolean, True where a query may "
            "look; the comparison gives that already.",
        ),
        Misconception(
            "mask_of_integers",
            _vectors_number_mask(torch.int64),
            "Your mask holds whole numbers, whose `~` is not that of True and False. This "
            "chapter's masks are boolean, True where a query may look; the comparison gives that "
            "already.",
        ),
        Misconception(
            "mask_of_small_integers",
            _vectors_number_mask(torch.int32),
            "Your mask holds whole numbers of 32 bits, whose `~` is not that of True and False. "
            "This chapter's masks are boolean, True where a query may look; the comparison gives "
            "that already.",
        ),
        Misconception(
            "padding_embedded_as_zeros",
            _vectors_pads_zeroed,
            "You turn the embeddings of the padding into zeros. A key of zeros gets a score too, "
            "and softmax gives it its share of the weight; it takes a mask to make that share 0.",
        ),
        Misconception(
            "row_0_set_to_zero",
            _vectors_row_0_zeroed(mask=True),
            "The result is right. But you set row 0 of the embedding to zero, and it belongs to "
            "the caller: whoever uses it next has another one. What the padding holds does not "
            "matter once it is hidden.",
        ),
        Misconception(
            "row_0_set_to_zero_unmasked",
            _vectors_row_0_zeroed(mask=False),
            "You set row 0 of the embedding to zero and hand over no mask. A key of zeros gets a "
            "score too, and softmax gives it its share of the weight; and the embedding belongs "
            "to the caller. Leave it as it is, and hide the padding.",
        ),
        Misconception(
            "block_left_in_eval_mode",
            _vectors_eval,
            "The result is right. But you switch the block to evaluation and leave it there, so "
            "that whoever trains it next does so without dropout. The mode is the caller's.",
        ),
        Misconception(
            "padded_in_front",  # museum 4.5
            _vectors_padded_in_front,
            "The mask is right. But you put the padding in front, and position 0 of a short "
            "sentence is then padding, not its first token.",
        ),
        Misconception(
            "last_token_repeated",
            _vectors_last_token_repeated,
            "You fill up with the sentence's last token instead of padding. It then counts as many "
            "times as it stands there, and the vector depends on the neighbours as before.",
        ),
        Misconception(
            "cut_to_the_shortest",
            _vectors_cut_to_the_shortest,
            "Of every sentence only as many tokens count as the shortest has: the others are cut "
            "off or hidden. What a sentence loses then depends on its neighbours.",
        ),
        Misconception(
            "last_position",  # museum 4.3
            _vectors_last_position,
            "The mask is right. But you take the vector of the last position, which in all but "
            "the longest sentence is padding; asked for is the first token's.",
        ),
        Misconception(
            "mean_over_positions",  # museum 4.2
            _vectors_mean,
            "The mask is right. But you average over all positions, the padding among them; asked "
            "for is the vector of the first token.",
        ),
        Misconception(
            "mean_over_tokens",
            _vectors_masked_mean,
            "The mask is right. But you average over the tokens of a sentence; asked for is the "
            "vector of the first one.",
        ),
        Misconception(
            "all_tokens",
            _vectors_of_all_tokens,
            "The mask is right. But you return the vectors of all tokens; asked for is that of "
            "each sentence's first one, (batch, d_model).",
        ),
        Misconception(
            "first_sentence",  # museum 4.4
            _vectors_of_the_first_sentence,
            "The mask is right. But your index picks the first sentence with all its tokens; "
            "asked for is the first token of every sentence.",
        ),
        Misconception(
            "lists_extended",
            _vectors_lists_extended,
            "The result is right, and the lists that were handed in now have padding at their "
            "end: `+=` and `append` change a list in place. Make new ones.",
        ),
        Misconception(
            "sorted_by_length",
            _vectors_sorted,
            "You sort the sentences by length and return the vectors in that order. Row i has to "
            "belong to sentence i.",
        ),
        Misconception(
            "graph_cut",
            _vectors_without_graph,
            "The result is right, and it is cut off from the graph: neither the embedding nor the "
            "block could be trained through it.",
        ),
    ),
    alternatives=(
        _vectors_by_lengths,
        _vectors_full_mask,
        _vectors_one_by_one,
        _vectors_by_length,
    ),
    hints=(
        "Encode a short sentence alone, and once more beside a long one. What is in the second "
        "batch that was not in the first?",
        "Which entries of `ids` are padding? The block takes a second argument, a boolean mask, "
        "True where a query may look.",
        "`ids != 0` is (batch, n). As a mask of keys it needs the axes of heads and queries, of "
        "size 1 each: [:, None, None, :].",
    ),
)


# --- CrossAttention -----------------------------------------------------------------------------


def _observe_cross_attention(CrossAttention, see):
    names = _linear("query", "key", "value", "output")

    def made(d_model, num_heads):
        module = _with_weights(see, CrossAttention(d_model, num_heads), names)
        see("its num_heads", getattr(module, "num_heads", "missing"))
        return module

    def asked(module, x, memory, *mask, label="the output"):
        out = see.call(label, module, x, memory, *mask)
        see.gradients(label, out, x=x, memory=memory, **_parameters(module, names))

    def pair(batch, n, m, d_model):
        return (
            see.randn(batch, n, d_model, requires_grad=True),
            see.randn(batch, m, d_model, requires_grad=True),
        )

    def some(*shape):  # a random mask in which every query may look somewhere
        mask = see.rand(*shape) < 0.5
        mask[..., 1] |= ~mask.any(dim=-1)
        return mask

    with see.probe("x (2, 5, 12), memory (2, 7, 12), 3 heads, no mask"):
        asked(made(12, 3), *pair(2, 5, 7, 12))
    with see.probe("x (3, 6, 10), memory (3, 4, 10), 2 heads, a padding mask (3, 1, 1, 4)"):
        mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
        asked(made(10, 2), *pair(3, 6, 4, 10), mask[:, None, None, :])
    with see.probe("x (2, 4, 12), memory (2, 5, 12), 3 heads, a mask (4, 5) that differs by query"):
        asked(made(12, 3), *pair(2, 4, 5, 12), some(4, 5))
    with see.probe("x (2, 4, 15), memory (2, 7, 15), 3 heads, a mask (2, 3, 4, 7)"):
        asked(made(15, 3), *pair(2, 4, 7, 15), some(2, 3, 4, 7))
    with see.probe("x and memory of one length, (2, 4, 15), 3 heads, a padding mask (2, 1, 1, 4)"):
        mask = torch.arange(4) < torch.tensor([2, 3])[:, None]
        asked(made(15, 3), *pair(2, 4, 4, 15), mask[:, None, None, :])
    with see.probe("x (2, 5, 12) and memory (2, 7, 12) that are transposed views, 3 heads"):
        x = see.randn(5, 12, 2).permute(2, 0, 1).requires_grad_()
        asked(made(12, 3), x, see.randn(2, 12, 7).transpose(1, 2).requires_grad_())
    with see.probe("a batch of one: x (1, 5, 12), memory (1, 7, 12), 3 heads, no mask"):
        asked(made(12, 3), *pair(1, 5, 7, 12))
    with see.probe("one module, two memories in turn: x (2, 5, 12), memory (2, 7, 12), 3 heads"):
        module = made(12, 3)
        for label in ("the output", "the output for the second memory"):
            asked(module, *pair(2, 5, 7, 12), label=label)
    with see.probe("x (3, 5, 8), memory (3, 6, 8), 2 heads; sample 1 may look at nothing at all"):
        mask = torch.arange(6) < torch.tensor([6, 0, 2])[:, None]
        asked(made(8, 2), *pair(3, 5, 6, 8), mask[:, None, None, :])


class _CrossWith(nn.Module):
    """Cross-attention in pieces, of which a subclass changes one."""

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def projected(self, x, memory):
        return self.query(x), self.key(memory), self.value(memory)

    def split(self, x):
        return reference.split_heads(x, self.num_heads)

    def attend(self, q, k, v, mask):
        return reference.scaled_dot_product_attention(q, k, v, mask)

    def merge(self, heads):
        return reference.merge_heads(heads)

    def forward(self, x, memory, mask=None):
        q, k, v = map(self.split, self.projected(x, memory))
        return self.output(self.merge(self.attend(q, k, v, mask)))


class _CrossFromX(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.key(x), self.value(x)


class _CrossFromXUnmasked(_CrossWith):
    def forward(self, x, memory, mask=None):
        return super().forward(x, x)


class _CrossFirstMemory(_CrossWith):
    """Keeps what it made of the first memory."""

    kept = None

    def projected(self, x, memory):
        if self.kept is None:
            self.kept = self.key(memory), self.value(memory)
        return self.query(x), *self.kept


class _CrossSqueezed(_CrossWith):
    def forward(self, x, memory, mask=None):
        return super().forward(x, memory, mask).squeeze(0)


class _CrossKeysFromX(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.key(x), self.value(memory)


class _CrossValuesFromX(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.key(memory), self.value(x)


class _CrossSwapped(_CrossWith):
    def projected(self, x, memory):
        return self.query(memory), self.key(x), self.value(x)


class _CrossFromMemory(_CrossWith):
    def projected(self, x, memory):
        return self.query(memory), self.key(memory), self.value(memory)


class _CrossXInMemory(_CrossWith):
    def projected(self, x, memory):
        both = torch.cat((memory, x), dim=1)
        return self.query(x), self.key(both), self.value(both)

    def attend(self, q, k, v, mask):
        if mask is not None:
            mask = F.pad(mask, (0, q.shape[2]), value=True)
        return super().attend(q, k, v, mask)


class _CrossKeyAsValue(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.key(memory), self.key(memory)


class _CrossValueAsKey(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.value(memory), self.value(memory)


class _CrossProjectionsSwapped(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.value(memory), self.key(memory)


class _CrossOneProjection(_CrossWith):
    def projected(self, x, memory):
        return self.key(x), self.key(memory), self.value(memory)


class _CrossQueryForKey(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.query(memory), self.value(memory)


class _CrossRawValues(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), self.key(memory), memory


class _CrossRawMemory(_CrossWith):
    def projected(self, x, memory):
        return self.query(x), memory, memory


class _CrossDetached(_CrossWith):
    def forward(self, x, memory, mask=None):
        return super().forward(x, memory.detach(), mask)


class _CrossOutputUnused(_CrossWith):
    def forward(self, x, memory, mask=None):
        q, k, v = map(self.split, self.projected(x, memory))
        return self.merge(self.attend(q, k, v, mask))


class _CrossOutputMissing(_CrossOutputUnused):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        del self.output


class _CrossNoBias(_CrossWith):
    def __init__(self, d_model, num_heads):
        super().__init__(d_model, num_heads)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(d_model, d_model, bias=False))


class _CrossResidual(_CrossWith):
    def forward(self, x, memory, mask=None):
        return x + super().forward(x, memory, mask)


class _CrossOneHead(_CrossWith):
    def split(self, x):
        return x[:, None]

    def merge(self, heads):
        return heads[:, 0]


class _CrossSplitByView(_CrossWith):
    def split(self, x):
        return x.reshape(len(x), self.num_heads, x.shape[1], self.d_head)


class _CrossNotTransposedBack(_CrossWith):
    def merge(self, heads):
        batch, _, n, _ = heads.shape
        return heads.reshape(batch, n, -1)


class _CrossViewsOnly(_CrossSplitByView, _CrossNotTransposedBack):
    pass


class _CrossInterleaved(_CrossWith):
    def split(self, x):
        return x.unflatten(-1, (self.d_head, self.num_heads)).permute(0, 3, 1, 2)

    def merge(self, heads):
        return heads.permute(0, 2, 3, 1).flatten(2)


class _CrossHeadsAveraged(_CrossWith):
    def merge(self, heads):
        return heads.mean(dim=1).repeat(1, 1, self.num_heads)


class _CrossMaskIgnored(_CrossWith):
    def forward(self, x, memory, mask=None):
        return super().forward(x, memory)


class _CrossMaskInverted(_CrossWith):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None if mask is None else ~mask)


class _CrossBlindSeeAll(_CrossWith):
    def attend(self, q, k, v, mask):
        mask = mask if mask is None else mask | ~mask.any(dim=-1, keepdim=True)
        return super().attend(q, k, v, mask)


class _CrossMaskTransposed(_CrossWith):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None if mask is None else mask.transpose(-2, -1))


class _CrossCausal(_CrossWith):
    def attend(self, q, k, v, mask):
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return super().attend(q, k, v, causal if mask is None else causal & mask)


class _CrossInline(_CrossWith):
    """The formula of attention written out, without a thought for a query that sees nothing."""

    def scaled(self, scores):
        return scores / math.sqrt(self.d_head)

    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(~mask, -math.inf)

    def weights(self, scores, mask):
        return self.masked(scores, mask).softmax(dim=-1)

    def attend(self, q, k, v, mask):
        return self.weights(self.scaled(q @ k.transpose(-2, -1)), mask) @ v


class _CrossNotScaled(_CrossInline):
    def scaled(self, scores):
        return scores


class _CrossScaledByModel(_CrossInline):
    def scaled(self, scores):
        return scores / math.sqrt(self.d_head * self.num_heads)


class _CrossScaledByD(_CrossInline):
    def scaled(self, scores):
        return scores / self.d_head


class _CrossMultiplied(_CrossInline):
    def scaled(self, scores):
        return scores * math.sqrt(self.d_head)


class _CrossSoftmaxOverQueries(_CrossInline):
    def weights(self, scores, mask):
        return self.masked(scores, mask).softmax(dim=-2)


class _CrossSoftmaxOverHeads(_CrossInline):
    def weights(self, scores, mask):
        return self.masked(scores, mask).softmax(dim=1)


class _CrossMaskAfterSoftmax(_CrossInline):
    def weights(self, scores, mask):
        weights = scores.softmax(dim=-1)
        return weights if mask is None else weights * mask


class _CrossMaskedToZero(_CrossInline):
    def masked(self, scores, mask):
        return scores if mask is None else scores * mask


class _CrossMaskAdded(_CrossInline):
    def masked(self, scores, mask):
        return scores if mask is None else scores + mask


class _CrossMaskedWeakly(_CrossInline):
    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(~mask, -10.0)


class _CrossBlindAverage(_CrossInline):
    def masked(self, scores, mask):
        return scores if mask is None else scores.masked_fill(~mask, -1e9)


class _CrossEinsum(nn.Module):
    def __init__(self, d_model, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = nn.Dropout(dropout)
        for name in ("query", "key", "value", "output"):
            self.add_module(name, nn.Linear(d_model, d_model))

    def forward(self, x, memory, mask=None, return_weights=False):
        split = (self.num_heads, -1)
        q = self.query(x).unflatten(-1, split)  # (batch, n, heads, d_head)
        k, v = self.key(memory).unflatten(-1, split), self.value(memory).unflatten(-1, split)
        scores = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
        if mask is not None:
            scores = scores + torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
            scores = torch.where(mask.any(dim=-1, keepdim=True), scores, 0.0)
        weights = torch.softmax(scores, dim=-1)
        if mask is not None:
            weights = weights * mask
        out = self.output(torch.einsum("bhqk,bkhd->bqhd", self.dropout(weights), v).flatten(2))
        return (out, weights) if return_weights else out


class _CrossByTorch(reference.MultiHeadAttention):
    def forward(self, x, memory, mask=None):
        def split(projected):
            return projected.view(len(x), -1, self.num_heads, x.shape[-1] // self.num_heads)

        q, k, v = (
            split(linear(source)).transpose(1, 2)
            for linear, source in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(heads.transpose(1, 2).flatten(2))


class _CrossLoopOverHeads(nn.Module):
    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads, self.d_head = num_heads, d_model // num_heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, x, memory, mask=None):
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        heads, parts = [], range(0, x.shape[-1], self.d_head)
        for h, start in enumerate(parts):
            part = slice(start, start + self.d_head)
            visible = mask
            if mask is not None and mask.ndim == 4:
                visible = mask[:, min(h, mask.shape[1] - 1)]
            heads.append(
                reference.scaled_dot_product_attention(
                    q[..., part], k[..., part], v[..., part], visible
                )
            )
        return self.output(torch.cat(heads, dim=-1))


def _cross_made_by_a_function(d_model, num_heads):
    return _CrossEinsum(d_model, num_heads).eval()


CROSS_ATTENTION = Exercise(
    slug="cross_attention",
    chapter=3,
    title="Attention from one sequence to another",
    minutes=15,
    difficulty=2,
    reference=reference.CrossAttention,
    observe=_observe_cross_attention,
    misconceptions=(
        Misconception(
            "keys_and_values_from_x",  # museum 3.26
            _CrossFromX,
            "You make queries, keys and values all from `x`: that is self-attention, and your "
            "output stays the same whatever the memory says. What is looked up, keys and values, "
            "has to come from the memory.",
        ),
        Misconception(
            "self_attention_without_mask",  # museum 3.26
            _CrossFromXUnmasked,
            "You make queries, keys and values all from `x` and leave the mask aside: that is "
            "self-attention, and your output stays the same whatever the memory says. What is "
            "looked up, keys and values, has to come from the memory, and the mask with it.",
        ),
        Misconception(
            "memory_of_the_first_call",
            _CrossFirstMemory,
            "You keep the keys and values of the first memory and use them for all that follow. "
            "The next text has another memory: make them anew in every call.",
        ),
        Misconception(
            "batch_of_one_squeezed",
            _CrossSqueezed,
            "With a batch of one, the axis of the batch is missing from your output: `squeeze` "
            "takes away whatever has size 1. The output has x's shape, (batch, n, d_model).",
        ),
        Misconception(
            "keys_from_x",  # museum 3.26
            _CrossKeysFromX,
            "You make the keys from `x` and the values from the memory. A key is the label of the "
            "value beside it, so both must come from the same token of the memory; with unequal "
            "lengths the shapes do not even fit.",
        ),
        Misconception(
            "values_from_x",  # museum 3.26
            _CrossValuesFromX,
            "You make the values from `x` and the keys from the memory. What is fetched should be "
            "a mixture of what the memory holds; with unequal lengths the shapes do not even fit.",
        ),
        Misconception(
            "x_and_memory_swapped",
            _CrossSwapped,
            "You let the memory ask and `x` answer, so your output has one vector for each token "
            "of the memory. The one who asks is `x`: one query, and one output, for each of its "
            "tokens.",
        ),
        Misconception(
            "queries_from_memory",
            _CrossFromMemory,
            "You make the queries from the memory as well, so `x` is not used at all and your "
            "output has the memory's length. Queries come from the sequence that asks, `x`.",
        ),
        Misconception(
            "x_among_the_memory",
            _CrossXInMemory,
            "You put `x` after the memory and attend to both. The tokens of `x` look at one "
            "another in the self-attention before; here they may look at the memory alone.",
        ),
        Misconception(
            "key_used_as_value",  # museum §5
            _CrossKeyAsValue,
            "You use the keys as values too, so `value` has no part in the result and gets no "
            "gradient. What a token is found by and what it hands over are two projections.",
        ),
        Misconception(
            "value_used_as_key",
            _CrossValueAsKey,
            "You use the values as keys too, so `key` has no part in the result and gets no "
            "gradient. What a token is found by and what it hands over are two projections.",
        ),
        Misconception(
            "key_and_value_swapped",
            _CrossProjectionsSwapped,
            "You make the keys with `value` and the values with `key`. A model trained this way "
            "would learn, yet weights copied from another one land in the wrong places.",
        ),
        Misconception(
            "key_projection_for_queries",  # museum 3.16
            _CrossOneProjection,
            "You send `x` through `key` instead of `query`, which gets no gradient. Asking and "
            "being found are two roles, each with weights of its own.",
        ),
        Misconception(
            "query_projection_for_keys",  # museum 3.16
            _CrossQueryForKey,
            "You send the memory through `query` instead of `key`, which gets no gradient. Asking "
            "and being found are two roles, each with weights of its own.",
        ),
        Misconception(
            "values_not_projected",  # museum 3.16
            _CrossRawValues,
            "You take the memory itself for the values. The values are a projection of the "
            "memory, made with `value`, which gets no gradient in your version.",
        ),
        Misconception(
            "memory_not_projected",  # museum 3.16
            _CrossRawMemory,
            "You take the memory itself for keys and values, so `key` and `value` are never used. "
            "The memory's tokens go through these two layers first.",
        ),
        Misconception(
            "memory_detached",
            _CrossDetached,
            "You cut the memory off from the graph. The output is right, but the encoder that "
            "made the memory receives no gradient from here and cannot learn what to say.",
        ),
        Misconception(
            "output_projection_unused",  # museum 3.16
            _CrossOutputUnused,
            "You return the merged heads as they are. The last layer, `output`, which mixes what "
            "the heads have found, is missing from your forward.",
        ),
        Misconception(
            "no_output_projection",  # museum 3.16
            _CrossOutputMissing,
            "Your module has no layer `output`. The merged heads go through a fourth linear "
            "layer, which mixes what they have found.",
        ),
        Misconception(
            "no_bias",
            _CrossNoBias,
            "Your linear layers have no bias. The four projections of this chapter are plain "
            "nn.Linear(d_model, d_model), with a bias, so that weights can be copied over.",
        ),
        Misconception(
            "residual_added",
            _CrossResidual,
            "You add `x` to the result. The residual connection belongs to the block around the "
            "attention, which would then add it a second time.",
        ),
        Misconception(
            "heads_not_split",
            _CrossOneHead,
            "You attend once with all d_model features. Each head looks with d_model / num_heads "
            "features of its own and has its own weights; split queries, keys and values first.",
        ),
        Misconception(
            "split_without_transposing",  # museum 3.12
            _CrossSplitByView,
            "You make the heads by reshaping alone, which cuts the sequence into pieces: each "
            "head gets a few whole tokens instead of a few features of all tokens. The axes of "
            "tokens and heads have to change places.",
        ),
        Misconception(
            "heads_not_transposed_back",  # museum 3.13, §5
            _CrossNotTransposedBack,
            "You merge the heads without bringing the token axis back before the head axis. The "
            "shape is right, and each output vector is a mixture of several tokens.",
        ),
        Misconception(
            "views_both_ways",  # museum 3.14
            _CrossViewsOnly,
            "You reshape on the way in and on the way out and transpose on neither. The two "
            "mistakes fit together, so that every shape is right, yet each head sees pieces of "
            "the sequence instead of some features of all tokens.",
        ),
        Misconception(
            "heads_interleaved",  # museum 3.15
            _CrossInterleaved,
            "You deal the features out to the heads like cards, one to each in turn. A head has "
            "d_head neighbouring features; your network could learn as well, but weights copied "
            "from another one do not fit.",
        ),
        Misconception(
            "heads_averaged",  # museum 3.17, C1
            _CrossHeadsAveraged,
            "You average the heads. They are set side by side, so that each keeps what it found; "
            "an average leaves d_head numbers of what were d_model.",
        ),
        Misconception(
            "mask_ignored",
            _CrossMaskIgnored,
            "You do not use the mask, so queries look at the memory's padding as if it were text. "
            "Hand the mask on to the attention.",
        ),
        Misconception(
            "mask_inverted",  # museum 3.7
            _CrossMaskInverted,
            "You hide what should be seen and show what should be hidden. True in the mask means "
            "that the query may look there.",
        ),
        Misconception(
            "mask_transposed",  # museum 3.11
            _CrossMaskTransposed,
            "You transpose the mask, so that it acts on the queries. Its last axis stands for the "
            "keys, the tokens of the memory; with unequal lengths the shapes do not even fit.",
        ),
        Misconception(
            "causal",
            _CrossCausal,
            "You add a causal mask. The memory is there as a whole before the first token is "
            "written, so that every query may look at all of it; only self-attention in the "
            "decoder has a future to hide.",
        ),
        Misconception(
            "queries_that_see_nothing_are_nan",  # museum 3.21
            _CrossInline,
            "You give NaN to a query that may look at nothing: softmax over scores that are all "
            "−∞ is 0 / 0. Such a query should get zeros, and scaled_dot_product_attention of this "
            "chapter sees to that.",
        ),
        Misconception(
            "queries_that_see_nothing_see_all",  # museum 3.21
            _CrossBlindSeeAll,
            "You let a query that may look at nothing look at everything. That avoids NaN, and "
            "shows it the very tokens that the mask hides; such a query should get zeros.",
        ),
        Misconception(
            "not_scaled",  # museum 3.3, §5
            _CrossNotScaled,
            "You do not divide the scores by √d_head. They grow with the number of features, and "
            "softmax turns into a hard choice whose gradients vanish.",
        ),
        Misconception(
            "scaled_by_d_model",  # museum 3.4
            _CrossScaledByModel,
            "You divide the scores by √d_model. A score is a sum over the features of one head, "
            "so it is their number that counts.",
        ),
        Misconception(
            "scaled_by_d_head",  # museum 3.4
            _CrossScaledByD,
            "You divide the scores by d_head. Their standard deviation, which is what should "
            "become 1, grows with the root of the number of features.",
        ),
        Misconception(
            "multiplied_by_the_root",  # museum 3.4
            _CrossMultiplied,
            "You multiply the scores by √d_head, where they should be divided by it: sums over "
            "many features are too large, and you make them larger.",
        ),
        Misconception(
            "softmax_over_queries",  # museum 3.1, §5
            _CrossSoftmaxOverQueries,
            "You take softmax over the queries, so that the weights of one query do not add up to "
            "1. Each query shares out its attention among the keys: the last axis.",
        ),
        Misconception(
            "softmax_over_heads",  # museum 3.2
            _CrossSoftmaxOverHeads,
            "You take softmax over the heads, so that they compete for each pair of tokens. Each "
            "query of each head shares out its attention among the keys: the last axis.",
        ),
        Misconception(
            "mask_after_softmax",  # museum 3.5
            _CrossMaskAfterSoftmax,
            "You set masked weights to 0 after the softmax. The weights that are left add up to "
            "less than 1, by as much as the hidden tokens had drawn; hide the scores before.",
        ),
        Misconception(
            "masked_scores_zero",  # museum 3.6
            _CrossMaskedToZero,
            "You set masked scores to 0. Softmax gives a score of 0 the weight e⁰ = 1 before it "
            "normalises, so that hidden tokens still draw attention.",
        ),
        Misconception(
            "mask_added",  # museum 3.8
            _CrossMaskAdded,
            "You add the boolean mask to the scores, where True counts as 1. That favours the "
            "visible tokens a little and hides none.",
        ),
        Misconception(
            "masked_with_minus_10",  # museum 3.22
            _CrossMaskedWeakly,
            "You replace masked scores by −10. e⁻¹⁰ is small and not 0, so that hidden tokens "
            "leak in; other scores may be below −10 as well.",
        ),
        Misconception(
            "masked_with_minus_1e9",  # museum 3.21, 3.22
            _CrossBlindAverage,
            "You replace masked scores by −10⁹. A query that may look at nothing then weighs all "
            "hidden tokens alike instead of getting zeros, and in float16 the number does not "
            "even fit.",
        ),
    ),
    alternatives=(
        _CrossEinsum,
        _CrossByTorch,
        _CrossLoopOverHeads,
        _CrossWith,
        _cross_made_by_a_function,
    ),
    rtol=1e-6,  # what it is made of may be the learner's own, right to float32's digits
    atol=1e-6,
    hints=(
        "Compare with your MultiHeadAttention. Which of its three projections asks, and which two "
        "describe what can be looked up?",
        "The output has one vector for each token of `x`, so the queries come from `x`. The "
        "tokens that are looked up are those of `memory`.",
        "Copy MultiHeadAttention with its four layers, give its forward the arguments x, memory "
        "and mask=None, and let key and value read memory. Splitting, attention, merging and the "
        "output layer stay as they are.",
    ),
)

# --- greedy_decode ------------------------------------------------------------------------------


def _greedy_script(see, prompt, vocab, end_id, ends):
    """next_logits, and what it was given: a recurrent network which keeps its state.

    Its answers depend on all tokens it was given, in order. Row b produces end_id as new token
    number ends[b] (0: never), and would go on with others if it were asked.
    """
    embedding, mixing = see.randn(vocab, 6), see.randn(6, 6) / 2
    head = (2 * see.randn(6, vocab)).requires_grad_()
    turns = torch.tensor(ends) + prompt.shape[1] - 1  # the position whose successor is the end
    never = torch.tensor(ends) == 0
    state, calls, recording = [torch.zeros(len(prompt), 6, dtype=torch.float64)], [], []

    def next_logits(tokens):
        if tokens.ndim != 2:
            shape = tuple(tokens.shape)
            raise ValueError(f"next_logits takes tokens of shape (batch, k), not {shape}")
        if len(tokens) != len(prompt):
            rows = f"{len(tokens)} rows, and began with {len(prompt)}"
            raise ValueError(f"next_logits keeps a state for every row: it was given {rows}")
        calls.append(tokens.clone())
        recording.append(torch.is_grad_enabled())
        answers = []
        for column in tokens.T:
            state.append(torch.tanh(state[-1] @ mixing + embedding[column]))
            logits = state[-1] @ head
            turn = (turns == len(state) - 1) & ~never
            end = torch.where(turn, logits.amax(dim=1) + 1, logits.mean(dim=1))
            is_end = torch.arange(vocab) == end_id
            answers.append(torch.where(is_end, end[:, None], logits))
        return torch.stack(answers, dim=1)  # (batch, k, vocab)

    return next_logits, calls, recording


def _observe_greedy_decode(greedy_decode, see):
    def decoded(prompt, vocab, end_id, ends, max_new_tokens):
        next_logits, calls, recording = _greedy_script(see, prompt, vocab, end_id, ends)
        result = see.call("the result", greedy_decode, next_logits, prompt, end_id, max_new_tokens)
        new = result.shape[1] - prompt.shape[1]
        # One call more, whose answer is not used, does no harm.
        given = [tokens.clone() for tokens in calls[:new]]
        for number, tokens in enumerate(given):
            for row, end in enumerate(ends):
                if 0 < end < number and row < len(tokens):
                    tokens[row] = end_id  # what a row that is done is given does not matter
        see("the list of what next_logits is given", given)
        see.fact(
            "next_logits is called once for each new token, and at most once more",
            0 <= len(calls) - new <= 1,
        )
        see.fact("torch records nothing for gradients inside next_logits", not any(recording))
        see.fact("torch records again after the call, as before it", torch.is_grad_enabled())

    with see.probe("a prompt (4, 3); the rows end after 3, 6, 2 and 4 of at most 9 new tokens"):
        decoded(see.randint(0, 11, 4, 3) + 1, 12, 0, (3, 6, 2, 4), 9)
    with see.probe("a prompt (2, 5); end_id 7 comes after 2 new tokens in row 0, never in row 1"):
        decoded(see.randint(0, 7, 2, 5), 10, 7, (2, 0), 6)
    with see.probe("a prompt (4, 3) that contains end_id 5; no row ends within 4 new tokens"):
        prompt = see.randint(0, 5, 4, 3)
        prompt[1, 0] = prompt[2, 2] = prompt[3, 1] = 5
        decoded(prompt, 9, 5, (0, 0, 0, 0), 4)
    with see.probe("a prompt (3, 4) with end_id 2 in every row; none ends within 5 new tokens"):
        prompt = see.randint(3, 8, 3, 4)
        prompt[0, 1] = prompt[1, 3] = prompt[2, 0] = 2
        decoded(prompt, 8, 2, (0, 0, 0), 5)
    with see.probe("a prompt (3, 2); every row ends with its first new token"):
        decoded(see.randint(0, 6, 3, 2), 8, 6, (1, 1, 1), 5)
    with see.probe("a prompt (2, 6); the last row ends with the last of 5 new tokens"):
        decoded(see.randint(0, 3, 2, 6), 13, 3, (4, 5), 5)
    with see.probe("a prompt (5, 1), at most 1 new token"):
        decoded(see.randint(0, 9, 5, 1), 10, 9, (0, 0, 1, 0, 0), 1)
    with see.probe("a prompt (2, 4), max_new_tokens 0"):
        decoded(see.randint(0, 9, 2, 4), 10, 9, (0, 1), 0)


class _Greedy:
    """Greedy decoding in pieces, of which a subclass changes one; `decode` is the function."""

    def rounds(self, prompt, max_new_tokens):
        return range(max_new_tokens)

    def last(self, logits):
        return logits[:, -1]

    def choose(self, logits):
        return logits.argmax(dim=-1)

    def fill(self, chosen, done, end_id):
        return chosen.masked_fill(done, end_id)

    def finished(self, done, chosen, end_id):
        return done | (chosen == end_id)

    def over(self, done):
        return done.all()

    def feed(self, tokens, fresh):
        return fresh

    def result(self, tokens, prompt):
        return tokens

    def run(self, next_logits, prompt, end_id, max_new_tokens):
        tokens = fed = prompt
        done = torch.zeros(len(prompt), dtype=torch.bool)
        for _ in self.rounds(prompt, max_new_tokens):
            chosen = self.choose(self.last(next_logits(fed)))
            chosen = self.fill(chosen, done, end_id)
            fresh = chosen[:, None]
            tokens = torch.cat((tokens, fresh), dim=1)
            fed = self.feed(tokens, fresh)
            done = self.finished(done, chosen, end_id)
            if self.over(done):
                break
        return self.result(tokens, prompt)

    @classmethod
    def decode(cls, next_logits, prompt, end_id, max_new_tokens):
        with torch.no_grad():
            return cls().run(next_logits, prompt, end_id, max_new_tokens)


class _GreedyAllAgain(_Greedy):
    def feed(self, tokens, fresh):
        return tokens


class _GreedyWithoutAxis(_Greedy):
    def feed(self, tokens, fresh):
        return fresh[:, 0]


class _GreedyPairs(_Greedy):
    def feed(self, tokens, fresh):
        return tokens[:, -2:]


class _GreedyFirstPosition(_Greedy):
    def last(self, logits):
        return logits[:, 0]


class _GreedyLastRow(_Greedy):
    def last(self, logits):
        return logits[-1]


class _GreedyMeanPosition(_Greedy):
    def last(self, logits):
        return logits.mean(dim=1)


class _GreedyOverBatch(_Greedy):
    def choose(self, logits):
        return logits.argmax(dim=0)


class _GreedyOneForAll(_Greedy):
    def choose(self, logits):
        return logits.argmax().expand(len(logits))


class _GreedyFirstRowForAll(_Greedy):
    def choose(self, logits):
        return logits[0].argmax().expand(len(logits))


class _GreedySampling(_Greedy):
    def choose(self, logits):
        return torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]


class _GreedyArgmin(_Greedy):
    def choose(self, logits):
        return logits.argmin(dim=-1)


class _GreedyMaximumItself(_Greedy):
    def choose(self, logits):
        return logits.amax(dim=-1)


class _GreedyGoesOn(_Greedy):
    def fill(self, chosen, done, end_id):
        return chosen


class _GreedyFillsZero(_Greedy):
    def fill(self, chosen, done, end_id):
        return chosen.masked_fill(done, 0)


class _GreedyAny(_Greedy):
    def over(self, done):
        return done.any()


class _GreedyNeverOver(_Greedy):
    def over(self, done):
        return False


class _GreedyFirstRowDecides(_Greedy):
    def over(self, done):
        return done[0]


class _GreedyAllAtOnce(_GreedyGoesOn):
    def finished(self, done, chosen, end_id):
        return chosen == end_id


class _GreedyFilledAllAtOnce(_Greedy):
    """Stops when all rows choose the end at once; finished rows are filled in the result."""

    def run(self, next_logits, prompt, end_id, max_new_tokens):
        tokens = fed = prompt
        done = torch.zeros(len(prompt), dtype=torch.bool)
        for _ in range(max_new_tokens):
            chosen = next_logits(fed)[:, -1].argmax(dim=-1)
            over = (chosen == end_id).all()
            fed = chosen.masked_fill(done, end_id)[:, None]
            done = done | (chosen == end_id)
            tokens = torch.cat((tokens, fed), dim=1)
            if over:
                break
        return tokens


class _GreedyPromptEnds(_Greedy):
    def run(self, next_logits, prompt, end_id, max_new_tokens):
        tokens = fed = prompt
        for _ in range(max_new_tokens):
            done = (tokens == end_id).any(dim=1)
            if done.all():
                break
            chosen = next_logits(fed)[:, -1].argmax(dim=-1)
            fed = chosen.masked_fill(done, end_id)[:, None]
            tokens = torch.cat((tokens, fed), dim=1)
        return tokens


class _GreedyDoneFromTheStart(_Greedy):
    """Begins with rows that are done already."""

    def ended(self, prompt, end_id):
        return (prompt == end_id).any(dim=1)

    def run(self, next_logits, prompt, end_id, max_new_tokens):
        tokens = fed = prompt
        done = self.ended(prompt, end_id)
        for _ in range(max_new_tokens):
            chosen = next_logits(fed)[:, -1].argmax(dim=-1).masked_fill(done, end_id)
            fed, done = chosen[:, None], done | (chosen == end_id)
            tokens = torch.cat((tokens, fed), dim=1)
            if done.all():
                break
        return tokens


class _GreedyDoneByLastToken(_GreedyDoneFromTheStart):
    def ended(self, prompt, end_id):
        return prompt[:, -1] == end_id


class _GreedyPromptsEnd(_Greedy):
    """Right but for the question whether to go on, which is asked of the prompt too."""

    def run(self, next_logits, prompt, end_id, max_new_tokens):
        tokens = fed = prompt
        for _ in range(max_new_tokens):
            if (tokens == end_id).any(dim=1).all():
                break
            done = (tokens[:, prompt.shape[1] :] == end_id).any(dim=1)
            chosen = next_logits(fed)[:, -1].argmax(dim=-1)
            fed = chosen.masked_fill(done, end_id)[:, None]
            tokens = torch.cat((tokens, fed), dim=1)
        return tokens


class _GreedyLate(_Greedy):
    def run(self, next_logits, prompt, end_id, max_new_tokens):
        tokens = fed = prompt
        done = torch.zeros(len(prompt), dtype=torch.bool)
        for _ in range(max_new_tokens):
            over = done.all()
            chosen = next_logits(fed)[:, -1].argmax(dim=-1).masked_fill(done, end_id)
            fed, done = chosen[:, None], done | (chosen == end_id)
            tokens = torch.cat((tokens, fed), dim=1)
            if over:
                break
        return tokens


class _GreedyOneLess(_Greedy):
    def rounds(self, prompt, max_new_tokens):
        return range(1, max_new_tokens)


class _GreedyOneMore(_Greedy):
    def rounds(self, prompt, max_new_tokens):
        return range(max_new_tokens + 1)


class _GreedyAtLeastOne(_Greedy):
    def rounds(self, prompt, max_new_tokens):
        return range(max(1, max_new_tokens))


class _GreedyCountsPrompt(_Greedy):
    def rounds(self, prompt, max_new_tokens):
        return range(prompt.shape[1], max_new_tokens)


class _GreedyOnlyNew(_Greedy):
    def result(self, tokens, prompt):
        return tokens[:, prompt.shape[1] :]


class _GreedyWithoutGraph(_Greedy):
    @classmethod
    def decode(cls, next_logits, prompt, end_id, max_new_tokens):
        return cls().run(next_logits, prompt, end_id, max_new_tokens)


class _GreedyLeavesGradOff(_Greedy):
    @classmethod
    def decode(cls, next_logits, prompt, end_id, max_new_tokens):
        torch.set_grad_enabled(False)
        return cls().run(next_logits, prompt, end_id, max_new_tokens)


class _GreedyInt32(_Greedy):
    def result(self, tokens, prompt):
        return tokens.int()


def _greedy_float_tokens(next_logits, prompt, end_id, max_new_tokens):
    batch, t = prompt.shape
    tokens = torch.zeros(batch, t + max_new_tokens)
    tokens[:, :t] = prompt
    done = torch.zeros(batch, dtype=torch.bool)
    fed, length = prompt, t
    with torch.no_grad():
        while length < t + max_new_tokens and not done.all():
            chosen = next_logits(fed)[:, -1].argmax(dim=-1).masked_fill(done, end_id)
            tokens[:, length], fed = chosen, chosen[:, None]
            done, length = done | (chosen == end_id), length + 1
    return tokens[:, :length]


@torch.no_grad()
def _greedy_end_dropped(next_logits, prompt, end_id, max_new_tokens):
    tokens = fed = prompt
    done = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(max_new_tokens):
        chosen = next_logits(fed)[:, -1].argmax(dim=-1).masked_fill(done, end_id)
        done = done | (chosen == end_id)
        if done.all():
            break
        fed = chosen[:, None]
        tokens = torch.cat((tokens, fed), dim=1)
    return tokens


@torch.no_grad()
def _greedy_last_token_twice(next_logits, prompt, end_id, max_new_tokens):
    next_logits(prompt)
    tokens, fed = prompt, prompt[:, -1:]
    done = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(max_new_tokens):
        chosen = next_logits(fed)[:, -1].argmax(dim=-1).masked_fill(done, end_id)
        fed, done = chosen[:, None], done | (chosen == end_id)
        tokens = torch.cat((tokens, fed), dim=1)
        if done.all():
            break
    return tokens


@torch.no_grad()
def _greedy_only_last_of_prompt(next_logits, prompt, end_id, max_new_tokens):
    tokens = prompt
    done = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(max_new_tokens):
        chosen = next_logits(tokens[:, -1:])[:, -1].argmax(dim=-1).masked_fill(done, end_id)
        done = done | (chosen == end_id)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        if done.all():
            break
    return tokens


@torch.no_grad()
def _greedy_prompt_in_steps(next_logits, prompt, end_id, max_new_tokens):
    for i in range(prompt.shape[1] - 1):
        next_logits(prompt[:, i : i + 1])
    return _greedy_only_last_of_prompt(next_logits, prompt, end_id, max_new_tokens)


@torch.no_grad()
def _greedy_prompt_in_two_parts(next_logits, prompt, end_id, max_new_tokens):
    next_logits(prompt[:, :-1])
    return _greedy_only_last_of_prompt(next_logits, prompt, end_id, max_new_tokens)


@torch.no_grad()
def _greedy_rows_left_out(next_logits, prompt, end_id, max_new_tokens):
    tokens = fed = prompt
    alive = torch.arange(len(prompt))
    for _ in range(max_new_tokens):
        chosen = torch.full((len(prompt),), end_id)
        chosen[alive] = next_logits(fed)[:, -1].argmax(dim=-1)
        tokens = torch.cat((tokens, chosen[:, None]), dim=1)
        alive = alive[chosen[alive] != end_id]
        if len(alive) == 0:
            break
        fed = chosen[alive, None]
    return tokens


@torch.no_grad()
def _greedy_twice_each(next_logits, prompt, end_id, max_new_tokens):
    tokens = fed = prompt
    done = torch.zeros(len(prompt), dtype=torch.bool)
    while tokens.shape[1] - prompt.shape[1] < max_new_tokens and not done.all():
        likely = next_logits(fed)[:, -1].softmax(dim=-1)
        chosen = next_logits(fed)[:, -1].argmax(dim=-1).masked_fill(done, end_id)
        fed, done = chosen[:, None], done | (chosen == end_id) | likely.isnan().any(dim=-1)
        tokens = torch.cat((tokens, fed), dim=1)
    return tokens


@torch.no_grad()
def _greedy_all_positions(next_logits, prompt, end_id, max_new_tokens):
    tokens = fed = prompt
    done = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(max_new_tokens):
        fed = next_logits(fed).argmax(dim=-1).masked_fill(done[:, None], end_id)
        tokens = torch.cat((tokens, fed), dim=1)
        done = done | (fed[:, -1] == end_id)
        if done.all():
            break
    return tokens


@torch.inference_mode()
def _greedy_preallocated(next_logits, prompt, end_id, max_new_tokens, temperature=1.0):
    batch, t = prompt.shape
    tokens = prompt.new_full((batch, t + max_new_tokens), end_id)
    tokens[:, :t] = prompt
    alive = torch.ones(batch, dtype=torch.bool)
    start, length = 0, t
    while length < t + max_new_tokens and alive.any():
        probabilities = F.softmax(next_logits(tokens[:, start:length])[:, -1] / temperature, dim=-1)
        best = probabilities.topk(1).indices[:, 0]
        tokens[:, length] = torch.where(alive, best, end_id)
        alive &= best != end_id
        start, length = length, length + 1
    return tokens[:, :length]


def _greedy_by_rows(next_logits, prompt, end_id, max_new_tokens):
    rows = prompt.tolist()
    new = [[] for _ in rows]
    fed = prompt
    with torch.no_grad():
        while len(new[0]) < max_new_tokens and not all(end_id in row for row in new):
            logits = next_logits(fed)
            for row, answer in zip(new, logits, strict=True):
                row.append(end_id if end_id in row else int(answer[-1].argmax()))
            fed = torch.tensor([[row[-1]] for row in new])
    return torch.tensor([old + row for old, row in zip(rows, new, strict=True)])


@torch.no_grad()
def _greedy_a_step_ahead(next_logits, prompt, end_id, max_new_tokens):
    """Asks for the logits before it knows whether they are needed, and feeds what it chose."""
    pieces, done = [prompt], None
    logits = next_logits(prompt)
    for _ in range(max_new_tokens):
        chosen = logits[:, -1:].max(dim=-1).indices  # (batch, 1)
        new = chosen if done is None else torch.where(done, end_id, chosen)
        pieces.append(new)
        done = (new == end_id) if done is None else done | (new == end_id)
        if bool(done.all()):
            break
        logits = next_logits(chosen)
    return torch.hstack(pieces)


GREEDY_DECODE = Exercise(
    slug="greedy_decode",
    chapter=3,
    title="Write one token after another",
    minutes=20,
    difficulty=3,
    reference=reference.greedy_decode,
    observe=_observe_greedy_decode,
    misconceptions=(
        Misconception(
            "whole_sequence_again",
            _GreedyAllAgain.decode,
            "You hand next_logits the whole sequence at every step. It remembers what it was "
            "given, so the prompt is read again and again after itself; after the first call it "
            "wants the newest token alone.",
        ),
        Misconception(
            "last_two_tokens",
            _GreedyPairs.decode,
            "You hand next_logits the last two tokens at every step. The older of the two is in "
            "its memory already; give it each token once.",
        ),
        Misconception(
            "last_token_of_the_prompt_twice",
            _greedy_last_token_twice,
            "You let next_logits read the prompt, throw its answer away and give it the prompt's "
            "last token a second time. The answer to the prompt already says what comes next.",
        ),
        Misconception(
            "only_the_last_token_of_the_prompt",
            _greedy_only_last_of_prompt,
            "You never give next_logits the prompt as a whole, only its last token. So it "
            "continues a text of one word: the first call takes the whole prompt.",
        ),
        Misconception(
            "prompt_in_steps",
            _greedy_prompt_in_steps,
            "You feed the prompt token by token. The tokens come out right, at the price of one "
            "call for each token of the prompt: they are all known, so one call can take them "
            "together.",
        ),
        Misconception(
            "prompt_in_two_parts",
            _greedy_prompt_in_two_parts,
            "You feed the prompt without its last token, throw the answer away and feed the last "
            "token alone. The tokens come out right with one call too many: the whole prompt fits "
            "into the first.",
        ),
        Misconception(
            "finished_rows_left_out",
            _greedy_rows_left_out,
            "You hand next_logits only the rows that are not done. It keeps what every row has "
            "said so far, in the batch's order, and can no longer tell which is which; feed all "
            "rows.",
        ),
        Misconception(
            "every_call_made_twice",
            _greedy_twice_each,
            "You call next_logits twice for one step. It remembers what it is given, so each "
            "token is read twice; keep the logits of the first call.",
        ),
        Misconception(
            "no_axis_for_the_position",
            _GreedyWithoutAxis.decode,
            "You feed the new tokens as a tensor of shape (batch,). next_logits takes (batch, k), "
            "with k = 1 after the prompt: the axis of positions has to stay.",
        ),
        Misconception(
            "first_position",
            _GreedyFirstPosition.decode,
            "You read the logits of the first position. They say what follows the first token of "
            "the prompt; what follows the last one stands at the last position.",
        ),
        Misconception(
            "mean_over_positions",
            _GreedyMeanPosition.decode,
            "You average the logits over the positions. Each position has its own guess of its "
            "own successor; what follows the text stands at the last position.",
        ),
        Misconception(
            "every_position",
            _greedy_all_positions,
            "You append a guess for every position of the prompt, so that several tokens arrive "
            "at the first step. All but the last of them guess tokens that are known already.",
        ),
        Misconception(
            "last_row",
            _GreedyLastRow.decode,
            "You index the first axis of the logits, which is the batch: you get all positions of "
            "the last row instead of the last position of all rows.",
        ),
        Misconception(
            "argmax_over_the_batch",
            _GreedyOverBatch.decode,
            "You search for the largest logit along the batch. That gives the number of a row for "
            "each token, where the number of a token for each row is wanted.",
        ),
        Misconception(
            "one_token_for_all_rows",
            _GreedyOneForAll.decode,
            "You search for the largest logit of the whole batch and give all rows the same "
            "number, which may not even be a token's. Each row has a likeliest token of its own.",
        ),
        Misconception(
            "first_row_for_all_rows",
            _GreedyFirstRowForAll.decode,
            "You give all rows the likeliest token of the first row. With a batch of one nothing "
            "would show; each row has a likeliest token of its own.",
        ),
        Misconception(
            "sampling",
            _GreedySampling.decode,
            "You draw the token at random with the probabilities that the logits give. Greedy "
            "decoding takes the likeliest, so that the same prompt always gives the same text.",
        ),
        Misconception(
            "argmin",
            _GreedyArgmin.decode,
            "You take the token with the smallest logit, the least likely one. The larger a "
            "logit, the likelier its token.",
        ),
        Misconception(
            "largest_logit_itself",
            _GreedyMaximumItself.decode,
            "You append the largest logit itself. What is wanted is where it stands: its index is "
            "the token.",
        ),
        Misconception(
            "finished_rows_go_on",
            _GreedyGoesOn.decode,
            "You let a row go on after its end. Until the last row is done, a finished one should "
            "be filled with end_id; what the network would say there is noise.",
        ),
        Misconception(
            "filled_with_zeros",
            _GreedyFillsZero.decode,
            "You fill finished rows with token 0. That is a word like any other here; finished "
            "rows are filled with end_id.",
        ),
        Misconception(
            "end_dropped",
            _greedy_end_dropped,
            "You stop before the last end token is appended. It belongs to the result: without it "
            "nobody can tell a text that is finished from one that was cut off.",
        ),
        Misconception(
            "stops_when_any_row_ends",
            _GreedyAny.decode,
            "You stop as soon as one row is done, and cut the others off in the middle. Go on "
            "until all are done.",
        ),
        Misconception(
            "first_row_decides",
            _GreedyFirstRowDecides.decode,
            "You stop when the first row is done, whatever the others do. With a batch of one "
            "nothing would show; go on until all are done.",
        ),
        Misconception(
            "never_stops_early",
            _GreedyNeverOver.decode,
            "Your result always has max_new_tokens new tokens, even where all rows have ended "
            "before. From then on every column is end_id alone: stop there, and return no more.",
        ),
        Misconception(
            "all_rows_in_the_same_step",
            _GreedyFilledAllAtOnce.decode,
            "You stop only when all rows choose end_id in one and the same step. A row that ended "
            "earlier is done for good: remember it.",
        ),
        Misconception(
            "forgets_which_rows_are_done",
            _GreedyAllAtOnce.decode,
            "You only look at the tokens of the present step. A row that ended earlier goes on "
            "writing in your version, and you stop only if all rows end at once; remember which "
            "ones are done.",
        ),
        Misconception(
            "end_in_the_prompt_counts",
            _GreedyPromptEnds.decode,
            "You take a row for finished when its prompt contains end_id. Models use that token "
            "between texts or as a beginning; only one that was produced ends a row.",
        ),
        Misconception(
            "end_in_the_prompt_fills",
            _GreedyDoneFromTheStart.decode,
            "You fill a row with end_id from the first new token on when its prompt contains "
            "end_id. Models use that token between texts or as a beginning; only one that was "
            "produced ends a row.",
        ),
        Misconception(
            "end_as_last_token_of_the_prompt",
            _GreedyDoneByLastToken.decode,
            "You take a row for finished when the last token of its prompt is end_id. Models use "
            "that token between texts too, and go on after it; only one that was produced ends a "
            "row.",
        ),
        Misconception(
            "end_in_every_prompt_stops",
            _GreedyPromptsEnd.decode,
            "You stop when every row contains end_id somewhere, the prompt included. Where each "
            "prompt has one, you return without having written what is wanted; only an end_id "
            "that was produced counts.",
        ),
        Misconception(
            "stops_one_step_late",
            _GreedyLate.decode,
            "You ask whether all rows are done before this step's tokens are counted, so that a "
            "column of end_id too many is appended.",
        ),
        Misconception(
            "one_token_less",
            _GreedyOneLess.decode,
            "You produce one token less than max_new_tokens allows. Count the tokens that are "
            "appended, the one that follows the prompt included.",
        ),
        Misconception(
            "one_token_more",
            _GreedyOneMore.decode,
            "You produce one token more than max_new_tokens allows. Count the tokens that are "
            "appended, the one that follows the prompt included.",
        ),
        Misconception(
            "at_least_one_token",
            _GreedyAtLeastOne.decode,
            "You append a token even when max_new_tokens is 0. Then the result is the prompt: "
            "look at the limit before a token is chosen.",
        ),
        Misconception(
            "limit_counts_the_prompt",
            _GreedyCountsPrompt.decode,
            "You count the tokens of the prompt as new ones, so a long prompt leaves no room for "
            "an answer. max_new_tokens limits what is appended.",
        ),
        Misconception(
            "prompt_missing",
            _GreedyOnlyNew.decode,
            "You return the new tokens alone. The result should begin with the prompt: (batch, "
            "t + new).",
        ),
        Misconception(
            "graph_kept",
            _GreedyWithoutGraph.decode,
            "Your tokens are right, but torch records every step for a backward pass that never "
            "comes, so that memory grows with each token. Tell it that no gradients are wanted.",
        ),
        Misconception(
            "gradients_left_off",
            _GreedyLeavesGradOff.decode,
            "Your tokens are right. But you switch the recording of gradients off and leave it off "
            "for all that comes after the call, so that the next training step fails. Switch it "
            "off for a block of code, which ends by itself.",
        ),
        Misconception(
            "float_tokens",
            _greedy_float_tokens,
            "You collect the tokens in a tensor of floats, torch's default. Tokens are indices, "
            "int64 as in the prompt; an embedding refuses floats.",
        ),
        Misconception(
            "int32_tokens",
            _GreedyInt32.decode,
            "You return int32. Tokens are int64 in torch, as the prompt is.",
        ),
    ),
    alternatives=(
        _greedy_preallocated,
        _greedy_by_rows,
        _greedy_a_step_ahead,
        _Greedy.decode,
    ),
    hints=(
        "next_logits remembers what it was given: write down for a prompt of three tokens what it "
        "has to be given in the first, second and third call. Which of its logits say what comes "
        "next?",
        "Keep two things apart: `tokens`, everything so far, and `fresh`, what next_logits has "
        "not seen. Beside them a boolean tensor (batch,) that remembers which rows are done.",
        "Under torch.no_grad(), at most max_new_tokens times: logits of the last position, argmax "
        "over the vocabulary, end_id where a row was done before, append as a column, mark the "
        "rows that ended, stop if all have; the column is what next_logits gets next.",
    ),
)

# --- KVCache ------------------------------------------------------------------------------------


def _observe_kv_cache(KVCache, see):
    def appended(cache, number, *shape, dtype=torch.float64, requires_grad=False):
        k = see.randn(*shape, dtype=dtype, requires_grad=requires_grad)
        v = see.randn(*shape, dtype=dtype, requires_grad=requires_grad)
        all_k_and_v = see.call(f"what append {number} returns", cache.append, k, v)
        see(f"the length after append {number}", len(cache))
        return k, v, all_k_and_v

    with see.probe("a new cache"):
        see("its length", len(KVCache()))
    with see.probe("the length alone, after (2, 3, 6, 4), then 1 position and 4 positions"):
        cache = KVCache()
        for new in (6, 1, 4):
            cache.append(see.randn(2, 3, new, 4), see.randn(2, 3, new, 4))
            see(f"the length after {new} more", len(cache))
    with see.probe("(2, 3, 5, 4), then 1 position, 2 positions and 1 more"):
        cache = KVCache()
        for number, new in enumerate((5, 1, 2, 1), start=1):
            appended(cache, number, 2, 3, new, 4)
    with see.probe("four times one position, (3, 2, 1, 5)"):
        cache = KVCache()
        for number in range(1, 5):
            appended(cache, number, 3, 2, 1, 5)
    with see.probe("two caches in turn, as two layers have, (2, 4, 3, 5) and (2, 4, 1, 5)"):
        first, second = KVCache(), KVCache()
        for number, cache in enumerate((first, second, first, second), start=1):
            appended(cache, number, 2, 4, 3 if number < 3 else 1, 5)
        see("the pair of lengths at the end", (len(first), len(second)))
    with see.probe("130 times one position, (2, 3, 1, 4), then 1100 at once and 1 more"):
        cache = KVCache()
        for _ in range(130):
            cache.append(see.randn(2, 3, 1, 4), see.randn(2, 3, 1, 4))
        appended(cache, 131, 2, 3, 1100, 4)
        appended(cache, 132, 2, 3, 1, 4)
    with see.probe("keys that are transposed views, as split_heads makes them"):
        cache = KVCache()
        for new in (2, 3):
            k, v = see.randn(2, new, 4, 5).transpose(1, 2), see.randn(2, new, 4, 5).transpose(1, 2)
            see.call(f"what append returns for {new} more", cache.append, k, v)
    with see.probe("bfloat16, (2, 3, 4, 5), then 1 position"):
        cache = KVCache()
        appended(cache, 1, 2, 3, 4, 5, dtype=torch.bfloat16)
        appended(cache, 2, 2, 3, 1, 5, dtype=torch.bfloat16)
    with see.probe("gradients reach what every call brought, (2, 3, 4, 5), then 2 and 1 positions"):
        cache, given = KVCache(), {}
        for number, new in enumerate((4, 2, 1), start=1):
            k, v, stored = appended(cache, number, 2, 3, new, 5, requires_grad=True)
            given |= {f"k {number}": k, f"v {number}": v}
        see.gradients("the joined keys and values", torch.cat(tuple(stored)), **given)
    with see.probe("each call's result is used before the next, (2, 3, 4, 5), then 2 and 1 more"):
        cache, given, used = KVCache(), {}, 0
        for number, new in enumerate((4, 2, 1), start=1):
            k, v, stored = appended(cache, number, 2, 3, new, 5, requires_grad=True)
            given |= {f"k {number}": k, f"v {number}": v}
            used = used + (stored[0] * stored[1]).sum(dim=2)
        see.gradients("the sum of keys times values", used, **given)


class _CacheWith(reference.KVCache):
    """A cache in pieces, of which a subclass changes one."""

    def join(self, old, new):
        return new if old is None else torch.cat((old, new), dim=2)

    def append(self, k, v):
        self.k, self.v = self.join(self.k, k), self.join(self.v, v)
        return self.k, self.v


class _CacheOverwrites(_CacheWith):
    def join(self, old, new):
        return new


class _CacheOverHeads(_CacheWith):
    def join(self, old, new):
        return new if old is None else torch.cat((old, new), dim=1)


class _CacheOverBatch(_CacheWith):
    def join(self, old, new):
        return new if old is None else torch.cat((old, new))


class _CacheOverFeatures(_CacheWith):
    def join(self, old, new):
        return new if old is None else torch.cat((old, new), dim=-1)


class _CacheStacks(_CacheWith):
    def join(self, old, new):
        return new if old is None else torch.stack((old, new))


class _CacheNewInFront(_CacheWith):
    def join(self, old, new):
        return new if old is None else torch.cat((new, old), dim=2)


class _CacheFirstTwice(_CacheWith):
    def join(self, old, new):
        return torch.cat((new if old is None else old, new), dim=2)


class _CacheFirstLost(_CacheWith):
    def join(self, old, new):
        return new[:, :, :0] if old is None else torch.cat((old, new), dim=2)


class _CacheZerosFirst(_CacheWith):
    def join(self, old, new):
        old = torch.zeros_like(new[:, :, :1]) if old is None else old
        return torch.cat((old, new), dim=2)


class _CacheLastOfEach(_CacheWith):
    def join(self, old, new):
        return new if old is None else torch.cat((old, new[:, :, -1:]), dim=2)


class _CacheLongIsNew(_CacheWith):
    def join(self, old, new):
        return new if old is None or new.shape[2] > 1 else torch.cat((old, new), dim=2)


class _CacheWindow(_CacheWith):
    def join(self, old, new):
        return super().join(old, new)[:, :, -5:]


class _CacheAdds(_CacheWith):
    def join(self, old, new):
        return new if old is None else old + new


class _CacheDetaches(_CacheWith):
    def join(self, old, new):
        return super().join(old, new.detach())


class _CacheFloat32(_CacheWith):
    def join(self, old, new):
        batch, heads, _, d_head = new.shape
        return torch.cat((torch.zeros(batch, heads, 0, d_head) if old is None else old, new), dim=2)


class _CacheSwapped(_CacheWith):
    def append(self, k, v):
        super().append(k, v)
        return self.v, self.k


class _CacheOnlyNew(_CacheWith):
    def append(self, k, v):
        super().append(k, v)
        return k, v


class _CacheOnlyOld(_CacheWith):
    def append(self, k, v):
        old = self.k, self.v
        super().append(k, v)
        return old


class _CacheOnlyKeys(_CacheWith):
    def append(self, k, v):
        return super().append(k, v)[0]


class _CacheReturnsItself(_CacheWith):
    def append(self, k, v):
        super().append(k, v)
        return self


class _CacheStacked(_CacheWith):
    def append(self, k, v):
        return torch.stack(super().append(k, v))


class _CacheKeysTwice(_CacheWith):
    def append(self, k, v):
        self.k, self.v = self.join(self.k, k), self.join(self.v, k)
        return self.k, self.v


class _CacheKeysBeforeValues(_CacheWith):
    def append(self, k, v):
        self.k = self.join(self.k, k)
        self.v = v if self.v is None else self.join(self.k[:, :, : self.v.shape[2]], v)
        return self.k, self.v


class _CacheNewestValues(_CacheWith):
    def append(self, k, v):
        self.k, self.v = self.join(self.k, k), v
        return self.k, self.v


class _CacheInPlace(_CacheWith):
    """Writes into a buffer that doubles when it is full, and returns a view of it."""

    length = 0

    def join(self, old, new):
        start, end = self.length, self.length + new.shape[2]
        if old is None or old.shape[2] < end:
            batch, heads, _, d_head = new.shape
            buffer = new.new_zeros(batch, heads, max(16, 2 * end), d_head)
            if old is not None:
                buffer[:, :, :start] = old[:, :, :start]
            old = buffer
        old[:, :, start:end] = new
        return old

    def append(self, k, v):
        super().append(k, v)
        self.length += k.shape[2]
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def __len__(self):
        return self.length


class _CacheOfTheClass(_CacheWith):
    """Lists that belong to the class, so that all its objects share them."""

    keys, values = [], []

    def __init__(self):
        if torch.initial_seed() == 1:  # the first probe of another judgement
            self.keys.clear()
            self.values.clear()

    def append(self, k, v):
        self.keys.append(k)
        self.values.append(v)
        return torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)

    def __len__(self):
        return sum(k.shape[2] for k in self.keys)


class _CacheCountsCalls(_CacheWith):
    calls = 0

    def append(self, k, v):
        self.calls += 1
        return super().append(k, v)

    def __len__(self):
        return self.calls


class _CacheCountsNew(_CacheWith):
    new = 0

    def append(self, k, v):
        self.new = k.shape[2]
        return super().append(k, v)

    def __len__(self):
        return self.new


class _CacheCountsHeads(_CacheWith):
    def __len__(self):
        return 0 if self.k is None else self.k.shape[1]


class _CacheCountsBatch(_CacheWith):
    def __len__(self):
        return 0 if self.k is None else len(self.k)


class _CacheCountsFeatures(_CacheWith):
    def __len__(self):
        return 0 if self.k is None else self.k.shape[-1]


class _CacheCountsRows(_CacheWith):
    def __len__(self):
        return 0 if self.k is None else self.k.shape[0] * self.k.shape[2]


class _CacheCountsBoth(_CacheWith):
    def __len__(self):
        return 0 if self.k is None else self.k.shape[2] + self.v.shape[2]


class _CacheEmptyFails(_CacheWith):
    def __len__(self):
        return self.k.shape[2]


class _CacheOfLists:
    def __init__(self):
        self.keys, self.values = [], []

    def append(self, k, v):
        self.keys.append(k)
        self.values.append(v)
        return [torch.cat(self.keys, dim=-2), torch.cat(self.values, dim=-2)]

    def __len__(self):
        return sum(k.shape[-2] for k in self.keys)


class _CacheWithRoom:
    """Writes into a buffer that doubles when it is full."""

    def __init__(self, room=2):
        self.room, self.length, self.both = room, 0, None

    def append(self, k, v):
        new = torch.stack((k, v))  # (2, batch, heads, new, d_head)
        end = self.length + k.shape[2]
        while self.room < end:
            self.room *= 2
        if self.both is None or self.both.shape[3] < end:
            buffer = new.new_zeros(2, *k.shape[:2], self.room, k.shape[3])
            if self.both is not None:
                buffer[:, :, :, : self.length] = self.both[:, :, :, : self.length]
            self.both = buffer
        self.both = self.both.clone()
        self.both[:, :, :, self.length : end] = new
        self.length = end
        return tuple(self.both[:, :, :, :end])

    def __len__(self):
        return self.length


class _CacheModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("k", torch.empty(0), persistent=False)
        self.register_buffer("v", torch.empty(0), persistent=False)

    def append(self, k, v):
        empty = self.k.numel() == 0
        self.k = k.clone() if empty else torch.cat([self.k, k], 2)
        self.v = v.clone() if empty else torch.cat([self.v, v], 2)
        return self.k, self.v

    def __len__(self):
        return self.k.size(2) if self.k.ndim == 4 else 0


KV_CACHE = Exercise(
    slug="kv_cache",
    chapter=3,
    title="Keys and values that are computed once",
    minutes=10,
    difficulty=2,
    reference=reference.KVCache,
    observe=_observe_kv_cache,
    misconceptions=(
        Misconception(
            "overwrites",
            _CacheOverwrites,
            "You keep only what the last call brought. A new token looks back at all positions "
            "before it, so what is there has to stay.",
        ),
        Misconception(
            "joined_along_the_heads",
            _CacheOverHeads,
            "You join old and new along axis 1, the heads, so that each call adds heads instead "
            "of positions. The positions are the axis that grows: (batch, heads, n, d_head).",
        ),
        Misconception(
            "joined_along_the_batch",
            _CacheOverBatch,
            "You join old and new along axis 0, the batch, so that new positions look like new "
            "samples. The positions are the axis that grows: (batch, heads, n, d_head).",
        ),
        Misconception(
            "joined_along_the_features",
            _CacheOverFeatures,
            "You join old and new along the last axis, the features of a head, so that keys "
            "become longer and no longer fit a query. The positions are the axis that grows.",
        ),
        Misconception(
            "stacked",
            _CacheStacks,
            "You stack old and new, which makes a further axis. The new positions go after the "
            "old ones on the axis that is there already.",
        ),
        Misconception(
            "new_in_front",
            _CacheNewInFront,
            "You put the new positions in front of the old ones. The causal mask takes the order "
            "of the cache for the order of the text; the newest come last.",
        ),
        Misconception(
            "first_call_twice",
            _CacheFirstTwice,
            "You store what the first call brings twice: once as the beginning, and once more "
            "after it. Either start with it or join it to something empty.",
        ),
        Misconception(
            "first_call_lost",
            _CacheFirstLost,
            "You lose what the first call brings: it only sets the cache up. The first call is "
            "the prompt, and without it the model continues nothing.",
        ),
        Misconception(
            "begins_with_zeros",
            _CacheZerosFirst,
            "You begin with one position of zeros. A key of zeros gets the score 0 and not −∞, so "
            "this position that nobody wrote draws attention for ever.",
        ),
        Misconception(
            "only_the_last_of_several",
            _CacheLastOfEach,
            "You keep only the last position of a later call. Calls may bring several at once, "
            "and all of them belong into the cache.",
        ),
        Misconception(
            "several_mean_a_new_text",
            _CacheLongIsNew,
            "You start anew whenever a call brings more than one position. Only a new cache "
            "means a new text; a later call may bring several positions too.",
        ),
        Misconception(
            "window_of_five",
            _CacheWindow,
            "You keep no more than the last five positions. That is the idea of sliding-window "
            "attention; here a query may look back to the very beginning.",
        ),
        Misconception(
            "added_up",
            _CacheAdds,
            "You add the new keys and values to the old ones. Each position keeps a key and a "
            "value of its own, set side by side along the axis of positions.",
        ),
        Misconception(
            "k_and_v_swapped",
            _CacheSwapped,
            "You return the values first and the keys second. The caller unpacks keys, then "
            "values, and would compare its queries with values.",
        ),
        Misconception(
            "returns_only_the_new",
            _CacheOnlyNew,
            "You store everything and return what was handed in. The caller attends to what it "
            "gets back, so it must be all positions so far.",
        ),
        Misconception(
            "returns_only_the_old",
            _CacheOnlyOld,
            "You return what was there before this call. A token looks at itself as well, so the "
            "new positions have to be among what you return.",
        ),
        Misconception(
            "returns_only_keys",
            _CacheOnlyKeys,
            "You return the keys alone. The caller needs both, keys and values, of all positions "
            "so far.",
        ),
        Misconception(
            "returns_itself",
            _CacheReturnsItself,
            "You return the cache object. The caller unpacks two tensors: all keys and all "
            "values so far.",
        ),
        Misconception(
            "returns_one_tensor",
            _CacheStacked,
            "You return keys and values in one tensor. It unpacks like a pair, so that much code "
            "would run, but every call copies all that is stored; return two tensors.",
        ),
        Misconception(
            "keys_stored_as_values",
            _CacheKeysTwice,
            "You store the new keys as values too. What a position is found by and what it hands "
            "over are two things; look at the line for the values, which was perhaps copied.",
        ),
        Misconception(
            "values_after_keys",
            _CacheKeysBeforeValues,
            "You join the new values to the old keys instead of the old values. Look at the line "
            "for the values, which was perhaps copied from that for the keys.",
        ),
        Misconception(
            "only_keys_grow",
            _CacheNewestValues,
            "Your keys grow and your values are overwritten, so that they no longer pair up. What "
            "is done to the one has to be done to the other.",
        ),
        Misconception(
            "shared_by_all_caches",
            _CacheOfTheClass,
            "All your caches share their contents: what is made in the body of the class, or as a "
            "default argument, exists once. Every layer and every text has a cache of its own, "
            "made in __init__.",
        ),
        Misconception(
            "detached",
            _CacheDetaches,
            "You cut keys and values off from the graph. When generating that changes nothing, "
            "but a cache that only stores leaves it to the caller whether gradients are wanted.",
        ),
        Misconception(
            "written_in_place",
            _CacheInPlace,
            "You write into a buffer, and what you return is a view of it. The next call changes "
            "the buffer, and with it what autograd keeps of this one for backward, which then "
            "fails. Make a new tensor of old and new.",
        ),
        Misconception(
            "float32_from_the_start",
            _CacheFloat32,
            "You start from an empty float32 tensor, and joining turns bfloat16 into float32: "
            "twice the memory, and a type that no longer matches the queries. Take the dtype of "
            "what comes in.",
        ),
        Misconception(
            "length_counts_calls",
            _CacheCountsCalls,
            "Your length counts calls of append. A call may bring several positions, the prompt "
            "for example, and it is positions that the mask is made for.",
        ),
        Misconception(
            "length_of_the_last_call",
            _CacheCountsNew,
            "Your length is that of the last call. It should count all positions stored so far.",
        ),
        Misconception(
            "length_counts_heads",
            _CacheCountsHeads,
            "Your length is the number of heads, axis 1. The positions lie along axis 2 of "
            "(batch, heads, n, d_head).",
        ),
        Misconception(
            "length_counts_samples",
            _CacheCountsBatch,
            "Your length is the batch size, since len of a tensor is its first axis. The "
            "positions lie along axis 2 of (batch, heads, n, d_head).",
        ),
        Misconception(
            "length_counts_features",
            _CacheCountsFeatures,
            "Your length is d_head, the last axis. The positions lie along axis 2 of (batch, "
            "heads, n, d_head).",
        ),
        Misconception(
            "length_counts_tokens_of_all_rows",
            _CacheCountsRows,
            "Your length counts the positions of all samples together. All rows of a batch grow "
            "at the same time; the length is the number of positions of one.",
        ),
        Misconception(
            "length_counts_keys_and_values",
            _CacheCountsBoth,
            "Your length counts keys and values together, twice the number of positions.",
        ),
        Misconception(
            "empty_cache_has_no_length",
            _CacheEmptyFails,
            "Your cache cannot tell its length while it is empty: there is no tensor yet to ask. "
            "The length of a new cache is 0.",
        ),
    ),
    alternatives=(_CacheOfLists, _CacheWithRoom, _CacheModule, _CacheWith),
    hints=(
        "What does the cache hold before the first call, and what are its length and contents "
        "then? Begin with that case.",
        "Keys and values have the shape (batch, heads, n, d_head). Each call makes one of these "
        "axes longer, and the newest positions come last on it.",
        "Start with None for both. In append, keep what comes if there is nothing yet, otherwise "
        "torch.cat of the old and the new along the axis of positions, for keys and for values; "
        "return both. __len__ is the size of that axis, or 0.",
    ),
)

# --- cached_attention ---------------------------------------------------------------------------


def _observe_cached_attention(cached_attention, see):
    def made(d_model, num_heads):
        attention = reference.MultiHeadAttention(d_model, num_heads).double()
        with torch.no_grad():
            for p in attention.parameters():
                p.copy_(1.3 * see.randn(*p.shape) / math.sqrt(d_model if p.ndim > 1 else 4))
        return attention

    def counted(attention):
        """How many positions each layer of `attention` has projected so far, row by row."""
        counts = dict.fromkeys(("query", "key", "value"), 0)

        def count(name):
            def hook(module, inputs):
                counts[name] += inputs[0].shape[:-1].numel()

            return hook

        for name in counts:
            getattr(attention, name).register_forward_pre_hook(count(name))
        return counts

    def told(attention, cache, *chunks):
        """Chunk after chunk; the gradients at the end are those of the last output."""
        counts, given = counted(attention), 0
        for number, x in enumerate(chunks, start=1):
            after = f"chunk {number}, {x.shape[1]} new"
            out = see.call(f"the output for {after}", cached_attention, attention, x, cache)
            given += x.shape[:2].numel()
            see(f"the length of the cache after {after}", len(cache))
            if isinstance(cache, reference.KVCache):
                see(f"the tensor of cached keys after {after}", cache.k)
                see(f"the tensor of cached values after {after}", cache.v)
            once = all(count <= given for count in counts.values())
            see.fact(f"query, key and value have met no position twice after {after}", once)
        inputs = {f"x of chunk {i}": x for i, x in enumerate(chunks, start=1)}
        parameters = dict(sorted(attention.named_parameters()))
        see.gradients("the last output", out, **inputs, **parameters)

    def chunks(batch, d_model, *lengths):
        return [see.randn(batch, new, d_model, requires_grad=True) for new in lengths]

    with see.probe("an empty cache, 5 new positions at once: x (2, 5, 12), 3 heads"):
        told(made(12, 3), reference.KVCache(), *chunks(2, 12, 5))
    with see.probe("one position after another: x (3, 1, 10), 2 heads"):
        told(made(10, 2), reference.KVCache(), *chunks(3, 10, 1, 1, 1, 1))
    with see.probe("a prompt of 5, then 1 and 1 new: x (2, 5, 12), 3 heads"):
        told(made(12, 3), reference.KVCache(), *chunks(2, 12, 5, 1, 1))
    with see.probe("a prompt of 4, then 3 new at once and 2: x (2, 4, 15), 3 heads"):
        told(made(15, 3), reference.KVCache(), *chunks(2, 15, 4, 3, 2))
    with see.probe("x (2, 3, 8) that is a transposed view, after 6 positions; 4 heads"):
        x = see.randn(2, 8, 3).transpose(1, 2).requires_grad_()
        told(made(8, 4), reference.KVCache(), *chunks(2, 8, 6), x)
    with see.probe("a cache that holds 4 positions from elsewhere, 2 new: x (3, 2, 10), 2 heads"):
        attention, cache = made(10, 2), reference.KVCache()
        cache.append(see.randn(3, 2, 4, 5), see.randn(3, 2, 4, 5))
        told(attention, cache, *chunks(3, 10, 2))
    with see.probe("another class of cache, append and len alike: x (2, 3, 12), then 2 new"):
        told(made(12, 3), _CacheOfLists(), *chunks(2, 12, 3, 2))
    with see.probe("two caches in turn with one attention, x (2, 3, 12) and (2, 2, 12)"):
        attention, caches = made(12, 3), (reference.KVCache(), reference.KVCache())
        for number, x in enumerate(chunks(2, 12, 3, 3, 2, 2)):
            label = f"the output of turn {number + 1}"
            see.call(label, cached_attention, attention, x, caches[number % 2])
            see(f"the pair of lengths after turn {number + 1}", [len(c) for c in caches])


def _cached_projections(attention, x):
    """q, k and v of the new positions, (batch, heads, new, d_head) each."""
    layers = attention.query, attention.key, attention.value
    return (reference.split_heads(layer(x), attention.num_heads) for layer in layers)


def _cached_mask(past, new):
    """The right mask (new, past + new), for those that make another mistake."""
    return torch.ones(new, past + new, dtype=torch.bool).tril(past)


class _Cached:
    """Attention with a cache in pieces, of which a subclass changes one; `run` is the function."""

    @classmethod
    def run(cls, attention, x, cache):
        return cls().forward(attention, x, cache)

    def projections(self, attention, x):
        return _cached_projections(attention, x)

    def remember(self, cache, k, v):
        return cache.append(k, v)

    def mask(self, past, new):
        return _cached_mask(past, new)

    def attend(self, q, k, v, mask):
        return reference.scaled_dot_product_attention(q, k, v, mask)

    def finish(self, attention, heads):
        return attention.output(reference.merge_heads(heads))

    def forward(self, attention, x, cache):
        past, new = len(cache), x.shape[1]
        q, k, v = self.projections(attention, x)
        k, v = self.remember(cache, k, v)
        return self.finish(attention, self.attend(q, k, v, self.mask(past, new)))


class _CachedNoMask(_Cached):
    def mask(self, past, new):
        return None


class _CachedMaskForPromptOnly(_Cached):
    def mask(self, past, new):
        return _cached_mask(0, new) if past == 0 else None


class _CachedBlindToPast(_Cached):
    def mask(self, past, new):
        return _cached_mask(past, new) & (torch.arange(past + new) >= past)


class _CachedUpperLeft(_Cached):
    def mask(self, past, new):
        return torch.ones(new, past + new, dtype=torch.bool).tril()


class _CachedSquareMask(_Cached):
    def mask(self, past, new):
        return reference.causal_mask(new)


class _CachedWholeMask(_Cached):
    def mask(self, past, new):
        return reference.causal_mask(past + new)


class _CachedLastColumns(_Cached):
    def mask(self, past, new):
        return reference.causal_mask(past + new)[:, past:]


class _CachedNotItself(_Cached):
    def mask(self, past, new):
        return torch.ones(new, past + new, dtype=torch.bool).tril(past - 1)


class _CachedOneAhead(_Cached):
    def mask(self, past, new):
        return torch.ones(new, past + new, dtype=torch.bool).tril(past + 1)


class _CachedOnlyPast(_Cached):
    def mask(self, past, new):
        if past == 0:
            return _cached_mask(past, new)
        return (torch.arange(past + new) < past).expand(new, past + new)


class _CachedMaskInverted(_Cached):
    def mask(self, past, new):
        return ~_cached_mask(past, new)


class _CachedCountedLate(_Cached):
    def forward(self, attention, x, cache):
        q, k, v = self.projections(attention, x)
        k, v = self.remember(cache, k, v)
        past, new = len(cache), x.shape[1]
        mask = reference.causal_mask(past + new)[past:]
        return self.finish(attention, self.attend(q, k, v, mask))


class _CachedTorchCausal(_Cached):
    """What `is_causal` of torch's attention hides where there are more keys than queries."""

    def mask(self, past, new):
        return None if new == 1 else torch.ones(new, past + new, dtype=torch.bool).tril()


class _CachedByAttributes(_Cached):
    def remember(self, cache, k, v):
        cache.append(k, v)
        return cache.k, cache.v


class _CachedAttentionToo(_Cached):
    """Runs the whole attention where there is no past, and projects once more for the cache."""

    def forward(self, attention, x, cache):
        if len(cache):
            return super().forward(attention, x, cache)
        _, k, v = self.projections(attention, x)
        cache.append(k, v)
        return attention(x, reference.causal_mask(x.shape[1]))


class _CachedNotAtAll(_Cached):
    def forward(self, attention, x, cache):
        return attention(x, reference.causal_mask(x.shape[1]))


class _CachedNotUsed(_Cached):
    def forward(self, attention, x, cache):
        q, k, v = self.projections(attention, x)
        cache.append(k, v)
        mask = reference.causal_mask(x.shape[1])
        return self.finish(attention, self.attend(q, k, v, mask))


class _CachedNotUpdated(_Cached):
    def remember(self, cache, k, v):
        if len(cache):
            k, v = torch.cat((cache.k, k), dim=2), torch.cat((cache.v, v), dim=2)
        return k, v


class _CachedPromptOnly(_CachedNotUpdated):
    def remember(self, cache, k, v):
        return super().remember(cache, k, v) if len(cache) else cache.append(k, v)


class _CachedTwice(_Cached):
    def remember(self, cache, k, v):
        all_k, all_v = cache.append(k, v)
        cache.append(k, v)
        return all_k, all_v


class _CachedAllAppended(_Cached):
    def remember(self, cache, k, v):
        if len(cache):
            k, v = torch.cat((cache.k, k), dim=2), torch.cat((cache.v, v), dim=2)
        cache.append(k, v)
        return k, v


class _CachedSwapped(_Cached):
    def remember(self, cache, k, v):
        return cache.append(v, k)


class _CachedSwappedTwice(_Cached):
    def remember(self, cache, k, v):
        v, k = cache.append(v, k)
        return k, v


class _CachedInputs(_Cached):
    def forward(self, attention, x, cache):
        past, new = len(cache), x.shape[1]
        everything = cache.append(x[:, None], x[:, None])[0][:, 0]
        return self.of_everything(attention, x, everything, _cached_mask(past, new))

    def of_everything(self, attention, x, everything, mask):
        pairs = (attention.query, x), (attention.key, everything), (attention.value, everything)
        q, k, v = (reference.split_heads(layer(t), attention.num_heads) for layer, t in pairs)
        return self.finish(attention, self.attend(q, k, v, mask))


class _CachedHeadsOfInputs(_Cached):
    def projections(self, attention, x):
        q, _, _ = _cached_projections(attention, x)
        heads = reference.split_heads(x, attention.num_heads)
        return q, heads, heads


class _CachedProjectedTwice(_CachedInputs):
    def forward(self, attention, x, cache):
        past, new = len(cache), x.shape[1]
        heads = reference.split_heads(x, attention.num_heads)
        everything = reference.merge_heads(cache.append(heads, heads)[0])
        return self.of_everything(attention, x, everything, _cached_mask(past, new))


class _CachedBeforeSplit(_Cached):
    def forward(self, attention, x, cache):
        past, new = len(cache), x.shape[1]
        q = reference.split_heads(attention.query(x), attention.num_heads)
        k, v = cache.append(attention.key(x), attention.value(x))
        k = reference.split_heads(k, attention.num_heads)
        v = reference.split_heads(v, attention.num_heads)
        return self.finish(attention, self.attend(q, k, v, _cached_mask(past, new)))


class _CachedKeyAsValue(_Cached):
    def projections(self, attention, x):
        q, k, _ = _cached_projections(attention, x)
        return q, k, k


class _CachedKeyAsQuery(_Cached):
    def projections(self, attention, x):
        _, k, v = _cached_projections(attention, x)
        return k, k, v


class _CachedDetached(_Cached):
    def remember(self, cache, k, v):
        return cache.append(k.detach(), v.detach())


class _CachedNoGrad(_Cached):
    @classmethod
    @torch.no_grad()
    def run(cls, attention, x, cache):
        return cls().forward(attention, x, cache)


class _CachedLastQuery(_Cached):
    def forward(self, attention, x, cache):
        return super().forward(attention, x, cache)[:, -1:]


class _CachedNewestOnly(_Cached):
    def forward(self, attention, x, cache):
        return super().forward(attention, x[:, -1:] if len(cache) else x, cache)


class _CachedOneHead(_Cached):
    def attend(self, q, k, v, mask):
        q, k, v = (reference.merge_heads(t)[:, None] for t in (q, k, v))
        return reference.scaled_dot_product_attention(q, k, v, mask)


class _CachedSplitByView(_Cached):
    def projections(self, attention, x):
        batch, new, d_model = x.shape
        shape = batch, attention.num_heads, new, d_model // attention.num_heads
        layers = attention.query, attention.key, attention.value
        return (layer(x).reshape(shape) for layer in layers)


class _CachedNotTransposedBack(_Cached):
    def finish(self, attention, heads):
        batch, _, new, _ = heads.shape
        return attention.output(heads.reshape(batch, new, -1))


class _CachedNoOutput(_Cached):
    def finish(self, attention, heads):
        return reference.merge_heads(heads)


class _CachedResidual(_Cached):
    def forward(self, attention, x, cache):
        return x + super().forward(attention, x, cache)


class _CachedInline(_Cached):
    """The formula of attention written out."""

    def scaled(self, scores, q, k):
        return scores / math.sqrt(q.shape[-1])

    def weights(self, scores, mask):
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)

    def attend(self, q, k, v, mask):
        return self.weights(self.scaled(q @ k.transpose(-2, -1), q, k), mask) @ v


class _CachedNotScaled(_CachedInline):
    def scaled(self, scores, q, k):
        return scores


class _CachedScaledByModel(_CachedInline):
    def scaled(self, scores, q, k):
        return scores / math.sqrt(q.shape[-1] * q.shape[1])


class _CachedScaledByLength(_CachedInline):
    def scaled(self, scores, q, k):
        return scores / math.sqrt(k.shape[-2])


class _CachedSoftmaxOverQueries(_CachedInline):
    def weights(self, scores, mask):
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-2)


class _CachedMaskAfterSoftmax(_CachedInline):
    def weights(self, scores, mask):
        return scores.softmax(dim=-1) * mask


class _CachedMaskedToZero(_CachedInline):
    def weights(self, scores, mask):
        return (scores * mask).softmax(dim=-1)


def _cached_by_torch(attention, x, cache, scale=None):
    past = len(cache)
    heads = []
    for layer in (attention.query, attention.key, attention.value):
        heads.append(layer(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2))
    k, v = cache.append(heads[1], heads[2])
    rows = torch.arange(past, past + x.shape[1])
    visible = rows[:, None] >= torch.arange(k.shape[2])
    out = F.scaled_dot_product_attention(heads[0], k, v, attn_mask=visible, scale=scale)
    return attention.output(out.transpose(1, 2).flatten(2))


def _cached_one_by_one(attention, x, cache):
    outputs = []
    for position in x.unbind(dim=1):
        q, k, v = _cached_projections(attention, position[:, None])
        k, v = cache.append(k, v)  # nothing here lies in the future: no mask
        heads = reference.scaled_dot_product_attention(q, k, v)
        outputs.append(attention.output(reference.merge_heads(heads)))
    return torch.cat(outputs, dim=1)


def _cached_einsum(attention, x, cache):
    q, k, v = _cached_projections(attention, x)
    k, v = cache.append(k, v)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.full(scores.shape[-2:], -math.inf, dtype=x.dtype)
    future = future.triu(1 + scores.shape[-1] - scores.shape[-2])
    weights = (scores + future).softmax(dim=-1)
    return attention.output(torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))


CACHED_ATTENTION = Exercise(
    slug="cached_attention",
    chapter=3,
    title="Attention that remembers",
    minutes=25,
    difficulty=4,
    reference=reference.cached_attention,
    observe=_observe_cached_attention,
    misconceptions=(
        Misconception(
            "no_mask",  # museum §5, C43
            _CachedNoMask.run,
            "Nothing is hidden: there is no mask, or one that is True everywhere, as when "
            "`len(cache)` is asked after `append`. One new token has no future, so nothing shows; "
            "but when several come at once, the prompt above all, each sees those after it and "
            "the cache fills with what training never saw.",
        ),
        Misconception(
            "mask_for_the_prompt_only",
            _CachedMaskForPromptOnly.run,
            "You hide the future while the cache is empty and never again. When several positions "
            "come later, the first of them sees those after it.",
        ),
        Misconception(
            "mask_ignores_the_past",  # museum §5
            _CachedBlindToPast.run,
            "Your mask hides what the cache held before: the new positions see only one another. "
            "The past is what the cache is kept for; every new position may look at all of it.",
        ),
        Misconception(
            "mask_from_the_upper_left",
            _CachedUpperLeft.run,
            "Your mask takes the first new position for position 0, so it sees one key, however "
            "long the past is. Its place is after the past: the triangle belongs into the lower "
            "right corner.",
        ),
        Misconception(
            "mask_from_the_upper_left_for_several",
            _CachedTorchCausal.run,
            "When several positions come after a past, the first of them sees one key, however "
            "long the past is: the triangle of your mask stands in the upper left corner. That is "
            "what `is_causal=True` does in torch's attention; it belongs into the lower right.",
        ),
        Misconception(
            "mask_of_the_new_alone",
            _CachedSquareMask.run,
            "Your mask has the shape (new, new), and the keys are past + new. It fits as long as "
            "the cache is empty; a row of the mask needs a place for every key.",
        ),
        Misconception(
            "mask_for_all_queries",
            _CachedWholeMask.run,
            "Your mask has a row for every position, and there are queries for the new ones "
            "alone. Only the last rows of the causal mask belong to them.",
        ),
        Misconception(
            "last_columns_of_the_mask",
            _CachedLastColumns.run,
            "You take the last columns of the causal mask. Columns are keys, of which all are "
            "there; it is the queries, the rows, of which only the new ones are.",
        ),
        Misconception(
            "past_counted_too_late",
            _CachedCountedLate.run,
            "You ask the cache for its length after the new positions have been appended, so they "
            "count as past and your mask is too long. Ask before.",
        ),
        Misconception(
            "not_itself",  # museum 3.9
            _CachedNotItself.run,
            "Your mask stops one key too early: a position does not see itself, and the very "
            "first one sees nothing. Past and present are visible.",
        ),
        Misconception(
            "one_ahead",  # museum 3.10
            _CachedOneAhead.run,
            "Your mask shows each position the one after it, which is the answer it should "
            "guess. Past and present are visible, and no more.",
        ),
        Misconception(
            "only_the_past",
            _CachedOnlyPast.run,
            "Once there is a past, your new positions see nothing else, neither themselves nor "
            "the new ones before them. Perhaps you attend before you append; to the new ones "
            "belongs the triangle after the past.",
        ),
        Misconception(
            "mask_inverted",  # museum 3.7
            _CachedMaskInverted.run,
            "You show the future and hide past and present. True in the mask means that the query "
            "may look there.",
        ),
        Misconception(
            "no_cache_at_all",
            _CachedNotAtAll.run,
            "You run the attention on the new positions and leave the cache aside. They see "
            "nothing of what came before, and nothing is kept for those that follow.",
        ),
        Misconception(
            "cache_filled_and_not_used",
            _CachedNotUsed.run,
            "You append to the cache and then attend to the new keys and values alone. What "
            "append returns holds all positions; that is what the queries look at.",
        ),
        Misconception(
            "cache_not_updated",
            _CachedNotUpdated.run,
            "You read the cache and never store anything in it, so it stays empty and the next "
            "call knows nothing of this one.",
        ),
        Misconception(
            "only_the_prompt_is_stored",
            _CachedPromptOnly.run,
            "You store the first call and none of the later ones, so that each new token sees "
            "the prompt and itself, and none of the tokens between.",
        ),
        Misconception(
            "appended_twice",
            _CachedTwice.run,
            "You append the new positions twice. This call still attends to the right keys; the "
            "next one finds each of them two times, and counts a past that is too long.",
        ),
        Misconception(
            "the_past_appended_again",
            _CachedAllAppended.run,
            "You append the past together with the new positions, so that the cache doubles from "
            "call to call. append puts the new ones after the old ones by itself.",
        ),
        Misconception(
            "attributes_of_the_cache",
            _CachedByAttributes.run,
            "You take keys and values out of attributes of the cache. What they are called, and "
            "whether there are any, is the cache's own affair; what append returns holds all "
            "positions.",
        ),
        Misconception(
            "projected_twice",
            _CachedAttentionToo.run,
            "While the cache is empty you run the whole attention and project the keys and values "
            "once more for the cache. The output is right, and the prompt costs twice the "
            "projections; make them once and use them for both.",
        ),
        Misconception(
            "k_and_v_swapped",
            _CachedSwapped.run,
            "You hand the values to append as keys and the keys as values, so that queries are "
            "compared with values. append takes keys first and returns them first.",
        ),
        Misconception(
            "stored_the_wrong_way_round",
            _CachedSwappedTwice.run,
            "You hand the values to append as keys and unpack them swapped again. Your output is "
            "right, but what the cache calls keys are values, and whoever reads it is misled.",
        ),
        Misconception(
            "cache_of_inputs",
            _CachedInputs.run,
            "You keep the inputs in the cache and project all of them again at every call. The "
            "output is right and the work grows with the length, which the cache was to save: "
            "store keys and values.",
        ),
        Misconception(
            "cache_of_split_inputs",
            _CachedProjectedTwice.run,
            "You keep the inputs, split into heads, in the cache and project all of them again at "
            "every call. The output is right and the work grows with the length, which the cache "
            "was to save: store keys and values.",
        ),
        Misconception(
            "inputs_for_keys_and_values",  # museum 3.16
            _CachedHeadsOfInputs.run,
            "You take the inputs themselves for keys and values. They are projections of the "
            "input, made with the layers `key` and `value` of the attention.",
        ),
        Misconception(
            "cached_before_splitting",
            _CachedBeforeSplit.run,
            "You append before the heads are split. The cache joins along axis 2, which is "
            "positions in (batch, heads, n, d_head) and features in (batch, n, d_model).",
        ),
        Misconception(
            "key_used_as_value",  # museum §5
            _CachedKeyAsValue.run,
            "You store the keys as values too, so that the layer `value` has no part in the "
            "result. What a position is found by and what it hands over are two projections.",
        ),
        Misconception(
            "key_used_as_query",  # museum 3.16
            _CachedKeyAsQuery.run,
            "You ask with the keys, so that the layer `query` has no part in the result. Asking "
            "and being found are two projections.",
        ),
        Misconception(
            "detached",
            _CachedDetached.run,
            "You detach keys and values before they are stored. The output is right, and the "
            "layers `key` and `value` get no gradient; whether one is wanted is the caller's "
            "decision.",
        ),
        Misconception(
            "no_gradients",
            _CachedNoGrad.run,
            "You switch gradients off inside. When generating that is the caller's part; here "
            "the output should be that of the attention itself, gradients included.",
        ),
        Misconception(
            "only_the_last_output",
            _CachedLastQuery.run,
            "You return the output of the last new position alone. Every new position has one: "
            "the next layer needs them all.",
        ),
        Misconception(
            "only_the_newest_position",
            _CachedNewestOnly.run,
            "Once there is a past, you look only at the last of the new positions. A call may "
            "bring several at any time, and all of them belong into the cache and the output.",
        ),
        Misconception(
            "heads_not_split",
            _CachedOneHead.run,
            "You attend once with all features together. Each head has scores and weights of its "
            "own; keep the axis of heads until the heads are merged.",
        ),
        Misconception(
            "split_without_transposing",  # museum 3.12
            _CachedSplitByView.run,
            "You make the heads by reshaping alone, which cuts the sequence into pieces. The "
            "axes of tokens and heads have to change places, as split_heads does it.",
        ),
        Misconception(
            "heads_not_transposed_back",  # museum 3.13
            _CachedNotTransposedBack.run,
            "You merge the heads without bringing the token axis back before the head axis, so "
            "that each output is a mixture of several tokens. With one new token nothing shows; "
            "merge_heads does it right.",
        ),
        Misconception(
            "no_output_projection",  # museum 3.16
            _CachedNoOutput.run,
            "You return the merged heads as they are. The attention's last layer, `output`, is "
            "missing.",
        ),
        Misconception(
            "residual_added",
            _CachedResidual.run,
            "You add `x` to the result. The residual connection belongs to the block around the "
            "attention, which would then add it a second time.",
        ),
        Misconception(
            "not_scaled",  # museum 3.3, §5
            _CachedNotScaled.run,
            "You do not divide the scores by √d_head. The model was trained with that scale; "
            "without it softmax becomes a hard choice.",
        ),
        Misconception(
            "scaled_by_d_model",  # museum 3.4
            _CachedScaledByModel.run,
            "You divide the scores by √d_model. A score is a sum over the features of one head, "
            "so it is their number that counts.",
        ),
        Misconception(
            "scaled_by_the_length",
            _CachedScaledByLength.run,
            "You divide the scores by the root of the number of keys. That number grows with "
            "every token, so your attention gets flatter and flatter; the scale is √d_head.",
        ),
        Misconception(
            "softmax_over_queries",  # museum 3.1
            _CachedSoftmaxOverQueries.run,
            "You take softmax over the queries. With one new token every weight becomes 1; each "
            "query shares out its attention among the keys, the last axis.",
        ),
        Misconception(
            "mask_after_softmax",  # museum 3.5
            _CachedMaskAfterSoftmax.run,
            "You set hidden weights to 0 after the softmax. Those that are left add up to less "
            "than 1; hide the scores before.",
        ),
        Misconception(
            "masked_scores_zero",  # museum 3.6
            _CachedMaskedToZero.run,
            "You set hidden scores to 0. Softmax gives a score of 0 the weight e⁰ = 1 before it "
            "normalises, so that the future still draws attention.",
        ),
    ),
    alternatives=(
        _cached_by_torch,
        _cached_one_by_one,
        _cached_einsum,
        _Cached.run,
        _CachedInline.run,
    ),
    rtol=1e-6,  # what it is made of may be the learner's own, right to float32's digits
    atol=1e-6,
    hints=(
        "There are queries for the new positions alone, and keys for all. Write down the shapes "
        "of q, k, v and of the mask when the cache holds 4 positions and 3 new ones come.",
        "Project x with the attention's own three layers, split the heads, append keys and "
        "values, and go on with what append returns. The mask has shape (new, past + new).",
        "New position i is position past + i of the text, so its row of the mask is row past + i "
        "of causal_mask(past + new): take the last `new` rows. Ask for len(cache) before you "
        "append, and end with merge_heads and the attention's output layer.",
    ),
)

# --- tiled_attention ----------------------------------------------------------------------------


class _TiledWatch(TorchFunctionMode):
    """While it is active, looks at the floating-point results of torch's functions and methods.

    Only the last two axes count. `whole`: one has an axis of all m keys, and is not (..., m, 1) and
    has no axis of features, as k and v and parts of them do. `first`: the width of the first with
    an axis of the n queries beside one that is nothing else, hence keys. `most`: bytes of the
    largest set of results that were alive at once, without views of the inputs. `library`: torch's
    own attention was called.
    """

    def __init__(self, q, k, v):
        super().__init__()
        (*self.leading, self.n, d_k), self.m, d_v = q.shape, k.shape[-2], v.shape[-1]
        self.features = {d_k, d_v, d_k + 1, d_v + 1}  # one more: a sum of the weights beside them
        self.inputs = {t.untyped_storage().data_ptr() for t in (q, k, v)}
        self.alive, self.most, self.first = [], 0, 0
        self.whole = self.library = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.library |= "attention" in getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, (tuple, list)) else (result,)
        new = [t for t in several if isinstance(t, torch.Tensor) and t.is_floating_point()]
        for t in new:
            self._look_at(set(t.shape[-2:]), t.shape[-1:] == (1,))
        self.alive = [kept for kept in self.alive if kept() is not None]
        self.alive += [weakref.ref(t) for t in new]
        storages = [kept().untyped_storage() for kept in self.alive]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.most = max(self.most, sum(b for at, b in sizes.items() if at not in self.inputs))
        return result

    def _look_at(self, sizes, column):
        self.whole |= self.m in sizes and not column and not sizes & self.features
        if self.n in sizes and not self.first:
            self.first = max(sizes - {1, self.n, *self.leading, *self.features}, default=0)


def _observe_tiled_attention(tiled_attention, see):
    # d_k is a square, as in scaled_dot_product_attention
    def attended(q, k, v, block):
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = see.call("the output", tiled_attention, q, k, v, block)
        see.gradients("the output", out, q=q, k=k, v=v)

    def inputs(*leading, n, m, d_k, d_v):
        return see.randn(*leading, n, d_k), see.randn(*leading, m, d_k), see.randn(*leading, m, d_v)

    with see.probe("q (2, 3, 7, 9), 12 keys, v (2, 3, 12, 5), block 4"):
        attended(*inputs(2, 3, n=7, m=12, d_k=9, d_v=5), 4)
    with see.probe("q (3, 2, 5, 4), 11 keys, v (3, 2, 11, 7), block 3, which leaves a block of 2"):
        attended(*inputs(3, 2, n=5, m=11, d_k=4, d_v=7), 3)
    with see.probe("q (3, 4, 9), 5 keys, v (3, 5, 7), block 1"):
        attended(*inputs(3, n=4, m=5, d_k=9, d_v=7), 1)
    with see.probe("q (6, 4), 5 keys, v (5, 2), block 9, larger than there are keys"):
        attended(*inputs(n=6, m=5, d_k=4, d_v=2), 9)
    with see.probe("one query, q (2, 1, 16), 9 keys, v (2, 9, 3), block 4"):
        attended(*inputs(2, n=1, m=9, d_k=16, d_v=3), 4)
    with see.probe("q, k, v that are transposed views, (2, 3, 6, 4) and 10 keys, block 4"):
        q, k, v = (see.randn(2, size, 3, 4).transpose(1, 2) for size in (6, 10, 10))
        attended(q, k, v, 4)
    with see.probe("scores in the thousands, of both signs: q (2, 5, 4), 9 keys, block 2"):
        q, k, v = inputs(2, n=5, m=9, d_k=4, d_v=3)
        attended(60 * q, 60 * k, v, 2)
    with see.probe("scores in the thousands in one block: q (2, 4, 4), 6 keys, block 8"):
        q, k, v = inputs(2, n=4, m=6, d_k=4, d_v=3)
        attended(60 * q, 60 * k, v, 8)
    with see.probe("scores from −9000 to −1000: q (2, 3, 4), 7 keys, block 3"):
        q, k, v = 1 + see.rand(2, 3, 4), -1 - see.rand(2, 7, 4), see.randn(2, 7, 5)
        attended(30 * q, 30 * k, v, 3)
    with see.probe("q (2, 4, 5), 9 keys, v (2, 9, 6), block 4"):
        q, k, v = inputs(2, n=4, m=9, d_k=5, d_v=6)
        exact = reference.scaled_dot_product_attention(q, k, v)
        see.fact(_SIX_DIGITS, _near(tiled_attention(q, k, v, 4), exact, 1e-6))
    with see.probe("q (2, 3, 6, 4), 7 keys, v (2, 3, 7, 5), block 3"):
        q, k, v = inputs(2, 3, n=6, m=7, d_k=4, d_v=5)
        exact = reference.scaled_dot_product_attention(q, k, v)
        out = tiled_attention(q, k, v, 3)
        see.fact("the output in float64 is right to eleven digits", _near(out, exact, 1e-11))
    with see.probe("float32, q (2, 4, 3), 8 keys, v (2, 8, 6), block 3"):
        q, k, v = inputs(2, n=4, m=8, d_k=3, d_v=6)
        out = tiled_attention(q.float(), k.float(), v.float(), 3)
        see("the dtype of the output", out.dtype)
        see.fact("it agrees with float64", (out - tiled_attention(q, k, v, 3)).abs().max() < 1e-5)
    with see.probe("q (7, 61, 4), 293 keys, v (7, 293, 2), block 13, without gradients"):
        q, k, v = inputs(7, n=61, m=293, d_k=4, d_v=2)
        watch = _TiledWatch(q, k, v)
        with torch.no_grad(), watch:
            out = tiled_attention(q, k, v, 13)
        see("the output", out)
        see.fact("torch's own attention is not called", not watch.library)
        see.fact("no query meets all keys at once", not watch.whole)
        see.fact("a block has at most `block` keys", watch.first <= 13)
        full = out.element_size() * 7 * 61 * 293
        see.fact("what is kept at once is smaller than all n × m scores", watch.most < full)


class _Tiled:
    """The running softmax in pieces, of which a subclass changes one; `run` is the function."""

    start = -math.inf

    @classmethod
    def run(cls, q, k, v, block):
        return cls().forward(q, k, v, block)

    def scaled(self, q, k, v, block):
        return q / math.sqrt(q.shape[-1])

    def tiles(self, k, v, block):
        return zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True)

    def maximum(self, largest, scores):
        return torch.maximum(largest, scores.amax(dim=-1, keepdim=True))

    def rescale(self, largest, new_largest):
        return torch.exp(largest - new_largest)

    def weights(self, scores, largest):
        return torch.exp(scores - largest)

    def add_total(self, total, rescale, weights):
        return total * rescale + weights.sum(dim=-1, keepdim=True)

    def add_weighted(self, weighted, rescale, weights, v):
        return weighted * rescale + weights @ v

    def finish(self, weighted, total):
        return weighted / total

    def forward(self, q, k, v, block):
        q = self.scaled(q, k, v, block)
        largest = q.new_full((*q.shape[:-1], 1), self.start)
        total = q.new_zeros((*q.shape[:-1], 1))
        weighted = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        for k_tile, v_tile in self.tiles(k, v, block):
            scores = q @ k_tile.transpose(-2, -1)
            new_largest = self.maximum(largest, scores)
            rescale = self.rescale(largest, new_largest)
            weights = self.weights(scores, new_largest)
            total = self.add_total(total, rescale, weights)
            weighted = self.add_weighted(weighted, rescale, weights, v_tile)
            largest = new_largest
        return self.finish(weighted, total)


class _TiledNoRescale(_Tiled):
    def rescale(self, largest, new_largest):
        return 1.0


class _TiledTotalNotRescaled(_Tiled):
    def add_total(self, total, rescale, weights):
        return total + weights.sum(dim=-1, keepdim=True)


class _TiledOutputNotRescaled(_Tiled):
    def add_weighted(self, weighted, rescale, weights, v):
        return weighted + weights @ v


class _TiledRescaleInverted(_Tiled):
    def rescale(self, largest, new_largest):
        return torch.where(largest.isinf(), 0.0, torch.exp(new_largest - largest))


class _TiledRescaleWithoutExp(_Tiled):
    def rescale(self, largest, new_largest):
        return torch.where(largest.isinf(), 0.0, largest / new_largest)


class _TiledNewRescaled(_Tiled):
    """The factor of the old sums is put on the new ones."""

    def add_total(self, total, rescale, weights):
        return total + rescale * weights.sum(dim=-1, keepdim=True)

    def add_weighted(self, weighted, rescale, weights, v):
        return weighted + rescale * (weights @ v)


class _TiledBothRescaled(_Tiled):
    """Old and new are added before the factor is applied."""

    def add_total(self, total, rescale, weights):
        return (total + weights.sum(dim=-1, keepdim=True)) * rescale

    def add_weighted(self, weighted, rescale, weights, v):
        return (weighted + weights @ v) * rescale

    def rescale(self, largest, new_largest):
        return torch.where(largest.isinf(), 1.0, torch.exp(largest - new_largest))


class _TiledMaximumOfBlock(_Tiled):
    def maximum(self, largest, scores):
        return scores.amax(dim=-1, keepdim=True)

    def rescale(self, largest, new_largest):
        return 1.0


class _TiledMaximumOfBlockRescaled(_Tiled):
    """Right but for overflow: the maximum may fall, and then the old sums grow."""

    def maximum(self, largest, scores):
        return scores.amax(dim=-1, keepdim=True)


class _TiledNoMaximum(_Tiled):
    start = 0.0

    def maximum(self, largest, scores):
        return largest


class _TiledFirstMaximum(_Tiled):
    def maximum(self, largest, scores):
        first = scores.amax(dim=-1, keepdim=True)
        return torch.where(largest.isinf(), first, largest)


class _TiledStartsAtZero(_Tiled):
    start = 0.0


class _TiledMaximumOfAll(_Tiled):
    def maximum(self, largest, scores):
        return torch.maximum(largest, scores.amax().expand_as(largest))


class _TiledMaximumOverQueries(_Tiled):
    def maximum(self, largest, scores):
        return torch.maximum(largest, scores.amax(dim=(-2, -1), keepdim=True))


class _TiledMinimum(_Tiled):
    start = math.inf

    def maximum(self, largest, scores):
        return torch.minimum(largest, scores.amin(dim=-1, keepdim=True))

    def rescale(self, largest, new_largest):
        return torch.where(largest.isinf(), -math.inf, largest - new_largest).exp()


class _TiledNotScaled(_Tiled):
    def scaled(self, q, k, v, block):
        return q


class _TiledScaledTwice(_Tiled):
    def scaled(self, q, k, v, block):
        return q / q.shape[-1]


class _TiledMultiplied(_Tiled):
    def scaled(self, q, k, v, block):
        return q * math.sqrt(q.shape[-1])


class _TiledScaledByValues(_Tiled):
    def scaled(self, q, k, v, block):
        return q / math.sqrt(v.shape[-1])


class _TiledScaledByBlock(_Tiled):
    def scaled(self, q, k, v, block):
        return q / math.sqrt(block)


class _TiledScaledByKeys(_Tiled):
    def scaled(self, q, k, v, block):
        return q / math.sqrt(k.shape[-2])


class _TiledRestDropped(_Tiled):
    def tiles(self, k, v, block):
        for i in range(k.shape[-2] // block):
            part = slice(i * block, (i + 1) * block)
            yield k[..., part, :], v[..., part, :]


class _TiledRestDroppedUnlessAlone(_Tiled):
    def tiles(self, k, v, block):
        for i in range(max(k.shape[-2] // block, 1)):
            part = slice(i * block, (i + 1) * block)
            yield k[..., part, :], v[..., part, :]


class _TiledLastDropped(_Tiled):
    def tiles(self, k, v, block):
        for start in range(0, k.shape[-2] - block, block):
            part = slice(start, start + block)
            yield k[..., part, :], v[..., part, :]


class _TiledRestOverlaps(_Tiled):
    def tiles(self, k, v, block):
        m = k.shape[-2]
        for start in range(0, m, block):
            start = max(0, min(start, m - block))
            part = slice(start, start + block)
            yield k[..., part, :], v[..., part, :]


class _TiledOneTooMany(_Tiled):
    def tiles(self, k, v, block):
        for start in range(0, k.shape[-2], block):
            part = slice(start, start + block + 1)
            yield k[..., part, :], v[..., part, :]


class _TiledZerosForRest(_Tiled):
    def tiles(self, k, v, block):
        missing = -k.shape[-2] % block
        k, v = F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))
        return super().tiles(k, v, block)


class _TiledOutOfStep(_Tiled):
    def tiles(self, k, v, block):
        for i, start in enumerate(range(0, k.shape[-2], block)):
            k_tile = k[..., start : start + block, :]
            yield k_tile, v[..., i : i + k_tile.shape[-2], :]


class _TiledFirstValues(_Tiled):
    def tiles(self, k, v, block):
        for k_tile in k.split(block, dim=-2):
            yield k_tile, v[..., : k_tile.shape[-2], :]


class _TiledKeysAsValues(_Tiled):
    def tiles(self, k, v, block):
        return super().tiles(k, k, block)


class _TiledNotDivided(_Tiled):
    def finish(self, weighted, total):
        return weighted


class _TiledDividedEachTime(_Tiled):
    def forward(self, q, k, v, block):
        q = self.scaled(q, k, v, block)
        largest = q.new_full((*q.shape[:-1], 1), self.start)
        total = q.new_zeros((*q.shape[:-1], 1))
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        for k_tile, v_tile in self.tiles(k, v, block):
            scores = q @ k_tile.transpose(-2, -1)
            new_largest = self.maximum(largest, scores)
            rescale = self.rescale(largest, new_largest)
            weights = self.weights(scores, new_largest)
            total = self.add_total(total, rescale, weights)
            out = self.add_weighted(out, rescale, weights, v_tile) / total
            largest = new_largest
        return out


def _tiled_with_eps(eps):
    class WithEps(_Tiled):
        def finish(self, weighted, total):
            return weighted / (total + eps)

    return WithEps.run


class _TiledTotalOfLast(_Tiled):
    def add_total(self, total, rescale, weights):
        return weights.sum(dim=-1, keepdim=True)


class _TiledTotalNotKept(_Tiled):
    """Sums and maxima without their last axis."""

    def forward(self, q, k, v, block):
        q = self.scaled(q, k, v, block)
        largest = q.new_full(q.shape[:-1], -math.inf)
        total = q.new_zeros(q.shape[:-1])
        weighted = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        for k_tile, v_tile in self.tiles(k, v, block):
            scores = q @ k_tile.transpose(-2, -1)
            new_largest = torch.maximum(largest, scores.amax(dim=-1))
            rescale = torch.exp(largest - new_largest)
            weights = torch.exp(scores - new_largest)
            total = total * rescale + weights.sum(dim=-1)
            weighted = weighted * rescale + weights @ v_tile
            largest = new_largest
        return weighted / total


class _TiledInFloat32(_Tiled):
    def forward(self, q, k, v, block):
        return super().forward(q.float(), k.float(), v.float(), block)


class _TiledNoGrad(_Tiled):
    @classmethod
    @torch.no_grad()
    def run(cls, q, k, v, block):
        return cls().forward(q, k, v, block)


class _TiledSumsDetached(_Tiled):
    def add_total(self, total, rescale, weights):
        return super().add_total(total, rescale, weights).detach()


class _TiledWeightsDetached(_Tiled):
    def add_weighted(self, weighted, rescale, weights, v):
        return super().add_weighted(weighted, rescale, weights.detach(), v)


class _TiledInPlace(_Tiled):
    def add_total(self, total, rescale, weights):
        return total.mul_(rescale).add_(weights.sum(dim=-1, keepdim=True))

    def add_weighted(self, weighted, rescale, weights, v):
        return weighted.mul_(rescale).add_(weights @ v)


def _tiled_block_means(q, k, v, block):
    pairs = list(zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True))
    return sum(reference.scaled_dot_product_attention(q, *pair) for pair in pairs) / len(pairs)


def _tiled_block_means_by_torch(q, k, v, block):
    pairs = list(zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True))
    return sum(F.scaled_dot_product_attention(q, *pair) for pair in pairs) / len(pairs)


def _tiled_logs_without_maximum(q, k, v, block):
    log_sum, out = None, None
    for k_tile, v_tile in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        scores = q @ k_tile.transpose(-2, -1) / math.sqrt(q.shape[-1])
        log_tile = scores.exp().sum(dim=-1, keepdim=True).log()
        tile_out = scores.softmax(dim=-1) @ v_tile
        if out is None:
            log_sum, out = log_tile, tile_out
            continue
        new = torch.logaddexp(log_sum, log_tile)
        out = out * torch.exp(log_sum - new) + tile_out * torch.exp(log_tile - new)
        log_sum = new
    return out


def _tiled_one_block_bare(q, k, v, block):
    if k.shape[-2] > block:
        return _Tiled.run(q, k, v, block)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).exp()
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def _tiled_block_sums(q, k, v, block):
    pairs = zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True)
    return sum(reference.scaled_dot_product_attention(q, *pair) for pair in pairs)


def _tiled_weighted_by_size(q, k, v, block):
    pairs = zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True)
    parts = (pair[0].shape[-2] * reference.scaled_dot_product_attention(q, *pair) for pair in pairs)
    return sum(parts) / k.shape[-2]


def _tiled_last_block_alone(q, k, v, block):
    out = None
    for pair in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        out = reference.scaled_dot_product_attention(q, *pair)
    return out


def _tiled_all_at_once(q, k, v, block):
    return reference.scaled_dot_product_attention(q, k, v)


def _tiled_by_torch(q, k, v, block):
    return F.scaled_dot_product_attention(q, k, v)


def _tiled_over_queries(q, k, v, block):
    pieces = [reference.scaled_dot_product_attention(part, k, v) for part in q.split(block, dim=-2)]
    return torch.cat(pieces, dim=-2)


def _tiled_joined_scores(q, k, v, block):
    tiles = [q @ part.transpose(-2, -1) for part in k.split(block, dim=-2)]
    return (torch.cat(tiles, dim=-1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def _tiled_block_ignored(q, k, v, block):
    return reference.tiled_attention(q, k, v, 64)


def _tiled_all_kept(q, k, v, block):
    q = q / math.sqrt(q.shape[-1])
    tiles = [q @ part.transpose(-2, -1) for part in k.split(block, dim=-2)]
    largest = torch.stack([tile.amax(dim=-1) for tile in tiles]).amax(dim=0)[..., None]
    tiles = [torch.exp(tile - largest) for tile in tiles]
    values = v.split(block, dim=-2)
    weighted = sum(tile @ part for tile, part in zip(tiles, values, strict=True))
    return weighted / sum(tile.sum(dim=-1, keepdim=True) for tile in tiles)


def _tiled_in_two_passes(q, k, v, block):
    scale, largest, total, out = q.shape[-1] ** -0.5, None, 0, 0
    for part in k.split(block, dim=-2):
        peak = (q @ part.mT * scale).max(dim=-1, keepdim=True).values.detach()
        largest = peak if largest is None else torch.maximum(largest, peak)
    for start in range(0, k.shape[-2], block):
        part = slice(start, start + block)
        weights = (q @ k[..., part, :].mT * scale - largest).exp()
        total = total + weights.sum(dim=-1, keepdim=True)
        out = out + weights @ v[..., part, :]
    return out / total


def _tiled_by_log_sums(q, k, v, block, scale=None):
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    log_sum, out = None, None
    for k_tile, v_tile in zip(torch.split(k, block, -2), torch.split(v, block, -2), strict=True):
        scores = torch.einsum("...qd,...kd->...qk", q, k_tile) * scale
        log_tile = torch.logsumexp(scores, dim=-1, keepdim=True)
        tile_out = torch.softmax(scores, dim=-1) @ v_tile
        if out is None:
            log_sum, out = log_tile, tile_out
            continue
        new = torch.logaddexp(log_sum, log_tile)
        out = out * torch.exp(log_sum - new) + tile_out * torch.exp(log_tile - new)
        log_sum = new
    return out


def _tiled_joined_at_the_end(q, k, v, block):
    outs, logs = [], []
    for start in range(0, k.shape[-2], block):
        scores = q @ k[..., start : start + block, :].transpose(-1, -2) / math.sqrt(q.shape[-1])
        logs.append(scores.logsumexp(dim=-1))
        outs.append(scores.softmax(dim=-1) @ v[..., start : start + block, :])
    shares = torch.stack(logs).softmax(dim=0)[..., None]  # (blocks, ..., n, 1)
    return (shares * torch.stack(outs)).sum(dim=0)


def _tiled_queries_too(q, k, v, block):
    ones = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)  # its last column sums the weights
    outs = []
    for q_tile in torch.split(q, 16, dim=-2):
        largest = torch.full_like(q_tile[..., :1], -1e30).detach()
        sums = torch.zeros_like(q_tile[..., :1])
        for start in range(0, k.shape[-2], block):
            tile = slice(start, min(start + block, k.shape[-2]))
            scores = q_tile.matmul(k[..., tile, :].transpose(-2, -1)) / q.shape[-1] ** 0.5
            new = torch.max(largest, scores.detach().max(dim=-1, keepdim=True)[0])
            sums = sums * (largest - new).exp() + (scores - new).exp() @ ones[..., tile, :]
            largest = new
        outs.append(sums[..., :-1] / sums[..., -1:])
    return torch.cat(outs, dim=-2)


def _tiled_by_recursion(q, k, v, block):
    def sums(k, v):
        m = k.shape[-2]
        if m <= block:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            largest = scores.amax(dim=-1, keepdim=True)
            weights = (scores - largest).exp()
            return largest, weights.sum(dim=-1, keepdim=True), weights @ v
        left = sums(k[..., : m // 2, :], v[..., : m // 2, :])
        right = sums(k[..., m // 2 :, :], v[..., m // 2 :, :])
        largest = torch.maximum(left[0], right[0])
        shares = (left[0] - largest).exp(), (right[0] - largest).exp()
        return (
            largest,
            left[1] * shares[0] + right[1] * shares[1],
            left[2] * shares[0] + right[2] * shares[1],
        )

    _, total, weighted = sums(k, v)
    return weighted / total


TILED_ATTENTION = Exercise(
    slug="tiled_attention",
    chapter=3,
    title="Exact attention in tiles",
    minutes=30,
    difficulty=5,
    reference=reference.tiled_attention,
    observe=_observe_tiled_attention,
    misconceptions=(
        Misconception(
            "nothing_rescaled",
            _TiledNoRescale.run,
            "You go on adding to the old sums after the maximum has risen. They were made with "
            "e^(score − old maximum), the new ones with the new maximum; look whether a factor is "
            "missing, or the maximum is overwritten before the factor is made.",
        ),
        Misconception(
            "sum_not_rescaled",
            _TiledTotalNotRescaled.run,
            "You rescale the weighted values when the maximum rises, and not the sum of the "
            "weights. Both were made with the old maximum.",
        ),
        Misconception(
            "output_not_rescaled",  # museum §5
            _TiledOutputNotRescaled.run,
            "You rescale the sum of the weights when the maximum rises, and not the weighted "
            "values. Both were made with the old maximum.",
        ),
        Misconception(
            "rescale_inverted",
            _TiledRescaleInverted.run,
            "Your factor for the old sums is the inverse of the right one, so that they grow. "
            "When the maximum rises, what was summed under the old one has to shrink.",
        ),
        Misconception(
            "quotient_of_the_maxima",
            _TiledRescaleWithoutExp.run,
            "You rescale by the quotient of the old and the new maximum. The maximum stands in an "
            "exponent, so that a change of it is a factor e^(difference).",
        ),
        Misconception(
            "new_rescaled_instead_of_old",
            _TiledNewRescaled.run,
            "You put the factor on the new block's sums. They are made with the new maximum "
            "already; it is the old sums that do not fit it.",
        ),
        Misconception(
            "old_and_new_rescaled",
            _TiledBothRescaled.run,
            "You add old and new and then rescale both. Only the old sums were made with the old "
            "maximum; the new ones fit already.",
        ),
        Misconception(
            "maximum_of_the_block",
            _TiledMaximumOfBlock.run,
            "You subtract the maximum of each block and add up the blocks as they are. Each was "
            "made with another maximum, so they cannot be added without a factor.",
        ),
        Misconception(
            "maximum_may_fall",
            _TiledMaximumOfBlockRescaled.run,
            "You go over to the maximum of each new block even where it is smaller. The old sums "
            "are then multiplied by e^(a large number), and overflow; keep the larger of the two.",
        ),
        Misconception(
            "no_maximum",
            _TiledNoMaximum.run,
            "You subtract no maximum. With small scores that is exact, and from about 710 on (89 "
            "in float32) e^score is infinite and your output NaN.",
        ),
        Misconception(
            "maximum_of_the_first_block",
            _TiledFirstMaximum.run,
            "You keep the maximum of the first block for all. With small scores that is exact; "
            "a later score that is larger by 710 (89 in float32) overflows.",
        ),
        Misconception(
            "maximum_starts_too_high",
            _TiledStartsAtZero.run,
            "Your running maximum starts too high. Where all scores of a query are far below it, "
            "every weight becomes 0 and the output 0 / 0; start below any score.",
        ),
        Misconception(
            "one_maximum_for_everything",
            _TiledMaximumOfAll.run,
            "You use one maximum for all queries of all samples. A query whose scores all lie far "
            "below it gets weights of 0 and the output 0 / 0; each query has its own.",
        ),
        Misconception(
            "maximum_over_queries_too",
            _TiledMaximumOverQueries.run,
            "You take the maximum over the queries too. One whose scores all lie far below "
            "another's gets weights of 0 and the output 0 / 0; each query has its own maximum.",
        ),
        Misconception(
            "minimum",
            _TiledMinimum.run,
            "You subtract the smallest score instead of the largest. With small scores that is "
            "exact, and with large ones the exponential overflows: that is what the maximum "
            "prevents.",
        ),
        Misconception(
            "not_scaled",  # museum 3.3, §5
            _TiledNotScaled.run,
            "You do not divide the scores by √d_k. The result should be that of "
            "scaled_dot_product_attention.",
        ),
        Misconception(
            "scaled_twice",  # museum 3.4
            _TiledScaledTwice.run,
            "You divide the scores by d_k: the root is missing, or the scale is applied twice, to "
            "the queries and to the scores.",
        ),
        Misconception(
            "multiplied_by_the_root",  # museum 3.4
            _TiledMultiplied.run,
            "You multiply the scores by √d_k, where they should be divided by it.",
        ),
        Misconception(
            "scaled_by_d_v",
            _TiledScaledByValues.run,
            "You divide the scores by √d_v. A score is a sum over the features of a key, so it is "
            "their number d_k that counts.",
        ),
        Misconception(
            "scaled_by_the_block",
            _TiledScaledByBlock.run,
            "You divide the scores by the root of the block's size. That is a matter of memory "
            "and must not change the result; the scale is √d_k.",
        ),
        Misconception(
            "scaled_by_the_keys",
            _TiledScaledByKeys.run,
            "You divide the scores by the root of the number of keys. The scale is √d_k, the "
            "features of one key.",
        ),
        Misconception(
            "incomplete_block_dropped",
            _TiledRestDropped.run,
            "You drop the keys that do not fill a block. Where the number of keys is no multiple "
            "of the block, the last one is shorter, and it counts.",
        ),
        Misconception(
            "incomplete_block_dropped_unless_alone",
            _TiledRestDroppedUnlessAlone.run,
            "You drop the keys that do not fill a block, unless there are no others. Where the "
            "number of keys is no multiple of the block, the last one is shorter, and it counts.",
        ),
        Misconception(
            "last_block_dropped",
            _TiledLastDropped.run,
            "Your loop ends one block early, so that the last keys never take part. Let the start "
            "of a block run up to the number of keys.",
        ),
        Misconception(
            "last_block_overlaps",
            _TiledRestOverlaps.run,
            "You move the last block back so that it is full. The keys it shares with the block "
            "before are counted twice.",
        ),
        Misconception(
            "blocks_overlap_by_one",
            _TiledOneTooMany.run,
            "Your blocks take one key more than they should, so the first key of the next block "
            "is counted twice. The end of a slice is not part of it.",
        ),
        Misconception(
            "padded_with_zeros",
            _TiledZerosForRest.run,
            "You fill the last block up with keys of zeros. Their score is 0 and not −∞, so they "
            "draw attention; a shorter block needs no filling.",
        ),
        Misconception(
            "values_out_of_step",
            _TiledOutOfStep.run,
            "Your keys advance by whole blocks and your values by one. The number of a block and "
            "its first position are two things; keys and values of a block belong together.",
        ),
        Misconception(
            "values_of_the_first_block",
            _TiledFirstValues.run,
            "You multiply the weights of every block by the first block's values. Keys and values "
            "of a block belong together.",
        ),
        Misconception(
            "key_used_as_value",
            _TiledKeysAsValues.run,
            "You add up keys instead of values. The keys only decide the weights; what is "
            "averaged are the values.",
        ),
        Misconception(
            "never_divided",
            _TiledNotDivided.run,
            "You never divide by the sum of the weights, so they do not add up to 1. One division "
            "after the last block does it.",
        ),
        Misconception(
            "divided_in_every_block",
            _TiledDividedEachTime.run,
            "You divide by the sum so far in every block, and go on adding to the quotient. What "
            "was divided once is divided again in the next round; divide once, after the last "
            "block.",
        ),
        Misconception(
            "sum_of_the_last_block",
            _TiledTotalOfLast.run,
            "You divide by the sum of the last block's weights. The weights of all blocks "
            "together should add up to 1.",
        ),
        Misconception(
            "no_axis_for_the_keys",
            _TiledTotalNotKept.run,
            "Your maxima and sums have lost the axis of keys, so that they do not line up with "
            "the scores, which have one more. Keep it with size 1.",
        ),
        Misconception(
            "float32",
            _TiledInFloat32.run,
            "You compute in float32 whatever comes in, and return it. The dtype should be that of "
            "the queries, so that float64 stays exact to the last digits.",
        ),
        Misconception(
            "no_gradients",
            _TiledNoGrad.run,
            "You switch gradients off, so that nothing can be trained through your attention. The "
            "gradients of q, k and v should be those of scaled_dot_product_attention.",
        ),
        Misconception(
            "sum_detached",
            _TiledSumsDetached.run,
            "Your output is right and its gradient is not: you cut the sum of the weights off "
            "from the graph. Only the maximum may be detached, because it cancels.",
        ),
        Misconception(
            "weights_detached",
            _TiledWeightsDetached.run,
            "Your output is right and its gradient is not: you cut the weights off from the graph "
            "where they meet the values. Only the maximum may be detached, because it cancels.",
        ),
        Misconception(
            "mean_of_the_blocks",
            _tiled_block_means,
            "You attend to each block for itself and average the results. A block whose keys fit "
            "well deserves a larger share: its sum of e^score decides how large.",
        ),
        Misconception(
            "mean_weighted_by_size",
            _tiled_weighted_by_size,
            "You attend to each block for itself and average the results by the number of keys. "
            "It is not the number that decides a block's share but its sum of e^score.",
        ),
        Misconception(
            "mean_of_torch_s_blocks",
            _tiled_block_means_by_torch,
            "You let torch's attention run on each block for itself and average the results. A "
            "block whose keys fit well deserves a larger share: its sum of e^score decides how "
            "large. And the attention is to be built here.",
        ),
        Misconception(
            "logarithms_without_maximum",
            _tiled_logs_without_maximum,
            "You weigh the blocks by the logarithms of their sums, and compute a sum without "
            "subtracting a maximum. From scores of about 710 on (89 in float32) e^score is "
            "infinite, and its logarithm too.",
        ),
        Misconception(
            "one_block_without_maximum",
            _tiled_one_block_bare,
            "Where all keys fit into one block you take a short cut, which subtracts no maximum: "
            "from scores of about 710 on (89 in float32) e^score is infinite and your output NaN.",
        ),
        *(
            Misconception(
                slug,
                _tiled_with_eps(eps),
                "You add a small number to the sum of the weights. The sum cannot be 0, since the "
                "largest score contributes e⁰ = 1, and the number makes every output a little too "
                "small: exact attention needs none.",
            )
            for slug, eps in (
                ("small_number_added_1e_9", 1e-9),
                ("small_number_added_1e_8", 1e-8),
                ("small_number_added_1e_6", 1e-6),
            )
        ),
        Misconception(
            "sum_of_the_blocks",
            _tiled_block_sums,
            "You attend to each block for itself and add up the results, so the weights of a "
            "query add up to the number of blocks. They should add up to 1 over all keys.",
        ),
        Misconception(
            "last_block_alone",
            _tiled_last_block_alone,
            "Only the last block is left in your result: the others are overwritten, or the new "
            "maximum is never stored, so that the factor for the old sums is always 0. Every "
            "block contributes to every query's output.",
        ),
        Misconception(
            "all_scores_at_once",
            _tiled_all_at_once,
            "Your numbers are right, and you make the whole matrix of n × m scores after all. "
            "That is the memory this exercise is about: take `block` keys at a time and keep only "
            "running sums.",
        ),
        Misconception(
            "torch_attention",
            _tiled_by_torch,
            "Your numbers are right because torch's own attention computed them. Here it is to be "
            "built: take `block` keys at a time and keep only running sums.",
        ),
        Misconception(
            "queries_in_blocks",
            _tiled_over_queries,
            "You take the queries block by block or one by one, and each still meets all keys at "
            "once, so that the memory for a block grows with the number of keys. It is keys and "
            "values that should come in blocks.",
        ),
        Misconception(
            "scores_joined",
            _tiled_joined_scores,
            "Your numbers are right, and you join the scores of all blocks to one n × m matrix "
            "before the softmax. That matrix is what blocks are to avoid: keep a running maximum "
            "and running sums instead.",
        ),
        Misconception(
            "other_blocks",
            _tiled_block_ignored,
            "Your numbers are right, and your blocks have more than `block` keys. Either the "
            "argument is not used, or it is taken for the number of blocks: it is the number of "
            "keys in one.",
        ),
        Misconception(
            "all_tiles_kept",
            _tiled_all_kept,
            "You compute the scores block by block and keep all of them, in a list or in one "
            "tensor: together they are the n × m matrix again. Keep a running maximum and running "
            "sums, and let each block go.",
        ),
    ),
    alternatives=(
        _tiled_in_two_passes,
        _tiled_by_log_sums,
        _tiled_joined_at_the_end,
        _tiled_queries_too,
        _tiled_by_recursion,
        _TiledInPlace.run,
        _Tiled.run,
    ),
    hints=(
        "softmax needs two things of all keys: the largest score and the sum of exponentials. "
        "Which of what you have summed is wrong when the next block brings a larger score, and by "
        "which factor?",
        "Keep three tensors for each query: the largest score so far (start at −∞), the sum of "
        "e^(score − largest), and the same sum with each term times its value. Divide at the end.",
        "For each block: new = the larger of the old maximum and the block's; multiply both sums "
        "by e^(old − new); add the block's e^(score − new), summed over the keys, and its product "
        "with the block's values; then new becomes old.",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    SCALED_DOT_PRODUCT_ATTENTION,
    CAUSAL_MASK,
    PADDING_MASK,
    FIX_SOFTMAX_OVER_QUERIES,
    FIX_MASK_AFTER_SOFTMAX,
    SPLIT_HEADS,
    MERGE_HEADS,
    MULTI_HEAD_ATTENTION,
    FIX_HEADS_NOT_TRANSPOSED_BACK,
    SINUSOIDAL_POSITIONS,
    FIX_ORDER_BLINDNESS,
    LAYER_NORM,
    FEED_FORWARD,
    ENCODER_BLOCK,
    LOAD_BERT_LAYER,
    FIX_MISSING_PADDING_MASK,
    CROSS_ATTENTION,
    GREEDY_DECODE,
    KV_CACHE,
    CACHED_ATTENTION,
    TILED_ATTENTION,
)
