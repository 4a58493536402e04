"""Text as the units that are compared: words, numbers, symbols, and single characters where a script has no spaces.

What decides: two texts that mean the same in a sentence ("The answer is: Paris.", "answer is paris") give the same
units; two that differ in a sign, a decimal point, an operator or a letter never do. The standard normalisation of
SQuAD (arXiv:1606.05250) deletes all punctuation, so that ``-5`` is ``5``, ``3.14`` is ``314`` and ``C++`` is ``C``.

Unicode: composed (NFC), with full-width and half-width forms as usual ones. Not NFKC, which takes ``x²`` for ``x2``.
Digits of every script are digits, and a true minus is a hyphen.
"""

from __future__ import annotations

import unicodedata

import regex

__all__ = ["folded", "units"]

_FOLDED = {"<wide>", "<narrow>", "<noBreak>"}
_DASHES = {ord(c): "-" for c in "\u2010\u2011\u2212\ufe63"} | {ord(c): "'" for c in "\u2018\u2019\u201b\u02bc"}
_INVISIBLE = regex.compile(r"[\p{Cf}\ufe0e\ufe0f]")
_THOUSANDS = [
    regex.compile(rf"(?<![\w.,{mark}])\d{{1,3}}(?:[{mark}]\d{{3}})+(?![\d{mark}])")
    for mark in (",", "'", "\u00a0\u2009\u202f")
]
_EMPHASIS = [
    regex.compile(r"(?<![\w)*])\*\*(?=\S)([^\n]*?\S)\*\*(?![\w*])"),
    regex.compile(r"(?<![\w)*])\*(?=[^\s*])([^\n*]*?[^\s*])\*(?![\w*])"),
]
_FENCE = regex.compile(r"\s*(```+|~~~+)[\w+-]*\n(.*?)\n?\1\s*", regex.DOTALL)
_ACRONYM = regex.compile(r"(?<![\w.])(?:\p{L}\.){2,}(?!\w)")

SPACELESS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々〆]"
"""Scripts that write no spaces between words, and Korean, whose words carry particles."""

# In this order: the first alternative that fits is the unit.
_UNIT = regex.compile(
    rf"""
      (?P<single>{SPACELESS}\p{{M}}*)
    | (?P<number>(?:(?<![\w)\]])[-+])?(?:(?<!\w)\.)?\d+(?:[.,:/]\d+|'\d+)*(?:[eE][-+]?\d+(?!\w))?)
    | (?P<word>(?:(?<!\S)\.(?=\p{{L}}))?(?:(?!{SPACELESS})[\p{{L}}\p{{M}}\p{{N}}_])+
        (?:(?:'|\.(?!\.)|:(?=\S))(?:(?!{SPACELESS})[\p{{L}}\p{{M}}\p{{N}}_])+)*
        (?:(?:\++|\#|\*|-)(?=[\s.,;:!?)\]"'”»]|$))?)
    | (?P<hyphen>(?<=\p{{L}}\p{{L}})-(?=\p{{L}}\p{{L}}|\d))
    | (?P<dash>(?<=\s|^)[-*•](?=\s+\p{{L}}\p{{L}})|[–—―])
    | (?P<operator>!=|==|<=|>=|->|=>|&&|\|\||::|!(?=\S)(?<!\w!)|\.\.(?=\S))
    | (?P<bracket>[()\[\]{{}}])
    | (?P<symbol>(?!`)[\p{{S}}\#%&*/\\@_§¶†‰-])
    """,
    regex.VERBOSE,
)
_ARTICLE = regex.compile(r"(?i:the|an)(?=\s+[\p{L}\p{N}])|[aA](?=\s+\p{L}\p{L})")
_BEGINS = regex.compile(r"(?:^|[.!?:\n])\s*[\"'“‘(\[]*$")


def folded(text: str) -> str:
    """The text trimmed, in one Unicode form; nothing that is seen is lost."""
    text = unicodedata.normalize("NFC", text).translate(_DASHES)
    text = unicodedata.normalize("NFC", "".join(map(_one, text)))
    for pattern in _THOUSANDS:
        text = pattern.sub(lambda found: regex.sub(r"\D", "", found[0]), text)
    seen: str = _INVISIBLE.sub("", text)
    return seen.strip()


def _one(char: str) -> str:
    """A character as a usual one: width and script of digits are typography."""
    if char.isascii():
        return char
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    form = unicodedata.decomposition(char)
    return unicodedata.normalize("NFKC", char) if form.split(" ", 1)[0] in _FOLDED and char not in _SPACES else char


_SPACES = frozenset("\u00a0\u2009\u202f")  # they group digits, and are white space as they are


def units(text: str) -> tuple[str, ...]:
    """The units of a text, in order: case is folded; punctuation of sentences, emphasis and articles are left out.

    Brackets stay where they group ("f(x)", "(a + b) * c"), and go around words ("Paris (France)", "(B)").
    """
    text = folded(text)
    if fence := _FENCE.fullmatch(text):
        text = fence[2]
    for pattern in _EMPHASIS:
        text = pattern.sub(r"\1", text)
    text = _ACRONYM.sub(lambda found: found[0].replace(".", ""), text)
    found: list[str] = []
    brackets = _grouping(text)
    for match in _UNIT.finditer(text):
        unit, kind = match[0], match.lastgroup
        if kind in ("hyphen", "dash"):
            if unit in "–—―" and _between_digits(text, match.start(), match.end()):
                found.append("-")
            continue
        if kind == "bracket" and match.start() not in brackets:
            continue
        if kind == "word" and _is_article(unit, text, match.start()):
            continue
        if kind == "number":
            unit = unit.removeprefix("+")
            unit = regex.sub(r"^(-?)\.", r"\g<1>0.", unit)
        found.append(unit.casefold())
    return tuple(found)


def _between_digits(text: str, start: int, end: int) -> bool:
    """Whether a dash is a range's."""
    return text[:start].rstrip()[-1:].isdigit() and text[end:].lstrip()[:1].isdigit()


def _is_article(word: str, text: str, start: int) -> bool:
    """Whether the word is an English article: "A" is a letter unless it begins a sentence."""
    if word.casefold() not in ("a", "an", "the") or not _ARTICLE.match(text, start):
        return False
    return word != "A" or _BEGINS.search(text[:start][-80:]) is not None


_NUMBERS = regex.compile(r"\s*[-+]?[\d.]+\s*,\s*[-+]?[\d.]+\s*")
_OPERATES = regex.compile(r"\S\s*[+*/=<>^|&-]\s*\S")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _grouping(text: str) -> set[int]:
    """Places of the brackets that group: those that touch a letter or an operator, go around one, or bound a range."""
    open_at: list[int] = []
    kept: set[int] = set()
    for place, char in enumerate(text):
        if char in _PAIRS:
            open_at.append(place)
        elif char in ")]}" and open_at:
            start = open_at.pop()
            inner = text[start + 1 : place]
            if not text[:start].strip() and not text[place + 1 :].strip(" \t\n.,;:!?"):
                groups = _PAIRS[text[start]] != char or _NUMBERS.fullmatch(inner)
            else:
                before, behind = text[start - 1 : start], text[place + 1 : place + 2]
                touches = before.strip(" \t\n\"'“‘([{") or regex.match(r"[\w+*/^=<>(\[-]", behind)
                groups = touches or _OPERATES.search(inner)
            if groups:
                kept |= {start, place}
    return kept
