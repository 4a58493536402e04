"""Numbers and times as people read them."""

from __future__ import annotations

import datetime

__all__ = ["bytes_text", "now_text", "time_text"]


def bytes_text(count: float) -> str:
    """Bytes with a binary unit, in three significant digits: ``1.25 GiB``, ``512 MiB``, ``9.3 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def time_text(seconds: float) -> str:
    """Seconds as ``45s``, ``3m05s`` or ``2h07m``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def now_text() -> str:
    """The time in UTC, to the second: ``2026-01-31T12:00:00+00:00``."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
