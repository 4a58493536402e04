"""Reading weights in another dtype than they are stored in, one tensor at a time.

transformers maps a checkpoint into memory. Where the dtype is the stored one that is best: nothing is copied, and
what is not used is not read. Where each tensor is cast, the whole file has passed through memory and stays
resident beside the model until the last tensor is done: an fp32 checkpoint loaded as bf16 peaks at three times the
model. Read by ``pread`` instead, a tensor is gone once it is cast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.errors import ModelError
from ftune.recipe.no_model import AGAIN, damage

if TYPE_CHECKING:
    import torch

__all__ = ["STORED", "load_cast", "safetensors_files"]

STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating dtypes, as safetensors and as torch names them."""


def load_cast(where: str, revision: str | None, settings: dict[str, Any]) -> Any | None:
    """Load a model whose weights have to be cast, without its checkpoint in memory beside it.

    Args:
        where: A directory of transformers' files, or a hub id.
        revision: Of a hub id.
        settings: Of ``from_pretrained``, with ``config`` and ``dtype``.

    Returns:
        The model, as ``from_pretrained`` gives it; None where that does as well or does more: nothing is to be
        cast, the weights are stored quantized or not in safetensors, the architecture is not transformers' own, or
        there is no ``generation_config.json``.

    Raises:
        OSError: The weights cannot be read.
        SafetensorError: A file is damaged.
    """
    from safetensors import safe_open
    from transformers import GenerationConfig

    from ftune.plan.shapes import auto_class

    config = settings["config"]
    mapping = auto_class(config)._model_mapping
    known = type(config) in mapping
    elsewhere = getattr(type(config), "extra_files", None)  # unknown to transformers 5.17
    if not known or elsewhere or getattr(config, "quantization_config", None) is not None:
        return None
    files = safetensors_files(where, revision)
    weights: dict[str, Any] = {}
    for file in files:
        opened: Any = safe_open(file, framework="pt", backend="pread")
        weights |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    if not _to_cast(weights.values(), settings["dtype"]):
        return None
    try:
        generation = GenerationConfig.from_pretrained(where, revision=revision)
    except OSError:
        return None  # derived from config.json, in a way that is transformers' own
    return mapping[type(config)].from_pretrained(None, state_dict=weights, generation_config=generation, **settings)


def _to_cast(slices: Iterable[Any], dtype: torch.dtype) -> bool:
    """Whether every tensor is stored in a floating dtype, and most of the elements in another than asked for."""
    import math

    other = total = 0
    for stored in slices:
        name = STORED.get(stored.get_dtype())
        if name is None:
            return False
        elements = math.prod(stored.get_shape())
        total += elements
        other += elements if name != str(dtype).removeprefix("torch.") else 0
    return other > total / 2


def safetensors_files(where: str, revision: str | None, *, download: bool = True) -> list[Path]:
    """The safetensors files of a model, by the names that transformers looks for; empty where there are none.

    Args:
        where: A directory of transformers' files, or a hub id.
        revision: Of a hub id.
        download: Fetch what the hub's cache does not have; else it counts as not there.

    Raises:
        ModelError: A directory's index is damaged, or names files that are not there.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    if (directory := Path(where)).is_dir():
        if (single := directory / SAFE_WEIGHTS_NAME).is_file():
            return [single]
        index = directory / SAFE_WEIGHTS_INDEX_NAME
        return _shards(index) if index.is_file() else []
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            found = cached_file(where, name, revision=revision, local_files_only=not download)
        except OSError:
            continue
        if found is None:
            continue
        if name == SAFE_WEIGHTS_NAME:
            return [Path(found)]
        try:
            shards, _ = get_checkpoint_shard_files(where, found, revision=revision, local_files_only=not download)
        except OSError:
            if download:
                raise
            continue
        return [Path(shard) for shard in shards]
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index beside them names."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in found.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what, help = damage(index) or ("maps no tensors to files", AGAIN)
        raise ModelError(f"`{index}` {what}", help=help) from error
    if outside := [name for name in names if Path(name).name != name or "\\" in name]:
        raise ModelError(f"`{index}` names `{outside[0]}`, which is no file beside it", help=AGAIN)
    lost = [name for name in names if not (index.parent / name).is_file()]
    if lost or not names:
        which = ", ".join(f"`{name}`" for name in lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        what = (
            f"{len(lost)} of the {len(names)} files that its index names: {which}"
            if names
            else "files: its index names none"
        )
        raise ModelError(f"the model in `{index.parent}` lacks {what}", help=AGAIN)
    return [index.parent / name for name in names]
