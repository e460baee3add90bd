"""Single words: their plain form, the group of near synonyms they stand in, and the classes that set them apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from balancer.core.semantic import lexicon

VERBS = lexicon.words("verbs")
SINGULAR = lexicon.words("singular")
NEGATORS = lexicon.words("negators")
MARKING = lexicon.words("marking")
PLACING = lexicon.words("placing")
SYMMETRIC = lexicon.words("symmetric")
LIGHT = lexicon.words("light")
BE = lexicon.words("be")
DO = lexicon.words("do")
FOREIGN = lexicon.words("foreign")
# Each form and the name of its line.
PRONOUNS: Mapping[str, str] = {form: line[0] for line in lexicon.lines("pronouns") for form in line}
MODALS: Mapping[str, str] = {form: line[0] for line in lexicon.lines("modals") for form in line}
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred"
NUMBERS: Mapping[str, str] = {
    **{word: str(number) for number, word in enumerate(_UNITS.split())},
    **{word: str(10 * number) for number, word in enumerate(_TENS.split(), 2)},
}
NUMBER_SCALES: Mapping[str, int] = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_IRREGULAR = {form: line[0] for line in lexicon.lines("irregular") for form in line}
# Past forms that are unlike the plain one; "read" and "put" tell no tense.
PAST = frozenset(
    form for line in lexicon.lines("irregular") for form in line[1:3] if form != line[0] and line[0] in VERBS
)
PARTICIPLES = frozenset(line[-1] for line in lexicon.lines("irregular") if line[0] in VERBS | {"bear"})
_VOWELS = frozenset("aeiouy")


def _grouped() -> tuple[dict[str, str], frozenset[str]]:
    groups: dict[str, str] = {}
    known = set(VERBS)
    for line in lexicon.lines("synonyms"):
        known.update(line)
        for word in line:
            groups.setdefault(word, line[0])
    for _, words in lexicon.named("classes"):
        known.update(words.split())
    return groups, frozenset(known)


_GROUPS, _KNOWN = _grouped()


@lru_cache(maxsize=8192)
def plain(word: str) -> str:
    """The dictionary form of a lower-case word as far as its ending tells: `boxes` -> `box`, `running` -> `run`."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or word in SINGULAR or not word.isalpha():
        return word
    if word.endswith("ies") and len(word) > 4:
        return _known_of(word[:-3] + "y", word[:-1])
    if word.endswith(("sses", "xes", "ches", "shes", "zzes")):
        return word[:-2]
    if word.endswith("oes"):
        return _known_of(word[:-2], word[:-1])
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and _VOWELS & set(word[: -len(ending)]) and len(word) - len(ending) > 1:
            return _without(word, word[: -len(ending)])
    return word


def group(word: str) -> str:
    """The group's name for a plain word, or the word."""
    return _GROUPS.get(word, word)


def is_verb(word: str) -> bool:
    """Whether a plain word may be a verb."""
    return word in VERBS


def is_known(word: str) -> bool:
    """Whether a plain word is in the lists; what is not is a name or a term."""
    return word in _KNOWN


def _classes() -> dict[str, str]:
    classes: dict[str, str] = {}
    for name, words in lexicon.named("classes"):
        for word in words.split():
            classes.setdefault(word, name)
            classes.setdefault(group(plain(word)), name)
    return classes


def _without(word: str, stem: str) -> str:
    """A verb's form without its ending: a doubled consonant is made single, a lost `e` comes back."""
    if word in _KNOWN:
        return word
    doubled = len(stem) > 2 and stem[-1] == stem[-2]
    if doubled and stem[-1] not in "lsz":
        return stem[:-1]
    if doubled:
        return _known_of(stem, stem[:-1])
    if stem in _KNOWN:
        return stem
    if stem + "e" in _KNOWN:
        return stem + "e"
    short = len(stem) <= 3 and stem[-1] not in _VOWELS | set("wx") and stem[-2:-1] in tuple(_VOWELS)
    if short or stem.endswith(("at", "iz", "v", "c", "dg", "u", "rs", "ns", "bl", "tl", "pl", "ur", "ir", "ar")):
        return stem + "e"
    return stem[:-1] + "y" if stem.endswith("i") else stem


def _known_of(*candidates: str) -> str:
    return next((word for word in candidates if word in _KNOWN), candidates[0])


_CLASSES = _classes()


def class_of(word: str) -> str:
    """The class (`time`, `unit`, `technology`, ...) of a word in its group's name; empty for the rest."""
    return _CLASSES.get(word, "")
