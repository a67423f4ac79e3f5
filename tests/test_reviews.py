"""The corpus of reviews: whole, balanced, without near-duplicates, and not made from templates."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from course_utils.data import reviews

ROWS = [json.loads(line) for line in reviews.FILE.read_text("utf-8").splitlines()]
SST2 = Path(__file__).resolve().parents[2] / "shared" / "data" / "sst2" / "train.tsv"


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def diversity(texts: list[str]) -> dict[str, float]:
    """Types per token, distinct bigrams per bigram, share of the 50 commonest trigrams."""
    grams = [[], [], []]
    for text in texts:
        tokens = words(text)
        for n in (1, 2, 3):
            grams[n - 1] += list(zip(*(tokens[i:] for i in range(n)), strict=False))
    common = sum(count for _, count in Counter(grams[2]).most_common(50))
    return {
        "types per token": len(set(grams[0])) / len(grams[0]),
        "distinct bigrams": len(set(grams[1])) / len(grams[1]),
        "50 commonest trigrams": common / len(grams[2]),
    }


def test_there_are_enough_of_the_right_length():
    assert len(ROWS) >= 1200
    assert all(row.keys() == {"text", "label", "domain", "slice", "split"} for row in ROWS)
    assert all(8 <= len(row["text"].split()) <= 40 for row in ROWS)
    assert all(row["text"] == row["text"].strip() for row in ROWS)


def test_nothing_but_the_words_gives_the_label_away():
    for domain in reviews.DOMAINS:
        labels = [row["label"] for row in ROWS if row["domain"] == domain]
        assert len(labels) == 210 and sum(labels) == 105
    for split in reviews.SPLITS:
        labels = [row["label"] for row in ROWS if row["split"] == split]
        assert abs(sum(labels) / len(labels) - 0.5) < 0.02
    for name in reviews.SLICES:
        labels = [row["label"] for row in ROWS if row["slice"] == name]
        assert len(labels) >= 80
        # irony is mostly blame in the clothes of praise, here as elsewhere
        assert abs(sum(labels) / len(labels) - 0.5) < (0.25 if name == "irony" else 0.05)
    means = [
        sum(len(row["text"].split()) for row in ROWS if row["label"] == label) / (len(ROWS) / 2)
        for label in (0, 1)
    ]
    assert abs(means[0] - means[1]) < 1


def test_no_two_reviews_are_nearly_the_same():
    sets = [set(words(row["text"])) for row in ROWS]
    closest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2))
    assert closest <= 0.5


def test_openings_vary():
    openings = Counter(tuple(words(row["text"])[:2]) for row in ROWS)
    assert openings.most_common(1)[0][1] <= 0.02 * len(ROWS)


def test_the_language_is_about_as_varied_as_that_of_real_reviews():
    if not SST2.is_file():
        pytest.skip("no SST-2 beside the repository (../shared/data/sst2)")
    lines = SST2.read_text("utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines]
    texts = [text for text in texts if 8 <= len(text.split()) <= 40]
    random.Random(0).shuffle(texts)
    budget, theirs = sum(len(words(row["text"])) for row in ROWS), []
    for text in texts:  # as many tokens: every one of the figures falls with the length
        theirs.append(text)
        budget -= len(words(text))
        if budget <= 0:
            break
    assert budget <= 0
    ours, theirs = diversity([row["text"] for row in ROWS]), diversity(theirs)
    print(ours, theirs)  # shown by pytest -rP
    assert ours["types per token"] > 0.9 * theirs["types per token"]
    assert ours["distinct bigrams"] > theirs["distinct bigrams"]
    assert ours["50 commonest trigrams"] < theirs["50 commonest trigrams"]


def test_they_load_through_datasets():
    loaded = reviews.load_reviews()
    assert list(loaded) == list(reviews.SPLITS)
    assert sum(len(part) for part in loaded.values()) == len(ROWS)
    train = loaded["train"]
    assert train.column_names == ["text", "label", "domain", "slice"]
    assert train.features["label"].names == list(reviews.LABELS)
    given = {row["text"]: row["label"] for row in ROWS}
    assert all(given[row["text"]] == row["label"] for row in loaded["test"])
