"""Merging a model larger than memory: one tensor at a time, from the base's files to the merged model's.

The whole model is never there, so its logits cannot be compared. What stands in for that: every adapted layer
computes random inputs with its adapter, as it was trained, and with the weight that is written; and every tensor
is read back from the disk. What that does not show is said in ``merge.json``.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftune.artifacts.divergence import in_fp32
from ftune.artifacts.stops import saved_stops, write_generation_config
from ftune.artifacts.tensor_files import check_shards, plan_shards, write_shards
from ftune.artifacts.tuned import Target, put_target
from ftune.errors import FtuneError, ModelError, RunFailed
from ftune.human import bytes_text
from ftune.methods import Context
from ftune.methods.layer_by_layer import as_quantized, is_adapted, outputs
from ftune.methods.scaled import interpolated
from ftune.methods.targets import list_linears
from ftune.plan.base_model import choose_device, load_tokenizer
from ftune.plan.precision import choose_dtype
from ftune.plan.resolve import context_of
from ftune.plan.stored import IN_MEMORY, StoredWeights, base_files, find_weights, hollow_base
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import Recipe
from ftune.run.files import new_directory, write_json, write_text

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["merge_by_shard"]

SHARD_BYTES = 4_000_000_000
PROBES = 8  # random inputs of each adapted layer
MAX_LAYER_ERROR_FP32 = 1e-4
"""Largest error of a layer's output, as a share of it, that summation order explains (measured: 1e-6)."""
MAX_LAYER_ERROR_ROUNDED = 2.0**-7
"""The same where weights are rounded to bfloat16: each by at most a share of 2^-9 (measured: 2e-3)."""
_NOT_VERIFIED = "the logits of the whole model, which was never in memory as a whole"


@dataclass
class _Verified:
    """How far written layers are from tuned ones, over their outputs for random inputs.

    Attributes:
        layers: Adapted layers compared.
        merge_error: Largest relative error in fp32, before rounding.
        written_error: Largest relative error of a layer as written.
        squares: Of the tuned outputs, and of their distances to the written and to the base layer's.
    """

    layers: int = 0
    merge_error: float = 0.0
    written_error: float = 0.0
    squares: dict[str, float] = field(default_factory=lambda: {"tuned": 0.0, "written": 0.0, "base": 0.0})

    def add(self, tuned: Tensor, base: Tensor, merged: Tensor, written: Tensor) -> None:
        size = float(tuned.norm()) or 1.0
        self.layers += 1
        # max() would let a NaN pass where it stands second.
        for error in (merged, written):
            if not bool(torch.isfinite(error).all()):
                raise RunFailed("a merged layer computes numbers that are not finite; nothing was written")
        self.merge_error = max(self.merge_error, float((merged - tuned).norm()) / size)
        self.written_error = max(self.written_error, float((written - tuned).norm()) / size)
        for key, distance in (("tuned", tuned), ("written", written - tuned), ("base", base - tuned)):
            self.squares[key] += float(distance.square().sum())

    def share(self, key: str) -> float:
        """A distance as a share of the tuned outputs, over all layers."""
        return math.sqrt(self.squares[key] / (self.squares["tuned"] or 1.0))

    def judge(self, dtype: torch.dtype, adapter: bool) -> None:
        """Fail unless what is written computes as what was trained, up to rounding to its dtype."""
        if adapter and not self.layers:
            raise RunFailed("no layer of the base is adapted by what was trained; nothing was written")
        if not self.merge_error <= MAX_LAYER_ERROR_FP32:
            raise RunFailed(
                f"the merged weights are not those that were trained: in fp32 a layer's output is off by a share of "
                f"{self.merge_error:.3g} (at most {MAX_LAYER_ERROR_FP32:g} is rounding); nothing was written"
            )
        bound = MAX_LAYER_ERROR_FP32 if dtype == torch.float32 else MAX_LAYER_ERROR_ROUNDED
        if not self.written_error <= bound:
            raise RunFailed(
                f"rounded to {dtype}, a layer's output is off by a share of {self.written_error:.3g} (at most "
                f"{bound:.2g} is rounding); nothing was written",
                help="--dtype float32 keeps it exact",
            )
        if self.squares["base"] > 0 and self.squares["written"] >= self.squares["base"]:
            raise RunFailed(
                f"rounded to {dtype}, the merged layers are no closer to the tuned ones ({self.share('written'):.3g} "
                f"of their outputs) than the base's are ({self.share('base'):.3g}); nothing was written",
                help="--dtype float32 keeps what was trained",
            )


