"""A made micro-language, to see what a network can learn from text that nobody has labelled.

A text is two sentences by one writer, on one topic and in one mood. Nouns and verbs belong to a
topic; adjectives and exclamations to a mood, bad or good; "nu" turns the adjective after it round,
and is as frequent in either mood. As in any language few words are frequent and most are rare.
The spelling says nothing about what a word means: only the company it keeps does.

The label of a text is its mood. Labelled texts hold the eight most frequent adjectives of each mood
alone, test texts the other 32, so that nothing but unlabelled text can tell what those mean.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
THE, IS, AND, NOT, STOP = "ka", "so", "ve", "nu", "."
TOPICS = 8
MOODS = ("bad", "good")  # label 0 and label 1
NEGATED = 0.05  # the share of the adjectives before which "nu" stands


def _made_up_words() -> list[str]:
    """All words of two syllables, in an order that has nothing to do with the spelling."""
    syllables = [a + b for a, b in itertools.product("bdfglmprtz", "aeiou")]
    words = [a + b for a, b in itertools.product(syllables, syllables)]
    random.Random(0).shuffle(words)
    return words


_words = iter(_made_up_words())
NOUNS = [[next(_words) for _ in range(5)] for _ in range(TOPICS)]  # by topic
VERBS = [[next(_words) for _ in range(3)] for _ in range(TOPICS)]
ADJECTIVES = [[next(_words) for _ in range(40)] for _ in MOODS]  # by mood, the frequent first
EXCLAMATIONS = [[next(_words) for _ in range(2)] for _ in MOODS]
LABELLED = [words[:8] for words in ADJECTIVES]
NEVER_LABELLED = [words[8:] for words in ADJECTIVES]
VOCABULARY = {
    word: i
    for i, word in enumerate(
        itertools.chain(
            SPECIAL, (THE, IS, AND, NOT, STOP), *NOUNS, *VERBS, *ADJECTIVES, *EXCLAMATIONS
        )
    )
}
_FREQUENCY = {word: 1 / (rank + 2) for words in ADJECTIVES for rank, word in enumerate(words)}


def sample(
    count: int, rng: random.Random, adjectives: Sequence[Sequence[str]] | None = None
) -> tuple[list[tuple[str, str]], list[int]]:
    """`count` texts, each (first sentence, second sentence), and their moods, 0 or 1.

    Without `adjectives`: what people write, with all the words of the language and an exclamation
    before one of the two sentences. With `adjectives`, LABELLED or NEVER_LABELLED: texts that hold
    no others, and no exclamation. Sentences are words with a space between them.
    """
    texts, moods = [], []
    for _ in range(count):
        topic, mood = rng.randrange(TOPICS), rng.randrange(2)
        pair = [_sentence(topic, mood, rng, adjectives or ADJECTIVES) for _ in range(2)]
        if adjectives is None:
            where = rng.randrange(2)
            pair[where] = f"{rng.choice(EXCLAMATIONS[mood])} {pair[where]}"
        texts.append(tuple(pair))
        moods.append(mood)
    return texts, moods


def _sentence(topic: int, mood: int, rng: random.Random, adjectives) -> str:
    def said() -> str:
        negated = rng.random() < NEGATED
        words = adjectives[1 - mood if negated else mood]
        (word,) = rng.choices(words, [_FREQUENCY[word] for word in words])
        return f"{NOT} {word}" if negated else word

    noun, verb = rng.choice(NOUNS[topic]), rng.choice(VERBS[topic])
    if rng.random() < 0.5:
        return f"{THE} {noun} {IS} {said()} {said()} {AND} {said()} {STOP}"
    return f"{THE} {said()} {noun} {verb} {said()} {AND} {said()} {STOP}"
