"""Worked answers of chapter 3: attention, the Transformer's blocks, and decoding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def scaled_dot_product_attention(q, k, v, mask=None):
    """softmax(q kᵀ / √d_k) v: each query's mean of the values, weighted by how well its key fits.

    q: (..., query, d_k), k: (..., key, d_k), v: (..., key, d_v) → (..., query, d_v). mask: bool,
    broadcastable to (..., query, key), True where the query may look; a query that may look nowhere
    gets zeros. Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.1; the mask as
    in torch.nn.functional.scaled_dot_product_attention.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., query, key)
    if mask is None:
        return scores.softmax(dim=-1) @ v
    scores = scores.masked_fill(~mask, -math.inf)
    blind = ~mask.any(dim=-1, keepdim=True)  # rows of −inf alone, whose softmax would be NaN
    weights = scores.masked_fill(blind, 0.0).softmax(dim=-1)
    return weights.masked_fill(blind, 0.0) @ v  # (..., query, d_v)


def causal_mask(n):
    """bool (n, n), True where key j is not later than query i: the present and the past.

    Source: Vaswani et al. (2017), section 3.2.3.
    """
    return torch.ones(n, n, dtype=torch.bool).tril()


def padding_mask(lengths, n):
    """bool (batch, 1, 1, n), True for the keys of row b that are among its first lengths[b] tokens.

    lengths: int64 (batch,), from 0 to n. The two axes of size 1 stand for heads and queries.
    """
    positions = torch.arange(n, device=lengths.device)
    return (positions < lengths[:, None])[:, None, None, :]  # (batch, heads=1, query=1, key)


def split_heads(x, num_heads):
    """(batch, n, d_model) → (batch, num_heads, n, d_model / num_heads).

    Head h gets the features h·d_head … (h + 1)·d_head − 1 of every token. Raises ValueError where
    d_model is not a multiple of num_heads.
    """
    batch, n, d_model = x.shape
    if d_model % num_heads:
        raise ValueError(f"{d_model} features cannot be split among {num_heads} heads evenly.")
    return x.view(batch, n, num_heads, d_model // num_heads).transpose(1, 2)


def merge_heads(x):
    """(batch, num_heads, n, d_head) → (batch, n, num_heads · d_head): undoes split_heads."""
    batch, num_heads, n, d_head = x.shape
    return x.transpose(1, 2).reshape(batch, n, num_heads * d_head)


class MultiHeadAttention(nn.Module):
    """Self-attention in num_heads subspaces at once.

    x: (batch, n, d_model) → (batch, n, d_model); mask as for scaled_dot_product_attention,
    broadcastable to (batch, num_heads, query, key). `query`, `key`, `value` and `output` are
    nn.Linear(d_model, d_model). Source: Vaswani et al. (2017), section 3.2.2.
    """

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x, mask=None):
        q = split_heads(self.query(x), self.num_heads)  # (batch, heads, n, d_head)
        k = split_heads(self.key(x), self.num_heads)
        v = split_heads(self.value(x), self.num_heads)
        heads = scaled_dot_product_attention(q, k, v, mask)  # (batch, heads, n, d_head)
        return self.output(merge_heads(heads))


def sinusoidal_positions(n, d_model):
    """float32 (n, d_model): row p is what is added to the token at position p.

    Feature 2i is sin(p / 10000^(2i / d_model)), feature 2i + 1 the cosine of the same angle.
    d_model is even. Source: Vaswani et al. (2017), section 3.5.
    """
    position = torch.arange(n, dtype=torch.float32)[:, None]  # (n, 1)
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float32) / d_model)
    angle = position * frequency  # (n, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(start_dim=1)


class LayerNorm(nn.Module):
    """Gives each token's features mean 0 and variance 1, then scales and shifts each feature.

    x: (..., d_model) → the same shape. `weight` (ones) and `bias` (zeros): (d_model,); the biased
    variance, and eps under the root. Source: Ba, Kiros and Hinton, Layer Normalization (2016),
    section 3; torch.nn.LayerNorm.
    """

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)  # (..., 1): one for each token
        variance = x.var(dim=-1, correction=0, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


class FeedForward(nn.Module):
    """The same two-layer network on every token: contract(gelu(expand(x))).

    x: (..., d_model) → the same shape; `expand` is nn.Linear(d_model, d_ff), `contract`
    nn.Linear(d_ff, d_model). Source: Vaswani et al. (2017), section 3.3, with the GELU of Hendrycks
    and Gimpel (2016) in the place of ReLU, as in BERT.
    """

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff)
        self.contract = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.contract(F.gelu(self.expand(x)))  # (..., d_model)


