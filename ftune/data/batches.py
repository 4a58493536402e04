"""The order of rows, their split into micro-batches, and the tensors of a micro-batch.

All of it is pure: a run that is resumed asks again and gets the same answer. Which rows one optimizer update
sees depends on lengths, size, seed and epoch alone, so the same update can be computed by any number of
processes in micro-batches of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ftune.data.tokenize import IGNORE, Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Batch", "collate", "deal", "epoch_order", "length_step", "padded_length", "regroup", "split"]

# global batches that are sorted by length together: enough to find rows of one length, few enough that the
# order stays random
MEGA = 50

# documents of a micro-batch that may be exchanged, the shortest: enough for some to differ by what is wanted
EXCHANGED = 12


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    There is no attention mask on purpose. Attention is causal, padding stands on the right and its labels are
    -100, so no trained position ever sees it. And transformers derives the mask that keeps documents apart
    from ``position_ids`` only where it is given neither a mask nor a cache.

    Attributes:
        input_ids: (B, L) int64.
        labels: (B, L) int64, not shifted; -100 at padding and at the first token of every document.
        position_ids: (B, L) int64, from 0 in every document and in the padding; None where no row has two
            documents.
        predicting: (K,) int64, the positions from which some row predicts a target, at least one. Found where the
            labels are made: to ask a GPU for them is to wait for all that it was given to do.
        rows: Row numbers of the examples, in order.
        target_tokens: Targets after the shift.
        tokens: Tokens, padding not counted.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    predicting: Tensor
    rows: tuple[int, ...]
    target_tokens: int
    tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        import torch

        def moved(x: Tensor) -> Tensor:
            # Out of memory that may be swapped a copy waits for all that the GPU was given to do.
            pinned = x.pin_memory() if torch.device(device).type == "cuda" and not x.is_cuda else x
            return pinned.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            labels=moved(self.labels),
            position_ids=None if self.position_ids is None else moved(self.position_ids),
            predicting=moved(self.predicting),
        )


def epoch_order(
    row_lengths: Sequence[int], global_batch: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """The global batches of an epoch: every row once, only the last batch shorter than ``global_batch``.

    With ``group_by_length``, rows are sorted by length within random groups of ``MEGA`` global batches, so
    that a batch holds rows of like length, and the batches are shuffled. Within a batch the longest row is
    first.
    """
    # RandomState's stream is frozen across NumPy versions, the Generator's is not
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch))))
    lengths = np.asarray(row_lengths, dtype=np.int64)
    order = random.permutation(len(lengths))
    if group_by_length:
        mega = MEGA * global_batch
        groups = [order[start : start + mega] for start in range(0, len(order), mega)]
        order = np.concatenate([_longest_first(group, lengths) for group in groups]) if groups else order
    batches = [order[start : start + global_batch] for start in range(0, len(order), global_batch)]
    if group_by_length:
        full = len(order) // global_batch  # a short batch stays last
        batches = [batches[i] for i in (*random.permutation(full), *range(full, len(batches)))]
    return [[int(row) for row in _longest_first(batch, lengths)] for batch in batches]


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def split(
    global_batch: Sequence[int], micro_batch_size: int, accumulation: int, rank: int, world: int
) -> list[list[int]]:
    """One rank's ``accumulation`` micro-batches of a global batch; the last ones are empty where it is short.

    Over all ranks every row appears once. At each micro-step the ranks take neighbouring slices, so with rows
    sorted by length they finish together.
    """
    assert 0 <= rank < world
    assert len(global_batch) <= micro_batch_size * accumulation * world, "the global batch is larger than its parts"
    starts = ((step * world + rank) * micro_batch_size for step in range(accumulation))
    return [list(global_batch[start : start + micro_batch_size]) for start in starts]


def deal(global_batch: Sequence[int], row_lengths: Sequence[int], rank: int, world: int) -> list[int]:
    """One rank's rows of a global batch, so that all ranks get about as many tokens.

    For rows that are laid behind each other: a rank's work is its tokens. Over all ranks every row appears once.
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for row in sorted(global_batch, key=lambda row: -row_lengths[row]):
        least = loads.index(min(loads))
        shares[least].append(row)
        loads[least] += row_lengths[row]
    return shares[rank]


