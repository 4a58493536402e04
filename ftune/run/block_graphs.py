"""The blocks of a model recorded, forwards and backwards, for micro-batches of one shape.

A block's graph reads its arguments where they were when it was recorded: they are copied there, once for all blocks
that are given the same tensor. The output of one block is the input of the next where it lies. The gradient of hidden
states passes through one tensor from block to block; gradients of parameters are added up by the graphs themselves,
where ``Replay`` has put them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ftune.ops.recording import recording

__all__ = ["BlockGraphs", "CudaRecorder", "Recorder"]

T = TypeVar("T")

_WAITED, _OF_THE_MODE = "called a synchronizing CUDA operation", "Synchronization debug mode"
"""What torch warns of (``torch.cuda.set_sync_debug_mode``), and that it warns of it."""


class Recorder(Protocol):
    """Records work on a device, to be done again by one call."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What ``work`` returns, in memory that is filled only by the second: what does the work, again and again."""

    def watch(self, work: Callable[[], T]) -> tuple[T, bool]:
        """What ``work`` returns, done now; and whether it waited for the device, which cannot be recorded."""

    def wait(self) -> None:
        """Until the device is done with all that it was given."""

    def make_room(self) -> None:
        """Give back the memory that nothing lies in."""


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Also from autograd's thread: only what this thread does is recorded."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                found = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what cannot be recorded spoils what was
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(self._stream)
        return found, graph.replay

    def watch(self, work: Callable[[], T]) -> tuple[T, bool]:
        """By torch's own warnings: a recording that has to wait can leave a process unable to use the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if not any(words in str(warning.message) for words in (_WAITED, _OF_THE_MODE)):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return found, any(_WAITED in str(warning.message) for warning in caught)

    def wait(self) -> None:
        """For the whole device."""
        torch.cuda.synchronize(self._device)

    def make_room(self) -> None:
        """What the usual pass took is taken again by the graphs' pool."""
        torch.cuda.empty_cache()


@dataclass
class _Copy:
    """A tensor that graphs read, and what lies in it."""

    tensor: Tensor
    source: Tensor
    version: int

    def fill(self, source: Tensor) -> None:
        """The blocks of a micro-batch are given the same tensors: one copy for all."""
        if source is not self.source or source._version != self.version:
            self.tensor.data.copy_(source)
            self.source, self.version = source, source._version


