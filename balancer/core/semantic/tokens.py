"""Text to words: what is quoted or code is taken out whole, contractions are written out, sentences told apart."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from balancer.core.semantic import lexicon
from balancer.core.semantic.words import (
    BE,
    DO,
    FOREIGN,
    LIGHT,
    MARKING,
    MODALS,
    NEGATORS,
    PLACING,
    PRONOUNS,
    is_known,
    plain,
)

# Kept whole, to the letter: fenced and inline code, quotations, addresses, paths, placeholders in braces.
_OPAQUE = re.compile(
    r"```.*?(?:```|\Z)|`[^`]+`|\"[^\"]+\"|“[^”]+”|«[^»]+»|‘[^’]+’(?!\w)|(?<![\w'])'[^'\n]{2,}'(?!\w)"
    r"|https?://\S+|www\.\S+|[\w.+-]+@[\w-]+\.[\w.]+|(?<![\w/])(?:~|\.{0,2})/[\w.-]+(?:/[\w.-]*)*|\{\{?[^{}]+\}\}?"
    r"|<[A-Za-z/][^<>]*>|\$[A-Za-z_]\w*|(?<=\s)--?[a-z][\w-]*(?=\s|$)|(?<!\w)[#@]\w+|\b\w+\([^()]*\)"
    r"|(?<!\S)[^\s?!.,]*[\[\]{}\\=<>|^~@](?:\S*[^\s?!.,])?"
    r"|\b\w+_\w+\b|\b(?=\w*\d)[0-9a-f]{8,}\b",
    re.DOTALL,
)
_WORD = re.compile(
    r"\x00(?P<opaque>\d+)\x00"
    r"|(?P<number>(?:(?<![\w.)])[-−])?\d+(?:,\d{3})+(?:\.\d+)?(?![\w])|(?:(?<![\w.)])[-−])?\d+(?:[.:/]\d+)*(?![^\W\d_]))"
    r"|(?P<glued>\d+(?:\.\d+)*)(?P<suffix>[^\W\d_]{1,4})(?!\w)"
    r"|(?P<dotted>(?:[A-Za-z]\.){2,})"
    r"|(?P<word>\.?[^\W_](?:\w|(?<=\w)\.(?=[A-Za-z]\w))*(?:\+\+|\#(?!\w))?)(?P<tail>['’](?:s|t|re|ve|ll|d|m|S|T)\b|['’](?=\s|$))?"
    r"|(?P<sign>[-+*/=<>^%$€£¥₹°&|~×÷≤≥≠±√])"
    r"|(?P<stop>[.!?;…¿¡]+|\n+)|(?P<comma>[,:()—–])"
)
_NEGATED = {"ca": "can", "wo": "will", "sha": "shall"}
_TAILS = {"re": "are", "ve": "have", "ll": "will", "d": "would", "m": "am"}
_IS_AFTER = frozenset({"what", "who", "where", "when", "how", "why", "that", "it", "there", "here", "he", "she", "let"})
_SIGNS = {"%": "percent", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "−": "-"}
_PLAIN_CONTRACTIONS = dict(lexicon.named("contractions"))
_ORDINALS = {"1st": "first", "2nd": "second", "3rd": "third", "4th": "fourth", "5th": "fifth"}


@dataclass(slots=True)
class Word:
    """One word, number, sign or opaque part. `text` is lower-case, but for what is opaque."""

    text: str
    kind: str = "word"  # word | number | opaque | sign | stop | comma | possessive
    name: bool = False  # written with a capital where a plain word is not


class Unreadable(Exception):
    """Not a text that the guards understand; the argument says why, in a word."""


def tokenize(text: str) -> list[Word]:
    """The words of a text. Raises Unreadable for a script or a language that the guards do not know."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    opaque: list[str] = []

    def keep(match: re.Match[str]) -> str:
        opaque.append(match.group())
        return f" \x00{len(opaque) - 1}\x00 "

    if "\x00" in text:
        raise Unreadable("characters")
    bare = _OPAQUE.sub(keep, text)
    for char in bare:
        if char.isalpha() and not char.isascii() and "LATIN" not in unicodedata.name(char, ""):
            raise Unreadable("script")
    shouted = bare.isupper()
    found: list[Word] = []
    at = 0
    for match in _WORD.finditer(bare):
        if any(not char.isspace() and char not in "\"'`[]{}\\_" for char in bare[at : match.start()]):
            raise Unreadable("characters")
        at = match.end()
        _take(match, found, opaque, shouted)
    if any(not char.isspace() and char not in "\"'`[]{}\\_" for char in bare[at:]):
        raise Unreadable("characters")
    if not _is_english(found):
        raise Unreadable("language")
    return found


