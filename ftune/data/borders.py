r"""Prompt and answer as the tokens that generation has: those of the prompt alone, then those of the answer.

Where the two texts are tokenized as one, a token may lie across the border (``\n`` and ``\nyes`` become
``\n\n`` and ``yes``): the model would never write half of it. Tokenized apart, a tokenizer may treat the answer as
the beginning of a text and put a space before it. So the answer is tokenized behind some text that does not merge
with it, and that text's tokens are taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftune.data.chat import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Borders"]

# characters of the prompt that the answer is tokenized behind: pre-tokenizers look no further back
BEHIND = 24
# where the prompt's own end merges with the answer: letter, digit, mark, line break; the first that does not merge
OTHERS = ("a", "1", ".", "\n", "b", "(", "é")
# contexts whose tokens are kept: a template writes the same few before every answer
KEPT = 4096
KEPT_CHARACTERS = 200


class Borders:
    """Tokens on both sides of where a prompt ends.

    Args:
        tokenizer: A fast one.
        specials: The ids of its special tokens; texts on both sides of one are tokenized apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, specials: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._specials = specials
        self._known: dict[str, list[int]] = {}
        self._added = [token for token in tokenizer.get_added_vocab() if len(token) > 1]
        self.lead = _lead(tokenizer)

    def tokenized(self, texts: Sequence[str], **wanted: bool) -> Any:
        """The texts as a batch, nothing added."""
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **wanted
        )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        return self.tokenized(texts)["input_ids"] if texts else []

    def behind(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer where it follows its prompt, in tokens of its own."""
        found: list[list[int]] = [[] for _ in answers]
        waiting = list(range(len(answers)))
        # behind its own prompt, then behind what merges with none of it; at last by itself
        for context in (None, *OTHERS, ""):
            ends = [prompts[i][-BEHIND:] if context is None else context for i in waiting]
            alone = self._kept(ends)
            both = self.ids([end + answers[i] for i, end in zip(waiting, ends, strict=True)])
            left = []
            for i, known, ids in zip(waiting, alone, both, strict=True):
                # of an unknown token the ids do not tell how much text it stands for
                if ids[: len(known)] == known and self._tokenizer.unk_token_id not in known:
                    found[i] = ids[len(known) :]
                else:
                    left.append(i)
            if not left:
                break
            waiting = left
        return found

    def split(self, text: str, at: int) -> tuple[list[int], list[Span]]:
        """Ids and offsets of a text whose prompt ends ``at``: no token lies across."""
        before, after = self.part(text, 0, at), self.part(text, at, len(text))
        return [*before[0], *after[0]], [*before[1], *after[1]]

    def part(self, text: str, start: int, end: int) -> tuple[list[int], list[Span]]:
        """Ids and offsets of a part of a text where it follows what is before it; the offsets are in the whole text."""
        # nothing stands before the beginning
        contexts = (text[max(0, start - BEHIND) : start], *OTHERS) if start else ()
        for context in (*contexts, ""):
            alone = self._kept([context])[0] if context else []
            both = self.tokenized([context + text[start:end]], return_offsets_mapping=True)
            ids, offsets = both["input_ids"][0], both["offset_mapping"][0]
            # a text that merges with none of what it may stand behind is tokenized by itself
            if _apart(ids, offsets, alone, len(context)):
                break
        shift = start - len(context)
        return ids[len(alone) :], [(first + shift, last + shift) for first, last in offsets[len(alone) :]]

    def added_around(self, text: str, at: int) -> int | None:
        """Where an added token begins that a character lies in; None where there is none."""
        for token in self._added:
            low = max(0, at - len(token) + 1)
            found = text.find(token, low, at + len(token) - 1)
            if found >= 0:
                return found
        return None

    def apart(self, text: str, at: int) -> bool:
        """Whether no token lies across a character, as far as what is near it tells."""
        if self.added_around(text, at) is not None:
            return False
        before = text[max(0, at - BEHIND) : at]
        both = self.tokenized([before + text[at : at + BEHIND]], return_offsets_mapping=True)
        return _apart(both["input_ids"][0], both["offset_mapping"][0], self.ids([before])[0], len(before))

    def agree(self, texts: Sequence[str], at: Sequence[int | None], batch: Any) -> list[bool]:
        """Of each tokenized text, whether its tokens up to ``at`` are those of that part alone; true for None.

        What stands before the last special token is tokenized apart in either case, so only what follows it is
        tokenized again.
        """
        places: list[tuple[int, int] | None] = []
        contexts: list[str] = []
        for text, end, ids, offsets in zip(texts, at, batch["input_ids"], batch["offset_mapping"], strict=True):
            if end is None or not ids:
                places.append(None)
                contexts.append("")
                continue
            until = _begun_before(offsets, end)
            first = next((i for i in range(until - 1, -1, -1) if ids[i] in self._specials), 0)
            places.append((first, until))
            contexts.append(text[offsets[first][0] if ids[first] in self._specials else 0 : end])
        known = self._kept(contexts)
        return [
            place is None
            or (ids[place[0] : place[1]] == alone and (place[1] == 0 or offsets[place[1] - 1][1] <= (end or 0)))
            for place, alone, end, ids, offsets in zip(
                places, known, at, batch["input_ids"], batch["offset_mapping"], strict=True
            )
        ]

    def _kept(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts of which many are the same."""
        new = list({text: None for text in texts if text not in self._known})
        made = dict(zip(new, self.ids(new), strict=True))
        if len(self._known) < KEPT:
            self._known |= {text: ids for text, ids in made.items() if len(text) <= KEPT_CHARACTERS}
        return [made[text] if text in made else self._known[text] for text in texts]


def _lead(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before every text, where the model expects one: its BOS, mostly."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for length in range(len(whole) - len(plain) + 1):
        if whole[length : length + len(plain)] == plain:
            return list(whole[:length])
    return []


def _apart(ids: Sequence[int], offsets: Sequence[Span], alone: Sequence[int], end: int) -> bool:
    """Whether a text's first tokens are those of its beginning ``alone``, which ends at a character."""
    count = len(alone)
    return list(ids[:count]) == list(alone) and (count == 0 or offsets[count - 1][1] <= end)


def _begun_before(offsets: Sequence[Span], end: int) -> int:
    """How many tokens begin before a character."""
    low, high = 0, len(offsets)
    while low < high:
        middle = (low + high) // 2
        if offsets[middle][0] < end:
            low = middle + 1
        else:
            high = middle
    return low
