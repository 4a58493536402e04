"""The kernels of ``ftune.ops.kernels`` fused by torch's compiler, for any number of tokens.

Only what is elementwise, or a sum along one dimension, is compiled: products of matrices are fast as they are.
Compiled are the functions of ``EAGER`` themselves, so there is one text of the arithmetic. Between operations the
compiler keeps fp32 where eager rounds to 16 bits, so results agree up to rounding and not bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ftune.ops.kernels import EAGER, Kernels, plain

__all__ = ["compile_kernels"]

COMPILED = ("norm", "norm_again", "norm_backward", "gate", "gate_backward")
"""Of ``Kernels``: what takes tokens and one more dimension."""

OPTIONS: dict[str, Any] = {
    # A pool of processes would stay beside the run, each with the memory of a torch.
    "compile_threads": 1,
    # The key of this cache lacks the processor's vector width: what was generated for another machine, or under
    # ATEN_CPU_CAPABILITY, would be compiled for this one and write past the end of its rows.
    "fx_graph_cache": False,
}


def compile_kernels(calls: Iterable[tuple[str, tuple[Any, ...]]]) -> Kernels:
    """Compile what these calls need: seconds for each function, half a minute for the first of a process.

    Args:
        calls: Names of functions with arguments of the dtypes and flags they are to be compiled for; N of at least 2.

    Returns:
        A set that runs compiled code where it fits the arguments and the eager function anywhere else: nothing is
        compiled after this call.

    Raises:
        Exception: Whatever the compiler raises, such as where no C++ compiler is installed.
    """
    compiled = {name: _Compiled(getattr(EAGER, name)) for name in COMPILED}
    for name, arguments in calls:
        compiled[name].prepare(*arguments)
    return replace(plain(), **compiled)


class _Compiled:
    """A function that is called with tensors of two dimensions in one state of torch, so that one code fits all calls.

    Compiled code is chosen by guards: on numbers of dimensions, strides, requires_grad, autocast, grad mode. A forward
    pass under autocast and a backward pass outside it would each be compiled for themselves.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__.removeprefix("_")
        self._eager, self._failed = function, False
        self._compiled = torch.compile(function, dynamic=True, fullgraph=True, options=OPTIONS)

    def prepare(self, *arguments: Any) -> None:
        """Compile for such arguments."""
        self._run(arguments, "default")

    def __call__(self, *arguments: Any) -> Any:
        if self._failed:
            return self._eager(*arguments)
        try:
            return self._run(arguments, "eager_on_recompile")
        except Exception as error:
            # No function changes its arguments, so eager can take over; what fails there too is a real failure.
            self._failed = True
            warnings.warn(f"compiled {self.name} failed, and is eager from here on: {error}", stacklevel=2)
            return self._eager(*arguments)

    def _run(self, arguments: tuple[Any, ...], stance: str) -> Any:
        first: Tensor = arguments[0]
        plain = [_two_dimensional(a) if isinstance(a, Tensor) else a for a in arguments]
        with (
            torch.no_grad(),
            # The dtype is part of the guards, also where autocast is off.
            torch.autocast(first.device.type, dtype=torch.bfloat16, enabled=False),
            torch.compiler.set_stance(stance),
        ):
            out = self._compiled(*plain)
            if isinstance(out, tuple):
                return tuple(_like(part, first) for part in out)
            return _like(out, first)


def _two_dimensional(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x).contiguous()


def _like(out: Tensor | None, first: Tensor) -> Tensor | None:
    """Give a result the leading dimensions of the first argument; a gradient of a gain has none."""
    if out is None or out.ndim == 1 or first.ndim <= 2:
        return out
    # Autograd refuses changes in place of a view that a custom function returns; this is none.
    return torch.ops.aten._unsafe_view(out, (*first.shape[:-1], out.shape[-1]))  # type: ignore[no-any-return]
