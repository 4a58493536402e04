"""Import what a run uses in one go, out of the garbage collector's sight."""

from __future__ import annotations

import gc
import sys

__all__ = ["import_libraries"]


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
            import peft as _  # noqa: F401
        gc.freeze()
    finally:
        if collecting:
            gc.enable()
