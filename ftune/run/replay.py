"""Blocks of a model replayed from CUDA graphs, where Python launches their kernels slower than the GPU computes them.

On an H100 a block of an 8B model is busy with 2,048 tokens for 3.5 ms, forwards and backwards, and Python needs 5 to
launch its hundred kernels; of smaller models and shorter rows the GPU waits most of the time. A graph of them is one
launch. Source: CUDA C++ Programming Guide, "CUDA Graphs"; the memory of several graphs as in
``torch.cuda.make_graphed_callables``, which copies no mask, adds up no gradients, and must be given every shape ahead.

A micro-batch of a new shape is computed as usual twice; the second time the clock says whether the GPU waits. Where it
does, the third is recorded: of each block a graph forwards and one backwards, in the order in which they run, so that
they share one pool of memory, as large as what the usual pass takes. Recorded graphs are held against the usual pass
twice, when they are made and again after an update. What goes wrong on the way leaves the run as it would have been.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["CudaRecorder", "Recorder", "Replay"]

T = TypeVar("T")

USUAL = 2
"""How often a shape is computed as usual first: once to compile and to fill caches, once by the clock."""
MOST = 4
"""Shapes that are recorded: of each every block's output stays in memory."""
IDLE = 0.05
"""The GPU waits for Python where it is done within this share of a micro-batch's time behind Python's last launch."""
TOLERANCE = 0.01
"""How far recorded gradients may be from the usual ones, as a share of their norm: sums in another order, rounded to
16 bits in every block."""


class Recorder(Protocol):
    """Records work on a device, to be done again by one call."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What ``work`` returns, in memory that is filled only by the second: what does the work, again and again."""

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
            finally:
                graph.capture_end()
        here.wait_stream(self._stream)
        return found, graph.replay

    def wait(self) -> None:
        """For the whole device."""
        torch.cuda.synchronize(self._device)

    def make_room(self) -> None:
        """What the usual pass took is taken again by the graphs' pool."""
        torch.cuda.empty_cache()


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
        self._sessions: dict[Hashable, _Session] = {}
        self._now: _Session | None = None
        self.why_not: str | None = None
        self.replayed = 0
        for block in blocks:
            block.forward = functools.partial(self._forward, block)

    def close(self) -> dict[str, Any]:
        """Let go of the graphs and of the model; returns what there was, for ``run.json``."""
        found = self._summary()
        self.release("the run is over")
        for block in self._blocks:
            vars(block).pop("forward", None)
        return found

    def release(self, why: str) -> bool:
        """Let go of the graphs for good, and of their memory; whether there were any."""
        had = bool(self._sessions)
        self._sessions.clear()
        self._gradients.clear()
        self.why_not = self.why_not or why
        return had

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
        session = self._sessions.get(shape)
        if session is not None:
            if session.proven:
                self._attach()
                self.replayed += 1
                return self._replay(session, micro)
            # In the update in which it was recorded nothing has changed that it could have missed.
            return self._compared(shape, session, micro) if step > session.step else micro()
        self._seen[shape] += 1
        if self._seen[shape] == USUAL and not self._always:
            began = time.perf_counter()
            loss = micro()
            launched = time.perf_counter()
            self._recorder.wait()
            done = time.perf_counter()
            if done - launched > IDLE * (done - began):
                self._busy.add(shape)
            return loss
        if self._seen[shape] <= USUAL or len(self._sessions) == MOST:
            return micro()
        return self._compared(shape, _Session(self._recorder, self._gradients, self._dtype, step), micro)

    def _compared(self, shape: Hashable, session: _Session, micro: Callable[[], Tensor]) -> Tensor:
        """Compute a micro-batch as usual and by graphs, which are kept where both are the same."""
        before = [p.grad for p in self._trained]
        _put(self._trained, None)
        loss = micro()
        usual = [p.grad for p in self._trained]
        _put(self._trained, None)
        why: str | None
        try:
            session.recording = shape not in self._sessions
            if session.recording:
                self._recorder.make_room()
                inside = {p for block in self._blocks for p in block.parameters()}
                for p in self._trained:
                    if p in inside and p not in self._gradients:
                        self._gradients[p] = torch.zeros_like(p)
            self._attach()
            again = self._replay(session, micro)
            why = _apart((loss, *usual), (again, *(p.grad for p in self._trained)))
        except Exception as error:  # of the driver, the allocator, a kernel that cannot be recorded: each has its own
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if why is None:
            session.proven = not session.recording
            self._sessions[shape] = session
        session.recording = False
        for parameter, old, new in zip(self._trained, before, usual, strict=True):
            parameter.grad = new if old is None else old if new is None else old.add_(new)
        if why is not None:
            del session
            self.release(why)
        return loss

    def _replay(self, session: _Session, micro: Callable[[], Tensor]) -> Tensor:
        self._now = session
        try:
            return micro()
        finally:
            self._now = None

    def _summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"shapes": len(self._sessions), "replayed_micro_batches": self.replayed}
        if self.why_not is not None:
            found["why_not"] = self.why_not
        elif not self._sessions:
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

    def _forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        usual = functools.partial(type(block).forward, block)
        if self._now is None or not block.training or not torch.is_grad_enabled():
            return usual(*args, **kwargs)
        return self._now.forward(block, usual, args, kwargs)


