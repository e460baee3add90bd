"""Whether two questions ask the same, by rule: what the guards see of a question, and where two of them disagree.

A small embedding model puts "convert JSON to YAML" and "convert YAML to JSON" at a cosine of 0.99, so nearness alone
is no evidence. The guards compare what a sentence embedding blurs: numbers with their units, negation, names, quoted
text and code, who does what to whom, from where to where, the kind of question, tense, modality, language, format;
and every other word that carries content has to be in both questions, itself or as a near synonym (`lexicon`).

What is kept of a question holds its words as keyed hashes only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import orjson

from balancer.core.semantic.frames import Frame, frame_of
from balancer.core.semantic.tokens import Unreadable, Word, sentences, tokenize
from balancer.core.semantic.words import (
    BE,
    DO,
    LIGHT,
    MARKING,
    MODALS,
    NEGATORS,
    NUMBER_SCALES,
    NUMBERS,
    PLACING,
    PRONOUNS,
    SYMMETRIC,
    class_of,
    group,
    is_known,
    is_verb,
    plain,
)

# Longer questions are left to the exact cache: the more there is in one, the more a rule can miss.
MAX_CHARS = 600
MAX_PARTS = 40
MAX_SENTENCES = 4
# The form of what is kept, and of what is embedded; another one is never compared.
FORM = 2


@dataclass(frozen=True, slots=True)
class Part:
    """One word that carries content, in its place."""

    word: str  # its group's name, or the hash of it
    sort: str  # word | name | number | quantity | opaque, or the class of the word
    phrase: int  # which phrase of the question it stands in
    marker: str  # the preposition that governs it; empty for none


@dataclass(frozen=True, slots=True)
class Features:
    """What the guards compare of a question."""

    asks: tuple[str, ...]  # of each sentence: kind, tense, modality
    parts: tuple[Part, ...]

    @property
    def gist(self) -> str:
        """What is asked, in the words of the groups: what is embedded. Wrapping, inflection and synonyms are gone.

        With the question itself, two wordings of one thing are farther apart than two things in one wording; with its
        gist they are all but equal, and what is left between two gists is a difference in content.
        """
        words = [asks.split(" ", 1)[0] for asks in self.asks]
        for part in self.parts:
            words += [part.marker, part.word] if part.marker else [part.word]
        return " ".join(words)

    def hashed(self, key: bytes) -> Features:
        """The same with every word as a keyed hash (`key` of at most 64 bytes), so that none can be read back."""
        return Features(
            self.asks, tuple(Part(_hash(part.word, key), part.sort, part.phrase, part.marker) for part in self.parts)
        )

    def encode(self) -> bytes:
        """As JSON."""
        return orjson.dumps([FORM, self.asks, [(p.word, p.sort, p.phrase, p.marker) for p in self.parts]])

    @classmethod
    def decode(cls, data: bytes) -> Features | None:
        """Read strictly; None for anything that `encode` did not write."""
        try:
            form, asks, parts = orjson.loads(data)
            if form != FORM or not all(type(ask) is str for ask in asks):
                return None
            return cls(tuple(asks), tuple(_checked(part) for part in parts))
        except (orjson.JSONDecodeError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How two questions compare: `reason` names what certainly differs.

    Without one, `extra` counts the words that only the one with more of them has, and `lacking` those of the other.
    """

    reason: str | None
    extra: int = 0
    lacking: int = 0

    @property
    def agree(self) -> bool:
        """Whether nothing differs."""
        return self.reason is None and self.extra == 0


# -- reading


def read(text: str) -> Features:
    """What the guards see of a question. Raises Unreadable for what they do not understand, with the reason."""
    if len(text) > MAX_CHARS:
        raise Unreadable("length")
    found = sentences(tokenize(text))
    if not 0 < len(found) <= MAX_SENTENCES:
        raise Unreadable("length")
    frames = [frame_of(sentence) for sentence in found]
    frames = [frame for frame in frames if frame.words or frame.kind != "say"]
    asks: list[str] = []
    parts: list[Part] = []
    for frame in frames:
        walk = _Walk(parts[-1].phrase + 1 if parts else 0, frame)
        parts += walk.parts
        asks.append(f"{walk.kind} {frame.tense} {frame.modality} {frame.agent if walk.acts else 'named'}")
    if not parts or len(parts) > MAX_PARTS:
        raise Unreadable("length" if parts else "empty")
    return Features(tuple(asks), tuple(parts))


