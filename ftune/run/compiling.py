"""Whether a run's norms and gates are compiled: where that pays for itself within the run.

Compiled are elementwise functions, not layers: with rows of many lengths a layer is compiled again and again, and on
a CPU it is then slower than eager. A fused norm or gate saves passes over memory, which is little of a step; so what
it saves is weighed, by the clock, against what compiling costs. Compiling is never needed, so nothing that goes wrong
with it ends a run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ftune.cache import cache_dir, publish
from ftune.ops.compiled import compile_kernels
from ftune.ops.kernels import EAGER, Kernels, has_fused, plain
from ftune.plan.precision import machine
from ftune.run.kernel_work import Work

__all__ = ["choose_kernels"]

COST_SECONDS = 60.0
"""What compiling is taken to cost where it was not tried yet: up to 50 s for the first function, 3.5 s for others."""
SAVED = 1 / 3
"""The share of the eager time that compiled functions are taken to save where that was not measured yet: 0.2 to 0.4
on one thread of a CPU."""
ROUNDS = 7
CALLS = 4  # in one measurement: a single call is about as short as what disturbs it


def choose_kernels(
    asked: bool | Literal["auto"],
    work: Callable[[], Sequence[Work]],
    micro_batches: int,
    device: torch.device,
    agree: Callable[[bool], bool],
    began: bool | None = None,
) -> tuple[Kernels, dict[str, Any]]:
    """Decide which kernels the rest of a run uses. Raises nothing of its own.

    With ``auto`` the compiler is tried where what it is expected to save in the micro-batches that are left exceeds
    what it is expected to cost; what it made is used where it is then faster by the clock. Expected is what was
    measured on this machine before, with the same versions of torch and for the same functions.

    Args:
        asked: ``training.compile``: never, whatever it costs, or where it pays.
        work: Finds the calls of a micro-batch.
        micro_batches: How many are left, on each process.
        device: Where they are computed.
        agree: Whether every process says so. Called equally often in all of them.
        began: What this returned when the run began, which holds for all of it; None: it begins now.

    Returns:
        The kernels, and what was decided: ``compiled``, ``why`` in a line for people, and seconds.
    """
    trial = _Trial(work, micro_batches, device)
    forced = asked is True or began is True
    found = {"asked": asked, "compiled": False, "why": f"{_plain()}, as the run began", "micro_batches": micro_batches}
    if asked is False or began is False:
        return plain(), found
    if not forced and plain() is not EAGER:
        return plain(), found | {"why": "norms and gates are fused kernels already, so there is little to compile"}
    for step in (trial.promises, trial.compile, trial.gains):
        mine = step(forced)
        if not agree(mine):
            found["why"] = f"{_plain()}: another process refused" if mine else trial.why
            return plain(), found | trial.seconds
    return trial.kernels, found | {"compiled": True, "why": trial.why} | trial.seconds


def _plain() -> str:
    """What the kernels are called that were not compiled for the run."""
    return "fused" if has_fused() else "eager"


@dataclass
class _Trial:
    """One process's trial, in three steps; each says whether to go on, and otherwise ``why`` not.

    Attributes:
        find: Finds the calls of a micro-batch.
        micro_batches: How many are left.
        device: Where they are computed.
        why: The decision, for people.
        seconds: What was measured: ``eager`` and ``compiled`` of a micro-batch, ``expected_cost``, ``cost``, and
            ``gain`` over the micro-batches that are left, without the cost.
        kernels: The compiled ones, once they are made.
    """

    find: Callable[[], Sequence[Work]]
    micro_batches: int
    device: torch.device
    why: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=plain)
    work: Sequence[Work] = ()

    def promises(self, forced: bool) -> bool:
        """Time the eager kernels; whether compiling is expected to repay what it costs."""
        try:
            self.work = self.find()
            eager = sum(self._best(work, [plain()])[0] * work.times for work in self.work)
        except Exception as error:
            return self._fails("the norms and gates could not be timed", error)
        if not self.work:
            self.why = f"{_plain()}: no norm and no gate of this model was replaced, so there is nothing to compile"
            return False
        cost, saved = _remembered(self.work)
        gain = eager * saved * self.micro_batches
        self.seconds = {"eager_seconds": eager, "expected_cost_seconds": cost, "expected_gain_seconds": gain}
        if gain <= cost and not forced:
            self.why = f"{_plain()}: compiling takes about {cost:.0f} s and would save about {gain:.1f} s of this run"
            return False
        return True

    def compile(self, forced: bool) -> bool:
        """Compile, and hold the results against those of the eager kernels."""
        began = time.perf_counter()
        try:
            self.kernels = compile_kernels((work.kernel, work.arguments) for work in self.work)
            wrong = [work.kernel for work in self.work if not self._same(work)]
        except Exception as error:  # of the compiler, the linker, the driver: each has its own
            return self._fails("the compiler failed", error)
        finally:
            self.seconds["cost_seconds"] = time.perf_counter() - began
        if wrong:
            self.why = f"{_plain()}: compiled, {' and '.join(dict.fromkeys(wrong))} compute something else"
        return not wrong

    def gains(self, forced: bool) -> bool:
        """Time both kinds of kernels in turns; whether the compiled ones are faster."""
        cost = self.seconds["cost_seconds"]
        try:
            both = [
                [seconds * work.times for seconds in self._best(work, [plain(), self.kernels])] for work in self.work
            ]
            eager, compiled = (sum(seconds) for seconds in zip(*both, strict=True))
            _remember(self.work, cost, 1 - compiled / eager)
        except Exception as error:
            return self._fails("the compiled kernels could not be timed", error)
        gain = (eager - compiled) * self.micro_batches
        self.seconds |= {"eager_seconds": eager, "compiled_seconds": compiled, "gain_seconds": gain}
        each = f"{1e3 * eager:.1f} ms of a micro-batch {_plain()}, {1e3 * compiled:.1f} ms compiled"
        if gain <= 0 and not forced:
            self.why = f"{_plain()}: the norms and gates take {each}"
            return False
        self.why = f"norms and gates compiled in {cost:.0f} s: they take {each}, {abs(gain):.1f} s "
        self.why += f"{'less' if gain > 0 else 'more'} in this run"
        return True

    def _fails(self, what: str, error: Exception) -> bool:
        self.why = f"{_plain()}: {what} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        return False

    def _same(self, work: Work) -> bool:
        mine, theirs = (_parts(getattr(kernels, work.kernel)(*work.arguments)) for kernels in (self.kernels, EAGER))
        return all(_close(one, other) for one, other in zip(mine, theirs, strict=True))

    def _best(self, work: Work, sets: list[Kernels]) -> list[float]:
        """Seconds that a call takes from each set: the best of several turns, after one to warm up."""
        found = [float("inf")] * len(sets)
        for turn in range(ROUNDS + 1):
            for index, kernels in enumerate(sets):
                function = getattr(kernels, work.kernel)
                before = self._now()
                for _ in range(CALLS):
                    function(*work.arguments)
                if turn:
                    found[index] = min(found[index], (self._now() - before) / CALLS)
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _parts(out: Any) -> list[Tensor]:
    return [part for part in (out if isinstance(out, tuple) else (out,)) if part is not None]


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding alone: to 16 bits once or twice, and in the order of sums in fp32."""
    bound = max(4 * torch.finfo(other.dtype).eps, 1e-4)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool((one.float() - other.float()).norm() <= bound * other.float().norm())