def regroup(rows: Sequence[int], row_lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The same rows in as few micro-batches of at most ``capacity`` tokens as first-fit decreasing finds.

    For rows that lie behind each other, padded at the end to a multiple of ``length_step``. A longer row is a
    micro-batch of its own. Micro-batches are made alike in size where that needs no more of them: the largest decides
    the memory. Then rows are exchanged between them, so that there is less padding; the largest, with its padding,
    becomes no larger. No rows give one empty micro-batch, in which a process still takes part.
    """
    longest_first = sorted(rows, key=lambda row: -row_lengths[row])
    bins = _first_fit(longest_first, row_lengths, capacity)
    loads = [0] * len(bins)
    alike: list[list[int]] = [[] for _ in bins]
    for row in longest_first:
        least = loads.index(min(loads))
        alike[least].append(row)
        loads[least] += row_lengths[row]
    micros = alike if max(loads, default=0) <= capacity else bins
    while any([_exchange(one, other, row_lengths, capacity) for one, other in pairwise(micros)]):
        pass
    return micros


def _exchange(one: list[int], other: list[int], lengths: Sequence[int], capacity: int) -> bool:
    """Exchange a row of one micro-batch for one of another, or for none, so that both are padded to less together.

    Neither comes to be padded to more than the longer one was. Whether there is such an exchange; the best one is made.
    """
    load, other_load = sum(lengths[row] for row in one), sum(lengths[row] for row in other)
    at_most = min(padded_length(max(load, other_load)), max(capacity, load, other_load))
    best, found = padded_length(load) + padded_length(other_load), None
    shortest, other_shortest = (sorted(rows, key=lambda row: lengths[row])[:EXCHANGED] for rows in (one, other))
    for given in (*shortest, None):
        for taken in (*other_shortest, None):
            moved = (0 if given is None else lengths[given]) - (0 if taken is None else lengths[taken])
            after, other_after = load - moved, other_load + moved
            if 0 < min(after, other_after) and max(after, other_after) <= at_most:
                padded = padded_length(after) + padded_length(other_after)
                if padded < best:
                    best, found = padded, (given, taken)
    if found is None:
        return False
    given, taken = found
    if given is not None:
        one.remove(given)
        other.append(given)
    if taken is not None:
        other.remove(taken)
        one.append(taken)
    return True


def length_step(length: int) -> int:
    """The multiple to which a row of ``length`` tokens is padded: eight lengths an octave, at most 1/8 in vain.

    Math libraries keep compiled kernels for every shape they have seen. With every length its own shape, resident
    memory grew by 1.2 GiB in 33 updates of a 135M model; with these few it stays flat, and the time is the same.
    """
    return max(8, 1 << max(0, length.bit_length() - 4))


def padded_length(length: int) -> int:
    """A row's length with its padding."""
    step = length_step(length)
    return -(-length // step) * step


def _first_fit(longest_first: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = [[]]
    loads = [0]
    for row in longest_first:
        place = next((i for i, load in enumerate(loads) if load == 0 or load + lengths[row] <= capacity), None)
        if place is None:
            place = len(bins)
            bins.append([])
            loads.append(0)
        bins[place].append(row)
        loads[place] += lengths[row]
    return bins


def collate(rows: Sequence[Sequence[Example]], pad_id: int, multiple_of: int = 1) -> Batch:
    """Rows of documents as tensors, padded on the right to the longest, rounded up to ``multiple_of``.

    No rows at all give one row of padding without a target: a rank whose share of a short batch is empty must
    still take part in the forward pass.
    """
    import torch

    # at least two positions, as the shift takes one away
    longest = max([2, *(sum(map(len, row)) for row in rows)])
    width = -(-longest // multiple_of) * multiple_of
    height = max(1, len(rows))
    input_ids = np.full((height, width), pad_id, dtype=np.int64)
    labels = np.full((height, width), IGNORE, dtype=np.int64)
    position_ids = np.zeros((height, width), dtype=np.int64)
    for b, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example)
            input_ids[b, at:end] = example.input_ids
            # the first token stays at -100: after the shift it would be predicted from the document before
            labels[b, at + 1 : end] = example.labels[1:]
            position_ids[b, at:end] = np.arange(end - at)
            at = end
        # padding is a document of its own, so that it never attends to the last one
        position_ids[b, at:] = np.arange(width - at)
    packed = any(len(row) > 1 for row in rows)
    is_target = labels[:, 1:] != IGNORE
    predicting = np.flatnonzero(is_target.any(axis=0))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids) if packed else None,
        # without a target one position keeps the graph alive
        predicting=torch.from_numpy(predicting) if len(predicting) else torch.zeros(1, dtype=torch.long),
        rows=tuple(example.row for row in rows for example in row),
        target_tokens=int(np.count_nonzero(is_target)),
        tokens=sum(len(example) for row in rows for example in row),
    )