class _Walk:
    """Goes through the words of a frame from left to right and notes the parts."""

    def __init__(self, phrase: int, frame: Frame) -> None:
        self.parts: list[Part] = []
        self._phrase = phrase
        self._marker = ""
        self._negated = False
        self._words = frame.words
        self.kind = frame.kind
        self._asks_some = (
            frame.kind == "what"
        )  # "what are some cats" is "what are cats"; "do some cats" is not "do cats"
        self.acts = False
        at = 0
        while at < len(self._words):
            at += self._step(at)
        self._end_phrase()
        if self._negated:
            self._add("not", "negation")
        self._as_conversion()
        if self.kind == "how-much" and all(part.sort in ("number", "quantity") for part in self.parts):
            self.kind = "what"  # how much is 20 percent of 80

    def _step(self, at: int) -> int:
        """Take the word there; how many words went."""
        word = self._words[at]
        text = word.text
        if word.kind == "comma":
            self._end_phrase()
            self._turn("")
        elif word.kind == "number" or (text in NUMBERS and not word.name and self._counts(at)):
            return self._number(at)
        elif word.kind == "opaque":
            self._add(text, "opaque")
        elif word.kind == "sign":
            self._add(text, "number")
        elif word.kind == "possessive":
            self._possess()
        elif word.name and len(text) == 1:
            self._add(text, class_of(text.lower()) or "name")
        elif text in NEGATORS:
            self._negated = not self._negated
            if text == "without":
                self._turn("")
        elif text in PRONOUNS or text in ("one's", "myself"):
            self._add("pronoun " + PRONOUNS.get(text, text), "person")
        elif text == "to" and self._is_infinitive(at):
            self._turn("")
        elif text in MARKING or text in PLACING:
            bound = text in _LOOSE and at > 0 and self._acts(at - 1)  # turn in, look at
            self._turn("to" if text == "into" else f"{text}+" if bound else text)
        elif text in MODALS or (text in ("must", "should") and not word.name):
            self._add("modal " + MODALS.get(text, text), "modality")
        elif (
            text in BE
            or text in DO
            or text in LIGHT
            or text in _SKIPPED
            or (text in _SOME and at == 0 and self._asks_some)
        ):
            pass
        else:
            self._content(word, at)
        return 1

    def _turn(self, marker: str) -> None:
        """A phrase begins; two prepositions in a row are one."""
        governs_nothing = marker and self._marker and not (self.parts and self.parts[-1].phrase == self._phrase)
        self._phrase += 1
        self._marker = f"{self._marker} {marker}" if governs_nothing else marker

    def _end_phrase(self) -> None:
        """A preposition that governs nothing is a word of its own: `turn it on`, `made of`."""
        if self._marker and not (self.parts and self.parts[-1].phrase == self._phrase):
            particle, self._marker = self._marker, ""
            self._add(particle, "particle")

    def _add(self, word: str, sort: str) -> None:
        marker = self._marker
        if self._negated and sort not in ("number", "opaque"):
            marker, self._negated = f"not {marker}".strip(), False
        if sort in _MEDIA:
            marker = marker.rstrip("+")
        self.parts.append(Part(word, sort, self._phrase, marker))

    def _content(self, word: Word, at: int) -> None:
        bare = word.text if word.name and not is_known(plain(word.text)) else plain(word.text)
        if word.text.endswith("ing") and not self._is_gerund(at):
            bare = word.text  # a painting is not paint, training is no train
        name = group(bare)
        acts = is_verb(bare) and not word.name
        sort = class_of(name)
        if not sort and word.name:
            sort = "name"
        elif not sort:
            sort = "verb" if acts else "word" if is_known(bare) else "term"
        self._add(name, sort)
        if acts:
            self.acts = True
            self._turn("")

    def _is_gerund(self, at: int) -> bool:
        """Whether a word in -ing is the verb: `of cleaning a rug`, `is working`."""
        if at == 0:
            return len(self._words) > 1 and self._words[1].text in _DETERMINERS
        before = self._words[at - 1].text
        return before in BE or (before in _BEFORE_GERUND and at + 1 < len(self._words))

    def _possess(self) -> None:
        """The word before owns what follows: the same as `of` it."""
        if self.parts:
            last = self.parts[-1]
            self.parts[-1] = Part(last.word, last.sort, last.phrase + 1, "of")
            self._phrase += 2

    def _counts(self, at: int) -> bool:
        """Whether a number written as a word is one: `one sentence`, not `this one` or `one of them`."""
        return self._words[at].text != "one" or (
            at + 1 < len(self._words)
            and self._words[at + 1].kind == "word"
            and self._words[at + 1].text.isalpha()
            and self._words[at + 1].text not in MARKING | PLACING | BE | DO | MODALS.keys()
        )

    def _number(self, at: int) -> int:
        """A number and what it counts are one part: 5 miles are not 5 kilometres."""
        taken, value = self._value(at)
        if self._is_year(at):
            self._add(value, "year")
            return 1
        after = self._words[at + taken] if at + taken < len(self._words) else None
        if after is not None and after.kind == "word" and _is_counted(after):
            unit = group(plain(after.text))
            self._add(f"{value} {unit}", "quantity")
            taken += 1
            if at + taken < len(self._words) and self._words[at + taken].text in (
                "long",
                "old",
                "tall",
                "wide",
                "deep",
                "high",
            ):
                taken += 1
        else:
            self._add(value, "number")
        return taken

    def _is_year(self, at: int) -> bool:
        """Four digits before a single thing, or before nothing: `the 2020 election`, `in 2020`, not `2020 cars`."""
        text = self._words[at].text
        if not (text.isdigit() and len(text) == 4 and text[0] in "12"):
            return False
        after = self._words[at + 1] if at + 1 < len(self._words) else None
        return after is None or not _is_counted(after) or (after.kind == "word" and plain(after.text) == after.text)

    def _value(self, at: int) -> tuple[int, str]:
        text = self._words[at].text
        value = NUMBERS.get(text, text)
        taken = 1
        while at + taken < len(self._words) and value.isdigit():
            text = self._words[at + taken].text
            if text in NUMBER_SCALES:
                value = str(int(value) * NUMBER_SCALES[text])
            elif text in NUMBERS and len(NUMBERS[text]) == 1 and int(value) in range(20, 100, 10):
                value = str(int(value) + int(NUMBERS[text]))
            else:
                break
            taken += 1
        return taken, value

    def _is_infinitive(self, at: int) -> bool:
        """Whether the `to` there stands before a verb: not in `get to work`."""
        if at + 1 == len(self._words) or (at > 0 and plain(self._words[at - 1].text) in _MOVING):
            return False
        return self._acts(at + 1) and is_verb(self._words[at + 1].text)

    def _acts(self, at: int) -> bool:
        word = self._words[at]
        return word.kind == "word" and not word.name and is_verb(plain(word.text))

    def _as_conversion(self) -> None:
        """`how many km are in 5 miles` and `5 miles is how many km`: where each is marked by its number, or by none."""
        given = [part for part in self.parts if part.sort == "quantity"]
        asked = [part for part in self.parts if part.sort == "unit" or part.word in _TIME_UNITS]
        others = [part for part in self.parts if part not in given + asked and part.word != "convert"]
        plainly = all(part.marker in _CONVERTING for part in self.parts) and self.kind in _CONVERSIONS
        if len(given) == len(asked) == 1 and not others and plainly:
            self.kind, self.acts = "how-many", False
            self.parts = [Part(part.word, part.sort, part.phrase, "") for part in (*asked, *given)]


