"""Short English reviews, written for this course one by one; public domain (CC0).

1,260 reviews of films, books, services, food, hotels and devices, 8 to 40 words each, half of them
positive within each domain. `slice` says what makes a review hard: "negation", "contrast" (a "but",
and the second half decides), "comparison", "irony", "mixed" (praise and blame), or "plain". Second
readers, who saw the texts alone, gave all of them the label that their writers had given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

FILE = Path(__file__).with_name("reviews.jsonl")
LABELS = ("negative", "positive")  # label 0 and label 1
SLICES = ("plain", "negation", "contrast", "comparison", "irony", "mixed")
DOMAINS = ("film", "book", "service", "food", "hotel", "device")
SPLITS = ("train", "validation", "test")


def load_reviews() -> DatasetDict:
    """The reviews as `datasets` of "train", "validation" and "test", with the same shares of each
    domain, slice and label in all three as far as they can be divided.

    Columns: text (str), label (ClassLabel: 0 negative, 1 positive), domain, slice (str). Importing
    datasets takes seconds.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        text=Value("string"),
        label=ClassLabel(names=list(LABELS)),
        domain=Value("string"),
        slice=Value("string"),
    )
    rows = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
    return DatasetDict(
        {
            split: Dataset.from_list(
                [{name: row[name] for name in features} for row in rows if row["split"] == split],
                features=features,
            )
            for split in SPLITS
        }
    )