# --- what compiling cost before ----------------------------------------------------------------------------


def _entry(work: Sequence[Work]) -> str:
    """A file name for what is compiled here: the functions, their dtypes and flags, and sizes to a factor of two.

    What a fused function saves depends on whether its tensors fit into a processor's cache.
    """

    def about(argument: Any) -> str:
        if isinstance(argument, Tensor):
            return f"{argument.dtype}/{argument.numel().bit_length()}"
        return str(argument)

    parts = sorted((each.kernel, *map(about, each.arguments)) for each in work)
    device = work[0].arguments[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"compile-{hashlib.sha256(repr((name, parts)).encode()).hexdigest()[:16]}-{machine()}.json"


def _remembered(work: Sequence[Work]) -> tuple[float, float]:
    """The most that compiling this has cost here, in seconds, and the share of the eager time that it saves."""
    try:
        directory = cache_dir("machine")
        found = json.loads((directory / _entry(work)).read_text(encoding="utf-8")) if directory else {}
        return float(found["cost_seconds"]), float(found["saved"])
    except (OSError, ValueError, TypeError, KeyError):
        return COST_SECONDS, SAVED


def _remember(work: Sequence[Work], cost: float, saved: float) -> None:
    """Keep the cost for later runs: the most of all, since torch keeps what it compiled only for a while."""
    directory = cache_dir("machine")
    if directory is None:
        return
    path = directory / _entry(work)
    if path.exists():
        cost = max(cost, _remembered(work)[0])
    text = json.dumps({"cost_seconds": cost, "saved": saved})
    publish(path, lambda temporary: cast(None, temporary.write_text(text, encoding="utf-8")))