def _is_counted(word: Word) -> bool:
    text = word.text
    return (
        text not in MARKING
        and text not in PLACING
        and text not in BE
        and text not in DO
        and text not in LIGHT
        and text not in MODALS
        and text not in PRONOUNS
        and text not in ("and", "not", "have", "has")
    )


def _hash(word: str, key: bytes) -> str:
    return hashlib.blake2b(word.encode(), digest_size=8, key=key).hexdigest()


def _checked(part: Any) -> Part:
    word, sort, phrase, marker = part
    if type(word) is not str or type(sort) is not str or type(phrase) is not int or type(marker) is not str:
        raise TypeError(part)
    return Part(word, sort, phrase, marker)


# -- comparing

# Grammar that says nothing here: relative words, and what forms of tense have left.
_SKIPPED = frozenset({"and", "how", "have", "has", "had", "to", "who", "which"})
# What may stand between the two of a conversion: `5 miles in km`, `convert 5 miles to km`.
# A language, a tool or a year may stand before a thing, or behind it with `in`.
_MEDIA = frozenset({"technology", "tongue", "year"})
# After these `to` leads to a place.
_MOVING = frozenset({"get", "go", "come", "travel", "walk", "drive", "fly", "ride", "commute", "move", "return"})
_TIME_UNITS = frozenset({"second", "minute", "hour", "day", "week", "month", "year", "decade", "century"})
_CONVERSIONS = frozenset({"how-many", "what", "do", "how", "say"})
_CONVERTING = frozenset({"", "in", "to", "of"})
_SOME = frozenset({"some", "any"})
_DETERMINERS = frozenset({"a", "an", "the", "this", "these", "my", "your", "one's", "his", "her", "our", "their"})
# Some words before a verb in -ing.
_BEFORE_GERUND = frozenset({"of", "for", "by", "without", "while", "when", "from", "before", "after", "like", "about"})
# One of these in one question and none, or `of`, in the other: `today` and `on Monday`, `Lima's weather`, `in Lima`.
_LOOSE = frozenset({"of", "in", "on", "at", "during", "among", "upon"})
# Sorts of words that are surely no verbs.
_THINGS = frozenset({"word", "term", "name", "technology"})
# Words without a counterpart of these sorts may be a matter of wording; of any other they are a difference.
_SOFT = frozenset({"word", "term", "verb"})


