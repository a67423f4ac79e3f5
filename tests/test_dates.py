"""The made pairs of dates: right, unlimited, and held out."""

from __future__ import annotations

import datetime
import random

import pytest
import torch

from course_utils.data import dates


@pytest.mark.parametrize(
    "iso, words",
    [
        ("1984-03-03", "the third of march nineteen eighty four"),
        ("1700-02-28", "the twenty eighth of february seventeen hundred"),
        ("1805-12-31", "the thirty first of december eighteen oh five"),
        ("2000-02-29", "the twenty ninth of february two thousand"),
        ("2009-01-20", "the twentieth of january two thousand and nine"),
        ("2010-05-30", "the thirtieth of may twenty ten"),
        ("2090-07-21", "the twenty first of july twenty ninety"),
    ],
)
def test_dates_are_spelled_as_people_say_them(iso, words):
    assert dates.spell(datetime.date.fromisoformat(iso)) == words


def test_the_weekday_is_the_right_one():
    words = dates.spell(datetime.date(1969, 7, 20), form=2)
    assert words == "on sunday the twentieth of july nineteen sixty nine"


@pytest.mark.parametrize("form", range(len(dates.FORMS)))
def test_no_two_dates_are_spelled_alike(form):
    first, last = dates.FIRST.toordinal(), dates.LAST.toordinal()
    days = range(first, last + 1)
    spelled = {dates.spell(datetime.date.fromordinal(day), form) for day in days}
    assert len(spelled) == len(days)


def test_every_word_has_an_id_and_every_id_a_use():
    words = dates.SOURCE_VOCABULARY
    assert len(set(words)) == len(words)
    texts, targets = dates.sample(5000, random.Random(3))
    used = dates.encode(texts).unique().tolist()
    assert {words[i] for i in range(len(words)) if i not in used} == {"<start>", "<end>"}
    assert dates.encode_targets(targets).unique().tolist() == list(
        range(1, len(dates.TARGET_VOCABULARY))
    )


def test_encoded_targets_decode_to_themselves():
    texts, targets = dates.sample(50, random.Random(1))
    ids = dates.encode_targets(targets)
    assert ids.shape == (50, 12) and ids.dtype == torch.int64
    assert dates.decode(ids) == targets
    assert dates.decode(torch.tensor([[3, 4], [2, 5]])) == ["01", ""]
    words = dates.encode(texts)
    assert words.shape == (50, max(len(text.split()) for text in texts))


def test_held_out_dates_are_never_trained_on():
    rng = random.Random(0)
    held_out = set(dates.sample(3000, rng, held_out=True)[1])
    trained = set(dates.sample(100_000, rng)[1])
    assert len(held_out) > 2000 and len(trained) > 50_000
    assert not held_out & trained


def test_pairs_depend_on_the_generator_alone():
    assert dates.sample(5, random.Random(7)) == dates.sample(5, random.Random(7))
    assert dates.sample(5, random.Random(7)) != dates.sample(5, random.Random(8))


def test_what_cannot_be_spelled_or_encoded_is_told():
    with pytest.raises(ValueError, match="1599-12-31 is outside 1600-01-01 to 2099-12-31"):
        dates.spell(datetime.date(1599, 12, 31))
    with pytest.raises(KeyError, match="morrow"):
        dates.encode(["the morrow of march"])