class EncoderBlock(nn.Module):
    """Self-attention, then the feed-forward network, each with a residual connection and a norm.

    x: (batch, n, d_model) → the same shape; mask as for MultiHeadAttention. Post-norm, the paper's
    order: x ← norm(x + dropout(sublayer(x))); with norm_first: x ← x + dropout(sublayer(norm(x))).
    `attention` and `norm1` belong together, `feed_forward` and `norm2`. eps is that of the norms.
    Source: Vaswani et al. (2017), sections 3.1 and 5.4; Xiong et al., On Layer Normalization in the
    Transformer Architecture (2020), figure 1.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout=0.0, norm_first=False, eps=1e-5):
        super().__init__()
        self.norm_first = norm_first
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.norm1 = LayerNorm(d_model, eps)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.norm2 = LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x), mask))
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


def load_bert_layer(block, state_dict, layer):
    """Copy layer number `layer` of a BertModel's state_dict into an EncoderBlock, in place.

    Both keep a linear layer's weight as (out_features, in_features), so nothing is transposed.
    Raises KeyError where a tensor is missing, RuntimeError where a shape differs.
    Source: the parameter names of transformers.BertModel.
    """
    names = {
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "feed_forward.expand": "intermediate.dense",
        "feed_forward.contract": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for ours, theirs in names.items():
        module = block.get_submodule(ours)
        prefix = f"encoder.layer.{layer}.{theirs}"
        module.load_state_dict(
            {"weight": state_dict[f"{prefix}.weight"], "bias": state_dict[f"{prefix}.bias"]}
        )


class CrossAttention(nn.Module):
    """Attention in which x asks and memory answers: queries from x, keys and values from memory.

    x: (batch, n, d_model), memory: (batch, m, d_model) → (batch, n, d_model); mask as for
    scaled_dot_product_attention, broadcastable to (batch, num_heads, n, m). `query`, `key`, `value`
    and `output` are nn.Linear(d_model, d_model). Source: Vaswani et al. (2017), section 3.2.3.
    """

    def __init__(self, d_model, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x, memory, mask=None):
        q = split_heads(self.query(x), self.num_heads)  # (batch, heads, n, d_head)
        k = split_heads(self.key(memory), self.num_heads)  # (batch, heads, m, d_head)
        v = split_heads(self.value(memory), self.num_heads)
        heads = scaled_dot_product_attention(q, k, v, mask)  # (batch, heads, n, d_head)
        return self.output(merge_heads(heads))


class KVCache:
    """The keys and values of all positions that one attention layer has seen so far.

    append(k, v), both (batch, heads, new, d_head), puts them after those of earlier calls and
    returns all of them, (batch, heads, so far, d_head) each; len(cache) is the number of positions.
    """

    def __init__(self):
        self.k = self.v = None

    def append(self, k, v):
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v

    def __len__(self):
        return 0 if self.k is None else self.k.shape[2]


def cached_attention(attention, x, cache):
    """Causal self-attention of positions that come after those in the cache, which then has them.

    attention: a MultiHeadAttention; x: (batch, new, d_model), the new positions alone; cache: a
    KVCache → (batch, new, d_model): what attention(all positions, causal mask) gives for them.
    """
    past, new = len(cache), x.shape[1]
    q = split_heads(attention.query(x), attention.num_heads)  # (batch, heads, new, d_head)
    k = split_heads(attention.key(x), attention.num_heads)
    v = split_heads(attention.value(x), attention.num_heads)
    k, v = cache.append(k, v)  # (batch, heads, past + new, d_head)
    mask = causal_mask(past + new)[past:].to(x.device)  # (new, past + new): the last rows
    heads = scaled_dot_product_attention(q, k, v, mask)
    return attention.output(merge_heads(heads))


def greedy_decode(next_logits, prompt, end_id, max_new_tokens):
    """Append the likeliest token again and again: int64 (batch, t) → (batch, t + new).

    next_logits(tokens (batch, k)) → logits (batch, k, vocab) for the tokens that it has not been
    given before: first the prompt, then each new token once (it keeps a cache). Stops when every
    row has produced end_id, or after max_new_tokens; a row that is done is filled with end_id.
    """
    tokens, fresh = prompt, prompt
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits = next_logits(fresh)[:, -1]  # (batch, vocab): what comes after the last token
            chosen = logits.argmax(dim=-1).masked_fill(done, end_id)
            fresh = chosen[:, None]  # (batch, 1)
            tokens = torch.cat((tokens, fresh), dim=1)
            done = done | (chosen == end_id)
            if done.all():
                break
    return tokens


def tiled_attention(q, k, v, block):
    """scaled_dot_product_attention without a mask, from `block` keys at a time.

    Exact, and no tensor with a query and a key axis is ever wider than `block` keys. q: (..., n,
    d_k), k: (..., m, d_k), v: (..., m, d_v) → (..., n, d_v); block from 1 on. Source: Milakov and
    Gimelshein, Online normalizer calculation for softmax (2018), algorithm 3; Dao et al.,
    FlashAttention (2022), section 3.1.
    """
    q = q / math.sqrt(q.shape[-1])
    largest = q.new_full((*q.shape[:-1], 1), -math.inf)  # of the scores so far, per query
    total = q.new_zeros((*q.shape[:-1], 1))  # Σ exp(score − largest)
    weighted = q.new_zeros((*q.shape[:-1], v.shape[-1]))  # Σ exp(score − largest) · value
    for k_block, v_block in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        scores = q @ k_block.transpose(-2, -1)  # (..., n, block)
        new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        rescale = torch.exp(largest - new_largest)  # what was summed under the old maximum
        weights = torch.exp(scores - new_largest)
        total = total * rescale + weights.sum(dim=-1, keepdim=True)
        weighted = weighted * rescale + weights @ v_block
        largest = new_largest
    return weighted / total


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
        weights = torch.softmax(scores, dim=2)
        return weights @ v


def causal_attention(q, k, v):
    """Attention in which no position looks ahead; q, k, v (batch, heads, n, d_head)."""
    n, d_head = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(d_head)  # (batch, heads, query, key)
    visible = torch.ones(n, n, device=q.device).tril()
    scores = scores.masked_fill(visible == 0, -math.inf)
    weights = F.softmax(scores, dim=-1)
    return weights @ v


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
        return self.output(heads.transpose(1, 2).reshape(batch, n, d_model))


class PositionalEncoding(nn.Module):
    """Adds a learned vector for its position to each token; x (batch, n, d_model)."""

    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Parameter(torch.randn(max_length, 1, d_model))

    def forward(self, x):
        n = x.shape[1]
        return x + self.table[:n].transpose(0, 1)  # (1, n, d_model): the same for every sample


def encode_batch(embedding, block, sentences):
    """The vector of each sentence's first token, (batch, d_model).

    embedding: nn.Embedding whose row 0 stands for padding; block(x, mask) an encoder block;
    sentences: lists of token ids of unequal length.
    """
    n = max(len(sentence) for sentence in sentences)
    ids = torch.tensor([sentence + [0] * (n - len(sentence)) for sentence in sentences])
    mask = (ids != 0)[:, None, None, :]  # (batch, heads=1, query=1, key)
    return block(embedding(ids), mask)[:, 0]


class BertEncoder(nn.Module):
    """BERT without its pooler: embeddings of words, positions and segments, then the blocks.

    ids: int64 (batch, n), mask: bool (batch, n), True for tokens and False for padding → a tuple of
    len(blocks) + 1 tensors (batch, n, hidden_size), the embeddings first. The blocks come loaded;
    the embeddings are read from `state_dict`, a BertModel's. n is at most
    config.max_position_embeddings. Source: Devlin et al., BERT (2019), section 3; the parameter
    names of transformers.BertModel.
    """

    def __init__(self, config, blocks, state_dict):
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segments = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(blocks)
        for module, name in (
            (self.words, "word_embeddings"),
            (self.positions, "position_embeddings"),
            (self.segments, "token_type_embeddings"),
            (self.norm, "LayerNorm"),
        ):
            names = dict(module.named_parameters())
            module.load_state_dict({key: state_dict[f"embeddings.{name}.{key}"] for key in names})

    def forward(self, ids, mask):
        n, limit = ids.shape[1], self.positions.num_embeddings
        if n > limit:
            raise ValueError(f"{n} tokens, but only {limit} positions: cut the text.")
        positions = torch.arange(n, device=ids.device)
        x = self.words(ids) + self.positions(positions) + self.segments.weight[0]
        hidden = [self.norm(x)]  # (batch, n, hidden_size)
        for block in self.blocks:
            hidden.append(block(hidden[-1], mask[:, None, None, :]))
        return tuple(hidden)