@dataclass
class BlockGraphs:
    """Of micro-batches of one shape: each block's graphs, and what they share.

    Attributes:
        recorder: Of the device.
        gradients: Where those of the parameters in blocks lie.
        dtype: What the model computes in.
        step: The update in which they were recorded.
        recording: Whether they are being recorded.
        proven: Whether they computed what the usual pass does, in a later update too.
        hidden: Where a gradient passes from one block to the next.
    """

    recorder: Recorder
    gradients: dict[nn.Parameter, Tensor]
    dtype: torch.dtype
    step: int
    recording: bool = False
    proven: bool = False
    hidden: Tensor | None = None
    blocks: dict[nn.Module, _Block] = field(default_factory=dict)
    copies: list[_Copy] = field(default_factory=list)
    outputs: set[int] = field(default_factory=set)

    def call(self, module: nn.Module, usual: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a block makes of its arguments, by its graph where they are as they were."""
        leaves, spec = tree_flatten((args, kwargs))
        block = self.blocks.get(module)
        if block is None:
            if not self.recording or not _can_be_given_again(leaves):
                return usual(*args, **kwargs)
            block = self.blocks[module] = _Block(self, module, usual, leaves, spec)
        elif not block.takes(leaves, spec):
            return usual(*args, **kwargs)
        return block(leaves)

    def copy_of(self, source: Tensor, length: int) -> _Copy:
        """The tensor that stands for one that is given to blocks; the same for all of them."""
        for copy in self.copies:
            if copy.source is source:
                return copy
        tensor = source.detach().clone()
        if hasattr(source, "_ftune_longest"):
            tensor._ftune_longest = length  # type: ignore[attr-defined]  # of the documents of any row
        self.copies.append(_Copy(tensor, source, source._version))
        return self.copies[-1]

    def buffer(self, like: Tensor) -> Tensor:
        """Where the gradient of a block's output lies, and then that of its input."""
        if self.hidden is None:
            self.hidden = torch.empty_like(like)
        if (self.hidden.shape, self.hidden.dtype) != (like.shape, like.dtype):
            raise ValueError("blocks hand on tensors of several kinds")
        return self.hidden


def _can_be_given_again(leaves: list[Any]) -> bool:
    """Whether a block's arguments are hidden states, and tensors without gradients and plain values behind them."""
    hidden, *others = leaves
    return (
        isinstance(hidden, Tensor)
        and hidden.is_floating_point()
        and all(
            not other.requires_grad
            if isinstance(other, Tensor)
            else other is None or isinstance(other, bool | int | float | str | torch.dtype)
            for other in others
        )
    )


class _Block:
    """A block's two graphs, for one shape."""

    def __init__(
        self, graphs: BlockGraphs, module: nn.Module, usual: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> None:
        # Graphs hold memory, which is to be free as soon as they are let go: no circles.
        self._graphs: BlockGraphs = weakref.proxy(graphs)
        self._spec, self._weights = spec, [*module.parameters(), *module.buffers()]
        self._places = self._pointers()
        hidden = leaves[0]
        self._trained = [p for p in module.parameters() if p.requires_grad]
        # What a graph left is where the next one finds it.
        self._input = hidden.detach() if hidden.data_ptr() in graphs.outputs else hidden.detach().clone()
        self._input.requires_grad_(hidden.requires_grad)
        self._others = [
            graphs.copy_of(leaf, hidden.shape[-2]) if isinstance(leaf, Tensor) else leaf for leaf in leaves[1:]
        ]
        given, named = tree_unflatten(
            [self._input, *(other.tensor if isinstance(other, _Copy) else other for other in self._others)], spec
        )
        device = hidden.device.type
        trains = hidden.requires_grad or bool(self._trained)

        def work() -> Any:
            # What autocast has cast outside of the graph is not to be found in it.
            cast = torch.autocast(device, graphs.dtype, enabled=torch.is_autocast_enabled(device), cache_enabled=False)
            with torch.set_grad_enabled(trains), cast, recording():
                return usual(*given, **named)

        outs, self._replay_forward = graphs.recorder.record(work)
        leaves_out, self._out_spec = tree_flatten(outs)
        if not isinstance(leaves_out[0], Tensor) or any(leaf is not None for leaf in leaves_out[1:]):
            raise ValueError(f"{type(module).__name__} returns more than hidden states")
        self._graph: Tensor | None = leaves_out[0] if trains else None
        self._output: Tensor = leaves_out[0].detach()
        self._blank = leaves_out[1:]
        graphs.outputs.add(self._output.data_ptr())
        self._replay_backward: Callable[[], None] | None = None

    def takes(self, leaves: list[Any], spec: TreeSpec) -> bool:
        """Whether arguments are like those that were recorded, and the weights where they were."""
        hidden = leaves[0]
        if spec != self._spec or not _alike(hidden, self._input) or hidden.requires_grad != self._input.requires_grad:
            return False
        for leaf, other in zip(leaves[1:], self._others, strict=True):
            if isinstance(other, _Copy):
                if not isinstance(leaf, Tensor) or not _alike(leaf, other.tensor):
                    return False
            elif isinstance(leaf, Tensor) or leaf != other:
                return False
        return self._places == self._pointers()

    def __call__(self, leaves: list[Any]) -> Any:
        """The block's output."""
        for leaf, other in zip(leaves[1:], self._others, strict=True):
            if isinstance(other, _Copy):
                other.fill(leaf)
        hidden = leaves[0]
        if self._graph is None and self._replay_backward is None:
            out = self.forward(hidden)
        else:
            # The parameter, whose gradient is none here, makes the output part of autograd's graph.
            out = _Replayed.apply(hidden, *self._trained[:1], self)  # type: ignore[no-untyped-call]
        return tree_unflatten([out, *self._blank], self._out_spec)

    def forward(self, hidden: Tensor) -> Tensor:
        """Replay the forward pass."""
        if hidden.data_ptr() != self._input.data_ptr():
            self._input.data.copy_(hidden)  # of which autograd keeps no count, as of what a graph writes
        self._replay_forward()
        return self._output.detach()

    def backward(self, grad: Tensor) -> Tensor | None:
        """Replay the backward pass; adds to the gradients of the parameters."""
        buffer = self._graphs.buffer(grad)
        if grad.data_ptr() != buffer.data_ptr():
            buffer.copy_(grad)
        if self._replay_backward is None:
            _, self._replay_backward = self._graphs.recorder.record(functools.partial(self._backward, buffer))
            self._graph = None  # and with it what autograd has kept
        self._replay_backward()
        return buffer.detach() if self._input.requires_grad else None

    def _backward(self, buffer: Tensor) -> None:
        assert self._graph is not None
        wanted: list[Tensor] = [self._input] if self._input.requires_grad else []
        with recording():  # recomputed blocks run forwards here
            found = torch.autograd.grad(self._graph, [*wanted, *self._trained], buffer)
        with torch.no_grad():
            if wanted:
                buffer.copy_(found[0])
            if self._trained:
                torch._foreach_add_([self._graphs.gradients[p] for p in self._trained], list(found[len(wanted) :]))

    def _pointers(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *others: Any) -> Tensor:
        block: _Block = others[-1]
        ctx.block = block
        return block.forward(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        nothing = [None] * (len(ctx.needs_input_grad) - 1)
        return ctx.block.backward(grads[0]), *nothing
