"""The corpus of reviews: whole, balanced, without near-duplicates, and not made from templates."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
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


def test_they_load_through_datasets(monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "quick")
    monkeypatch.setenv("COURSE_REVIEWS", "imdb")  # for the full profile
    loaded = reviews.load_reviews()
    assert list(loaded) == list(reviews.SPLITS)
    assert sum(len(part) for part in loaded.values()) == len(ROWS)
    train = loaded["train"]
    assert train.column_names == ["text", "label", "domain", "slice"]
    assert train.features["label"].names == list(reviews.LABELS)
    given = {row["text"]: row["label"] for row in ROWS}
    assert all(given[row["text"]] == row["label"] for row in loaded["test"])
    assert reviews.training_texts() == train["text"][:]


# --- the full profile ---------------------------------------------------------------------------


class Hub:
    """Stands for the Hub behind datasets.load_dataset, which is as noisy as it can be."""

    def __init__(self):
        from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

        features = Features(label=ClassLabel(names=["neg", "pos"]), text=Value("string"))

        def part(name, texts, labels):
            return Dataset.from_dict({"label": labels, "text": texts}, features=features)

        def numbered(name, count):  # all negative ones first, as in IMDB
            return part(
                name,
                [f"{name} {i}" for i in range(count)],
                [int(i >= count // 2) for i in range(count)],
            )

        train = [f"long {i % 390}" for i in range(400)]  # ten texts stand there twice
        self.asked, self.error = [], None
        self.holds = {
            "cornell-movie-review-data/rotten_tomatoes": DatasetDict(
                {
                    name: numbered(name, n)
                    for name, n in zip(reviews.SPLITS, (60, 20, 30), strict=True)
                }
            ),
            "stanfordnlp/imdb": DatasetDict(
                train=part("train", train, [int(i >= 200) for i in range(400)]),
                test=numbered("test", 50),
                unsupervised=part("unsupervised", ["?"] * 7, [-1] * 7),
            ),
        }

    def load_dataset(self, repository, revision):
        import warnings

        from datasets.utils import logging, tqdm
        from huggingface_hub.utils import logging as hub_logging
        from huggingface_hub.utils import tqdm as hub_tqdm

        self.asked.append((repository, revision))
        warnings.warn("you are not logged in", stacklevel=2)
        logging.get_logger("datasets.load").warning("using the cached version")
        hub_logging.get_logger("huggingface_hub.file_download").warning("no token")
        list(tqdm(range(3)))
        list(hub_tqdm(range(3)))
        if self.error:
            raise self.error
        return self.holds[repository]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("COURSE_REVIEWS", raising=False)
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    hub = Hub()
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    return hub


def test_the_full_profile_asks_the_hub_for_one_fixed_commit(hub, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "full")
    loaded = reviews.load_reviews()
    published = hub.holds["cornell-movie-review-data/rotten_tomatoes"]
    assert {split: len(part) for split, part in loaded.items()} == {
        "train": 60,
        "validation": 20,
        "test": 30,
    }
    for split, part in loaded.items():
        assert part.column_names == ["text", "label"]
        assert part.features["label"].names == list(reviews.LABELS)
        assert part["text"][:] == published[split]["text"][:]
        assert part["label"][:] == published[split]["label"][:]
    reviews.load_reviews(source="imdb")
    monkeypatch.setenv("COURSE_REVIEWS", "imdb")
    reviews.load_reviews()
    reviews.load_reviews("full", "rotten_tomatoes")  # an argument wins over both variables
    rotten = (
        "cornell-movie-review-data/rotten_tomatoes",
        "aa13bc287fa6fcab6daf52f0dfb9994269ffea28",
    )
    imdb = ("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31")
    assert hub.asked == [rotten, imdb, imdb, rotten]


def test_imdb_gets_a_validation_part_that_shares_no_text_with_the_rest(hub):
    loaded = reviews.load_reviews("full", "imdb")
    assert list(loaded) == list(reviews.SPLITS)
    train, validation = loaded["train"], loaded["validation"]
    assert len(train) == 360 and 30 <= len(validation) <= 40 and len(loaded["test"]) == 50
    assert not set(train["text"]) & set(validation["text"])
    assert sum(train["label"]) == 180, "half of the tenth is positive"
    published = hub.holds["stanfordnlp/imdb"]["train"]
    known = set(zip(published["text"], published["label"], strict=True))
    for part in (train, validation):
        assert set(zip(part["text"], part["label"], strict=True)) <= known
        assert part.features["label"].names == list(reviews.LABELS)
    texts = set(train["text"]) | set(validation["text"])
    assert texts == set(published["text"]), "nothing but copies was left out"
    again = reviews.load_reviews("full", "imdb")
    for split in reviews.SPLITS:
        assert again[split].to_dict() == loaded[split].to_dict()


def test_loading_says_nothing_and_leaves_the_settings_alone(hub, capfd):
    import datasets.utils
    import huggingface_hub.utils

    libraries = (datasets.utils, huggingface_hub.utils)

    def settings():
        return [
            (library.logging.get_verbosity(), library.are_progress_bars_disabled())
            for library in libraries
        ]

    for library in libraries:
        library.enable_progress_bars()
    before = settings()
    capfd.readouterr()
    for source in reviews.SOURCES:
        reviews.load_reviews("full", source)
    hub.error = OSError("no route")
    with pytest.raises(RuntimeError):
        reviews.load_reviews("full")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert settings() == before
    list(datasets.utils.tqdm(range(3)))
    assert capfd.readouterr().err, "the bars of others are there"


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(hub):
    hub.error = ConnectionError("no\nroute")
    with pytest.raises(RuntimeError) as told:
        reviews.load_reviews("full", "imdb")
    assert str(told.value) == (
        "The reviews stanfordnlp/imdb could not be had from the Hugging Face Hub (no route). Check "
        "the network and run this again, or set COURSE_PROFILE=quick to go on with the reviews "
        "that the course brings along."
    )
    assert told.value.__suppress_context__


def test_unknown_names_are_told(hub, monkeypatch):
    with pytest.raises(ValueError, match="^source is 'imbd': choose 'rotten_tomatoes' or 'imdb'.$"):
        reviews.load_reviews("full", "imbd")
    with pytest.raises(ValueError, match="the quick one: leave source out, or set COURSE_PROFILE="):
        reviews.load_reviews("quick", "imdb")
    with pytest.raises(ValueError, match="asks for the profile 'fast'"):
        reviews.load_reviews("fast")
    monkeypatch.setenv("COURSE_REVIEWS", "yelp")
    with pytest.raises(ValueError, match="^COURSE_REVIEWS is 'yelp': choose 'rotten_tomatoes' or"):
        reviews.load_reviews("full")
    assert hub.asked == []


CHILD = """
from course_utils.data import load_reviews
try:
    load_reviews("full")
except RuntimeError as error:
    print(error)
print(len(load_reviews("quick")["test"]))
"""


@pytest.mark.parametrize(
    "blocked",
    [
        {"HF_HUB_OFFLINE": "1"},
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),
    ],
    ids=["offline", "closed port"],
)
def test_datasets_itself_without_a_hub(blocked, tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "COURSE_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**kept, "HF_HOME": str(tmp_path), **blocked},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == ""
    told, quick = done.stdout.splitlines()
    assert told.startswith(
        "The reviews cornell-movie-review-data/rotten_tomatoes could not be had from the Hugging "
    )
    assert told.endswith("the course brings along.") and int(quick) == 249


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(
    "source, sizes", [("rotten_tomatoes", (8530, 1066)), ("imdb", (22_500, 25_000))]
)
def test_the_published_reviews_load(source, sizes):
    """From the Hub itself."""
    try:
        loaded = reviews.load_reviews("full", source)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert (len(loaded["train"]), len(loaded["test"])) == sizes
    for part in loaded.values():
        assert abs(sum(part["label"]) / len(part) - 0.5) < 0.02
