"""Loss and answers from one reading of the held-out rows.

A forward pass over prompt and reference gives the loss; the keys and values that it leaves, up to the prompt's end,
are what generation would compute from the prompt. What all prompts begin with is read once. Answers that have ended
leave the batch.

Only where a model keeps keys and values and nothing else, and where a trial gives the logits that the prompt alone
gives: elsewhere the caller measures loss and answers apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ftune.data.batches import collate
from ftune.data.examples import IGNORE, Example
from ftune.run.objective import Objective, autocast
from ftune.run.out_of_memory import is_out_of_memory

__all__ = ["Read", "Row", "read_and_answer", "settings_of"]

PASS_TOKENS = 4096
"""Tokens of one forward pass, padding included: enough that products are large, few enough that rows are alike."""
PADDED = 1.06
"""How much longer than its tokens a forward pass may be before its rows are shared out among two."""
AT_ONCE = 4  # tokens that are generated before rows that ended are taken out
BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Mean difference of logits, in their standard deviations, that rounding may make."""

KeysValues = list[tuple[Tensor, Tensor]]
"""For every layer keys and values, (rows, heads, length, width)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, and the example that begins with it.

    Attributes:
        prompt: (L,) token ids.
        example: Prompt and reference with their labels; None: no loss is measured of this row.
    """

    prompt: Sequence[int]
    example: Example | None

    @property
    def ids(self) -> Sequence[int]:
        """What is read."""
        return self.prompt if self.example is None else self.example.input_ids.tolist()


@dataclass(frozen=True)
class Read:
    """What one reading gave.

    Attributes:
        loss_sum: Cross-entropy, summed over the targets.
        targets: How many there are.
        written: For each row the tokens of its answer, its end among them where it ended.
    """

    loss_sum: float
    targets: int
    written: list[list[int]]


