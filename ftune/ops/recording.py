"""Whether what is computed is being recorded, to be computed again without Python (``ftune.run.block_graphs``).

What Python keeps from one pass to the next must then be computed in every pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["is_recording", "recording"]

# Not a context variable: backward passes are recorded in autograd's own thread.
_depth = 0


def is_recording() -> bool:
    """Whether it is."""
    return _depth > 0


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """The context in which it is."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
