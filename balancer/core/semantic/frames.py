"""What kind of thing a sentence asks for, however it is put: `how do I V`, `what is the way to V`, `how to V` are one.

A frame is what remains of a sentence once its wrapping ("could you tell me ...") and the words that only make it a
question are taken off: the kind of question, its tense and modality, and the words that carry its content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from balancer.core.semantic import lexicon
from balancer.core.semantic.tokens import Word
from balancer.core.semantic.words import BE, DO, MODALS, PARTICIPLES, PAST, PRONOUNS, class_of, group, is_verb, plain

WH = frozenset("what which who whom whose when where why how".split())  # noqa: SIM905
_AUXILIARIES = BE | DO | MODALS.keys() | {"has", "have", "had"}
# Who asks how it is done, and who asks whether it can be, without meaning anybody in particular.
_ANYONE = frozenset({"i", "you", "we", "one"})
_ASKER = frozenset({"i", "one"})
_OPENING = frozenset({"in", "on", "at", "for", "with", "about", "during", "as", "from", "by", "using", "within", "to"})
_BEFORE_WH = frozenset({"in", "at", "from", "to", "on", "by", "for", "with", "of", "about", "since", "until", "under"})
_TELL = lexicon.words("tell")
_PRODUCE = lexicon.words("produce")
_EXPLAIN = lexicon.words("explain")
_TEXT_VERBS = lexicon.words("text-verbs") | _PRODUCE | _EXPLAIN | _TELL
_ARTEFACTS = lexicon.words("artefacts")
_WAYS = lexicon.words("ways")
_ADVISED = lexicon.words("advised")
_SAID_BY_VERB = {verb: frozenset(nouns.split()) for verb, nouns in lexicon.named("said-by-verb")}
_ARTICLES = frozenset({"a", "an", "the", "some", "any"})
# `how` and one of these measure nothing together.
_NO_DEGREE = _AUXILIARIES | PRONOUNS.keys() | _ARTICLES | {"to", "about", "not", "on", "in", "come"}


@dataclass(slots=True)
class Frame:
    """One sentence: what it asks, and the words left."""

    kind: str  # what | who | when | where | why | how | how-ADJECTIVE | yesno | do (an instruction) | say
    tense: str  # past | future | perfect | pluperfect | present
    modality: str  # can | may | should | must | would | ""
    agent: str  # named | none: whether it is said who does it
    words: list[Word]


def frame_of(words: list[Word]) -> Frame:
    """Read one sentence."""
    words = _unwrap(_fold_phrases(words))
    words = _unwrap(_fold_phrases(_with_opening_last(words)))
    words = _fold_degree(_fold_ways(words))
    words = _without_expletive(_fold_allowed(_to_court(words)))
    tense = _tense(words)
    passive, words = _passive(words)
    reader = _Reader(passive)
    kind, modality, rest = reader.kind(words)
    return Frame(kind, tense, modality, "none" if reader.agentless else "named", rest)


# -- phrases and wrappers


def _phrases() -> Mapping[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]:
    table: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for name, phrases in lexicon.named("phrases"):
        for phrase in phrases.split("; "):
            parts = tuple(phrase.split())
            table.setdefault(parts[0], []).append((parts, tuple(name.split())))
    for found in table.values():
        found.sort(key=lambda entry: -len(entry[0]))
    return table


_PHRASES = _phrases()
_WRAPPERS = sorted((tuple(line) for line in lexicon.lines("wrappers")), key=len, reverse=True)
_REQUESTS = {("can", "you"), ("could", "you"), ("will", "you"), ("would", "you")}


def _fold_phrases(words: list[Word]) -> list[Word]:
    """Phrases become the word that says the same."""
    words = _without_me(words)
    folded: list[Word] = []
    at = 0
    while at < len(words):
        for parts, name in _PHRASES.get(words[at].text, ()) or _PHRASES.get(plain(words[at].text), ()):
            if _stands(words, at, parts):
                folded += [Word(_degree(part)) for part in name]
                at += len(parts)
                break
        else:
            folded.append(words[at])
            at += 1
    return folded


def _stands(words: list[Word], at: int, parts: tuple[str, ...]) -> bool:
    if at + len(parts) > len(words):
        return False
    return all(
        word.kind == "word" and part in (word.text, "be" if word.text in BE else plain(word.text))
        for word, part in zip(words[at : at + len(parts)], parts, strict=True)
    )


def _without_me(words: list[Word]) -> list[Word]:
    """Without the person a text is asked for: `give me`, `for me`."""
    kept: list[Word] = []
    for at, word in enumerate(words):
        before = words[at - 1].text if at else ""
        if word.text in ("me", "us") and (before in _TELL or before in _PRODUCE or before in _EXPLAIN):
            continue
        if word.text == "for" and at + 1 < len(words) and words[at + 1].text == "me" and len(words) - at <= 3:
            continue
        if word.text == "me" and before == "for" and len(words) - at <= 2:
            continue
        kept.append(word)
    return kept


def _unwrap(words: list[Word]) -> list[Word]:
    while True:
        words = words[next((at for at, word in enumerate(words) if word.kind != "comma"), len(words)) :]
        said = tuple(word.text for word in words[:10])
        for wrapper in _WRAPPERS:
            if said[: len(wrapper)] == wrapper and len(words) > len(wrapper):
                if wrapper[:2] in _REQUESTS and len(wrapper) == 2 and plain(said[2]) not in _TEXT_VERBS:
                    continue
                words = words[len(wrapper) :]
                break
        else:
            break
    while (
        words
        and words[-1].text in ("please", "thanks", "thank", "you", ",")
        and (words[-1].text != "you" or (len(words) > 1 and words[-2].text == "thank"))
    ):
        words = words[:-1]
    return words


def _fold_ways(words: list[Word]) -> list[Word]:
    """`what is the best way to V` asks how, and the adjective stays."""
    texts = [word.text for word in words[:9]]
    if len(texts) < 4 or texts[0] not in ("what", "which"):
        return words
    for at in range(1, len(texts) - 1):
        if texts[at] in _WAYS and texts[at + 1] in ("to", "of", "for", "i", "you", "we", "that", "in"):
            adjectives = [w for w in words[1:at] if not (w.text in BE or w.text in _ARTICLES or w.text in _ADVISED)]
            if len(adjectives) > 2:
                return words
            after = at + 2 if texts[at + 1] in ("of", "for") else at + 1
            return [Word("how"), Word("to"), *(words[after + (texts[after : after + 1] == ["to"]) :]), *adjectives]
    return words


def _fold_degree(words: list[Word]) -> list[Word]:
    """`how` and the word it measures become one: `how-many`, `how-tall`."""
    folded: list[Word] = []
    at = 0
    while at < len(words):
        word = words[at]
        if word.text == "how" and at + 1 < len(words):
            after = words[at + 1]
            if after.kind == "word" and after.text not in _NO_DEGREE and not after.name and after.text.isalpha():
                folded.append(Word(_degree(f"how-{after.text}")))
                at += 2
                continue
        folded.append(word)
        at += 1
    return folded


def _degree(word: str) -> str:
    """`how-high` and `how-tall` are one; any other word as it is."""
    how, _, measured = word.partition("-")
    return f"how-{group(plain(measured))}" if how == "how" and measured not in ("", "many") else word


def _with_opening_last(words: list[Word]) -> list[Word]:
    """`In Python, how do I ...`: the opening phrase goes to the end."""
    if words and words[0].text in _OPENING and (len(words) < 2 or words[1].text not in WH):
        for at in range(2, min(8, len(words) - 1)):
            if words[at].kind == "comma":
                return [*words[at + 1 :], *words[:at]]
    return words


def _without_expletive(words: list[Word]) -> list[Word]:
    """Without an `it` that stands for what follows: `is it true that ...`, `how long does it take to ...`."""
    texts = [word.text for word in words[:8]]
    if "it" not in texts or texts.index("it") > 3:
        return words
    at = texts.index("it")
    before, after = texts[:at], texts[at + 1 :]
    if not before or before[-1] not in _AUXILIARIES or not ({"to", "that"} & set(after[:4])):
        return words
    if after[0] == "true":
        return [*words[: at - 1], Word("whether"), *words[at + 3 if after[1:2] == ["that"] else at + 2 :]]
    end = at + 2 if after[0] == "take" and before[0].startswith("how-") else at + 1
    rest = words[end:]
    if after[0] == "take" and rest and rest[0].text == "to":
        rest = rest[1:]
    return [*words[:at], *rest]


_TO_VERBS = {
    "allowed": "can", "able": "can", "permitted": "can", "supposed": "should", "required": "must", "obliged": "must",
    "going": "will",
}  # fmt: skip


def _fold_allowed(words: list[Word]) -> list[Word]:
    """`is a tenant allowed to V` asks `can a tenant V`."""
    for at in range(1, len(words) - 1):
        modal = _TO_VERBS.get(words[at].text)
        if modal and words[at + 1].text == "to":
            be = next((i for i in range(at - 1, max(-1, at - 7), -1) if words[i].text in BE), None)
            if be is not None and words[be].text not in ("was", "were"):
                return [*words[:be], Word(modal), *words[be + 1 : at], *words[at + 2 :]]
    return words


def _passive(words: list[Word]) -> tuple[bool, list[Word]]:
    """Whether somebody is done to; with `by` and a doer at the end it is turned round, and is not."""
    for at, word in enumerate(words):
        if at == 0 or word.name or not _is_participle(word.text):
            continue
        be = next((i for i in range(at - 1, max(-1, at - 8), -1) if words[i].text in BE), None)
        if be is None or any(is_verb(plain(w.text)) and not w.name for w in words[be + 1 : at]):
            continue
        if (
            at + 2 < len(words)
            and words[at + 1].text == "by"
            and be == at - 1
            and words[0].text in ("what", "who", "which")
        ):
            end = next((i for i in range(at + 3, len(words)) if words[i].text in _OPENING), len(words))
            return False, [*words[:be], *words[at + 2 : end], Word(plain(word.text)), *words[end:]]
        return True, words
    return False, words


def _is_participle(text: str) -> bool:
    return text in PARTICIPLES or (
        text.endswith("ed") and len(text) > 4 and is_verb(plain(text)) and plain(text) != text
    )


def _to_court(words: list[Word]) -> list[Word]:
    """`take X to court` is `sue X`."""
    for at in range(len(words) - 3):
        if plain(words[at].text) == "take":
            for end in range(at + 2, min(at + 8, len(words) - 1)):
                if words[end].text == "to" and words[end + 1].text == "court":
                    return [*words[:at], Word("sue"), *words[at + 1 : end], *words[end + 2 :]]
    return words


# -- kind, tense, modality


def _tense(words: list[Word]) -> str:
    texts = [word.text for word in words if word.kind == "word" and not word.name]
    if any(text in ("did", "was", "were") for text in texts):
        return "past"
    if any(MODALS.get(text) == "will" for text in texts):
        return "future"
    for at, text in enumerate(texts):
        if text in ("has", "have", "had", "having") and any(
            _is_past(after) or after == "been" for after in texts[at + 1 : at + 4]
        ):
            return "pluperfect" if text == "had" else "perfect"
    if "had" in texts:
        return "past"
    if any(text in BE or text in DO or text in MODALS for text in texts):
        return "present"
    return "past" if any(_is_past(text) for text in texts) else "present"


def _is_past(text: str) -> bool:
    return text in PAST or (
        text.endswith("ed") and len(text) > 4 and is_verb(group(plain(text))) and plain(text) != text
    )


class _Reader:
    """Tells the kind of one sentence; `agentless` once it is known that nobody in particular does it."""

    def __init__(self, passive: bool) -> None:
        self.agentless = passive

    def kind(self, words: list[Word]) -> tuple[str, str, list[Word]]:
        if not words:
            return "say", "", words
        for at, word in enumerate(words):  # `5 miles is how many km?`
            if word.text.startswith("how-"):
                rest = [*words[:at], *words[at + 1 :]]
                modality, rest = self._modality(rest, at)
                return word.text, modality, rest
        wh = _wh_at(words)
        if wh is not None:
            return self._question(words, wh)
        first = words[0].text
        if first in ("if", "whether") and len(words) > 2:
            modality = next((MODALS[word.text] for word in words if word.text in MODALS), "")
            return "yesno", modality, [word for word in words[1:] if word.text not in MODALS]
        if first in _AUXILIARIES and not (first in DO and len(words) > 1 and words[1].text in ("not",)):
            modality, rest = self._modality(words, 0)
            if first in MODALS and len(rest) > 1 and is_verb(rest[0].text) and rest[0] is words[1]:
                self.agentless = True  # of "is it possible to bring bags" nobody is left
            if (
                first in ("do", "does")
                and len(rest) > 1
                and rest[0].text in _ANYONE
                and rest[1].text in ("need", "must")
            ):
                rest = rest[1:]
            if rest and rest[0].text == "must":
                return "yesno", "must", rest[1:]
            if first in BE or first in DO or first in ("has", "have", "had"):
                rest = rest if rest and rest[0] is not words[0] else rest[1:]
            return "yesno", modality, rest
        return self._instruction(words)

    def _question(self, words: list[Word], at: int) -> tuple[str, str, list[Word]]:
        kind = words[at].text
        before, rest = list(words[:at]), list(words[at + 1 :])
        if before and before[0].text in _EXPLAIN:
            before = before[1:]
        kind = {"which": "what", "whom": "who"}.get(kind, kind)
        if before and len(before) == 1 and before[0].text in _BEFORE_WH:
            rest, before = rest + before, []  # "from where does X come": the preposition goes to the end
        if kind == "how" and rest and rest[0].text == "to":
            self.agentless = True
            return kind, "", before + _owned(rest[1:])
        if kind == "what":
            rest = _without_answers_class(_with_rank_first(rest))
        if kind == "how":
            rest = _as_difference(rest)
            kind = "what" if rest and rest[0].text == "difference" else kind
        modality, rest = self._modality(rest, 0, how=kind == "how")
        if kind == "how" and (modality == "can" or (modality == "should" and self.agentless)):
            modality = ""
        if kind == "where" and modality == "can" and self.agentless:
            modality = ""
        if kind == "why" and len(rest) > 1 and group(plain(rest[-1].text)) == "occur":
            rest = rest[:-1]  # what causes it is why it happens
        if kind == "why" and rest and rest[-1].text == "good":
            kind, rest = "what", [Word("advantage"), *rest[:-1]]
        if kind == "why" and rest and rest[-1].text == "bad":
            kind, rest = "what", [Word("disadvantage"), *rest[:-1]]
        if kind == "what":
            rest = _without_asked_class(rest)
            if len(rest) > 2 and rest[0].text in ("do", "done") and rest[1].text == "to" and self.agentless:
                return "how", "", before + rest[2:]
            if rest and rest[-1].text == "mean" and modality == "":
                rest = rest[:-1]
            elif len(rest) > 2 and rest[0].text == "the" and rest[1].text == "meaning" and rest[2].text == "of":
                rest = rest[3:]
            if len(rest) > 2 and rest[0].text in ("good", "recommended") and rest[1].text == "to":
                self.agentless = True  # "what is good to eat": what one should
                modality, rest = "should", rest[2:]
        return kind, modality, before + rest

    def _modality(self, rest: list[Word], start: int, *, how: bool = False) -> tuple[str, list[Word]]:
        """The first auxiliary from `start` on, and the words without it and without the anyone whom it speaks of.

        Who asks how something is done means no person by `you`; who asks whether, may mean one.
        """
        for at in range(start, len(rest)):
            text = rest[at].text
            if text not in _AUXILIARIES or rest[at].name:
                continue
            modality = MODALS.get(text, "")
            modality = "" if modality == "will" else modality
            left, right = rest[:at], rest[at + 1 :]
            negated = bool(right) and right[0].text == "not"
            person = 1 if negated else 0
            anyone = len(right) > person and right[person].text in (
                _ANYONE if how and len(right) > person + 2 else _ASKER
            )
            if anyone and text not in BE and text not in ("has", "have", "had"):
                self.agentless = True
                said = right[person].text
                right = [*right[:person], *right[person + 1 :]]
                own = {"i": "my", "we": "our", "you": "your", "one": "your"}.get(said, "")
                if how:
                    right = [Word("one's") if word.text == own else word for word in right]
                if modality == "would" and said != "you":
                    modality = ""  # "how would I open it": the same as how I do
                if right and right[0].text == "must":
                    return "must", left + right[1:]
            if right and right[0].text == "should":
                return "should", left + right[1:]
            if right and right[0].text == "can" and modality == "":
                return "can", left + right[1:]
            return modality, left + right
        return "", rest

    def _instruction(self, words: list[Word]) -> tuple[str, str, list[Word]]:
        first = plain(words[0].text)
        if first == "what":
            return "what", "", words[1:]
        artefact = _artefact_at(words)
        if artefact is not None:
            if first in _PRODUCE and is_verb(first):
                self.agentless = True
                return "do", "", [Word("write"), *words[1:]]
            if not is_verb(first):
                self.agentless = True
                return "do", "", [Word("write"), *words]
        if group(first) == "calculate" and any(word.kind == "number" for word in words):
            return "what", "", words[1:]
        if first in _TELL and len(words) > 1:
            rest = words[1:]
            return ("do", "", words) if rest[0].text in ("about", "that") else ("what", "", rest)
        if group(first) == "define" and len(words) > 1:
            return "what", "", words[1:]
        if is_verb(first) and (words[0].text == first) and not words[0].name:
            needs_text = first in _TEXT_VERBS and group(first) != "convert"
            material = any(
                word.kind in ("number", "opaque") or word.text in ("this", "these", "following") for word in words
            )
            self.agentless = True
            return ("do" if needs_text or material else "how"), "", words
        return "say", "", words


def _wh_at(words: list[Word]) -> int | None:
    """Where the question word stands: first, after a preposition, or after a comma."""
    for at, word in enumerate(words):
        if word.text in WH and (at == 0 or words[at - 1].kind == "comma" or (at == 1 and words[0].text in _BEFORE_WH)):
            return at
    # In its place: "the capital of France is what?"
    last = words[-1].text
    if last in ("what", "who", "where", "when") and len(words) > 2 and words[-2].text in BE:
        return len(words) - 1
    if len(words) > 1 and words[0].text in _EXPLAIN and words[1].text in WH:
        return 1
    return None


def _without_asked_class(rest: list[Word]) -> list[Word]:
    """`which foods should I eat` asks `what should I eat`: the verb says the class already."""
    if not rest:
        return rest
    first = group(plain(rest[0].text))
    for word in rest[1:]:
        if first in _SAID_BY_VERB.get(group(plain(word.text)), ()):
            return rest[1:]
    return rest


def _owned(words: list[Word]) -> list[Word]:
    """Whose it is, where anyone is spoken of."""
    return [Word("one's") if word.text in ("my", "your", "our") else word for word in words]


def _without_answers_class(rest: list[Word]) -> list[Word]:
    """`which city is the capital of Mali` asks for `the capital of Mali`: the city is the answer."""
    if len(rest) > 3 and rest[1].text in BE and rest[2].text == "the" and not is_verb(plain(rest[0].text)):
        return rest[1:]
    return rest


def _as_difference(rest: list[Word]) -> list[Word]:
    """`do A and B differ`, `is A different from B`: the difference between A and B."""
    at = next((at for at, word in enumerate(rest) if word.text in ("differ", "differs", "different")), None)
    if at is None or at < 2 or rest[0].text not in BE | DO:
        return rest
    first, second = rest[1:at], rest[at + 1 :]
    if second and second[0].text != "from":
        return rest
    joined = [*first, Word("and"), *second[1:]] if second else first
    return [Word("difference"), Word("between"), *joined]


def _with_rank_first(rest: list[Word]) -> list[Word]:
    """`which city is the largest` asks for `the largest city`."""
    for at in range(1, min(4, len(rest) - 1)):
        if rest[at].text in BE and class_of(group(plain(rest[at - 1].text))) == "":
            rank = at + 2 if rest[at + 1].text == "the" and at + 2 < len(rest) else at + 1
            if class_of(group(rest[rank].text)) == "comparison":
                return [rest[rank], *rest[:at], *rest[rank + 1 :]]
    return rest


def _artefact_at(words: list[Word]) -> int | None:
    """Where the thing to be written is named: within the first noun phrase."""
    for at, word in enumerate(words[:7]):
        if at and word.text in ("of", "that", "which", "to", "for", "in", "about", "with", "from", "on"):
            return None
        if group(plain(word.text)) in _ARTEFACTS and at > 0:
            return at
    return None