def settings_of(tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of ``generate`` for a greedy answer."""
    return {
        "do_sample": False,
        "use_cache": True,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": list(ends) or None,
    }


@torch.no_grad()
def read_and_answer(
    objective: Objective,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    ends: Sequence[int],
    batch_size: int,
    max_new_tokens: int,
    ended: Callable[[list[int]], bool] = lambda tokens: False,
) -> Read | None:
    """Measure the loss of rows and answer their prompts greedily.

    Args:
        objective: The model; left in training mode if it was.
        tokenizer: For padding.
        rows: At least one.
        ends: Tokens that end an answer.
        batch_size: Rows answered together.
        max_new_tokens: Longest answer.
        ended: Whether the tokens of an answer end it in another way.

    Returns:
        None where this model's loss and answers are to be measured apart.
    """
    was_training = objective.training
    objective.eval()
    try:
        reader = _Reader(objective, tokenizer, rows, ends, max_new_tokens, ended)
        return reader.read(batch_size)
    except _OtherCache:
        return None
    finally:
        objective.train(was_training)


class _OtherCache(Exception):
    """The model does not keep keys and values of every position, or answers otherwise from them."""


class _Reader:
    def __init__(
        self,
        objective: Objective,
        tokenizer: Any,
        rows: Sequence[Row],
        ends: Sequence[int],
        max_new_tokens: int,
        ended: Callable[[list[int]], bool],
    ) -> None:
        self._ended = ended
        self._objective, self._model = objective, cast(Any, objective.model)
        self._pad = tokenizer.pad_token_id
        self._rows, self._ends, self._longest = rows, frozenset(ends), max_new_tokens
        self._settings = settings_of(tokenizer, ends)
        self._device = next(objective.model.parameters()).device
        self._loss, self._targets = 0.0, 0

    def read(self, batch_size: int) -> Read:
        written: list[list[int]] = [[] for _ in self._rows]
        order = sorted(range(len(self._rows)), key=lambda i: len(self._rows[i].ids))
        shared = _shared(self._rows)
        prefix: KeysValues | None = None
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            if start == 0:
                # Before anything is counted: where this model cannot do it, all is measured in the other way.
                try:
                    prefix = self._prefix(shared)
                    kept = self._kept(group, prefix, shared)
                    self._try(group[0], [(keys[:1], values[:1]) for keys, values in kept])
                except _OtherCache:
                    raise
                except Exception as error:  # an architecture that takes its cache in another way
                    if is_out_of_memory(error):
                        raise
                    raise _OtherCache from error
            else:
                kept = self._kept(group, prefix, shared)
            for index, tokens in zip(group, self._answers(group, kept), strict=True):
                written[index] = tokens
        return Read(self._loss, self._targets, written)

    def _prefix(self, shared: int) -> KeysValues | None:
        """Keys and values of what all rows begin with."""
        if not shared:
            return None
        ids = torch.tensor([list(self._rows[0].ids[:shared])], device=self._device)
        cache = self._cache(None, 1)
        with autocast(self._objective.dtype, self._device.type):
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return _taken(cache, shared)

    def _kept(self, group: Sequence[int], prefix: KeysValues | None, shared: int) -> KeysValues:
        """Read the rows of a group; keys and values of their prompts but for the last token, padded on the left."""
        lengths = [len(self._rows[i].prompt) - 1 for i in group]
        width = max(lengths)
        kept: KeysValues = []
        place = 0
        for part in _parts([len(self._rows[i].ids) - shared for i in group]):
            members = group[place : place + part]
            found = self._pass(members, prefix, shared)
            if not kept:
                kept = [
                    (keys.new_zeros(len(group), keys.shape[1], width, keys.shape[3]),
                     values.new_zeros(len(group), values.shape[1], width, values.shape[3]))
                    for keys, values in found
                ]  # fmt: skip
            for into, layer in zip(kept, found, strict=True):
                for target, source in zip(into, layer, strict=True):
                    for i in range(part):
                        length = lengths[place + i]
                        target[place + i, :, width - length :] = source[i, :, :length]
            place += part
        return kept

    def _pass(self, members: Sequence[int], prefix: KeysValues | None, shared: int) -> KeysValues:
        """One forward pass over rows, padded on the right: the loss is counted, keys and values are returned."""
        examples = [_behind(self._rows[i], shared) for i in members]
        batch = collate([[example] for example in examples], self._pad, multiple_of=8).to(self._device)
        cache = self._cache(prefix, len(members))
        self._loss += float(self._objective.read(batch, cache))
        self._targets += batch.target_tokens
        return _taken(cache, shared + batch.input_ids.shape[1])

    def _cache(self, filled: KeysValues | None, rows: int) -> Any:
        """A cache of transformers with some keys and values in it, the same ones for every row where they are one's."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        for layer, (keys, values) in enumerate(filled or ()):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def _inputs(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The prompts of a group, padded on the left, and what of them is to be seen."""
        prompts = [self._rows[i].prompt for i in group]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, device=self._device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        return ids, mask

    def _generate(self, ids: Tensor, mask: Tensor, cache: Any, tokens: int, **wanted: bool) -> Any:
        with autocast(self._objective.dtype, self._device.type):
            return self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=tokens,
                return_dict_in_generate=True,
                **wanted,
                **self._settings,
            )

    def _answers(self, group: Sequence[int], kept: KeysValues) -> Iterator[list[int]]:
        """The tokens of each row's answer; rows that ended are not computed further."""
        ids, mask = self._inputs(group)
        answers: list[list[int]] = [[] for _ in group]
        open_rows, cache = list(range(len(group))), self._cache(kept, len(group))
        while open_rows:
            made = len(answers[open_rows[0]])
            tokens = min(max(AT_ONCE, self._longest // 16), self._longest - made)
            out = self._generate(ids, mask, cache, tokens)
            new = out.sequences[:, ids.shape[1] :].tolist()
            going: list[int] = []
            for place, row in enumerate(open_rows):
                end = next((i for i, token in enumerate(new[place]) if token in self._ends), None)
                answers[row] += new[place] if end is None else new[place][: end + 1]
                if end is None and len(answers[row]) < self._longest and not self._ended(answers[row]):
                    going.append(place)
            keep = torch.tensor(going, dtype=torch.long, device=self._device)
            ids, cache = out.sequences[keep], out.past_key_values
            mask = torch.cat([mask, mask.new_ones(len(mask), len(new[0]))], dim=1)[keep]
            if 0 < len(going) < len(open_rows):
                cache.batch_select_indices(keep)
            open_rows = [open_rows[place] for place in going]
        return iter(answers)

    def _try(self, index: int, kept: KeysValues) -> None:
        """Hold the first logits of an answer against those of the prompt alone.

        Raises:
            _OtherCache: They differ by more than rounding.
        """
        ids = torch.tensor([list(self._rows[index].prompt)], device=self._device)
        with autocast(self._objective.dtype, self._device.type):
            alone = self._model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        width = kept[0][0].shape[2]
        padded = torch.nn.functional.pad(ids, (width + 1 - ids.shape[1], 0), value=self._pad)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (width + 1 - ids.shape[1], 0))
        cache = self._cache([(keys.clone(), values.clone()) for keys, values in kept], 1)
        found = self._generate(padded, mask, cache, 1, output_logits=True).logits[0][0].float()
        if not float((found - alone).abs().mean() / alone.std()) <= BOUND[self._objective.dtype]:
            raise _OtherCache


def _shared(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with: inside every prompt, one behind it is left, and none of them is a target."""
    if len(rows) < 2:
        return 0
    first, *others = (np.asarray(row.prompt) for row in rows)
    shared = len(first) - 1
    for other in others:
        shared = min(shared, len(other) - 1)
        differ = np.flatnonzero(first[:shared] != other[:shared])
        shared = int(differ[0]) if len(differ) else shared
    for row in rows:
        if row.example is not None:
            targets = np.flatnonzero(row.example.labels[1:] != IGNORE)
            # The token before the first target predicts it, so it is read with the row.
            shared = min(shared, int(targets[0]) if len(targets) else shared)
    return max(0, shared)


def _behind(row: Row, shared: int) -> Example:
    """A row's example behind what is shared; without one, its prompt with no label."""
    if row.example is not None:
        return Example(row.example.input_ids[shared:], row.example.labels[shared:], row.example.row)
    ids = np.asarray(row.prompt[shared:], dtype=np.int32)
    return Example(ids, np.full_like(ids, IGNORE), -1)


def _parts(lengths: Sequence[int]) -> Iterator[int]:
    """How many rows go into each forward pass: alike in length, ``PASS_TOKENS`` at most. The lengths ascend."""
    count = tokens = 0
    for length in lengths:
        padded = (count + 1) * length
        if count and (padded > PASS_TOKENS or (padded > PADDED * (tokens + length) and tokens >= PASS_TOKENS // 4)):
            yield count
            count = tokens = 0
        count += 1
        tokens += length
    yield count


def _taken(cache: Any, length: int) -> KeysValues:
    """The keys and values that a forward pass left.

    Raises:
        _OtherCache: They are not all there is, or not of every position.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", [])
    found: KeysValues = []
    for layer in layers:
        whole = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized
        if not whole or layer.keys.shape[2] != length or layer.values.shape[2] != length:
            raise _OtherCache
        found.append((layer.keys, layer.values))
    if not found:
        raise _OtherCache
    return found
