"""The made micro-language: what unlabelled text tells about its words, and what labels cannot."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from course_utils.data import microlanguage as language
from course_utils.data.microlanguage import (
    ADJECTIVES,
    EXCLAMATIONS,
    LABELLED,
    MOODS,
    NEVER_LABELLED,
    NOT,
    NOUNS,
    TOPICS,
    VERBS,
    VOCABULARY,
)

MOOD = {word: mood for mood in (0, 1) for word in ADJECTIVES[mood] + EXCLAMATIONS[mood]}
TOPIC = {word: topic for topic in range(TOPICS) for word in NOUNS[topic] + VERBS[topic]}


def words_of(text) -> list[str]:
    return " ".join(text).split()


def votes(text) -> list[int]:
    """The mood that each adjective and exclamation speaks for, turned round after "nu"."""
    words = ["", *words_of(text)]
    return [
        MOOD[word] ^ (before == NOT)
        for before, word in zip(words, words[1:], strict=False)
        if word in MOOD
    ]


def test_every_word_has_one_id_one_use_and_a_spelling_that_says_nothing():
    assert list(VOCABULARY.values()) == list(range(len(VOCABULARY)))
    assert list(VOCABULARY)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    groups = [*NOUNS, *VERBS, *ADJECTIVES, *EXCLAMATIONS]
    made_up = [word for group in groups for word in group]
    assert len(set(made_up)) == len(made_up) == len(VOCABULARY) - 10
    assert {len(word) for word in made_up} == {4}
    assert [len(words) for words in ADJECTIVES] == [40, 40] and len(MOODS) == 2
    texts, _ = language.sample(5000, random.Random(3))
    used = {word for text in texts for word in words_of(text)}
    assert used == set(VOCABULARY) - set(language.SPECIAL)
    for mood in (0, 1):  # no letter gives the mood away
        rest = ADJECTIVES[1 - mood]
        for letter in set("".join(ADJECTIVES[mood])):
            here, there = (sum(letter in word for word in ws) for ws in (ADJECTIVES[mood], rest))
            assert abs(here - there) <= 15, letter  # sigma is 4.5 at most


@pytest.mark.parametrize("adjectives", [None, LABELLED, NEVER_LABELLED])
def test_a_text_has_one_mood_and_one_topic(adjectives):
    texts, moods = language.sample(4000, random.Random(5), adjectives)
    assert len(texts) == len(moods) == 4000
    for text, mood in zip(texts, moods, strict=True):
        assert len(text) == 2 and all(sentence.count(".") == 1 for sentence in text)
        assert set(votes(text)) == {mood}
        assert len(votes(text)) == (7 if adjectives is None else 6)
        assert len({TOPIC[word] for word in words_of(text) if word in TOPIC}) == 1
    assert abs(sum(moods) / 4000 - 0.5) < 0.04  # 5 sigma


def test_negations_and_topics_do_not_give_the_mood_away():
    texts, moods = language.sample(20_000, random.Random(6), LABELLED)
    negations, topics = Counter(), Counter()
    for text, mood in zip(texts, moods, strict=True):
        negations[mood] += words_of(text).count(NOT)
        topics[mood, next(TOPIC[word] for word in words_of(text) if word in TOPIC)] += 1
    n = [6 * moods.count(mood) for mood in (0, 1)]
    shares = [negations[mood] / n[mood] for mood in (0, 1)]
    sigma = (language.NEGATED * (1 - language.NEGATED) * (1 / n[0] + 1 / n[1])) ** 0.5
    assert abs(shares[0] - shares[1]) < 5 * sigma
    assert abs(sum(shares) / 2 - language.NEGATED) < 5 * sigma
    assert all(abs(topics[mood, topic] - 1250) < 5 * 1250**0.5 for mood, topic in topics)


def test_labels_speak_of_few_words_and_never_of_the_others():
    for mood in (0, 1):
        assert LABELLED[mood] + NEVER_LABELLED[mood] == ADJECTIVES[mood]
        assert len(LABELLED[mood]) == 8
    for adjectives in (LABELLED, NEVER_LABELLED):
        texts, _ = language.sample(3000, random.Random(7), adjectives)
        said = {word for text in texts for word in words_of(text) if word in MOOD}
        assert said == {word for words in adjectives for word in words}, "and no exclamation"


def test_few_words_are_frequent():
    texts, _ = language.sample(5000, random.Random(8))
    counts = Counter(word for text in texts for word in words_of(text))
    for words in ADJECTIVES:
        often, seldom = counts[words[0]], counts[words[-1]]
        assert 15 < often / seldom < 29  # 41 / 2 = 20.5
        share = sum(counts[word] for word in words[:8]) / sum(counts[word] for word in words)
        assert abs(share - 0.554) < 0.02


def test_texts_depend_on_the_generator_alone():
    assert language.sample(5, random.Random(7)) == language.sample(5, random.Random(7))
    assert language.sample(5, random.Random(7)) != language.sample(5, random.Random(8))
    # The same in every version of Python: the figures in the chapter hang on these words.
    said = f"{list(VOCABULARY)}{language.sample(100, random.Random(0))}"
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "19d116c3778122d1"


def test_labels_alone_do_not_tell_what_the_other_words_mean():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def drawn(seed, adjectives):
        texts, moods = language.sample(2000, random.Random(seed), adjectives)
        return [" ".join(text) for text in texts], moods

    bag = CountVectorizer(ngram_range=(1, 2))  # pairs of words: "nu" is seen
    texts, moods = drawn(1, LABELLED)
    model = LogisticRegression(max_iter=1000).fit(bag.fit_transform(texts), moods)
    known, unknown = (drawn(2, adjectives) for adjectives in (LABELLED, NEVER_LABELLED))
    assert model.score(bag.transform(known[0]), known[1]) > 0.97
    assert abs(model.score(bag.transform(unknown[0]), unknown[1]) - 0.5) < 0.06  # 5 sigma


def test_unlabelled_text_tells_what_every_word_means():
    """Counting company is enough: each adjective stands with the frequent ones of its own mood."""
    texts, _ = language.sample(5000, random.Random(9))
    labelled = {word: mood for mood in (0, 1) for word in LABELLED[mood]}
    company = Counter()
    for text in texts:
        words = ["", *words_of(text)]
        said = [
            (word, -1 if before == NOT else 1)
            for before, word in zip(words, words[1:], strict=False)
            if word in MOOD
        ]
        for word, sign in said:
            for other, other_sign in said:
                if other in labelled and other != word:
                    company[word] += sign * other_sign * (1 if labelled[other] else -1)
    unspoken = [word for words in NEVER_LABELLED for word in words]
    assert [int(company[word] > 0) for word in unspoken] == [MOOD[word] for word in unspoken]
