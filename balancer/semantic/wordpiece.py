"""BERT's tokenizer: text -> ids of word pieces, by a `vocab.txt` (Devlin et al. 2018; the uncased variant).

Also the judge of what a vocabulary can read: a model sees nothing but the pieces, and where a script is missing from
them two different questions may become the very same ids.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# A longer word is one unknown piece, as in the reference implementation.
MAX_WORD_CHARS = 100
# A script is read when the vocabulary spells it in pieces of two letters or more, at least this many; Han needs no
# longer pieces, but the characters of everyday writing: the first list of the Chinese standard (2013) has 3500.
MIN_PIECES, MIN_HAN = 1000, 3500
# Of the pieces of a text, this share may be unknown: one odd sign in a page, none in a question.
MAX_UNKNOWN_RATIO = 0.02


class WordPiece:
    """A vocabulary and the greedy longest-match split by it."""

    def __init__(self, vocabulary: Path, *, max_pieces: int) -> None:
        pieces = vocabulary.read_text(encoding="utf-8").split("\n")
        self._ids = {piece: number for number, piece in enumerate(pieces) if piece}
        self._begin, self._end, self._unknown = (self._ids[name] for name in ("[CLS]", "[SEP]", "[UNK]"))
        self._max_pieces = max_pieces
        self._scripts = _scripts_of(self._ids)

    def __repr__(self) -> str:
        return f"<WordPiece pieces={len(self._ids)} scripts={sorted(self._scripts)}>"

    def encode(self, text: str) -> list[int] | None:
        """Ids with the marks of begin and end; None for text that this vocabulary cannot read, or all of it not."""
        if any(script_of(char) not in self._scripts for char in text if char.isalpha()):
            return None
        ids = [self._begin]
        for word in split(text):
            ids += self._pieces(word)
        unknown = ids.count(self._unknown)
        if unknown > MAX_UNKNOWN_RATIO * len(ids) or len(ids) >= self._max_pieces or len(ids) == 1:
            return None
        ids.append(self._end)
        return ids

    def _pieces(self, word: str) -> list[int]:
        if len(word) > MAX_WORD_CHARS:
            return [self._unknown]
        found: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                number = self._ids.get(("##" if start else "") + word[start:end])
                if number is not None:
                    found.append(number)
                    start = end
                    break
            else:
                return [self._unknown]
        return found


def split(text: str) -> Iterator[str]:
    """Lower-case words without accents; punctuation marks and Han characters each alone."""
    word = ""
    for char in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(char)
        if kind == "Mn" or (kind[0] == "C" and char not in "\t\n\r"):
            continue
        if char.isspace():
            if word:
                yield word
            word = ""
        elif _is_mark(char, kind) or _is_han(char):
            if word:
                yield word
            yield char
            word = ""
        else:
            word += char
    if word:
        yield word


def script_of(char: str) -> str:
    """The script of a letter, by the first word of its Unicode name: `LATIN`, `CYRILLIC`, `CJK`, ..."""
    name = unicodedata.name(char, "")
    return name.partition(" ")[0].partition("-")[0]


def _scripts_of(pieces: dict[str, int]) -> frozenset[str]:
    counts: Counter[str] = Counter()
    for piece in pieces:
        bare = piece.removeprefix("##")
        if bare and all(char.isalpha() for char in bare):
            script = script_of(bare[0])
            if script == "CJK" or len(bare) > 1:
                counts[script] += 1
    return frozenset(script for script, n in counts.items() if n >= (MIN_HAN if script == "CJK" else MIN_PIECES))


def _is_mark(char: str, kind: str) -> bool:
    return kind[0] == "P" or (char.isascii() and not char.isalnum())


def _is_han(char: str) -> bool:
    return "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" or "\U00020000" <= char <= "\U0002fa1f"