def _put(parameters: Iterable[nn.Parameter], gradient: None) -> None:
    for parameter in parameters:
        parameter.grad = gradient


@torch.no_grad()
def _apart(usual: Sequence[Tensor | None], again: Sequence[Tensor | None]) -> str | None:
    """What is wrong with a loss and gradients that were computed a second time."""
    if any((one is None) != (other is None) for one, other in zip(usual, again, strict=True)):
        return "other parameters have gradients"
    (loss, *grads), (other_loss, *other_grads) = ([x.float() for x in all_ if x is not None] for all_ in (usual, again))
    size = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    apart = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(torch._foreach_sub(grads, other_grads))))
    if bool((loss - other_loss).abs() <= TOLERANCE * loss.abs()) and bool(apart <= TOLERANCE * size):
        return None
    return f"the loss is {float(other_loss):g} in place of {float(loss):g}, gradients are {float(apart / size):.2g} off"


# --- one shape ---------------------------------------------------------------------------------------------


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
class _Session:
    """The graphs of micro-batches of one shape.

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

    def forward(self, module: nn.Module, usual: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
        self, session: _Session, module: nn.Module, usual: Callable[..., Any], leaves: list[Any], spec: TreeSpec
    ) -> None:
        self._session, self._spec, self._weights = session, spec, [*module.parameters(), *module.buffers()]
        self._places = self._pointers()
        hidden = leaves[0]
        self._trained = [p for p in module.parameters() if p.requires_grad]
        # What a graph left is where the next one finds it.
        self._input = hidden.detach() if hidden.data_ptr() in session.outputs else hidden.detach().clone()
        self._input.requires_grad_(hidden.requires_grad)
        self._others = [
            session.copy_of(leaf, hidden.shape[-2]) if isinstance(leaf, Tensor) else leaf for leaf in leaves[1:]
        ]
        given, named = tree_unflatten(
            [self._input, *(other.tensor if isinstance(other, _Copy) else other for other in self._others)], spec
        )
        device = hidden.device.type
        trains = hidden.requires_grad or bool(self._trained)

        def work() -> Any:
            # What autocast has cast outside of the graph is not to be found in it.
            cast = torch.autocast(device, session.dtype, enabled=torch.is_autocast_enabled(device), cache_enabled=False)
            with torch.set_grad_enabled(trains), cast:
                return usual(*given, **named)

        outs, self._replay_forward = session.recorder.record(work)
        leaves_out, self._out_spec = tree_flatten(outs)
        if not isinstance(leaves_out[0], Tensor) or any(leaf is not None for leaf in leaves_out[1:]):
            raise ValueError(f"{type(module).__name__} returns more than hidden states")
        self._graph: Tensor | None = leaves_out[0] if trains else None
        self._output: Tensor = leaves_out[0].detach()
        self._blank = leaves_out[1:]
        session.outputs.add(self._output.data_ptr())
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
        buffer = self._session.buffer(grad)
        if grad.data_ptr() != buffer.data_ptr():
            buffer.copy_(grad)
        if self._replay_backward is None:
            _, self._replay_backward = self._session.recorder.record(functools.partial(self._backward, buffer))
            self._graph = None  # and with it what autograd has kept
        self._replay_backward()
        return buffer.detach() if self._input.requires_grad else None

    def _backward(self, buffer: Tensor) -> None:
        assert self._graph is not None
        wanted: list[Tensor] = [self._input] if self._input.requires_grad else []
        found = torch.autograd.grad(self._graph, [*wanted, *self._trained], buffer)
        with torch.no_grad():
            if wanted:
                buffer.copy_(found[0])
            if self._trained:
                torch._foreach_add_([self._session.gradients[p] for p in self._trained], list(found[len(wanted) :]))

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
