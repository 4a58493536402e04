"""Devices by name, to plan for one that is not here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ftune.errors import FtuneError

__all__ = ["DEVICES", "Device", "find_device"]


class _Listed(NamedTuple):
    """MiB of memory, as ``nvidia-smi`` gives the total; ECC and other programs may take some of it.

    And 10^12 dense floating-point operations a second, as NVIDIA's data sheets and whitepapers give them: products of
    bfloat16 summed in float32 (None without instructions for them), and plain float32.
    """

    mebibytes: int
    bfloat16: float | None
    float32: float


DEVICES = {
    "t4-16g": _Listed(15_360, None, 8.1),
    "v100-32g": _Listed(32_768, None, 15.7),
    "l4-24g": _Listed(23_034, 121, 30.3),
    "a10-24g": _Listed(23_028, 125, 31.2),
    "rtx-3090-24g": _Listed(24_576, 71, 35.6),
    "rtx-4090-24g": _Listed(24_564, 165, 82.6),
    "l40s-48g": _Listed(46_068, 362, 91.6),
    "a100-40g": _Listed(40_960, 312, 19.5),
    "a100-80g": _Listed(81_920, 312, 19.5),
    "h100-80g": _Listed(81_559, 989, 67),
    "h200-141g": _Listed(143_771, 989, 67),
}

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB)", re.IGNORECASE)
_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20}


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        name: As it was given.
        memory: Bytes.
        bfloat16: Whether it has instructions for bfloat16, as NVIDIA's GPUs have from Ampere on; an amount of memory
            is taken to be one of those.
        flops: Floating-point operations a second on paper, by dtype; empty of an amount of memory.
    """

    name: str
    memory: int
    bfloat16: bool = True
    flops: Mapping[str, float] = field(default_factory=dict, hash=False)


def find_device(text: str) -> Device:
    """A device by its name (``h100-80g``), or by an amount of memory (``24GiB``).

    Raises:
        FtuneError: It is neither; the known names are listed.
    """
    amount = _AMOUNT.fullmatch(text.strip())
    if amount:
        memory = int(float(amount[1]) * _UNITS[amount[2].lower()])
        if memory > 0:
            return Device(text.strip(), memory)
    name = text.strip().lower()
    if name in DEVICES:
        listed = DEVICES[name]
        speeds = {"bfloat16": listed.bfloat16, "float32": listed.float32}
        flops = {dtype: speed * 1e12 for dtype, speed in speeds.items() if speed}
        return Device(name, listed.mebibytes * 2**20, listed.bfloat16 is not None, flops)
    raise FtuneError(
        f"--device {text}: no device that is known",
        help=f"{', '.join(DEVICES)}; or an amount of memory: 24GiB",
    )
