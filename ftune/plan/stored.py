"""A model's weights where they are stored, read one tensor at a time; and the model they belong to, without them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.errors import ModelError
from ftune.methods import Method
from ftune.methods.layer_by_layer import hollow
from ftune.models.whole import quiet
from ftune.plan.base_model import configured, gguf_path
from ftune.plan.gguf import found_weights
from ftune.plan.shapes import build_on_meta
from ftune.plan.weights import STORED, safetensors_files
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["IN_MEMORY", "StoredWeights", "find_weights", "hollow_base"]

IN_MEMORY = "merge it in memory (--in-memory), on a machine that holds it"


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a checkpoint, by the names of a model's parameters.

    Attributes:
        files: Its safetensors files, in order.
        places: Name of the parameter → the file it is in, and its name there; in the order they are stored.
        shapes: Name of the parameter → its shape.
        converted: Names among them that are the file's own: transformers makes parameters of other names or shapes
            of these tensors as it loads them.
        absent: The parameters that are made of those.
        tied: Parameters that are another one under a second name, and the name that is kept.
    """

    files: tuple[Path, ...]
    places: dict[str, tuple[Path, str]]
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored; read, not mapped: it leaves memory when it is let go of."""
        from safetensors import safe_open

        file, stored = self.places[name]
        with safe_open(file, framework="pt", backend="pread") as opened:
            tensor: Tensor = opened.get_tensor(stored)
        return tensor

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        import math

        return sum(math.prod(shape) for shape in self.shapes.values())


def hollow_base(spec: ModelSpec, method: Method) -> nn.Module:
    """The base model as the method configures it, in evaluation mode, with weights that take no memory."""
    config = configured(spec, method)
    config.use_cache = False
    model: Any = hollow(build_on_meta(config, trust_remote_code=spec.trust_remote_code))
    return model.eval()  # type: ignore[no-any-return]


def base_files(spec: ModelSpec, dtype: torch.dtype) -> list[Path]:
    """The safetensors files of a base model, downloaded if need be.

    Args:
        spec: The recipe's model block.
        dtype: What the base weights are kept in: a GGUF file is dequantized to it.

    Raises:
        ModelError: There are none, or only a GGUF file that was not dequantized yet.
    """
    located = locate_model(spec)
    if not located.gguf_file:
        files = safetensors_files(located.path_or_id, located.revision)
        if not files:
            raise ModelError(f"`{spec.id}` has no weights in safetensors, so none can be read alone", help=IN_MEMORY)
        return files
    entry = found_weights(gguf_path(located), dtype)
    if entry is None:
        raise ModelError(
            f"`{spec.id}` is a GGUF file, which is dequantized whole: it cannot be merged shard by shard here",
            help="give the model as safetensors, or merge it in memory once (--in-memory): what is made of the file is "
            "kept in the cache ($FTUNE_CACHE), and read from there",
        )
    return safetensors_files(str(entry), None)


def find_weights(files: list[Path], model: nn.Module, what: str) -> StoredWeights:
    """Match the tensors of a checkpoint with the parameters of a model, one to one where the file has them so.

    Tensors that transformers converts as it loads them (experts one by one, a head under another name) keep the
    file's names.

    Args:
        files: The safetensors files.
        model: The model, hollow.
        what: What the checkpoint is, for messages.

    Raises:
        ModelError: A tensor is quantized, or this checkpoint does not make this model.
    """
    from safetensors import safe_open

    wanted, tied = _parameters(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    converted: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt", backend="pread") as opened:
            for stored in opened.offset_keys():
                name = stored if stored in wanted or stored in tied else prefix + stored
                about = opened.get_slice(stored)
                if name in tied:
                    # Whether it is a copy of the other is checked where both are at hand.
                    places.setdefault(name, (file, stored))
                    continue
                if about.get_dtype() not in STORED:
                    raise ModelError(f"{what} stores `{stored}` as {about.get_dtype()}: quantized", help=IN_MEMORY)
                shape = tuple(about.get_shape())
                if wanted.get(name) != shape:
                    if stored.endswith("rotary_emb.inv_freq"):
                        continue  # computed from the configuration; older checkpoints hold it all the same
                    name = stored
                    converted.add(name)
                places[name], shapes[name] = (file, stored), shape
    for second, first in tied.items():
        if first not in places and second in places:  # stored under its second name alone
            places[first], shapes[first] = places.pop(second), wanted[first]
    absent = tuple(name for name in wanted if name not in places or name in converted)
    if converted or absent:
        for name in _unused(files, model, what, frozenset(converted)):
            converted.discard(name)
            del places[name], shapes[name]
    return StoredWeights(tuple(files), places, shapes, tied, frozenset(converted), absent)


def _unused(files: list[Path], model: Any, what: str, converted: frozenset[str]) -> frozenset[str]:
    """Which tensors transformers leaves over as it makes the model of a checkpoint; the plan has told of them.

    Args:
        files: The checkpoint's.
        model: The model, hollow.
        what: What the checkpoint is, for messages.
        converted: Names in the file of what is not the model's as it is.

    Raises:
        ModelError: Something is missing or of another shape, or what is left over is not known by its name.
    """
    with quiet(reports=False):
        # On the meta device nothing is read but the files' headers.
        _, report = type(model).from_pretrained(
            str(files[0].parent),
            config=copy.deepcopy(model.config),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    for key, how in (
        ("mismatched_keys", "`{}` has another shape there"),
        ("missing_keys", "it has no `{}`"),
    ):
        for name in sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in report[key]):
            others = "".join(f", and holds `{other}`" for other in sorted(report["unexpected_keys"])[:1])
            raise ModelError(
                f"{what} is not this model: {how.format(name)}{others}",
                help="check that the files and config.json belong together",
            )
    for name in sorted(report["unexpected_keys"] - converted):
        raise ModelError(f"{what} holds `{name}`, which it is not known how to leave out", help=IN_MEMORY)
    return frozenset(report["unexpected_keys"])


def _parameters(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes of what a model stores, by name; and second names of tied ones, with the first."""
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            shapes[name] = tuple(tensor.shape)
    return shapes, tied
