"""Blocks of a model replayed from CUDA graphs, where Python launches their kernels slower than the GPU computes them.

On an H100 a block of an 8B model is busy with 2,048 tokens for 3.5 ms, forwards and backwards, and Python needs 5 to
launch its hundred kernels; of smaller models and shorter rows the GPU waits most of the time. A graph of them is one
launch. Source: CUDA C++ Programming Guide, "CUDA Graphs"; the memory of several graphs as in
``torch.cuda.make_graphed_callables``, which copies no mask, adds up no gradients, and must be given every shape ahead.

A micro-batch of a new shape is computed as usual twice; the second time the clock says whether the GPU waits. Where it
does, the third is recorded: of each block a graph forwards and one backwards, in the order in which they run, so that
they share one pool of memory, as large as what the usual pass takes. Recorded graphs are held against the usual pass
twice, when they are made and again after an update; and a block that waits for the GPU is not recorded at all. What
goes wrong on the way leaves the run as it would have been.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ftune.run.block_graphs import BlockGraphs, Recorder

__all__ = ["Replay"]

USUAL = 2
"""How often a shape is computed as usual first: once to compile and to fill caches, once by the clock."""
MOST = 4
"""Shapes that are recorded: of each every block's output stays in memory."""
IDLE = 0.05
"""The GPU waits for Python where it is done within this share of a micro-batch's time behind Python's last launch."""
TOLERANCE = 0.05
"""How far recorded gradients may be from the usual ones, as a share of their norm. Attention's backward pass adds up in
any order, and 32 blocks in 16 bits make more of that: on an H100 two usual passes of an 8B model are 0.015 apart."""


