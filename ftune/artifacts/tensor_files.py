"""Safetensors files written one tensor at a time: no more than the tensor at hand is in memory.

The library's own writer takes all tensors of a file at once and copies them. The format is a length, a JSON
header and the bytes: https://github.com/huggingface/safetensors. What is written here is read back by the library.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ftune.errors import RunFailed
from ftune.plan.weights import STORED
from ftune.run.files import write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["check_shards", "plan_shards", "write_shards"]


def plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Share tensors out over files of at most ``limit`` bytes, in order; a larger tensor has a file of its own."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{index:05}-of-{count:05}.safetensors": shard for index, shard in enumerate(shards, 1)}


def write_shards(
    out: Path, shards: dict[str, dict[str, tuple[int, ...]]], dtype: torch.dtype, make: Callable[[str], Tensor]
) -> dict[str, str]:
    """Write the files of ``plan_shards``, and the index where there are several.

    Args:
        out: An existing directory.
        shards: File name → tensor name → shape.
        dtype: Of every tensor.
        make: Gives a tensor by its name, in that shape and dtype.

    Returns:
        SHA-256 of each tensor's bytes, by name.
    """
    digests: dict[str, str] = {}
    stored_as = next(code for code, name in STORED.items() if name == str(dtype).removeprefix("torch."))
    for file, shapes in shards.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (out / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                tensor = make(name)
                assert tuple(tensor.shape) == shape, name
                assert tensor.dtype == dtype, name
                data = _bytes(tensor)
                digests[name] = hashlib.sha256(data).hexdigest()
                stream.write(data)
    if len(shards) > 1:
        elements = sum(math.prod(shape) for shapes in shards.values() for shape in shapes.values())
        metadata = {"total_parameters": elements, "total_size": elements * dtype.itemsize}
        places = {name: file for file, shapes in shards.items() for name in shapes}
        index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
        write_json(out / "model.safetensors.index.json", index)
    return digests


def check_shards(
    out: Path, shards: dict[str, dict[str, tuple[int, ...]]], dtype: torch.dtype, digests: dict[str, str]
) -> None:
    """Read every tensor back from the disk: names, shapes, dtype and bytes as they were written.

    Raises:
        RunFailed: Something is not.
    """
    from safetensors import safe_open

    for file, shapes in shards.items():
        with safe_open(out / file, framework="pt", backend="pread") as opened:
            if set(opened.offset_keys()) != set(shapes):
                raise RunFailed(f"{file} reads back with other tensors than were written; nothing was left")
            for name, shape in shapes.items():
                tensor = opened.get_tensor(name)
                same = tuple(tensor.shape) == shape and tensor.dtype == dtype
                if not same or hashlib.sha256(_bytes(tensor)).hexdigest() != digests[name]:
                    raise RunFailed(f"`{name}` reads back from the disk differently; nothing was left")


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
