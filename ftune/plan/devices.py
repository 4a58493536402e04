"""Devices by name, to plan for one that is not here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftune.errors import FtuneError

__all__ = ["DEVICES", "Device", "find_device"]

DEVICES = {
    "t4-16g": 15_360,
    "v100-32g": 32_768,
    "l4-24g": 23_034,
    "a10-24g": 23_028,
    "rtx-3090-24g": 24_576,
    "rtx-4090-24g": 24_564,
    "l40s-48g": 46_068,
    "a100-40g": 40_960,
    "a100-80g": 81_920,
    "h100-80g": 81_559,
    "h200-141g": 143_771,
}
"""MiB of memory, as ``nvidia-smi`` gives the total; ECC and other programs may take some of it."""

_BEFORE_AMPERE = ("t4-16g", "v100-32g")

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
    """

    name: str
    memory: int
    bfloat16: bool = True


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
        return Device(name, DEVICES[name] * 2**20, bfloat16=name not in _BEFORE_AMPERE)
    raise FtuneError(
        f"--device {text}: no device that is known",
        help=f"{', '.join(DEVICES)}; or an amount of memory: 24GiB",
    )
