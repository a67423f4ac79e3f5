"""How chapter 4 is judged: BERT's input, its pretraining, and fine-tuning it.

`# museum 4.n` beside a misconception is the row of the defects found in published tutorials,
`# museum F12` and `# museum C15` too; `# museum §5` is an answer that popular checkers accept.
"""

from __future__ import annotations

import copy
import itertools
import math
import numbers
import operator
import random
import re
import unicodedata
from collections import Counter, OrderedDict, UserDict
from collections.abc import Mapping, ValuesView
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises.engine import Exercise, Misconception
from course_utils.reference import bert as reference

# --- what several of them observe with ----------------------------------------------------------


def _called_on_lists(see, label, function, *args):
    """`see.call`, which also observes whether the lists among the arguments were changed."""
    kept = copy.deepcopy(args)
    out = see.call(label, function, *args)
    see.fact(f"{label}: the lists among the inputs are left unmodified", args == kept)
    return out


class _ModelOutput(OrderedDict):
    """Read like Hugging Face's: by attribute, by name, and by position among what is not None."""

    def __init__(self, **fields):
        super().__init__({name: value for name, value in fields.items() if value is not None})
        self.__dict__.update(fields)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        return tuple(self.values())


class _Encoder(nn.Module):
    """One layer of attention over words, places and segments, called like Hugging Face's models."""

    def __init__(self, see, vocab_size, d_model, pooler=False, places=16):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=d_model, vocab_size=vocab_size)
        self.words = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(places, d_model)
        self.segments = nn.Embedding(2, d_model)
        self.mix = nn.Linear(d_model, d_model)
        self.pooled = pooler
        _filled(see, self)

    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, return_dict=True, **further
    ):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        x = x + self.segments(token_type_ids)  # (batch, n, d_model)
        scores = self.mix(x) @ x.transpose(1, 2)  # (batch, n, n)
        scores = scores.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(x.dtype).min)
        hidden = torch.tanh(x + 2 * scores.softmax(dim=-1) @ x)
        pooled = torch.sin(3 * hidden[:, 0]) if self.pooled else None
        outputs = _ModelOutput(last_hidden_state=hidden, pooler_output=pooled)
        return outputs if return_dict else outputs.to_tuple()


def _filled(see, module):
    """`module` in float64 with parameters of order 1, the same in every implementation."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(see.randn(*p.shape) / math.sqrt(p.shape[-1] if p.ndim > 1 else 4))
    return module


def _ragged(see, *lengths, vocab_size=14):
    """int64 ids (batch, longest) and their mask: 1 at real tokens, 0 at padding, on the right."""
    n = max(lengths)
    mask = (torch.arange(n) < torch.tensor(lengths)[:, None]).long()
    return see.randint(1, vocab_size, len(lengths), n) * mask, mask


# --- wordpiece ----------------------------------------------------------------------------------


class _CountedVocab(dict):
    """Ends a search that never does: for a word of four characters ten look-ups are enough."""

    looked_up = 0

    def _count(self):
        self.looked_up += 1
        if self.looked_up > 3000:
            raise RuntimeError("3000 look-ups for one short word: the search never ends")

    def __contains__(self, piece):
        self._count()
        return super().__contains__(piece)

    def __getitem__(self, piece):
        self._count()
        return super().__getitem__(piece)

    def get(self, piece, default=None):
        self._count()
        return super().get(piece, default)


def _observe_wordpiece(wordpiece, see):
    def split(word, *pieces, as_dict=False, kind=dict, by=""):
        vocab = {"[PAD]", "[UNK]", *pieces}
        if as_dict:
            vocab = kind({piece: i for i, piece in enumerate((*pieces, "[UNK]", "[PAD]"))})
        kept = dict(vocab) if as_dict else set(vocab)
        what = repr(word) if len(word) < 20 else f"a word of {len(word)} characters"
        what += by
        out = see.call(f"the answer for {what}", wordpiece, word, vocab)
        see.fact(f"the answer for {what} is a list", isinstance(out, list))
        see.fact(f"{what}: the vocabulary among the inputs is left unmodified", vocab == kept)

    with see.probe("'film', which the vocabulary has whole"):
        split("film", "film", "f", "fil", "##i", "##ilm", "##lm", "##l", "##m")
    with see.probe("'unwatchable' = un + ##watch + ##able; the vocabulary is a dict"):
        split(
            "unwatchable",
            *("un", "##watch", "##able", "u", "##n", "##w", "##wa", "watch", "able"),
            *("##a", "##t", "##c", "##h", "##b", "##l", "##e"),
            as_dict=True,
        )
    with see.probe("'cab' in single characters"):
        split("cab", "c", "##a", "##b", "a", "b", "##c")
    with see.probe("'a', one character"):
        split("a", "a", "##a")
    with see.probe("'banana', in which one piece stands twice"):
        split("banana", "ba", "##na", "na")
    with see.probe("'unable', with 'una', '##ble' and 'un', '##able'"):
        split("unable", "un", "##able", "una", "##ble")
    with see.probe("'disbelieved', with '##believe', '##d' and '##belie', '##ved'"):
        split("disbelieved", "dis", "##believe", "##belie", "##d", "##ved", as_dict=True)
    with see.probe("'reopened', with 'reo', '##pen', '##ed' and 're', '##opened'"):
        split("reopened", "re", "##opened", "reo", "##pen", "##ed")
    with see.probe("'themes': after 'them' and '##e' nothing fits 's'"):
        split("themes", "the", "them", "##mes", "##e")
    with see.probe("'naive' without any piece for 'i'"):
        split("naive", "n", "na", "##a", "##ve", as_dict=True)
    with see.probe("'xylophone' without any piece for 'x'"):
        split("xylophone", "##y", "y", "##lophone", "##ylophone")
    with see.probe("'snowball', of which the vocabulary has 'snow' and 'ball'"):
        split("snowball", "snow", "ball", "##ba")
    with see.probe("'able', of which the vocabulary has '##able'"):
        split("able", "##able", "##ble", "##a", "abl")
    with see.probe("words of 100 and of 101 characters"):
        split("ab" * 50, "a", "##ab", "##a", "##b")
        split("ab" * 50 + "a", "a", "##ab", "##a", "##b")
    with see.probe("a word of 102 characters"):
        split("z" * 102, "z", "##z")
    with see.probe("a word of 101 characters that the vocabulary has whole"):
        split("no" * 50 + "o", "no" * 50 + "o", "no", "##no", "##o")
    with see.probe("'blackboards', with 'black', '##boards' and 'b', '##la', '##ckboards'"):
        split("blackboards", "black", "##boards", "b", "##la", "##ckboards")
    with see.probe("a word of 60 characters: one piece of 24, one of 36"):
        split("ha" * 30, "ha", "##ha", "ha" * 12, "##" + "ha" * 18, as_dict=True)
    with see.probe("a word of 60 Greek letters, which are 120 bytes"):
        split("αβ" * 30, "α", "##αβ", "##β", "##α")
    with see.probe("'film' with two vocabularies, one after the other"):
        split("film", "film", "fi", "##lm", by=", whole in the vocabulary")
        split("film", "fi", "##lm", "##l", by=", not whole in the vocabulary")
    with see.probe("'#' with '#' and '###', the piece that stands for # inside a word"):
        split("#", "a", "#", "###", as_dict=True, kind=_CountedVocab)
    with see.probe("'c#' with '#' and '###', the piece that stands for # inside a word"):
        split("c#", "a", "c", "#", "###", as_dict=True, kind=_CountedVocab)
    with see.probe("'café' with '#', '###' and 'caf': nothing fits 'é'"):
        split("café", "a", "caf", "#", "###", as_dict=True, kind=_CountedVocab)


def _wordpiece_with(
    ends=lambda word, start: range(len(word), start, -1),
    prefix=lambda start: "##" if start else "",
    limit=100,
    unknown=lambda word, pieces, start: ["[UNK]"],
    shown=lambda piece: piece,
):
    """The greedy search with another order, prefix, limit, or another answer to what is missing."""

    def wordpiece(word, vocab):
        if len(word) > limit:
            return ["[UNK]"]
        pieces, start = [], 0
        while start < len(word):
            fits = [e for e in ends(word, start) if prefix(start) + word[start:e] in vocab]
            if not fits:
                return unknown(word, pieces, start)
            pieces.append(shown(prefix(start) + word[start : fits[0]]))
            start = fits[0]
        return pieces

    return wordpiece


_wordpiece_shortest = _wordpiece_with(ends=lambda word, start: range(start + 1, len(word) + 1))
_wordpiece_never_whole = _wordpiece_with(ends=lambda word, start: range(len(word) - 1, start, -1))
_wordpiece_two_or_more = _wordpiece_with(ends=lambda word, start: range(len(word), start + 1, -1))
_wordpiece_bare = _wordpiece_with(prefix=lambda start: "")
_wordpiece_marked = _wordpiece_with(prefix=lambda start: "##")
_wordpiece_unmarked = _wordpiece_with(shown=lambda piece: piece.removeprefix("##"))
_wordpiece_no_limit = _wordpiece_with(limit=math.inf)
_wordpiece_limit_101 = _wordpiece_with(limit=101)
_wordpiece_limit_99 = _wordpiece_with(limit=99)
_wordpiece_partly = _wordpiece_with(unknown=lambda word, pieces, start: [*pieces, "[UNK]"])
_wordpiece_cut_short = _wordpiece_with(unknown=lambda word, pieces, start: pieces)
_wordpiece_unknown_text = _wordpiece_with(unknown=lambda word, pieces, start: "[UNK]")
_wordpiece_whole_word = _wordpiece_with(unknown=lambda word, pieces, start: [word])
_wordpiece_characters = _wordpiece_with(
    unknown=lambda word, pieces, start: [("##" if i else "") + c for i, c in enumerate(word)]
)


def _wordpiece_no_split(word, vocab):
    return [word] if word in vocab and len(word) <= 100 else ["[UNK]"]


def _wordpiece_skipping(mark):
    def wordpiece(word, vocab):
        if len(word) > 100:
            return ["[UNK]"]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if prefix + word[start:end] in vocab:
                    pieces.append(prefix + word[start:end])
                    start = end
                    break
            else:
                pieces += mark
                start += 1
        return pieces

    return wordpiece


def _wordpiece_either(word, vocab):
    """Takes a piece also where only the form without ## is in the vocabulary."""
    both = {piece.removeprefix("##") for piece in vocab} | set(vocab)
    return _wordpiece_with(prefix=lambda start: "")(word, both)


def _wordpiece_either_marked(word, vocab):
    continuing = {"##" + piece for piece in vocab if not piece.startswith("##")}
    return reference.wordpiece(word, continuing | set(vocab))


def _wordpiece_searched(best):
    """The best of all ways to cover the word, instead of the greedy one."""

    def covers(word, vocab, start=0):
        if start == len(word):
            yield []
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                yield from ([piece, *rest] for rest in covers(word, vocab, end))

    def wordpiece(word, vocab):
        if len(word) > 100:
            return ["[UNK]"]
        if len(set(word)) == 2:  # the long words, of which there are too many ways
            return reference.wordpiece(word, vocab)
        return best(covers(word, vocab)) or ["[UNK]"]

    return wordpiece


_wordpiece_backtracking = _wordpiece_searched(lambda ways: next(ways, None))
_wordpiece_fewest = _wordpiece_searched(lambda ways: min(ways, key=len, default=None))
_wordpiece_fewest_of_equals = _wordpiece_searched(
    lambda ways: min(list(ways)[::-1], key=len, default=None)
)


def _wordpiece_from_the_right(word, vocab):
    if len(word) > 100:
        return ["[UNK]"]
    pieces, end = [], len(word)
    while end > 0:
        for start in range(end):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                break
        else:
            return ["[UNK]"]
        pieces.insert(0, piece)
        end = start
    return pieces


def _wordpiece_one_step(word, vocab):
    """The longest beginning, and all the rest as one piece."""
    for end in range(len(word), 0, -1):
        rest = ["##" + word[end:]] if end < len(word) else []
        if word[:end] in vocab and len(word) <= 100:
            return [word[:end], *rest] if not rest or rest[0] in vocab else ["[UNK]"]
    return ["[UNK]"]


def _wordpiece_joined(word, vocab):
    return " ".join(reference.wordpiece(word, vocab))


def _wordpiece_ids(word, vocab):
    ids = vocab if isinstance(vocab, dict) else {p: i for i, p in enumerate(sorted(vocab))}
    return [ids[piece] for piece in reference.wordpiece(word, vocab)]


def _wordpiece_get(word, vocab):
    """Looks pieces up as only a dict can, and takes the id 0 for none."""
    found = {piece: vocab.get(piece) for piece in vocab}
    return reference.wordpiece(word, {piece for piece, i in found.items() if i})


def _wordpiece_tuple(word, vocab):
    return tuple(reference.wordpiece(word, vocab))


def _wordpiece_ten_at_most(word, vocab):
    return _wordpiece_with(ends=lambda w, start: range(min(len(w), start + 10), start, -1))(
        word, vocab
    )


def _wordpiece_bytes(word, vocab):
    return ["[UNK]"] if len(word.encode()) > 100 else reference.wordpiece(word, vocab)


def _wordpiece_remembering():
    known = {}

    def wordpiece(word, vocab):
        if word not in known:
            known[word] = reference.wordpiece(word, vocab)
        return known[word]

    return wordpiece


def _wordpiece_cutting_the_mark(word, vocab):
    """What is left carries its ##, and the cut may fall inside it."""
    if len(word) > 100:
        return ["[UNK]"]
    pieces, rest = [], word
    while rest:
        end = len(rest)
        while end > 0 and rest[:end] not in vocab:
            end -= 1
        if end == 0:
            return ["[UNK]"]
        pieces.append(rest[:end])
        rest = "##" + rest[end:] if rest[end:] else ""
    return pieces


def _wordpiece_stripping(word, vocab):
    """Goes on by the length of the piece without any #, so not at all after `#`."""
    if len(word) > 100:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        fits = [e for e in range(len(word), start, -1) if prefix + word[start:e] in vocab]
        if not fits:
            return ["[UNK]"]
        pieces.append(prefix + word[start : fits[0]])
        start += len(pieces[-1].lstrip("#"))
    return pieces


def _wordpiece_recursive(word, vocab, prefix=""):
    if len(word) > 100:
        return ["[UNK]"]
    if not word:
        return []
    for end in reversed(range(1, len(word) + 1)):
        piece = prefix + word[:end]
        if piece in vocab:
            rest = _wordpiece_recursive(word[end:], vocab, "##")
            return ["[UNK]"] if rest == ["[UNK]"] else [piece, *rest]
    return ["[UNK]"]


def _wordpiece_shrinking(word, vocab, unk="[UNK]", max_chars=100):
    pieces, rest = [], word
    while rest and len(word) <= max_chars:
        piece = rest
        while piece and ("##" * bool(pieces)) + piece not in vocab:
            piece = piece[:-1]
        if not piece:
            return [unk]
        pieces.append("##" * bool(pieces) + piece)
        rest = rest[len(piece) :]
    return pieces or [unk]


def _wordpiece_regex(word, vocab):
    """Regular expressions try alternatives from the left: the longest are written first."""
    ordered = sorted(vocab, key=len, reverse=True)
    first = "|".join(re.escape(p) for p in ordered if not p.startswith("##"))
    later = "|".join(re.escape(p[2:]) for p in ordered if p.startswith("##")) or r"(?!)"
    pieces, at = [], 0
    while at < len(word) <= 100:
        match = re.compile(later if at else first).match(word, at)
        if match is None:
            return ["[UNK]"]
        pieces.append(("##" if at else "") + match[0])
        at = match.end()
    return pieces or ["[UNK]"]


def _wordpiece_max(word, vocab):
    """The longest among the pieces with which what is left begins."""
    if len(word) > 100:
        return ["[UNK]"]
    pieces, left = [], word
    while left:
        marked = left if left is word and not pieces else "##" + left
        fits = [p for p in vocab if marked.startswith(p) and (not pieces or len(p) > 2)]
        if not fits:
            return ["[UNK]"]
        pieces.append(max(fits, key=len))
        left = left[len(pieces[-1]) - (2 if len(pieces) > 1 else 0) :]
    return pieces


WORDPIECE = Exercise(
    slug="wordpiece",
    chapter=4,
    title="Split a word into pieces",
    minutes=15,
    difficulty=2,
    reference=reference.wordpiece,
    observe=_observe_wordpiece,
    misconceptions=(
        Misconception(
            "shortest_first",
            _wordpiece_shortest,
            "You take the shortest piece that fits, so that words fall apart into characters. "
            "Each piece is the longest one with which the rest of the word begins: start from "
            "the far end of the word.",
        ),
        Misconception(
            "never_the_whole_rest",
            _wordpiece_never_whole,
            "You never try all that is left as one piece: the last character is always cut off. "
            "A slice's end is not included, so the whole rest ends at the length of the word.",
        ),
        Misconception(
            "no_single_characters",
            _wordpiece_two_or_more,
            "You never try a piece of one character. The shortest piece to try ends one place "
            "after its start, and a range leaves out its stop.",
        ),
        Misconception(
            "later_pieces_looked_up_without_their_mark",
            _wordpiece_bare,
            "You look up every piece without ##, also in the middle of the word. `ball` is a "
            "word; `##ball` is an ending, another entry, and only that may follow.",
        ),
        Misconception(
            "first_piece_marked_too",
            _wordpiece_marked,
            "You put ## before the first piece as well. The mark says that a piece continues a "
            "word; the first one begins it.",
        ),
        Misconception(
            "marks_taken_off",
            _wordpiece_unmarked,
            "You find the right pieces and return them without ##. With the marks goes the "
            "knowledge where a word begins, and `able` has another id than `##able`.",
        ),
        Misconception(
            "mark_optional",
            _wordpiece_either,
            "You take a piece with or without ##, whichever is there. A word's beginning and its "
            "continuation are different entries of the vocabulary: nothing with ## may begin a "
            "word, nothing without it may continue one.",
        ),
        Misconception(
            "words_used_as_endings",
            _wordpiece_either_marked,
            "Where the vocabulary has a piece without ## only, you let it continue a word. The "
            "piece that you then name, with ##, is not in the vocabulary and has no id.",
        ),
        Misconception(
            "keeps_what_was_found",
            _wordpiece_partly,
            "Where nothing fits any more you keep the pieces so far and add [UNK]. One part "
            "without a piece makes the whole word unknown: the answer is [UNK] alone.",
        ),
        Misconception(
            "rest_dropped",
            _wordpiece_cut_short,
            "Where nothing fits any more you return the pieces so far, and the rest of the word "
            "is lost without a trace. The whole word is then [UNK].",
        ),
        Misconception(
            "unknown_characters_marked_one_by_one",
            _wordpiece_skipping(["[UNK]"]),
            "You put [UNK] for the one character that fits nothing, and go on behind it. One "
            "part without a piece makes the whole word unknown: the answer is [UNK] alone.",
        ),
        Misconception(
            "unknown_characters_skipped",
            _wordpiece_skipping([]),
            "You skip characters that fit nothing, so that the pieces spell another word. One "
            "part without a piece makes the whole word [UNK].",
        ),
        Misconception(
            "unknown_words_spelled",
            _wordpiece_characters,
            "You spell a word that cannot be split, character by character, though the vocabulary "
            "lacks at least one of these pieces. Such a word is [UNK], one piece.",
        ),
        Misconception(
            "unknown_words_as_they_are",
            _wordpiece_whole_word,
            "You return a word that cannot be split as it is. The vocabulary does not have it, so "
            "it has no id: such a word is [UNK].",
        ),
        Misconception(
            "unknown_without_a_list",
            _wordpiece_unknown_text,
            "For an unknown word you return the text [UNK], not a list that holds it. Who goes "
            "through your pieces gets five of them: [, U, N, K and ].",
        ),
        Misconception(
            "only_whole_words",
            _wordpiece_no_split,
            "You look up the whole word and nothing else, so every longer word is unknown. Where "
            "it is not in the vocabulary, try its beginnings, then go on with what is left.",
        ),
        Misconception(
            "two_pieces_at_most",
            _wordpiece_one_step,
            "After the first piece you take all the rest as one. The rest is split in the same "
            "way, as often as needed, until nothing is left.",
        ),
        Misconception(
            "goes_back",
            _wordpiece_backtracking,
            "Where the longest piece leads nowhere you go back and try a shorter one. WordPiece "
            "never goes back: `themes` is then unknown, although `the` and `##mes` are there.",
        ),
        Misconception(
            "fewest_pieces",
            _wordpiece_fewest,
            "You look for the way with the fewest pieces. WordPiece takes the longest piece at "
            "each place and never looks further, even where another way is shorter.",
        ),
        Misconception(
            "fewest_pieces_among_equals",
            _wordpiece_fewest_of_equals,
            "You look for the way with the fewest pieces, and of two that are as short you do not "
            "take the one that begins with the longer piece. WordPiece takes the longest piece at "
            "each place and never looks further, even where another way is shorter.",
        ),
        Misconception(
            "from_the_right",
            _wordpiece_from_the_right,
            "You take the longest ending first and work towards the front. The pieces are found "
            "from the left; the two ways give different ids for many words.",
        ),
        Misconception(
            "no_limit",
            _wordpiece_no_limit,
            "You split words of any length. More than 100 characters are [UNK]: what is so long is "
            "no word, and the search takes time with the square of the length.",
        ),
        Misconception(
            "limit_one_too_low",
            _wordpiece_limit_99,
            "You give up on a word of exactly 100 characters. Only more than 100 are too many.",
        ),
        Misconception(
            "limit_one_too_high",
            _wordpiece_limit_101,
            "You split a word of 101 characters. More than 100 are too many, so 101 are.",
        ),
        Misconception(
            "limit_in_bytes",
            _wordpiece_bytes,
            "You count bytes. A Greek or Cyrillic letter takes two of them; it is more than 100 "
            "characters that are too many.",
        ),
        Misconception(
            "long_pieces_never_tried",
            _wordpiece_ten_at_most,
            "You try pieces up to a certain length and none that is longer. The vocabulary may "
            "have long ones: start from the end of the word.",
        ),
        Misconception(
            "cut_inside_the_mark",
            _wordpiece_cutting_the_mark,
            "You put ## before what is left of the word and then shorten that, down to the # of "
            "the mark itself. Where the vocabulary has the piece `#`, it is found there, and what "
            "is left grows for ever: the mark belongs to what is looked up, not to the word.",
        ),
        Misconception(
            "every_sharp_taken_for_a_mark",
            _wordpiece_stripping,
            "You strip every # off a piece to learn how many characters it covers. Of the piece "
            "`#`, which a vocabulary may have, nothing is left, and the search stays where it is "
            "for ever.",
        ),
        Misconception(
            "words_remembered",
            _wordpiece_remembering(),
            "You keep what you found for a word and give it again, also when the next call comes "
            "with another vocabulary. The answer depends on both.",
        ),
        Misconception(
            "one_text",
            _wordpiece_joined,
            "You join the pieces into one text. Return a list, one entry for each piece: the next "
            "step looks up the id of each.",
        ),
        Misconception(
            "tuple",
            _wordpiece_tuple,
            "You return a tuple with the right pieces. A list is asked for: a tuple is never equal "
            "to a list, whatever they hold.",
        ),
        Misconception(
            "ids_instead_of_pieces",
            _wordpiece_ids,
            "You return ids. The pieces themselves are wanted here; the ids are looked up when "
            "the special tokens are added.",
        ),
        Misconception(
            "looked_up_by_get",
            _wordpiece_get,
            "You ask the vocabulary with `.get`, which a set does not have, and whose answer 0 "
            "for the first entry of a dict counts as false. Ask whether the piece is in it.",
        ),
    ),
    alternatives=(_wordpiece_recursive, _wordpiece_shrinking, _wordpiece_regex, _wordpiece_max),
    hints=(
        "Keep the place where the next piece starts. From there, which end do you try first, and "
        "where does the next piece start once one fits?",
        "Two loops: the outer one as long as something is left, the inner one over the possible "
        "ends, from the length of the word downwards. From the second piece on, put ## before the "
        "slice before you look it up.",
        "`for end in range(len(word), start, -1)` tries the longest slice first; `break` when it "
        "is in the vocabulary, then `start = end`. A `for` has an `else` too: it runs where no "
        "`break` came, and there the word is unknown.",
    ),
)


# --- encode_pair --------------------------------------------------------------------------------


def _observe_encode_pair(encode_pair, see):
    # Where both lists are cut, the room is even: an odd piece may stay in either.
    words = [f"w{i}" for i in range(30)]

    def vocabulary(first="[PAD]"):
        """Random ids from 7, but for `first`, which has the id 0."""
        ids = (torch.randperm(40, generator=see.generator) + 7).tolist()
        names = ["[CLS]", "[SEP]", "[UNK]", "[MASK]", *words, "[PAD]"]
        return {**dict(zip(names, ids, strict=False)), first: 0}

    def encode(a, b, max_length, first="[PAD]"):
        vocab = vocabulary(first)
        out = _called_on_lists(see, "the result", encode_pair, a, b, vocab, max_length)
        lists = all(isinstance(values, list) for values in out.values())
        see.fact("input_ids and token_type_ids are lists", lists)

    def pieces(count, start=0):
        return words[start : start + count]

    with see.probe("a of 4 pieces, no b, max_length 12"):
        encode(pieces(4), None, 12)
    with see.probe("a of 3 pieces, b of 5, max_length 20"):
        encode(pieces(3), pieces(5, 10), 20)
    with see.probe("a of 6 pieces, no b, max_length 8, which is filled"):
        encode(pieces(6), None, 8)
    with see.probe("a of 9 pieces, no b, max_length 6"):
        encode(pieces(9), None, 6)
    with see.probe("a of 4 pieces, b of 3, max_length 10, which is filled"):
        encode(pieces(4), pieces(3, 20), 10)
    with see.probe("a of 9 pieces, b of 3, max_length 11"):
        encode(pieces(9), pieces(3, 11), 11)
    with see.probe("a of 2 pieces, b of 8, max_length 10"):
        encode(pieces(2), pieces(8, 15), 10)
    with see.probe("a of 9 pieces, b of 7, max_length 11"):
        encode(pieces(9), pieces(7, 13), 11)
    with see.probe("a of 5 pieces, b of 12, max_length 9"):
        encode(pieces(5), pieces(12, 14), 9)
    with see.probe("a of 6 pieces, b of 6, max_length 13"):
        encode(pieces(6), pieces(6, 8), 13)
    with see.probe("pieces that the vocabulary lacks, in both lists"):
        encode(["w3", "neu", "w1", "W8"], ["##x", "w9", "##w4", "w2", "##y"], 16)
    with see.probe("pieces that stand in both lists, and twice in one"):
        encode(["w3", "w1", "w3", "w4", "w5"], ["w1", "w3", "w1", "w6"], 9)
    with see.probe("b an empty list"):
        encode(pieces(2, 5), [], 7)
    with see.probe("a an empty list, b of 3 pieces, max_length 9"):
        encode([], pieces(3, 4), 9)
    with see.probe("a an empty list, no b, max_length 5"):
        encode([], None, 5)
    with see.probe("a an empty list, b of 8 pieces, max_length 7"):
        encode([], pieces(8, 4), 7)
    with see.probe("a of 9 pieces, b of 2, max_length 10"):
        encode(pieces(9), pieces(2, 20), 10)
    with see.probe("a piece whose id is 0, in both lists"):
        encode(["w5", "w2", "w7"], ["w2", "neu"], 12, first="w2")
    for n, m, max_length in ((9, 8, 12), (5, 7, 10)):
        with see.probe(f"a of {n} pieces, b of {m}, max_length {max_length}: an odd room"):
            a, b, vocab = pieces(n), pieces(m, 12), vocabulary()
            out = encode_pair(list(a), list(b), dict(vocab), max_length)
            out = {name: list(values) for name, values in out.items()}
            see("the number of ids", len(out["input_ids"]))
            see("the number of types", len(out["token_type_ids"]))
            one, more = (max_length - 3) // 2, (max_length - 2) // 2
            either = [
                reference.encode_pair(a[:i], b[:j], vocab, max_length)
                for i, j in ((one, more), (more, one))
            ]
            kept = f"{more} pieces of one list and {one} of the other, whichever, are kept"
            see.fact(kept, out in either)


def _pair_fitted(a, b, room):
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


def _pair_with(
    fit=_pair_fitted,
    special=lambda alone: 2 if alone else 3,
    types=lambda n, m: [0] * n + [1] * m,
    first=lambda a: ["[CLS]", *a, "[SEP]"],
    second=lambda b: [*b, "[SEP]"],
    none=lambda b: b is None,
    id_of=lambda vocab, piece: vocab.get(piece, vocab["[UNK]"]),
    then=lambda ids, types, max_length, vocab: (ids, types),
):
    """The pair with another way to cut, other special tokens, types or ids."""

    def encode_pair(a, b, tokenizer_vocab, max_length):
        alone = none(b)
        a, b = fit(a, [] if alone else b, max_length - special(alone))
        one, two = first(a), [] if alone else second(b)
        ids = [id_of(tokenizer_vocab, piece) for piece in one + two]
        ids, kinds = then(ids, types(len(one), len(two)), max_length, tokenizer_vocab)
        return {"input_ids": ids, "token_type_ids": kinds}

    return encode_pair


def _pair_overflow_from_longer(a, b, room):
    cut = max(0, len(a) + len(b) - room)
    if len(a) > len(b):
        return a[: max(0, len(a) - cut)], b
    return a, b[: max(0, len(b) - cut)]


def _pair_in_proportion(a, b, room):
    if len(a) + len(b) <= room:
        return a, b
    of_a = round(room * len(a) / (len(a) + len(b)))
    return a[:of_a], b[: room - of_a]


def _pair_from_the_front(a, b, room):
    a, b = _pair_fitted(a[::-1], b[::-1], room)
    return a[::-1], b[::-1]


def _pair_in_place(a, b, room):
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


_BERT_IDS = {"[CLS]": 101, "[SEP]": 102, "[UNK]": 100}
_pair_types_all_zero = _pair_with(types=lambda n, m: [0] * (n + m))
_pair_first_sep_type_1 = _pair_with(
    types=lambda n, m: [0] * (n - 1) + [1] * (m + 1) if m else [0] * n
)
_pair_last_sep_type_0 = _pair_with(types=lambda n, m: [0] * n + ([1] * (m - 1) + [0] if m else []))
_pair_types_from_one = _pair_with(types=lambda n, m: [1] * n + [2] * m)
_pair_types_inverted = _pair_with(types=lambda n, m: [1] * n + [0] * m)
_pair_types_of_pieces = _pair_with(types=lambda n, m: [0] * (n - 2) + [1] * max(0, m - 1))
_pair_second_cls = _pair_with(
    second=lambda b: ["[CLS]", *b, "[SEP]"], special=lambda alone: 2 if alone else 4
)
_pair_specials_twice = _pair_with(
    then=lambda ids, types, _, vocab: (
        [vocab["[CLS]"], *ids, vocab["[SEP]"]],
        [0, *types, types[-1]],
    )
)
_pair_no_sep_between = _pair_with(
    first=lambda a: ["[CLS]", *a], special=lambda alone: 1 if alone else 2
)
_pair_no_sep_at_the_end = _pair_with(second=list, special=lambda alone: 2)
_pair_no_cls = _pair_with(first=lambda a: [*a, "[SEP]"], special=lambda alone: 1 if alone else 2)
_pair_two_seps_alone = _pair_with(
    none=lambda b: False, fit=lambda a, b, room: _pair_fitted(a, b or [], room)
)
_pair_empty_is_none = _pair_with(none=lambda b: not b)
_pair_uncut = _pair_with(fit=lambda a, b, room: (a, b))
_pair_ids_cut = _pair_with(
    fit=lambda a, b, room: (a, b), then=lambda ids, types, n, vocab: (ids[:n], types[:n])
)
_pair_specials_not_counted = _pair_with(special=lambda alone: 0)
_pair_three_specials_always = _pair_with(special=lambda alone: 3)
_pair_two_specials_always = _pair_with(special=lambda alone: 2)
_pair_first_cut = _pair_with(fit=lambda a, b, room: (a[: max(0, room - len(b))], b))
_pair_second_cut = _pair_with(fit=lambda a, b, room: (a[:room], b[: max(0, room - len(a))]))
_pair_halves = _pair_with(fit=lambda a, b, room: (a[: room // 2 if b else room], b[: room // 2]))
_pair_shorter_cut = _pair_with(fit=lambda a, b, room: _pair_of_shorter(list(a), list(b), room))
_pair_all_from_longer = _pair_with(fit=_pair_overflow_from_longer)
_pair_proportional = _pair_with(fit=_pair_in_proportion)
_pair_fronts_cut = _pair_with(fit=_pair_from_the_front)
_pair_lists_changed = _pair_with(fit=_pair_in_place)
_pair_strict_vocab = _pair_with(id_of=lambda vocab, piece: vocab[piece])
_pair_unknown_zero = _pair_with(id_of=lambda vocab, piece: vocab.get(piece, 0))
_pair_unknown_none = _pair_with(id_of=lambda vocab, piece: vocab.get(piece))
_pair_get_or = _pair_with(id_of=lambda vocab, piece: vocab.get(piece) or vocab["[UNK]"])
_pair_odd_piece = _pair_with(fit=lambda a, b, room: _pair_odd_wasted(a, b, room))
_pair_even_room = _pair_with(fit=lambda a, b, room: _pair_half_at_least(a, b, room))
_pair_unknown_100 = _pair_with(id_of=lambda vocab, piece: vocab.get(piece, 100))
_pair_bert_ids = _pair_with(
    id_of=lambda vocab, piece: _BERT_IDS.get(piece, vocab.get(piece, _BERT_IDS["[UNK]"]))
)
_pair_pieces = _pair_with(id_of=lambda vocab, piece: piece if piece in vocab else "[UNK]")
_pair_padded = _pair_with(
    then=lambda ids, types, n, vocab: (
        ids + [vocab["[PAD]"]] * (n - len(ids)),
        types + [0] * (n - len(types)),
    )
)


def _pair_odd_wasted(a, b, room):
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        if len(a) == len(b):
            a.pop()
            b.pop()
        else:
            (a if len(a) > len(b) else b).pop()
    return a, b


def _pair_half_at_least(a, b, room):
    """2 times half of the room, which is one less where it is odd."""
    half = room // 2
    if len(a) + len(b) <= room:
        return a, b
    if min(len(a), len(b)) >= half:
        return a[:half], b[:half]
    return (a, b[: 2 * half - len(a)]) if len(a) < half else (a[: 2 * half - len(b)], b)


def _pair_of_shorter(a, b, room):
    while len(a) + len(b) > room:
        shorter = a if a and (len(a) < len(b) or not b) else b
        shorter.pop()
    return a, b


def _pair_unknown_dropped(a, b, tokenizer_vocab, max_length):
    a = [piece for piece in a if piece in tokenizer_vocab]
    b = b and [piece for piece in b if piece in tokenizer_vocab]
    return reference.encode_pair(a, b, tokenizer_vocab, max_length)


def _pair_ids_alone(a, b, tokenizer_vocab, max_length):
    return reference.encode_pair(a, b, tokenizer_vocab, max_length)["input_ids"]


def _pair_as_tuple(a, b, tokenizer_vocab, max_length):
    return tuple(reference.encode_pair(a, b, tokenizer_vocab, max_length).values())


def _pair_of_tuples(a, b, tokenizer_vocab, max_length):
    encoded = reference.encode_pair(a, b, tokenizer_vocab, max_length)
    return {name: tuple(values) for name, values in encoded.items()}


def _pair_empty_a_left_out(a, b, tokenizer_vocab, max_length):
    encoded = reference.encode_pair(a, b, tokenizer_vocab, max_length)
    if not a:
        encoded = {name: values[:1] + values[2:] for name, values in encoded.items()}
    return encoded


def _pair_with_mask(a, b, tokenizer_vocab, max_length):
    encoded = reference.encode_pair(a, b, tokenizer_vocab, max_length)
    return {**encoded, "attention_mask": [1] * len(encoded["input_ids"])}


def _pair_as_tensors(a, b, tokenizer_vocab, max_length):
    encoded = reference.encode_pair(a, b, tokenizer_vocab, max_length)
    return {name: torch.tensor(values) for name, values in encoded.items()}


def _pair_by_arithmetic(a, b, tokenizer_vocab, max_length, unk="[UNK]"):
    second = [] if b is None else b
    room = max_length - 2 - (b is not None)
    if len(a) + len(second) > room:
        of_a = min(len(a), max(room - len(second), (room + 1) // 2))
        a, second = a[:of_a], second[: room - of_a]
    tokens = ["[CLS]"] + a + ["[SEP]"] + (second + ["[SEP]"] if b is not None else [])
    ids = [tokenizer_vocab[t if t in tokenizer_vocab else unk] for t in tokens]
    boundary = len(a) + 2
    kinds = [int(i >= boundary) for i in range(len(ids))]
    return {"input_ids": ids, "token_type_ids": kinds}


def _pair_by_segments(a, b, tokenizer_vocab, max_length):
    segments = [a[:]] if b is None else [a[:], b[:]]
    while sum(map(len, segments)) + len(segments) + 1 > max_length:
        del max(segments, key=len)[-1]
    ids, types = [tokenizer_vocab["[CLS]"]], [0]
    for kind, segment in enumerate(segments):
        for piece in itertools.chain(segment, ["[SEP]"]):
            ids.append(tokenizer_vocab.get(piece, tokenizer_vocab["[UNK]"]))
            types.append(kind)
    return {"token_type_ids": types, "input_ids": ids}


def _pair_by_numpy(a, b, tokenizer_vocab, max_length):
    lengths = np.array([len(a), 0 if b is None else len(b)])
    while lengths.sum() > max_length - (2 if b is None else 3):
        lengths[lengths.argmax()] -= 1
    tokens = ["[CLS]", *a[: lengths[0]], "[SEP]"]
    tokens += [] if b is None else [*b[: lengths[1]], "[SEP]"]
    types = np.zeros(len(tokens), dtype=int)
    types[lengths[0] + 2 :] = 1
    ids = [tokenizer_vocab.get(t, tokenizer_vocab.get("[UNK]")) for t in tokens]
    return {"input_ids": ids, "token_type_ids": list(types)}


ENCODE_PAIR = Exercise(
    slug="encode_pair",
    chapter=4,
    title="Two texts as BERT reads them",
    minutes=15,
    difficulty=2,
    reference=reference.encode_pair,
    observe=_observe_encode_pair,
    misconceptions=(
        Misconception(
            "types_all_zero",  # museum 4.6, C14
            _pair_types_all_zero,
            "All your token types are 0. BERT adds another vector to the tokens of the second "
            "text; without it the encoder is told that both are one.",
        ),
        Misconception(
            "first_sep_in_the_second_text",
            _pair_first_sep_type_1,
            "Your first [SEP] has type 1. It ends the first text and belongs to it: type 0 as far "
            "as the first [SEP], which is included.",
        ),
        Misconception(
            "last_sep_in_the_first_text",
            _pair_last_sep_type_0,
            "Your last [SEP] has type 0. It ends the second text and belongs to it: everything "
            "after the first [SEP] has type 1.",
        ),
        Misconception(
            "types_from_one",
            _pair_types_from_one,
            "Your types are 1 and 2. They number the rows of an embedding with two rows, 0 and "
            "1: a 2 is out of its range.",
        ),
        Misconception(
            "types_inverted",
            _pair_types_inverted,
            "Your types are the wrong way round: the first text has type 0, the second type 1. A "
            "text without a second one is a first text.",
        ),
        Misconception(
            "types_without_the_special_tokens",
            _pair_types_of_pieces,
            "You give types to the pieces and none to [CLS] and [SEP], so the two lists differ "
            "in length. Each id has a type.",
        ),
        Misconception(
            "second_cls",  # museum 4.7
            _pair_second_cls,
            "You put a [CLS] before the second text too. There is one, at the very beginning, "
            "whose vector stands for the whole; [SEP] alone parts the texts.",
        ),
        Misconception(
            "specials_added_twice",  # museum 4.7
            _pair_specials_twice,
            "Your ids begin with two [CLS] and end with two [SEP]: the special tokens are added "
            "twice. A tokenizer that adds them already must not get a text that has them.",
        ),
        Misconception(
            "no_sep_between",
            _pair_no_sep_between,
            "There is no [SEP] after the first text. It shows where the first one ends, also where "
            "there is no second.",
        ),
        Misconception(
            "no_sep_at_the_end",
            _pair_no_sep_at_the_end,
            "There is no [SEP] after the second text. Each text has one at its end, the second "
            "too.",
        ),
        Misconception(
            "no_cls",  # museum C14
            _pair_no_cls,
            "There is no [CLS] at the beginning. BERT was pretrained with it, and a classifier "
            "reads the vector that stands there.",
        ),
        Misconception(
            "two_seps_without_a_second_text",
            _pair_two_seps_alone,
            "Where b is None you add a second [SEP] all the same, as if there were an empty second "
            "text. One text is [CLS] a [SEP].",
        ),
        Misconception(
            "empty_text_taken_for_none",
            _pair_empty_is_none,
            "You take an empty second text for none, as `if b` does. An empty list is a text "
            "without pieces: its [SEP] is there; ask whether b is None.",
        ),
        Misconception(
            "empty_first_text_without_sep",
            _pair_empty_a_left_out,
            "Where the first text is empty you leave out its [SEP]. An empty list is a text "
            "without pieces: [CLS] and [SEP] are there all the same.",
        ),
        Misconception(
            "never_cut",  # museum 4.22
            _pair_uncut,
            "You cut nothing, whatever max_length says. BERT has a vector for each of its 512 "
            "places and none for more: a longer text ends in an error.",
        ),
        Misconception(
            "last_sep_cut_off",
            _pair_ids_cut,
            "You build the whole and cut its end off, and with it the last [SEP], or most of the "
            "second text. Make room among the pieces first, then add the special tokens.",
        ),
        Misconception(
            "specials_not_counted",
            _pair_specials_not_counted,
            "The pieces alone fill max_length, and the special tokens come on top. All ids count: "
            "take off two for one text and three for a pair before you cut.",
        ),
        Misconception(
            "room_for_three_always",
            _pair_three_specials_always,
            "You keep room for three special tokens also where there is one text, which has two "
            "of them. A text that fits is cut by a piece.",
        ),
        Misconception(
            "room_for_two_always",
            _pair_two_specials_always,
            "You keep room for two special tokens also where there are two texts, which have "
            "three of them. The result is one longer than max_length.",
        ),
        Misconception(
            "first_text_alone_cut",
            _pair_first_cut,
            "You cut the first text and leave the second whole. Pieces go from the longer one, "
            "whichever that is, so that both keep as much as they can.",
        ),
        Misconception(
            "second_text_alone_cut",
            _pair_second_cut,
            "You cut the second text and leave the first whole. Pieces go from the longer one, "
            "whichever that is, so that both keep as much as they can.",
        ),
        Misconception(
            "half_for_each",
            _pair_halves,
            "You give each text half of the room, also where one of them needs less. A short one "
            "stays whole; the longer one has all that is left.",
        ),
        Misconception(
            "shorter_text_cut",
            _pair_shorter_cut,
            "You drop pieces from the shorter list. They go from the longer one, which has more "
            "to spare.",
        ),
        Misconception(
            "all_from_the_longer",
            _pair_all_from_longer,
            "You take all that is too much from the list that was longer at first, even where it "
            "becomes the shorter one. Drop one piece at a time, and compare the two again.",
        ),
        Misconception(
            "odd_piece_dropped",
            _pair_odd_piece,
            "Where both lists are as long you drop a piece from each. If one piece was too much, "
            "a place stays empty: drop one at a time, and stop as soon as the rest fits.",
        ),
        Misconception(
            "room_made_even",
            _pair_even_room,
            "You compute with half of the room, rounded down, and twice that. Where the room is "
            "odd, a place stays empty; the longer list keeps one piece more.",
        ),
        Misconception(
            "in_proportion",
            _pair_proportional,
            "You cut both texts in proportion to their lengths. A piece is dropped from the longer "
            "one as long as it is longer: the shorter one stays whole until both are as long.",
        ),
        Misconception(
            "beginnings_cut",
            _pair_fronts_cut,
            "You drop pieces from the beginning of a text. They go from its end.",
        ),
        Misconception(
            "lists_changed",
            _pair_lists_changed,
            "You cut the caller's own lists: after the call a and b are shorter than before. Drop "
            "pieces from copies.",
        ),
        Misconception(
            "unknown_piece_an_error",
            _pair_strict_vocab,
            "A piece that the vocabulary lacks ends in a KeyError. It gets the id of [UNK].",
        ),
        Misconception(
            "unknown_piece_is_0",
            _pair_unknown_zero,
            "A piece that the vocabulary lacks gets the id 0, which belongs to [PAD]. It is [UNK], "
            "whose id is in the vocabulary.",
        ),
        Misconception(
            "id_0_taken_for_none",
            _pair_get_or,
            "A piece that has the id 0 becomes [UNK], because 0 counts as false for `or` and `if`. "
            "Ask whether the vocabulary has the piece, not whether its id is true.",
        ),
        Misconception(
            "unknown_piece_is_100",
            _pair_unknown_100,
            "A piece that the vocabulary lacks gets the id 100. That is [UNK] in one vocabulary, "
            "in another it is something else: look it up.",
        ),
        Misconception(
            "unknown_piece_has_no_id",
            _pair_unknown_none,
            "A piece that the vocabulary lacks gets None for its id. It counts as [UNK] and gets "
            "the id of that.",
        ),
        Misconception(
            "unknown_pieces_dropped",
            _pair_unknown_dropped,
            "You drop pieces that the vocabulary lacks, and the words around them move together. "
            "Each keeps its place as [UNK].",
        ),
        Misconception(
            "ids_by_heart",
            _pair_bert_ids,
            "You use the ids 101 and 102. They are [CLS] and [SEP] in one vocabulary; in another "
            "they are words. Look them up in the vocabulary that is given.",
        ),
        Misconception(
            "pieces_instead_of_ids",
            _pair_pieces,
            "You return the pieces themselves. The encoder reads numbers: look up the id of each, "
            "those of the special tokens too.",
        ),
        Misconception(
            "padded",
            _pair_padded,
            "You fill up to max_length with [PAD]. How much padding is needed depends on the "
            "longest text of a batch, which nobody knows here.",
        ),
        Misconception(
            "ids_alone",
            _pair_ids_alone,
            "You return the ids alone. The types are wanted too: a dict of both lists.",
        ),
        Misconception(
            "tuple_instead_of_dict",
            _pair_as_tuple,
            "You return the two lists one behind the other. A dict with their names is wanted, "
            "which the encoder can be called with.",
        ),
        Misconception(
            "tuples_instead_of_lists",
            _pair_of_tuples,
            "You return the right numbers in tuples. Lists are asked for: a tuple is never equal "
            "to a list, whatever they hold.",
        ),
        Misconception(
            "with_an_attention_mask",
            _pair_with_mask,
            "You return an attention mask as well. It says what is padding, and there is none "
            "before the batch is put together; return the two lists alone.",
        ),
        Misconception(
            "tensors_instead_of_lists",
            _pair_as_tensors,
            "You return tensors. Examples of unequal length wait in lists until they are padded; "
            "only the batch is a tensor.",
        ),
    ),
    alternatives=(_pair_by_arithmetic, _pair_by_segments, _pair_by_numpy),
    hints=(
        "Three steps, in this order: drop pieces until the rest fits, put the special tokens "
        "around, look up the ids. How many places do the special tokens need?",
        "A `while` loop compares the two lengths anew for each piece that it drops, from copies "
        "of the lists. Where b is None, only a can be cut.",
        "`longer = a if b is None or len(a) > len(b) else b`, then `longer.pop()`. Build `[CLS] a "
        "[SEP]` and `b [SEP]` as two lists: their lengths are the numbers of zeros and ones. "
        "`vocab.get(piece, vocab['[UNK]'])` is the id.",
    ),
)


# --- collate ------------------------------------------------------------------------------------


def _observe_collate(collate, see):
    def as_dict(batch, pad_id):
        out = collate(batch, pad_id)
        return dict(out) if isinstance(out, Mapping) else out  # Hugging Face's BatchEncoding is one

    def run(batch, pad_id):
        order, kept = list(batch), copy.deepcopy(batch)
        see.call("the result", as_dict, batch, pad_id)
        see.fact("the examples, one by one: the inputs are left unmodified", order == kept)
        same = len(batch) == len(order) and all(map(operator.is_, batch, order))
        see.fact("the list of examples, in its order: the inputs are left unmodified", same)

    def example(length, first, label, low=10):
        """`first` tokens of type 0, the others of type 1."""
        ids = see.randint(low, 90, length).tolist()
        types = [0] * first + [1] * (length - first)
        return {"input_ids": ids, "token_type_ids": types, "label": label}

    with see.probe("three examples of 4, 7 and 2 tokens, pad_id 0"):
        batch = [example(4, 4, 1), example(7, 7, 0), example(2, 2, 1)]
        run(batch, 0)
    with see.probe("four pairs of 9, 3, 5 and 8 tokens, pad_id 5"):
        batch = [example(9, 4, 2), example(3, 2, 0), example(5, 3, 3), example(8, 2, 1)]
        run(batch, 5)
    with see.probe("one example of 6 tokens, pad_id 3"):
        run([example(6, 2, 4)], 3)
    with see.probe("two examples of 5 tokens, pad_id 0"):
        run([example(5, 3, 0), example(5, 5, 0)], 0)
    with see.probe("a token inside an example has the id of the padding, 7, another the id 0"):
        batch = [example(6, 6, 1), example(4, 1, 2), example(3, 3, 5)]
        batch[0]["input_ids"][2] = batch[1]["input_ids"][3] = batch[1]["input_ids"][0] = 7
        batch[2]["input_ids"][1] = 0
        run(batch, 7)
    with see.probe("one token in each of two examples"):
        run([example(1, 1, 0), example(1, 0, 6)], 1)
    with see.probe("fifty examples of up to 50 tokens, pad_id 2"):
        batch = [example(1 + 13 * i % 50, i % 2, i % 3) for i in range(50)]
        run(batch, 2)


def _collate_with(
    width=lambda rows, ids: max(len(row) for row in rows),
    ids_with=lambda pad_id: pad_id,
    types_with=lambda pad_id, row: 0,
    mask_of=lambda row, pad_id: [1] * len(row),
    mask_with=0,
    left=False,
    labels=lambda batch: torch.tensor([example["label"] for example in batch]),
    then=lambda tensors: tensors,
):
    """Padding to another width, with other values, on the other side; other labels or masks."""

    def collate(batch, pad_id):
        def padded(rows, value):
            n, out = width(rows, batch), []
            for row in rows:
                fill = [value(row)] * (n - len(row))
                out.append((fill + row if left else row + fill)[:n])
            return torch.tensor(out)

        ids = [list(example["input_ids"]) for example in batch]
        types = [list(example["token_type_ids"]) for example in batch]
        return then(
            {
                "input_ids": padded(ids, lambda row: ids_with(pad_id)),
                "token_type_ids": padded(types, lambda row: types_with(pad_id, row)),
                "attention_mask": padded(
                    [mask_of(row, pad_id) for row in ids], lambda r: mask_with
                ),
                "labels": labels(batch),
            }
        )

    return collate


def _collated(change):
    """The right tensors, and then one change."""

    def collate(batch, pad_id):
        tensors = reference.collate(batch, pad_id)
        tensors.update(change(tensors))
        return {name: values for name, values in tensors.items() if values is not None}

    return collate


_collate_512 = _collate_with(width=lambda rows, ids: 512)
_collate_shortest = _collate_with(width=lambda rows, ids: min(len(row) for row in rows))
_collate_first = _collate_with(width=lambda rows, ids: len(rows[0]))
_collate_one_more = _collate_with(width=lambda rows, ids: 1 + max(len(row) for row in rows))
_collate_by_batch = _collate_with(width=lambda rows, ids: len(rows))
_collate_eights = _collate_with(
    width=lambda rows, ids: 8 * math.ceil(max(len(row) for row in rows) / 8)
)
_collate_unpadded = _collate_with(width=lambda rows, ids: 0)
_collate_left = _collate_with(left=True)
_collate_zeros = _collate_with(ids_with=lambda pad_id: 0)
_collate_types_padded_like_ids = _collate_with(types_with=lambda pad_id, row: pad_id)
_collate_types_one = _collate_with(types_with=lambda pad_id, row: 1)
_collate_types_go_on = _collate_with(types_with=lambda pad_id, row: row[-1])
_collate_mask_inverted = _collate_with(mask_of=lambda row, _: [0] * len(row), mask_with=1)
_collate_mask_ones = _collate_with(mask_with=1)
_collate_mask_by_pad = _collate_with(mask_of=lambda row, pad_id: [int(i != pad_id) for i in row])
_collate_mask_by_zero = _collate_with(mask_of=lambda row, _: [int(i != 0) for i in row])
_collate_mask_bool = _collated(lambda t: {"attention_mask": t["attention_mask"].bool()})
_collate_mask_float = _collated(lambda t: {"attention_mask": t["attention_mask"].float()})
_collate_mask_additive = _collated(
    lambda t: {
        "attention_mask": torch.zeros(t["input_ids"].shape).masked_fill_(
            t["attention_mask"] == 0, -math.inf
        )
    }
)
_collate_no_mask = _collated(lambda t: {"attention_mask": None})
_collate_no_types = _collated(lambda t: {"token_type_ids": None})
_collate_types_dropped = _collated(lambda t: {"token_type_ids": 0 * t["token_type_ids"]})
_collate_label = _collated(lambda t: {"label": t["labels"], "labels": None})
_collate_labels_float = _collated(lambda t: {"labels": t["labels"].float()})
_collate_labels_column = _collated(lambda t: {"labels": t["labels"][:, None]})
_collate_labels_list = _collated(lambda t: {"labels": t["labels"].tolist()})
_collate_ids_float = _collated(lambda t: {"input_ids": t["input_ids"].float()})
_collate_int32 = _collated(lambda t: {name: values.int() for name, values in t.items()})
_collate_lists = _collated(lambda t: {name: values.tolist() for name, values in t.items()})
_collate_transposed = _collated(
    lambda t: {name: values.T for name, values in t.items() if name != "labels"}
)
_collate_squeezed = _collated(lambda t: {name: values.squeeze(0) for name, values in t.items()})


def _collate_sorted(batch, pad_id):
    return reference.collate(sorted(batch, key=lambda e: -len(e["input_ids"])), pad_id)


def _collate_sorted_upwards(batch, pad_id):
    return reference.collate(sorted(batch, key=lambda e: len(e["input_ids"])), pad_id)


def _collate_sorting_the_batch(downwards, first=True):
    """`batch.sort(…)`, before the tensors are made or after it."""

    def collate(batch, pad_id):
        given = list(batch)
        batch.sort(key=lambda e: len(e["input_ids"]), reverse=downwards)
        return reference.collate(batch if first else given, pad_id)

    return collate


_collate_batch_sorted = _collate_sorting_the_batch(downwards=True)
_collate_batch_sorted_upwards = _collate_sorting_the_batch(downwards=False)
_collate_batch_sorted_afterwards = _collate_sorting_the_batch(downwards=False, first=False)


def _collate_in_place(batch, pad_id):
    longest = max(len(example["input_ids"]) for example in batch)
    masks = []
    for example in batch:
        fill = longest - len(example["input_ids"])
        masks.append([1] * (longest - fill) + [0] * fill)
        example["input_ids"] += [pad_id] * fill
        example["token_type_ids"] += [0] * fill
    return {**reference.collate(batch, pad_id), "attention_mask": torch.tensor(masks)}


def _collate_first_alone(batch, pad_id):
    tensors = reference.collate(batch, pad_id)
    return {name: values[:1] for name, values in tensors.items()}


def _collate_by_pad_sequence(batch, pad_id, padding_side="right"):
    def padded(rows, value):
        rows = [torch.as_tensor(row) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = [example["input_ids"] for example in batch]
    return {
        "labels": torch.LongTensor([example["label"] for example in batch]),
        "attention_mask": padded([torch.ones(len(row), dtype=torch.long) for row in ids], 0),
        "input_ids": padded(ids, pad_id),
        "token_type_ids": padded([example["token_type_ids"] for example in batch], 0),
    }


def _collate_into_full(batch, pad_id):
    lengths = torch.tensor([len(example["input_ids"]) for example in batch])
    shape = len(batch), int(lengths.max())
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    types = torch.zeros(shape, dtype=torch.int64)
    for i, example in enumerate(batch):
        ids[i, : lengths[i]] = torch.tensor(example["input_ids"])
        types[i, : lengths[i]] = torch.tensor(example["token_type_ids"])
    mask = (torch.arange(shape[1])[None, :] < lengths[:, None]).to(torch.int64)
    labels = torch.stack([torch.tensor(example["label"]) for example in batch])
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": labels}


def _collate_by_zip_longest(batch, pad_id):
    def columns(rows, value):
        return torch.tensor(list(zip(*itertools.zip_longest(*rows, fillvalue=value), strict=True)))

    ids = [e["input_ids"] for e in batch]
    return OrderedDict(
        input_ids=columns(ids, pad_id),
        token_type_ids=columns([e["token_type_ids"] for e in batch], 0),
        attention_mask=columns([[1 for _ in row] for row in ids], 0),
        labels=torch.from_numpy(np.array([e["label"] for e in batch], dtype=np.int64)),
    )


def _collate_user_dict(batch, pad_id):
    return UserDict(reference.collate(batch, pad_id))


def _collate_by_f_pad(batch, pad_id):
    longest = max(map(len, (example["input_ids"] for example in batch)))
    out = {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    for example in batch:
        missing = (0, longest - len(example["input_ids"]))
        ids = torch.tensor(example["input_ids"])
        out["input_ids"].append(F.pad(ids, missing, value=pad_id))
        out["token_type_ids"].append(F.pad(torch.tensor(example["token_type_ids"]), missing))
        out["attention_mask"].append(F.pad(torch.ones_like(ids), missing))
    return {name: torch.stack(rows) for name, rows in out.items()} | {
        "labels": torch.tensor([example["label"] for example in batch])
    }


COLLATE = Exercise(
    slug="collate",
    chapter=4,
    title="A batch of texts of unequal length",
    minutes=12,
    difficulty=2,
    reference=reference.collate,
    observe=_observe_collate,
    misconceptions=(
        Misconception(
            "padded_to_512",  # museum F15, 4.22
            _collate_512,
            "You pad every batch to 512. Most of what the encoder then computes is padding; the "
            "longest example of the batch is far enough.",
        ),
        Misconception(
            "cut_to_the_shortest",
            _collate_shortest,
            "You cut all examples to the length of the shortest. That makes a rectangle by "
            "throwing text away; pad the short ones instead.",
        ),
        Misconception(
            "width_of_the_first",
            _collate_first,
            "You take the length of the first example for the width of the batch. A longer one "
            "behind it is cut off.",
        ),
        Misconception(
            "one_column_too_many",
            _collate_one_more,
            "Your batch has one column more than its longest example has tokens. That column is "
            "padding in every row.",
        ),
        Misconception(
            "width_of_the_batch",
            _collate_by_batch,
            "You take the number of examples for the number of columns. The width is that of the "
            "longest example.",
        ),
        Misconception(
            "multiple_of_eight",
            _collate_eights,
            "You pad to a multiple of eight. Some graphics cards compute faster so; what is asked "
            "here ends with the longest example.",
        ),
        Misconception(
            "nothing_left",
            _collate_unpadded,
            "Your rows are empty: the width that you cut to is 0. It is the length of the longest "
            "example.",
        ),
        Misconception(
            "left_padding",  # museum 4.5
            _collate_left,
            "You put the padding in front. BERT numbers the places from the left, so that every "
            "token gets another position vector, and [CLS] no longer stands at place 0.",
        ),
        Misconception(
            "padded_with_0",
            _collate_zeros,
            "You pad the ids with 0, whatever pad_id says. In this vocabulary 0 may be a word; use "
            "the id that is given.",
        ),
        Misconception(
            "types_padded_like_ids",
            _collate_types_padded_like_ids,
            "You pad the types with pad_id. Types are 0 or 1, and an embedding with two rows has "
            "none for another number: padding has type 0.",
        ),
        Misconception(
            "padding_in_the_second_text",
            _collate_types_one,
            "You give the padding type 1, as if it belonged to the second text. It has type 0.",
        ),
        Misconception(
            "types_go_on_into_the_padding",
            _collate_types_go_on,
            "Your padding goes on with the type of the last token. It has type 0, also after a "
            "pair.",
        ),
        Misconception(
            "types_all_zero",  # museum 4.6
            _collate_types_dropped,
            "Your types are all 0, also in pairs. The examples say which tokens belong to the "
            "second text; take their types over.",
        ),
        Misconception(
            "types_left_out",  # museum 4.6
            _collate_no_types,
            "You leave the types out. The encoder then takes all tokens for one text, also in "
            "pairs, without any error.",
        ),
        Misconception(
            "mask_inverted",  # museum 4.1
            _collate_mask_inverted,
            "Your mask is 1 at the padding. In this library 1 means a real token, the one that "
            "may be looked at.",
        ),
        Misconception(
            "mask_all_ones",  # museum F12, 4.1
            _collate_mask_ones,
            "Your mask is 1 everywhere, so padding is read like text. It is 0 behind the end of "
            "each example.",
        ),
        Misconception(
            "mask_by_pad_id",
            _collate_mask_by_pad,
            "You hide every token whose id is pad_id, also inside an example. Some vocabularies "
            "pad with a token that texts contain, such as the end of a text: it is the length "
            "that says where the padding begins.",
        ),
        Misconception(
            "mask_by_zero",
            _collate_mask_by_zero,
            "You hide the tokens whose id is 0 inside the examples, whatever pad_id is. The length "
            "of an example says where its padding begins.",
        ),
        Misconception(
            "mask_bool",
            _collate_mask_bool,
            "Your mask is boolean. It means the same, and what is asked for is Hugging Face's "
            "form: int64, 1 and 0.",
        ),
        Misconception(
            "mask_float",
            _collate_mask_float,
            "Your mask holds floats. Some functions take a float mask for something to add to "
            "the scores, and then 0 and 1 hide nothing; make it int64.",
        ),
        Misconception(
            "mask_to_be_added",
            _collate_mask_additive,
            "Your mask is 0 and −∞, the form that is added to scores. Hugging Face's models make "
            "that themselves, out of 1 at real tokens and 0 at padding.",
        ),
        Misconception(
            "mask_left_out",  # museum F12
            _collate_no_mask,
            "You leave the attention mask out. The encoder then reads the padding like text, and "
            "an example's result depends on its neighbours.",
        ),
        Misconception(
            "label_instead_of_labels",  # museum F16
            _collate_label,
            "Your key is `label`. The examples call it so and the models `labels`: under another "
            "name no loss is computed, and nothing says so.",
        ),
        Misconception(
            "labels_float",  # museum 4.9
            _collate_labels_float,
            "Your labels are floats. Cross-entropy wants the numbers of classes, int64.",
        ),
        Misconception(
            "labels_in_a_column",
            _collate_labels_column,
            "Your labels are (batch, 1). One number for each example, (batch,), is what "
            "cross-entropy takes.",
        ),
        Misconception(
            "labels_in_a_list",
            _collate_labels_list,
            "Your labels are a list. All four entries are tensors, so that the batch can be moved "
            "to a device as a whole.",
        ),
        Misconception(
            "ids_float",
            _collate_ids_float,
            "Your ids are floats. An embedding looks rows up by integers, int64; `torch.zeros` and "
            "`torch.ones` make floats unless they are told.",
        ),
        Misconception(
            "int32",
            _collate_int32,
            "Your tensors are int32. int64 is asked for, which is also what torch makes of a list "
            "of integers by itself.",
        ),
        Misconception(
            "lists_instead_of_tensors",
            _collate_lists,
            "You return lists of equal length. The encoder takes tensors.",
        ),
        Misconception(
            "transposed",
            _collate_transposed,
            "Your tensors are (longest, batch), as `pad_sequence` makes them unless it is told "
            "otherwise. The batch is the first axis.",
        ),
        Misconception(
            "batch_of_one_squeezed",  # museum F18
            _collate_squeezed,
            "A batch of one example loses its first axis. Its tensors are (1, longest): the "
            "encoder expects a batch, however small.",
        ),
        Misconception(
            "sorted_by_length",
            _collate_sorted,
            "You sort the examples by length. Row i is no longer example i, which whoever made the "
            "batch relies on.",
        ),
        Misconception(
            "sorted_by_length_upwards",
            _collate_sorted_upwards,
            "You sort the examples by length, the shortest first. Row i is no longer example i, "
            "which whoever made the batch relies on.",
        ),
        Misconception(
            "batch_sorted",
            _collate_batch_sorted,
            "You sort the caller's own batch, the longest first. Row i is no longer the example "
            "that stood at place i, and whoever made the batch finds it in another order.",
        ),
        Misconception(
            "batch_sorted_upwards",
            _collate_batch_sorted_upwards,
            "You sort the caller's own batch, the shortest first. Row i is no longer the example "
            "that stood at place i, and whoever made the batch finds it in another order.",
        ),
        Misconception(
            "batch_sorted_afterwards",
            _collate_batch_sorted_afterwards,
            "Your tensors are right, and you sort the caller's own batch: whoever made it finds "
            "its examples in another order.",
        ),
        Misconception(
            "first_example_alone",
            _collate_first_alone,
            "You return the first example alone. Every example of the batch is a row.",
        ),
        Misconception(
            "examples_changed",
            _collate_in_place,
            "You pad the examples themselves. The next time they come in another batch they are "
            "longer, and their padding counts as text; pad copies.",
        ),
    ),
    alternatives=(
        _collate_by_pad_sequence,
        _collate_into_full,
        _collate_by_zip_longest,
        _collate_user_dict,
        _collate_by_f_pad,
    ),
    hints=(
        "How long is the longest example, and how many places does each of the others lack? All "
        "three tensors are padded to the same length, each with another value.",
        "`row + [value] * (longest - len(row))` makes a new, longer list and leaves the old one "
        "as it is. The mask of an example is as many ones as it has tokens, padded with 0.",
        "Write one inner function `padded(rows, value)` that returns a tensor, and call it three "
        "times: with pad_id for the ids, 0 for the types, 0 for lists of ones. The labels need no "
        "padding: a tensor of one number for each example.",
    ),
)


# --- mask_tokens --------------------------------------------------------------------------------


def _likely(count, n, probability):
    """Whether `count` of `n` trials, numbers or tensors, lies within 5 standard deviations."""
    deviation = torch.as_tensor(count, dtype=torch.float64) - probability * torch.as_tensor(n)
    spread = (torch.as_tensor(n) * probability * (1 - probability)) ** 0.5
    return bool((deviation.abs() <= 5 * spread + 2).all())


def _between(count, n, low, high):
    """Whether `count` of `n` trials is likely for some probability from `low` to `high`."""
    return _likely(count, n, min(max(count / n, low), high))


def _share(count, n, p):
    """How a share compares with p, in words that do not hang on what was drawn."""
    if _likely(count, n, p):
        return f"about {100 * p:.0f} %"
    ratio = float(count / (n * p))
    words = ("next to none", "less than a third of that", "too few", "too many")
    for bound, word in zip((0.05, 1 / 3, 1, 3), words, strict=True):
        if ratio < bound:
            return word
    return "more than three times that"


def _spread(counts, n, p):
    """How far counts lie from n * p, compared with independent draws, for which the ratio is 1."""
    n = torch.as_tensor(n, dtype=torch.float64).clamp(min=1)
    ratio = ((counts - n * p) ** 2 / (n * p * (1 - p))).mean()
    return "hardly at all" if ratio < 0.25 else "by more than one or two"


def _observe_mask_tokens(mask_tokens, see):
    MASK = 4

    def text(rows, columns, kinds, vocab_size, special):
        """[CLS] … [SEP] … [SEP] [PAD] … of `kinds` ids, which leave out the last of the vocabulary.

        Of the special ids the first is [SEP], the second [PAD], the third [CLS], then [UNK].
        """
        words = torch.tensor([i for i in range(vocab_size) if i not in (*special, MASK)])
        words = words[torch.arange(kinds) * int(0.6 * len(words)) // kinds]
        ids = words[see.randint(0, kinds, rows, columns)]
        ids[see.rand(rows, columns) < 0.04] = special[3]
        ids[:, 0], ids[:, -1] = special[2], special[0]
        ids[torch.arange(rows), see.randint(2, columns - 2, rows)] = special[0]  # inside the row
        ids[0, 1] = special[3]
        ids[rows // 2 :, -max(1, columns // 10) :] = special[1]
        return ids

    def draw(ids, vocab_size, special, mask_id=MASK, seed=5, **probability):
        generator, given = torch.Generator().manual_seed(seed), ids.clone()
        special = list(special)
        inputs, labels = mask_tokens(given, special, mask_id, vocab_size, generator, **probability)
        return inputs, labels, torch.equal(ids, given)

    def follows(inputs, labels, ids, special, vocab_size, mask_id=MASK):
        see("inputs (shape and dtype alone)", torch.zeros_like(inputs))
        see("labels (shape and dtype alone)", torch.zeros_like(labels))
        chosen = labels != -100
        is_special = torch.isin(ids, torch.tensor(special))
        true, visible = (labels == ids)[chosen].all(), (inputs == ids)[~chosen].all()
        spared = not (chosen & is_special).any()
        see.fact("labels are −100 or the true id", true)
        see.fact("inputs differ from ids only where a label asks", visible)
        see.fact("no special token is chosen", spared)
        see.fact(
            "all inputs are ids below vocab_size", ((inputs >= 0) & (inputs < vocab_size)).all()
        )
        parts = chosen, ~is_special, inputs == mask_id, (inputs != ids) & (inputs != mask_id)
        return parts if true and visible and spared else None  # else shares mean nothing

    def rates(ids, chosen, may_be, masked, other, p, vocab_size):
        what = "the share of the tokens that may be chosen which is chosen"
        see(what, _share(chosen.sum(), may_be.sum(), p))
        n, stays = chosen.sum(), chosen & ~masked & ~other
        random_share = 0.1 * (1 - 2 / vocab_size)  # a random id may be the true one, or [MASK]
        of = "the share of the chosen that"
        see(f"{of} becomes mask_id", _share((masked & chosen).sum(), n, 0.8))
        see(f"{of} becomes another id", _share(other.sum(), n, random_share))
        see(f"{of} stays", _share(stays.sum(), n, 0.1 + 0.1 / vocab_size))
        share = f"about {100 * p:.0f} % of the tokens that may be chosen are chosen"
        for axis, of in ((0, "column"), (1, "row")):
            see.fact(f"{share}, in each {of} too", _likely(chosen.sum(axis), may_be.sum(axis), p))
        for axis, of in ((0, "column"), (1, "row")):
            here = chosen.sum(axis)
            right = _likely((masked & chosen).sum(axis), here, 0.8)
            right &= _likely(other.sum(axis), here, random_share)
            see.fact(f"the three fates occur in each {of} as often as they should", right)
        kinds = ids[may_be].unique()
        of_kind = (ids == kinds[:, None, None]) & may_be
        right = _likely((of_kind & chosen).sum((1, 2)), of_kind.sum((1, 2)), p)
        see.fact("each id is chosen as often as the others", right)
        right = _likely((of_kind & masked).sum((1, 2)), (of_kind & chosen).sum((1, 2)), 0.8)
        see.fact("each id is masked as often as the others", right)

    def quarters(shape):
        """Where the first, second … quarter of the tokens is, in order of reading."""
        place = torch.arange(math.prod(shape)).view(shape) * 4 // math.prod(shape)
        return [place == k for k in range(4)]

    with see.probe("ids (3, 7), probability 0: nothing is chosen"):
        given, special = [], [11, 0, 40, 5, MASK]
        ids = text(3, 7, 4, 60, special)

        def two_tensors(*args, **kwargs):
            given[:] = [mask_tokens(*args, **kwargs)]
            return isinstance(given[0], (tuple, list)) and len(given[0]) == 2

        generator, arguments = torch.Generator().manual_seed(3), (ids, list(special), MASK, 60)
        two = "two values are returned, inputs and labels"
        if see.call(two, two_tensors, *arguments, generator, probability=0.0):
            see("the inputs", given[0][0])
            see("the labels", given[0][1])
        same = arguments[1] == special
        see.fact("special_ids is left as it was: the inputs are left unmodified", same)
    with see.probe("ids (4, 9), probability 1: every token that is not special is chosen"):
        special = [3, 50, 0, 12]
        ids = text(4, 9, 5, 70, special)
        inputs, labels, kept = draw(ids, 70, special, probability=1.0)
        see.fact("ids is left as it was: the inputs are left unmodified", kept)
        follows(inputs, labels, ids, special, 70)
        may_be = ~torch.isin(ids, torch.tensor(special))
        see("the labels at special tokens", labels[~may_be])
        see.fact("every token that is not special is chosen", (labels[may_be] != -100).all())
    with see.probe("ids (400, 30), the default probability"):
        special = [102, 0, 101, 200]
        ids = text(400, 30, 20, 500, special)
        inputs, labels, kept = draw(ids, 500, special)
        see.fact("ids is left as it was: the inputs are left unmodified", kept)
        if parts := follows(inputs, labels, ids, special, 500):
            rates(ids, *parts, 0.15, 500)
            chosen, may_be, *_ = parts
            pairs = (may_be[:, 1:] & may_be[:, :-1]).sum().item()
            both = (chosen[:, 1:] & chosen[:, :-1]).sum().item() / (0.15**2 * pairs)
            as_any = "the neighbour of a chosen token is chosen as often as any"
            see.fact(as_any, 0.5 < both < 1.5)
    with see.probe("ids (30, 400), probability 0.5"):
        special = [7, 120, 0, 33, MASK]
        ids = text(30, 400, 12, 600, special)
        inputs, labels, _ = draw(ids, 600, special, probability=0.5)
        if parts := follows(inputs, labels, ids, special, 600):
            chosen, may_be, masked, other = parts
            rates(ids, chosen, may_be, masked, other, 0.5, 600)
            for k, part in enumerate(quarters(ids.shape)):
                right = _likely((masked & part).sum(), (chosen & part).sum(), 0.8)
                where = f"quarter {k + 1} of the text"
                see.fact(f"[MASK] is as frequent in {where} as elsewhere", right)
            drawn = inputs[other]
            expected = 600 * (1 - math.exp(-0.1 * chosen.sum().item() / 600))
            for least, what in (
                (0.005, "more than one id occurs"),
                (0.3, "many different ids occur"),
                (0.8, "nearly as many different ids occur as in independent draws"),
            ):
                see.fact(f"{what} among the random ids", len(drawn.unique()) > least * expected)
            for k in range(4):
                right = _likely(((drawn * 4) // 600 == k).sum(), len(drawn), 0.25)
                of = f"quarter {k + 1} of the vocabulary"
                see.fact(f"a quarter of the random ids lies in {of}", right)
    with see.probe("ids (200, 160) of a vocabulary of 5, mask_id 2, which is the only special id"):
        ids = see.randint(0, 5, 200, 160)
        inputs, labels, _ = draw(ids, 5, [2], mask_id=2, seed=8, probability=1.0)
        if parts := follows(inputs, labels, ids, [2], 5, mask_id=2):
            chosen, *_, other = parts
            for k in (0, 1, 3, 4):  # special ids may be left out of the random ones
                n, count = (chosen & (ids != k)).sum(), (inputs[other] == k).sum()
                right = _between(count, n, 0.1 / 5, 0.1 / 4)
                often = "as often" if right else _share(count, n, 0.1 / 5)
                see(f"how often the random ids include {k}, compared with the others", often)
            stays = (chosen & (inputs == ids)).sum()
            right = _between(stays, chosen.sum(), 0.1 + 0.1 / 5, 0.1 + 0.2 / 5)
            see.fact("a random id may be the one that stood there: 12 % are as they were", right)
    with see.probe("generators: ids (20, 50), probability 0.5"):
        special = [60, 0, 2, 31]
        ids = text(20, 50, 6, 90, special)
        drawn = []
        for k in range(2):  # all other sources of random numbers differ
            torch.manual_seed(k)
            random.seed(k)
            np.random.seed(k)
            drawn.append(draw(ids, 90, special, probability=0.5))
        for what, of in (
            ("chooses the same tokens", lambda inputs, labels: labels),
            ("puts [MASK] in the same places", lambda inputs, labels: inputs == MASK),
            ("lets the same tokens stay", lambda inputs, labels: inputs == ids),
            ("gives the same result", lambda inputs, labels: inputs),
        ):
            same = torch.equal(of(*drawn[0][:2]), of(*drawn[1][:2]))
            see.fact(f"a generator with the same seed {what}", same)
        other, *_ = draw(ids, 90, special, seed=6, probability=0.5)
        see.fact("a generator with another seed gives another result", (other != drawn[0][0]).any())
        generator = torch.Generator().manual_seed(7)
        arguments, state = (ids, special, MASK, 90, generator, 0.5), generator.get_state()
        one, two = mask_tokens(*arguments), mask_tokens(*arguments)
        see.fact("a second call draws further numbers", (one[1] != two[1]).any())
        moved = not torch.equal(generator.get_state(), state)
        see.fact("the generator that is given has moved on after two calls", moved)
        torch.manual_seed(11)
        random.seed(11)
        np.random.seed(11)
        state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        draw(ids, 90, special, probability=0.5)
        left = torch.equal(torch.get_rng_state(), state[0])
        left = (left, random.getstate(), str(np.random.get_state())) == (True, *state[1:])
        see.fact("nothing is drawn from torch's, Python's or numpy's own random numbers", left)
    with see.probe("ids (1, 30) with twelve generators, probability 1"):
        special = [60, 0, 2, 31]
        ids = text(1, 30, 6, 90, special)
        drawn = [draw(ids, 90, special, seed=k, probability=1.0) for k in range(12)]
        may_be = ~torch.isin(ids, torch.tensor(special))
        masked = torch.stack([inputs[may_be] == MASK for inputs, _, _ in drawn])
        see.fact("each token becomes [MASK] in some of the calls", masked.any(dim=0).all())
        see.fact("in some of the calls a token is not masked", not masked.all())
        see.fact("in each of the calls some tokens are masked", masked.any(dim=1).all())
        see.fact("in each of the calls but a few some tokens are not", (~masked).any(1).sum() > 9)
    with see.probe("ids (5, 40) with sixty generators, probability 0.4"):
        special = [5, 9, 1, 2]
        ids = text(5, 40, 15, 500, special)
        drawn = [draw(ids, 500, special, seed=k, probability=0.4) for k in range(60)]
        may_be = ~torch.isin(ids, torch.tensor(special))
        inputs = torch.stack([inputs for inputs, *_ in drawn])  # (60, 5, 40)
        chosen = torch.stack([labels for _, labels, _ in drawn]) != -100
        masked, other = chosen & (inputs == MASK), chosen & (inputs != MASK) & (inputs != ids)
        n, differ = chosen.sum((1, 2)), (inputs != inputs[0]).any()
        see.fact("sixty generators give more than one result", differ)
        for what, count, of, p in (
            ("chosen tokens in a row", chosen.sum(2), may_be.sum(1), 0.4),
            ("chosen tokens in the batch", n, may_be.sum(), 0.4),
            ("[MASK] for so many chosen tokens", masked.sum((1, 2)), n, 0.8),
            ("random ids for so many chosen tokens", other.sum((1, 2)), n, 0.1),
        ):
            if differ:
                see(f"how the number of {what} varies from call to call", _spread(count, of, p))


def _mask_with(
    protected=lambda ids, special: torch.isin(ids, torch.tensor(special)),
    choose=lambda ids, generator, p: torch.rand(ids.shape, generator=generator) < p,
    fates=lambda ids, generator: torch.rand(ids.shape, generator=generator),
    anything=lambda ids, size, generator: torch.randint(size, ids.shape, generator=generator),
    bounds=(0.8, 0.9),
    labelled=lambda ids, chosen, inputs, mask_id: ids.masked_fill(~chosen, -100),
    probability_used=lambda p: p,
    generator_used=lambda generator: generator,
):
    """The masking with another choice, other fates, random ids or labels."""

    def mask_tokens(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
        generator, p = generator_used(generator), probability_used(probability)
        chosen = choose(ids, generator, p) & ~protected(ids, special_ids)
        fate = fates(ids, generator)
        replacement = anything(ids, vocab_size, generator)
        inputs = ids.masked_fill(chosen & (fate < bounds[0]), mask_id)
        inputs = torch.where(chosen & (fate >= bounds[1]), replacement, inputs)
        return inputs, labelled(ids, chosen, inputs, mask_id)

    return mask_tokens


_mask_labels_everywhere = _mask_with(labelled=lambda ids, chosen, inputs, mask_id: ids.clone())
_mask_labels_inverted = _mask_with(
    labelled=lambda ids, chosen, inputs, mask_id: ids.masked_fill(chosen, -100)
)
_mask_labels_of_inputs = _mask_with(
    labelled=lambda ids, chosen, inputs, mask_id: inputs.masked_fill(~chosen, -100)
)
_mask_labels_where_mask = _mask_with(
    labelled=lambda ids, chosen, inputs, mask_id: ids.masked_fill(inputs != mask_id, -100)
)
_mask_labels_where_changed = _mask_with(
    labelled=lambda ids, chosen, inputs, mask_id: ids.masked_fill(inputs == ids, -100)
)
_mask_labels_zero = _mask_with(
    labelled=lambda ids, chosen, inputs, mask_id: ids.masked_fill(~chosen, 0)
)
_mask_labels_minus_one = _mask_with(
    labelled=lambda ids, chosen, inputs, mask_id: ids.masked_fill(~chosen, -1)
)
_mask_labels_bool = _mask_with(labelled=lambda ids, chosen, inputs, mask_id: chosen)
_mask_inputs_untouched = _mask_with(bounds=(-1.0, 2.0))
_mask_always = _mask_with(bounds=(2.0, 2.0))
_mask_none_kept = _mask_with(bounds=(0.8, 0.8))
_mask_none_random = _mask_with(bounds=(0.8, 2.0))
_mask_nine_in_ten = _mask_with(bounds=(0.9, 0.95))
_mask_random_too_many = _mask_with(bounds=(0.1, 0.2))
_mask_specials_too = _mask_with(protected=lambda ids, special: torch.zeros_like(ids).bool())
_mask_first_special = _mask_with(protected=lambda ids, special: ids == special[0])
_mask_special_places = _mask_with(
    protected=lambda ids, special: (torch.arange(ids.shape[1]) % (ids.shape[1] - 1) == 0).expand(
        ids.shape
    )
)
_mask_three_special = _mask_with(
    protected=lambda ids, special: torch.isin(ids, torch.tensor(special[:3]))
)
_mask_small_ids = _mask_with(protected=lambda ids, special: ids <= max(special))
_mask_specials_alone = _mask_with(
    protected=lambda ids, special: ~torch.isin(ids, torch.tensor(special))
)
_mask_same_columns = _mask_with(
    choose=lambda ids, generator, p: (torch.rand(ids.shape[1], generator=generator) < p).expand(
        ids.shape
    )
)
_mask_whole_rows = _mask_with(
    choose=lambda ids, generator, p: (torch.rand(len(ids), 1, generator=generator) < p).expand(
        ids.shape
    )
)
_mask_by_id = _mask_with(
    choose=lambda ids, generator, p: (torch.rand(int(ids.max()) + 1, generator=generator) < p)[ids]
)
_mask_kept_choice = _mask_with(
    choose=lambda ids, generator, p: ~(torch.rand(ids.shape, generator=generator) < p)
)
_mask_first_tokens = _mask_with(
    choose=lambda ids, generator, p: (torch.arange(ids.shape[1]) < round(p * ids.shape[1])).expand(
        ids.shape
    )
)
_mask_one_stretch = _mask_with(
    choose=lambda ids, generator, p: (
        (
            torch.arange(ids.shape[1])
            - torch.randint(ids.shape[1], (len(ids), 1), generator=generator)
        )
        % ids.shape[1]
        < round(p * ids.shape[1])
    )
)
_mask_one_fate = _mask_with(fates=lambda ids, generator: torch.rand(1, generator=generator))
_mask_fate_of_rows = _mask_with(
    fates=lambda ids, generator: torch.rand(len(ids), 1, generator=generator)
)
_mask_fate_of_columns = _mask_with(
    fates=lambda ids, generator: torch.rand(ids.shape[1], generator=generator)
)
_mask_one_random = _mask_with(
    anything=lambda ids, size, generator: torch.randint(size, (1,), generator=generator).expand(
        ids.shape
    )
)
_mask_random_of_rows = _mask_with(
    anything=lambda ids, size, generator: torch.randint(
        size, (len(ids), 1), generator=generator
    ).expand(ids.shape)
)
_mask_random_of_batch = _mask_with(
    anything=lambda ids, size, generator: ids.flatten()[
        torch.randint(ids.numel(), ids.shape, generator=generator)
    ]
)
_mask_random_too_large = _mask_with(
    anything=lambda ids, size, generator: torch.randint(
        size + max(1, size // 4), ids.shape, generator=generator
    )
)
_mask_random_last_missing = _mask_with(
    anything=lambda ids, size, generator: torch.randint(size - 1, ids.shape, generator=generator)
)
_mask_random_first_missing = _mask_with(
    anything=lambda ids, size, generator: torch.randint(1, size, ids.shape, generator=generator)
)
_mask_random_up_to_present = _mask_with(
    anything=lambda ids, size, generator: torch.randint(
        int(ids.max()) + 1, ids.shape, generator=generator
    )
)
_mask_random_rounded = _mask_with(
    anything=lambda ids, size, generator: (
        (torch.rand(ids.shape, generator=generator) * (size - 1)).round().long()
    )
)
_mask_random_never_true = _mask_with(
    anything=lambda ids, size, generator: (
        (ids + torch.randint(1, size, ids.shape, generator=generator)) % size
    )
)
_mask_probability_fixed = _mask_with(probability_used=lambda p: 0.15)
_mask_probability_times_80 = _mask_with(probability_used=lambda p: 0.8 * p)
_mask_global = _mask_with(generator_used=lambda generator: None)
_mask_global_ids = _mask_with(anything=lambda ids, size, generator: torch.randint(size, ids.shape))
_mask_global_fates = _mask_with(fates=lambda ids, generator: torch.rand(ids.shape))
_mask_seeded = _mask_with(generator_used=lambda generator: generator.manual_seed(42))
_mask_seeded_once = _mask_with(generator_used=lambda generator: torch.Generator().manual_seed(0))
_mask_copied_generator = _mask_with(
    generator_used=lambda generator: torch.Generator().set_state(generator.get_state())
)


def _mask_global_seeded(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """Seeds torch's own numbers from the generator and draws from them."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    return reference.mask_tokens(ids, special_ids, mask_id, vocab_size, None, probability)


def _mask_fate_in_order(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """The first 80 % of the chosen become [MASK], the next 10 % random, the last stay."""
    chosen = torch.rand(ids.shape, generator=generator) < probability
    chosen &= ~torch.isin(ids, torch.tensor(special_ids))
    places, anything = chosen.nonzero(), torch.randint(vocab_size, ids.shape, generator=generator)
    one, two, inputs = int(0.8 * len(places)), int(0.9 * len(places)), ids.clone()
    swapped = places[one:two].unbind(1)
    inputs[places[:one].unbind(1)] = mask_id
    inputs[swapped] = anything[swapped]
    return inputs, ids.masked_fill(~chosen, -100)


def _mask_special_extended(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    special_ids.append(mask_id)
    return reference.mask_tokens(ids, special_ids, mask_id, vocab_size, generator, probability)


def _mask_ten_of_the_rest(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """80 % [MASK], 10 % of what is left random: 2 % instead of 10."""
    chosen = torch.rand(ids.shape, generator=generator) < probability
    chosen &= ~torch.isin(ids, torch.tensor(special_ids))
    masked = chosen & (torch.rand(ids.shape, generator=generator) < 0.8)
    other = chosen & ~masked & (torch.rand(ids.shape, generator=generator) < 0.1)
    anything = torch.randint(vocab_size, ids.shape, generator=generator)
    inputs = torch.where(other, anything, ids.masked_fill(masked, mask_id))
    return inputs, ids.masked_fill(~chosen, -100)


def _mask_same_number(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """One number for both decisions: what is below 0.15 is below 0.8 too."""
    draw = torch.rand(ids.shape, generator=generator)
    return _mask_with(choose=lambda *_: draw < probability, fates=lambda *_: draw)(
        ids, special_ids, mask_id, vocab_size, generator, probability
    )


def _mask_overwriting(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """The random ids may hit what has become [MASK] before."""
    chosen = torch.rand(ids.shape, generator=generator) < probability
    chosen &= ~torch.isin(ids, torch.tensor(special_ids))
    masked = chosen & (torch.rand(ids.shape, generator=generator) < 0.8)
    other = chosen & (torch.rand(ids.shape, generator=generator) < 0.1)
    anything = torch.randint(vocab_size, ids.shape, generator=generator)
    inputs = torch.where(other, anything, ids.masked_fill(masked, mask_id))
    return inputs, ids.masked_fill(~chosen, -100)


def _mask_of_all(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """80, 10 and 10 % of all tokens, instead of the chosen."""
    may_be = ~torch.isin(ids, torch.tensor(special_ids))
    chosen = (torch.rand(ids.shape, generator=generator) < probability) & may_be
    fate = torch.rand(ids.shape, generator=generator)
    anything = torch.randint(vocab_size, ids.shape, generator=generator)
    inputs = ids.masked_fill(may_be & (fate < 0.8), mask_id)
    inputs = torch.where(may_be & (fate >= 0.9), anything, inputs)
    return inputs, ids.masked_fill(~chosen, -100)


def _mask_in_place(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    inputs, labels = reference.mask_tokens(
        ids, special_ids, mask_id, vocab_size, generator, probability
    )
    return ids.copy_(inputs), labels


def _mask_alias(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """Labels taken from what has been masked already: `inputs = ids` makes no copy."""
    inputs, labels = reference.mask_tokens(
        ids, special_ids, mask_id, vocab_size, generator, probability
    )
    ids.copy_(inputs)
    return ids, ids.masked_fill(labels == -100, -100)


def _mask_labels_first(*args, **kwargs):
    return reference.mask_tokens(*args, **kwargs)[::-1]


def _mask_inputs_alone(*args, **kwargs):
    return reference.mask_tokens(*args, **kwargs)[0]


def _mask_one_draw(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """One number says both whether a token is chosen and what becomes of it."""
    draw = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    for special in special_ids:
        draw = draw.masked_fill(ids == special, 2.0)
    inputs = ids.clone()
    inputs[draw < 0.8 * probability] = mask_id
    swapped = (draw >= 0.8 * probability) & (draw < 0.9 * probability)
    inputs[swapped] = torch.randint(0, vocab_size, (int(swapped.sum()),), generator=generator)
    return [inputs, torch.where(draw < probability, ids, -100)]


def _mask_bernoulli(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """As Hugging Face's collator does it, half of the rest random."""
    labels, inputs = ids.clone(), ids.clone()
    odds = torch.full(labels.shape, float(probability))
    odds[sum(ids == i for i in special_ids).bool()] = 0.0
    chosen = torch.bernoulli(odds, generator=generator).bool()
    labels[~chosen] = -100
    masked = torch.bernoulli(torch.full(ids.shape, 0.8), generator=generator).bool() & chosen
    inputs[masked] = mask_id
    other = torch.bernoulli(torch.full(ids.shape, 0.5), generator=generator).bool()
    other &= chosen & ~masked
    inputs[other] = torch.randint(vocab_size, ids.shape, generator=generator)[other]
    return inputs, labels


def _mask_loop(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
    """Token by token, in plain Python."""
    numbers = torch.rand(2, *ids.shape, generator=generator).tolist()
    inputs, labels = ids.tolist(), torch.full_like(ids, -100).tolist()
    for i, row in enumerate(ids.tolist()):
        for j, token in enumerate(row):
            if token in special_ids or numbers[0][i][j] >= probability:
                continue
            labels[i][j] = token
            if numbers[1][i][j] < 0.8:
                inputs[i][j] = mask_id
            elif numbers[1][i][j] < 0.9:
                inputs[i][j] = torch.randint(vocab_size, (), generator=generator).item()
    return torch.tensor(inputs), torch.tensor(labels)


def _shuffled(where, generator):
    """The places, (count, 2), where a boolean tensor is true, in a random order."""
    places = where.nonzero()
    return places[torch.randperm(len(places), generator=generator)]


def _mask_exactly(choice=True, rows=False, fates=True):
    """Exactly the share of the batch or of each row, and exactly 80, 10 and 10 % of the chosen."""

    def mask_tokens(ids, special_ids, mask_id, vocab_size, generator, probability=0.15):
        may_be = ~torch.isin(ids, torch.tensor(special_ids))
        chosen = (torch.rand(ids.shape, generator=generator) < probability) & may_be
        if choice:
            chosen = torch.zeros_like(may_be)
            for row, free in zip(chosen, may_be, strict=True) if rows else [(chosen, may_be)]:
                order = _shuffled(free, generator)
                row[order[: round(probability * len(order))].unbind(1)] = True
        inputs, anything = ids.clone(), torch.randint(vocab_size, ids.shape, generator=generator)
        if fates:
            order = _shuffled(chosen, generator)
            one, two = round(0.8 * len(order)), round(0.9 * len(order))
            swapped = order[one:two].unbind(1)
            inputs[order[:one].unbind(1)] = mask_id
            inputs[swapped] = anything[swapped]
        else:
            fate = torch.rand(ids.shape, generator=generator)
            inputs[chosen & (fate < 0.8)] = mask_id
            inputs = torch.where(chosen & (fate >= 0.9), anything, inputs)
        return inputs, ids.masked_fill(~chosen, -100)

    return mask_tokens


_mask_exact_shares = _mask_exactly()
_mask_exact_choice = _mask_exactly(fates=False)
_mask_exact_rows = _mask_exactly(rows=True, fates=False)
_mask_exact_fates = _mask_exactly(choice=False)


MASK_TOKENS = Exercise(
    slug="mask_tokens",
    chapter=4,
    title="Hide tokens to be predicted",
    minutes=20,
    difficulty=3,
    reference=reference.mask_tokens,
    observe=_observe_mask_tokens,
    misconceptions=(
        Misconception(
            "labels_everywhere",  # museum 4.11
            _mask_labels_everywhere,
            "Your labels ask for every token, also for those that stand in plain sight. The "
            "network learns to copy them: the loss falls fast and tells nothing about the hidden "
            "ones; −100 where a token was not chosen.",
        ),
        Misconception(
            "labels_inverted",
            _mask_labels_inverted,
            "Your labels are −100 at the chosen tokens and ask for all the others. −100 means "
            "that nothing is asked: it belongs where a token was not chosen.",
        ),
        Misconception(
            "labels_of_the_hidden_text",
            _mask_labels_of_inputs,
            "Your labels are what stands in the inputs at the chosen places, mostly [MASK] itself. "
            "What is to be predicted is the id that stood there before.",
        ),
        Misconception(
            "labels_where_mask_alone",
            _mask_labels_where_mask,
            "You ask only where the inputs show [MASK]. The tokens that were replaced by a random "
            "one or stayed are asked for too: without that a network can trust every word that "
            "it sees.",
        ),
        Misconception(
            "labels_where_changed_alone",
            _mask_labels_where_changed,
            "You ask only where inputs and ids differ. A tenth of the chosen tokens stays as it is "
            "and is asked for all the same.",
        ),
        Misconception(
            "nothing_asked_is_0",  # museum 4.14
            _mask_labels_zero,
            "Your labels are 0 where nothing is asked. That is the id of a token, which the loss "
            "then wants predicted there; −100 is the number that cross-entropy leaves out.",
        ),
        Misconception(
            "nothing_asked_is_minus_1",
            _mask_labels_minus_one,
            "Your labels are −1 where nothing is asked. Cross-entropy leaves out −100, and takes "
            "−1 for a class out of range.",
        ),
        Misconception(
            "labels_say_where",
            _mask_labels_bool,
            "Your labels are true where a token was chosen. They are to hold its id there, and "
            "−100 elsewhere.",
        ),
        Misconception(
            "nothing_hidden",  # museum 4.12
            _mask_inputs_untouched,
            "Your inputs are the ids as they were: what is asked for stands in plain sight, and "
            "the network only learns to copy.",
        ),
        Misconception(
            "always_mask",  # museum 4.13, C15
            _mask_always,
            "Every chosen token becomes [MASK]. Texts that are read later contain none, so a fifth "
            "is treated otherwise: 10 % become a random id and 10 % stay.",
        ),
        Misconception(
            "none_stays",  # museum 4.13
            _mask_none_kept,
            "A chosen token becomes [MASK] or a random id, and never stays. 80 % become [MASK], "
            "10 % a random id, and 10 % stay.",
        ),
        Misconception(
            "none_random",  # museum 4.13
            _mask_none_random,
            "A chosen token becomes [MASK] or stays, and never becomes a random id. 80 % become "
            "[MASK], 10 % a random id, and 10 % stay.",
        ),
        Misconception(
            "ninety_percent_masked",  # museum 4.13
            _mask_nine_in_ten,
            "Nine tenths of the chosen become [MASK], and the two other fates share the last "
            "tenth. It is 80 %, 10 % and 10 %.",
        ),
        Misconception(
            "shares_exchanged",  # museum 4.13
            _mask_random_too_many,
            "80 % of the chosen become a random id and 10 % [MASK]: the shares are exchanged.",
        ),
        Misconception(
            "ten_percent_of_the_rest",  # museum 4.13
            _mask_ten_of_the_rest,
            "About 2 % of the chosen become a random id, and 18 % stay. A second draw of 10 % has "
            "met the 80 %: taken of what they leave, or overwritten by them. Each chosen token has "
            "one of three fates, 80, 10 and 10 %.",
        ),
        Misconception(
            "same_number_for_both",
            _mask_same_number,
            "You compare one and the same number with the probability and with the bounds of the "
            "fates. What is below 0.15 is below 0.8 too: every chosen token becomes [MASK]. Draw "
            "again, or scale the bounds.",
        ),
        Misconception(
            "masks_overwritten",  # museum 4.13
            _mask_overwriting,
            "You draw anew for the random ids among all chosen tokens, so that they hit some that "
            "were [MASK] already: 72 % stay [MASK] and 18 % stay as they were. Each chosen token "
            "has one of three fates.",
        ),
        Misconception(
            "fates_of_all_tokens",
            _mask_of_all,
            "You replace 90 % of all tokens, chosen or not. Only the chosen have a fate; all "
            "others are the context from which they are to be predicted.",
        ),
        Misconception(
            "special_tokens_too",  # museum 4.13
            _mask_specials_too,
            "You choose special tokens like others. [CLS], [SEP] and padding stand in every text: "
            "to predict them teaches nothing, and without them the input is no longer BERT's.",
        ),
        Misconception(
            "first_special_id_alone",
            _mask_first_special,
            "You spare one of special_ids, the first, and choose others of them. None of them is "
            "ever chosen: compare each token with all of special_ids.",
        ),
        Misconception(
            "some_special_ids",
            _mask_three_special,
            "You spare some of special_ids and choose others of them. How many there are, and in "
            "which order, differs from one tokenizer to the next: compare with all of them.",
        ),
        Misconception(
            "special_by_place",
            _mask_special_places,
            "You spare the first and the last place of each row. A [SEP] may stand in the middle "
            "and padding at many places; the ids say what is special.",
        ),
        Misconception(
            "special_by_size",
            _mask_small_ids,
            "You take all ids up to the largest special one for special. In some vocabularies "
            "words have smaller ids; special_ids names those that are meant.",
        ),
        Misconception(
            "special_tokens_alone",
            _mask_specials_alone,
            "You choose special tokens and nothing else: the condition is the wrong way round.",
        ),
        Misconception(
            "same_places_in_every_row",
            _mask_same_columns,
            "You choose columns: in every row the same places are hidden. Draw a number for each "
            "token, (batch, n) of them.",
        ),
        Misconception(
            "whole_rows",
            _mask_whole_rows,
            "You choose rows: some texts are hidden as a whole and others not at all. Draw a "
            "number for each token, (batch, n) of them.",
        ),
        Misconception(
            "same_ids_everywhere",
            _mask_by_id,
            "You choose ids: a word is hidden everywhere or nowhere. Each place is chosen by "
            "itself, also where the same word stands.",
        ),
        Misconception(
            "all_but_the_chosen",
            _mask_kept_choice,
            "Your comparison is the wrong way round: with the probability 0.15, 85 % of the tokens "
            "are chosen. A uniform number is below p with the probability p.",
        ),
        Misconception(
            "the_beginning_of_each_row",
            _mask_first_tokens,
            "You hide the beginning of each row. The tokens are to be chosen at random, anywhere "
            "in the text.",
        ),
        Misconception(
            "one_stretch_of_each_row",
            _mask_one_stretch,
            "You hide one stretch of neighbouring tokens in each row. Each token is chosen by "
            "itself: the neighbour of a chosen one no more often than any other.",
        ),
        Misconception(
            "one_fate_for_all",
            _mask_one_fate,
            "You draw one fate for the whole batch: all the chosen become [MASK], or all become "
            "random ids, or all stay. Draw one for each token.",
        ),
        Misconception(
            "one_fate_for_each_row",
            _mask_fate_of_rows,
            "You draw one fate for each row, which all the chosen tokens in it share. Draw one for "
            "each token.",
        ),
        Misconception(
            "one_fate_for_each_column",
            _mask_fate_of_columns,
            "You draw one fate for each column, which the rows share. Draw one for each token.",
        ),
        Misconception(
            "fates_in_order_of_place",
            _mask_fate_in_order,
            "You give out the fates in the order of the tokens: the first 80 % become [MASK], the "
            "last ones stay or become random. The shares are right and the places are not; draw "
            "for each token.",
        ),
        Misconception(
            "one_random_id_for_all",
            _mask_one_random,
            "You draw one random id and put it everywhere. Each place gets its own.",
        ),
        Misconception(
            "one_random_id_for_each_row",
            _mask_random_of_rows,
            "You draw one random id for each row, which all its places share. Each place gets its "
            "own.",
        ),
        Misconception(
            "random_ids_of_the_batch",
            _mask_random_of_batch,
            "Your random ids are taken from the batch itself, special ones among them. Any id "
            "below vocab_size is to be as likely as any other.",
        ),
        Misconception(
            "random_ids_too_large",
            _mask_random_too_large,
            "Some of your random ids lie beyond the vocabulary, for which the embedding has no "
            "row. The largest is vocab_size − 1.",
        ),
        Misconception(
            "last_id_never_drawn",
            _mask_random_last_missing,
            "Your random ids never include the last of the vocabulary: `torch.randint` leaves out "
            "its upper bound already.",
        ),
        Misconception(
            "first_id_never_drawn",
            _mask_random_first_missing,
            "Your random ids never include the id 0. The ids of a vocabulary begin with 0, and "
            "each is to be as likely as any other.",
        ),
        Misconception(
            "random_ids_up_to_the_largest_present",
            _mask_random_up_to_present,
            "Your random ids go no further than the largest id in the batch. Those of the whole "
            "vocabulary are meant, all ids below vocab_size.",
        ),
        Misconception(
            "first_and_last_id_too_rare",
            _mask_random_rounded,
            "The first and the last id of the vocabulary are drawn half as often as the others, "
            "as it comes from rounding a uniform number. Each id is to be as likely as any other.",
        ),
        Misconception(
            "random_id_never_the_true_one",
            _mask_random_never_true,
            "Your random id is never the one that stood there. Any id below vocab_size is to be as "
            "likely as any other, the true one too.",
        ),
        Misconception(
            "probability_by_heart",
            _mask_probability_fixed,
            "You always choose 15 %. The argument `probability` says how many; 0.15 is its "
            "default.",
        ),
        Misconception(
            "asked_too_seldom",
            _mask_probability_times_80,
            "You choose with 0.8 times the probability. The 80 % are a share of the chosen, not "
            "of the tokens: draw first who is chosen, then what becomes of each.",
        ),
        Misconception(
            "global_random_numbers",
            _mask_global,
            "You do not use the generator that is given. The result then depends on what else has "
            "drawn random numbers before, and cannot be repeated.",
        ),
        Misconception(
            "random_ids_without_the_generator",
            _mask_global_ids,
            "Your random ids are not drawn from the generator that is given, the rest is. A part "
            "of the result cannot be repeated.",
        ),
        Misconception(
            "fates_without_the_generator",
            _mask_global_fates,
            "Your fates are not drawn from the generator that is given, the choice is. A part of "
            "the result cannot be repeated.",
        ),
        Misconception(
            "other_random_numbers_changed",
            _mask_global_seeded,
            "Your result can be repeated, but you seed torch's own random numbers, or draw from "
            "them too. Whatever draws after you, dropout for one, then gets other numbers: use the "
            "generator that is given and nothing else.",
        ),
        Misconception(
            "exactly_that_share_and_fates",
            _mask_exact_shares,
            "You choose exactly that share of the tokens, and give exactly 80, 10 and 10 % of them "
            "their fates. Each token is chosen for itself and has its own fate, so the numbers "
            "vary from call to call; compare a uniform number for each token with a bound.",
        ),
        Misconception(
            "exactly_that_share",
            _mask_exact_choice,
            "You choose exactly that share of the batch. Each token is chosen for itself, so that "
            "the number varies from call to call; draw a uniform number for each.",
        ),
        Misconception(
            "exactly_that_share_of_each_row",
            _mask_exact_rows,
            "You choose exactly that share of each row. Each token is chosen for itself, so that a "
            "row may have few or many; draw a uniform number for each.",
        ),
        Misconception(
            "exactly_eighty_percent",
            _mask_exact_fates,
            "You give exactly 80, 10 and 10 % of the chosen tokens their fates. Each token has its "
            "own fate, so that the numbers vary from call to call; draw a uniform number for each.",
        ),
        Misconception(
            "seeded_anew",
            _mask_seeded,
            "You seed the generator yourself. Every batch then hides the same places, in every "
            "epoch; use it as it is.",
        ),
        Misconception(
            "own_generator",
            _mask_seeded_once,
            "Your numbers are not drawn anew from the generator of each call: they come from one "
            "of your own with a fixed seed, or you keep what you drew before. Every batch then "
            "hides the same places, in every epoch.",
        ),
        Misconception(
            "generator_not_moved_on",
            _mask_copied_generator,
            "The generator stands after your call where it stood before, because you draw from a "
            "copy, or put it back. The next call then draws the same numbers again: draw from the "
            "one that is given and let it move on.",
        ),
        Misconception(
            "ids_changed",
            _mask_in_place,
            "You write the hidden text into ids itself. The next epoch then starts from a text "
            "with holes; work on a copy.",
        ),
        Misconception(
            "ids_changed_before_the_labels",
            _mask_alias,
            "You write into ids and take the labels from it afterwards, so they ask for [MASK]. "
            "A second name for a tensor is no copy of it.",
        ),
        Misconception(
            "special_ids_changed",
            _mask_special_extended,
            "You change the caller's list special_ids. It grows with each call, and others read it "
            "too; make a new list where you need another.",
        ),
        Misconception(
            "labels_first",
            _mask_labels_first,
            "You return the labels first. The inputs, with what is hidden in them, come first, "
            "then the labels.",
        ),
        Misconception(
            "inputs_alone",
            _mask_inputs_alone,
            "You return the inputs alone. Without labels nobody knows any more which tokens are "
            "asked for and what they were.",
        ),
    ),
    alternatives=(_mask_one_draw, _mask_bernoulli, _mask_loop),
    hints=(
        "Two decisions for each token, one after the other: is it chosen, and if so, what becomes "
        "of it? Each is a uniform random number compared with a bound.",
        "`torch.rand(ids.shape, generator=generator)` draws one number for each token. The second "
        "draw decides the fate: below 0.8, from there to 0.9, and above. `torch.isin(ids, "
        "torch.tensor(special_ids))` is True at special tokens.",
        "`ids.masked_fill(where, mask_id)` returns a new tensor and leaves ids as it is, and "
        "`torch.where(where, random_ids, inputs)` puts random ids into some places, out of "
        "`torch.randint(vocab_size, ids.shape, generator=generator)`. The labels are ids with "
        "−100 filled in wherever nothing was chosen.",
    ),
)


# --- find the bug: a perfect model scores 15 % --------------------------------------------------


def masked_accuracy(logits, labels):
    """The share of tokens to be predicted that are predicted right, a float.

    logits: (batch, n, vocab_size), labels: int64 (batch, n), −100 where nothing is asked; at least
    one is asked.
    """
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def _observe_masked_accuracy(masked_accuracy, see):
    def asked(shape, vocab_size, share, right):
        """Logits and labels: about `share` are asked, of those about `right` predicted."""
        labels = see.randint(0, vocab_size, *shape)
        logits = see.randn(*shape, vocab_size)
        best = torch.where(see.rand(*shape) < right, labels, see.randint(0, vocab_size, *shape))
        logits.scatter_(-1, best[..., None], 5.0)
        return logits, labels.masked_fill(see.rand(*shape) >= share, -100)

    def judge(logits, labels):
        kept = labels.clone()
        see.call("the accuracy", masked_accuracy, logits, labels)
        see.fact("labels among the inputs are left unmodified", torch.equal(labels, kept))

    with see.probe("logits (4, 30, 11), about a sixth of the tokens is asked"):
        judge(*asked((4, 30), 11, 0.17, 0.6))
    with see.probe("logits (3, 20, 7), a perfect model, about a sixth is asked"):
        logits, labels = asked((3, 20), 7, 0.17, 1.0)
        judge(logits, labels)
    with see.probe("logits (5, 8, 6), one token is asked and wrong"):
        logits, labels = asked((5, 8), 6, 0.0, 0.0)
        labels[3, 2] = (logits[3, 2].argmax() + 1) % 6
        judge(logits, labels)
    with see.probe("logits (2, 13, 5), every token is asked"):
        judge(*asked((2, 13), 5, 1.1, 0.4))
    with see.probe("rows of unequal numbers of tokens that are asked, one of them without any"):
        logits, labels = asked((4, 16), 9, 1.1, 0.5)
        for row, first in enumerate((16, 2, 9, 0)):
            labels[row, first:] = -100
        labels[1, :2] = logits[1, :2].argmax(dim=-1)
        judge(logits, labels)
    with see.probe("logits (6, 6, 6): every axis as long"):
        judge(*asked((6, 6), 6, 0.5, 0.5))
    with see.probe("tokens with the ids 0 and 1 are asked, all of them predicted"):
        logits, labels = asked((2, 24), 8, 0.4, 0.3)
        labels[:, 5:12] = torch.tensor([0, 1, 1, 0, 0, 1, 0])
        best = labels.clamp(min=0)[..., None]
        logits[:, 5:12] = logits[:, 5:12].scatter(-1, best[:, 5:12], 9.0)
        judge(logits, labels)
    with see.probe("logits (3, 17, 9), so near to one another that nothing has half of the share"):
        logits, labels = asked((3, 17), 9, 0.6, 0.7)
        judge(logits / 5, labels)
    with see.probe("logits (2, 19, 8), all of them below 0"):
        logits, labels = asked((2, 19), 8, 0.6, 0.7)
        judge(logits - 20, labels)


def _masked_accuracy_of_all(logits, labels):
    hits = (logits.argmax(dim=-1) == labels).sum().item()
    return hits / labels.numel()


def _masked_accuracy_of_rows(logits, labels):
    asked = labels != -100
    hits = (logits.argmax(dim=-1) == labels) & asked
    return (hits.sum(dim=1) / asked.sum(dim=1)).mean().item()


def _masked_accuracy_of_rows_patched(logits, labels):
    asked = labels != -100
    hits = (logits.argmax(dim=-1) == labels) & asked
    return (hits.sum(dim=1) / asked.sum(dim=1).clamp(min=1)).mean().item()


def _masked_accuracy_of_rows_asked(logits, labels):
    asked = labels != -100
    hits, some = (logits.argmax(dim=-1) == labels) & asked, asked.any(dim=1)
    return (hits.sum(dim=1)[some] / asked.sum(dim=1)[some]).mean().item()


def _masked_accuracy_where(
    asked=lambda labels: labels != -100, dim=-1, then=lambda hits, n: hits / n
):
    """With another condition, another axis, another number out of hits and asked."""

    def masked_accuracy(logits, labels):
        here = asked(labels)
        hits = (logits.argmax(dim=dim) == labels)[here]
        return then(hits.sum().item(), here.sum().item())

    return masked_accuracy


_masked_accuracy_without_zero = _masked_accuracy_where(asked=lambda labels: labels > 0)
_masked_accuracy_inverted = _masked_accuracy_where(asked=lambda labels: labels == -100)
_masked_accuracy_axis_1 = _masked_accuracy_where(dim=1)
_masked_accuracy_percent = _masked_accuracy_where(then=lambda hits, n: 100 * hits / n)
_masked_accuracy_errors = _masked_accuracy_where(then=lambda hits, n: 1 - hits / n)
_masked_accuracy_count = _masked_accuracy_where(then=lambda hits, n: hits)
_masked_accuracy_floor = _masked_accuracy_where(then=lambda hits, n: hits // n)
_masked_accuracy_first_row = _masked_accuracy_where(
    asked=lambda labels: (labels != -100) & (torch.arange(len(labels)) == 0)[:, None]
)


def _masked_accuracy_unasked_right(logits, labels):
    asked = labels != -100
    return ((logits.argmax(dim=-1) == labels) | ~asked).float().mean().item()


def _masked_accuracy_clamped(logits, labels):
    best, labels = logits.argmax(dim=-1), labels.clamp(min=0)
    return (best == labels).float().mean().item()


def _masked_accuracy_hits(logits, labels):
    return (logits.argmax(dim=-1) == labels)[labels != -100]


def _masked_accuracy_in_place(logits, labels):
    accuracy = reference.masked_accuracy(logits, labels)
    labels[labels == -100] = 0
    return accuracy


def _masked_accuracy_zeroed(logits, labels):
    labels[labels == -100] = 0
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def _masked_accuracy_sure(logits, labels):
    best = logits.softmax(dim=-1).max(dim=-1)
    hits = (best.values > 0.5) & (best.indices == labels)
    return hits[labels != -100].float().mean().item()


def _masked_accuracy_absolute(logits, labels):
    return reference.masked_accuracy(logits.abs(), labels)


def _masked_accuracy_by_division(logits, labels):
    return float((logits.argmax(2) == labels).sum() / (labels != -100).sum())


def _masked_accuracy_by_flat(logits, labels, ignore_index=-100):
    flat, truth = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    keep = truth.ne(ignore_index).nonzero().squeeze(1)
    return flat[keep].max(dim=-1).indices.eq(truth[keep]).double().mean()


def _masked_accuracy_by_loop(logits, labels):
    right = total = 0
    for scores, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label >= 0:
            total += 1
            right += int(scores.argmax().item() == label)
    return right / total


FIX_ACCURACY_OF_UNMASKED = Exercise(
    slug="fix_accuracy_of_unmasked",
    chapter=4,
    title="Find the bug: a perfect model that scores 15 %",
    minutes=8,
    difficulty=1,
    reference=reference.masked_accuracy,
    observe=_observe_masked_accuracy,
    rtol=1e-6,  # the reference's mean is float32
    shipped=masked_accuracy,
    symptom="Of 2,048 tokens 303 are asked for. A model that puts the right token first everywhere "
    "scores 0.148 by this function, instead of 1.",
    misconceptions=(
        Misconception(
            "divided_by_all",  # museum 4.15
            _masked_accuracy_of_all,
            "You divide by all tokens, also those of which nothing was asked. No prediction can "
            "be right there, so even a perfect model scores the share of the chosen.",
        ),
        Misconception(
            "mean_of_rows",
            _masked_accuracy_of_rows,
            "You take the mean of the rows' accuracies. In a row with few questions each counts "
            "more, and a row without any divides 0 by 0, which makes the whole NaN.",
        ),
        Misconception(
            "mean_of_rows_patched",
            _masked_accuracy_of_rows_patched,
            "You take the mean of the rows' accuracies. In a row with few questions each counts "
            "more, and a row without any counts as wholly wrong.",
        ),
        Misconception(
            "mean_of_rows_that_are_asked",
            _masked_accuracy_of_rows_asked,
            "You take the mean of the rows' accuracies. In a row with few questions each of them "
            "counts more than in a row with many; count over the whole batch.",
        ),
        Misconception(
            "id_0_never_asked",
            _masked_accuracy_without_zero,
            "You count only labels above 0. A token with the id 0 can be asked for too; nothing "
            "is asked where the label is −100.",
        ),
        Misconception(
            "the_others",
            _masked_accuracy_inverted,
            "You count where nothing is asked, and there no prediction is ever equal to the label. "
            "The condition is the wrong way round.",
        ),
        Misconception(
            "unasked_taken_as_right",
            _masked_accuracy_unasked_right,
            "You count the tokens of which nothing is asked as right. Then 85 % come for free, "
            "even for a model that knows nothing; leave them out above and below.",
        ),
        Misconception(
            "minus_100_made_0",  # museum 4.14
            _masked_accuracy_clamped,
            "You turn −100 into 0 and go on dividing by all tokens. Then the id 0 is asked for "
            "wherever nothing was; leave these places out.",
        ),
        Misconception(
            "best_along_the_text",
            _masked_accuracy_axis_1,
            "You take the largest logit along the second axis, over the places of the text. The "
            "classes are the last axis, the vocabulary.",
        ),
        Misconception(
            "percent",
            _masked_accuracy_percent,
            "You return percent. A share lies between 0 and 1: a perfect model scores 1.0.",
        ),
        Misconception(
            "share_of_errors",
            _masked_accuracy_errors,
            "You return the share of wrong predictions. It is the right ones that are counted.",
        ),
        Misconception(
            "number_of_hits",
            _masked_accuracy_count,
            "You return how many predictions are right. To be a share, it is divided by the number "
            "of those that were asked for.",
        ),
        Misconception(
            "integer_division",
            _masked_accuracy_floor,
            "You divide with //, which rounds down: everything but a perfect model scores 0.",
        ),
        Misconception(
            "first_row_alone",
            _masked_accuracy_first_row,
            "You count in the first row alone. All rows of the batch count.",
        ),
        Misconception(
            "hits_one_by_one",
            _masked_accuracy_hits,
            "You return a true or false for each token that was asked for. One number is wanted, "
            "their mean.",
        ),
        Misconception(
            "labels_changed",
            _masked_accuracy_in_place,
            "Your number is right, and you overwrite the −100 in the caller's labels. Whoever "
            "reads them next, the loss for one, no longer finds where nothing is asked; select, "
            "and leave the labels as they are.",
        ),
        Misconception(
            "labels_changed_to_0",  # museum 4.14
            _masked_accuracy_zeroed,
            "You write 0 over the −100 in the caller's labels and divide by all tokens. The id 0 "
            "is then asked for wherever nothing was, here and in the loss that reads them next.",
        ),
        Misconception(
            "only_where_it_is_sure",
            _masked_accuracy_sure,
            "You count a prediction as right only where its probability is above one half. It is "
            "right where the label has the largest logit, however close the others are.",
        ),
        Misconception(
            "largest_in_absolute_value",
            _masked_accuracy_absolute,
            "You look for the logit that is largest in absolute value. The largest one is meant: a "
            "logit far below 0 is the least likely token.",
        ),
    ),
    alternatives=(
        _masked_accuracy_by_division,
        _masked_accuracy_by_flat,
        _masked_accuracy_by_loop,
    ),
    hints=(
        "Of the tokens of a text, a share of 0.15 is asked for. What does the function count for "
        "the others, and by how much does it divide?",
        "The label −100 says that nothing is asked. Those places must not be counted at all, "
        "neither as right nor as wrong.",
        "`asked = labels != -100` is a boolean tensor. Indexing the hits with it, `hits[asked]`, "
        "leaves the places that count; the mean is over those.",
    ),
)


# --- masked_mean --------------------------------------------------------------------------------


def _observe_masked_mean(masked_mean, see):
    def mean(batch, n, d_model, mask):
        hidden = see.randn(batch, n, d_model, requires_grad=True)
        out = see.call("the mean", masked_mean, hidden, mask)
        see.gradients("the mean", out, hidden=hidden)

    def rows(*lengths):
        return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()

    with see.probe("hidden (3, 6, 4), rows of 6, 2 and 5 real tokens; the mask is int64"):
        mean(3, 6, 4, rows(6, 2, 5))
    with see.probe("hidden (2, 8, 5), rows of 3 and 8 real tokens; the mask is bool"):
        mean(2, 8, 5, rows(3, 8).bool())
    with see.probe("hidden (4, 5, 3), nothing is padding"):
        mean(4, 5, 3, rows(5, 5, 5, 5))
    with see.probe("hidden (2, 7, 3), padded further than the longest row, 4 tokens"):
        mean(2, 7, 3, F.pad(rows(4, 1), (0, 3)))
    with see.probe("hidden (1, 6, 2), one row of 4 real tokens"):
        mean(1, 6, 2, F.pad(rows(4), (0, 2)))
    with see.probe("hidden (4, 1, 3), one token in each row"):
        mean(4, 1, 3, rows(1, 1, 1, 1))
    with see.probe("hidden (5, 5, 5), every axis as long"):
        mean(5, 5, 5, rows(3, 5, 1, 4, 2))
    with see.probe("hidden (3, 9, 4), real tokens anywhere in the row; the mask is bool"):
        mask = see.rand(3, 9) < 0.5
        mask[:, 3] = True
        mean(3, 9, 4, mask)
    with see.probe("hidden (2, 7, 3), padding in front; the mask is int64"):
        mean(2, 7, 3, rows(4, 7).flip(1))
    with see.probe("hidden (3, 5, 2), hidden and the mask are float64"):
        mean(3, 5, 2, rows(2, 5, 4).double())
    for dtype, of_mask, within in (
        (torch.float32, torch.int64, 1e-5),
        (torch.float32, torch.float64, 1e-5),
        (torch.bfloat16, torch.int64, 0.05),
        (torch.float16, torch.bool, 0.01),
    ):
        kinds = [str(kind).removeprefix("torch.") for kind in (dtype, of_mask)]
        with see.probe(f"hidden (2, 5, 3) is {kinds[0]}; the mask is {kinds[1]}"):
            hidden, mask = see.randn(2, 5, 3).to(dtype), rows(5, 2).to(of_mask)
            kept = mask.clone()
            out = masked_mean(hidden, mask)
            see("the dtype of the mean", out.dtype)
            exact = reference.masked_mean(hidden.double(), mask)
            right = out.shape == exact.shape
            right = right and torch.allclose(out.double(), exact, rtol=0, atol=within)
            see.fact(f"the mean is that of float64, within {within:g}", right)
            see.fact("the mask: the inputs are left unmodified", torch.equal(mask, kept))


def _mean_of_all(hidden, mask):
    return hidden.mean(dim=1)


def _mean_with(
    weights_of=lambda mask: mask,
    total=lambda weighted: weighted.sum(dim=1),
    count=lambda weights: weights.sum(dim=1),
):
    """The masked mean with another mask, another sum or another divisor."""

    def masked_mean(hidden, mask):
        weights = weights_of(mask).to(hidden.dtype)[..., None]
        return total(hidden * weights) / count(weights)

    return masked_mean


_mean_by_n = _mean_with(total=lambda weighted: weighted.mean(dim=1), count=lambda weights: 1.0)
_mean_sum = _mean_with(count=lambda weights: 1.0)
_mean_by_all_tokens = _mean_with(count=lambda weights: weights.sum())
_mean_by_first = _mean_with(count=lambda weights: weights[0].sum())
_mean_by_longest = _mean_with(count=lambda weights: weights.sum(dim=1).max())
_mean_by_root = _mean_with(count=lambda weights: weights.sum(dim=1).sqrt())
_mean_one_more = _mean_with(count=lambda weights: weights.sum(dim=1) + 1)
_mean_of_padding = _mean_with(weights_of=lambda mask: 1 - mask.long())
_mean_first_mask = _mean_with(weights_of=lambda mask: mask[:1].expand_as(mask))
_mean_by_count_of_places = _mean_with(
    weights_of=lambda mask: torch.arange(mask.shape[1]) < mask.long().sum(dim=1, keepdim=True)
)
_mean_keepdim = _mean_with(
    total=lambda weighted: weighted.sum(dim=1, keepdim=True),
    count=lambda weights: weights.sum(dim=1, keepdim=True),
)
_mean_without_first = _mean_with(
    weights_of=lambda mask: mask.long() * (torch.arange(mask.shape[1]) > 0)
)
_mean_epsilon = _mean_with(count=lambda weights: weights.sum(dim=1) + 1e-3)


def _mean_indexed_by_numbers(hidden, mask):
    """`row[mask]` of an int64 mask takes rows 0 and 1, again and again."""
    return torch.stack([row[m].mean(dim=0) for row, m in zip(hidden, mask, strict=True)])


def _mean_tilde(hidden, mask):
    """~ of 1 is −2 and of 0 is −1: both count as true."""
    hidden = hidden.masked_fill((~mask).bool()[..., None], 0.0)
    return hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _mean_squeezed(hidden, mask):
    return reference.masked_mean(hidden, mask).squeeze()


def _mean_over_features(hidden, mask):
    return hidden.mean(dim=2)


def _mean_over_batch(hidden, mask):
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(dim=0) / weights.sum(dim=0)


def _mean_of_the_first_token(hidden, mask):
    return hidden[:, 0]


def _mean_of_the_last_token(hidden, mask):
    return hidden[torch.arange(len(hidden)), mask.long().sum(dim=1) - 1]


def _mean_largest(hidden, mask):
    return hidden.masked_fill(mask[..., None] == 0, -math.inf).max(dim=1).values


def _mean_median(hidden, mask):
    return hidden.masked_fill(mask[..., None] == 0, math.nan).nanmedian(dim=1).values


def _mean_not_zero(hidden, mask):
    """Divides by what the sum over features finds different from zero: n, almost always."""
    hidden = hidden * mask[..., None]
    return hidden.sum(dim=1) / (hidden != 0).any(dim=0).sum(dim=0)


def _mean_mask_without_axis(hidden, mask):
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def _mean_divisor_without_axis(hidden, mask):
    return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1)


def _mean_detached(hidden, mask):
    with torch.no_grad():
        return reference.masked_mean(hidden, mask)


def _mean_in_place(hidden, mask):
    with torch.no_grad():
        hidden[mask == 0] = 0.0
    return hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _mean_float64(hidden, mask):
    weights = mask.double()[..., None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _mean_flattened(hidden, mask):
    return (hidden * mask[..., None]).sum() / mask.sum()


def _mean_einsum(hidden, mask):
    weights = mask.to(hidden.dtype)
    return torch.einsum("bn,bnd->bd", weights / weights.sum(dim=1, keepdim=True), hidden)


def _mean_loop(hidden, mask):
    return torch.stack([h[m.bool()].mean(dim=0) for h, m in zip(hidden, mask, strict=True)])


def _mean_nan(hidden, mask, dim=1):
    return hidden.masked_fill((mask == 0).unsqueeze(-1), math.nan).nanmean(dim=dim)


def _mean_float32(hidden, mask):
    expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
    return torch.sum(hidden * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)


def _mean_mask_as_it_is(hidden, mask):
    return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _mean_mask_divided(hidden, mask):
    weights = mask.to(hidden.dtype)
    weights /= weights.sum(dim=1, keepdim=True)
    return (hidden * weights[..., None]).sum(dim=1)


def _mean_sentence_transformers(hidden, mask):
    expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
    mean = torch.sum(hidden * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
    return mean.to(hidden.dtype)


class _MeanModule(nn.Module):
    def forward(self, hidden, mask):
        weights = mask / mask.sum(dim=-1, keepdim=True)
        return (weights.to(hidden).unsqueeze(1) @ hidden).squeeze(1)


def _mean_by_bool_weights(hidden, mask):
    hidden = torch.where(mask.bool()[:, :, None], hidden, torch.zeros_like(hidden))
    return hidden.sum(1) / mask.bool().sum(1, keepdim=True)


MASKED_MEAN = Exercise(
    slug="masked_mean",
    chapter=4,
    title="The mean of the real tokens",
    minutes=10,
    difficulty=2,
    reference=reference.masked_mean,
    observe=_observe_masked_mean,
    rtol=2e-6,  # some weights are float32, some divisors have an epsilon of 1e-6
    atol=1e-6,
    misconceptions=(
        Misconception(
            "padding_included",  # museum 4.2
            _mean_of_all,
            "You take the mean of all places. The vectors at padding are in it, and the more of "
            "them, the longer the longest text of the batch is.",
        ),
        Misconception(
            "divided_by_n",  # museum 4.2
            _mean_by_n,
            "You leave the padding out of the sum and divide by the padded length all the same. "
            "Every row is too small by the ratio of its real tokens to n.",
        ),
        Misconception(
            "not_divided",
            _mean_sum,
            "You return the sum of the real tokens. Long texts then have long vectors; divide by "
            "how many there are.",
        ),
        Misconception(
            "divided_by_all_tokens",
            _mean_by_all_tokens,
            "You divide by the number of real tokens in the whole batch. Each row is divided by "
            "its own number.",
        ),
        Misconception(
            "divided_by_the_first_row",
            _mean_by_first,
            "You divide every row by the number of real tokens in the first. Each row has its own "
            "number.",
        ),
        Misconception(
            "divided_by_the_longest",
            _mean_by_longest,
            "You divide every row by the number of real tokens in the longest. Each row has its "
            "own number.",
        ),
        Misconception(
            "divided_by_the_root",
            _mean_by_root,
            "You divide by the square root of the number of real tokens. A mean is divided by the "
            "number itself.",
        ),
        Misconception(
            "one_too_many",
            _mean_one_more,
            "You divide by one more than there are real tokens. Every row has at least one, so "
            "there is nothing to protect against.",
        ),
        Misconception(
            "large_epsilon",
            _mean_epsilon,
            "What you add to the divisor is large enough to be seen in the result. Every row "
            "has at least one real token, so nothing is needed there.",
        ),
        Misconception(
            "mask_inverted",  # museum 4.1
            _mean_of_padding,
            "You average the padding. The mask is 1 at real tokens; where there is no padding you "
            "divide 0 by 0.",
        ),
        Misconception(
            "first_mask_for_all",
            _mean_first_mask,
            "You use the first row's mask for every row. Each row has its own.",
        ),
        Misconception(
            "counted_from_the_front",
            _mean_by_count_of_places,
            "You count the ones of the mask and take as many places from the front. The mask says "
            "which places count; they need not stand first.",
        ),
        Misconception(
            "without_the_first_token",
            _mean_without_first,
            "You leave out the first token. [CLS] is a real token and its mask is 1: every place "
            "with a 1 counts.",
        ),
        Misconception(
            "indexed_with_numbers",
            _mean_indexed_by_numbers,
            "You index with the mask as it is. With booleans that selects; with integers, 0 and 1, "
            "it takes the tokens 0 and 1 over and over.",
        ),
        Misconception(
            "tilde_of_integers",
            _mean_tilde,
            "You invert the mask with ~. Of booleans that is right; of the integers 1 and 0 it "
            "makes −2 and −1, which both count as true.",
        ),
        Misconception(
            "over_the_features",
            _mean_over_features,
            "You average over the features. The mean runs over the tokens, the second axis, and "
            "leaves (batch, d_model).",
        ),
        Misconception(
            "over_the_batch",
            _mean_over_batch,
            "You average over the batch, so that texts are mixed with one another. The mean runs "
            "over the tokens, the second axis.",
        ),
        Misconception(
            "one_number_for_all",
            _mean_flattened,
            "You return one number for the whole batch. The mean runs over the tokens, the second "
            "axis, and leaves (batch, d_model).",
        ),
        Misconception(
            "first_token",
            _mean_of_the_first_token,
            "You return the first token's vector. That is the other way to get one vector for a "
            "text; here it is the mean of all real tokens.",
        ),
        Misconception(
            "last_token",  # museum 4.3
            _mean_of_the_last_token,
            "You return the last real token's vector. What is wanted is the mean of all of them.",
        ),
        Misconception(
            "largest_values",
            _mean_largest,
            "You take the largest value of each feature. What is wanted is the mean over the real "
            "tokens.",
        ),
        Misconception(
            "median",
            _mean_median,
            "You take the median of each feature. What is wanted is the mean over the real tokens.",
        ),
        Misconception(
            "counts_what_is_not_zero",
            _mean_not_zero,
            "You divide by the number of places at which some row of the batch is not zero. Each "
            "row is divided by the number of ones in its own mask.",
        ),
        Misconception(
            "mask_without_its_axis",  # museum 4.4
            _mean_mask_without_axis,
            "Your mask (batch, n) is multiplied with (batch, n, d_model) as it is, which lines its "
            "n up with d_model: an error, unless the sizes agree, and then it is wrong without "
            "one. Give it a third axis of size 1.",
        ),
        Misconception(
            "divisor_without_its_axis",
            _mean_divisor_without_axis,
            "You divide (batch, d_model) by the numbers of tokens (batch,), which lines the batch "
            "up with d_model: an error, unless they agree, and then it is wrong without one. Keep "
            "an axis of size 1.",
        ),
        Misconception(
            "axis_kept",
            _mean_keepdim,
            "Your result is (batch, 1, d_model). The axis of the tokens should be gone.",
        ),
        Misconception(
            "squeezed",
            _mean_squeezed,
            "You squeeze the result. That removes every axis of size 1, also a batch of one text; "
            "name the axis to be removed.",
        ),
        Misconception(
            "cut_off",
            _mean_detached,
            "Your mean is computed without a graph, so that no gradient reaches the encoder: it "
            "would stay as it is.",
        ),
        Misconception(
            "hidden_changed",
            _mean_in_place,
            "You write zeros into the caller's hidden vectors. Others read them too; multiply with "
            "the mask instead, which makes a new tensor.",
        ),
        Misconception(
            "always_float64",
            _mean_float64,
            "Your mean is float64 also where hidden is float32, and the next layer refuses it. "
            "Give the mask the dtype of hidden.",
        ),
        Misconception(
            "always_float32",
            _mean_float32,
            "Your mean is float32 where hidden is bfloat16 or float16, because the mask was made "
            "float32 by `.float()`. The next layer refuses it; give the mask the dtype of hidden.",
        ),
        Misconception(
            "dtype_of_the_mask",
            _mean_mask_as_it_is,
            "Your mean is float64 where hidden is float32 and the mask float64: you compute with "
            "the mask in its own dtype. The mean has the dtype of hidden, whatever the mask has.",
        ),
        Misconception(
            "mask_changed",
            _mean_mask_divided,
            "You change the caller's mask where it has the dtype of hidden already: `.to` then "
            "returns the very tensor, not a copy. Make a new one, out of place.",
        ),
    ),
    alternatives=(
        _mean_einsum,
        _mean_loop,
        _mean_nan,
        _mean_sentence_transformers,
        _MeanModule(),
        _mean_by_bool_weights,
    ),
    hints=(
        "A mean is a sum and a number to divide it by. Padding must be kept out of both.",
        "Multiply each token's vector with its mask, 1 or 0, before you add them up. For that the "
        "mask needs a third axis of size 1, so that one number serves all features.",
        "`weights = mask.to(hidden.dtype)[..., None]` is (batch, n, 1). Then both sums run over "
        "dim 1: (batch, d_model) divided by (batch, 1) fits.",
    ),
)


# --- SequenceClassifier -------------------------------------------------------------------------

_HEAD = ("pooler.weight", "pooler.bias", "classifier.weight", "classifier.bias")


def _observe_sequence_classifier(SequenceClassifier, see):
    def make(d_model, num_labels, pooler=False, vocab_size=14, **options):
        """A classifier of known weights, behind an encoder of known weights."""
        encoder = _Encoder(see, vocab_size, d_model, pooler)
        encoder.pooler = nn.Tanh() if pooler else None  # as Hugging Face's have one, or None
        encoder.dropout = nn.Dropout(0.25)  # only looked at
        before, seed = left_alone(encoder), torch.initial_seed()
        model = SequenceClassifier(encoder, num_labels, **options)
        see.fact("what it makes is an nn.Module", isinstance(model, nn.Module))
        see.fact("torch's random numbers are not seeded", torch.initial_seed() == seed)
        training = model.training and all(module.training for module in encoder.modules())
        see.fact("the model is made in training mode, and its encoder stays in it", training)
        same = left_alone(encoder) == before
        see.fact("the encoder's layers and its configuration are left as they were", same)
        found = dict(model.named_parameters())
        names = {*_HEAD, *(f"encoder.{name}" for name, _ in encoder.named_parameters())}
        for kind, some in (("missing", names - set(found)), ("further", set(found) - names)):
            see(f"the list of its {kind} parameters", ", ".join(sorted(some)) or "none")
        frozen = [name for name in sorted(names) if not found[name].requires_grad]
        see("the list of its parameters with requires_grad=False", ", ".join(frozen) or "none")
        see.fact("its encoder is the one that was given", model.encoder is encoder)
        for name in _HEAD:
            see(f"its parameter {name}", torch.zeros_like(found[name], requires_grad=True))
        model.double()
        with torch.no_grad():
            for name in _HEAD:
                found[name].copy_(see.randn(*found[name].shape) / math.sqrt(d_model / 2))
        return model

    def left_alone(encoder):
        layers = [(name, type(layer)) for name, layer in encoder.named_modules()]
        return layers, dict(vars(encoder.config)), encoder.dropout.p

    def judged(model, *inputs, **named):
        logits = see.call("the logits", model, *inputs, **named)
        names = (*_HEAD, "encoder.words.weight", "encoder.mix.weight")
        found = dict(model.named_parameters())
        see.gradients("the logits", logits, **{f"the parameter {n}": found[n] for n in names})

    def refused(pooling):
        model = None
        try:
            model = SequenceClassifier(_Encoder(see, 9, 4), 2, pooling=pooling)
            model.double()(*_ragged(see, 3, 2, vocab_size=9))
        except ValueError:
            return "ValueError" if model is None else "ValueError, in forward"
        except Exception as error:
            return type(error).__name__
        return "nothing is raised"

    with see.probe("pooling by default, 3 texts of 5, 2 and 4 tokens, 2 labels, in eval mode"):
        model = make(6, 2).eval()
        judged(model, *_ragged(see, 5, 2, 4))
        see.call("the logits of other texts", model, *_ragged(see, 5, 2, 4))
    with see.probe("pooling 'mean', 3 texts of 3, 6 and 2 tokens, 4 labels, in eval mode"):
        judged(make(5, 4, pooling="mean").eval(), *_ragged(see, 3, 6, 2))
    with see.probe("pooling 'cls', pairs of 7 and 4 tokens with token types, 3 labels"):
        ids, mask = _ragged(see, 7, 4)
        types = (torch.arange(7) >= torch.tensor([[3], [2]])).long() * mask
        judged(make(4, 3, pooling="cls").eval(), ids, mask, types)
    with see.probe("pooling 'mean', pairs of 6, 5 and 3 tokens; the inputs given by name"):
        ids, mask = _ragged(see, 6, 5, 3)
        types = (torch.arange(6) >= torch.tensor([[2], [4], [1]])).long() * mask
        named = {"token_type_ids": types, "attention_mask": mask, "input_ids": ids}
        judged(make(7, 2, pooling="mean").eval(), **named)
    with see.probe("pooling 'cls', an encoder with a pooler of its own, 3 labels"):
        judged(make(6, 3, pooler=True).eval(), *_ragged(see, 2, 5))
    with see.probe("pooling 'mean', an encoder with a pooler of its own, 2 labels"):
        judged(make(4, 2, pooler=True, pooling="mean").eval(), *_ragged(see, 6, 1, 3, 4))
    with see.probe("pooling 'mean', real tokens of id 0, padding of id 9, in eval mode"):
        ids, mask = _ragged(see, 3, 6, 4)
        ids[0, 1] = ids[1, 3] = ids[1, 5] = 0
        judged(make(5, 3, pooling="mean").eval(), ids + 9 * (1 - mask), mask)
    with see.probe("pooling 'mean', one text whose mask has a gap, in eval mode"):
        ids, mask = see.randint(1, 14, 1, 6), torch.tensor([[1, 1, 0, 1, 1, 0]])
        judged(make(4, 2, pooling="mean").eval(), ids, mask)
    with see.probe("pooling 'mean', three calls: with token types, without, longer without"):
        model, (ids, mask) = make(4, 3, pooling="mean").eval(), _ragged(see, 3, 5)
        see.call("the first logits", model, ids, mask, (torch.arange(5) > 1).long() * mask)
        see.call("the second logits", model, *_ragged(see, 5, 4))
        see.call("the third logits", model, *_ragged(see, 8, 3))
    with see.probe("one text of 4 tokens, 1 label, in eval mode"):
        judged(make(5, 1).eval(), *_ragged(see, 4))
    with see.probe("4 texts of 4 tokens at most, d_model 4, 4 labels: every axis as long"):
        judged(make(4, 4).eval(), *_ragged(see, 4, 2, 1, 3))
    with see.probe("dropout 0.0, pooling 'mean', in training mode"):
        judged(make(6, 2, pooling="mean", dropout=0.0).train(), *_ragged(see, 4, 7, 2))
    for share, given in ((0.1, {}), (0.3, {"dropout": 0.3, "pooling": "mean"})):
        name = f"dropout {share}" + ("" if given else ", by default")
        with see.probe(f"{name}: 40 texts, 12 features, classifier the identity"):
            model = make(12, 12, **given)
            with torch.no_grad():
                model.classifier.weight.copy_(torch.eye(12))
                model.classifier.bias.fill_(3.0)
            ids, mask = _ragged(see, *(2 + k % 4 for k in range(40)))
            whole = see.call("the logits in eval mode", model.eval(), ids, mask).detach() - 3
            drawn = [model.train()(ids, mask).detach() - 3 for _ in range(2)]
            stays = all(module.training for module in model.encoder.modules())
            see.fact("the encoder stays in training mode when it is called", stays)
            gone = [(d.abs() < 1e-9) for d in drawn]
            see.fact("two calls in training mode differ", (drawn[0] != drawn[1]).any())
            see.fact("no logit itself is dropped", all((d != -3).all() for d in drawn))
            values, counts = drawn[0].unique(return_counts=True)
            often = values[counts > 8].abs() < 1e-9
            see.fact("no other value than 0 stands in place of what is dropped", often.all())
            see.fact("some features are dropped", all(g.any() for g in gone))
            part = [(g.any(d) & ~g.all(d)).any() for g in gone for d in (0, 1)]
            see.fact("neither whole texts are dropped nor a feature of all texts", all(part))
            both = ~gone[0] & ~gone[1]
            same = (drawn[0] - drawn[1])[both].abs() < 1e-9
            see.fact("what is not dropped is the same in two calls", same.all())
            enlarged = (drawn[0] - whole)[both].abs() > 1e-9
            see.fact("what is not dropped is not as it is in eval mode", enlarged.any())
            kept = [(d - whole / (1 - share)).abs() < 1e-6 for d in drawn]
            either = all((g | k).all() for g, k in zip(gone, kept, strict=True))
            rule = "in training mode each feature that the classifier gets is 0 or divided by 1 − p"
            see.fact(rule, either)
            dropped = _likely(sum(g.sum() for g in gone), 2 * gone[0].numel(), share)
            see.fact(f"in training mode about {100 * share:.0f} % of them are 0", dropped)
            see("the logits in eval mode again", model.eval()(ids, mask).detach())
    with see.probe("pooling 'max', which there is not"):
        see("what it raises", refused("max"))
    with see.probe("pooling '', which there is not"):
        see("what it raises", refused(""))
    with see.probe("pooling 'CLS', and 'Mean', which there are not"):
        see("what 'CLS' raises", refused("CLS"))
        see("what 'Mean' raises", refused("Mean"))


class _Head(nn.Module):
    """The classifier in parts, for variants that replace one of them."""

    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(pooling)
        self.build(encoder, encoder.config.hidden_size, num_labels)
        self.dropout, self.pooling = nn.Dropout(dropout), pooling

    def build(self, encoder, d_model, num_labels):
        self.encoder = encoder
        self.pooler = nn.Linear(d_model, d_model)
        self.classifier = nn.Linear(d_model, num_labels)

    def encode(self, ids, mask, types):
        return self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=types)

    def one(self, hidden, mask):
        return hidden[:, 0] if self.pooling == "cls" else reference.masked_mean(hidden, mask)

    def head(self, one):
        return self.classifier(self.dropout(torch.tanh(self.pooler(one))))

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        outputs = self.encode(input_ids, attention_mask, token_type_ids)
        return self.head(self.one(outputs.last_hidden_state, attention_mask))


def _head(**methods):
    """`_Head` with some of its methods replaced."""
    return type("_HeadVariant", (_Head,), methods)


_head_no_mask = _head(
    encode=lambda self, ids, mask, types: self.encoder(input_ids=ids, token_type_ids=types)
)
_head_no_types = _head(
    encode=lambda self, ids, mask, types: self.encoder(input_ids=ids, attention_mask=mask)
)
_head_ids_alone = _head(encode=lambda self, ids, mask, types: self.encoder(ids))
_head_swapped = _head(encode=lambda self, ids, mask, types: self.encoder(ids, types, mask))
_head_no_grad = _head(
    encode=lambda self, ids, mask, types: _without_graph(self.encoder, ids, mask, types)
)
_head_last = _head(
    one=lambda self, hidden, mask: (
        hidden[:, -1] if self.pooling == "cls" else reference.masked_mean(hidden, mask)
    )
)
_head_last_real = _head(
    one=lambda self, hidden, mask: (
        hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]
        if self.pooling == "cls"
        else reference.masked_mean(hidden, mask)
    )
)
_head_first_row = _head(
    one=lambda self, hidden, mask: (
        hidden[0] if self.pooling == "cls" else reference.masked_mean(hidden, mask)
    )
)
_head_first_feature = _head(
    one=lambda self, hidden, mask: (
        hidden[:, :, 0] if self.pooling == "cls" else reference.masked_mean(hidden, mask)
    )
)
_head_every_token = _head(one=lambda self, hidden, mask: hidden)
_head_mean_of_all = _head(
    one=lambda self, hidden, mask: hidden[:, 0] if self.pooling == "cls" else hidden.mean(dim=1)
)
_head_mean_by_n = _head(
    one=lambda self, hidden, mask: (
        hidden[:, 0] if self.pooling == "cls" else (hidden * mask[..., None]).mean(dim=1)
    )
)
_head_largest = _head(
    one=lambda self, hidden, mask: (
        hidden[:, 0] if self.pooling == "cls" else hidden.max(dim=1).values
    )
)
_head_always_cls = _head(one=lambda self, hidden, mask: hidden[:, 0])
_head_always_mean = _head(one=lambda self, hidden, mask: reference.masked_mean(hidden, mask))
_head_exchanged = _head(
    one=lambda self, hidden, mask: (
        hidden[:, 0] if self.pooling == "mean" else reference.masked_mean(hidden, mask)
    )
)
_head_no_tanh = _head(head=lambda self, one: self.classifier(self.dropout(self.pooler(one))))
_head_tanh_first = _head(
    head=lambda self, one: self.classifier(self.dropout(self.pooler(torch.tanh(one))))
)
_head_relu = _head(
    head=lambda self, one: self.classifier(self.dropout(torch.relu(self.pooler(one))))
)
_head_gelu = _head(head=lambda self, one: self.classifier(self.dropout(F.gelu(self.pooler(one)))))
_head_no_pooler = _head(head=lambda self, one: self.classifier(self.dropout(one)))
_head_tanh_alone = _head(head=lambda self, one: self.classifier(self.dropout(torch.tanh(one))))
_head_no_dropout = _head(head=lambda self, one: self.classifier(torch.tanh(self.pooler(one))))
_head_dropout_first = _head(
    head=lambda self, one: self.classifier(torch.tanh(self.pooler(self.dropout(one))))
)
_head_dropout_in_tanh = _head(
    head=lambda self, one: self.classifier(torch.tanh(self.dropout(self.pooler(one))))
)
_head_dropout_on_logits = _head(
    head=lambda self, one: self.dropout(self.classifier(torch.tanh(self.pooler(one))))
)
_head_dropout_twice = _head(
    head=lambda self, one: self.classifier(self.dropout(torch.tanh(self.pooler(self.dropout(one)))))
)
_head_dropout_always = _head(
    head=lambda self, one: self.classifier(F.dropout(torch.tanh(self.pooler(one)), self.dropout.p))
)
_head_softmax = _head(head=lambda self, one: _Head.head(self, one).softmax(dim=-1))
_head_log_softmax = _head(head=lambda self, one: _Head.head(self, one).log_softmax(dim=-1))
_head_tanh_moved = _head(
    head=lambda self, one: torch.tanh(self.classifier(self.dropout(self.pooler(one))))
)
_head_mean_of_pooled = _head(
    forward=lambda self, input_ids, attention_mask, token_type_ids=None: self.classifier(
        self.dropout(
            self.one(
                torch.tanh(
                    self.pooler(
                        self.encode(input_ids, attention_mask, token_type_ids).last_hidden_state
                    )
                ),
                attention_mask,
            )
        )
    )
)
_head_first_places = _head(
    one=lambda self, hidden, mask: (
        hidden[:, 0]
        if self.pooling == "cls"
        else torch.stack([h[: m.sum()].mean(dim=0) for h, m in zip(hidden, mask, strict=True)])
    )
)
_head_mask_of_ids = _head(
    forward=lambda self, input_ids, attention_mask, token_type_ids=None: _Head.forward(
        self, input_ids, (input_ids != 0).long(), token_type_ids
    )
)
_head_not_scaled = _head(
    head=lambda self, one: self.classifier(
        torch.tanh(self.pooler(one))
        * (torch.rand(one.shape) >= (self.dropout.p if self.training else 0))
    )
)
_head_sigmoid = _head(head=lambda self, one: torch.sigmoid(_Head.head(self, one)))
_head_tanh_on_logits = _head(head=lambda self, one: torch.tanh(_Head.head(self, one)))
_head_classes = _head(head=lambda self, one: _Head.head(self, one).argmax(dim=-1))
_head_squeezed = _head(head=lambda self, one: _Head.head(self, one).squeeze())


def _without_graph(encoder, ids, mask, types):
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=mask, token_type_ids=types)


def _head_built(change, base=_Head):
    """`_Head` with something done after it was made."""

    class _Built(base):
        def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
            super().__init__(encoder, num_labels, pooling, dropout)
            change(self, encoder, num_labels)

    return _Built


def _hidden_in_a_list(self, encoder, num_labels):
    """A list hides the encoder from nn.Module, and with it its parameters."""
    del self.encoder
    self.encoders = [encoder]
    self.__dict__["encode"] = lambda ids, mask, types: encoder(
        input_ids=ids, attention_mask=mask, token_type_ids=types
    )


def _head_pooler_in_parts(self, encoder, num_labels):
    self.pooler = nn.Sequential(self.pooler, nn.Tanh())
    self.__dict__["head"] = lambda one: self.classifier(self.dropout(self.pooler(one)))


class _HeadOfACopy(_Head):
    def build(self, encoder, d_model, num_labels):
        super().build(copy.deepcopy(encoder), d_model, num_labels)


class _HeadSeeded(_Head):
    def build(self, encoder, d_model, num_labels):
        torch.manual_seed(0)
        super().build(encoder, d_model, num_labels)


class _HeadEvalEncoder(_Head):
    def encode(self, ids, mask, types):
        self.encoder.eval()
        return super().encode(ids, mask, types)


class _HeadAnyCase(_Head):
    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        super().__init__(encoder, num_labels, pooling.lower(), dropout)


class _HeadRefusesLate(_Head):
    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        super().__init__(encoder, num_labels, dropout=dropout)
        self.pooling = pooling

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        if self.pooling not in ("cls", "mean"):
            raise ValueError(self.pooling)
        return super().forward(input_ids, attention_mask, token_type_ids)


_head_pooler_of_parts = _head_built(_head_pooler_in_parts)
_head_made_in_eval_mode = _head_built(lambda self, encoder, _: self.eval())
_head_frozen = _head_built(lambda self, encoder, _: encoder.requires_grad_(False))
_head_encoder_hidden = _head_built(_hidden_in_a_list)
_head_two_labels = _head_built(
    lambda self, encoder, _: setattr(self, "classifier", nn.Linear(encoder.config.hidden_size, 2))
)
_head_768 = _head_built(lambda self, encoder, n: self.build(encoder, 768, n))
_head_dropout_fixed = _head_built(
    lambda self, encoder, _: setattr(self, "dropout", nn.Dropout(0.1))
)
_head_dropout_kept_share = _head_built(
    lambda self, encoder, _: setattr(self, "dropout", nn.Dropout(1 - self.dropout.p))
)
_head_half = _head_built(
    lambda self, encoder, _: setattr(
        self, "dropout", nn.Dropout(0.5 if self.dropout.p == 0.1 else self.dropout.p)
    )
)


class _HeadOfTheEncodersPooler(_Head):
    """Takes the encoder's pooled output for the first token's vector."""

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        outputs = self.encode(input_ids, attention_mask, token_type_ids)
        if self.pooling == "mean" or outputs.pooler_output is None:
            return self.head(self.one(outputs.last_hidden_state, attention_mask))
        return self.classifier(self.dropout(outputs.pooler_output))


class _HeadAnything(_Head):
    """Takes every pooling but "cls" for the mean."""

    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        super().__init__(encoder, num_labels, "cls" if pooling == "cls" else "mean", dropout)


class _HeadAsserts(_Head):
    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        assert pooling in ("cls", "mean")
        super().__init__(encoder, num_labels, pooling, dropout)


class _HeadMeanByDefault(_Head):
    def __init__(self, encoder, num_labels, pooling="mean", dropout=0.1):
        super().__init__(encoder, num_labels, pooling, dropout)


class _HeadTypesRequired(_Head):
    def forward(self, input_ids, attention_mask, token_type_ids):
        return super().forward(input_ids, attention_mask, token_type_ids)


class _HeadWithLoss(_Head):
    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        logits = super().forward(input_ids, attention_mask, token_type_ids)
        return {"loss": None, "logits": logits}


class _ClassifierByPosition(nn.Module):
    """Positions instead of keywords, einsum for the mean, functional dropout and tanh."""

    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1, verbose=False):
        nn.Module.__init__(self)
        self.encoder, self.p, self.kind = encoder, dropout, pooling
        self.scale = torch.ones(3)
        width = encoder.config.hidden_size
        self.classifier = nn.Linear(width, num_labels, bias=True)
        self.pooler = nn.Linear(in_features=width, out_features=width)
        if pooling not in {"mean", "cls"}:
            raise ValueError("there are two poolings, cls and mean")

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **further):
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)[0]
        if self.kind == "mean":
            weights = attention_mask / attention_mask.sum(dim=1, keepdim=True)
            one = torch.einsum("bn,bnd->bd", weights.to(hidden.dtype), hidden)
        else:
            one = hidden.select(1, 0)
        pooled = F.dropout(self.pooler(one).tanh(), self.p, training=self.training)
        return F.linear(pooled, self.classifier.weight, self.classifier.bias)


class _ClassifierByName(nn.Module):
    """Refuses by a dict, reads the output by name, registers a buffer and modules more."""

    def __init__(self, encoder, num_labels, pooling="cls", dropout=0.1):
        super().__init__()
        self.encoder = encoder
        self.num_labels = num_labels
        self.register_buffer("calls", torch.tensor(0))
        self.pooler = nn.Linear(encoder.config.hidden_size, encoder.config.hidden_size)
        self.activation, self.drop = nn.Tanh(), nn.Dropout(p=dropout, inplace=False)
        self.classifier = nn.Linear(self.pooler.out_features, num_labels)
        self.pool = {"cls": self.first, "mean": self.average}.get(pooling)
        if self.pool is None:
            raise ValueError("pooling: cls or mean")

    def first(self, hidden, mask):
        return hidden[:, 0, :]

    def average(self, hidden, mask):
        mask = mask.unsqueeze(-1).bool()
        return hidden.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids, **given)["last_hidden_state"]
        return self.classifier(
            self.drop(self.activation(self.pooler(self.pool(hidden, attention_mask))))
        )


def _classifier_by_factory(encoder, num_labels, pooling="cls", dropout=0.1):
    """A function that makes one, with both vectors worked out and one chosen."""
    if pooling != "cls" and pooling != "mean":
        raise ValueError(f"no pooling {pooling}")

    class Made(_Head):
        def one(self, hidden, mask):
            both = {"cls": hidden[:, 0], "mean": reference.masked_mean(hidden, mask.bool())}
            return both[pooling]

    return Made(encoder, num_labels, dropout=dropout)


SEQUENCE_CLASSIFIER = Exercise(
    slug="sequence_classifier",
    chapter=4,
    title="A pretrained encoder with a new head",
    minutes=20,
    difficulty=3,
    reference=reference.SequenceClassifier,
    observe=_observe_sequence_classifier,
    rtol=1e-5,  # some average with float32 weights
    atol=1e-6,
    misconceptions=(
        Misconception(
            "mask_not_passed_on",  # museum F12, 4.1
            _head_no_mask,
            "You do not give the attention mask to the encoder. It reads the padding like text, "
            "and a text's logits depend on how far it was padded.",
        ),
        Misconception(
            "types_not_passed_on",  # museum 4.6
            _head_no_types,
            "The token types do not reach the encoder. Both texts of a pair are then one to it, "
            "without any error.",
        ),
        Misconception(
            "ids_alone",  # museum 4.1, 4.6
            _head_ids_alone,
            "You give the encoder the ids alone. It reads padding like text and takes a pair for "
            "one text; the mask and the types go with the ids.",
        ),
        Misconception(
            "mask_and_types_exchanged",
            _head_swapped,
            "You give the encoder mask and types in the wrong order. Both are integers of one "
            "shape, so nothing is raised; pass them by name.",
        ),
        Misconception(
            "encoder_without_graph",
            _head_no_grad,
            "No gradient reaches the encoder: you run it without a graph or detach what it "
            "returns. Only the head is then trained; here the whole learns.",
        ),
        Misconception(
            "encoder_frozen",
            _head_frozen,
            "You freeze the encoder's parameters. Only the head is then trained; whether to freeze "
            "is for whoever trains the model.",
        ),
        Misconception(
            "encoder_not_registered",
            _head_encoder_hidden,
            "The encoder is not an attribute `encoder` of the module itself, so its parameters are "
            "missing from the list: no optimizer moves them, no file keeps them.",
        ),
        Misconception(
            "encoder_copied",
            _HeadOfACopy,
            "You keep a copy of the encoder. The one that was given then learns nothing, and the "
            "memory is taken twice; keep the encoder itself.",
        ),
        Misconception(
            "encoder_in_eval_mode",
            _HeadEvalEncoder,
            "You switch the encoder to eval mode whenever it is called. Its own dropout is then "
            "off in training too; which mode is on is for whoever trains the model.",
        ),
        Misconception(
            "made_in_eval_mode",
            _head_made_in_eval_mode,
            "You switch the model, or the encoder in it, to eval mode when it is made. A module "
            "starts in training mode; which mode is on is for whoever trains the model.",
        ),
        Misconception(
            "seeded_inside",
            _HeadSeeded,
            "You seed torch's random numbers inside the class. The caller's own seed is undone, "
            "and every new head starts with the same weights.",
        ),
        Misconception(
            "mask_of_the_ids",
            _head_mask_of_ids,
            "You make a mask of your own, 1 where the id is not 0. Padding may have another id, "
            "and 0 may be a token; the attention mask that is given knows.",
        ),
        Misconception(
            "last_place_for_cls",  # museum 4.3
            _head_last,
            "You take the vector at the last place, [:, -1]. In a padded row that is padding; "
            "[CLS] stands at place 0.",
        ),
        Misconception(
            "last_token_for_cls",  # museum 4.3
            _head_last_real,
            "You take the last real token's vector, that of [SEP]. [CLS] stands at place 0.",
        ),
        Misconception(
            "first_text_for_cls",  # museum 4.4
            _head_first_row,
            "You take [0], all the vectors of the batch's first text. The first token of every "
            "text is at place 0 of the second axis.",
        ),
        Misconception(
            "first_feature_for_cls",  # museum 4.4
            _head_first_feature,
            "You take place 0 of the last axis, one feature of every token. The first token is at "
            "place 0 of the second axis.",
        ),
        Misconception(
            "every_token_classified",
            _head_every_token,
            "You put every token's vector through the head and return logits for each. A text gets "
            "one vector first, and one row of logits.",
        ),
        Misconception(
            "mean_with_padding",  # museum 4.2
            _head_mean_of_all,
            "Your mean includes the padding. Only real tokens count: `masked_mean` with the "
            "attention mask.",
        ),
        Misconception(
            "mean_divided_by_n",  # museum 4.2
            _head_mean_by_n,
            "Your mean leaves the padding out of the sum and divides by the padded length. Divide "
            "by the number of real tokens, as `masked_mean` does.",
        ),
        Misconception(
            "first_places_for_mean",
            _head_first_places,
            "You count the real tokens of a row and average as many places from its beginning. "
            "Where the mask has a gap those are other tokens; average where the mask is 1.",
        ),
        Misconception(
            "mean_after_the_pooler",
            _head_mean_of_pooled,
            "You put each token's vector through the pooler and the tanh, and average after that. "
            "The mean comes first, so that there is one vector, and then the pooler; a tanh of a "
            "mean is not the mean of tanhs.",
        ),
        Misconception(
            "largest_for_mean",
            _head_largest,
            "For 'mean' you take the largest value of each feature. It is the mean over the real "
            "tokens that is wanted.",
        ),
        Misconception(
            "always_cls",
            _head_always_cls,
            "You take the first token's vector whatever `pooling` says. 'mean' is the mean over "
            "the real tokens.",
        ),
        Misconception(
            "always_mean",
            _head_always_mean,
            "You take the mean whatever `pooling` says. 'cls' is the first token's vector.",
        ),
        Misconception(
            "poolings_exchanged",
            _head_exchanged,
            "You take the mean for 'cls' and the first token for 'mean': the two are exchanged.",
        ),
        Misconception(
            "mean_by_default",
            _HeadMeanByDefault,
            "Your default for `pooling` is 'mean'. As the signature says, it is 'cls'.",
        ),
        Misconception(
            "no_tanh",  # museum C23
            _head_no_tanh,
            "There is no tanh after the pooler. Two linear layers in a row are one linear layer; "
            "the tanh between them makes the pooler more than that.",
        ),
        Misconception(
            "tanh_before_the_pooler",
            _head_tanh_first,
            "Your tanh comes before the pooler. It comes after it: tanh(pooler(vector)).",
        ),
        Misconception(
            "tanh_moved_to_the_end",
            _head_tanh_moved,
            "Your tanh comes after the classifier, on the logits. It belongs between the pooler "
            "and the dropout, and the logits may be of any size.",
        ),
        Misconception(
            "pooler_in_parts",
            _head_pooler_of_parts,
            "Your `pooler` is an nn.Sequential of the linear layer and the tanh. Its parameters "
            "are then called pooler.0.weight and pooler.0.bias, and stored weights do not fit: "
            "`pooler` is the nn.Linear alone, and the tanh comes in forward.",
        ),
        Misconception(
            "relu",
            _head_relu,
            "You use ReLU after the pooler. BERT's pooler has a tanh there.",
        ),
        Misconception(
            "gelu",
            _head_gelu,
            "You use GELU after the pooler. The encoder's layers have that inside; its pooler has "
            "a tanh.",
        ),
        Misconception(
            "no_pooler",  # museum C23
            _head_no_pooler,
            "You classify the encoder's vector as it is. Between the two stands the pooler, a "
            "linear layer with a tanh.",
        ),
        Misconception(
            "tanh_without_a_pooler",
            _head_tanh_alone,
            "You put the encoder's vector through the tanh, but not through the pooler. The linear "
            "layer comes first, then the tanh.",
        ),
        Misconception(
            "the_encoders_pooler",  # museum C23
            _HeadOfTheEncodersPooler,
            "You use the encoder's own pooled output where it has one. The head's pooler is yours, "
            "and reads `last_hidden_state`.",
        ),
        Misconception(
            "no_dropout",
            _head_no_dropout,
            "There is no dropout before the classifier. In training mode a share of its inputs is "
            "set to 0.",
        ),
        Misconception(
            "dropout_before_the_pooler",
            _head_dropout_first,
            "Your dropout comes before the pooler. It comes right before the classifier, on what "
            "the tanh returns.",
        ),
        Misconception(
            "dropout_before_the_tanh",
            _head_dropout_in_tanh,
            "Your dropout comes between pooler and tanh, so that what is kept and enlarged is bent "
            "by the tanh again. It comes right before the classifier.",
        ),
        Misconception(
            "dropout_not_scaled",
            _head_not_scaled,
            "You set a share p of the features to 0 and leave the rest as it is. What is kept is "
            "divided by 1 − p, so that the classifier gets as much on average in training as in "
            "eval mode.",
        ),
        Misconception(
            "dropout_on_the_logits",
            _head_dropout_on_logits,
            "You drop logits. A class whose logit is set to 0 is neither likely nor unlikely; "
            "dropout comes right before the classifier.",
        ),
        Misconception(
            "dropout_twice",
            _head_dropout_twice,
            "You drop features before the pooler and again before the classifier. Once is asked "
            "for, right before the classifier.",
        ),
        Misconception(
            "dropout_in_eval_mode_too",  # museum 4.10
            _head_dropout_always,
            "Your dropout goes on in eval mode, so that the same text gets other logits each time. "
            "`F.dropout` needs to be told `training=self.training`; nn.Dropout knows.",
        ),
        Misconception(
            "dropout_by_heart",
            _head_dropout_fixed,
            "Your dropout is 0.1 whatever the argument says. 0.1 is its default.",
        ),
        Misconception(
            "dropout_half_by_default",
            _head_half,
            "Your dropout is 0.5 where none is given, as nn.Dropout has it. The default here is "
            "0.1.",
        ),
        Misconception(
            "share_that_is_kept",
            _head_dropout_kept_share,
            "You take the argument for the share that is kept. In torch it is the share that is "
            "dropped.",
        ),
        Misconception(
            "softmax_at_the_end",
            _head_softmax,
            "You return probabilities. Cross-entropy takes logits and does its own softmax; a "
            "second one makes all gradients small.",
        ),
        Misconception(
            "log_softmax_at_the_end",
            _head_log_softmax,
            "You return logarithms of probabilities. Cross-entropy would not mind, but asked for "
            "are the logits, as the classifier gives them.",
        ),
        Misconception(
            "sigmoid_at_the_end",
            _head_sigmoid,
            "You put the logits through a sigmoid. Cross-entropy takes them as they are.",
        ),
        Misconception(
            "tanh_at_the_end",
            _head_tanh_on_logits,
            "You put the logits through a tanh. They may be of any size; the tanh belongs after "
            "the pooler.",
        ),
        Misconception(
            "classes_instead_of_logits",
            _head_classes,
            "You return the most likely class. No gradient goes through argmax: return the logits.",
        ),
        Misconception(
            "squeezed",
            _head_squeezed,
            "You squeeze the logits. A batch of one text, or one label, loses its axis: the result "
            "is (batch, num_labels) always.",
        ),
        Misconception(
            "two_labels_by_heart",
            _head_two_labels,
            "Your classifier has two outputs whatever `num_labels` says. It has one for each "
            "label.",
        ),
        Misconception(
            "width_by_heart",
            _head_768,
            "Your head is 768 wide. That is one encoder's width; `encoder.config.hidden_size` says "
            "what this one has.",
        ),
        Misconception(
            "types_required",
            _HeadTypesRequired,
            "Your forward cannot be called without token types. They are None by default: a single "
            "text has none to give.",
        ),
        Misconception(
            "dict_instead_of_logits",
            _HeadWithLoss,
            "You return a dict, as the library's own models do. Here the logits alone are wanted.",
        ),
        Misconception(
            "any_pooling_taken",
            _HeadAnything,
            "You take any word for `pooling`, also a misspelled one, and go on with one of the two "
            "that there are. Raise a ValueError that names them.",
        ),
        Misconception(
            "assert_instead_of_value_error",
            _HeadAsserts,
            "You check the pooling with `assert`, which raises an AssertionError, and nothing at "
            "all under `python -O`. Raise a ValueError that says which there are.",
        ),
        Misconception(
            "any_case_taken",
            _HeadAnyCase,
            "You take `pooling` in any case, 'CLS' and 'Mean' too. There are two values, 'cls' and "
            "'mean' to the letter; raise a ValueError for all others.",
        ),
        Misconception(
            "refused_too_late",
            _HeadRefusesLate,
            "You refuse a wrong `pooling` when the model is called. Whoever made it then learns of "
            "the mistake much later and elsewhere; check in `__init__`.",
        ),
    ),
    alternatives=(_ClassifierByPosition, _ClassifierByName, _classifier_by_factory),
    hints=(
        "Five steps: encoder, one vector, pooler with tanh, dropout, classifier. The first three "
        "need to know d_model: `encoder.config.hidden_size`.",
        "The encoder returns an object; its `.last_hidden_state` is (batch, n, d_model). For 'cls' "
        "take the first token of every text, for 'mean' your `masked_mean` with the attention "
        "mask. Give the encoder all three inputs by name.",
        "`hidden[:, 0]` is (batch, d_model), and the rest is `self.classifier(self.dropout("
        "torch.tanh(self.pooler(one))))`. Check `pooling` in `__init__` and raise a ValueError "
        "there.",
    ),
)


# --- find the bug: padding that changes the answer ----------------------------------------------


def classify(model, token_lists, pad_id):
    """Logits (batch, num_labels) of token lists of unequal lengths, in one batch.

    model(input_ids=…, attention_mask=…), both int64 (batch, longest), returns logits.
    """
    rows = [torch.tensor(ids) for ids in token_lists]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))


class _Watched(nn.Module):
    """A small classifier that keeps what it was called with."""

    def __init__(self, see, d_model, num_labels):
        super().__init__()
        self.encoder = _Encoder(see, 30, d_model, places=130).requires_grad_(False)
        self.head = 2 * see.randn(num_labels, d_model)
        self.calls = []

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **further):
        self.calls.append((input_ids, attention_mask))
        outputs = self.encoder(input_ids, attention_mask, token_type_ids)
        return outputs.last_hidden_state[:, 0] @ self.head.T


def _observe_classify(classify, see):
    def run(label, model, token_lists, pad_id):
        model.calls.clear()
        mode, given = model.training, copy.deepcopy(token_lists)
        _called_on_lists(see, label, _ModelApart(classify, model), given, pad_id)
        see.fact(f"{label}: the model is in the mode in which it was", model.training is mode)
        see(f"{label}: how often the model was called", len(model.calls))
        if len(model.calls) == 1:
            ids, mask = (in_order_of_ids(values, model.calls[0][0]) for values in model.calls[0])
            see(f"{label}: the rows of input_ids as the model got them", ids)
            see(f"{label}: the rows of attention_mask as the model got them", mask)

    def in_order_of_ids(values, ids):
        """Its rows by their ids, for their order is free as long as that of the logits is right."""
        if not isinstance(values, torch.Tensor) or values.shape != ids.shape or ids.ndim != 2:
            return values
        return values[sorted(range(len(ids)), key=ids.tolist().__getitem__)]

    def texts(*lengths):
        return [see.randint(10, 30, length).tolist() for length in lengths]

    with see.probe("texts of 2, 6 and 4 tokens, pad_id 0"):
        run("the logits", _Watched(see, 6, 2), texts(2, 6, 4), 0)
    with see.probe("the same text alone, and beside one of 9 tokens, pad_id 3"):
        model, (short, long) = _Watched(see, 5, 3), texts(3, 9)
        run("the logits alone", model, [short], 3)
        run("the logits beside a longer text", model, [short, long], 3)
    with see.probe("texts of 5, 1, 3 and 2 tokens, pad_id 7, in two orders"):
        model, token_lists = _Watched(see, 4, 2), texts(5, 1, 3, 2)
        run("the logits", model, token_lists, 7)
        run("the logits of the other order", model, token_lists[::-1], 7)
    with see.probe("two texts of 4 tokens, pad_id 1, a model in eval mode"):
        run("the logits", _Watched(see, 6, 4).eval(), texts(4, 4), 1)
    with see.probe("texts of 3, 130 and 70 tokens, pad_id 4"):
        run("the logits", _Watched(see, 5, 3), texts(3, 130, 70), 4)
    with see.probe("texts of 3, 2 and 1 tokens: as many as the longest has tokens"):
        run("the logits", _Watched(see, 5, 2), texts(3, 2, 1), 2)
    with see.probe("a text with the ids 0 and 1 inside, of 13 and 4 tokens, pad_id 5"):
        token_lists = texts(13, 4)
        token_lists[0][4], token_lists[1][1], token_lists[1][2] = 0, 0, 1
        run("the logits", _Watched(see, 5, 3), token_lists, 5)


class _ModelApart:
    """The answer with its model given already, so that the rest of its arguments can be copied."""

    def __init__(self, classify, model):
        self.classify, self.model = classify, model

    def __call__(self, token_lists, pad_id):
        return self.classify(self.model, token_lists, pad_id)


def _classify_with(
    mask_of=lambda lengths, n, ids, pad_id: (torch.arange(n) < lengths[:, None]).long(),
    pad=lambda row, n, pad_id: [*row, *[pad_id] * (n - len(row))],
    width=lambda lengths: max(lengths),
    call=lambda model, ids, mask: model(input_ids=ids, attention_mask=mask),
    order=lambda token_lists: token_lists,
):
    """Another mask, another padding, or another call."""

    def classify(model, token_lists, pad_id):
        token_lists = order(token_lists)
        lengths = torch.tensor([len(ids) for ids in token_lists])
        n = width(lengths.tolist())
        ids = torch.tensor([pad(row[:n], n, pad_id) for row in token_lists])
        return call(model, ids, mask_of(lengths, n, ids, pad_id))

    return classify


_classify_ones = _classify_with(mask_of=lambda lengths, n, ids, pad_id: torch.ones_like(ids))
_classify_no_mask = _classify_with(call=lambda model, ids, mask: model(input_ids=ids))
_classify_inverted = _classify_with(mask_of=lambda lengths, n, ids, pad_id: (ids == pad_id).long())
_classify_by_zero = _classify_with(mask_of=lambda lengths, n, ids, pad_id: (ids != 0).long())
_classify_above_zero = _classify_with(mask_of=lambda lengths, n, ids, pad_id: (ids > pad_id).long())
_classify_ids_as_mask = _classify_with(mask_of=lambda lengths, n, ids, pad_id: ids)
_classify_one_more = _classify_with(
    mask_of=lambda lengths, n, ids, pad_id: (torch.arange(n) <= lengths[:, None]).long()
)
_classify_one_less = _classify_with(
    mask_of=lambda lengths, n, ids, pad_id: (torch.arange(1, n + 1) < lengths[:, None]).long()
)
_classify_first_token = _classify_with(
    mask_of=lambda lengths, n, ids, pad_id: (torch.arange(n) == 0).long().expand(ids.shape)
)
_classify_first_row = _classify_with(
    mask_of=lambda lengths, n, ids, pad_id: (torch.arange(n) < lengths[0]).long().expand(ids.shape)
)
_classify_shortest = _classify_with(width=min)
_classify_512 = _classify_with(width=lambda lengths: 16)
_classify_left = _classify_with(
    pad=lambda row, n, pad_id: [*[pad_id] * (n - len(row)), *row],
    mask_of=lambda lengths, n, ids, pad_id: (ids != pad_id).long(),
)
_classify_left_ones = _classify_with(
    pad=lambda row, n, pad_id: [*[pad_id] * (n - len(row)), *row],
    mask_of=lambda lengths, n, ids, pad_id: torch.ones_like(ids),
)
_classify_zeros = _classify_with(
    pad=lambda row, n, pad_id: [*row, *[0] * (n - len(row))],
)
_classify_zeros_by_pad_id = _classify_with(
    pad=lambda row, n, pad_id: [*row, *[0] * (n - len(row))],
    mask_of=lambda lengths, n, ids, pad_id: (ids != pad_id).long(),
)
_classify_repeated = _classify_with(pad=lambda row, n, pad_id: (row * n)[:n])
_classify_bool = _classify_with(mask_of=lambda lengths, n, ids, pad_id: ids != pad_id)
_classify_float = _classify_with(mask_of=lambda lengths, n, ids, pad_id: (ids != pad_id).float())
_classify_transposed = _classify_with(call=lambda model, ids, mask: model(ids.T, mask.T))
_classify_positional_types = _classify_with(
    call=lambda model, ids, mask: model(ids, torch.ones_like(mask), mask)
)
_classify_softmax = _classify_with(call=lambda model, ids, mask: model(ids, mask).softmax(dim=-1))
_classify_classes = _classify_with(call=lambda model, ids, mask: model(ids, mask).argmax(dim=-1))
_classify_sorted = _classify_with(order=lambda texts: sorted(texts, key=len, reverse=True))
_classify_sorted_up = _classify_with(order=lambda texts: sorted(texts, key=len))
_classify_first_text = _classify_with(order=lambda texts: texts[:1])
_classify_64 = _classify_with(width=lambda lengths: min(64, max(lengths)))


def _classify_zero_logits(model, token_lists, pad_id):
    """Hides the padding in the ids, which the mask of ones has let in already."""
    n = max(map(len, token_lists))
    ids = torch.tensor([row + [pad_id] * (n - len(row)) for row in token_lists])
    real = (ids != pad_id).long()
    return model(input_ids=ids * real, attention_mask=torch.ones_like(ids))


def _classify_one_by_one(model, token_lists, pad_id):
    rows = [torch.tensor([ids]) for ids in token_lists]
    return torch.cat([model(input_ids=row, attention_mask=torch.ones_like(row)) for row in rows])


def _classify_by_length(model, token_lists, pad_id):
    """One batch for each length, without any padding."""
    logits = [None] * len(token_lists)
    for length in {len(row) for row in token_lists}:
        places = [i for i, row in enumerate(token_lists) if len(row) == length]
        ids = torch.tensor([token_lists[i] for i in places])
        for i, row in zip(places, model(ids, torch.ones_like(ids)), strict=True):
            logits[i] = row
    return torch.stack(logits)


def _classify_in_eval_mode(model, token_lists, pad_id):
    model.eval()
    return reference.classify(model, token_lists, pad_id)


def _classify_in_train_mode(model, token_lists, pad_id):
    model.train()
    return reference.classify(model, token_lists, pad_id)


def _classify_lists_extended(model, token_lists, pad_id):
    n = max(map(len, token_lists))
    for row in token_lists:
        row += [pad_id] * (n - len(row))
    ids = torch.tensor(token_lists)
    return model(input_ids=ids, attention_mask=(ids != pad_id).long())


def _classify_by_pad_id(model, token_lists, pad_id):
    rows = [torch.tensor(ids) for ids in token_lists]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return model(input_ids=input_ids, attention_mask=(input_ids != pad_id).long())


def _classify_by_ones(model, token_lists, pad_id, side="right"):
    pad = nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row) for row in token_lists], True, pad_id)
    mask = pad([torch.ones(len(row), dtype=torch.int64) for row in token_lists], batch_first=True)
    with torch.no_grad():
        return model(ids, mask)


def _classify_by_collate(model, token_lists, pad_id):
    batch = [{"input_ids": r, "token_type_ids": [0] * len(r), "label": 0} for r in token_lists]
    batch = reference.collate(batch, pad_id)
    batch.pop("labels")
    return model(**batch)


def _classify_sorted_and_back(model, token_lists, pad_id):
    order = sorted(range(len(token_lists)), key=lambda i: -len(token_lists[i]))
    logits = reference.classify(model, [token_lists[i] for i in order], pad_id)
    return logits[torch.tensor(order).argsort()]


def _classify_by_loop(model, token_lists, pad_id):
    lengths = [len(row) for row in token_lists]
    ids = torch.full((len(lengths), max(lengths)), pad_id)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, :length] = torch.as_tensor(token_lists[i])
        mask[i, :length] = 1
    return model(attention_mask=mask, input_ids=ids)


FIX_MISSING_ATTENTION_MASK = Exercise(
    slug="fix_missing_attention_mask",
    chapter=4,
    title="Find the bug: a review that depends on its neighbours",
    minutes=10,
    difficulty=2,
    reference=reference.classify,
    observe=_observe_classify,
    shipped=classify,
    symptom="A short review is positive with a probability of 0.308 when it is judged alone, and "
    "with 0.578, 0.625 and 0.518 beside longer and longer ones. Its neighbours should not matter.",
    misconceptions=(
        Misconception(
            "mask_of_ones",  # museum F12, 4.1
            _classify_ones,
            "Your mask is still 1 everywhere, which says that the padding is text. It is 1 at the "
            "tokens of a list and 0 behind its end.",
        ),
        Misconception(
            "no_mask",  # museum F12, 4.1
            _classify_no_mask,
            "You leave the mask out. The model then takes everything for text, the padding too; it "
            "has to be told where each text ends.",
        ),
        Misconception(
            "mask_inverted",  # museum 4.1
            _classify_inverted,
            "Your mask is 1 at the padding and hides the text. 1 means a real token.",
        ),
        Misconception(
            "zero_taken_for_padding",
            _classify_by_zero,
            "You hide the id 0. Here the padding has the id pad_id, and 0 may be a token of the "
            "text.",
        ),
        Misconception(
            "small_ids_hidden",
            _classify_above_zero,
            "You hide every id that is not above pad_id. Ids below it are tokens like others: only "
            "pad_id itself is padding.",
        ),
        Misconception(
            "ids_as_mask",
            _classify_ids_as_mask,
            "You pass the ids as the mask. A mask holds 1 at real tokens and 0 at padding.",
        ),
        Misconception(
            "padding_zeroed",
            _classify_zero_logits,
            "You change the ids at the padding, and the mask is still 1 everywhere. Whatever id "
            "stands there is read like text until the mask hides it.",
        ),
        Misconception(
            "one_place_too_many",
            _classify_one_more,
            "You show one place too many: places count from 0, so that a text of 3 tokens ends at "
            "place 2.",
        ),
        Misconception(
            "one_place_too_few",
            _classify_one_less,
            "You hide the last token of each text: of 3 tokens, the places 0, 1 and 2 are to be "
            "seen.",
        ),
        Misconception(
            "first_token_alone",
            _classify_first_token,
            "Your mask shows the first token alone, so that the rest of the text plays no part. It "
            "is 1 at every token of the text.",
        ),
        Misconception(
            "first_length_for_all",
            _classify_first_row,
            "Every row of your mask has the length of the first text. Each has its own.",
        ),
        Misconception(
            "cut_to_the_shortest",
            _classify_shortest,
            "You cut all texts to the length of the shortest. Nothing is padded then, and most of "
            "the text is lost.",
        ),
        Misconception(
            "fixed_width",  # museum F15
            _classify_512,
            "You pad to a fixed width. Up to the longest text of the batch is enough, and a text "
            "beyond that width would be cut.",
        ),
        Misconception(
            "left_padding",  # museum 4.5
            _classify_left,
            "You put the padding in front. The mask is right, and every token stands at another "
            "place now, with another position vector, and [CLS] no longer at place 0.",
        ),
        Misconception(
            "left_padding_and_ones",  # museum 4.5
            _classify_left_ones,
            "You put the padding in front, and the mask is still 1 everywhere. Leave the padding "
            "behind the text and hide it.",
        ),
        Misconception(
            "padded_with_zero",
            _classify_zeros,
            "You pad with 0 instead of pad_id. The mask hides it here; pass the id that the model "
            "knows as padding all the same.",
        ),
        Misconception(
            "padded_with_zero_hidden_by_pad_id",
            _classify_zeros_by_pad_id,
            "You pad with 0 and hide pad_id. Where pad_id is another number, nothing is hidden.",
        ),
        Misconception(
            "text_repeated",
            _classify_repeated,
            "You fill short texts with their own beginning. The mask hides it here; padding has "
            "the id pad_id.",
        ),
        Misconception(
            "mask_bool",
            _classify_bool,
            "Your mask is boolean. The model asks for int64: 1 at real tokens and 0 at padding.",
        ),
        Misconception(
            "mask_float",
            _classify_float,
            "Your mask holds floats. The model asks for int64: 1 at real tokens and 0 at padding.",
        ),
        Misconception(
            "transposed",
            _classify_transposed,
            "You give the model (longest, batch), and it takes places for texts. The batch is the "
            "first axis.",
        ),
        Misconception(
            "mask_in_the_third_place",
            _classify_positional_types,
            "Your mask arrives as the model's third input, the token types, and the attention mask "
            "is still 1 everywhere. Pass it by name.",
        ),
        Misconception(
            "probabilities",
            _classify_softmax,
            "You return probabilities. The logits are asked for, as the model returns them.",
        ),
        Misconception(
            "classes",
            _classify_classes,
            "You return classes. The logits are asked for, as the model returns them.",
        ),
        Misconception(
            "sorted_by_length",
            _classify_sorted,
            "You sort the texts by length, the longest first, and return their logits in that "
            "order. Row i belongs to text i: put the logits back.",
        ),
        Misconception(
            "sorted_from_the_shortest",
            _classify_sorted_up,
            "You sort the texts by length, the shortest first, and return their logits in that "
            "order. Row i belongs to text i: put the logits back.",
        ),
        Misconception(
            "cut_at_64",
            _classify_64,
            "You cut texts at 64 tokens. Nothing here says that texts end there: the batch is as "
            "wide as its longest text.",
        ),
        Misconception(
            "first_text_alone",
            _classify_first_text,
            "You classify the first text alone. Every text is a row of the batch.",
        ),
        Misconception(
            "one_by_one",
            _classify_one_by_one,
            "You give the model one text at a time. The logits are right, and a batch would be "
            "several times as fast: pad, and hide the padding.",
        ),
        Misconception(
            "one_call_for_each_length",
            _classify_by_length,
            "You call the model once for each length, so that nothing needs padding. The logits "
            "are right, but most lengths occur once; one batch is asked for, with padding that is "
            "hidden.",
        ),
        Misconception(
            "left_in_eval_mode",
            _classify_in_eval_mode,
            "You put the model into eval mode and leave it there. The training that goes on after "
            "this call would run without dropout; the mode is the caller's choice.",
        ),
        Misconception(
            "left_in_train_mode",
            _classify_in_train_mode,
            "After your call the model is in training mode, whichever it was in before. A model "
            "that was only to be used has its dropout on from then; the mode is the caller's "
            "choice.",
        ),
        Misconception(
            "lists_changed",
            _classify_lists_extended,
            "You pad the caller's own lists. The next time they come with other neighbours, their "
            "padding may count as text; pad copies.",
        ),
    ),
    alternatives=(
        _classify_by_pad_id,
        _classify_by_ones,
        _classify_by_collate,
        _classify_sorted_and_back,
        _classify_by_loop,
    ),
    hints=(
        "The same text gets other logits when a longer one is in the batch. What is in its row "
        "then that was not there before, and what tells the model about it?",
        "The attention mask is 1 at real tokens and 0 at padding. Print it for two texts of "
        "unequal length.",
        "Either compare places with lengths, `torch.arange(n) < lengths[:, None]`, or the ids with "
        "pad_id; then make int64 of it with `.long()`.",
    ),
)


# --- find the bug: a loss of an object ----------------------------------------------------------


def batch_loss(model, batch):
    """The mean cross-entropy of a batch, a tensor with a graph.

    model(**inputs) returns an object with .logits (batch, num_labels); batch holds the inputs and
    "labels", int64 (batch,).
    """
    outputs = model(**batch)
    return F.cross_entropy(outputs, batch["labels"])


class SequenceClassifierOutput(_ModelOutput):
    """Named like Hugging Face's, because torch's error message says the name."""


class _LikeHuggingFace(nn.Module):
    """A small classifier that returns an object; its loss comes first where labels are given."""

    def __init__(self, see, d_model, num_labels, size):
        super().__init__()
        self.size = size
        self.encoder = _Encoder(see, 20, d_model)
        self.classifier = _filled(see, nn.Linear(d_model, num_labels))

    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, labels=None, return_dict=True,
        **further,
    ):  # fmt: skip
        outputs = self.encoder(input_ids, attention_mask, token_type_ids)
        logits = self.size * self.classifier(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        outputs = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=None, attentions=None
        )
        return outputs if return_dict else outputs.to_tuple()


def _observe_batch_loss(batch_loss, see):
    def run(lengths, d_model, num_labels, types=False, only=None, size=3):
        model = _LikeHuggingFace(see, d_model, num_labels, size)
        held = model.classifier.weight
        held.grad = see.randn(*held.shape)
        before = held.grad.clone()
        ids, mask = _ragged(see, *lengths, vocab_size=20)
        batch = {"input_ids": ids, "attention_mask": mask}
        if types:
            batch["token_type_ids"] = (torch.arange(ids.shape[1]) > 1).long() * mask
        labels = see.randint(0, num_labels, len(lengths))
        batch["labels"] = labels if only is None else torch.full_like(labels, only)
        keys = list(batch)
        loss = see.call("the loss", _in_double(batch_loss), model, batch)
        see.fact("batch still holds its labels", "labels" in batch)
        see.fact("the entries of batch: the inputs are left unmodified", list(batch) == keys)
        alone = {name for name, p in model.named_parameters() if p.grad is not None}
        kept = alone == {"classifier.weight"} and torch.equal(held.grad, before)
        gradients = "as they were" if kept else "others" if alone else "none any more"
        see("the gradients that the model holds", gradients)
        if not kept:
            return
        weights = {
            "the classifier": model.classifier.weight,
            "the encoder": model.encoder.mix.weight,
        }
        see.gradients("the loss", loss, **weights)

    with see.probe("a batch of 3 texts, 2 classes"):
        run((5, 2, 4), 6, 2)
    with see.probe("a batch of 5 pairs with token types, 4 classes"):
        run((6, 3, 5, 2, 4), 5, 4, types=True)
    with see.probe("a batch of one text, 3 classes"):
        run((4,), 4, 3)
    with see.probe("a batch of 4 texts of class 0, 3 classes"):
        run((3, 5, 2, 4), 6, 3, only=0)
    with see.probe("a batch of 2 texts of class 1, 2 classes: as many texts as classes"):
        run((3, 6), 5, 2, only=1)
    with see.probe("a batch of 11 texts, 3 classes"):
        run((3, 5, 2, 4, 6, 3, 2, 5, 4, 3, 6), 4, 3)
    with see.probe("a batch of 5 texts, 4 classes, logits of the order of 1000"):
        run((3, 6, 2, 4, 5), 6, 4, size=1000)


def _in_double(batch_loss):
    """`batch_loss` with its result in float64, for the loss may be computed in float32 as well."""

    def loss_in_double(model, batch):
        loss = batch_loss(model, batch)
        single = isinstance(loss, torch.Tensor) and loss.dtype == torch.float32
        return loss.double() if single else loss

    return loss_in_double


def _loss_with(
    scores=lambda outputs: outputs.logits,
    loss=lambda scores, labels: F.cross_entropy(scores, labels),
    inputs=lambda batch: batch,
):
    def batch_loss(model, batch):
        return loss(scores(model(**inputs(batch))), batch["labels"])

    return batch_loss


def _without_labels(batch):
    return {name: values for name, values in batch.items() if name != "labels"}


_loss_of_object = _loss_with(scores=lambda outputs: outputs)
_loss_of_first = _loss_with(scores=lambda outputs: outputs[0])
_loss_none = _loss_with(
    inputs=_without_labels, scores=lambda outputs: outputs.loss, loss=lambda loss, labels: loss
)
_loss_softmax = _loss_with(scores=lambda outputs: outputs.logits.softmax(dim=-1))
_loss_sum = _loss_with(loss=lambda s, y: F.cross_entropy(s, y, reduction="sum"))
_loss_each = _loss_with(loss=lambda s, y: F.cross_entropy(s, y, reduction="none"))
_loss_of_n = _loss_with(loss=lambda s, y: F.cross_entropy(s, y) / len(y))
_loss_detached = _loss_with(loss=lambda s, y: F.cross_entropy(s.detach(), y))
_loss_new_tensor = _loss_with(
    loss=lambda s, y: torch.tensor(F.cross_entropy(s, y).item(), dtype=s.dtype, requires_grad=True)
)
_loss_argmax = _loss_with(loss=lambda s, y: F.cross_entropy(s.argmax(dim=-1).double(), y))
_loss_nll = _loss_with(loss=lambda s, y: F.nll_loss(s, y))
_loss_nll_softmax = _loss_with(loss=lambda s, y: F.nll_loss(s.softmax(dim=-1), y))
_loss_squared = _loss_with(
    loss=lambda s, y: F.mse_loss(s.softmax(dim=-1), F.one_hot(y, s.shape[-1]).to(s.dtype))
)
_loss_squared_of_classes = _loss_with(
    loss=lambda s, y: F.mse_loss(s.argmax(dim=-1).double(), y.double())
)
_loss_binary = _loss_with(
    loss=lambda s, y: F.binary_cross_entropy_with_logits(s, F.one_hot(y, s.shape[-1]).to(s.dtype))
)
_loss_exchanged = _loss_with(loss=lambda s, y: F.cross_entropy(y, s))
_loss_over_batch = _loss_with(
    loss=lambda s, y: -s.log_softmax(dim=0)[torch.arange(len(y)), y].mean()
)
_loss_first_text = _loss_with(loss=lambda s, y: F.cross_entropy(s[:1], y[:1]))
_loss_twice = _loss_with(
    scores=lambda outputs: outputs,
    loss=lambda outputs, y: outputs.loss + F.cross_entropy(outputs.logits, y),
)
_loss_negative = _loss_with(loss=lambda s, y: -F.cross_entropy(s, y))
_loss_accuracy = _loss_with(loss=lambda s, y: (s.argmax(dim=-1) == y).double().mean())


_loss_log_of_softmax = _loss_with(loss=lambda s, y: F.nll_loss(s.softmax(dim=-1).log(), y))
_loss_first_eight = _loss_with(loss=lambda s, y: F.cross_entropy(s[:8], y[:8]))


def _loss_after_backward(model, batch):
    loss = reference.batch_loss(model, batch)
    loss.backward(retain_graph=True)
    return loss


def _loss_after_zero_grad(model, batch):
    model.zero_grad()
    return reference.batch_loss(model, batch)


def _loss_popped(model, batch):
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits, labels)


def _loss_unpacked(model, batch):
    logits, *_ = model(**batch)
    return F.cross_entropy(logits, batch["labels"])


def _loss_first_without_labels(model, batch):
    return F.cross_entropy(model(**_without_labels(batch))[0], batch["labels"])


def _loss_its_own(model, batch):
    """The model's own loss, which Hugging Face's classifiers compute when they are given labels."""
    return model(**batch).loss


def _loss_by_name(model, batch, weight=None):
    outputs = model(**batch)
    return nn.CrossEntropyLoss(weight=weight)(input=outputs["logits"], target=batch["labels"])


def _loss_by_hand(model, batch):
    copy_of_batch = dict(batch)
    labels = copy_of_batch.pop("labels")
    logits = model(**copy_of_batch).logits
    right = logits.gather(1, labels[:, None]).squeeze(1)
    return (torch.logsumexp(logits, dim=1) - right).mean()


def _loss_tuple(model, batch):
    return F.cross_entropy(model(**batch, return_dict=False)[1], batch["labels"])


def _loss_in_single_precision(model, batch):
    return F.cross_entropy(model(**batch).logits.float(), batch["labels"])


FIX_LOSS_OF_MODEL_OUTPUT = Exercise(
    slug="fix_loss_of_model_output",
    chapter=4,
    title="Find the bug: a loss that is refused",
    minutes=6,
    difficulty=1,
    reference=reference.batch_loss,
    observe=_observe_batch_loss,
    rtol=1e-5,  # the loss may be computed in float32
    atol=1e-6,
    shipped=batch_loss,
    symptom="The model runs, the batch holds its labels, and the loss ends in `TypeError: "
    "cross_entropy_loss(): argument 'input' (position 1) must be Tensor, not "
    "SequenceClassifierOutput`.",
    misconceptions=(
        Misconception(
            "still_the_object",
            _loss_of_object,
            "You still give cross-entropy the whole object that the model returns. It holds "
            "several things by name; the loss needs one of them, a tensor.",
        ),
        Misconception(
            "first_entry",  # museum F17
            _loss_of_first,
            "What you give to cross-entropy is the model's own loss, a single number: it is the "
            "object's first entry where labels were passed. Cross-entropy takes the logits; ask "
            "for them by name.",
        ),
        Misconception(
            "taken_apart_as_a_tuple",
            _loss_unpacked,
            "You unpack the object like a tuple. It goes through its names as a dict does, so that "
            "you get a text; ask for the logits by name.",
        ),
        Misconception(
            "loss_that_nobody_computed",  # museum F16
            _loss_none,
            "You return the model's own loss, and it has not got the labels, or got them under "
            "another name than `labels`. Then it computes none, and `.loss` is None, without any "
            "error.",
        ),
        Misconception(
            "softmax_first",
            _loss_softmax,
            "You put the logits through a softmax before cross-entropy, which does its own. The "
            "loss can no longer come near 0 and its gradients are small.",
        ),
        Misconception(
            "log_forgotten",
            _loss_nll_softmax,
            "You give `nll_loss` probabilities. It takes their logarithms; cross-entropy does both "
            "steps, from the logits.",
        ),
        Misconception(
            "nll_of_logits",
            _loss_nll,
            "You give `nll_loss` the logits. It takes logarithms of probabilities, and of logits "
            "it goes to −∞; cross-entropy takes logits.",
        ),
        Misconception(
            "squared_error",  # museum C11, 4.8
            _loss_squared,
            "You take the squared error of the probabilities. Its gradient vanishes where the "
            "model is surest and wrong; classes call for cross-entropy.",
        ),
        Misconception(
            "squared_error_of_classes",  # museum C11
            _loss_squared_of_classes,
            "You take the squared difference of class numbers. No gradient goes through argmax, "
            "and class 2 is not further from class 0 than class 1 is.",
        ),
        Misconception(
            "binary",
            _loss_binary,
            "You ask a yes or no for every class by itself. The classes exclude one another: "
            "cross-entropy compares them.",
        ),
        Misconception(
            "loss_of_the_classes",
            _loss_argmax,
            "You take the most likely classes before the loss. No gradient goes through argmax; "
            "cross-entropy takes the logits.",
        ),
        Misconception(
            "sum",
            _loss_sum,
            "You add up the losses of the texts. The mean is asked for: the sum grows with the "
            "batch, and with it the step.",
        ),
        Misconception(
            "one_for_each_text",
            _loss_each,
            "You return a loss for each text. One number is asked for, their mean; `backward` "
            "needs a single number to start from.",
        ),
        Misconception(
            "divided_twice",
            _loss_of_n,
            "You divide by the size of the batch. Cross-entropy has done that already.",
        ),
        Misconception(
            "axes_exchanged",
            _loss_over_batch,
            "Your softmax runs over the texts of the batch. The classes are the last axis.",
        ),
        Misconception(
            "arguments_exchanged",
            _loss_exchanged,
            "You give cross-entropy the labels first. It is logits, then labels.",
        ),
        Misconception(
            "first_text_alone",
            _loss_first_text,
            "You compute the loss of the first text alone. It is the mean over the batch.",
        ),
        Misconception(
            "counted_twice",
            _loss_twice,
            "You add the model's own loss to the one that you compute. Both are the same, so that "
            "yours is twice as large.",
        ),
        Misconception(
            "negative",
            _loss_negative,
            "Your loss has the wrong sign: training would make it worse. Cross-entropy is to be "
            "made small as it is.",
        ),
        Misconception(
            "cut_off",
            _loss_detached,
            "Your loss is cut off from its graph, as `.item()`, `.detach()` and `no_grad` do it. "
            "No gradient reaches the model; return the tensor as cross-entropy gives it.",
        ),
        Misconception(
            "new_tensor",
            _loss_new_tensor,
            "You put the loss or the logits into a new tensor that requires a gradient. The error "
            "is gone and so is the graph: `backward` would reach that tensor and nothing behind "
            "it.",
        ),
        Misconception(
            "accuracy",
            _loss_accuracy,
            "You return the accuracy. No gradient goes through it; the loss is the cross-entropy "
            "of the logits.",
        ),
        Misconception(
            "labels_popped",
            _loss_popped,
            "You take the labels out of the caller's batch with `pop`. In the next epoch the same "
            "batch has none; read them and leave the batch as it is.",
        ),
        Misconception(
            "log_of_softmax",
            _loss_log_of_softmax,
            "You take the softmax and then its logarithm. That is right while the logits are "
            "small; where a probability is rounded to 0 its logarithm is −∞. Cross-entropy does "
            "both in one step that does not overflow.",
        ),
        Misconception(
            "first_eight",
            _loss_first_eight,
            "You compute the loss of the first eight texts alone. A batch may be of any size, and "
            "all its texts count.",
        ),
        Misconception(
            "backward_inside",
            _loss_after_backward,
            "You call `backward` yourself. The loss is what is asked for, with its graph: whoever "
            "called goes back through it, and the gradients would count twice.",
        ),
        Misconception(
            "gradients_removed",
            _loss_after_zero_grad,
            "You remove the gradients that the model holds. They may be those of the micro-batches "
            "before; when they go is for whoever takes the steps to say.",
        ),
    ),
    alternatives=(
        _loss_its_own,
        _loss_by_name,
        _loss_by_hand,
        _loss_first_without_labels,
        _loss_in_single_precision,
        _loss_tuple,
    ),
    hints=(
        "Read the last line of the error: what does `cross_entropy` want as its first argument, "
        "and what does it get?",
        "Print `type(outputs)` and `outputs.keys()`. One of its entries is (batch, num_labels).",
        "Hugging Face's models return an object with named entries: `.loss`, where labels were "
        "given, `.logits`, and more. Ask for the one that you need by name, not by number.",
    ),
)


class _TinyBert(nn.Module):
    """Logits that depend on each token, its position and type, and on the mask; in float64."""

    def __init__(self, see, num_labels):
        super().__init__()
        shapes = {"words": (13, 6), "positions": (12, 6), "types": (2, 6), "mix": (6, 6)}
        for name, shape in (*shapes.items(), ("head", (num_labels, 6))):
            self.register_parameter(name, nn.Parameter(see.randn(*shape)))

    def logits(self, input_ids, attention_mask=None, token_type_ids=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.words[input_ids] * self.positions[: input_ids.shape[1]] + 2 * self.types[types]
        weights = mask.to(x.dtype)[..., None]  # (batch, n, 1)
        mean = (torch.tanh(x @ self.mix.T) * weights).sum(dim=1) / weights.sum(dim=1)
        return mean @ self.head.T  # (batch, num_labels)


def _tiny_batch(see, lengths, num_labels):
    """What `collate` makes of len(lengths) pairs of sentences; the types change half-way."""
    n, batch = max(lengths), len(lengths)
    mask = (torch.arange(n) < torch.tensor(lengths)[:, None]).long()  # (batch, n)
    second = torch.arange(n) >= torch.tensor(lengths)[:, None] // 2
    return {
        "input_ids": see.randint(1, 13, batch, n) * mask,
        "token_type_ids": second.long() * mask,
        "attention_mask": mask,
        "labels": see.randint(0, num_labels, batch),
    }


def _as_number(function, kinds):
    """`function`, whose numbers become floats; what they were given as is put into `kinds`."""

    def called(*args):
        value = function(*args)
        if isinstance(value, numbers.Real):
            kinds.append("a Python number")
            return float(value)
        graph = " with its graph" if getattr(value, "requires_grad", False) else ""
        kinds.append(f"a {type(value).__name__}{graph}")
        one = isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0
        return float(value) if one else value

    return called


# --- find the bug: the first field --------------------------------------------------------------


def predicted_classes(model, batch):
    """The most likely class of each example, int64 (batch,).

    model(**batch) returns an object with .logits (batch, num_labels) and, because batch holds
    "labels" too, with .loss; other fields may stand before and after.
    """
    with torch.no_grad():
        return model(**batch)[0].argmax(dim=-1)


class _ClassesBert(_TinyBert):
    """Returns what Hugging Face's classifiers return: the loss first, if there are labels."""

    def __init__(self, see, num_labels, layers=False, between=False):
        super().__init__(see, num_labels)
        self.layers, self.between = layers, between

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        logits = self.logits(input_ids, attention_mask, token_type_ids)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        layers = (self.words[input_ids], 2 * self.words[input_ids]) if self.layers else None
        pooled = self.words[input_ids[:, 0]] if self.between else None  # (batch, 6)
        return _ModelOutput(loss=loss, pooled=pooled, logits=logits, hidden_states=layers)


def _observe_predicted_classes(predicted_classes, see):
    def predict(model, batch, label="the classes"):
        names, mode = sorted(batch), model.training
        see.call(label, predicted_classes, model, batch)
        see.fact(f"{label}: the batch still holds all that it held", sorted(batch) == names)
        see.fact(f"{label}: the model is in the mode in which it was", model.training is mode)
        see.fact(f"{label}: what comes next still records a graph", torch.is_grad_enabled())

    with see.probe("a batch of 7 examples, 3 classes"):
        predict(_ClassesBert(see, 3), _tiny_batch(see, [4, 9, 6, 5, 3, 8, 7], 3))
    with see.probe("a batch of 9 examples, 2 classes"):
        predict(_ClassesBert(see, 2), _tiny_batch(see, [5, 4, 8, 6, 3, 7, 5, 6, 4], 2))
    with see.probe("a batch of one example, 4 classes"):
        predict(_ClassesBert(see, 4), _tiny_batch(see, [6], 4))
    with see.probe("a model that returns its hidden states too, 6 examples, 5 classes"):
        predict(_ClassesBert(see, 5, layers=True), _tiny_batch(see, [7, 5, 3, 6, 8, 4], 5))
    with see.probe("a model that returns another field before the logits, 7 examples, 3 classes"):
        model = _ClassesBert(see, 3, layers=True, between=True)
        predict(model, _tiny_batch(see, [4, 8, 3, 6, 5, 9, 7], 3))
    with see.probe("a model in eval mode whose 2 classes are nearly as likely, 12 examples"):
        model = _ClassesBert(see, 2).eval()
        with torch.no_grad():
            model.head[1] = model.head[0] + 1e-4 * model.head[1]
        predict(model, _tiny_batch(see, [5, 4, 8, 6, 3, 7, 5, 6, 4, 9, 3, 7], 2))
    with see.probe("two batches after one another, of 8 and of 3 examples, 3 classes"):
        model = _ClassesBert(see, 3)
        predict(model, _tiny_batch(see, [3, 4, 5, 6, 7, 8, 9, 10], 3), "the first classes")
        predict(model, _tiny_batch(see, [5, 7, 4], 3), "the second classes")


def _classes(change):
    """predicted_classes that does `change(logits, batch)` with the right logits."""

    def predicted_classes(model, batch):
        with torch.no_grad():
            return change(model(**batch).logits, batch)

    return predicted_classes


def _classes_of_the_loss(model, batch):
    with torch.no_grad():
        outputs = model(**batch)
    return torch.argmax(outputs[0], dim=-1)


def _classes_of_the_last_field(model, batch):
    with torch.no_grad():
        return model(**batch)[-1].argmax(dim=-1)


def _classes_without_mask(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits.argmax(dim=-1)


def _classes_without_types(model, batch):
    with torch.no_grad():
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return outputs.logits.argmax(dim=-1)


def _classes_mask_alone_dropped(model, batch):
    with torch.no_grad():
        outputs = model(batch["input_ids"], token_type_ids=batch["token_type_ids"])
    return outputs.logits.argmax(dim=-1)


def _classes_by_position(model, batch):
    with torch.no_grad():
        return model(*batch.values()).logits.argmax(dim=-1)


def _classes_labels_popped(model, batch):
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits.argmax(dim=-1)


def _classes_second_field(model, batch):
    with torch.no_grad():
        return model(**batch)[1].argmax(dim=-1)


def _classes_grad_left_off(model, batch):
    torch.set_grad_enabled(False)
    return model(**batch).logits.argmax(dim=-1)


def _classes_in_eval_mode(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits.argmax(dim=-1)


def _classes_in_train_mode(model, batch):
    model.train()
    with torch.no_grad():
        return model(**batch).logits.argmax(dim=-1)


def _classes_in_a_loop(model, batch):
    outputs = model(**batch)
    return torch.tensor([max(range(len(row)), key=row.__getitem__) for row in outputs["logits"]])


def _classes_without_labels(model, batch, threshold=None):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs)["logits"].detach().argmax(1)


def _classes_by_probability(model, batch):
    was = model.training
    model.eval()
    logits = dict(model(**batch).items())["logits"]
    model.train(was)
    return logits.softmax(dim=-1).max(dim=-1).indices


def _classes_sorted(model, batch):
    with torch.inference_mode():
        return model(**batch).logits.log_softmax(-1).topk(1).indices[:, 0].clone()


FIX_FIRST_OUTPUT = Exercise(
    slug="fix_first_output",
    chapter=4,
    title="Find the bug: every review is negative",
    minutes=6,
    difficulty=1,
    reference=reference.predicted_classes,
    observe=_observe_predicted_classes,
    shipped=predicted_classes,
    symptom="For a batch of eight reviews the answer is one number, `tensor(0)`, and no error. "
    "Five of the eight are negative, so comparing it with their labels gives an accuracy of "
    "0.625, and it gives that for any model, trained or not.",
    misconceptions=(
        Misconception(
            "loss_for_logits",  # museum F17
            _classes_of_the_loss,
            "You take the most likely class of the loss. The batch holds labels, so the model "
            "returns its loss too, as the first field; it is one number, and the position of the "
            "largest of one number is 0. Ask for the field by its name.",
        ),
        Misconception(
            "last_field",
            _classes_of_the_last_field,
            "You count the fields from the end. That holds until the model is asked for its "
            "hidden states or attention weights, which come after the logits. A field's name does "
            "not depend on what else is returned.",
        ),
        Misconception(
            "by_place",
            _classes_second_field,
            "You take the logits by their place among the fields. Which place that is depends on "
            "the model and on the call: without labels there is no loss, and other fields may "
            "stand before the logits. Their name stays.",
        ),
        Misconception(
            "over_the_batch",
            _classes(lambda logits, batch: logits.argmax(dim=0)),
            "You look for the largest logit along the batch: for each class you get the example "
            "that is most like it. The classes of one example stand along the last axis.",
        ),
        Misconception(
            "one_for_all",
            _classes(lambda logits, batch: logits.argmax()),
            "You look for the largest logit of the whole batch, without saying along which axis. "
            "That gives one place in the flattened table, where each example needs a class.",
        ),
        Misconception(
            "column",
            _classes(lambda logits, batch: logits.argmax(dim=-1, keepdim=True)),
            "Your classes are a column of shape (batch, 1). Compared with labels of shape (batch,) "
            "it broadcasts to (batch, batch), and the accuracy is that of a table nobody asked "
            "for. Drop the axis of size 1.",
        ),
        Misconception(
            "squeezed",
            _classes(lambda logits, batch: logits.argmax(dim=-1).squeeze()),
            "You squeeze the result. With a batch of one example, as the last of an epoch may be, "
            "its only axis disappears too and a single number is left.",
        ),
        Misconception(
            "largest_values",
            _classes(lambda logits, batch: logits.max(dim=-1).values),
            "You return the largest logit of each example. The question is where it stands: the "
            "number of its class.",
        ),
        Misconception(
            "largest_probabilities",
            _classes(lambda logits, batch: logits.softmax(dim=-1).max(dim=-1).values),
            "You return how probable the most likely class is. The question is which class that "
            "is: a whole number for each example.",
        ),
        Misconception(
            "logits",
            _classes(lambda logits, batch: logits),
            "You return the logits themselves. One step is missing: for each example, the number "
            "of the class whose logit is the largest.",
        ),
        Misconception(
            "probabilities",
            _classes(lambda logits, batch: logits.softmax(dim=-1)),
            "You return the probabilities of all classes. One step is missing: for each example, "
            "the number of the most probable class.",
        ),
        Misconception(
            "two_classes_only",
            _classes(lambda logits, batch: (logits[:, 1] > logits[:, 0]).long()),
            "You compare the first two logits of each example. That is right for two classes; a "
            "third is never predicted.",
        ),
        Misconception(
            "second_probability_above_half",
            _classes(lambda logits, batch: (logits.softmax(dim=-1)[:, 1] > 0.5).long()),
            "You ask whether the second class has a probability above 0.5. That is right for two "
            "classes; with more, no other class but 0 and 1 is ever predicted.",
        ),
        Misconception(
            "sign_of_the_second_logit",
            _classes(lambda logits, batch: (logits[:, 1] > 0).long()),
            "You ask whether the second logit is above 0. A logit means something only next to the "
            "others: the larger of two negative ones wins too, and there may be more than two.",
        ),
        Misconception(
            "labels",
            _classes(lambda logits, batch: batch["labels"].clone()),
            "You return the labels of the batch. They are what the predictions will be compared "
            "with: that accuracy is 1 whatever the model has learned.",
        ),
        Misconception(
            "hits",
            _classes(lambda logits, batch: logits.argmax(dim=-1) == batch["labels"]),
            "You return which predictions are right. Return the predictions; whoever called "
            "compares them.",
        ),
        Misconception(
            "list",
            _classes(lambda logits, batch: logits.argmax(dim=-1).tolist()),
            "You return a Python list. What follows compares the classes with a tensor of labels "
            "in one step, and a list compared with a tensor is not that: leave them a tensor.",
        ),
        Misconception(
            "floating_point",
            _classes(lambda logits, batch: logits.argmax(dim=-1).float()),
            "You turn the classes into floating-point numbers. They are numbers of classes, int64, "
            "as the labels are.",
        ),
        Misconception(
            "ids_alone",
            _classes_without_mask,
            "You hand the model the ids alone. Without the attention mask it reads the padding as "
            "text, and without the types it takes both sentences of a pair for the first; the "
            "logits are those of other inputs.",
        ),
        Misconception(
            "types_dropped",  # museum 4.6
            _classes_without_types,
            "You drop the token types, so that the model takes a pair for one sentence. Hand over "
            "all that the batch holds for the model.",
        ),
        Misconception(
            "mask_dropped",  # museum 4.1
            _classes_mask_alone_dropped,
            "You drop the attention mask, so that the model reads the padding after the shorter "
            "examples as text. Hand over all that the batch holds for the model.",
        ),
        Misconception(
            "by_position",
            _classes_by_position,
            "You hand the values over in the order in which the batch happens to hold them. The "
            "model takes its mask second and the token types third, `collate` makes them the other "
            "way round, and both are int64 of one shape, so that no error tells. Go by the names.",
        ),
        Misconception(
            "labels_popped",  # museum F16
            _classes_labels_popped,
            "You take the labels out of the caller's own batch. The predictions are right; the "
            "next line, which compares them with the labels, finds none.",
        ),
        Misconception(
            "half_precision",
            _classes(lambda logits, batch: logits.half().argmax(dim=-1)),
            "You round the logits to half precision before you compare them. Where two classes are "
            "nearly as likely their logits are then equal, and the first of them wins.",
        ),
        Misconception(
            "grad_left_off",
            _classes_grad_left_off,
            "You switch off the recording of graphs and leave it off. The predictions are right, "
            "and the next training step has no graph: `torch.no_grad()` in a `with` block switches "
            "it on again where the block ends.",
        ),
        Misconception(
            "left_in_eval_mode",
            _classes_in_eval_mode,
            "You put the model into eval mode and leave it there. The training that goes on after "
            "this call would run without dropout; the mode is the caller's choice.",
        ),
        Misconception(
            "left_in_train_mode",
            _classes_in_train_mode,
            "After your call the model is in training mode, whichever it was in before. A model "
            "that was only to be used has its dropout on from then; the mode is the caller's "
            "choice.",
        ),
    ),
    alternatives=(
        _classes_in_a_loop,
        _classes_without_labels,
        _classes_by_probability,
        _classes_sorted,
    ),
    hints=(
        "Print `model(**batch)` for one batch, and the shape of what stands first in it.",
        "The first field is the loss, because the batch holds labels. Without labels the first "
        "field would be the logits: what a position holds depends on the call, a name does not.",
        "Read the field `logits` of the output, (batch, num_labels), and take the place of the "
        "largest along its last axis.",
    ),
)


# --- find the bug: copies on both sides ---------------------------------------------------------


def split_texts(texts, test_share, generator):
    """Indices for training and for testing, two lists; a text and its copies stay together.

    Texts count as the same where they differ in case or white space only. Of the distinct texts,
    round(test_share × their number) drawn at random are for testing.
    """
    order = torch.randperm(len(texts), generator=generator).tolist()
    held_out = round(test_share * len(texts))
    return order[held_out:], order[:held_out]


_SPLIT_WORDS = (
    "the film was long and warm soup came cold staff smiled twice rooms smelled new".split()
)


def _split_made(see, number):
    """Distinct texts of four to six words each."""
    texts, k = {}, 0
    while len(texts) < number:
        words = [_SPLIT_WORDS[i] for i in see.randint(0, len(_SPLIT_WORDS), 4 + k % 3).tolist()]
        texts[" ".join(words).capitalize() + "."] = None
        k += 1
    return list(texts)


def _split_key(text):
    return " ".join(text.lower().split())


def _split_lists(result):
    """Both parts as lists of int, whatever holds them; None where they are something else."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        return None
    parts = []
    for part in result:
        if isinstance(part, (torch.Tensor, np.ndarray)):
            part = part.tolist()
        if not isinstance(part, (list, tuple, set, range)):
            return None
        if not all(isinstance(i, (int, np.integer)) or _split_number(i) for i in part):
            return None
        parts.append([int(i) for i in part])
    return parts


def _split_kind(result):
    """A few words for what is not two lists of row numbers."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        size = f" of {len(result)} values" if isinstance(result, (tuple, list)) else ""
        return f"a {type(result).__name__}{size}"
    kinds = {type(i).__name__ for part in result if isinstance(part, (tuple, list)) for i in part}
    return f"a pair that holds {', '.join(sorted(kinds)) or 'no numbers'}"


_SPLIT_NUMBER = "the number of distinct texts for testing"


def _split_number_of(numbers):
    same = len(set(numbers)) == 1
    return f"{numbers[0]} in each draw" if same else "another one in each draw"


def _split_number(i):
    return isinstance(i, torch.Tensor) and i.ndim == 0 and not i.is_floating_point()


def _observe_split_texts(split_texts, see):
    def draws(texts, share, number=12, generator=None):
        """The two lists of each draw, None where something else came back."""
        generator, given = generator or see.generator, list(texts)
        found = [
            _split_lists(result := split_texts(texts, share, generator)) for _ in range(number)
        ]
        see("what it returns", _split_kind(result) if None in found else "two lists of numbers")
        see.fact("the texts are left as they were", texts == given)
        rows = range(len(texts))
        inside = all(found) and all(i in rows for parts in found for part in parts for i in part)
        see.fact("the numbers are those of rows that there are", inside)
        if not inside:
            return []
        see.fact(
            "no row number stands twice in a list",
            all(len(set(part)) == len(part) for parts in found for part in parts),
        )
        together = [sorted({*train, *test}) for train, test in found]
        see.fact("every row is in one of the two lists", all(r == list(rows) for r in together))
        see.fact("no row is in both lists", not any({*train} & {*test} for train, test in found))
        return found

    def observe(texts, share, number=12, drawn=True):
        """The same lists, after what holds for their texts; [] where nothing more can be asked."""
        keys = [_split_key(text) for text in texts]
        distinct = list(dict.fromkeys(keys))
        found = draws(texts, share, number)
        sides = [[{keys[i] for i in part} for part in parts] for parts in found]
        if not sides:
            return []
        see.fact("no text is on both sides", not any(train & test for train, test in sides))
        numbers = [len(test) for _, test in sides]
        see(_SPLIT_NUMBER, _split_number_of(numbers))
        if not drawn:
            return found
        tests = {frozenset(test) for _, test in sides}
        ends = [{*distinct[: numbers[0]]}, {*distinct[-numbers[0] :]}]
        at_the_ends = any(tests == {frozenset(end)} for end in ends)
        see.fact("the texts for testing are not always the first or the last ones", not at_the_ends)
        see.fact("two draws with one generator differ", len(tests) > 1)
        return found if len(tests) > 1 else []

    with see.probe("13 texts without copies, test_share 0.25"):
        observe(_split_made(see, 13), 0.25)
    with see.probe("11 texts without copies, test_share 0.7"):
        observe(_split_made(see, 11), 0.7)
    with see.probe("10 texts, 5 of them twice, word for word; test_share 0.28"):
        texts = _split_made(see, 10)
        observe(texts + texts[::-2], 0.28)
    with see.probe("9 texts, 4 of them again in other case; test_share 0.4"):
        texts = _split_made(see, 9)
        copies = texts[0].upper(), texts[3].lower(), texts[5].title(), texts[7].swapcase()
        observe([*copies, *texts], 0.4)
    with see.probe("9 texts, 4 of them again with white space around; test_share 0.3"):
        texts = _split_made(see, 9)
        around = " " + texts[1], texts[2] + "\n", "\t" + texts[4] + "  ", texts[8] + " "
        observe([*texts[:5], *around, *texts[5:]], 0.3)
    with see.probe("9 texts, 4 of them again with other white space inside; test_share 0.4"):
        texts = _split_made(see, 9)
        spaces = zip(texts[::2], ("  ", "\t", "\n", " \n "), strict=False)
        observe([text.replace(" ", space) for text, space in spaces] + texts, 0.4)
    with see.probe("8 texts, 3 again with other line breaks and no-break spaces; test_share 0.4"):
        texts = _split_made(see, 8)
        spaces = zip(texts[::3], ("\r\n", "\u00a0", "\r"), strict=True)
        observe([text.replace(" ", space) for text, space in spaces] + texts, 0.4)
    with see.probe("8 texts, one of them 7 times, one 4 times, in all ways; test_share 0.25"):
        texts = _split_made(see, 8)
        first, last = texts[0], texts[7]
        copies = [first, first.upper(), f" {first}", first.replace(" ", "  "), first.lower(), first]
        observe([*copies, *texts, last.title(), f"{last}\n", last], 0.25)
    with see.probe("5 texts and a copy, test_share 0"):
        texts = _split_made(see, 5)
        observe([*texts, texts[1]], 0, number=2, drawn=False)
    with see.probe("4 texts and a copy, test_share 0.1"):
        texts = _split_made(see, 4)
        observe([texts[2], *texts], 0.1, number=2, drawn=False)
    with see.probe("4 texts and a copy, test_share 1"):
        texts = _split_made(see, 4)
        observe([*texts, texts[0]], 1, number=2, drawn=False)
    with see.probe("16 texts, alike but not the same, in pairs; test_share 0.3"):
        pairs = (
            ("A good film.", "A good film!"),
            ("Good soup and bad staff here.", "Bad soup and good staff here."),
            ("The room was clean and quiet and warm and cheap.",) * 2,
            ("Room 12 was fine.", "Room 21 was fine."),
            ("The exit was nowhere, sadly.", "The exit was now here, sadly."),
            ("A glass of rose.", "A glass of rosé."),
            ("Отлично.", "Плохо."),
            ("Worth a visit.", "Hardly worth a visit."),
        )
        texts = [text for pair in pairs for text in pair]
        texts[5] = texts[5].replace("cheap", "dear")
        found = observe(texts, 0.3, number=60)
        for k, what in enumerate(
            (
                *("punctuation", "the order of words", "their ends", "a number"),
                *("a space between letters", "an accent", "letters that are not ASCII"),
                "a word at the beginning",
            )
        ):
            ones = {(2 * k in test) - (2 * k + 1 in test) for _, test in found}
            if found:
                apart = {-1, 1} <= ones
                see.fact(f"texts that differ in {what} are not kept together", apart)
                found = found if apart else []
    with see.probe("7 texts, one of them 6 times, 400 draws of 2 of them for testing"):
        texts = _split_made(see, 7)
        found = observe(texts + 5 * [texts[2]], 0.29, number=400)
        tests = [{i for i in test if i < 7} for _, test in found]
        if found:
            often = [sum(k in test for test in tests) / 400 for k in range(7)]
            even = all(abs(share - 2 / 7) < 0.113 for share in often)  # 5 sigma
            see.fact("a text with six copies is not for testing far too often", often[2] < 0.6)
            see.fact("a text with six copies is not hardly ever for testing", often[2] > 0.06)
            see.fact("each text is for testing equally often, however many copies it has", even)
            pairs = [(i, k) for i in range(7) for k in range(i)]
            both = [sum({i, k} <= test for test in tests) / 400 for i, k in pairs]
            even = all(abs(share - 1 / 21) < 0.054 for share in both)
            see.fact("any two texts are for testing together equally often", even)
    with see.probe("20 texts, the same draw again"):
        texts, seen = _split_made(see, 20), []
        for seed in (5, 5, 6):
            torch.manual_seed(len(seen)), random.seed(len(seen)), np.random.seed(len(seen))
            generator, before = torch.Generator().manual_seed(seed), _global_numbers()
            for _ in range(2):
                lists = _split_lists(split_texts(texts, 0.4, generator)) or ([], [])
                seen.append(sorted(lists[1]))
        ends = list(range(8)), list(range(12, 20))
        facts = {
            "the texts for testing are not the first or last ones": seen[0] not in ends,
            "a generator in the same state gives the same split": seen[:2] == seen[2:4],
            "a second split with the same generator is another one": seen[0] != seen[1],
            "a generator with another seed gives another split": seen[0] != seen[4],
        }
        for statement, holds in facts.items():
            see.fact(statement, holds)
        if all(facts.values()):
            kept = _global_numbers() == before
            see.fact("torch's, Python's and NumPy's own random numbers are left alone", kept)


def _global_numbers():
    """The state of the random numbers that belong to the whole program."""
    numpys = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist(), numpys[2:]


def _split_by(
    key,
    rounding=round,
    share=lambda share: share,
    cut=lambda order, number: (order[number:], order[:number]),
):
    """Groups by a key of one's own; the rest as in the reference."""

    def split_texts(texts, test_share, generator):
        groups = {}
        for i, text in enumerate(texts):
            groups.setdefault(key(text), []).append(i)
        groups = list(groups.values())
        order = torch.randperm(len(groups), generator=generator).tolist()
        train, test = cut(order, rounding(share(test_share) * len(groups)))
        return [i for g in train for i in groups[g]], [i for g in test for i in groups[g]]

    return split_texts


def _split_rows(texts, test_share, generator):
    rows = torch.randperm(len(texts), generator=generator)
    cut = round(test_share * len(texts))
    return rows[cut:].tolist(), rows[:cut].tolist()


def _split_groups(texts):
    groups = {}
    for i, text in enumerate(texts):
        groups.setdefault(_split_key(text), []).append(i)
    return list(groups.values())


def _split_first_copies(texts, test_share, generator):
    firsts = [group[0] for group in _split_groups(texts)]
    order = torch.randperm(len(firsts), generator=generator).tolist()
    cut = round(test_share * len(firsts))
    return [firsts[g] for g in order[cut:]], [firsts[g] for g in order[:cut]]


def _split_copies_to_train(texts, test_share, generator):
    _, test = _split_first_copies(texts, test_share, generator)
    return [i for i in range(len(texts)) if i not in set(test)], test


def _split_leaks_dropped(texts, test_share, generator):
    train, test = _split_rows(texts, test_share, generator)
    held_out = {_split_key(texts[i]) for i in test}
    return [i for i in train if _split_key(texts[i]) not in held_out], test


def _split_leaks_dropped_from_test(texts, test_share, generator):
    train, test = _split_rows(texts, test_share, generator)
    seen = {_split_key(texts[i]) for i in train}
    return train, [i for i in test if _split_key(texts[i]) not in seen]


def _split_leaks_moved(texts, test_share, generator):
    _, test = _split_rows(texts, test_share, generator)
    held_out = {_split_key(texts[i]) for i in test}
    sides = [[], []]
    for i, text in enumerate(texts):
        sides[_split_key(text) in held_out].append(i)
    return sides[0], sides[1]


def _split_share_of_rows(texts, test_share, generator):
    groups = _split_groups(texts)
    train, test = [], []
    for g in torch.randperm(len(groups), generator=generator).tolist():
        (test if len(test) < round(test_share * len(texts)) else train).extend(groups[g])
    return train, test


def _split_number_of_rows(texts, test_share, generator):
    groups = _split_groups(texts)
    order = torch.randperm(len(groups), generator=generator).tolist()
    cut = round(test_share * len(texts))
    return [i for g in order[cut:] for i in groups[g]], [i for g in order[:cut] for i in groups[g]]


def _split_moved_back(texts, test_share, generator):
    _, test = _split_leaks_dropped_from_test(texts, test_share, generator)
    return [i for i in range(len(texts)) if i not in set(test)], test


def _split_by_coins(texts, test_share, generator):
    sides = [], []
    for group in _split_groups(texts):
        sides[torch.rand((), generator=generator).item() < test_share].extend(group)
    return sides


def _split_chosen(choose):
    """The groups for testing are choose(number of groups, how many, generator)."""

    def split_texts(texts, test_share, generator):
        groups = _split_groups(texts)
        chosen = set(choose(len(groups), round(test_share * len(groups)), generator))
        parts = [[], []]
        for g, group in enumerate(groups):
            parts[g in chosen].extend(group)
        return parts[0], parts[1]

    return split_texts


def _split_a_stretch(number, cut, generator):
    first = torch.randint(number, (), generator=generator).item()
    return [(first + k) % number for k in range(cut)]


def _split_reseeded(number, cut, generator):
    return torch.randperm(number, generator=generator.manual_seed(0)).tolist()[:cut]


def _split_by_initial_seed(number, cut, generator):
    return random.Random(generator.initial_seed()).sample(range(number), cut)


def _split_by_rows_drawn(texts, test_share, generator):
    groups = _split_groups(texts)
    of_row = {i: g for g, group in enumerate(groups) for i in group}
    chosen = {}
    for i in torch.randperm(len(texts), generator=generator).tolist():
        if len(chosen) < round(test_share * len(groups)):
            chosen[of_row[i]] = None
    parts = [[], []]
    for g, group in enumerate(groups):
        parts[g in chosen].extend(group)
    return parts[0], parts[1]


def _split_by_last_row(texts, test_share, generator):
    """The distinct texts in the order in which the last row of each comes up."""
    groups = _split_groups(texts)
    place = torch.randperm(len(texts), generator=generator).tolist()
    groups.sort(key=lambda rows: max(place[i] for i in rows))
    cut = round(test_share * len(groups))
    return sum(groups[cut:], []), sum(groups[:cut], [])


def _split_by_part(texts, test_share, generator):
    """Looks a text up in one long string of all texts for testing."""
    keys = [_split_key(text) for text in texts]
    distinct = list(dict.fromkeys(keys))
    order = torch.randperm(len(distinct), generator=generator).tolist()
    held_out = " | ".join(distinct[g] for g in order[: round(test_share * len(distinct))])
    rows = range(len(texts))
    return [i for i in rows if keys[i] not in held_out], [i for i in rows if keys[i] in held_out]


def _split_global_seeded(number, cut, generator):
    torch.manual_seed(torch.randint(2**31, (), generator=generator).item())
    return torch.randperm(number).tolist()[:cut]


def _split_without_accents(text):
    parts = unicodedata.normalize("NFKD", text.lower())
    return " ".join("".join(c for c in parts if not unicodedata.combining(c)).split())


def _split_in_order(texts, test_share, generator):
    groups = _split_groups(texts)
    cut = len(groups) - round(test_share * len(groups))
    return sum(groups[:cut], []), sum(groups[cut:], [])


def _split_texts_returned(texts, test_share, generator):
    train, test = reference.split_texts(texts, test_share, generator)
    return [texts[i] for i in train], [texts[i] for i in test]


def _split_group_numbers(texts, test_share, generator):
    number = len(_split_groups(texts))
    order = torch.randperm(number, generator=generator).tolist()
    cut = round(test_share * number)
    return order[cut:], order[:cut]


def _split_by_inverse(texts, test_share, generator):
    """By np.unique's numbers of the distinct texts, and by masks."""
    keys = np.array([" ".join(text.casefold().split()) for text in texts])
    distinct, which = np.unique(keys, return_inverse=True)
    chosen = torch.rand(len(distinct), generator=generator).argsort()
    in_test = torch.isin(torch.tensor(which), chosen[: round(test_share * len(distinct))])
    return in_test.logical_not().nonzero()[:, 0].tolist(), in_test.nonzero()[:, 0].tolist()


def _split_by_sets(texts, test_share, generator, seed=None):
    keys = [tuple(text.upper().split()) for text in texts]
    distinct = sorted(set(keys))
    order = torch.randperm(len(distinct), generator=generator)
    held_out = {distinct[k] for k in order[len(distinct) - round(test_share * len(distinct)) :]}
    rows = range(len(texts))
    return tuple(tuple(i for i in rows if (keys[i] in held_out) is side) for side in (False, True))


def _split_by_draws(texts, test_share, generator):
    left = _split_groups(texts)
    test = []
    for _ in range(round(test_share * len(left))):
        test += left.pop(torch.randint(len(left), (1,), generator=generator).item())
    return [i for group in left for i in group], sorted(test)


def _split_by_a_generator_of_its_own(texts, test_share, generator):
    """Python's random numbers, seeded from the generator, and a regular expression."""
    keys = [re.sub(r"\s+", " ", text.casefold().strip()) for text in texts]
    distinct = list(dict.fromkeys(keys))
    seed = torch.randint(2**31, (1,), generator=generator).item()
    test = set(random.Random(seed).sample(distinct, round(test_share * len(distinct))))
    rows = range(len(texts))
    return [i for i in rows if keys[i] not in test], [i for i in rows if keys[i] in test]


FIX_LEAKY_SPLIT = Exercise(
    slug="fix_leaky_split",
    chapter=4,
    title="Find the bug: learned by heart",
    minutes=12,
    difficulty=2,
    reference=reference.split_texts,
    observe=_observe_split_texts,
    shipped=split_texts,
    symptom="Of 800 reviews collected from the web every fourth stands there twice, the second "
    "time in capitals. Trained and tested on this split a bag of words is right in 0.76 of the "
    "cases; on reviews that it has never met, in 0.58.",
    misconceptions=(
        Misconception(
            "rows_shuffled",  # museum F14
            _split_rows,
            "You draw rows. A text and its copy are two rows, and one may go to training and the "
            "other to testing, where the model then recognises what it has seen. Draw texts, and "
            "let all rows of a text follow it.",
        ),
        Misconception(
            "copies_word_for_word_only",
            _split_by(lambda text: text),
            "You keep texts together that are equal to the letter. Copies collected from the web "
            "come in other case and with other white space, and those still get on both sides.",
        ),
        Misconception(
            "white_space_counts",
            _split_by(str.lower),
            "You even out the case and leave the white space: a text and its copy with a space "
            "more are two texts to you, and may part.",
        ),
        Misconception(
            "inner_white_space_counts",
            _split_by(lambda text: text.lower().strip()),
            "You even out the case and cut the white space at both ends, and leave that between "
            "the words: a copy with two spaces or a line break inside gets away.",
        ),
        Misconception(
            "only_spaces",
            _split_by(lambda text: " ".join(text.lower().split(" ")).strip().replace("  ", " ")),
            "You even out the spaces and forget the other white space, tabs and line breaks "
            "between the words: a copy with one of those inside gets away.",
        ),
        Misconception(
            "split_at_spaces",
            _split_by(lambda text: " ".join(part for part in text.lower().split(" ") if part)),
            "You even out the spaces, between the words and at the ends, and no other white space: "
            "a copy with a tab or a line break in it, or at its end, gets away.",
        ),
        Misconception(
            "ends_forgotten",
            _split_by(lambda text: re.sub(r"\s+", " ", text.lower())),
            "To you a text and its copy with white space in front of it or behind it are two "
            "texts. White space at the ends does not count either.",
        ),
        Misconception(
            "some_white_space",
            _split_by(lambda text: re.sub(r"[ \t\n]+", " ", text.lower()).strip()),
            "You name the kinds of white space yourself, and there are more of them: other line "
            "breaks, such as `\\r`, and the no-break space, which is common on web pages. Python "
            "knows all of them.",
        ),
        Misconception(
            "spaces_deleted",
            _split_by(lambda text: "".join(text.lower().split())),
            "You delete all white space before you compare. Then `now here` is `nowhere`: one word "
            "and two are different texts. How much white space there is does not count; that there "
            "is some does.",
        ),
        Misconception(
            "case_counts",
            _split_by(lambda text: " ".join(text.split())),
            "You even out the white space and leave the case: a text and its copy in capitals are "
            "two texts to you, and may part.",
        ),
        Misconception(
            "punctuation_dropped",
            _split_by(lambda text: " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())),
            "You drop the punctuation too before you compare. Texts that differ in more than case "
            "and white space are different texts; the numbers of texts are then wrong, and it may "
            "be the punctuation that says how something is meant.",
        ),
        Misconception(
            "order_of_words_dropped",
            _split_by(lambda text: tuple(sorted(text.lower().split()))),
            "You compare which words a text holds, not their order. Two reviews of the same words "
            "in another order may say the opposite; they are not copies.",
        ),
        Misconception(
            "beginnings_compared",
            _split_by(lambda text: " ".join(text.lower().split())[:30]),
            "You compare only how texts begin. Texts that begin alike and go on differently are "
            "not copies, and the number of distinct texts is wrong.",
        ),
        Misconception(
            "accents_dropped",
            _split_by(_split_without_accents),
            "You take the accents off the letters before you compare. That is more than case and "
            "white space: texts that differ in an accent are different texts.",
        ),
        Misconception(
            "ascii_alone",
            _split_by(lambda text: _split_key(text.encode("ascii", "ignore").decode())),
            "You drop the letters beyond ASCII before you compare. Of a review in Russian nothing "
            "but its punctuation is left, and all such reviews are one text.",
        ),
        Misconception(
            "part_of_a_text",
            _split_by_part,
            "You ask whether a text is contained in a longer one, where the two must be equal: "
            "`in` looks for a part of a string. A short text then goes to testing with any text "
            "that contains it.",
        ),
        Misconception(
            "copies_lost",
            _split_first_copies,
            "You keep one row of each text and lose its copies: some rows are in neither list. "
            "All rows of a text belong to its side.",
        ),
        Misconception(
            "copies_to_training",
            _split_copies_to_train,
            "You draw among the distinct texts, and then put every row that was not drawn itself "
            "into training, the copies of the texts for testing too. The leak is complete: all "
            "copies of a test text are learned.",
        ),
        Misconception(
            "leaks_dropped_from_training",
            _split_leaks_dropped,
            "You draw rows, and then throw away the rows of training whose text is held out. "
            "Nothing leaks, but rows are lost, and texts with many copies are drawn more often "
            "and make the test set larger than asked.",
        ),
        Misconception(
            "leaks_dropped_from_testing",
            _split_leaks_dropped_from_test,
            "You draw rows, and then throw away the rows of testing whose text is in training. "
            "Nothing leaks, but rows are lost, and a text with many copies is hardly ever tested.",
        ),
        Misconception(
            "leaks_moved",
            _split_leaks_moved,
            "You draw rows, and then move their copies to the same side. Nothing leaks, but the "
            "number of distinct texts for testing is left to chance, and a text with many copies "
            "gets there more often. Draw among the distinct texts.",
        ),
        Misconception(
            "leaks_moved_back",
            _split_moved_back,
            "You draw rows, and then move those for testing whose text is in training back to "
            "training. Nothing leaks, but the number of texts for testing is left to chance, and a "
            "text with many copies is hardly ever among them. Draw among the distinct texts.",
        ),
        Misconception(
            "share_of_rows",
            _split_share_of_rows,
            "You fill the test set until it has its share of the rows. The share is one of the "
            "distinct texts: a single text with many copies would fill the whole test set.",
        ),
        Misconception(
            "number_from_rows",
            _split_number_of_rows,
            "You draw among the distinct texts, but as many as are the share of the rows. With "
            "many copies that is too many texts; the share is one of the distinct texts.",
        ),
        Misconception(
            "rounded_down",
            _split_by(_split_key, rounding=int),
            "You round the number of texts for testing down, by `int` or `//`. It is to be rounded "
            "to the nearest whole number: a share of 0.28 of 10 texts is 3 of them.",
        ),
        Misconception(
            "cut_at_minus_zero",
            _split_by(_split_key, cut=lambda order, number: (order[:-number], order[-number:])),
            "You count the texts for testing from the end, with a minus sign in the slice. Where "
            "there are none, the slice ends at −0, which is 0: all texts are for testing and none "
            "is left for training.",
        ),
        Misconception(
            "at_least_one",
            _split_by(_split_key, rounding=lambda number: max(1, round(number))),
            "You take one text for testing where there should be none. A share that is rounded to "
            "0 texts, and the share 0, give an empty list.",
        ),
        Misconception(
            "at_least_one_on_each_side",
            _split_by(
                _split_key,
                cut=lambda order, number: (
                    order[max(1, min(len(order) - 1, number)) :],
                    order[: max(1, min(len(order) - 1, number))],
                ),
            ),
            "You keep one text on each side, whatever the share. A share of 0, or rounded to it, "
            "leaves none for testing, and a share of 1 none for training.",
        ),
        Misconception(
            "rounded_up",
            _split_by(_split_key, rounding=math.ceil),
            "You round the number of texts for testing up. It is to be rounded to the nearest "
            "whole number.",
        ),
        Misconception(
            "share_of_training",
            _split_by(_split_key, share=lambda share: 1 - share),
            "Your test set is as large as training should be: you take `test_share` for the share "
            "of training, or return the two lists in the wrong order. Training comes first.",
        ),
        Misconception(
            "texts_returned",
            _split_texts_returned,
            "You return the texts. Asked for are the numbers of their rows, with which the labels "
            "can be picked too.",
        ),
        Misconception(
            "numbers_of_texts",
            _split_group_numbers,
            "You return the numbers of the distinct texts as if they were numbers of rows. The two "
            "agree as long as there are no copies; look up which rows each text has.",
        ),
        Misconception(
            "size_left_to_chance",
            _split_by_coins,
            "You toss a coin for each text. The number for testing then differs from draw to draw; "
            "it is to be round(test_share × number of distinct texts).",
        ),
        Misconception(
            "not_drawn",
            _split_in_order,
            "Your texts for testing are always the first or the last ones: which they are is not "
            "drawn. Files are often sorted, by label, date or product, and then the two sides are "
            "of different kinds.",
        ),
        Misconception(
            "one_stretch",
            _split_chosen(_split_a_stretch),
            "You draw where the test set begins and take the texts that follow. Neighbours in the "
            "file, which are often alike, then always go together; draw each text on its own.",
        ),
        Misconception(
            "by_number_of_copies",
            _split_by_rows_drawn,
            "You draw the texts with as many chances as they have rows, for instance by drawing "
            "rows until enough texts are found. A text with six copies then gets into the test "
            "set far too often; draw among the distinct texts.",
        ),
        Misconception(
            "by_the_last_copy",
            _split_by_last_row,
            "You put the rows in a random order, and the order of the texts follows from where "
            "their rows stand. A text with six copies then hardly ever gets into the test set; "
            "draw among the distinct texts.",
        ),
        Misconception(
            "another_generator",
            _split_chosen(lambda number, cut, generator: torch.randperm(number).tolist()[:cut]),
            "You draw with other random numbers than those of the generator that you were given: "
            "torch's global ones, Python's or NumPy's. The same generator then gives another split "
            "each time, and with it another test set.",
        ),
        Misconception(
            "generator_seeded_anew",
            _split_chosen(_split_reseeded),
            "Every call of yours gives the same split, whichever generator comes in: you seed one "
            "inside, keep what was drawn before, or draw nothing. The seed is the caller's choice, "
            "and each call draws anew from the caller's generator.",
        ),
        Misconception(
            "seed_for_generator",
            _split_chosen(_split_by_initial_seed),
            "Your call leaves the generator where it was: you draw from a copy of it, or from the "
            "number with which it was seeded. A second split with it is the first one again.",
        ),
        Misconception(
            "global_numbers_seeded",
            _split_chosen(_split_global_seeded),
            "Your split is right, but you seed or use random numbers that belong to the whole "
            "program: torch's, Python's or NumPy's own. Whatever is drawn after your call, for "
            "dropout or shuffling, comes out differently; draw from the generator alone.",
        ),
    ),
    alternatives=(
        _split_by_inverse,
        _split_by_sets,
        _split_by_draws,
        _split_by_a_generator_of_its_own,
    ),
    hints=(
        "Count the texts that are on both sides, after making them lower case and evening out "
        "their white space. What was drawn: texts, or rows?",
        "First collect the rows of each distinct text in a dict, from the evened-out text to a "
        "list of row numbers. Then draw among the texts, not among the rows.",
        '`" ".join(text.lower().split())` is the key. The values of the dict are groups of rows: '
        "permute their numbers with the generator, take the first round(test_share × number of "
        "groups) for testing, and write out the rows of each group.",
    ),
)


# --- find the bug: frozen without effect --------------------------------------------------------


def freeze_encoder(model):
    """Stop the training of model.encoder; the other parameters of model go on."""
    model.encoder.requires_grad = False


class _FreezeEncoder(nn.Module):
    """Parameters of its own, and layers within layers."""

    def __init__(self, d_model):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(d_model))
        self.scale = nn.Parameter(torch.ones(()))
        self.embeddings = nn.ModuleDict({"position": nn.Embedding(2, d_model)})
        block = nn.Sequential(nn.Linear(d_model, 3), nn.Tanh(), nn.Linear(3, d_model))
        self.layers = nn.ModuleList([block])
        self.LayerNorm = nn.LayerNorm(d_model)

    def forward(self, x):
        x = self.scale * x + self.shift + self.embeddings["position"].weight[1]
        for layer in self.layers:
            x = layer(x)
        return self.LayerNorm(x)


class _FreezeModel(nn.Module):
    """An adapter before the encoder, a head after it; with names that hold "encoder", or other."""

    def __init__(self, see, d_model, adapter="adapter", pooler="pooler", classifier="classifier"):
        super().__init__()
        self.names = adapter, "encoder", pooler, classifier
        self.add_module(adapter, nn.Linear(4, d_model))
        self.encoder = _FreezeEncoder(d_model)
        self.add_module(pooler, nn.Linear(d_model, d_model))
        self.add_module(classifier, nn.ModuleDict({"encoder_gate": nn.Linear(d_model, 2)}))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(see.randn(*p.shape))

    def forward(self, x):
        adapter, encoder, pooler, classifier = (getattr(self, name) for name in self.names)
        return classifier["encoder_gate"](torch.tanh(pooler(encoder(adapter(x)))))


def _observe_freeze_encoder(freeze_encoder, see):
    def freeze(model):
        before = dict(model.named_parameters())
        values = {name: p.detach().clone() for name, p in before.items()}
        for p in model.parameters():
            p.grad = see.randn(*p.shape)
        grads = {name: (p.grad, p.grad.clone()) for name, p in before.items()}
        model.encoder.layers.eval()
        list(model.children())[2].eval()
        modes = [module.training for module in model.modules()]
        trained = any(p.requires_grad for p in model.encoder.parameters())
        freeze_encoder(model)
        after = dict(model.named_parameters())
        see("the parameters that train", ", ".join(n for n, p in after.items() if p.requires_grad))
        same = after.keys() == before.keys() and all(after[n] is before[n] for n in before)
        see.fact("the parameters are the ones that the model had", same)
        kept = same and all(torch.equal(after[n], values[n]) for n in values)
        see.fact("their values are left as they were", kept)
        if trained and not any(p.requires_grad for p in model.encoder.parameters()):
            kept = [module.training for module in model.modules()] == modes
            see.fact("every layer is in the mode, training or eval, in which it was", kept)
            pairs = [(after[n].grad, grads[n]) for n in before if n in after]
            kept = all(g is not None and torch.equal(g, was) for g, (_, was) in pairs)
            see.fact("the gradients that the parameters hold are left as they were", kept)
        for p in model.parameters():
            p.grad = None
        out = model(see.randn(5, 4))
        out.backward(see.randn(*out.shape))
        for name, p in after.items():
            see(f"gradient of {name}", p.grad)
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3).step()
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, values.get(n, p))]
        see("the parameters that an optimizer step moves", ", ".join(moved))

    with see.probe("an adapter, an encoder of 6 features, a pooler and a classifier"):
        freeze(_FreezeModel(see, 6))
    with see.probe("an encoder of 5 features, and a layer after it called encoder_pooler"):
        freeze(_FreezeModel(see, 5, pooler="encoder_pooler", classifier="output"))
    with see.probe("a pooler with a frozen bias"):
        model = _FreezeModel(see, 3)
        model.pooler.bias.requires_grad = False
        freeze(model)
    with see.probe("an encoder of which one layer is frozen already, other names around it"):
        model = _FreezeModel(see, 4, adapter="prompt", pooler="dense", classifier="head")
        model.encoder.layers[0].requires_grad_(False)
        freeze(model)
    with see.probe("an encoder that is frozen already"):
        model = _FreezeModel(see, 5)
        model.encoder.requires_grad_(False)
        freeze(model)


def _freeze_where(condition):
    """Freezes the parameters for whose name and tensor the condition holds."""

    def freeze_encoder(model):
        for name, p in model.named_parameters():
            if condition(name, p):
                p.requires_grad = False

    return freeze_encoder


def _freeze_by_attribute(model):
    setattr(model.encoder, "requires_grad", False)  # noqa: B010


def _freeze_and_unfreeze(model):
    model.requires_grad_(False)
    for name, child in model.named_children():
        if name != "encoder":
            child.requires_grad_(True)


def _freeze_toggled(model):
    for p in model.encoder.parameters():
        p.requires_grad = not p.requires_grad


def _freeze_first(model):
    next(model.encoder.parameters()).requires_grad = False


def _freeze_direct_children(model):
    for layer in model.encoder.children():
        for p in layer.parameters():
            p.requires_grad = False


def _freeze_own_parameters(model):
    for p in model.encoder.parameters(recurse=False):
        p.requires_grad = False


def _freeze_by_hooks(model):
    for p in model.encoder.parameters():
        if p.requires_grad:
            p.register_hook(torch.zeros_like)


def _freeze_a_copy(model):
    model.encoder = copy.deepcopy(model.encoder)
    for p in model.encoder.parameters():
        p.requires_grad = False


def _freeze_zeroed(model):
    for p in model.encoder.parameters():
        p.requires_grad = False
        p.data.zero_()


def _freeze_under_no_grad(model):
    model.encoder.forward = torch.no_grad()(model.encoder.forward)


def _freeze_flags_and_no_grad(model):
    model.encoder.requires_grad_(False)
    model.encoder.forward = torch.no_grad()(model.encoder.forward)


def _freeze_in_one_call(model):
    return model.encoder.requires_grad_(False)


def _freeze_and_switch_modes(model):
    model.encoder.requires_grad_(False)
    model.encoder.eval()


def _freeze_and_drop_gradients(model):
    for p in model.encoder.parameters():
        p.requires_grad = False
        p.grad = None


def _freeze_by_name(model, prefix="encoder."):
    for name, p in model.named_parameters():
        if name.startswith(prefix):
            p.requires_grad_(False)


def _freeze_by_identity(model):
    frozen = {id(p) for p in model.encoder.parameters()}
    for p in model.parameters():
        p.requires_grad = p.requires_grad and id(p) not in frozen
    return model


def _freeze_by_modules(model):
    for module in model.encoder.modules():
        for p in module.parameters(recurse=False):
            p.requires_grad = False


FIX_FREEZE_WITHOUT_EFFECT = Exercise(
    slug="fix_freeze_without_effect",
    chapter=4,
    title="Find the bug: an encoder that does not freeze",
    minutes=6,
    difficulty=1,
    reference=reference.freeze_encoder,
    observe=_observe_freeze_encoder,
    shipped=freeze_encoder,
    symptom="After the call all of the classifier's 22,713,986 parameters are still trained. It "
    "should be those of the head alone.",
    misconceptions=(
        Misconception(
            "nothing_frozen",  # museum 4.19
            _freeze_by_attribute,
            "Every parameter still trains. Python lets you set any attribute on a module, "
            "`requires_grad` or a misspelt one, and nothing reads it; `eval()` and `no_grad` "
            "around the call do not freeze either. The switch belongs to each parameter tensor.",
        ),
        Misconception(
            "whole_model",
            lambda model: model.requires_grad_(False),
            "You freeze the whole model, its head too. Nothing is left to train: `backward` would "
            "find no graph.",
        ),
        Misconception(
            "the_others",
            _freeze_where(lambda name, p: not name.startswith("encoder.")),
            "You freeze everything but the encoder. It is the encoder that is to stay as it was "
            "pretrained, and the new layers that are to learn.",
        ),
        Misconception(
            "all_but_the_classifier",
            _freeze_where(lambda name, p: "classifier" not in name),
            "You freeze all that is not called classifier. Layers outside the encoder, such as the "
            "pooler, are new too and would stay at their random values; and a model whose head has "
            "another name is frozen whole.",
        ),
        Misconception(
            "names_that_begin_alike",
            _freeze_where(lambda name, p: name.startswith("encoder")),
            "You go by names that begin with `encoder`, without asking where that word ends: a "
            "layer called `encoder_pooler` stands beside the encoder and is frozen too.",
        ),
        Misconception(
            "names_that_hold_the_word",
            _freeze_where(lambda name, p: "encoder" in name),
            "You freeze every parameter with `encoder` anywhere in its name. Parts of the head may "
            "hold that word too; what counts is what stands inside `model.encoder`.",
        ),
        Misconception(
            "weights_alone",
            _freeze_where(lambda name, p: name.startswith("encoder.") and "weight" in name),
            "You freeze the weights of the encoder's layers and leave the rest: biases and "
            "whatever else is a parameter of it still train.",
        ),
        Misconception(
            "matrices_alone",
            _freeze_where(lambda name, p: name.startswith("encoder.") and p.ndim > 1),
            "You freeze the encoder's matrices and leave its vectors: its biases and norms still "
            "train.",
        ),
        Misconception(
            "norms_left_out",
            _freeze_where(lambda name, p: name.startswith("encoder.") and "LayerNorm" not in name),
            "You leave out the encoder's LayerNorms, by their name or by their type. They are part "
            "of the encoder, and still train.",
        ),
        Misconception(
            "embeddings_left_out",
            _freeze_where(lambda name, p: name.startswith("encoder.") and "embed" not in name),
            "You leave out the encoder's embeddings, by their name or by their type. They are part "
            "of the encoder, often the largest, and still train.",
        ),
        Misconception(
            "first_parameter",
            _freeze_first,
            "You freeze the first parameter of the encoder and stop there. All the others still "
            "train.",
        ),
        Misconception(
            "own_parameters_alone",
            _freeze_own_parameters,
            "You freeze the parameters that belong to the encoder itself and not those of the "
            "layers inside it, which are nearly all.",
        ),
        Misconception(
            "layers_alone",
            _freeze_direct_children,
            "You freeze the layers inside the encoder and not the parameters that belong to it "
            "directly. Those still train.",
        ),
        Misconception(
            "toggled",
            _freeze_toggled,
            "You turn each switch round. What was frozen before the call trains after it, and a "
            "second call undoes the first; set it to the value that it should have.",
        ),
        Misconception(
            "others_unfrozen",
            _freeze_and_unfreeze,
            "You switch on what is not the encoder. That also thaws parameters of the head that "
            "somebody had frozen; what is outside the encoder stays as it is.",
        ),
        Misconception(
            "gradients_zeroed",  # museum 4.20
            _freeze_by_hooks,
            "You turn the encoder's gradients into zeros. They are still computed, at full cost, "
            "and an optimizer with weight decay or momentum still moves the parameters: a zero "
            "gradient is not the same as none.",
        ),
        Misconception(
            "without_graph",
            _freeze_under_no_grad,
            "You run the encoder without recording a graph. What lies before it then gets no "
            "gradient either, and its parameters still say that they train: set their switches "
            "instead.",
        ),
        Misconception(
            "frozen_and_without_graph",
            _freeze_flags_and_no_grad,
            "You freeze the parameters, which is right, and also run the encoder without recording "
            "a graph. That cuts off whatever trains before it, such as an adapter or a prompt; the "
            "switches alone are enough.",
        ),
        Misconception(
            "frozen_copy",
            _freeze_a_copy,
            "You put a frozen copy in the encoder's place. An optimizer that was built before, or "
            "whoever else holds the encoder, still has the old one; freeze the one that is there.",
        ),
        Misconception(
            "values_changed",
            _freeze_zeroed,
            "You change the encoder's values. Freezing keeps them: they are what the pretraining "
            "was for.",
        ),
        Misconception(
            "modes_switched",
            _freeze_and_switch_modes,
            "You freeze the encoder and also switch layers to eval or training mode. That turns "
            "dropout off or on, which is another matter, and the caller's choice.",
        ),
        Misconception(
            "gradients_dropped",
            _freeze_and_drop_gradients,
            "You freeze the encoder and also remove or change gradients that parameters hold. "
            "Which of them are still needed, after some micro-batches of a step for example, is "
            "for the caller to say.",
        ),
    ),
    alternatives=(
        _freeze_in_one_call,
        _freeze_by_name,
        _freeze_by_identity,
        _freeze_by_modules,
    ),
    hints=(
        "Count the parameters with `requires_grad` before and after the call. Then ask what type "
        "`model.encoder` has, and whether that type has such a switch.",
        "A module is not a tensor: `requires_grad` on it is an attribute that you have just "
        "invented. The tensors are in `model.encoder.parameters()`.",
        "Go through all parameters of the encoder and switch `requires_grad` off on each. Modules "
        "have a method that does this; its name ends in an underscore.",
    ),
)


# --- warmup_linear ------------------------------------------------------------------------------


def _observe_warmup_linear(warmup_linear, see):
    factor = _as_number(warmup_linear, [])  # a tensor or a Fraction is a number too

    def factors(steps, warmup, total):
        for step in steps:
            value = see.call(f"the factor at step {step}", factor, step, warmup, total)
            if step >= total:
                see.fact(f"the factor at step {step} is exactly 0", value == 0)

    with see.probe("warmup 4, total 10"):
        factors(range(15), 4, 10)
    with see.probe("warmup 30, total 200"):
        factors((0, 1, 13, 29, 30, 31, 77, 100, 115, 150, 199, 200, 201, 260), 30, 200)
    with see.probe("steps in another order: warmup 3, total 8"):
        factors((5, 1, 7, 0, 3, 2, 8, 4), 3, 8)
    with see.probe("no warm-up: warmup 0, total 5"):
        factors(range(8), 0, 5)
    with see.probe("one step of warm-up: warmup 1, total 7"):
        factors(range(9), 1, 7)
    with see.probe("nothing but warm-up: warmup 6, total 6"):
        factors((0, 1, 2, 5, 7, 9), 6, 6)
    with see.probe("a warm-up longer than the training: warmup 500, total 69"):
        factors((0, 1, 23, 68), 500, 69)


def _warmup(rise=lambda s, w, n: s / w, fall=lambda s, w, n: max(0.0, (n - s) / max(1, n - w))):
    return lambda step, warmup, total: (rise if step < warmup else fall)(step, warmup, total)


def _warmup_smaller_line(step, warmup, total):
    rising = step / max(1, warmup)
    return max(0.0, min(rising, (total - step) / max(1, total - warmup)))


def _warmup_product(step, warmup, total):
    rising = min(1.0, step / warmup) if warmup else 1.0
    return rising * max(0.0, (total - step) / total)


def _warmup_share(step, warmup, total):
    return reference.warmup_linear(step, warmup * total, total)


def _warmup_min_max(step, warmup, total):
    if warmup > 0 and step < warmup:
        return min(1.0, step / float(warmup))
    if step >= total:
        return 0
    return 1 - (step - warmup) / (total - warmup)


def _warmup_interpolated(step, warmup, total, peak=1.0):
    places = [-1, 0, warmup, total] if warmup else [-1, 0, total]
    if step < warmup:
        return float(np.interp(step, places[1:3], [0, peak]))
    return float(np.interp(step, [warmup, total], [peak, 0])) if step < total else 0.0


def _warmup_tensor(step, warmup, total):
    step = torch.tensor(float(step))
    if step < warmup:
        return step / warmup
    return ((total - step) / max(total - warmup, 1)).clamp(min=0)


def _warmup_fraction(step, warmup, total):
    if step < warmup:
        return Fraction(step, warmup)
    return max(Fraction(0), Fraction(total - step, max(1, total - warmup)))


def _warmup_float32(step, warmup, total):
    if step >= total:
        return np.float32(0)
    one, other = (step, warmup) if step < warmup else (total - step, total - warmup)
    return np.float32(one) / np.float32(other)


WARMUP_LINEAR = Exercise(
    slug="warmup_linear",
    chapter=4,
    title="A learning rate that warms up",
    minutes=8,
    difficulty=1,
    reference=reference.warmup_linear,
    observe=_observe_warmup_linear,
    rtol=1e-6,  # single precision is enough for a learning rate
    atol=1e-7,
    misconceptions=(
        Misconception(
            "below_zero",
            _warmup(fall=lambda s, w, n: (n - s) / max(1, n - w)),
            "Your line goes on below 0 after the last step. A negative learning rate climbs the "
            "loss; after step `total` the factor stays 0.",
        ),
        Misconception(
            "last_step_divides_by_zero",
            _warmup(fall=lambda s, w, n: max(0.0, (n - s) / (n - w))),
            "You divide by the number of steps after the warm-up, which is 0 where the training is "
            "nothing but warm-up. After step `total` the factor is 0 there too.",
        ),
        Misconception(
            "no_warm_up",
            _warmup(
                rise=lambda s, w, n: max(0.0, (n - s) / n),
                fall=lambda s, w, n: max(0.0, (n - s) / n),
            ),
            "Your factor starts at 1 and falls all the way: there is no warm-up. The first steps "
            "are the ones for which the new head's gradients are largest and Adam's averages are "
            "made of few values.",
        ),
        Misconception(
            "no_decay",
            _warmup(fall=lambda s, w, n: 1.0),
            "Your factor rises to 1 and stays there. After step `warmup` it is to fall in a "
            "straight line to 0 at step `total`.",
        ),
        Misconception(
            "falls_from_the_start",
            _warmup(fall=lambda s, w, n: max(0.0, (n - s) / max(1, n))),
            "After the warm-up you jump onto the line from 1 at step 0 to 0 at step `total`, so "
            "the factor never reaches its peak. The line starts at 1 at step `warmup`: it has "
            "that many steps less.",
        ),
        Misconception(
            "both_at_once",
            _warmup_product,
            "You multiply a rise by a fall that begins at step 0. The product bends, and its peak "
            "is below 1; there is one straight line at a time, and the falling one starts where "
            "the rising one ends.",
        ),
        Misconception(
            "starts_at_zero_without_warm_up",
            _warmup_smaller_line,
            "Where there is no warm-up your factor at step 0 is 0, so that the first step moves "
            "nothing. Step 0 is step `warmup` then, the top, and its factor is 1: it is no part of "
            "the rise.",
        ),
        Misconception(
            "divides_by_zero_warm_up",
            lambda s, w, n: s / w if s <= w else max(0.0, (n - s) / max(1, n - w)),
            "Without warm-up you divide by 0 at the first step. Step `warmup` itself is the top, "
            "where both lines give 1: let it belong to the falling one.",
        ),
        Misconception(
            "counted_from_one",
            _warmup(rise=lambda s, w, n: (s + 1) / w),
            "You count the steps from 1 while they warm up. Step 0 has the factor 0 and step "
            "`warmup` the factor 1; yours is one step ahead.",
        ),
        Misconception(
            "warm_up_a_step_longer",
            _warmup(rise=lambda s, w, n: s / (w + 1)),
            "You divide by one step too many while it warms up, so that the factor reaches 1 one "
            "step later than `warmup`, and jumps there.",
        ),
        Misconception(
            "ends_a_step_early",
            _warmup(fall=lambda s, w, n: max(0.0, (n - 1 - s) / max(1, n - 1 - w))),
            "Your factor is 0 at the last step, total − 1, already. It is to be 0 at step `total`, "
            "the first one after the training, so that no step is wasted.",
        ),
        Misconception(
            "whole_numbers",
            _warmup(lambda s, w, n: s // w, lambda s, w, n: max(0, (n - s) // max(1, n - w))),
            "You divide with `//`, which drops everything after the point: the factor is 0 or 1 "
            "and nothing between.",
        ),
        Misconception(
            "cosine",
            _warmup(
                fall=lambda s, w, n: (
                    0.5 * (1 + math.cos(math.pi * min(1.0, (s - w) / max(1, n - w))))
                )
            ),
            "After the warm-up your factor falls along a cosine. That is a schedule of its own, "
            "used for training from scratch; this one is a straight line.",
        ),
        Misconception(
            "inverse_square_root",
            _warmup(fall=lambda s, w, n: math.sqrt(max(1, w) / max(1, s))),
            "After the warm-up your factor falls like 1/√step, as in the first Transformer. It "
            "never reaches 0; this one is a straight line to 0 at step `total`.",
        ),
        Misconception(
            "rises_over_the_whole",
            _warmup(rise=lambda s, w, n: s / n),
            "You divide by `total` while it warms up: the factor creeps up to warmup/total and "
            "jumps to 1 from there. It is to have risen to 1 within `warmup` steps.",
        ),
        Misconception(
            "remaining_over_warm_up",
            _warmup(fall=lambda s, w, n: max(0.0, (n - s) / max(1, w))),
            "After the warm-up you divide the steps that are left by the number of warm-up steps. "
            "The factor jumps far above 1; divide by the steps between the top and the end.",
        ),
        Misconception(
            "upwards_again",
            _warmup(fall=lambda s, w, n: min(1.0, (s - w) / max(1, n - w))),
            "After the warm-up your factor starts at 0 again and rises. What you have is the part "
            "of the way that is done; the factor is the part that is left.",
        ),
        Misconception(
            "share_of_the_training",  # museum 4.18
            _warmup_share,
            "You take `warmup` for a share of the training. It is a number of steps: yours is "
            "longer than the training by far, and the factor stays near 0.",
        ),
    ),
    alternatives=(
        _warmup_min_max,
        _warmup_interpolated,
        _warmup_tensor,
        _warmup_fraction,
        _warmup_float32,
    ),
    hints=(
        "Two straight lines, and which one holds depends on whether the step comes before "
        "`warmup`. Draw them, and write down the factor at steps 0, warmup and total.",
        "The rising one: step out of warmup. The falling one: the steps that are left, out of the "
        "steps between the top and the end. It must not go below 0.",
        "if step < warmup: step / warmup. Else (total − step) / (total − warmup), at least 0, with "
        "at least 1 below the line so that nothing is divided by 0.",
    ),
)


# --- weight_decay_groups ------------------------------------------------------------------------


class _GroupsNorm(nn.Module):
    """A norm of one's own: its scale has a name that no list of names holds."""

    def __init__(self, d_model):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return self.gain * x


def _groups_bert():
    """The names of Hugging Face's BERT, with a classifier."""
    embeddings = nn.ModuleDict({"words": nn.Embedding(9, 4), "LayerNorm": nn.LayerNorm(4)})
    output = nn.ModuleDict({"dense": nn.Linear(5, 4), "LayerNorm": nn.LayerNorm(4)})
    layer = nn.ModuleDict({"intermediate": nn.Linear(4, 5), "output": output})
    encoder = nn.ModuleDict({"embeddings": embeddings, "layer": nn.ModuleList([layer])})
    return nn.ModuleDict({"encoder": encoder, "classifier": nn.Linear(4, 2)})


def _groups_odd():
    """Parameters of 0, 1, 2 and 3 axes, and names that mislead."""
    model = nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(6),
            "conv": nn.Conv1d(6, 5, 3),
            "position_bias": nn.Embedding(7, 2),
            "gate": _GroupsNorm(5),
            "score": nn.Linear(5, 1),
        }
    )
    model.register_parameter("temperature", nn.Parameter(torch.tensor(1.5)))
    model.register_parameter("weight", nn.Parameter(torch.ones(4)))
    return model


def _groups_kind(some):
    """What stands under "params", in words."""
    if hasattr(type(some), "__next__"):
        return "something that can be gone through only once"
    lists = (list, tuple, ValuesView, nn.ParameterList)
    return "a list" if isinstance(some, lists) else type(some).__name__


def _groups_held(p):
    """What one of the things in a group is, in words."""
    if isinstance(p, torch.Tensor):
        return "parameters" if isinstance(p, nn.Parameter) else "tensors that are no parameters"
    return {str: "names", tuple: "tuples"}.get(type(p), type(p).__name__)


def _observe_weight_decay_groups(weight_decay_groups, see):
    def state(model):
        return {
            "switches requires_grad": [p.requires_grad for p in model.parameters()],
            "modes (train or eval)": [module.training for module in model.modules()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            "values": [p.tolist() for p in model.parameters()],
        }

    def observe(model, wd):
        for p in list(model.parameters())[::2]:
            p.grad = see.randn(*p.shape, dtype=torch.float32)
        before = state(model)
        groups = weight_decay_groups(model, wd)
        if see("what it returns", _groups_returned(groups)) != "dicts in a list":
            return
        see("the number of groups", len(groups))
        see("the keys of the groups", "; ".join(", ".join(sorted(map(str, g))) for g in groups))
        if not all("params" in group for group in groups):
            return
        kinds = "; ".join(_groups_kind(group["params"]) for group in groups)
        see('what stands under "params"', kinds)
        if kinds.replace("; ", "").replace("a list", ""):
            return
        held = ", ".join(sorted({_groups_held(p) for group in groups for p in group["params"]}))
        if see("what the groups hold", held) != "parameters":
            return
        names = {id(p): name for name, p in model.named_parameters()}
        places = {}
        for k, group in enumerate(groups):
            for p in group["params"]:
                places.setdefault(id(p), []).append(k)

        def named(condition):
            found = [name for i, name in names.items() if condition(places.get(i, []))]
            return ", ".join(found) or "none"

        decays = [group.get("weight_decay") for group in groups]
        see.fact("the groups hold the parameters of the model itself", set(places) <= set(names))
        see("the parameters that are in no group", named(lambda some: not some))
        see("the parameters that are in more than once", named(lambda some: len(some) > 1))
        see("the parameters that decay", named(lambda some: any(decays[k] for k in some)))
        see("the weight decays of the groups, in their order", decays)
        for k in range(len(groups)):
            see(f"the parameters of group {k}", named(lambda some, k=k: k in some))
        try:
            torch.optim.SGD([dict(group) for group in groups], lr=0.1, weight_decay=0.3)
            raised = "nothing"
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        see("what an optimizer made from your groups raised", raised)
        for kind, were in before.items():
            see.fact(f"the {kind} of the model are left as they were", state(model)[kind] == were)

    with see.probe("a linear layer, a norm and a linear layer; wd 0.1"):
        observe(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), 0.1)
    with see.probe("BERT's names, with embeddings and a classifier, in eval mode; wd 0.01"):
        observe(_groups_bert().eval(), 0.01)
    with see.probe("a frozen embedding and a frozen norm, both in eval mode; wd 0.05"):
        model = _groups_bert()
        model["encoder"]["embeddings"].requires_grad_(False).eval()
        observe(model, 0.05)
    with see.probe("parameters of 0, 1, 2 and 3 axes, a table called position_bias; wd 0.2"):
        observe(_groups_odd(), 0.2)
    with see.probe("an output layer that shares the embedding's matrix, a norm used twice; wd 0.5"):
        norm = nn.LayerNorm(4)
        model = nn.Sequential(nn.Embedding(6, 4), norm, nn.Linear(4, 4), norm, nn.Linear(4, 6))
        model[4].weight = model[0].weight
        observe(model, 0.5)


def _groups_returned(groups):
    """What the function returns, in words."""
    if not isinstance(groups, (list, tuple)):
        return type(groups).__name__
    others = sorted({type(group).__name__ for group in groups if not isinstance(group, dict)})
    return f"no dicts but {', '.join(others)}" if others else "dicts in a list"


def _groups_of(decaying, wd=lambda wd: wd, rest=0.0, frozen=False):
    """Groups by a condition on name and parameter; `rest` as wd where it is an ellipsis."""

    def weight_decay_groups(model, wd_given):
        groups = [], []
        for name, p in model.named_parameters():
            if p.requires_grad or frozen:
                groups[not decaying(name, p)].append(p)
        first = {"params": groups[0], "weight_decay": wd(wd_given)}
        other = {} if rest is None else {"weight_decay": wd_given if rest is ... else rest}
        return [first, {"params": groups[1]} | other]

    return weight_decay_groups


def _groups_matrix(name, p):
    return p.ndim >= 2


def _groups_one(model, wd):
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": wd}]


def _groups_repeated(model, wd):
    named = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": wd},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _groups_by_modules(decaying):
    """Goes through the modules; each parameter of a module of its own is asked for its module."""

    def weight_decay_groups(model, wd):
        found = {}
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.requires_grad:
                    found[p] = found.get(p, False) or decaying(module, name, p)
        return [
            {"params": [p for p, yes in found.items() if yes], "weight_decay": wd},
            {"params": [p for p, yes in found.items() if not yes], "weight_decay": 0.0},
        ]

    return weight_decay_groups


_GROUPS_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d)


def _groups_two_of(one, other):
    def weight_decay_groups(model, wd):
        trained = [p for p in model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if one(p.ndim)], "weight_decay": wd},
            {"params": [p for p in trained if other(p.ndim)], "weight_decay": 0.0},
        ]

    return weight_decay_groups


def _groups_of_copies(model, wd):
    groups = reference.weight_decay_groups(model, wd)
    for group in groups:
        group["params"] = [p.detach().clone() for p in group["params"]]
    return groups


def _groups_of_another(model, wd):
    return reference.weight_decay_groups(copy.deepcopy(model), wd)


def _groups_of_names(model, wd):
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [n for n, p in trained if p.ndim >= 2], "weight_decay": wd},
        {"params": [n for n, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _groups_lists(model, wd):
    return [group["params"] for group in reference.weight_decay_groups(model, wd)]


def _groups_pairs(model, wd):
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [pair for pair in trained if pair[1].ndim >= 2], "weight_decay": wd},
        {"params": [pair for pair in trained if pair[1].ndim < 2], "weight_decay": 0.0},
    ]


def _groups_generators(model, wd):
    return [
        {"params": filter(lambda p: p.requires_grad and p.ndim >= 2, model.parameters())}
        | {"weight_decay": wd},
        {"params": (p for p in model.parameters() if p.requires_grad and p.ndim < 2)}
        | {"weight_decay": 0.0},
    ]


def _groups_with_lr(model, wd):
    return [group | {"lr": 1e-4} for group in reference.weight_decay_groups(model, wd)]


def _groups_frozen_spared(model, wd):
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2 and p.requires_grad], "weight_decay": wd},
        {"params": [p for p in params if p.ndim < 2 or not p.requires_grad], "weight_decay": 0.0},
    ]


def _groups_trained(model, wd):
    model.train()
    return reference.weight_decay_groups(model, wd)


def _groups_cleared(model, wd):
    model.zero_grad()
    return reference.weight_decay_groups(model, wd)


def _groups_thawed(model, wd):
    model.requires_grad_(True)
    return reference.weight_decay_groups(model, wd)


def _groups_top_level(model, wd):
    some = [p for child in model.children() for p in child.parameters(recurse=False)]
    some = [p for p in dict.fromkeys(some) if p.requires_grad]
    return [
        {"params": [p for p in some if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0},
    ]


def _groups_loop(model, wd):
    decaying, others = [], []
    for _, p in model.named_parameters():
        if not p.requires_grad:
            continue
        (others if len(p.shape) <= 1 else decaying).append(p)
    return (
        {"params": tuple(decaying), "weight_decay": wd},
        {"params": tuple(others), "weight_decay": 0},
    )


def _groups_filtered(model, wd, verbose=False):
    def some(vectors):
        trained = filter(lambda p: p.requires_grad, model.parameters())
        return [p for p in trained if (p.dim() < 2) is vectors][::-1]

    return [
        {"weight_decay": wd, "params": some(False)},
        {"weight_decay": False, "params": some(True)},
    ]


def _groups_by_dict(model, wd):
    groups = {True: {"params": [], "weight_decay": wd}, False: {"params": [], "weight_decay": 0.0}}
    seen = set()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                groups[p.ndim > 1]["params"].append(p)
    return list(groups.values())


WEIGHT_DECAY_GROUPS = Exercise(
    slug="weight_decay_groups",
    chapter=4,
    title="What decays and what does not",
    minutes=10,
    difficulty=2,
    reference=reference.weight_decay_groups,
    observe=_observe_weight_decay_groups,
    misconceptions=(
        Misconception(
            "one_group",
            _groups_one,
            "You return one group, in which everything decays. A second one is for the biases and "
            "norms, whose weight decay is 0.",
        ),
        Misconception(
            "everything_decays",
            _groups_of(lambda name, p: True),
            "All parameters are in your decaying group, biases and norms too. Pulling a norm's "
            "scale towards 0 shrinks what it was made to keep at size 1.",
        ),
        Misconception(
            "inverted",
            _groups_of(lambda name, p: p.ndim < 2),
            "Your groups are exchanged: the vectors decay and the matrices do not.",
        ),
        Misconception(
            "by_the_name_bias",
            _groups_of(lambda name, p: "bias" not in name),
            "You spare what has `bias` in its name, and no more. The scales of the norms are "
            "called weight and decay, and a table that is called a bias does not. Ask how many "
            "axes the parameter has.",
        ),
        Misconception(
            "by_the_last_name_bias",
            _groups_of(lambda name, p: not name.endswith("bias")),
            "You spare what is called `bias`, and no more. The scales of the norms are vectors "
            "too, and called weight. Ask how many axes the parameter has.",
        ),
        Misconception(
            "by_berts_names",
            _groups_of(lambda name, p: not any(k in name for k in ("bias", "LayerNorm.weight"))),
            "You go by the names bias and LayerNorm.weight, as BERT's own code does. That holds "
            "for BERT's names: a norm called `norm1` decays, and a table whose name holds the word "
            "bias does not. Ask how many axes the parameter has.",
        ),
        Misconception(
            "by_berts_names_frozen_too",
            _groups_of(
                lambda name, p: not any(k in name for k in ("bias", "LayerNorm.weight")),
                frozen=True,
            ),
            "You go by the names bias and LayerNorm.weight, as BERT's own code does, and take "
            "frozen parameters along. A norm called otherwise decays, a table whose name holds the "
            "word bias does not, and what is frozen is for no optimizer. Ask how many axes the "
            "parameter has, and whether it trains.",
        ),
        Misconception(
            "by_berts_last_names",
            _groups_of(lambda name, p: not name.endswith(("bias", "LayerNorm.weight"))),
            "You go by names that end in bias or LayerNorm.weight. That holds for BERT's names; a "
            "norm with another name decays. Ask how many axes the parameter has.",
        ),
        Misconception(
            "by_the_word_norm",
            _groups_of(lambda name, p: not any(k in name.lower() for k in ("bias", "norm"))),
            "You go by the words bias and norm in the names. A norm whose name does not say so "
            "decays, and a table with the word bias in its name does not. Ask how many axes the "
            "parameter has.",
        ),
        Misconception(
            "linear_layers_alone",
            _groups_by_modules(lambda m, name, p: isinstance(m, nn.Linear) and name == "weight"),
            "Only the matrices of linear layers decay with you. Embeddings and convolutions have "
            "matrices too; the number of axes decides, not the kind of layer.",
        ),
        Misconception(
            "embeddings_spared",
            _groups_by_modules(lambda m, n, p: p.ndim > 1 and not isinstance(m, nn.Embedding)),
            "Your embeddings do not decay. There are recipes that spare them; here every parameter "
            "with two axes or more decays, as in BERT's code.",
        ),
        Misconception(
            "known_norms_spared",
            _groups_by_modules(lambda m, n, p: n != "bias" and not isinstance(m, _GROUPS_NORMS)),
            "You spare the biases and the parameters of the norms that torch has. A norm of one's "
            "own, or a single factor, decays then; the number of axes decides, not the kind of "
            "layer.",
        ),
        Misconception(
            "exactly_two_axes",
            _groups_two_of(lambda n: n == 2, lambda n: n != 2),
            "You ask for exactly two axes. The weights of a convolution have three or more and "
            "should decay with the matrices.",
        ),
        Misconception(
            "exactly_one_axis",
            _groups_two_of(lambda n: n != 1, lambda n: n == 1),
            "You spare the parameters with exactly one axis. A single number has none, and should "
            "not decay either: fewer than two.",
        ),
        Misconception(
            "some_in_neither",
            _groups_two_of(lambda n: n == 2, lambda n: n == 1),
            "You ask for exactly two axes and for exactly one. Parameters with none, or with three "
            "or more, are then in neither group, and the optimizer never moves them.",
        ),
        Misconception(
            "single_numbers_in_neither",
            _groups_two_of(lambda n: n >= 2, lambda n: n == 1),
            "A parameter without axes, a single number, is in neither of your groups, and the "
            "optimizer never moves it: it belongs to the rest, fewer than two axes.",
        ),
        Misconception(
            "more_axes_in_neither",
            _groups_two_of(lambda n: n == 2, lambda n: n < 2),
            "A parameter with three axes or more, as a convolution has, is in neither of your "
            "groups, and the optimizer never moves it. It decays, as the matrices do.",
        ),
        Misconception(
            "frozen_too",
            _groups_of(_groups_matrix, frozen=True),
            "Frozen parameters are in your groups too. Whoever counts or clips what the optimizer "
            "trains counts them in, and one that still has a gradient of zeros from before decays.",
        ),
        Misconception(
            "shared_twice",
            _groups_repeated,
            "A parameter that two layers share is in your groups twice, and is moved twice at each "
            "step. It is to be in one group, once.",
        ),
        Misconception(
            "no_decay_left_out",
            _groups_of(_groups_matrix, rest=None),
            "Your second group does not say what its weight decay is. The optimizer then takes its "
            "own default, 0.01 with AdamW: say that it is 0.",
        ),
        Misconception(
            "fixed_decay",
            _groups_of(_groups_matrix, wd=lambda wd: 0.01),
            "Your matrices decay by a number of your own. The argument `wd` says by how much.",
        ),
        Misconception(
            "decay_in_both",
            _groups_of(_groups_matrix, rest=...),
            "You divide the parameters rightly and let both groups decay. The weight decay of the "
            "second one is 0.",
        ),
        Misconception(
            "not_parameters",
            _groups_of_copies,
            "Your groups hold tensors that are not the model's parameters, such as a copy, "
            "`detach()`, `.data` or a state_dict give. No gradient ever arrives at them, so that "
            "the optimizer moves nothing; hand over the parameters themselves.",
        ),
        Misconception(
            "copies",
            _groups_of_another,
            "Your groups hold parameters, and not those of the model: copies. What the optimizer "
            "moves is then no part of the model; hand over the model's own.",
        ),
        Misconception(
            "lists_without_decay",
            _groups_lists,
            "You return two lists of parameters. Each group is a dict, with the parameters under "
            '"params" and its weight decay beside them.',
        ),
        Misconception(
            "names_for_parameters",
            _groups_of_names,
            "Your groups hold the names of the parameters. The optimizer needs the parameters "
            "themselves.",
        ),
        Misconception(
            "pairs_for_parameters",
            _groups_pairs,
            "Your groups hold pairs of a name and a parameter. An optimizer takes such pairs, but "
            "whoever counts or clips what stands in a group finds a tuple there: hand over the "
            "parameters alone.",
        ),
        Misconception(
            "generators",
            _groups_generators,
            'What stands under your "params" can be gone through only once, as a generator or a '
            "`filter` can. Whoever counts the parameters before making the optimizer leaves it an "
            "empty group: make lists.",
        ),
        Misconception(
            "own_learning_rate",
            _groups_with_lr,
            'Your groups hold an "lr" too. It overrules the one that the optimizer is given, and '
            "nobody has told you which: a group holds its parameters and its weight decay alone.",
        ),
        Misconception(
            "decays_exchanged",
            _groups_of(_groups_matrix, wd=lambda wd: 0.0, rest=...),
            "You divide the parameters rightly and give the vectors the weight decay. It belongs "
            "to the matrices; that of the rest is 0.",
        ),
        Misconception(
            "groups_exchanged",
            lambda model, wd: reference.weight_decay_groups(model, wd)[::-1],
            "Each of your groups is right, and the one that does not decay comes first. Whoever "
            "reads them goes by their order: first what decays, then the rest.",
        ),
        Misconception(
            "frozen_in_the_second",
            _groups_frozen_spared,
            "You put the frozen parameters into the group that does not decay. They are in neither "
            "group: whoever counts what the optimizer trains counts them in, and thawing one later "
            "trains a matrix without decay.",
        ),
        Misconception(
            "switched_to_train",
            _groups_trained,
            "You switch the model to training mode. Grouping parameters needs no mode; whoever has "
            "chosen eval, for the whole or for a frozen part, finds the dropout on again.",
        ),
        Misconception(
            "gradients_cleared",
            _groups_cleared,
            "Your groups are right, and you clear the gradients that were there. Grouping "
            "parameters does not need it; whoever calls may not have taken the step yet.",
        ),
        Misconception(
            "top_layers_alone",
            _groups_top_level,
            "You look only into the modules directly inside the model. The parameters of the model "
            "itself, and those further down, are in neither group and are never moved.",
        ),
        Misconception(
            "thawed",
            _groups_thawed,
            "You switch all parameters on. What somebody has frozen stays frozen, and is in "
            "neither group.",
        ),
    ),
    alternatives=(_groups_loop, _groups_filtered, _groups_by_dict),
    hints=(
        "For each parameter that trains there is one question, and its name has no part in it: "
        "print the shapes of some biases, norms, embeddings and linear layers.",
        "Two axes or more: it decays. Fewer: it does not. Leave out what has `requires_grad` "
        "False; `model.parameters()` gives a shared one once.",
        'Two dicts in a list, each with "params" and "weight_decay", from two list comprehensions '
        "over the trained parameters: `p.ndim >= 2` with wd, `p.ndim < 2` with 0.0.",
    ),
)


# --- accumulate_step ----------------------------------------------------------------------------


class _AccumulateBert(_TinyBert):
    """Takes what the chapter's own classifier takes, returns logits, and keeps a record.

    `events`: ("forward", number) and ("backward", number) in their order; `passes`: the ids and
    the mode of each forward pass.
    """

    def __init__(self, see, num_labels):
        super().__init__(see, num_labels)
        self.events, self.passes = [], []

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        logits = self.logits(input_ids, attention_mask, token_type_ids)
        number = len(self.passes)
        self.passes.append((input_ids.tolist(), self.training))
        self.events.append(("forward", number))
        if logits.requires_grad:
            logits.register_hook(lambda grad: self.events.append(("backward", number)))
        return logits

    def one_at_a_time(self, first):
        """Whether no pass that is gone back through lies between another's forward and backward."""
        back = {number for event, number in self.events if event == "backward"}
        under_way = set()
        for event, number in self.events:
            if number < first or number not in back:
                continue
            if event == "forward" and under_way:
                return False
            (under_way.add if event == "forward" else under_way.discard)(number)
        return True


class _AccumulateSGD(torch.optim.SGD):
    """SGD that keeps the gradients which it finds at each step."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.found = []

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        self.found.append({id(p): None if p.grad is None else p.grad.clone() for p in params})
        super().step()
        return loss


def _accumulate_weighted(logits, labels):
    """A loss that knows the order of its arguments and is no cross-entropy."""
    return (
        (logits - F.one_hot(labels, logits.shape[1])) ** 2 * torch.tensor([1.0, 2.0, 0.5])
    ).mean()


def _observe_accumulate_step(accumulate_step, see):
    def observe(model, optimizer, batches, *more, loss_function=F.cross_entropy, label="the step"):
        given, keys, mode = list(batches), [sorted(batch) for batch in batches], model.training
        before, first = len(optimizer.found), len(model.passes)
        kinds = []
        step = _as_number(accumulate_step, kinds)
        see.call(f"the loss of {label}", step, model, batches, loss_function, optimizer, *more)
        see(f"what the loss of {label} is given as", kinds[0])
        see(f"the number of optimizer steps in {label}", len(optimizer.found) - before)
        for grads in optimizer.found[before:][-1:]:
            for name, p in model.named_parameters():
                if id(p) in grads:
                    see(f"gradient of {name} in {label}", grads[id(p)])
        for name, p in model.named_parameters():
            see(f"`{name}` after {label}", p)
        kept = [sorted(batch) for batch in given] == keys
        see.fact(f"the micro-batches still hold all that they held ({label})", kept)
        same = list(map(id, batches)) == list(map(id, given))
        see.fact(f"the list holds the same micro-batches in the same order ({label})", same)
        passes = sorted(ids for ids, _ in model.passes[first:])
        once = passes == sorted(batch["input_ids"].tolist() for batch in given)
        see.fact(f"each micro-batch goes through the model once and whole ({label})", once)
        alone = model.one_at_a_time(first)
        see.fact(
            f"each micro-batch's backward comes before the next one's forward ({label})", alone
        )
        modes = {model.training, *(training for _, training in model.passes[first:])}
        see.fact(
            f"the model is in the mode it was given in, all the while ({label})", modes == {mode}
        )

    def made(num_labels, **options):
        model = _AccumulateBert(see, num_labels)
        return model, _AccumulateSGD(model.parameters(), **({"lr": 0.5} | options))

    def batches(num_labels, *lengths):
        return [_tiny_batch(see, some, num_labels) for some in lengths]

    with see.probe("two micro-batches of 3 examples each, no clipping"):
        observe(*made(4), batches(4, [5, 3, 7], [4, 6, 2]))
    with see.probe("one micro-batch of 5 examples, in eval mode"):
        model, optimizer = made(2)
        observe(model.eval(), optimizer, batches(2, [4, 7, 3, 6, 5]))
    with see.probe("micro-batches of 4, 4, 4 and 1 examples"):
        observe(*made(3), batches(3, [3, 6, 4, 5], [7, 7, 4, 9], [3, 4, 8, 2], [5]))
    with see.probe("micro-batches of 2, 5 and 3 examples of unlike lengths, two steps of them"):
        model, optimizer = made(3, momentum=0.9)
        given = batches(3, [9, 8], [3, 4, 2, 3, 4], [6, 6, 5])
        observe(model, optimizer, list(given), label="step 1")
        observe(model.train(), optimizer, list(given), label="step 2")
    with see.probe("gradients are left over from before"):
        model, optimizer = made(2)
        for p in model.parameters():
            p.grad = see.randn(*p.shape)
        observe(model, optimizer, batches(2, [4, 5], [6, 3, 4]))
    with see.probe("clipped to the norm 0.05, micro-batches of 3, 3 and 2 examples"):
        observe(*made(3), batches(3, [5, 3, 4], [7, 2, 6], [4, 8]), 0.05)
    with see.probe("a norm of 1000, far above the gradient's: nothing to clip"):
        observe(*made(3), batches(3, [4, 6, 5], [3, 3]), 1000.0)
    with see.probe("frozen words, clipped to the norm 0.1, micro-batches of 1 and 4 examples"):
        model, optimizer = made(2)
        model.words.requires_grad = False
        observe(model, optimizer, batches(2, [6], [4, 7, 3, 5]), 0.1)
    with see.probe("an optimizer with two groups, clipped to the norm 0.1, in eval mode"):
        model = _AccumulateBert(see, 3).eval()
        groups = [{"params": [model.words, model.mix]}, {"params": [model.head], "lr": 0.2}]
        groups[1]["params"] += [model.positions, model.types]
        optimizer = _AccumulateSGD(groups, lr=0.5)
        observe(model, optimizer, batches(3, [6, 4], [3, 7, 5]), 0.1)
    with see.probe("an optimizer for the head alone, the whole model clipped to the norm 0.1"):
        model = _AccumulateBert(see, 4)
        optimizer = _AccumulateSGD([model.head], lr=0.5)
        observe(model, optimizer, batches(4, [5, 3, 8], [4]), 0.1)
    with see.probe("another loss function, micro-batches of 4 and 2 examples"):
        given = batches(3, [4, 6, 5, 3], [7, 2])
        observe(*made(3), given, loss_function=_accumulate_weighted)


def _accumulate_inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _accumulate(
    weight=lambda size, k, sizes: size / sum(sizes),
    returned=lambda losses, sizes: (
        sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes)
    ),
    zero="first",
    step="last",
    clip="sum",
    forward=lambda model, batch: model(**_accumulate_inputs(batch)),
    clipped=lambda model, optimizer: model.parameters(),
    clipper=lambda params, max_norm: nn.utils.clip_grad_norm_(params, max_norm),
    loss_of=lambda loss_function, logits, batch: loss_function(logits, batch["labels"]),
):
    """accumulate_step with one thing done otherwise."""

    def accumulate_step(model, micro_batches, loss_function, optimizer, max_norm=None):
        sizes = [len(batch["labels"]) for batch in micro_batches]
        losses = []
        if zero == "first":
            optimizer.zero_grad()
        for k, batch in enumerate(micro_batches):
            if zero == "each":
                optimizer.zero_grad()
            loss = loss_of(loss_function, forward(model, batch), batch)
            losses.append(loss.item())
            (loss * weight(len(batch["labels"]), k, sizes)).backward()
            if clip == "each" and max_norm is not None:
                clipper(list(clipped(model, optimizer)), max_norm)
            if step == "each":
                optimizer.step()
        if zero == "between":
            optimizer.zero_grad()
        if clip == "sum" and max_norm is not None:
            clipper(list(clipped(model, optimizer)), max_norm)
        if step == "last":
            optimizer.step()
        if zero == "last":
            optimizer.zero_grad()
        return returned(losses, sizes)

    return accumulate_step


def _accumulate_mean_of_means(losses, sizes):
    return sum(losses) / len(losses)


def _accumulate_sum(losses, sizes):
    return sum(losses)


def _accumulate_each_norm(params, max_norm):
    for p in params:
        nn.utils.clip_grad_norm_([p], max_norm)


def _accumulate_values(params, max_norm):
    nn.utils.clip_grad_value_(params, max_norm)


def _accumulate_scaled(params, max_norm):
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    for g in grads:
        g.mul_(max_norm / norm)


def _accumulate_labels_to_model(model, batch):
    return model(**batch)


def _accumulate_by_tokens(model, micro_batches, loss_function, optimizer, max_norm=None):
    tokens = [batch["attention_mask"].sum().item() for batch in micro_batches]
    same = _accumulate(
        weight=lambda size, k, sizes: tokens[k] / sum(tokens),
        returned=lambda losses, sizes: (
            sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens)
        ),
    )
    return same(model, micro_batches, loss_function, optimizer, max_norm)


def _accumulate_graph(model, micro_batches, loss_function, optimizer, max_norm=None):
    total = sum(len(batch["labels"]) for batch in micro_batches)
    mean_loss = 0.0
    optimizer.zero_grad()
    for batch in micro_batches:
        loss = loss_function(model(**_accumulate_inputs(batch)), batch["labels"])
        loss = loss * len(batch["labels"]) / total
        loss.backward()
        mean_loss = mean_loss + loss
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return mean_loss


def _accumulate_growing(model, micro_batches, loss_function, optimizer, max_norm=None):
    total, loss_sum = 0, 0.0
    optimizer.zero_grad()
    for batch in micro_batches:
        size = len(batch["labels"])
        total += size
        loss = loss_function(model(**_accumulate_inputs(batch)), batch["labels"])
        (loss * size / total).backward()
        loss_sum += loss.item() * size
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss_sum / total


def _accumulate_twice(model, micro_batches, loss_function, optimizer, max_norm=None):
    with torch.no_grad():
        for batch in micro_batches:
            model(**_accumulate_inputs(batch))
    return reference.accumulate_step(model, micro_batches, loss_function, optimizer, max_norm)


def _accumulate_emptied(model, micro_batches, loss_function, optimizer, max_norm=None):
    taken = []
    while micro_batches:
        taken.append(micro_batches.pop(0))
    return reference.accumulate_step(model, taken, loss_function, optimizer, max_norm)


def _accumulate_in_mode(training):
    def accumulate_step(model, micro_batches, loss_function, optimizer, max_norm=None):
        model.train(training)
        return reference.accumulate_step(model, micro_batches, loss_function, optimizer, max_norm)

    return accumulate_step


def _accumulate_as_tensor(*args):
    return torch.tensor(reference.accumulate_step(*args), dtype=torch.float64)


def _accumulate_labels_removed(model, micro_batches, loss_function, optimizer, max_norm=None):
    labels = [batch.pop("labels") for batch in micro_batches]
    whole = [dict(b, labels=y) for b, y in zip(micro_batches, labels, strict=True)]
    return reference.accumulate_step(model, whole, loss_function, optimizer, max_norm)


def _accumulate_own_optimizer(model, micro_batches, loss_function, optimizer, max_norm=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return reference.accumulate_step(model, micro_batches, loss_function, optimizer, max_norm)


def _accumulate_nothing_returned(*args):
    reference.accumulate_step(*args)


def _accumulate_afterwards(model, micro_batches, loss_function, optimizer, max_norm=None):
    reference.accumulate_step(model, micro_batches, loss_function, optimizer, max_norm)
    with torch.no_grad():
        losses = [loss_function(model(**_accumulate_inputs(b)), b["labels"]) for b in micro_batches]
    sizes = [len(batch["labels"]) for batch in micro_batches]
    return sum(a.item() * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes)


def _accumulate_always_clipped(model, micro_batches, loss_function, optimizer, max_norm=None):
    norm = 1.0 if max_norm is None else max_norm
    return reference.accumulate_step(model, micro_batches, loss_function, optimizer, norm)


def _accumulate_by_grad(model, micro_batches, loss_function, optimizer, max_norm=None):
    """Sums of the gradients of summed losses, divided once at the end; clips by hand."""
    params = [p for p in model.parameters() if p.requires_grad]
    sums, loss_sum, count = [torch.zeros_like(p) for p in params], 0.0, 0
    for batch in micro_batches:
        size = batch["labels"].numel()
        logits = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        loss = loss_function(logits, batch["labels"]) * size
        for total, grad in zip(sums, torch.autograd.grad(loss, params), strict=True):
            total += grad
        loss_sum, count = loss_sum + float(loss), count + size
    for p, total in zip(params, sums, strict=True):
        p.grad = total / count
    if max_norm is not None:
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in params))
        for p in params:
            p.grad *= min(1.0, max_norm / norm)
    optimizer.step()
    model.zero_grad()
    return loss_sum / count


def _accumulate_divided_late(model, micro_batches, loss_function, optimizer, max_norm=None):
    model.zero_grad(set_to_none=False)
    seen = torch.tensor(0.0, dtype=torch.float64)
    total = 0
    for batch in micro_batches:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        loss = loss_function(model(**inputs), labels) * labels.shape[0]
        loss.backward()
        seen += loss.detach()
        total += labels.shape[0]
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(total)
    if max_norm:
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    optimizer.step()
    return (seen / total).numpy()[()]


def _accumulate_one_graph(model, micro_batches, loss_function, optimizer, max_norm=None):
    sizes = torch.tensor([float(len(b["labels"])) for b in micro_batches])
    losses = [loss_function(model(**_accumulate_inputs(b)), b["labels"]) for b in micro_batches]
    loss = (torch.stack(losses) * sizes / sizes.sum()).sum()
    optimizer.zero_grad()
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def _accumulate_running_mean(model, micro_batches, loss_function, optimizer, max_norm=None):
    """The mean of those so far, of loss and gradient, moved on by each micro-batch; no weights."""
    count, mean = 0, 0.0
    optimizer.zero_grad()
    for batch in micro_batches:
        size = batch["labels"].size(0)
        count += size
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= (count - size) / count
        loss = loss_function(model(**_accumulate_inputs(batch)), batch["labels"])
        loss.backward(torch.tensor(size / count, dtype=loss.dtype))
        mean += (float(loss) - mean) * size / count
    nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    optimizer.step()
    return mean


def _accumulate_closure(model, micro_batches, loss_function, optimizer, max_norm=None):
    """Does it all in a closure, which optimizers that step more than once ask for."""
    total = sum(len(batch["labels"]) for batch in micro_batches)

    def closure():
        optimizer.zero_grad()
        mean = 0.0
        for batch in micro_batches:
            share = len(batch["labels"]) / total
            loss = share * loss_function(model(**_accumulate_inputs(batch)), batch["labels"])
            loss.backward()
            mean += loss.item()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return mean

    return optimizer.step(closure)


ACCUMULATE_STEP = Exercise(
    slug="accumulate_step",
    chapter=4,
    title="A large batch in small pieces",
    minutes=15,
    difficulty=3,
    reference=reference.accumulate_step,
    observe=_observe_accumulate_step,
    rtol=1e-5,  # clipping by torch's own function adds 1e-6 to the norm
    atol=1e-7,
    misconceptions=(
        Misconception(
            "not_divided",  # museum 4.23, §5
            _accumulate(weight=lambda size, k, sizes: 1, returned=_accumulate_sum),
            "You add up the micro-batches' mean losses and their gradients without dividing. Four "
            "micro-batches then give a gradient four times as large, which is a learning rate four "
            "times as large; Adam hides it, clipping and SGD do not.",
        ),
        Misconception(
            "gradient_not_divided",  # museum 4.23, §5
            _accumulate(weight=lambda size, k, sizes: 1),
            "The loss you return is right, and the gradient is not: you go backward through each "
            "micro-batch's mean undivided. The gradients add up to one that is too large by the "
            "number of micro-batches or more.",
        ),
        Misconception(
            "gradient_not_divided_mean_of_means",  # museum 4.23, §5
            _accumulate(weight=lambda size, k, sizes: 1, returned=_accumulate_mean_of_means),
            "You go backward through each micro-batch's mean undivided, so the gradients add up to "
            "one that is too large; and you return the plain mean of the micro-batches' losses, "
            "in which an example of a small one counts more.",
        ),
        Misconception(
            "divided_by_number_of_micro_batches",
            _accumulate(
                weight=lambda size, k, sizes: 1 / len(sizes), returned=_accumulate_mean_of_means
            ),
            "You weigh all micro-batches alike, as if they were of one size. The single example of "
            "an incomplete last one then counts as much as all those of a full one; weigh each by "
            "its number of examples, which is not the `len` of its dict.",
        ),
        Misconception(
            "gradient_divided_by_number_of_micro_batches",
            _accumulate(weight=lambda size, k, sizes: 1 / len(sizes)),
            "The loss you return is right, and the gradient is not: all micro-batches weigh alike "
            "in it, as if they were of one size. Weigh each by its number of examples.",
        ),
        Misconception(
            "loss_is_mean_of_means",  # museum F6
            _accumulate(returned=_accumulate_mean_of_means),
            "Your gradient is right, and the loss that you return is not: you take the plain mean "
            "of the micro-batches' losses, and they are of unlike sizes.",
        ),
        Misconception(
            "loss_is_a_sum",
            _accumulate(returned=_accumulate_sum),
            "Your gradient is right, and the loss that you return is the sum of the micro-batches' "
            "means. It grows with their number; the mean over all examples does not.",
        ),
        Misconception(
            "loss_of_the_last",
            _accumulate(returned=lambda losses, sizes: losses[-1]),
            "Your gradient is right, and the loss that you return is that of the last micro-batch "
            "alone.",
        ),
        Misconception(
            "all_as_large_as_the_first",
            _accumulate(
                weight=lambda size, k, sizes: size / (sizes[0] * len(sizes)),
                returned=lambda losses, sizes: (
                    sum(a * b for a, b in zip(losses, sizes, strict=True)) / (sizes[0] * len(sizes))
                ),
            ),
            "You count the examples as the first micro-batch's size times the number of "
            "micro-batches. An incomplete last one has fewer: count what is there.",
        ),
        Misconception(
            "sum_over_examples",
            _accumulate(weight=lambda size, k, sizes: size),
            "You multiply each mean by its number of examples and never divide by that of all. The "
            "gradient is that of the sum over the examples, as many times too large.",
        ),
        Misconception(
            "divided_by_all_examples",
            _accumulate(weight=lambda size, k, sizes: 1 / sum(sizes)),
            "You divide each micro-batch's loss by the number of all examples. The loss is a mean "
            "already; it must first be multiplied by the number that it is the mean of.",
        ),
        Misconception(
            "weighed_by_tokens",
            _accumulate_by_tokens,
            "You weigh each micro-batch by its number of tokens. The loss is a mean over examples, "
            "one label each; a long review counts as much as a short one.",
        ),
        Misconception(
            "step_in_the_loop",  # museum §5
            _accumulate(step="each"),
            "You take a step after each micro-batch. That is training with small batches, and with "
            "gradients of examples that were stepped along before; one step comes after the loop.",
        ),
        Misconception(
            "zeroed_in_the_loop",
            _accumulate(zero="each"),
            "You zero the gradients before each micro-batch, so that only those of the last one "
            "are left when the optimizer steps. Accumulating is leaving them there.",
        ),
        Misconception(
            "zeroed_and_stepped_in_the_loop",
            _accumulate(zero="each", step="each", clip="each"),
            "You zero and step for each micro-batch: that is ordinary training with small batches. "
            "Gradients are to add up over all of them before the one step.",
        ),
        Misconception(
            "never_zeroed",
            _accumulate(zero="never"),
            "You never zero the gradients. Accumulating over the micro-batches is meant, "
            "accumulating over the steps too is not.",
        ),
        Misconception(
            "zeroed_afterwards",
            _accumulate(zero="last"),
            "You zero the gradients after the step only. What was in them before the first one, "
            "say from looking at a gradient by hand, is then part of it; zero before the loop.",
        ),
        Misconception(
            "zeroed_before_the_step",
            _accumulate(zero="between"),
            "You zero the gradients after the loop, before the optimizer steps: it finds none, and "
            "no parameter moves.",
        ),
        Misconception(
            "no_step",
            _accumulate(step="never"),
            "You compute the gradients and take no step. The optimizer moves the parameters when "
            "it is told to.",
        ),
        Misconception(
            "own_optimizer",
            _accumulate_own_optimizer,
            "You make an optimizer of your own and leave the one that was handed in. Its learning "
            "rate and its memory of earlier steps are lost with it.",
        ),
        Misconception(
            "not_clipped",
            _accumulate(clip="never"),
            "The gradient that the optimizer steps with is not clipped: `max_norm` is left aside, "
            "or comes after the step. The place is between the last `backward` and the step.",
        ),
        Misconception(
            "clipped_in_the_loop",
            _accumulate(clip="each"),
            "You clip after each micro-batch. The parts that have added up so far are cut before "
            "the others come, so the sum has another direction and length than that of the large "
            "batch, clipped once.",
        ),
        Misconception(
            "always_clipped",
            _accumulate_always_clipped,
            "You clip to the norm 1 where no `max_norm` is given. None means that nothing is "
            "clipped.",
        ),
        Misconception(
            "each_parameter_clipped",  # museum §5
            _accumulate(clipper=_accumulate_each_norm),
            "You clip each parameter's gradient to `max_norm` on its own. It is the norm over all "
            "of them together that is limited; otherwise the direction changes.",
        ),
        Misconception(
            "first_group_clipped",
            _accumulate(clipped=lambda model, optimizer: optimizer.param_groups[0]["params"]),
            "You clip the optimizer's first group of parameters alone. There may be more, as where "
            "weight decay holds for some: the norm is that of the gradient of the whole model.",
        ),
        Misconception(
            "optimizers_parameters_clipped",
            _accumulate(
                clipped=lambda model, optimizer: [
                    p for group in optimizer.param_groups for p in group["params"]
                ]
            ),
            "You clip the parameters that the optimizer holds. Where it holds a part of the model "
            "only, the others' gradients are missing in the norm, which here is that of the whole "
            "model.",
        ),
        Misconception(
            "values_clipped",
            _accumulate(clipper=_accumulate_values),
            "You clip the single values. It is the norm of the whole gradient that is limited, "
            "which keeps its direction.",
        ),
        Misconception(
            "scaled_up_too",
            _accumulate(clipper=_accumulate_scaled),
            "You scale the gradient to the norm `max_norm` in any case, small ones up. Clipping "
            "shortens what is longer and leaves the rest alone.",
        ),
        Misconception(
            "types_dropped",  # museum 4.6
            _accumulate(forward=lambda model, b: model(b["input_ids"], b["attention_mask"])),
            "You hand over the ids and the mask and drop the token types, so that the model takes "
            "a pair for one sentence. All that a micro-batch holds is for the model, but the "
            "labels.",
        ),
        Misconception(
            "mask_ignored",  # museum 4.1
            _accumulate(
                forward=lambda model, b: model(
                    b["input_ids"], torch.ones_like(b["input_ids"]), b["token_type_ids"]
                )
            ),
            "Your mask says that padding is text. Hand over the mask of the micro-batch, as all it "
            "holds but the labels.",
        ),
        Misconception(
            "by_position",
            _accumulate(forward=lambda model, b: model(*_accumulate_inputs(b).values())),
            "You hand the values over in the order in which the micro-batch happens to hold them. "
            "The model takes its mask second and the token types third, `collate` makes them the "
            "other way round. Go by the names.",
        ),
        Misconception(
            "labels_to_the_model",
            _accumulate(forward=_accumulate_labels_to_model),
            "You hand the labels to the model too. This one takes the inputs and returns logits; "
            "the labels are for the loss function.",
        ),
        Misconception(
            "labels_removed",
            _accumulate_labels_removed,
            "You take the labels out of the caller's own micro-batches. The step is right; in the "
            "next epoch the same batches come again, and the labels are gone.",
        ),
        Misconception(
            "own_loss",
            _accumulate(loss_of=lambda f, logits, batch: F.cross_entropy(logits, batch["labels"])),
            "You use the cross-entropy where a loss function was handed in. Whoever trains with "
            "another one gets yours all the same.",
        ),
        Misconception(
            "arguments_exchanged",
            _accumulate(loss_of=lambda f, logits, batch: f(batch["labels"], logits)),
            "You hand the loss function the labels first. It takes the logits first and then the "
            "labels, as torch's own loss functions do.",
        ),
        Misconception(
            "softmax_first",  # museum 2.1
            _accumulate(
                loss_of=lambda f, logits, batch: f(logits.softmax(dim=-1), batch["labels"])
            ),
            "You give the loss function probabilities. It takes logits and does the softmax "
            "itself; two of them flatten the loss.",
        ),
        Misconception(
            "loss_with_a_graph",
            _accumulate_graph,
            "You return a loss with its graph behind it. Each one that is kept keeps a whole "
            "forward pass in memory; return a plain number.",
        ),
        Misconception(
            "loss_as_tensor",
            _accumulate_as_tensor,
            "You return a tensor. The loss is right, and a plain Python number is asked for, which "
            "is printed, averaged and stored without torch.",
        ),
        Misconception(
            "one_backward",
            _accumulate_one_graph,
            "You send all micro-batches through the model before you go backward. All their graphs "
            "are in memory at once, as the large batch's would be, and sparing that memory is what "
            "the small pieces are for: go backward through each before the next.",
        ),
        Misconception(
            "each_twice",
            _accumulate_twice,
            "You send micro-batches through the model more often than once. It is that much more "
            "work for the same numbers, and with dropout they would not even be the same.",
        ),
        Misconception(
            "total_still_growing",
            _accumulate_growing,
            "You divide by the number of examples seen so far, which still grows in the loop: the "
            "first micro-batch is divided by its own size alone. Count all examples before it.",
        ),
        Misconception(
            "switched_to_train",
            _accumulate_in_mode(True),
            "You switch the model to training mode. Whoever calls has chosen the mode, perhaps "
            "eval, to train without dropout: leave it as it is.",
        ),
        Misconception(
            "switched_to_eval",
            _accumulate_in_mode(False),
            "You switch the model to eval mode. A model that trains without its dropout is not "
            "what was asked for: leave the mode as it is.",
        ),
        Misconception(
            "list_emptied",
            _accumulate_emptied,
            "You take the micro-batches out of the caller's own list, or put it in another order. "
            "The step is right; in the next epoch the list is not what it was.",
        ),
        Misconception(
            "loss_after_the_step",
            _accumulate_afterwards,
            "You compute the loss to return a second time, after the step: twice the work, and the "
            "loss of parameters other than those whose gradient was taken.",
        ),
        Misconception(
            "nothing_returned",
            _accumulate_nothing_returned,
            "The step is right, and nothing is returned. Return the mean loss over all examples, "
            "a float.",
        ),
    ),
    alternatives=(
        _accumulate_by_grad,
        _accumulate_divided_late,
        _accumulate_running_mean,
        _accumulate_closure,
    ),
    hints=(
        "`backward` adds to the gradients that are there. So what must each micro-batch's mean "
        "loss be multiplied by, for the sum to be the mean over all examples?",
        "By its share of the examples: 4, 4, 4 and 1 examples have the weights 4/13, 4/13, 4/13 "
        "and 1/13. Zero before the loop; clip and step after it, once.",
        "Per micro-batch: the inputs are all of it but the labels; loss × len(labels) / total; "
        "`backward`; add `.item()` of that to the mean. Then `nn.utils.clip_grad_norm_` if "
        "max_norm is given, and the step.",
    ),
)


# --- macro_f1 -----------------------------------------------------------------------------------


def _observe_macro_f1(macro_f1, see):
    def observe(predictions, labels, num_classes):
        kinds = []
        score = _as_number(macro_f1, kinds)
        see.call("the score", score, predictions, labels, num_classes)
        see("what the score is given as", kinds[0])

    with see.probe("60 predictions, 2 classes"):
        labels = see.randint(0, 2, 60)
        observe(torch.where(see.rand(60) < 0.7, labels, 1 - labels), labels, 2)
    with see.probe("80 predictions, 4 classes of unlike size"):
        labels = (4 * see.rand(80) ** 2).long()
        observe(torch.where(see.rand(80) < 0.6, labels, see.randint(0, 4, 80)), labels, 4)
    with see.probe("100 predictions, always class 0, where 95 labels are 0 and 5 are 1"):
        labels = torch.zeros(100, dtype=torch.int64)
        labels[3::20] = 1
        observe(torch.zeros(100, dtype=torch.int64), labels, 2)
    with see.probe("30 predictions, 5 classes, of which 4 is neither predicted nor present"):
        labels = see.randint(0, 4, 30)
        observe(torch.where(see.rand(30) < 0.5, labels, see.randint(0, 4, 30)), labels, 5)
    with see.probe("25 predictions, 4 classes, of which 1 is predicted and not present"):
        labels = torch.tensor([0, 2, 3])[see.randint(0, 3, 25)]
        observe(torch.where(see.rand(25) < 0.6, labels, torch.ones_like(labels)), labels, 4)
    with see.probe("24 predictions, 3 classes, of which 2 is present and not predicted"):
        labels = see.randint(0, 3, 24)
        observe(labels.clamp(max=1), labels, 3)
    with see.probe("20 predictions, all right, 3 classes"):
        labels = torch.arange(20) % 3
        observe(labels.clone(), labels, 3)
    with see.probe("21 predictions, all wrong, 3 classes"):
        labels = torch.arange(21) % 3
        observe((labels + 1) % 3, labels, 3)
    with see.probe("one prediction, right, 2 classes"):
        observe(torch.tensor([1]), torch.tensor([1]), 2)


def _f1_counts(predictions, labels, num_classes):
    """True positives, false positives and false negatives of each class, as Python numbers."""
    for k in range(num_classes):
        tp = ((predictions == k) & (labels == k)).sum().item()
        yield tp, (predictions == k).sum().item() - tp, (labels == k).sum().item() - tp


def _f1_of(score, classes=lambda predictions, labels, n: range(n), number=None):
    """Another score for each class, other classes, or another number to divide by."""

    def macro_f1(predictions, labels, num_classes):
        counts = list(_f1_counts(predictions, labels, num_classes))
        some = [k for k in classes(predictions, labels, num_classes) if k < num_classes]
        scores = [score(*counts[k]) for k in some]
        return sum(scores) / (number(predictions, labels) if number else len(scores))

    return macro_f1


def _f1_score(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def _f1_ratio(one, other):
    return one / other if other else 0.0


def _f1_accuracy(predictions, labels, num_classes):
    return (predictions == labels).double().mean().item()


def _f1_weighted(predictions, labels, num_classes):
    counts = list(_f1_counts(predictions, labels, num_classes))
    return sum(_f1_score(*c) * (c[0] + c[2]) for c in counts) / len(labels)


def _f1_weighted_by_predictions(predictions, labels, num_classes):
    counts = list(_f1_counts(predictions, labels, num_classes))
    return sum(_f1_score(*c) * (c[0] + c[1]) for c in counts) / len(labels)


def _f1_of_means(predictions, labels, num_classes):
    counts = list(_f1_counts(predictions, labels, num_classes))
    p = sum(_f1_ratio(tp, tp + fp) for tp, fp, fn in counts) / num_classes
    r = sum(_f1_ratio(tp, tp + fn) for tp, fp, fn in counts) / num_classes
    return _f1_ratio(2 * p * r, p + r)


def _f1_as_list(predictions, labels, num_classes):
    return [_f1_score(*c) for c in _f1_counts(predictions, labels, num_classes)]


def _f1_present(predictions, labels, n):
    return sorted(set(labels.tolist()))


def _f1_named(predictions, labels, n):
    return sorted({*labels.tolist(), *predictions.tolist()})


def _f1_both(predictions, labels, n):
    return sorted(set(labels.tolist()) & set(predictions.tolist()))


def _f1_of_one(predictions, labels, num_classes):
    return _f1_score(*list(_f1_counts(predictions, labels, num_classes))[1])


def _f1_nan(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan


def _f1_two_ratios(absent):
    """By precision and recall, where each is 0 (or `absent`) if it has nothing to divide by."""

    def score(tp, fp, fn):
        p = tp / (tp + fp) if tp + fp else absent
        r = tp / (tp + fn) if tp + fn else absent
        return _f1_ratio(2 * p * r, p + r)

    return score


def _f1_tensor_ratios(predictions, labels, num_classes):
    counts = torch.tensor(list(_f1_counts(predictions, labels, num_classes)), dtype=torch.float64)
    tp, fp, fn = counts.unbind(dim=1)
    p, r = tp / (tp + fp), tp / (tp + fn)
    return (2 * p * r / (p + r)).mean().item()


def _f1_confusion(predictions, labels, num_classes):
    table = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    ones = torch.ones(len(labels), dtype=torch.float64)
    table.index_put_((labels, predictions), ones, accumulate=True)
    hits, named = table.diagonal(), table.sum(dim=0) + table.sum(dim=1)
    return np.mean((2 * hits / named.clamp(min=1)).numpy())


def _f1_pairs_once(predictions, labels, num_classes):
    table = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    table[labels, predictions] += 1
    named = table.sum(dim=0) + table.sum(dim=1)
    return (2 * table.diagonal() / named.clamp(min=1)).mean().item()


def _f1_as_tensor(predictions, labels, num_classes):
    return torch.tensor(reference.macro_f1(predictions, labels, num_classes), dtype=torch.float64)


def _f1_bincount(predictions, labels, num_classes):
    tp = torch.bincount(labels[predictions == labels], minlength=num_classes)
    named = sum(torch.bincount(x, minlength=num_classes) for x in (predictions, labels))
    return torch.where(named > 0, 2 * tp / named, 0.0).mean().item()


def _f1_one_hot(predictions, labels, num_classes, eps=1e-12):
    p, t = (F.one_hot(x, num_classes).double() for x in (predictions, labels))  # (n, classes)
    precision = (p * t).sum(0) / (p.sum(0) + eps)
    recall = (p * t).sum(0) / (t.sum(0) + eps)
    return float((2 * precision * recall / (precision + recall + eps)).mean())


def _f1_python(predictions, labels, num_classes):
    pairs = Counter(zip(predictions.tolist(), labels.tolist(), strict=True))
    total = 0.0
    for k in range(num_classes):
        wrong = sum(n for (p, y), n in pairs.items() if (p == k) != (y == k))
        hits = pairs[k, k]
        total += hits / (hits + wrong / 2) if hits else 0
    return total / num_classes


MACRO_F1 = Exercise(
    slug="macro_f1",
    chapter=4,
    title="Macro-F1",
    minutes=12,
    difficulty=2,
    reference=reference.macro_f1,
    observe=_observe_macro_f1,
    rtol=1e-5,  # float32 and a small number below the line are right answers
    atol=1e-7,
    misconceptions=(
        Misconception(
            "accuracy",  # museum 4.25
            _f1_accuracy,
            "You return the accuracy (which is also the F1 of all classes' counts together). With "
            "95 labels of one class and 5 of another, always naming the first gives 0.95; the mean "
            "of the classes' scores is to show that the second is never found.",
        ),
        Misconception(
            "weighted_by_labels",
            _f1_weighted,
            "You weigh each class by how often it is present. A rare class then hardly counts; the "
            "macro mean is the plain one, in which each class counts alike.",
        ),
        Misconception(
            "weighted_by_predictions",
            _f1_weighted_by_predictions,
            "You weigh each class by how often it is predicted. The macro mean is the plain one, "
            "in which each class counts alike.",
        ),
        Misconception(
            "f1_of_the_means",
            _f1_of_means,
            "You average precision and recall over the classes and take the F1 of the two means. "
            "The macro F1 takes the F1 of each class first and averages those, which is another "
            "number.",
        ),
        Misconception(
            "classes_present_alone",
            _f1_of(_f1_score, _f1_present),
            "You average over the classes that are among the labels. One that is predicted and "
            "never present has a score of 0, which counts: divide by num_classes.",
        ),
        Misconception(
            "classes_seen_alone",
            _f1_of(_f1_score, _f1_named),
            "You average over the classes that are present or predicted. One that is neither "
            "counts 0 here: the mean is over all num_classes.",
        ),
        Misconception(
            "classes_on_both_sides_alone",
            _f1_of(_f1_score, _f1_both),
            "You average over the classes that are both present and predicted. The others have a "
            "score of 0, and that is what the mean must show: divide by num_classes.",
        ),
        Misconception(
            "classes_predicted_alone",
            _f1_of(_f1_score, lambda p, y, n: sorted(set(p.tolist()))),
            "You average over the classes that are predicted. A class that is never found has a "
            "score of 0, and that is what the mean must show: divide by num_classes.",
        ),
        Misconception(
            "absent_counts_one",
            _f1_of(lambda tp, fp, fn: _f1_score(tp, fp, fn) if tp + fp + fn else 1.0),
            "You give a class that is neither predicted nor present the score 1. By the convention "
            "here it counts 0.",
        ),
        Misconception(
            "absent_is_nan",
            _f1_of(_f1_nan),
            "A class that is neither predicted nor present makes your score NaN: 0 divided by 0. "
            "It counts 0.",
        ),
        Misconception(
            "divides_by_zero",
            _f1_of(lambda tp, fp, fn: 2 * tp / (2 * tp + fp + fn)),
            "You divide by 0 for a class that is neither predicted nor present. It counts 0.",
        ),
        Misconception(
            "ratios_divide_by_zero",
            _f1_of(
                lambda tp, fp, fn: (
                    2 * (tp / (tp + fp)) * (tp / (tp + fn)) / (tp / (tp + fp) + tp / (tp + fn))
                )
            ),
            "You divide by 0 where a class is never predicted, never present or never hit. Its "
            "score is 0 then; written in counts, F1 needs one guard and not three.",
        ),
        Misconception(
            "ratios_nan",
            _f1_tensor_ratios,
            "Your score is NaN where a class is never predicted, never present or never hit: 0 "
            "divided by 0, in tensors, raises nothing. Its score is 0; written in counts, F1 needs "
            "one guard and not three.",
        ),
        Misconception(
            "precision",
            _f1_of(lambda tp, fp, fn: _f1_ratio(tp, tp + fp)),
            "You average the precision: how much of what is named a class is of it. F1 joins it "
            "with the recall.",
        ),
        Misconception(
            "recall",
            _f1_of(lambda tp, fp, fn: _f1_ratio(tp, tp + fn)),
            "You average the recall: how much of a class is found. F1 joins it with the precision.",
        ),
        Misconception(
            "plain_mean_of_both",
            _f1_of(lambda tp, fp, fn: (_f1_ratio(tp, tp + fp) + _f1_ratio(tp, tp + fn)) / 2),
            "You take the plain mean of precision and recall. F1 is their harmonic mean, which is "
            "near the smaller of the two.",
        ),
        Misconception(
            "geometric_mean",
            _f1_of(lambda tp, fp, fn: math.sqrt(_f1_ratio(tp, tp + fp) * _f1_ratio(tp, tp + fn))),
            "You take the square root of precision times recall. F1 is the harmonic mean, twice "
            "their product divided by their sum.",
        ),
        Misconception(
            "two_forgotten",
            _f1_of(lambda tp, fp, fn: _f1_score(tp, fp, fn) / 2),
            "Your scores are half as large as they should be: the 2 above the line is missing, "
            "without which a perfect class gets 0.5.",
        ),
        Misconception(
            "jaccard",
            _f1_of(lambda tp, fp, fn: _f1_ratio(tp, tp + fp + fn)),
            "You divide the hits by all that is named or present: TP / (TP + FP + FN), the Jaccard "
            "index. In F1 the hits count twice, above the line and below.",
        ),
        Misconception(
            "two_above_the_line_alone",
            _f1_of(lambda tp, fp, fn: _f1_ratio(2 * tp, tp + fp + fn)),
            "You count the hits twice above the line and once below it, so that a perfect class "
            "gets 2. Below, too, they stand twice: once as predicted, once as present.",
        ),
        Misconception(
            "class_1_alone",
            _f1_of_one,
            "You return the F1 of class 1, as for two classes of which one is looked for. All "
            "classes count, 0 too.",
        ),
        Misconception(
            "class_0_left_out",
            _f1_of(_f1_score, lambda p, y, n: range(1, n)),
            "You leave class 0 out. All classes from 0 to num_classes − 1 count.",
        ),
        Misconception(
            "summed",
            _f1_of(_f1_score, number=lambda p, y: 1),
            "You add up the classes' scores. Their mean is asked for, from 0 to 1.",
        ),
        Misconception(
            "list",
            _f1_as_list,
            "You return the scores of the single classes. Their plain mean is asked for, one "
            "number.",
        ),
        Misconception(
            "tensor",
            _f1_as_tensor,
            "You return a tensor. The score is right, and a plain Python number is asked for, "
            "which is printed and compared without torch.",
        ),
        Misconception(
            "pairs_counted_once",
            _f1_pairs_once,
            "Your table holds 1 for each pair of prediction and label, however often it occurs: "
            "`+=` at a list of places adds once to a place that is named many times. Count each.",
        ),
        Misconception(
            "whole_numbers",
            _f1_of(lambda tp, fp, fn: 2 * tp // (2 * tp + fp + fn) if tp + fp + fn else 0),
            "You divide with `//`, which drops everything after the point: a class scores 1 if all "
            "is right and 0 otherwise.",
        ),
    ),
    alternatives=(_f1_confusion, _f1_bincount, _f1_one_hot, _f1_python),
    hints=(
        "For one class k the labels are yes or no: three counts say all, how often k is named and "
        "present, named and not present, present and not named.",
        "2 TP + FP + FN is how often k is named plus how often it is present. Where that is 0, the "
        "score is 0.",
        "Loop over range(num_classes): hits = ((predictions == k) & (labels == k)).sum(), divide "
        "twice that by the two counts together, and average over num_classes.",
    ),
)


# --- best_span ----------------------------------------------------------------------------------


def _observe_best_span(best_span, see):
    def stretch(n, first, last):
        place = torch.arange(n)
        return (place >= first) & (place <= last)

    def observe(start, end, mask, max_len, label="the span"):
        span = see.call(label, best_span, start, end, mask, max_len)
        ints = all(isinstance(place, (int, np.integer)) for place in span)
        see.fact(f"{label}: both places are Python ints, not tensors or floats", ints)

    with see.probe("9 tokens, the text from 2 to 7, the two best logits a fair span"):
        start, end = see.randn(9), see.randn(9)
        start[3] += 5
        end[5] += 5
        observe(start, end, stretch(9, 2, 7), 6)
    with see.probe("12 tokens, the text from 4 to 9, at most 4 tokens, eight times"):
        for k in range(8):
            observe(see.randn(12), see.randn(12), stretch(12, 4, 9), 4, f"span {k + 1}")
    with see.probe("the best start and the best end lie before the text"):
        start, end = see.randn(10), see.randn(10)
        start[0] += 9
        end[1] += 9
        observe(start, end, stretch(10, 3, 8), 5)
    with see.probe("the best end lies after the text, the best start within"):
        start, end = see.randn(11), see.randn(11)
        start[4] += 4
        end[9] += 9
        observe(start, end, stretch(11, 2, 6), 5)
    with see.probe("the best end comes before the best start"):
        start, end = see.randn(10), see.randn(10)
        start[7] += 6
        end[3] += 6
        observe(start, end, stretch(10, 1, 8), 8)
    with see.probe("the best start and the best end are 6 tokens apart, at most 4 are allowed"):
        start, end = see.randn(13), see.randn(13)
        start[3] += 6
        end[9] += 5
        observe(start, end, stretch(13, 2, 11), 4)
    with see.probe("the best span has exactly max_len tokens, 5"):
        start, end = see.randn(12), see.randn(12)
        start[4] += 6
        end[8] += 6
        observe(start, end, stretch(12, 1, 10), 5)
    with see.probe("the best span has one token more than max_len, 5"):
        start, end = see.randn(12), see.randn(12)
        start[4] += 6
        end[9] += 6
        observe(start, end, stretch(12, 1, 10), 5)
    with see.probe("max_len 1: six times a span of one token"):
        for k in range(6):
            observe(see.randn(8), see.randn(8), stretch(8, 2, 6), 1, f"span {k + 1}")
    with see.probe("the best span is one token, the last of the text"):
        start, end = see.randn(9), see.randn(9)
        start[6] += 8
        end[6] += 8
        observe(start, end, stretch(9, 2, 6), 3)
    with see.probe("the best span is the first two tokens of all"):
        start, end = see.randn(6), see.randn(6)
        start[0] += 8
        end[1] += 8
        observe(start, end, stretch(6, 0, 4), 3)
    with see.probe("max_len 30, more than there are tokens; all 7 tokens are the best span"):
        start, end = see.randn(7), see.randn(7)
        start[0] += 8
        end[6] += 8
        observe(start, end, stretch(7, 0, 6), 30)
    with see.probe("64 tokens, max_len 80; the whole text, from 5 to 60, is the best span"):
        start, end = see.randn(64), see.randn(64)
        start[5] += 12
        end[60] += 12
        observe(start, end, stretch(64, 5, 60), 80)
    with see.probe("64 tokens; 28 better starts than the best span's have no good end"):
        start, end = see.rand(64), see.rand(64)
        start[33:61] += 6
        start[50], end[52] = 9, 20
        start[10], end[12] = 4, 30
        observe(start, end, stretch(64, 3, 60), 12)
    with see.probe("64 tokens; 28 better ends than the best span's have no good start"):
        start, end = see.rand(64), see.rand(64)
        end[3:31] += 6
        start[20], end[22] = 20, 9
        start[55], end[58] = 30, 4
        observe(start, end, stretch(64, 3, 60), 12)
    for length, words in ((9, "nine tokens"), (1, "one token")):
        with see.probe(f"two good spans, of one and nine tokens; that of {words} is 0.001 better"):
            start, end = see.rand(24), see.rand(24)
            start[2], end[10] = 8, 8
            start[17], end[17] = 7, 9
            start[2 if length == 9 else 17] += 0.001
            observe(start, end, stretch(24, 1, 22), 12)
    for level in (30, 300, 20_000):
        with see.probe(f"logits of about −{level} in the text, near 0 outside, four times"):
            for k in range(4):
                start, end = see.randn(9), see.randn(9)
                inside = stretch(9, 3, 7)
                start, end = start - level * inside, end - level * inside
                observe(start, end, inside, 4, f"span {k + 1}")
    with see.probe("logits far apart, four times"):
        for k in range(4):
            start, end = 400 * see.randn(10), 400 * see.randn(10)
            observe(start, end, stretch(10, 2, 8), 6, f"span {k + 1}")
    with see.probe("float32 logits that require a gradient, 20 tokens"):
        start, end = (see.randn(20, dtype=torch.float32, requires_grad=True) for _ in range(2))
        observe(start, end, stretch(20, 5, 17), 9)


def _span_of(allowed, join=torch.add, given=lambda i, k: (i, k), fill=-math.inf):
    """The best pair among those that allowed(start, end, mask, max_len, n) lets through."""

    def best_span(start_logits, end_logits, mask, max_len):
        n = len(start_logits)
        starts, ends = torch.arange(n)[:, None], torch.arange(n)[None, :]
        fair = allowed(starts, ends, mask, max_len) & torch.ones(n, n, dtype=torch.bool)
        scores = join(start_logits[:, None], end_logits[None, :]).detach()
        best = scores.masked_fill(~fair, fill).argmax().item()
        return given(best // n, best % n)

    return best_span


def _span_fair(i, k, mask, max_len):
    return mask[i] & mask[k] & (k >= i) & (k - i < max_len)


def _span_independent(masked=False, order=lambda i, k: (i, k)):
    def best_span(start_logits, end_logits, mask, max_len):
        if masked:
            start_logits = start_logits.masked_fill(~mask, -math.inf)
            end_logits = end_logits.masked_fill(~mask, -math.inf)
        return order(start_logits.argmax().item(), end_logits.argmax().item())

    return best_span


def _span_cut(start_logits, end_logits, mask, max_len):
    i, k = _span_independent(masked=True)(start_logits, end_logits, mask, max_len)
    return (i, min(max(i, k), i + max_len - 1))


def _span_start_first(start_logits, end_logits, mask, max_len):
    places = torch.arange(len(mask))
    i = start_logits.masked_fill(~mask, -math.inf).argmax().item()
    fair = mask & (places >= i) & (places < i + max_len)
    return i, end_logits.masked_fill(~fair, -math.inf).argmax().item()


def _span_end_first(start_logits, end_logits, mask, max_len):
    places = torch.arange(len(mask))
    k = end_logits.masked_fill(~mask, -math.inf).argmax().item()
    fair = mask & (places <= k) & (places > k - max_len)
    return start_logits.masked_fill(~fair, -math.inf).argmax().item(), k


def _span_from_zero(start_logits, end_logits, mask, max_len):
    best, span = 0.0, (0, 0)
    for i in range(len(mask)):
        for k in range(i, min(i + max_len, len(mask))):
            score = start_logits[i].item() + end_logits[k].item()
            if mask[i] and mask[k] and score > best:
                best, span = score, (i, k)
    return span


def _span_times_mask(start_logits, end_logits, mask, max_len):
    return _span_of(lambda i, k, mask, max_len: (k >= i) & (k - i < max_len))(
        start_logits * mask, end_logits * mask, mask, max_len
    )


def _span_masked_by(number):
    def best_span(start_logits, end_logits, mask, max_len):
        hidden = start_logits.masked_fill(~mask, number), end_logits.masked_fill(~mask, number)
        return _span_of(lambda i, k, mask, max_len: (k >= i) & (k - i < max_len))(
            *hidden, mask, max_len
        )

    return best_span


def _span_probabilities(start_logits, end_logits, mask, max_len):
    p, q = start_logits.softmax(dim=-1), end_logits.softmax(dim=-1)
    return _span_of(_span_fair, join=torch.mul)(p, q, mask, max_len)


def _span_in_place(start_logits, end_logits, mask, max_len):
    with torch.no_grad():
        start_logits[~mask] = -math.inf
        end_logits[~mask] = -math.inf
    return reference.best_span(start_logits, end_logits, mask, max_len)


def _span_in_place_recording(start_logits, end_logits, mask, max_len):
    start_logits[~mask] = -math.inf
    end_logits[~mask] = -math.inf
    return reference.best_span(start_logits, end_logits, mask, max_len)


def _span_in_the_text(start_logits, end_logits, mask, max_len):
    i, k = reference.best_span(start_logits, end_logits, mask, max_len)
    first = mask.nonzero()[0].item()
    return i - first, k - first


def _span_with_score(start_logits, end_logits, mask, max_len):
    i, k = reference.best_span(start_logits, end_logits, mask, max_len)
    return i, k, (start_logits[i] + end_logits[k]).item()


def _span_mean(start_logits, end_logits, mask, max_len):
    """The sum of all start and end logits within, by its mean."""

    def score(i, k):
        return (start_logits[i : k + 1].sum() + end_logits[i : k + 1].sum()).item()

    n = len(mask)
    spans = [(i, k) for i in range(n) for k in range(i, min(n, i + max_len)) if mask[i] and mask[k]]
    return max(spans, key=lambda span: score(*span))


def _span_tensors(*args):
    return tuple(torch.tensor(place) for place in reference.best_span(*args))


def _span_top(start_logits, end_logits, mask, max_len, top=20):
    hidden = (logits.masked_fill(~mask, -math.inf) for logits in (start_logits, end_logits))
    starts, ends = (x.topk(min(top, len(x))).indices.tolist() for x in hidden)
    pairs = [(i, k) for i in starts for k in ends if mask[i] and mask[k] and 0 <= k - i < max_len]
    return max(pairs, key=lambda pair: float(start_logits[pair[0]]) + float(end_logits[pair[1]]))


def _span_without_the_last(start_logits, end_logits, mask, max_len):
    places = mask.nonzero()[:, 0].tolist()
    best, span = -math.inf, (places[0], places[0])
    for i in range(places[0], places[-1]):
        for k in range(i, min(places[-1], i + max_len)):
            if start_logits[i].item() + end_logits[k].item() > best:
                best, span = start_logits[i].item() + end_logits[k].item(), (i, k)
    return span


def _span_loops(start_logits, end_logits, mask, max_len):
    starts, ends, real = start_logits.tolist(), end_logits.tolist(), mask.tolist()
    best, span = -math.inf, None
    for i in range(len(real)):
        for k in range(i, min(i + max_len, len(real))):
            if real[i] and real[k] and starts[i] + ends[k] > best:
                best, span = starts[i] + ends[k], [i, k]
    return span


def _span_windows(start_logits, end_logits, mask, max_len):
    """For each start the best of the ends in its window."""
    start = start_logits.detach().masked_fill(~mask, -math.inf)
    end = F.pad(end_logits.detach().masked_fill(~mask, -math.inf), (0, max_len), value=-math.inf)
    best, place = end.unfold(0, max_len, 1)[: len(start)].max(dim=1)  # (n,) each
    i = (start + best).argmax().item()
    return i, i + place[i].item()


def _span_cropped(start_logits, end_logits, mask, max_len, top=None):
    places = mask.nonzero()[:, 0].tolist()
    pairs = [(i, k) for i in places for k in places if 0 <= k - i < max_len]
    scores = [float(start_logits[i]) + float(end_logits[k]) for i, k in pairs]
    return pairs[int(np.argmax(scores))]


def _span_indices(start_logits, end_logits, mask, max_len):
    scores = start_logits.detach()[:, None] + end_logits.detach()
    distance = torch.arange(len(mask)) - torch.arange(len(mask))[:, None]
    fair = torch.outer(mask, mask) * (distance >= 0) * (distance < max_len)
    scores = torch.where(fair, scores, torch.finfo(scores.dtype).min)
    return np.unravel_index(int(scores.argmax()), tuple(scores.shape))


BEST_SPAN = Exercise(
    slug="best_span",
    chapter=4,
    title="The best span",
    minutes=20,
    difficulty=2,
    reference=reference.best_span,
    observe=_observe_best_span,
    misconceptions=(
        Misconception(
            "each_alone",
            _span_independent(),
            "You take the best start and the best end, each on its own, among all tokens. They may "
            "lie outside the text, the end before the start, or too far apart: look for the best "
            "pair among the fair ones.",
        ),
        Misconception(
            "each_alone_in_the_text",
            _span_independent(masked=True),
            "You take the best start and the best end in the text, each on its own, or the best of "
            "all pairs whatever their order and distance, which is the same. The end may come "
            "before the start, or too far after it: look for the best among the fair pairs.",
        ),
        Misconception(
            "exchanged",
            _span_independent(masked=True, order=lambda i, k: (min(i, k), max(i, k))),
            "You take the best start and the best end on their own and exchange them where they "
            "are the wrong way round. A token that is a good start is not for that a good end; and "
            "the length is left to chance.",
        ),
        Misconception(
            "end_cut",
            _span_cut,
            "You take the best start and the best end on their own and move the end to where it is "
            "allowed. Another pair may add up to more than what is left of this one.",
        ),
        Misconception(
            "start_first",
            _span_start_first,
            "You settle the best start and look for an end that fits it. A start that is a little "
            "worse may have a far better end: it is the sum that counts.",
        ),
        Misconception(
            "end_first",
            _span_end_first,
            "You settle the best end and look for a start that fits it. An end that is a little "
            "worse may have a far better start: it is the sum that counts.",
        ),
        Misconception(
            "mask_ignored",
            _span_of(lambda i, k, mask, max_len: (k >= i) & (k - i < max_len)),
            "You leave the mask aside. The question, [CLS] and the padding have logits too, often "
            "high ones, and an answer cannot stand there.",
        ),
        Misconception(
            "mask_inverted",
            _span_of(
                lambda i, k, mask, max_len: ~mask[i] & ~mask[k] & (k >= i) & (k - i < max_len)
            ),
            "You look outside the text. The mask is True where the answer may stand.",
        ),
        Misconception(
            "start_masked_alone",
            _span_of(lambda i, k, mask, max_len: mask[i] & (k >= i) & (k - i < max_len)),
            "Your span starts in the text and may end behind it, in the [SEP] or the padding. The "
            "mask holds for the end too.",
        ),
        Misconception(
            "end_masked_alone",
            _span_of(lambda i, k, mask, max_len: mask[k] & (k >= i) & (k - i < max_len)),
            "Your span ends in the text and may start before it, in the question. The mask holds "
            "for the start too.",
        ),
        Misconception(
            "order_ignored",
            _span_of(lambda i, k, mask, max_len: mask[i] & mask[k] & (k - i < max_len)),
            "Your end may come before your start. A span reads forwards: the end is at the start "
            "or after it.",
        ),
        Misconception(
            "distance_either_way",
            _span_of(lambda i, k, m, max_len: m[i] & m[k] & ((k - i).abs() < max_len)),
            "You limit the distance of start and end and not their order. A span reads forwards: "
            "the end is at the start or after it.",
        ),
        Misconception(
            "length_ignored",
            _span_of(lambda i, k, mask, max_len: mask[i] & mask[k] & (k >= i)),
            "You leave `max_len` aside. A start and an end that are both good may belong to two "
            "different answers, and the span between them is half the text.",
        ),
        Misconception(
            "one_token_too_long",
            _span_of(lambda i, k, m, max_len: m[i] & m[k] & (k >= i) & (k - i <= max_len)),
            "Your spans may have max_len + 1 tokens. From start to end, both included, are "
            "end − start + 1 tokens.",
        ),
        Misconception(
            "one_token_too_short",
            _span_of(
                lambda i, k, m, max_len: (
                    m[i] & m[k] & (k >= i) & ((k - i < max_len - 1) | ((k == i) & (max_len == 1)))
                )
            ),
            "Your spans have max_len − 1 tokens at most. One of exactly max_len tokens is allowed: "
            "from start to end, both included, are end − start + 1 tokens.",
        ),
        Misconception(
            "one_token_too_short_or_none",
            _span_of(lambda i, k, m, max_len: m[i] & m[k] & (k >= i) & (k - i < max_len - 1)),
            "Your spans have max_len − 1 tokens at most, so that with max_len 1 none is left. One "
            "of exactly max_len tokens is allowed: from start to end, both included, are "
            "end − start + 1 tokens.",
        ),
        Misconception(
            "last_token_dropped",
            _span_without_the_last,
            "You never look at the last token of the text, neither as a start nor as an end: a "
            "`range` ends before its second number. The mask holds there too.",
        ),
        Misconception(
            "top_candidates",
            _span_top,
            "You keep the best few starts and the best few ends and join those. The best span may "
            "have a start that many others beat, if their ends are poor: all pairs count.",
        ),
        Misconception(
            "logits_exchanged",
            lambda start, end, mask, max_len: reference.best_span(end, start, mask, max_len),
            "You judge the ends by the start logits and the starts by the end logits. In the table "
            "of sums the start logits go along the axis of the starts.",
        ),
        Misconception(
            "never_one_token",
            _span_of(lambda i, k, m, max_len: m[i] & m[k] & (k > i) & (k - i < max_len)),
            "Your end comes after your start in any case. An answer of one word has both at the "
            "same token.",
        ),
        Misconception(
            "end_not_included",
            _span_of(_span_fair, given=lambda i, k: (i, k + 1)),
            "You return the place after the end, as a slice would need it. Both places are "
            "included here; add 1 where you cut the text out.",
        ),
        Misconception(
            "start_and_length",
            _span_of(_span_fair, given=lambda i, k: (i, k - i + 1)),
            "You return the start and the number of tokens. The start and the end are asked for, "
            "both included.",
        ),
        Misconception(
            "end_before_start",
            _span_of(_span_fair, given=lambda i, k: (k, i)),
            "You return the end first. The start comes first: with a table of sums (start, end), "
            "that is the row.",
        ),
        Misconception(
            "counted_in_the_text",
            _span_in_the_text,
            "You count from the first token of the text. The places are those in the logits that "
            "you were given.",
        ),
        Misconception(
            "zero_to_beat",
            _span_from_zero,
            "The spans of your text have a 0 to beat: a best score that begins at 0, or a 0 that "
            "stands for the pairs which are not allowed. No sum of negative logits beats it; minus "
            "infinity is below all.",
        ),
        Misconception(
            "multiplied_by_the_mask",
            _span_times_mask,
            "You multiply the logits by the mask. What lies outside the text then has the logit 0, "
            "which beats every negative one; it must be out of the question.",
        ),
        Misconception(
            "ten_thousand_for_infinity",
            _span_masked_by(-10_000.0),
            "A number such as −10,000 is the worst there can be in your code. Logits may lie below "
            "it, and then a place that is not allowed wins; minus infinity is below all.",
        ),
        Misconception(
            "hundred_for_infinity",
            _span_masked_by(-100.0),
            "A number such as −100 is the worst there can be in your code. Logits may lie below "
            "it, and then a place that is not allowed wins; minus infinity is below all.",
        ),
        Misconception(
            "logits_multiplied",
            _span_of(_span_fair, join=torch.mul),
            "You multiply the two logits. They are logarithms of probabilities, up to a constant: "
            "they add. Two logits far below 0 would win as a product.",
        ),
        Misconception(
            "probabilities_multiplied",
            _span_probabilities,
            "You multiply probabilities. That names the same span as long as none of them rounds "
            "to 0, as it does with logits that lie far apart; the sums of the logits need no "
            "softmax.",
        ),
        Misconception(
            "larger_of_the_two",
            _span_of(_span_fair, join=torch.maximum),
            "You judge a span by the larger of its two logits. It is their sum that counts: a good "
            "start with a bad end is no good answer.",
        ),
        Misconception(
            "all_logits_between",
            _span_mean,
            "You add up the logits of all tokens between start and end. Only two count: the start "
            "logit of the first token and the end logit of the last.",
        ),
        Misconception(
            "with_its_score",
            _span_with_score,
            "You return the score as well. Two places are asked for, the start and the end.",
        ),
        Misconception(
            "tensors",
            _span_tensors,
            "The places are right, and you return them as tensors. Two ints are asked for, with "
            "which lists and texts can be cut.",
        ),
        Misconception(
            "changed_in_place",
            _span_in_place,
            "You write into the tensors that you were given. Whoever wants the second-best span or "
            "a loss afterwards finds other logits, or another mask; make new ones.",
        ),
        Misconception(
            "changed_in_place_while_recording",
            _span_in_place_recording,
            "You write into the tensors that you were given. Whoever needs those logits afterwards "
            "finds others, and where they require a gradient autograd refuses; make new ones.",
        ),
    ),
    alternatives=(_span_loops, _span_windows, _span_cropped, _span_indices),
    hints=(
        "Not two questions, but one: among all pairs of a start and an end that are allowed, which "
        "has the largest sum? How many pairs are there?",
        "Make the table of all sums, (start, end), by broadcasting. Allowed are the pairs with "
        "both tokens in the text, end ≥ start, and end − start < max_len; the others get −inf.",
        "`triu()` keeps end ≥ start, `tril(max_len - 1)` keeps it short enough; `argmax` of the "
        "flattened table is start × n + end.",
    ),
)


# --- lora_linear --------------------------------------------------------------------------------


@contextmanager
def _lora_in(dtype):
    """New parameters have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _observe_lora_linear(lora_linear, see):
    names = ("lora_A", "lora_B")

    def values(shape, whole):
        """Random ones; whole numbers on request, which float32 adds exactly."""
        return see.randint(-4, 5, *shape).double() if whole else see.randn(*shape)

    def made(in_features, out_features, rank, alpha, bias=True, whole=False, base_trains=True):
        """The layer, if it has what it should have."""
        base = nn.Linear(in_features, out_features, bias).train(base_trains)
        with torch.no_grad():
            for p in base.parameters():
                p.copy_(values(p.shape, whole))
        layer = lora_linear(base, rank, alpha)
        see.fact("what it makes is an nn.Module", isinstance(layer, nn.Module))
        found = dict(layer.named_parameters())
        wanted = {"base.weight": False, "lora_A": True, "lora_B": True}
        wanted |= {"base.bias": False} if bias else {}
        for kind, some in (("missing", wanted.keys() - found), ("further", found.keys() - wanted)):
            see(f"the list of its {kind} parameters", ", ".join(sorted(some)) or "none")
        for name in names:
            p = found.get(name)
            see(f"its parameter {name}", "missing" if p is None else torch.zeros(p.shape))
        see.fact("`base` is the layer that was given", getattr(layer, "base", None) is base)
        trained = {name for name, p in found.items() if p.requires_grad}
        see("the parameters that train", ", ".join(sorted(trained)))
        see.fact("the base is in the mode it was given in", base.training == base_trains)
        return layer, base

    def fill(layer, whole=False):
        with torch.no_grad():
            for name in names:
                p = getattr(layer, name)
                p.copy_(values(p.shape, whole))
        return layer

    def run(layer, *shape):
        x = see.randn(*shape, requires_grad=True)
        out = see.call("the output", layer, x)
        inputs = {"x": x} | {name: getattr(layer, name) for name in names}
        see.gradients("the output", out, **inputs)

    with _lora_in(torch.float64):
        with see.probe("a new layer, Linear(5, 7), rank 2, alpha 6"):
            layer, base = made(5, 7, 2, 6)
            a, b = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
            see.fact("lora_B starts at zero", (b == 0).all())
            see.fact("lora_A does not start at zero", (a != 0).any())
            x = see.randn(4, 5)
            exact = F.linear(x, base.weight, base.bias)
            same = torch.allclose(layer.double()(x), exact, atol=1e-9)
            see.fact("the new layer starts as the base", same)
        with see.probe("two new layers for alike bases, Linear(40, 6), rank 4, alpha 4"):
            layer, base = made(40, 6, 4, 4)
            a = layer.lora_A.detach()
            another = lora_linear(copy.deepcopy(base), 4, 4).lora_A.detach()
            see.fact("the numbers of lora_A are not all alike", a.min() < a.max())
            rows = {tuple(row) for row in a.tolist()}
            see.fact("the rows of lora_A are not alike", a.min() == a.max() or len(rows) == 4)
            see.fact("the two new layers have unlike lora_A", not torch.equal(a, another))
        with see.probe("Linear(5, 7), rank 2, alpha 6, x (4, 5)"):
            run(fill(made(5, 7, 2, 6)[0].double()), 4, 5)
        with see.probe("Linear(6, 8), rank 5, alpha 2, x (2, 3, 6)"):
            run(fill(made(6, 8, 5, 2)[0].double()), 2, 3, 6)
        with see.probe("Linear(4, 4) without bias, rank 1, alpha 1, x (3, 4)"):
            run(fill(made(4, 4, 1, 1, bias=False)[0].double()), 3, 4)
        with see.probe("Linear(3, 5), rank 3, alpha 3, x (3,)"):
            run(fill(made(3, 5, 3, 3)[0].double()), 3)
        with see.probe("in eval mode: Linear(4, 6), rank 2, alpha 3, x (5, 4)"):
            run(fill(made(4, 6, 2, 3, base_trains=False)[0].double()).eval(), 5, 4)
        with see.probe("a step of an optimizer: Linear(5, 4), rank 2, alpha 8"):
            layer, base = made(5, 4, 2, 8)
            fill(layer.double())
            kept = [p.detach().clone() for p in base.parameters()]
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
            layer(see.randn(6, 5)).backward(see.randn(6, 4))
            optimizer.step()
            same = all(torch.equal(*pair) for pair in zip(base.parameters(), kept, strict=True))
            see.fact("the base is left as it was", same)
            for name in names:
                see(f"{name} after the step", getattr(layer, name))

    def merge(layer, base, *shape):
        kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
        switches = {name: p.requires_grad for name, p in layer.named_parameters()}
        modes = [module.training for module in layer.modules()]
        whole = layer.merge()
        see.fact("merge() gives an nn.Linear", isinstance(whole, nn.Linear))
        see("the merged layer", type(whole).__name__)
        if not isinstance(whole, nn.Linear):
            return
        see.fact("the merged layer is a new one", whole is not base)
        biased = whole.bias is not None
        see.fact("it has a bias if the base has one", biased == (base.bias is not None))
        if biased != (base.bias is not None):
            return
        see("its weight", whole.weight.detach())
        right = not biased or torch.equal(whole.bias.detach(), base.bias.detach())
        see.fact("its bias is that of the base", right)
        now = dict(layer.named_parameters())
        same = now.keys() == kept.keys() and all(torch.equal(now[n], kept[n]) for n in kept)
        see.fact("the layer itself is left as it was", same)
        mine = dict(whole.named_parameters())
        wanted = {"weight", "bias"} if biased else {"weight"}
        see.fact("its weight and bias are nn.Parameters", mine.keys() == wanted)
        ours = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        own = [whole.weight, whole.bias] if biased else [whole.weight]
        own = not ours & {p.untyped_storage().data_ptr() for p in own}
        see.fact("it shares no memory with the layer or its base", own or whole is base)
        same = switches == {name: p.requires_grad for name, p in layer.named_parameters()}
        see.fact("merge() leaves the layer's switches requires_grad as they were", same)
        same = modes == [module.training for module in layer.modules()]
        see.fact("merge() leaves the layer's mode (train or eval) as it was", same)
        if right:
            x = see.randint(-3, 4, *shape).float()
            see("what it makes of x", whole(x).detach())

    for shape, rank, alpha, bias in (
        ((5, 7), 2, 6, True),
        ((4, 4), 4, 2, True),
        ((6, 3), 1, 1, False),
        ((3, 2), 2, 2, True),
    ):
        words = f"Linear{shape}{'' if bias else ' without bias'}, rank {rank}, alpha {alpha}"
        with see.probe(f"merged: {words}, whole numbers"):
            layer, base = made(*shape, rank, alpha, bias, whole=True)
            layer.train(alpha != 2)
            merge(fill(layer, whole=True), base, 3, shape[0])
    with see.probe("merged, trained further and merged again: Linear(4, 3), rank 2, alpha 4"):
        layer, base = made(4, 3, 2, 4, whole=True)
        drawn = []
        for seed in (71, 72):
            torch.default_generator.manual_seed(seed)
            layer.merge()
            drawn.append(torch.rand(3).tolist())
        fill(layer, whole=True)
        x = see.randint(-3, 4, 5, 4).float()
        see("the output after the first merge", layer(x).detach())
        merge(layer, base, 2, 4)
        see.fact("merge() does not seed the global random numbers", drawn[0] != drawn[1])


class _LoraVariant(nn.Module):
    """LoRALinear in pieces, one of which is done otherwise."""

    scale_of = staticmethod(lambda alpha, rank: alpha / rank)
    a_of = staticmethod(lambda rank, n: nn.Parameter(torch.randn(rank, n) / math.sqrt(rank)))
    b_of = staticmethod(lambda n, rank: nn.Parameter(torch.zeros(n, rank)))
    base_of = staticmethod(lambda base: base.requires_grad_(False))

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = self.base_of(base)
        self.scale = self.scale_of(alpha, rank)
        self.lora_A = self.a_of(rank, base.in_features)
        self.lora_B = self.b_of(base.out_features, rank)

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)

    def merged_weight(self):
        return self.base.weight + self.scale * self.lora_B @ self.lora_A

    def merge(self):
        bias = self.base.bias
        whole = nn.Linear(self.base.in_features, self.base.out_features, bias is not None)
        with torch.no_grad():
            whole.weight.copy_(self.merged_weight())
            if bias is not None:
                whole.bias.copy_(bias)
        return whole


def _lora(**changes):
    static = {name: staticmethod(f) for name, f in changes.items() if name.endswith("_of")}
    return type("LoRALinear", (_LoraVariant,), changes | static)


def _lora_copied(base):
    return copy.deepcopy(base).requires_grad_(False)


def _lora_new_base(base):
    return nn.Linear(base.in_features, base.out_features, base.bias is not None).requires_grad_(
        False
    )


def _lora_weight_frozen(base):
    base.weight.requires_grad = False
    return base


def _lora_base_detached(self, x):
    with torch.no_grad():
        base = self.base(x)
    return base + self.scale * (x @ self.lora_A.T @ self.lora_B.T)


def _lora_input_detached(self, x):
    return self.base(x) + self.scale * (x.detach() @ self.lora_A.T @ self.lora_B.T)


def _lora_merge_in_place(self):
    with torch.no_grad():
        self.base.weight += self.scale * self.lora_B @ self.lora_A
    return self.base


def _lora_merge_copies_changed_base(self):
    with torch.no_grad():
        self.base.weight += self.scale * self.lora_B @ self.lora_A
    return copy.deepcopy(self.base)


def _lora_merge_without_bias(self):
    whole = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
    with torch.no_grad():
        whole.weight.copy_(self.merged_weight())
    return whole


def _lora_merge_bias_forgotten(self):
    whole = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None)
    with torch.no_grad():
        whole.weight.copy_(self.merged_weight())
    return whole


def _lora_merge_always_biased(self):
    whole = nn.Linear(self.base.in_features, self.base.out_features)
    with torch.no_grad():
        whole.weight.copy_(self.merged_weight())
        if self.base.bias is not None:
            whole.bias.copy_(self.base.bias)
    return whole


def _lora_merge_shares_bias(self):
    whole = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None)
    whole.weight = nn.Parameter(self.merged_weight().detach())
    whole.bias = self.base.bias
    return whole


def _lora_merge_without_parameter(self):
    whole = copy.deepcopy(self.base)
    del whole.weight
    whole.weight = self.merged_weight()
    return whole


def _lora_merge_freezes(self):
    self.requires_grad_(False)
    return reference.LoRALinear.merge(self)


def _lora_merge_evaluates(self):
    self.eval()
    return reference.LoRALinear.merge(self)


def _lora_bias_twice(self, x):
    out = self.base(x) + self.scale * (x @ self.lora_A.T @ self.lora_B.T)
    return out if self.base.bias is None else out + self.base.bias


class _LoraFixedChange(_LoraVariant):
    """Multiplies the two matrices once, when it is made."""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.change = self.scale * self.lora_B @ self.lora_A

    def forward(self, x):
        return self.base(x) + F.linear(x, self.change)


def _lora_fixed_values(rank, n):
    return nn.Parameter(torch.arange(rank * n, dtype=torch.float32).view(rank, n) / (rank * n))


def _lora_merge_needs_bias(self):
    whole = nn.Linear(self.base.in_features, self.base.out_features)
    with torch.no_grad():
        whole.weight.copy_(self.merged_weight())
        whole.bias.copy_(self.base.bias)
    return whole


def _lora_merge_under_grad(self):
    whole = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None)
    whole.weight.copy_(self.merged_weight())
    return whole


class _LoraLayers(nn.Module):
    """Both matrices as layers, as the peft library has them."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


class _LoraByWeight(nn.Module):
    """One product with the changed weight; merges through a state_dict."""

    def __init__(self, base, rank, alpha, seed=None):
        super().__init__()
        for p in base.parameters():
            p.requires_grad = False
        self.base, self.rank, self.alpha = base, rank, alpha
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def weight(self):
        return self.base.weight + self.lora_B @ self.lora_A * (self.alpha / self.rank)

    def forward(self, x):
        return F.linear(x, self.weight(), self.base.bias)

    def merge(self):
        whole = copy.deepcopy(self.base)
        whole.load_state_dict(self.base.state_dict() | {"weight": self.weight().detach()})
        return whole


class _LoraEinsum(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        self.base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(alpha / rank), persistent=False)
        self.lora_A = nn.Parameter(0.02 * torch.randn(rank, base.weight.shape[1]))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.weight.shape[0], rank))

    def forward(self, x):
        change = torch.einsum("...i,ri,or->...o", x, self.lora_A, self.lora_B)
        return self.base(x) + self.scale * change

    @torch.no_grad()
    def merge(self):
        out_features, in_features = self.base.weight.shape
        whole = nn.Linear(in_features, out_features, bias=self.base.bias is not None)
        whole.weight = nn.Parameter(
            torch.addmm(self.base.weight, self.lora_B, self.lora_A, alpha=self.scale.item())
        )
        if self.base.bias is not None:
            whole.bias = nn.Parameter(self.base.bias.clone())
        return whole


class _LoraFunctional(reference.LoRALinear):
    """With an extra argument, a dropout that is off, random signs, and F.linear twice."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha)
        self.lora_A.data.sign_()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_A)  # (..., rank)
        return torch.add(self.base(x), F.linear(low, self.lora_B), alpha=self.scale)


LORA_LINEAR = Exercise(
    slug="lora_linear",
    chapter=4,
    title="A low-rank layer",
    minutes=25,
    difficulty=3,
    reference=reference.LoRALinear,
    observe=_observe_lora_linear,
    misconceptions=(
        Misconception(
            "not_scaled",  # museum §5
            _lora(scale_of=lambda alpha, rank: 1.0),
            "You do not scale the change. Without the factor alpha / rank the right learning rate "
            "depends on the rank, and alpha does nothing.",
        ),
        Misconception(
            "scaled_by_alpha",
            _lora(scale_of=lambda alpha, rank: alpha),
            "You scale the change by alpha and do not divide by the rank. A sum over more columns "
            "is then larger, and each rank needs a learning rate of its own.",
        ),
        Misconception(
            "scaled_by_rank",
            _lora(scale_of=lambda alpha, rank: rank / alpha),
            "Your factor is upside down: it is alpha / rank, so that a larger alpha makes the "
            "change count more.",
        ),
        Misconception(
            "divided_by_rank_alone",
            _lora(scale_of=lambda alpha, rank: 1 / rank),
            "You divide the change by the rank and leave alpha aside. The factor is alpha / rank.",
        ),
        Misconception(
            "divided_by_root",
            _lora(scale_of=lambda alpha, rank: alpha / math.sqrt(rank)),
            "You divide by the root of the rank. There is a later variant that does; in LoRA, and "
            "here, the factor is alpha / rank.",
        ),
        Misconception(
            "whole_number_scale",
            _lora(scale_of=lambda alpha, rank: alpha // rank),
            "You divide alpha by the rank with `//`, which drops what is after the point: with an "
            "alpha below the rank the change disappears.",
        ),
        Misconception(
            "base_not_frozen",  # museum §5
            _lora(base_of=lambda base: base),
            "The base still trains. Then all its numbers need gradients and the optimizer's "
            "averages, which is what the low rank was to save.",
        ),
        Misconception(
            "bias_not_frozen",
            _lora(base_of=_lora_weight_frozen),
            "You freeze the weight of the base and not its bias. All its parameters are frozen.",
        ),
        Misconception(
            "base_copied",
            _lora(base_of=_lora_copied),
            "You keep a copy of the base. The layer that was given is to be used, so that no "
            "memory is taken twice, and frozen.",
        ),
        Misconception(
            "new_base",
            _lora(base_of=_lora_new_base),
            "You make a new linear layer of the same size, with random values. What the given one "
            "has learned is lost.",
        ),
        Misconception(
            "both_zero",
            _lora(a_of=lambda rank, n: nn.Parameter(torch.zeros(rank, n))),
            "Both of your matrices start at zero. The gradient of each is a product with the "
            "other, so both gradients are zero, and neither ever moves: one must start random.",
        ),
        Misconception(
            "ones_in_a",
            _lora(a_of=lambda rank, n: nn.Parameter(torch.ones(rank, n))),
            "All numbers of your lora_A are alike. All rows then get alike gradients and stay "
            "alike, which makes a rank of 1 out of any.",
        ),
        Misconception(
            "rows_alike",
            _lora(a_of=lambda rank, n: nn.Parameter(torch.randn(1, n).repeat(rank, 1))),
            "All rows of your lora_A start alike. They then get alike gradients and stay alike, "
            "which makes a rank of 1 out of any: draw each row by itself.",
        ),
        Misconception(
            "same_in_every_layer",
            _lora(a_of=_lora_fixed_values),
            "Your lora_A starts the same each time: with fixed values, with the base's own, or "
            "drawn after the same seed. It is to start random, drawn anew for each layer.",
        ),
        Misconception(
            "both_random",
            _lora(b_of=lambda n, rank: nn.Parameter(torch.randn(n, rank) / math.sqrt(rank))),
            "Both of your matrices start random, so that the new layer does not start as the base: "
            "what was learned is disturbed before the first step. lora_B starts at zero.",
        ),
        Misconception(
            "zero_and_random_exchanged",
            _lora(
                a_of=lambda rank, n: nn.Parameter(torch.zeros(rank, n)),
                b_of=lambda n, rank: nn.Parameter(torch.randn(n, rank)),
            ),
            "You have lora_A start at zero and lora_B random. The layer starts as the base that "
            "way too, but it is the other way round here, as in the paper.",
        ),
        Misconception(
            "shapes_transposed",
            type(
                "LoRALinear",
                (_LoraVariant,),
                {
                    "a_of": lambda self, rank, n: nn.Parameter(torch.randn(n, rank)),
                    "b_of": lambda self, n, rank: nn.Parameter(torch.zeros(rank, n)),
                    "forward": lambda self, x: (
                        self.base(x) + self.scale * (x @ self.lora_A @ self.lora_B)
                    ),
                    "merged_weight": lambda self: (
                        self.base.weight + self.scale * (self.lora_A @ self.lora_B).T
                    ),
                },
            ),
            "Your two matrices are transposed: lora_A is (rank, in_features) and lora_B is "
            "(out_features, rank), each as the weight of a linear layer would be. Weights stored "
            "by others would not fit.",
        ),
        Misconception(
            "layers_for_matrices",
            _LoraLayers,
            "Your lora_A and lora_B are layers, whose matrices are called lora_A.weight and "
            "lora_B.weight. Here they are the parameters themselves.",
        ),
        Misconception(
            "not_parameters",
            _lora(
                a_of=lambda rank, n: torch.randn(rank, n, requires_grad=True),
                b_of=lambda n, rank: torch.zeros(n, rank, requires_grad=True),
            ),
            "Your two matrices are plain tensors. A module knows only what is an nn.Parameter: "
            "neither `parameters()` nor `state_dict()` holds them, and no optimizer trains them.",
        ),
        Misconception(
            "change_computed_once",
            _LoraFixedChange,
            "You multiply lora_B by lora_A once, when the layer is made. The product stays what it "
            "was then, zero, whatever the two learn: multiply in forward.",
        ),
        Misconception(
            "bias_twice",
            _lora(forward=_lora_bias_twice),
            "You add the bias of the base a second time: base(x) holds it already, and the change "
            "has none. The new layer does not start as the base.",
        ),
        Misconception(
            "eval_without_change",
            _lora(
                forward=lambda self, x: (
                    _LoraVariant.forward(self, x) if self.training else self.base(x)
                )
            ),
            "In eval mode your layer is the base alone. What was learned is in the change, and it "
            "belongs to every output, in either mode.",
        ),
        Misconception(
            "base_left_out",
            _lora(forward=lambda self, x: self.scale * (x @ self.lora_A.T @ self.lora_B.T)),
            "You return the change alone. It is added to what the base makes of x.",
        ),
        Misconception(
            "base_scaled_too",
            _lora(
                forward=lambda self, x: (
                    self.scale * (self.base(x) + x @ self.lora_A.T @ self.lora_B.T)
                )
            ),
            "You scale the base's output too. The factor belongs to the change alone; otherwise "
            "the new layer does not start as the base.",
        ),
        Misconception(
            "nonlinear",
            _lora(
                forward=lambda self, x: (
                    self.base(x) + self.scale * (torch.relu(x @ self.lora_A.T) @ self.lora_B.T)
                )
            ),
            "You put an activation between the two matrices. That is an adapter; it is no longer "
            "one matrix, and cannot be merged into the base.",
        ),
        Misconception(
            "base_cut_off",
            _lora(forward=_lora_base_detached),
            "You run the base without recording a graph. Its parameters need no gradient, but its "
            "input does: the layers before it get only the part that came through the change.",
        ),
        Misconception(
            "change_cut_off",
            _lora(forward=_lora_input_detached),
            "You detach x on the way through the change. The layers before this one get only the "
            "part of the gradient that came through the base.",
        ),
        Misconception(
            "merged_into_the_base",
            _lora(merge=_lora_merge_in_place),
            "You add the change into the base itself and return it. The layer then adds the change "
            "a second time, and merging again a third; make a new linear layer.",
        ),
        Misconception(
            "base_changed_by_merging",
            _lora(merge=_lora_merge_copies_changed_base),
            "What you return is a new layer, but you have added the change into the base as well: "
            "the layer itself now makes it twice.",
        ),
        Misconception(
            "merged_without_scale",
            _lora(merged_weight=lambda self: self.base.weight + self.lora_B @ self.lora_A),
            "Your merge() leaves out the factor alpha / rank, so the merged layer does something "
            "else than this one.",
        ),
        Misconception(
            "merged_without_base",
            _lora(merged_weight=lambda self: self.scale * self.lora_B @ self.lora_A),
            "Your merge() gives the change alone, without the weight of the base.",
        ),
        Misconception(
            "merged_without_change",
            _lora(merged_weight=lambda self: self.base.weight),
            "Your merge() gives the base as it is. The change belongs to the merged weight.",
        ),
        Misconception(
            "change_subtracted",
            _lora(
                merged_weight=lambda self: self.base.weight - self.scale * self.lora_B @ self.lora_A
            ),
            "Your merge() subtracts the change; that is what taking it out again would need.",
        ),
        Misconception(
            "merged_the_wrong_way_round",
            _lora(
                merged_weight=lambda self: (
                    self.base.weight + self.scale * (self.lora_A.T @ self.lora_B.T)
                )
            ),
            "Your merge() multiplies in the wrong order: the result is the transpose of the "
            "change. The weight of a linear layer is (out_features, in_features).",
        ),
        Misconception(
            "merged_without_bias",
            _lora(merge=_lora_merge_without_bias),
            "Your merged layer never has a bias. Where the base has one, it belongs to the whole.",
        ),
        Misconception(
            "merged_bias_forgotten",
            _lora(merge=_lora_merge_bias_forgotten),
            "The bias of your merged layer is not that of the base. A new nn.Linear comes with a "
            "random one, and the change has none: the base's belongs into it, as it is.",
        ),
        Misconception(
            "merged_bias_invented",
            _lora(merge=_lora_merge_always_biased),
            "Your merged layer has a bias even where the base has none. It is a parameter more, "
            "which nobody has trained, and weights stored without it would not load.",
        ),
        Misconception(
            "merged_bias_shared",
            _lora(merge=_lora_merge_shares_bias),
            "Your merged layer shares memory with the base: a bias that is handed on, or its "
            "`.data`, is not copied. Whoever trains the merged layer changes the base with it.",
        ),
        Misconception(
            "merged_weight_no_parameter",
            _lora(merge=_lora_merge_without_parameter),
            "The weight or the bias of your merged layer is a plain tensor. A module knows only "
            "what is an nn.Parameter: neither `parameters()` nor `state_dict()` holds it.",
        ),
        Misconception(
            "frozen_by_merging",
            _lora(merge=_lora_merge_freezes),
            "Your merge() freezes lora_A and lora_B. It makes a new layer and leaves this one as "
            "it is, so that training can go on.",
        ),
        Misconception(
            "switched_to_eval_by_merging",
            _lora(merge=_lora_merge_evaluates),
            "Your merge() switches this layer to eval mode. It makes a new layer and leaves this "
            "one as it is, so that training can go on.",
        ),
        Misconception(
            "merge_needs_a_bias",
            _lora(merge=_lora_merge_needs_bias),
            "Your merge() copies a bias without asking whether there is one. In a linear layer "
            "without bias it is None.",
        ),
        Misconception(
            "merged_weight_alone",
            _lora(merge=lambda self: self.merged_weight().detach()),
            "Your merge() returns the merged weight. A whole nn.Linear is asked for, with that "
            "weight and the bias of the base, to be put in this layer's place.",
        ),
        Misconception(
            "merged_while_recording",
            _lora(merge=_lora_merge_under_grad),
            "You copy into a parameter while autograd is recording, which it refuses: a leaf that "
            "requires a gradient must not change under it. Switch recording off while you copy.",
        ),
        Misconception(
            "merge_missing",
            _lora(
                merge=property(
                    lambda self: (_ for _ in ()).throw(
                        AttributeError("'LoRALinear' object has no attribute 'merge'")
                    )
                )
            ),
            "There is no merge(). It makes one new nn.Linear of the base and the change.",
        ),
    ),
    alternatives=(_LoraByWeight, _LoraEinsum, _LoraFunctional),
    hints=(
        "Two small matrices whose product has the shape of the base's weight. Which one must be "
        "zero for the new layer to start as the base, and why not both?",
        "x goes through Aᵀ, (..., rank), and then through Bᵀ, (..., out_features); times alpha / "
        "rank, plus base(x). Freeze the base's parameters, and keep the base that was given.",
        "merge(): a new nn.Linear of the base's sizes, with a bias only if it has one; under "
        "`torch.no_grad()` copy base.weight + alpha / rank × B @ A into its weight, and the bias.",
    ),
)


EXERCISES = (
    WORDPIECE,
    ENCODE_PAIR,
    COLLATE,
    MASK_TOKENS,
    FIX_ACCURACY_OF_UNMASKED,
    MASKED_MEAN,
    SEQUENCE_CLASSIFIER,
    FIX_MISSING_ATTENTION_MASK,
    FIX_LOSS_OF_MODEL_OUTPUT,
    FIX_FIRST_OUTPUT,
    FIX_LEAKY_SPLIT,
    FIX_FREEZE_WITHOUT_EFFECT,
    WARMUP_LINEAR,
    WEIGHT_DECAY_GROUPS,
    ACCUMULATE_STEP,
    MACRO_F1,
    BEST_SPAN,
    LORA_LINEAR,
)
