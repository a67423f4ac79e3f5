"""The chapter's fine-tuning on phrases that real critics wrote, measured without a leak.

../shared/data/sst2 holds the phrases of SST-2 (Socher et al., 2013; Wang et al., 2019), cut by
phrase and not by sentence, so that pieces of one sentence stand in both of its files. Here the
1,000 dev phrases are `random.Random(0).sample` of dev.tsv, and the 2,000 training phrases have
eight words or more, share no run of six words with any of them, and hold none of the shorter ones
whole. The quick profile's encoder, two epochs, one thread.

Measured with seeds 0, 1 and 2: 86.2, 86.2 and 86.2 % of the 1,000 phrases, and of the 463 that
have eight words or more 84.7, 85.3 and 84.9 %. With the leak left in, that is with 2,000 of all
training phrases of eight words or more, the same code gave 88.3, 87.9 and 87.2 %, and 86.0, 86.6
and 86.6 %. 56.2 % of the 1,000 are positive. `pytest -rP tests/test_sst2.py` shows the figures of
seed 0; COURSE_SST2_SEED=1 takes another seed, COURSE_SST2_LEAK=1 leaves the leak in.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from course_utils import data
from course_utils.reference.bert import (
    SequenceClassifier,
    accumulate_step,
    collate,
    warmup_linear,
    weight_decay_groups,
)
from course_utils.training import length_grouped

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "sst2"
SEED = int(os.environ.get("COURSE_SST2_SEED", "0"))
LEAK = os.environ.get("COURSE_SST2_LEAK", "0") == "1"
EPOCHS, BATCH_SIZE, LEARNING_RATE, HEAD_LEARNING_RATE, WEIGHT_DECAY = 2, 32, 1e-4, 1e-3, 0.01

pytestmark = pytest.mark.slow


def runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    """All runs of n words."""
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def read(name: str) -> list[tuple[list[str], int]]:
    lines = (FOLDER / name).read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [(text.split(), int(label)) for text, label in rows]


@pytest.fixture(scope="module")
def phrases():
    """(2,000 training phrases, 1,000 dev phrases), each a list of words and a label."""
    if not (FOLDER / "train.tsv").is_file():
        pytest.skip("no SST-2 beside the repository (../shared/data/sst2)")
    dev = random.Random(0).sample(read("dev.tsv"), 1000)
    sixes = set().union(*(runs(words, 6) for words, _ in dev))
    whole = defaultdict(set)  # length → the dev phrases of that length
    for words, _ in dev:
        whole[len(words)].add(tuple(words))

    def leaks(words):
        held = any(runs(words, n) & those for n, those in whole.items() if n <= len(words))
        return held or bool(runs(words, 6) & sixes)

    long = [row for row in read("train.tsv") if len(row[0]) >= 8]
    clean = long if LEAK else [row for row in long if not leaks(row[0])]
    return random.Random(0).sample(clean, 2000), dev


@pytest.mark.skipif(LEAK, reason="COURSE_SST2_LEAK=1 leaves the leak in")
def test_no_phrase_stands_on_both_sides(phrases):
    """Looked for in another way than the one that chose the phrases: in their texts."""
    train, dev = phrases
    assert (len(train), len(dev)) == (2000, 1000)
    assert min(len(words) for words, _ in train) >= 8
    assert all(abs(sum(label for _, label in part) / len(part) - 0.54) < 0.05 for part in phrases)
    corpus = "\n".join(f" {' '.join(words)} " for words, _ in train)
    for words, _ in dev:
        assert f" {' '.join(words)} " not in corpus
        for i in range(len(words) - 5):
            assert f" {' '.join(words[i : i + 6])} " not in corpus
    others = {f" {' '.join(words)} " for words, _ in dev if len(words) > 8}
    for (words, _), other in itertools.product(train, others):
        assert f" {' '.join(words)} " not in other


def test_two_epochs_on_2000_phrases_read_four_of_five_others(phrases):
    try:
        encoder, tokenizer = data.load_encoder("quick")
    except RuntimeError as error:
        pytest.skip(str(error))
    start = time.process_time()
    train, dev = ([example(tokenizer, *row) for row in part] for part in phrases)
    torch.manual_seed(SEED)
    model = SequenceClassifier(encoder, num_labels=2, pooling="mean")
    fine_tune(model, train, torch.Generator().manual_seed(SEED))
    hits = torch.tensor(predicted(model, dev)) == torch.tensor([row["label"] for row in dev])
    long = torch.tensor([len(words) >= 8 for words, _ in phrases[1]])
    accuracy, on_long = hits.float().mean().item(), hits[long].float().mean().item()
    print(
        f"seed {SEED}{', leak left in' * LEAK}: accuracy {accuracy:.3f} on {len(dev)} dev phrases, "
        f"{on_long:.3f} on the {long.sum()} of eight words or more; "
        f"{time.process_time() - start:.0f} s of processor time"
    )  # shown by pytest -rP
    # The goal is 0.80. One standard error is 0.011 on all phrases and 0.017 on the long ones.
    assert accuracy >= 0.83 and on_long >= 0.80, "worse than ever measured, and not by chance"


def example(tokenizer, words: list[str], label: int) -> dict:
    encoded = tokenizer(" ".join(words), truncation=True, max_length=64)
    return {name: encoded[name] for name in ("input_ids", "token_type_ids")} | {"label": label}


def fine_tune(model, examples, generator) -> None:
    lengths = [len(row["input_ids"]) for row in examples]
    batches = [
        rows for _ in range(EPOCHS) for rows in length_grouped(lengths, BATCH_SIZE, generator)
    ]
    groups = [
        {**group, "lr": rate}
        for part, rate in (
            (model.encoder, LEARNING_RATE),
            (model.pooler, HEAD_LEARNING_RATE),
            (model.classifier, HEAD_LEARNING_RATE),
        )
        for group in weight_decay_groups(part, WEIGHT_DECAY)
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    total = len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_linear(step, total // 10, total)
    )
    model.train()
    for rows in batches:
        batch = collate([examples[row] for row in rows], pad_id=0)
        accumulate_step(model, [batch], F.cross_entropy, optimizer, max_norm=1.0)
        scheduler.step()


@torch.no_grad()
def predicted(model, examples) -> list[int]:
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    classes = [0] * len(examples)
    for start in range(0, len(order), 50):
        rows = order[start : start + 50]
        batch = collate([examples[row] for row in rows], pad_id=0)
        del batch["labels"]
        for row, answer in zip(rows, model(**batch).argmax(dim=-1).tolist(), strict=True):
            classes[row] = answer
    return classes
