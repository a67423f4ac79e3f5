"""Reviews and their labels: short ones written for this course, or thousands from the Hub.

Quick profile: 1,260 English reviews of films, books, services, food, hotels and devices, written
one by one; public domain (CC0); 8 to 40 words each, half of them positive within each domain.
`slice` says what makes a review hard: "negation", "contrast" (a "but", and the second half
decides), "comparison", "irony", "mixed" (praise and blame), or "plain". Second readers, who saw the
texts alone, gave all of them the label that their writers had given.

Full profile: sentences on films (Pang and Lee, 2005, https://arxiv.org/abs/cs/0506075) or whole
reviews of films (Maas et al., 2011, https://aclanthology.org/P11-1015), from the Hugging Face Hub.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from course_utils import runtime

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILE = Path(__file__).with_name("reviews.jsonl")
LABELS = ("negative", "positive")  # label 0 and label 1
SLICES = ("plain", "negation", "contrast", "comparison", "irony", "mixed")
DOMAINS = ("film", "book", "service", "food", "hotel", "device")
SPLITS = ("train", "validation", "test")


class Source(NamedTuple):
    """A data set of the Hub; the revision is a commit of its repository."""

    repository: str
    revision: str


SOURCES = {
    "rotten_tomatoes": Source(
        "cornell-movie-review-data/rotten_tomatoes", "aa13bc287fa6fcab6daf52f0dfb9994269ffea28"
    ),
    "imdb": Source("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"),
}


def load_reviews(profile: str | None = None, source: str | None = None) -> DatasetDict:
    """The reviews as `datasets` of "train", "validation" and "test".

    Columns: text (str), label (ClassLabel: 0 negative, 1 positive). Importing datasets takes
    seconds.

    Quick: the course's own, with two more columns, domain and slice (str), and the same shares of
    each domain, slice and label in all three parts as far as they can be divided.

    Full: `source`, else the environment variable COURSE_REVIEWS, else "rotten_tomatoes" (some
    10,700 sentences in the three published parts). "imdb" has 25,000 reviews for training, of which
    a tenth, drawn with a fixed seed and half positive, is the validation part, without those whose
    text is in the rest too; and 25,000 for testing. They are downloaded once, and kept in the
    Hugging Face cache.

    Raises ValueError, in a sentence, for an unknown profile or source, and for a source in the
    quick profile; RuntimeError, with the remedy, where the Hub has to be reached and cannot be.
    """
    name = runtime.profile(profile).name
    asked = source or os.environ.get("COURSE_REVIEWS")  # an empty one counts as unset
    if asked and asked not in SOURCES:
        raise ValueError(
            f"{'source' if source else 'COURSE_REVIEWS'} is {asked!r}: "
            f"choose {' or '.join(map(repr, SOURCES))}."
        )
    if name == "full":
        return _from_hub(asked or "rotten_tomatoes")
    if source:
        raise ValueError(
            f"The reviews {source!r} belong to the full profile, and this is the quick one: "
            "leave source out, or set COURSE_PROFILE=full."
        )
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        text=Value("string"),
        label=ClassLabel(names=list(LABELS)),
        domain=Value("string"),
        slice=Value("string"),
    )
    rows = _rows()
    return DatasetDict(
        {
            split: Dataset.from_list(
                [{name: row[name] for name in features} for row in rows if row["split"] == split],
                features=features,
            )
            for split in SPLITS
        }
    )


def training_texts() -> list[str]:
    """The texts of the course's own training part, without datasets and its seconds."""
    return [row["text"] for row in _rows() if row["split"] == "train"]


def _rows() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]


# --- the Hub ------------------------------------------------------------------------------------


def _from_hub(name: str) -> DatasetDict:
    import datasets

    repository, revision = SOURCES[name]
    label = datasets.ClassLabel(names=list(LABELS))
    with _quiet():
        try:
            loaded = datasets.load_dataset(repository, revision=revision)
        except Exception as error:  # of many kinds and libraries
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise RuntimeError(
                f"The reviews {repository} could not be had from the Hugging Face Hub ({said}). "
                "Check the network and run this again, or set COURSE_PROFILE=quick to go on with "
                "the reviews that the course brings along."
            ) from None
        parts = {split: loaded[split] for split in SPLITS if split in loaded}
        if "validation" not in parts:
            parts = {**_split(parts["train"]), "test": parts["test"]}
        parts = {split: parts[split].select_columns(["text", "label"]) for split in SPLITS}
        return datasets.DatasetDict(
            {split: part.cast_column("label", label) for split, part in parts.items()}
        )


def _split(train: Dataset) -> dict[str, Dataset]:
    """A tenth of `train` for validation, the same one each time."""
    parts = train.train_test_split(test_size=0.1, seed=0, stratify_by_column="label")
    known = set(parts["train"]["text"])
    new = [row for row, text in enumerate(parts["test"]["text"]) if text not in known]
    return {"train": parts["train"], "validation": parts["test"].select(new)}


@contextmanager
def _quiet() -> Iterator[None]:
    """datasets and huggingface_hub without warnings and progress bars."""
    import datasets.utils.logging
    import huggingface_hub.utils

    libraries = (datasets.utils, huggingface_hub.utils)
    levels = [library.logging.get_verbosity() for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # also that an environment variable wants the bars
        hidden = [library.are_progress_bars_disabled() for library in libraries]
        for library in libraries:
            library.logging.set_verbosity_error()
            library.disable_progress_bars()
        try:
            yield
        finally:
            for library, level, were_hidden in zip(libraries, levels, hidden, strict=True):
                library.logging.set_verbosity(level)
                if not were_hidden:
                    library.enable_progress_bars()
