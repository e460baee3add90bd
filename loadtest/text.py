"""Deterministic text: what a fake model writes, and how long it is in tokens.

Every word follows from all the text before it, so an answer that was cut anywhere and is continued
by another node has no seam, and equal requests get equal answers.
"""

from __future__ import annotations

from hashlib import blake2b

# A token stands for four bytes of UTF-8: the usual rule of thumb for English text.
TOKEN_BYTES = 4
# How far back a continued text is searched for its beginning: longer than any answer that tests ask for.
REWIND_CHARS = 65_536

# Some words need care on the wire: quotes and backslashes in JSON, letters of two to four bytes in UTF-8.
_PLAIN = """
the a one this that each every some any no both all more most less few many other such own same
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea body information back parent
face others level office door health person art war history party result change morning reason research girl guy
moment air teacher force education is was has had says makes goes takes comes sees knows gets gives finds thinks
tells becomes shows leaves feels puts brings begins keeps holds writes stands hears lets means sets meets runs pays
sits speaks lies leads reads grows loses falls sends builds stays cuts reaches kills remains quickly slowly often
never always here there now then above below under over between through after before
"""
WORDS: tuple[str, ...] = (
    *_PLAIN.split(),
    '"quoted"',
    "back\\slash",
    "naïve",
    "Größe",
    "日本語",
    "数据",
    "🙂",
    "<b>&amp;",
    "3.14",
)
# With its space and mark; no text without white space for longer than this is a word of ours.
LONGEST_WORD = max(map(len, WORDS)) + 2
_MARKS = ("",) * 13 + (",", ".", ";")


def count_tokens(text: str) -> int:
    """Tokens of `text`, rounded up; the empty text has none."""
    return (len(text.encode("utf-8", "surrogatepass")) + TOKEN_BYTES - 1) // TOKEN_BYTES


def to_token_ids(text: str) -> list[int]:
    """One number per token; `from_token_ids` gives the text back. The leading 1 keeps zero bytes and short ends."""
    raw = text.encode("utf-8", "surrogatepass")
    return [int.from_bytes(b"\x01" + raw[i : i + TOKEN_BYTES], "big") for i in range(0, len(raw), TOKEN_BYTES)]


def from_token_ids(ids: list[int]) -> str:
    """The text of token numbers; numbers that no text gives are read as replacement characters."""
    return b"".join(i.to_bytes(8, "big").lstrip(b"\0")[1:] for i in ids if 0 <= i < 2**63).decode("utf-8", "replace")


def block_keys(text: str, block_tokens: int) -> tuple[int, ...]:
    """Chained keys of the whole blocks of a text: equal heads of two texts have equal keys, within one process."""
    raw = text.encode("utf-8", "surrogatepass")
    size = block_tokens * TOKEN_BYTES
    keys: list[int] = []
    key = 0
    for start in range(0, len(raw) - size + 1, size):
        key = hash((key, raw[start : start + size]))
        keys.append(key)
    return tuple(keys)


class Story:
    """The one continuation of a text. `next_word` walks along it; `written` counts the words already there.

    `salt` holds whatever else changes an answer (model, seed, sampling). The story ends by itself after a number of
    words between `shortest` and `longest`, counted from the original prompt, also when part of it is already written.
    """

    def __init__(self, text: str, salt: str = "", *, shortest: int = 24, longest: int = 64) -> None:
        hasher = _Hasher(text, salt)
        origin = _origin(text, hasher)
        self._hash = hasher.upto(origin)
        self._glued = hasher.glued(origin)
        self._unfinished = ""
        self.written = 0
        self.length = shortest + int.from_bytes(self._hash.digest()[8:12], "big") % (longest - shortest + 1)
        self._walk(text[origin:])

    def next_word(self) -> str:
        """The next word with the space before it, or what is left of a word that was cut in two."""
        self.written += 1
        if self._unfinished:
            word, self._unfinished = self._unfinished, ""
            return word
        return self._advance()

    @property
    def at_end(self) -> bool:
        """Whether the answer would end here if nothing else ended it."""
        return self.written >= self.length

    def _walk(self, ours: str) -> None:
        """Go over words that are written already; the last one may be cut short."""
        while ours:
            word = self._advance()
            self._unfinished = word[len(ours) :]
            self.written += not self._unfinished
            ours = ours[len(word) :]

    def _advance(self) -> str:
        word = _word(self._hash.digest(), self._glued)
        self._hash.update(word.encode())
        self._glued = True
        return word


class _Hasher:
    """Digests of the heads of one text; only its last REWIND_CHARS are hashed again for each."""

    def __init__(self, text: str, salt: str) -> None:
        self._text = text
        self._begin = max(0, len(text) - REWIND_CHARS)
        self._base = blake2b(salt.encode() + b"\0", digest_size=16)
        self._base.update(text[: self._begin].encode("utf-8", "surrogatepass"))

    def upto(self, at: int) -> blake2b:
        """The hash of `text[:at]`; `at` is no more than REWIND_CHARS before the end."""
        hashed = self._base.copy()
        hashed.update(self._text[self._begin : at].encode("utf-8", "surrogatepass"))
        return hashed

    def glued(self, at: int) -> bool:
        """Whether a word that starts at `at` needs a space in front."""
        return at > 0 and not self._text[at - 1].isspace()

    def word(self, at: int) -> str:
        """The word that follows `text[:at]`."""
        return _word(self.upto(at).digest(), self.glued(at))


def _word(digest: bytes, glued: bool) -> str:
    """The word that follows a text with this digest, with a space in front where the text ends in a letter."""
    word = WORDS[int.from_bytes(digest[:4], "big") % len(WORDS)] + _MARKS[digest[4] % len(_MARKS)]
    return " " + word if glued else word


def _origin(text: str, hasher: _Hasher) -> int:
    """Where the prompt ends and words of ours begin; the text's end when none of it is ours."""
    origin = len(text)
    for at in _starts(text, len(text)):
        if hasher.word(at).startswith(text[at:]):
            origin = at
            break
    earliest = max(0, len(text) - REWIND_CHARS + LONGEST_WORD)
    while earliest < origin < len(text) and hasher.glued(origin):
        before = next((at for at in _starts(text, origin) if hasher.word(at) == text[at:origin]), None)
        if before is None:
            break
        origin = before
    return origin


def _starts(text: str, end: int) -> list[int]:
    """Where the last word of `text[:end]` may start: at the space before it, or after any other white space."""
    start = end
    while start > 0 and end - start <= LONGEST_WORD and not text[start - 1].isspace():
        start -= 1
    return [at for at in (start - 1, start) if 0 <= at < end]