def merge_by_shard(target: Target, where: Path, dtype: str | None, *, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Merge a run without ever holding its model.

    Args:
        target: A run of a method that merges.
        where: Where to write, known to be writable.
        dtype: ``float32`` or ``bfloat16``; None: what the run computed in.
        shard_bytes: Largest file written, unless one tensor is larger.

    Returns:
        The report, as ``merge.json`` has it.

    Raises:
        ModelError: The base's files do not hold the model's parameters one by one.
        FtuneError: The disk has no room, or the checkpoint cannot be put onto a model without weights.
        RunFailed: A merged layer does not compute as the trained one, or does not read back from the disk.
    """
    recipe, run = target.recipe, target.run
    assert run is not None
    method, device = recipe.method, choose_device()
    if target.checkpoint is not None and (method.artifact == "model" or method.takes_from_base):
        raise FtuneError(
            f"this checkpoint of `{method.name}` cannot be merged shard by shard: it is no adapter to its base",
            help=IN_MEMORY,
        )
    computed = choose_dtype(recipe.model.dtype, device)
    saved: torch.dtype = getattr(torch, dtype) if dtype else computed
    steps = run.read()["plan"]["training"]["steps"]
    context = replace(context_of(recipe, device, computed), device=torch.device("cpu"), total_steps=steps)
    model: Any = hollow_base(recipe.model, method)
    adapter = method.artifact == "adapter"
    if not adapter:
        artifact = run.artifact(recipe)
        trained = find_weights(sorted(artifact.glob("*.safetensors")), model, str(artifact))
    if adapter or target.scale < 1:
        files = base_files(recipe.model, method.base_dtype(computed))
        base = find_weights(files, model, f"the checkpoint of `{recipe.model.id}`")
    stored = base if adapter else trained
    merger = _Merger(target, stored, base if target.scale < 1 else None, model, context, device, saved)
    merger.require_weights()
    _require_room(where, stored.parameters * saved.itemsize)
    _require_tied(stored)

    shards = plan_shards(stored.shapes, saved.itemsize, shard_bytes)
    with new_directory(where) as aside:
        digests = write_shards(aside, shards, saved, merger.tensor)
        verified = merger.verified
        verified.judge(saved, adapter)
        check_shards(aside, shards, saved, digests)
        _save_configuration(model, recipe, aside, saved)
        tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
        tokenizer.save_pretrained(str(aside))
        write_generation_config(aside, model, tokenizer, saved_stops(run, recipe, tokenizer))
        report = {
            "out": str(where),
            "checkpoint": target.checkpoint.name if target.checkpoint else None,
            "scale": target.scale,
            "dtype": str(saved).removeprefix("torch."),
            "by_shard": True,
            "shards": len(shards),
            "tensors": len(digests),
            "layers_compared": verified.layers,
            "inputs_a_layer": PROBES,
            "merge_error": verified.merge_error,
            "written_vs_adapter": {"largest": verified.written_error, "overall": verified.share("written")},
            "base_vs_adapter": {"overall": verified.share("base")},
            "verified": [
                f"{verified.layers} adapted layers, written against tuned, on {PROBES} random inputs each",
                f"{len(digests)} tensors read back from the disk: name, shape, dtype and SHA-256",
            ],
            "not_verified": [_NOT_VERIFIED],
            "bytes": sum(path.stat().st_size for path in aside.glob("*.safetensors")),
        }
        write_json(aside / "merge.json", report)
    return report


class _Merger:
    """Makes each merged tensor by name, and compares each adapted layer as it goes by."""

    def __init__(
        self,
        target: Target,
        stored: StoredWeights,
        base: StoredWeights | None,
        model: nn.Module,
        context: Context,
        device: torch.device,
        saved: torch.dtype,
    ) -> None:
        self.verified = _Verified()
        self._method, self._stored, self._base, self._saved = target.recipe.method, stored, base, saved
        self._base_dtype, self._computed, self._device = self._method.base_dtype(context.dtype), context.dtype, device
        quantized = list_linears(model) if self._method.base_quantization else ()
        self._quantized = {f"{linear.name}.weight" for linear in quantized if linear.quantizable}
        self._scale = target.scale
        self._tuned = in_fp32(put_target(model, target, context)) if self._method.artifact == "adapter" else model
        self._random = torch.Generator().manual_seed(0)
        self._rest: dict[str, Tensor] = {}

    def require_weights(self) -> None:
        """Hold that every weight that changes is in the files as the model has it.

        Raises:
            ModelError: transformers makes it of other tensors.
        """
        adapter = self._method.artifact == "adapter"
        known = self._base.shapes if self._base is not None else self._stored.shapes
        unknown = self._stored.absent if adapter else [name for name in self._stored.shapes if name not in known]
        for name in unknown:
            if not adapter or self._changes(name.rpartition(".")[0]):
                raise ModelError(
                    f"the base's files do not hold `{name}` as one tensor: transformers makes it of others as it "
                    "loads them",
                    help=IN_MEMORY,
                )

    def tensor(self, name: str) -> Tensor:
        """A merged tensor in the dtype that is saved."""
        if name in self._rest:
            return self._rest.pop(name)
        module, _, leaf = name.rpartition(".")
        if name in self._stored.converted or not (self._method.artifact == "adapter" and self._changes(module)):
            # As it was trained against: in the dtype of the base.
            tensor = self._stored.read(name).to(self._base_dtype)
            if self._base is not None and self._method.artifact == "model":
                tensor = interpolated(self._base.read(name).to(self._base_dtype), tensor, self._scale)
            return tensor.to(self._saved)
        leaves = [key for key in self._stored.shapes if key.rpartition(".")[0] == module]
        weights = {key.rpartition(".")[2]: self._as_trained(key) for key in leaves}
        merged = self._method.merge_layer(self._tuned, module, weights)
        if self._scale < 1:
            merged = {key: interpolated(weights[key], tensor, self._scale) for key, tensor in merged.items()}
        rounded = {key: tensor.to(self._saved) for key, tensor in merged.items()}
        if is_adapted(self._tuned, module):
            self._compare(module, weights, merged, rounded)
        # A bias comes with its weight, whichever file it is in; it is small.
        self._rest = {f"{module}.{key}": tensor for key, tensor in rounded.items() if key != leaf}
        return rounded[leaf]

    def _changes(self, module: str) -> bool:
        from peft.utils import ModulesToSaveWrapper

        if is_adapted(self._tuned, module) or f"{module}.weight" in self._quantized:
            return True
        inner: Any = self._tuned
        return isinstance(inner.get_base_model().get_submodule(module), ModulesToSaveWrapper)

    def _as_trained(self, name: str) -> Tensor:
        weight = self._stored.read(name).to(self._base_dtype)
        if name in self._quantized:
            quantization = self._method.base_quantization
            assert quantization is not None
            return as_quantized(weight, quantization, self._computed, self._device)
        return weight.float()

    def _compare(
        self, module: str, weights: dict[str, Tensor], merged: dict[str, Tensor], rounded: dict[str, Tensor]
    ) -> None:
        layer: Any = self._tuned
        inputs_BN = torch.randn(
            PROBES, layer.get_base_model().get_submodule(module).in_features, generator=self._random
        )
        written = {key: tensor.float() for key, tensor in rounded.items()}
        tuned, base, (exact, found) = outputs(self._tuned, module, weights, [merged, written], inputs_BN)
        self.verified.add(base.lerp(tuned, self._scale) if self._scale < 1 else tuned, base, exact, found)


def _require_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise FtuneError(
            f"the merged model takes {bytes_text(needed)}, and {target.parent} has {bytes_text(free)} left",
            help="choose another --out, or --dtype bfloat16",
        )


def _require_tied(stored: StoredWeights) -> None:
    """Hold that a second name of a tied tensor, where the file has both, is a copy: only the first is written."""
    for name, kept in stored.tied.items():
        if name in stored.places and not torch.equal(stored.read(name), stored.read(kept)):
            raise FtuneError(
                f"`{name}` and `{kept}` are tied in the model's configuration and differ in its files",
                help="correct `tie_word_embeddings` in config.json",
            )


def _save_configuration(model: Any, recipe: Recipe, out: Path, dtype: torch.dtype) -> None:
    """Write what stands beside the weights of a transformers model."""
    from transformers import GenerationConfig

    config = model.config
    config.architectures, config.dtype, config.use_cache = [type(model).__name__], dtype, True
    config.save_pretrained(str(out))
    located = locate_model(recipe.model)
    # Where the base has none, the one that transformers derives from the configuration.
    generation = model.generation_config
    read: Callable[..., Any] = GenerationConfig.from_pretrained
    if not located.gguf_file:
        try:
            generation = read(located.path_or_id, revision=located.revision)
        except OSError:
            pass
    if generation is not None:
        write_text(out / "generation_config.json", generation.to_json_string(use_diff=True))