def sentences(words: list[Word]) -> list[list[Word]]:
    """The words by sentence, without the marks that end one."""
    parts: list[list[Word]] = [[]]
    for word in words:
        if word.kind == "stop":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if any(word.kind not in ("comma",) for word in part)]


def _take(match: re.Match[str], found: list[Word], opaque: list[str], shouted: bool) -> None:
    kind = match.lastgroup or ""
    if kind == "opaque":
        found.append(Word(opaque[int(match["opaque"])].strip("\"“”«»'‘’"), "opaque"))
    elif kind == "number":
        found.append(Word(match["number"].replace(",", "").replace("−", "-"), "number"))
    elif kind == "suffix":
        _take_glued(match["glued"], match["suffix"], found)
    elif kind == "dotted":
        found.append(Word(match["dotted"].lower().replace(".", ""), name=True))
    elif kind in ("word", "tail"):
        _take_word(match["word"], (match["tail"] or "").lstrip("'"), match["tail"] is not None, found, shouted)
    elif kind == "sign":
        sign = match["sign"]
        found.append(Word(_SIGNS.get(sign, sign), "word" if sign in _SIGNS else "sign"))
    elif kind == "stop":
        found.append(Word(match["stop"], "stop"))
    else:
        found.append(Word(",", "comma"))


def _take_glued(number: str, suffix: str, found: list[Word]) -> None:
    if suffix.lower() in ("st", "nd", "rd", "th"):
        ordinal = number + suffix.lower()
        found.append(Word(_ORDINALS.get(ordinal, ordinal), name=ordinal not in _ORDINALS))
    elif is_known(plain(suffix.lower())) or suffix.lower() in ("am", "pm", "k", "m", "c", "f"):
        found += [Word(number, "number"), Word(suffix.lower())]
    else:
        found.append(Word((number + suffix).lower(), name=True))


def _take_word(raw: str, tail: str, tailed: bool, found: list[Word], shouted: bool) -> None:
    lower = raw.lower()
    begins = not found or found[-1].kind == "stop"
    name = not shouted and raw != lower and (not begins or not raw[1:].islower()) and raw != "I"
    if raw == "I" and found and found[-1].name:
        name = True  # Elizabeth I, World War I
    if name and len(raw) > 1 and raw.isupper() and lower in ("us", "it", "who", "may", "can", "will", "am", "a", "or"):
        lower = {"us": "usa"}.get(lower, raw)  # an acronym, and none of our small words
    elif name and len(raw) == 1:
        lower = raw  # vitamin A, the language C
    if not tailed:
        for part in _PLAIN_CONTRACTIONS.get(lower, lower).split():
            found.append(Word(part, name=name))
    elif tail == "t" and lower.endswith("n"):
        verb = lower.removesuffix("n") if lower != "can" else "ca"
        found += [Word(_NEGATED.get(verb, verb)), Word("not")]
    elif tail in _TAILS:
        found += [Word(lower, name=name), Word(_TAILS[tail])]
    elif tail == "s" and lower in _IS_AFTER:
        found += [Word(lower), Word("us" if lower == "let" else "is")]
    else:
        found += [Word(lower, name=name), Word("'s", "possessive")]


def _is_english(found: list[Word]) -> bool:
    """Enough words that are English, and fewer that belong to other languages only."""
    words = [word for word in found if word.kind == "word" and not word.name]
    english = sum(1 for word in words if _is_english_word(word.text))
    foreign = sum(1 for word in words if word.text in FOREIGN and not _is_english_word(word.text))
    plain_words = sum(1 for word in words if word.text.isascii())
    return english * 5 >= len(words) and english > 0 and foreign * 4 <= english and plain_words * 10 >= len(words) * 9


def _is_english_word(text: str) -> bool:
    return (
        text in LIGHT
        or text in MARKING
        or text in PLACING
        or text in PRONOUNS
        or text in MODALS
        or text in NEGATORS
        or text in _ENGLISH
        or is_known(plain(text))
    )


_ENGLISH = lexicon.words("english") | BE | DO
