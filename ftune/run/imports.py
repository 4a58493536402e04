"""Import what a run uses in one go, out of the garbage collector's sight."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["import_for", "import_libraries", "quiet_libraries"]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Quieten libraries whose notices are not the user's business; ftune reports what matters itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # GGUF files are dequantized behind a bar of their own that transformers' switch does not reach.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a level set before it is imported would not stay
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name in ("bitsandbytes", "peft", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers imports DeepSpeed where it is installed, whose notice of a machine without GPUs goes to stdout.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_libraries(*, peft: bool) -> None:
    """Import torch, transformers, accelerate and perhaps PEFT, whose million objects no collection need look at again.

    While modules are imported, Python's collector goes through all of them again and again, and none is garbage: that
    took a sixth of the time to a run's first step. For the start of a process; where the libraries are there already,
    nothing is done.

    Args:
        peft: Whether the method uses PEFT; its import takes half a second more.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401

        if peft:
            with _compiling_later():
                import peft as _  # noqa: F401
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


def import_for(target: Path) -> None:
    """Import at once what a run or a recipe needs; not where it will only be said that there is none."""
    if target.exists():
        import_libraries(peft=True)


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Let functions that modules compile as they are imported be compiled when they are called first, if ever.

    PEFT imports bitsandbytes where it is there, which so decorates four of its functions; for that torch imports its
    compiler, 577 modules in 45 MiB and 0.65 s, whether anything is in 4 bits or not.
    """
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **settings: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **settings)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **settings))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
