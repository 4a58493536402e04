"""Rows so large that tokenizing them would take all memory: left out by their length; others are tokenized in pieces.

Tokens, their offsets and Python's numbers for both take, measured for each byte of the text, 160 bytes for prose, 330
for random letters, and 95 where a token is as long as it can be. A row of 100 MB of prose would take 16 GB at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["HUGE", "Bound", "bound_of"]

HUGE = 1_000_000
"""Characters from which on a row is looked at before it is tokenized: 160 MB of memory, half a second."""
# of nine bytes NFC can make three, and of no character's whole decomposition a smaller part
NFC_SHRINKS = 3


@dataclass(frozen=True)
class Bound:
    """How much text a token can stand for.

    Attributes:
        bytes_per_token: The most bytes of UTF-8.
        dropped: Bytes that the vocabulary lacks and the tokenizer passes over.
    """

    bytes_per_token: int
    dropped: bytes

    def least(self, text: str) -> int:
        """Tokens that a text has at least."""
        return -(-len(text.encode().translate(None, self.dropped)) // self.bytes_per_token)


def bound_of(tokenizer: PreTrainedTokenizerBase) -> Bound | None:
    """What a token can stand for at most; None where there is no limit.

    There is one for BPE over bytes, or falling back to them: what is unknown is spelt out. A WordPiece tokenizer makes
    one token of an unknown word of any length, others pass over white space.
    """
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = definition["model"], definition["added_tokens"]
    shrinks = _shrinks(definition["normalizer"])
    if model["type"] != "BPE" or not shrinks or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    splitters = _flat(definition["pre_tokenizer"], "pretokenizers")
    if not all(_keeps_all(splitter) for splitter in splitters):
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    if any(splitter["type"] == "ByteLevel" for splitter in splitters):
        # each byte is written as one character
        longest = max(map(len, vocabulary))
        dropped = bytes(byte for byte in range(256) if _as_character(byte) not in vocabulary)
    elif model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        longest, dropped = max(len(token.encode()) for token in vocabulary), b""
    else:
        return None
    longest = max([longest, *(len(token["content"].encode()) for token in added)])
    return Bound(shrinks * longest, dropped)


def _as_character(byte: int) -> str:
    """A byte as byte-level BPE writes it: itself where it can be printed, else a character from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in printed else 256 + byte - sum(other < byte for other in printed))


def _flat(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """The members of a sequence, of which there may be one or none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [one for member in part[members] for one in _flat(member, members)]


def _shrinks(normalizer: Mapping[str, Any] | None) -> int:
    """To what part of its bytes a normalizer can shrink a text, as 1 over that; 0 for any."""
    factor = 1
    for step in _flat(normalizer, "normalizers"):
        if step["type"] == "NFC":
            factor *= NFC_SHRINKS
        elif step["type"] == "Replace":
            if "String" not in step["pattern"] or len(step["content"].encode()) < len(
                step["pattern"]["String"].encode()
            ):
                return 0
        elif step["type"] != "Prepend":
            return 0
    return factor


def _keeps_all(splitter: Mapping[str, Any]) -> bool:
    kind = splitter["type"]
    return kind in ("ByteLevel", "Digits", "Metaspace") or (kind == "Split" and splitter["behavior"] != "Removed")