class Replay:
    """Runs micro-batches, as usual or by graphs of the model's blocks.

    Args:
        blocks: The model's, in order.
        trained: Every parameter that trains. The gradients of those in blocks stay in one place from now on.
        recorder: Of the device.
        dtype: What the model computes in.
        always: Record whatever the clock says.

    Attributes:
        why_not: Why nothing is recorded any more; None where nothing went wrong.
        replayed: Micro-batches that were replayed.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        trained: Sequence[nn.Parameter],
        recorder: Recorder,
        dtype: torch.dtype,
        *,
        always: bool = False,
    ) -> None:
        self._blocks, self._trained, self._recorder = blocks, trained, recorder
        self._dtype, self._always = dtype, always
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._seen: Counter[Hashable] = Counter()
        self._busy: set[Hashable] = set()
        self._graphs: dict[Hashable, BlockGraphs] = {}
        self._now: BlockGraphs | None = None
        self._watching = False
        self._waits: str | None = None
        self.why_not: str | None = None
        self.replayed = 0
        for block in blocks:
            block._ftune_replay = self  # type: ignore[assignment]
            block.__class__ = _replaying(type(block))

    def close(self) -> dict[str, Any]:
        """Let go of the graphs and of the model; returns what there was, for ``run.json``."""
        found = self._summary()
        self.release("the run is over")
        for block in self._blocks:
            block.__class__ = type(block).__mro__[1]
            del block._ftune_replay
        return found

    @property
    def has_graphs(self) -> bool:
        """Whether graphs hold memory."""
        return bool(self._graphs)

    def release(self, why: str) -> None:
        """Let go of the graphs for good, and of their memory."""
        for graphs in self._graphs.values():
            graphs.blocks.clear()
        self._graphs.clear()
        self._gradients.clear()
        self._recorder.make_room()
        self.why_not = self.why_not or why

    def run(self, step: int, shape: Hashable, micro: Callable[[], Tensor]) -> Tensor:
        """Compute a micro-batch.

        Args:
            step: The update that it is part of.
            shape: Two micro-batches of one shape differ in what is in their tensors only.
            micro: The forward and the backward pass, as often as it is called the same; returns the loss.

        Returns:
            What ``micro`` did; the gradients are added to those that were there.
        """
        if self.why_not is not None or shape in self._busy:
            return micro()
        graphs = self._graphs.get(shape)
        if graphs is not None:
            if graphs.proven:
                self._attach()
                self.replayed += 1
                return self._replay(graphs, micro)
            # In the update in which it was recorded nothing has changed that it could have missed.
            return self._compared(shape, graphs, micro) if step > graphs.step else micro()
        self._seen[shape] += 1
        if self._seen[shape] == USUAL and not self._always:
            self._recorder.wait()  # for what was launched before
            began = time.perf_counter()
            loss = micro()
            launched = time.perf_counter()
            self._recorder.wait()
            done = time.perf_counter()
            if done - launched > IDLE * (done - began):
                self._busy.add(shape)
            return loss
        if self._seen[shape] <= USUAL or len(self._graphs) == MOST:
            return micro()
        return self._compared(shape, BlockGraphs(self._recorder, self._gradients, self._dtype, step), micro)

    def call(self, block: nn.Module, usual: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a block returns: by a graph in a micro-batch that is recorded or replayed, else as usual."""
        if not block.training or not torch.is_grad_enabled():
            return usual(*args, **kwargs)
        if self._watching:
            found, waited = self._recorder.watch(functools.partial(usual, *args, **kwargs))
            if waited:
                self._waits = f"{type(block).__name__} waits for the GPU in its forward pass"
            return found
        if self._now is None:
            return usual(*args, **kwargs)
        return self._now.call(block, usual, args, kwargs)

    def _compared(self, shape: Hashable, graphs: BlockGraphs, micro: Callable[[], Tensor]) -> Tensor:
        """Compute a micro-batch as usual and by graphs, which are kept where both are the same; the usual counts."""
        before = self._take_gradients()
        graphs.recording = self._watching = shape not in self._graphs
        try:
            loss = micro()
        finally:
            self._watching = False
        usual = self._take_gradients()
        self._graphs[shape] = graphs
        why = self._waits
        if why is None:
            try:
                why = self._differs(graphs, micro, (loss, *usual))
            except Exception as error:  # of the driver, the allocator, a kernel: each has its own
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for parameter, old, new in zip(self._trained, before, usual, strict=True):
            found = new if old is None else old if new is None else old.add_(new)
            parameter.grad = None if found is None else found.to(parameter.device)
        if why is not None:
            self.release(why)
            return loss
        graphs.proven, graphs.recording = not graphs.recording, False
        self._recorder.make_room()  # beside the graphs the usual pass took its memory a second time
        return loss

    def _differs(
        self, graphs: BlockGraphs, micro: Callable[[], Tensor], usual: tuple[Tensor | None, ...]
    ) -> str | None:
        """Record where that is to be done, replay, and say how it differs from the usual loss and gradients."""
        if graphs.recording:
            self._recorder.make_room()
            self._find_places()
        self._attach()
        again = self._replay(graphs, micro)
        why = _apart(usual, (again, *(parameter.grad for parameter in self._trained)))
        return why if graphs.blocks else "no block can be recorded"

    def _take_gradients(self) -> list[Tensor | None]:
        """The gradients of all parameters, in the host's memory; the parameters have none then."""
        found = [None if p.grad is None else p.grad.to("cpu", copy=True) for p in self._trained]
        for parameter in self._trained:
            parameter.grad = None
        return found

    def _find_places(self) -> None:
        """Memory for the gradients of what trains inside blocks."""
        inside = {parameter for block in self._blocks for parameter in block.parameters()}
        for parameter in self._trained:
            if parameter in inside and parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(parameter)

    def _replay(self, graphs: BlockGraphs, micro: Callable[[], Tensor]) -> Tensor:
        self._now = graphs
        try:
            return micro()
        finally:
            self._now = None

    def _summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"shapes": len(self._graphs), "replayed_micro_batches": self.replayed}
        if self.why_not is not None:
            found["why_not"] = self.why_not
        elif not self._graphs:
            found["why_not"] = "the GPU does not wait for Python" if self._busy else "too few micro-batches of a shape"
        return found

    @torch.no_grad()
    def _attach(self) -> None:
        """Let the parameters' gradients lie where the graphs add to them."""
        empty = [kept for parameter, kept in self._gradients.items() if parameter.grad is None]
        if empty:
            torch._foreach_zero_(empty)
        for parameter, kept in self._gradients.items():
            if parameter.grad is not kept:
                if parameter.grad is not None:
                    kept.copy_(parameter.grad)
                parameter.grad = kept


_REPLAYING: dict[type, type] = {}


def _replaying(cls: type) -> type:
    """The class with blocks that ask for their graphs first: before hooks, and before a pass that is to be repeated."""
    if cls not in _REPLAYING:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._ftune_replay.call(self, functools.partial(cls.__call__, self), args, kwargs)

        _REPLAYING[cls] = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
    return _REPLAYING[cls]


@torch.no_grad()
def _apart(usual: Sequence[Tensor | None], again: Sequence[Tensor | None]) -> str | None:
    """What is wrong with a loss and gradients that were computed a second time."""
    if any((one is None) != (other is None) for one, other in zip(usual, again, strict=True)):
        return "other parameters have gradients"
    squares = []
    for one, other in zip(usual[1:], again[1:], strict=True):
        if one is not None and other is not None:
            there = one.to(other.device).float()
            squares.append(torch.stack([there.norm().square(), (there - other.float()).norm().square()]))
    size, apart = torch.stack(squares).sum(0).sqrt().tolist()
    loss, other_loss = (float(cast(Tensor, all_[0])) for all_ in (usual, again))
    if apart <= TOLERANCE * size and abs(loss - other_loss) <= TOLERANCE * abs(loss):
        return None
    return f"the loss is {other_loss:g} in place of {loss:g}, gradients are {apart:.2g} off of {size:.2g}"
