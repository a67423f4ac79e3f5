"""Worked answers of chapter 4: BERT's input, its pretraining, and fine-tuning it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def wordpiece(word, vocab):
    """The pieces of one lower-case word, each the longest that fits from the left; all but the
    first carry "##".

    vocab: a set or dict of pieces. ["[UNK]"] where some part of the word begins with no piece, or
    the word has more than 100 characters. Source: Wu et al., Google's Neural Machine Translation
    System (2016), section 4.1, in the greedy form of BERT's tokenizer.
    """
    if len(word) > 100:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):  # the longest first
            if prefix + word[start:end] in vocab:
                break
        else:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def encode_pair(a, b, tokenizer_vocab, max_length):
    """[CLS] a [SEP] b [SEP] as ids, at most max_length of them; [CLS] a [SEP] where b is None.

    a, b: lists of pieces. Pieces are dropped one by one from the end of the longer list, from
    either where both are as long. tokenizer_vocab: dict piece → id; a piece that it lacks gets the
    id of "[UNK]". Returns {"input_ids": list of int, "token_type_ids": list of int}: type 0 as far
    as the first [SEP], 1 after it. Source: Devlin et al., BERT (2019), section 3 and figure 2.
    """
    a, b = list(a), None if b is None else list(b)
    room = max_length - (2 if b is None else 3)
    while len(a) + len(b or []) > room:
        longer = a if b is None or len(a) > len(b) else b
        longer.pop()
    first = ["[CLS]", *a, "[SEP]"]
    second = [] if b is None else [*b, "[SEP]"]
    unknown = tokenizer_vocab["[UNK]"]
    return {
        "input_ids": [tokenizer_vocab.get(piece, unknown) for piece in first + second],
        "token_type_ids": [0] * len(first) + [1] * len(second),
    }


def collate(batch, pad_id):
    """Pad the examples of a batch, on the right, to the longest of them.

    batch: a list of dicts {"input_ids": list of int, "token_type_ids": list of int, "label": int}.
    Returns int64 tensors: "input_ids", "token_type_ids" and "attention_mask" (batch, longest),
    the mask 1 at real tokens and 0 at padding; "labels" (batch,). Padding has type 0.
    """
    longest = max(len(example["input_ids"]) for example in batch)

    def padded(rows, value):
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    ids = [example["input_ids"] for example in batch]
    return {
        "input_ids": padded(ids, pad_id),  # (batch, longest)
        "token_type_ids": padded([example["token_type_ids"] for example in batch], 0),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "labels": torch.tensor([example["label"] for example in batch]),  # (batch,)
    }


def mask_tokens(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """Choose tokens to predict, and hide them: → inputs, labels, both int64 (batch, n) like ids.

    Each token that is not one of special_ids is chosen with this probability. Of the chosen, 80 %
    become mask_id, 10 % a random id below vocab_size, 10 % stay. labels: the true id where a token
    was chosen, −100 elsewhere. Source: Devlin et al. (2019), section 3.1, task 1.
    """
    special = torch.isin(ids, torch.tensor(special_ids))
    chosen = (torch.rand(ids.shape, generator=generator) < probability) & ~special  # (batch, n)
    fate = torch.rand(ids.shape, generator=generator)
    anything = torch.randint(vocab_size, ids.shape, generator=generator)
    inputs = ids.masked_fill(chosen & (fate < 0.8), mask_id)
    inputs = torch.where(chosen & (fate >= 0.9), anything, inputs)
    return inputs, ids.masked_fill(~chosen, -100)


def masked_accuracy(logits, labels):
    """The share of tokens to be predicted that are predicted right, a float.

    logits: (batch, n, vocab_size), labels: int64 (batch, n), −100 where nothing is asked; at least
    one is asked.
    """
    asked = labels != -100  # (batch, n)
    return (logits.argmax(dim=-1) == labels)[asked].float().mean().item()


def masked_mean(hidden, mask):
    """The mean of each row's real tokens: hidden (batch, n, d_model) → (batch, d_model).

    mask: (batch, n), 1 or True at real tokens, of which each row has at least one.
    """
    weights = mask.to(hidden.dtype)[..., None]  # (batch, n, 1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class SequenceClassifier(nn.Module):
    """A pretrained encoder with a new head: classifier(dropout(tanh(pooler(one vector)))).

    The vector is the first token's ("cls") or the mean over the real tokens ("mean"). `encoder`
    returns an object with .last_hidden_state (batch, n, d_model) and has .config.hidden_size;
    `pooler` is nn.Linear(d_model, d_model), `classifier` nn.Linear(d_model, num_labels). input_ids,
    attention_mask, token_type_ids: (batch, n) → logits (batch, num_labels). Raises ValueError for
    another pooling. Source: Devlin et al. (2019), section 4.1;
    transformers.BertForSequenceClassification.
    """

    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling is {pooling!r}: give 'cls' or 'mean'.")
        d_model = encoder.config.hidden_size
        self.pooling = pooling
        self.encoder = encoder
        self.pooler = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(d_model, num_labels)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state  # (batch, n, d_model)
        one = hidden[:, 0] if self.pooling == "cls" else masked_mean(hidden, attention_mask)
        return self.classifier(self.dropout(torch.tanh(self.pooler(one))))


def classify(model, token_lists, pad_id):
    """Logits (batch, num_labels) of token lists of unequal lengths, in one batch.

    model(input_ids=…, attention_mask=…), both int64 (batch, longest), returns logits.
    """
    rows = [torch.tensor(ids) for ids in token_lists]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(ids) for ids in token_lists])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()  # (batch, n)
    return model(input_ids=input_ids, attention_mask=attention_mask)


def batch_loss(model, batch):
    """The mean cross-entropy of a batch, a tensor with a graph.

    model(**inputs) returns an object with .logits (batch, num_labels); batch holds the inputs and
    "labels", int64 (batch,).
    """
    outputs = model(**batch)
    return F.cross_entropy(outputs.logits, batch["labels"])


def predicted_classes(model, batch):
    """The most likely class of each example, int64 (batch,).

    model(**batch) returns an object with .logits (batch, num_labels) and, because batch holds
    "labels" too, with .loss; other fields may stand before and after.
    """
    with torch.no_grad():
        return model(**batch).logits.argmax(dim=-1)


def freeze_encoder(model):
    """Stop the training of model.encoder; the other parameters of model go on."""
    for parameter in model.encoder.parameters():
        parameter.requires_grad = False


def split_texts(texts, test_share, generator):
    """Indices for training and for testing, two lists; a text and its copies stay together.

    Texts count as the same where they differ in case or white space only. Of the distinct texts,
    round(test_share × their number) drawn at random are for testing.
    """
    copies = {}
    for i, text in enumerate(texts):
        copies.setdefault(" ".join(text.lower().split()), []).append(i)
    groups = list(copies.values())
    order = torch.randperm(len(groups), generator=generator).tolist()
    held_out = round(test_share * len(groups))
    test = [i for g in order[:held_out] for i in groups[g]]
    train = [i for g in order[held_out:] for i in groups[g]]
    return train, test


def warmup_linear(step, warmup, total):
    """The factor of the learning rate at a step, counted from 0: 0 → 1 → 0 in straight lines.

    It rises from 0 at step 0 to 1 at step `warmup`, falls to 0 at step `total`, and stays there.
    A warm-up longer than the training is still rising where the training ends.
    Source: transformers.get_linear_schedule_with_warmup; Devlin et al. (2019), appendix A.2.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def weight_decay_groups(model, wd):
    """Two parameter groups for an optimizer: the matrices, which decay by wd, and the rest.

    The rest, with weight_decay 0.0, are the parameters of fewer than two axes: biases, and scale
    and shift of norms. Frozen parameters are in neither, a shared one is in one once.
    Source: Devlin et al. (2019), appendix A.2, as in the code published with it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def accumulate_step(model, micro_batches, loss_function, optimizer, max_norm=None):
    """One optimizer step for several small batches, the same as for all their examples at once.

    micro_batches: a list of dicts of tensors as `collate` makes them, of any sizes;
    loss_function(logits, labels) is the mean over a micro-batch. The gradient of the mean over all
    examples is clipped to the norm max_norm, if given. Returns that mean loss, a float.
    """
    total = sum(len(batch["labels"]) for batch in micro_batches)
    mean_loss = 0.0
    optimizer.zero_grad()
    for batch in micro_batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        loss = loss_function(model(**inputs), batch["labels"]) * (len(batch["labels"]) / total)
        loss.backward()
        mean_loss += loss.item()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return mean_loss


def macro_f1(predictions, labels, num_classes):
    """The plain mean of the classes' F1 scores, a float from 0 to 1.

    predictions, labels: int64 (n,). F1 = 2 TP / (2 TP + FP + FN); a class that is neither
    predicted nor present counts 0. Source: sklearn.metrics.f1_score(average="macro",
    labels=range(num_classes), zero_division=0).
    """
    scores = []
    for k in range(num_classes):
        hits = ((predictions == k) & (labels == k)).sum().item()  # true positives
        named = (predictions == k).sum().item() + (labels == k).sum().item()  # 2 TP + FP + FN
        scores.append(2 * hits / named if named else 0.0)
    return sum(scores) / num_classes


def best_span(start_logits, end_logits, mask, max_len):
    """(start, end), two ints, both included: the span whose two logits add up to the most.

    start_logits, end_logits: (n,); mask: bool (n,), True at the tokens of the text in which the
    answer stands, one stretch; the span has at least one and at most max_len tokens, all of them
    there. Source: Devlin et al. (2019), section 4.2.
    """
    n = len(start_logits)
    scores = start_logits[:, None] + end_logits[None, :]  # (start, end)
    forwards = torch.ones(n, n, dtype=torch.bool).triu().tril(max_len - 1)
    allowed = forwards & mask[:, None] & mask[None, :]
    best = scores.masked_fill(~allowed, -math.inf).argmax().item()
    return best // n, best % n


class LoRALinear(nn.Module):
    """A frozen nn.Linear plus a trained low-rank change: base(x) + (alpha / rank) x Aᵀ Bᵀ.

    x: (..., in_features) → (..., out_features). `base` is the given layer, its parameters frozen;
    `lora_A` (rank, in_features) starts random, `lora_B` (out_features, rank) at zero, so that the
    new layer starts as the base. merge() gives the whole as one new nn.Linear. Source: Hu et al.,
    LoRA (2021), section 4.1.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(rank))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    def merge(self):
        whole = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None)
        whole.to(self.base.weight)  # its dtype and device
        with torch.no_grad():
            whole.weight.copy_(self.base.weight + self.scale * self.lora_B @ self.lora_A)
            if self.base.bias is not None:
                whole.bias.copy_(self.base.bias)
        return whole
