"""Made sentence pairs to learn translation from: dates in words, and the same dates in ISO form.

"on saturday the third of march nineteen eighty four" → "1984-03-03". The words come in several
orders, so that a network must find year, month and day by what they are and not by where they
stand. There are as many pairs as anyone wants; held-out dates never appear in a training batch.
"""

from __future__ import annotations

import datetime
import functools
import random

import torch

PAD, START, END = 0, 1, 2  # ids in both vocabularies
FIRST, LAST = datetime.date(1600, 1, 1), datetime.date(2099, 12, 31)
HELD_OUT = 0.1  # the share of the dates that no training batch holds

_ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen \
sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth \
thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth".split()
_MONTHS = "january february march april may june july august september october november \
december".split()
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_OTHERS = "the of on in year thirtieth hundred thousand and oh".split()

SOURCE_VOCABULARY = (
    ["<pad>", "<start>", "<end>"] + _ONES + _TENS + _ORDINALS + _MONTHS + _WEEKDAYS + _OTHERS
)
TARGET_VOCABULARY = ["<pad>", "<start>", "<end>", *"0123456789-"]
_SOURCE_IDS = {word: i for i, word in enumerate(SOURCE_VOCABULARY)}
_TARGET_IDS = {symbol: i for i, symbol in enumerate(TARGET_VOCABULARY)}

FORMS = (
    "the {day} of {month} {year}",
    "{month} the {day} {year}",
    "on {weekday} the {day} of {month} {year}",
    "{weekday} {month} the {day} in the year {year}",
    "in the year {year} on the {day} of {month}",
)


def spell(date: datetime.date, form: int = 0) -> str:
    """The date in words, in the word order FORMS[form]; raises ValueError outside 1600-2099."""
    if not FIRST <= date <= LAST:
        raise ValueError(f"{date} is outside {FIRST} to {LAST}, the dates that are spelled here.")
    return FORMS[form].format(
        day=_ordinal(date.day),
        month=_MONTHS[date.month - 1],
        year=_year(date.year),
        weekday=_WEEKDAYS[date.weekday()],
    )


def _number(n: int) -> str:
    """1 to 99 in words."""
    if n < 20:
        return _ONES[n - 1]
    tens = _TENS[n // 10 - 2]
    return f"{tens} {_ONES[n % 10 - 1]}" if n % 10 else tens


def _ordinal(day: int) -> str:
    if day <= 20:
        return _ORDINALS[day - 1]
    return {30: "thirtieth", 31: "thirty first"}.get(day) or f"twenty {_ORDINALS[day - 21]}"


def _year(year: int) -> str:
    century, rest = divmod(year, 100)
    if year == 2000:
        return "two thousand"
    if 2000 < year < 2010:
        return f"two thousand and {_number(rest)}"
    if rest == 0:
        return f"{_number(century)} hundred"
    return f"{_number(century)} {'oh ' if rest < 10 else ''}{_number(rest)}"


def encode(texts: list[str]) -> torch.Tensor:
    """int64 (batch, n) of word ids, each row padded with PAD to the longest; KeyError for a word
    that is not in SOURCE_VOCABULARY."""
    rows = [[_SOURCE_IDS[word] for word in text.split()] for text in texts]
    n = max(map(len, rows))
    return torch.tensor([row + [PAD] * (n - len(row)) for row in rows])


def encode_targets(dates: list[str]) -> torch.Tensor:
    """int64 (batch, 12): START, the ten characters of each ISO date, END."""
    return torch.tensor([[START, *(_TARGET_IDS[c] for c in date), END] for date in dates])


def decode(ids: torch.Tensor) -> list[str]:
    """The characters of each row (batch, n) up to the first END, START left out."""
    texts = []
    for row in ids.tolist():
        row = row[: row.index(END)] if END in row else row
        texts.append("".join(TARGET_VOCABULARY[i] for i in row if i not in (PAD, START)))
    return texts


@functools.cache
def _days(held_out: bool) -> tuple[int, ...]:
    days = list(range(FIRST.toordinal(), LAST.toordinal() + 1))
    random.Random(0).shuffle(days)
    cut = int(HELD_OUT * len(days))
    return tuple(days[:cut] if held_out else days[cut:])


def sample(size: int, rng: random.Random, held_out: bool = False) -> tuple[list[str], list[str]]:
    """`size` random pairs: (dates in words, in random word order; the same dates in ISO form)."""
    dates = [datetime.date.fromordinal(rng.choice(_days(held_out))) for _ in range(size)]
    return [spell(date, rng.randrange(len(FORMS))) for date in dates], list(map(str, dates))