def compare(one: Features, other: Features) -> Verdict:
    """Where two questions differ; symmetric. Both have to be hashed with the same key, or neither."""
    if one.asks != other.asks:
        return Verdict(_asks_reason(one.asks, other.asks))
    ours, theirs = Counter(p.word for p in one.parts), Counter(p.word for p in other.parts)
    missing, added = ours - theirs, theirs - ours
    odd = _odd_sorts(one, missing) + _odd_sorts(other, added)
    for sort in odd:
        if sort not in _SOFT:
            return Verdict(sort)
    for difference in (_marked, _out_of_order):
        reason = difference(one, other)
        if reason is not None:
            return Verdict(reason)
    return Verdict(None, *sorted((missing.total(), added.total()), reverse=True))


def _asks_reason(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    for one, other in zip(ours, theirs, strict=False):
        for reason, ours_, theirs_ in zip(
            ("question", "tense", "modality", "voice"), one.split(" "), other.split(" "), strict=True
        ):
            if ours_ != theirs_:
                return reason
    return "question"


def _odd_sorts(features: Features, odd: Counter[str]) -> list[str]:
    return sorted(part.sort for part in features.parts if part.word in odd)


def _marked(one: Features, other: Features) -> str | None:
    """What governs a word has to be the same where it says which way, or what is not meant."""
    ours, theirs = _markers(one), _markers(other)
    for word in ours.keys() & theirs.keys():
        if ours[word] == theirs[word]:
            continue
        gone, come = sorted((ours[word] - theirs[word]).elements()), sorted((theirs[word] - ours[word]).elements())
        if any(marker.startswith("not") for marker in gone + come):
            return "negation"
        if not all(_is_loose(*pair) for pair in zip(gone, come, strict=False)):
            return "direction"
    return None


def _is_loose(one: str, other: str) -> bool:
    """Whether two prepositions (or none) may be a matter of idiom."""
    if {one, other} == {"in", "during"}:
        return True
    return {one, other} <= _LOOSE | {""} and bool({one, other} & {"", "of"})


def _markers(features: Features) -> dict[str, Counter[str]]:
    markers: dict[str, Counter[str]] = {}
    for part in features.parts:
        markers.setdefault(part.word, Counter())[part.marker] += 1
    return markers


def _out_of_order(one: Features, other: Features) -> str | None:
    """Two words that change places change who does what, unless one of them stands in a phrase that may move."""
    if _repeats(one) or _repeats(other):
        sequences = [part.word for part in one.parts], [part.word for part in other.parts]
        return None if sequences[0] == sequences[1] else "order"
    agentless = all(ask.endswith("none") for ask in one.asks)  # then what is no verb is done to, wherever it stands
    ours, theirs = _places(one), _places(other)
    words = [word for word in ours if word in theirs]
    for first, second in combinations(words, 2):
        (a, at_a), (b, at_b) = ours[first], ours[second]
        (c, at_c), (d, at_d) = theirs[first], theirs[second]
        if (at_a < at_b) == (at_c < at_d) or (
            agentless and "verb" in (a.sort, b.sort) and (a.sort in _THINGS or b.sort in _THINGS)
        ):
            continue
        if not _may_move(a, b, c, d):
            return "order"
    return None


def _repeats(features: Features) -> bool:
    return len({part.word for part in features.parts}) < len(features.parts)


def _places(features: Features) -> dict[str, tuple[Part, int]]:
    return {part.word: (part, at) for at, part in enumerate(features.parts)}


def _may_move(a: Part, b: Part, c: Part, d: Part) -> bool:
    """`a` and `b` in one question are `c` and `d` in the other, and stand the other way round."""
    if _is_medium(a, c) != _is_medium(b, d):
        return True
    if a.phrase == b.phrase or c.phrase == d.phrase:
        return a.marker == b.marker == c.marker == d.marker and a.marker in SYMMETRIC
    return (a.marker == c.marker and a.marker != "") or (b.marker == d.marker and b.marker != "")


def _is_medium(one: Part, other: Part) -> bool:
    """A language or a year: `a Python program`, `a program in Python`; `the 2020 vote`, `the vote in 2020`."""
    if one.sort == "year":
        return {one.marker, other.marker} <= {"", "in", "of"}
    return one.sort in ("technology", "tongue") and {one.marker, other.marker} == {"", "in"}


Reader = Callable[[str], Features]
