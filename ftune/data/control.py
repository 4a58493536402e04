"""Control tokens that stand in a row's own text, where a template writes others around it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ftune.data.chat import special_tokens
from ftune.data.formats import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ControlTokens"]

# what an answer writes itself, in tokenizers that call it special
_ANSWERS = re.compile(r"</?(think|thinking|thought|reasoning|tool_call|tool_response)>|\[/?THINK\]")


class ControlTokens:
    """Finds the tokens that a tokenizer treats as control tokens wherever they stand in a text.

    Args:
        tokenizer: Whose tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        whole = bool(getattr(tokenizer, "split_special_tokens", False))
        tokens = [] if whole else [token for token in special_tokens(tokenizer) if not _ANSWERS.fullmatch(token)]
        self._tokens = frozenset(tokens)
        # one alternative for all that differ in a number: some tokenizers have thousands of reserved ones
        forms = {re.sub(r"[0-9]+", "[0-9]+", re.escape(token)) for token in sorted(tokens, key=len, reverse=True)}
        self._pattern = re.compile("|".join(sorted(forms, key=len, reverse=True))) if forms else None

    def first_in(self, conversation: Conversation) -> str | None:
        """The first control token in what the messages say; None where there is none."""
        if self._pattern is None:
            return None
        for message in conversation.messages:
            for key, value in message.items():
                if key == "role":
                    continue
                for text in _strings(value):
                    for found in self._pattern.finditer(text):
                        if found[0] in self._tokens:
                            return found[0]
        return None


def _strings(value: Any) -> Iterator[str]:
    """A text, or those inside of a value: of tool calls, say."""
    waiting = [value]  # not by recursion: a row may be nested as deep as its file has brackets
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, Mapping):
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
