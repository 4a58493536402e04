"""The shapes of a run's micro-batches, and the kernels that oneDNN keeps for each on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftune.data.batches import deal, epoch_order, padded_length, regroup, split
from ftune.methods import Method, ModelShape
from ftune.methods.targets import different

__all__ = ["Batching", "Shapes", "kernel_bytes", "shapes_of"]

UPDATES, ROWS = 64, 8192
"""From so many updates, of at most so many rows, the shapes of a run are counted: by then nearly all came by."""

KERNEL_BYTES = int(0.6 * 2**20)
"""Of one 16-bit product of one shape, measured in a 135M model. Nearly all is a description of one size for all."""

KEPT = 1024  # oneDNN's own limit
OF_HEAD = 4  # products of the loss, of which each micro-batch has another number of positions


def kernel_bytes(method: Method, shape: ModelShape, shapes: int) -> int:
    """Bytes of the kernels with which a model is trained in 16 bits on micro-batches of so many different shapes.

    A linear layer has a product forwards and one for its input's gradient; what trains adds its own.
    """
    products = 2 * different(shape.linears) + method.products(shape) + OF_HEAD
    return min(shapes * products, KEPT) * KERNEL_BYTES


class Shapes(NamedTuple):
    """The shapes of micro-batches.

    Attributes:
        different: How many there are.
        most_tokens: Of the largest, padding counted; None where not all of a run's were seen.
        most_targets: Most tokens in the loss; None likewise.
    """

    different: int
    most_tokens: int | None
    most_targets: int | None


@dataclass(frozen=True)
class Batching:
    """How the rows of a run become micro-batches.

    Attributes:
        steps: Updates.
        global_batch: Rows of an update.
        micro_batch_size: Rows of a micro-batch.
        micro_batch_tokens: Tokens of one, where rows are concatenated.
        flat: Whether they are.
        by_length: Whether rows of like length share an update.
        seed: Of the order.
        world: Processes that share an update.
    """

    steps: int
    global_batch: int
    micro_batch_size: int
    micro_batch_tokens: int
    flat: bool
    by_length: bool
    seed: int
    world: int


def shapes_of(row_lengths: Sequence[int], row_targets: Sequence[int], batching: Batching) -> Shapes:
    """The shapes of a run's micro-batches on its first process, as they come by.

    A run of more than ``UPDATES`` updates or ``ROWS`` rows is judged by so many. Held-out rows, of which only a forward
    pass is computed, are not counted.

    Args:
        row_lengths: Tokens of each row.
        row_targets: How many of them are in the loss.
        batching: How rows become micro-batches.
    """
    global_batch, world = batching.global_batch, batching.world
    most = max(1, min(UPDATES, ROWS // global_batch))
    every = max(1, len(row_lengths) // (most * global_batch))
    all_seen = every == 1 and batching.steps <= most and world == 1
    lengths = row_lengths[::every]
    steps, in_epoch = min(batching.steps, most), math.ceil(len(lengths) / global_batch)
    accumulation = math.ceil(global_batch / (batching.micro_batch_size * world))
    shapes: set[tuple[int, int]] = set()
    most_targets = 0
    for epoch in range(math.ceil(steps / in_epoch)):
        for rows in _order(lengths, batching, epoch)[: steps - epoch * in_epoch]:
            if batching.flat:
                micros = regroup(deal(rows, lengths, 0, world), lengths, batching.micro_batch_tokens)
                shapes |= {(1, padded_length(sum(lengths[row] for row in micro))) for micro in micros}
            else:
                micros = [micro for micro in split(rows, batching.micro_batch_size, accumulation, 0, world) if micro]
                shapes |= {(len(micro), padded_length(max(lengths[row] for row in micro))) for micro in micros}
            most_targets = max(most_targets, *(sum(row_targets[row * every] for row in micro) for micro in micros))
    if not all_seen:
        return Shapes(len(shapes), None, None)
    return Shapes(len(shapes), max(count * length for count, length in shapes), most_targets)


def _order(lengths: Sequence[int], batching: Batching, epoch: int) -> list[list[int]]:
    return epoch_order(lengths, batching.global_batch, batching.seed, epoch, batching.by_length)
