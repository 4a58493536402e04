"""Reading what ``torch.save`` wrote, without running what a stranger may have put into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftune.errors import RunFailed

__all__ = ["read_tensors"]


def read_tensors(path: Path) -> Any:
    """Tensors, numbers and plain containers from a file; nothing else is built, no code is called.

    Raises:
        RunFailed: The file asks for anything else, or is damaged.
    """
    try:
        # An argument, not the default: the environment can turn the default off.
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged pickle torch raises whatever its machine stumbles over
        raise RunFailed(
            f"{path} holds something else than tensors and numbers: it was not read",
            help="take the checkpoint before it, and do not trust where this one came from",
        ) from error
