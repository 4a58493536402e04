"""Bottleneck adapters: small non-linear layers behind the projections of each block."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field

from ftune.errors import ModelError
from ftune.methods.base import Method
from ftune.methods.targets import list_linears
from ftune.methods.types import Context, Linear, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["Bottleneck"]

FORMAT = "ftune-bottleneck"
FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME = "ftune_adapter.json", "adapter_model.safetensors"

DEFAULT_REDUCTION = 16

# The last projection of each sublayer, as transformers names it: llama and its kin, gpt2, opt, phi, gpt_neox, falcon.
ATTENTION = re.compile(r".*\b(attn|self_attn|attention|self_attention)\.(o_proj|out_proj|c_proj|dense)")
FEED_FORWARD = re.compile(r".*\.(mlp\.(down_proj|c_proj|fc2|fc_out|dense_4h_to_h)|fc2)")


def find_positions(linears: Sequence[Linear], hidden: int, layers: int, variant: str, model_type: str) -> list[str]:
    """Names of the projections that get an adapter behind them.

    Args:
        linears: The base model's projections.
        hidden: Width of the residual stream, to which each of them must write.
        layers: Blocks; each must have exactly one projection of a kind.
        variant: ``houlsby``: attention's and the feed-forward's last; ``pfeiffer``: the feed-forward's alone.
        model_type: The architecture, for the error.

    Raises:
        ModelError: Some block has none, or several.
    """
    kinds = {"the feed-forward's last projection": FEED_FORWARD}
    if variant == "houlsby":
        kinds["attention's output projection"] = ATTENTION
    found: set[str] = set()
    for kind, pattern in kinds.items():
        names = [linear.name for linear in linears if pattern.fullmatch(linear.name) and linear.out_features == hidden]
        if len(names) != layers:
            raise ModelError(
                f"{model_type}: {kind} was found {len(names)} times in {layers} blocks, so there is no place for "
                "bottleneck adapters",
                help="use `method: lora`, which takes any linear layer",
            )
        found.update(names)
    return [linear.name for linear in linears if linear.name in found]


class Bottleneck(Method):
    """Train small layers behind each block's projections (Houlsby et al., arXiv:1902.00751)."""

    aliases: ClassVar[tuple[str, ...]] = ("adapters", "houlsby", "pfeiffer")
    paper: ClassVar[str] = "arXiv:1902.00751"
    summary: ClassVar[str] = "small non-linear layers inside each block"
    formula: ClassVar[str] = "h = W x + W_up f(W_down W x)"
    typical_share: ClassVar[str] = "0.5-2 %"
    choose: ClassVar[str] = (
        "For non-linear updates, or beside older adapter work; pfeiffer is half as large as houlsby."
    )
    avoid: ClassVar[str] = (
        "When answers must come as fast as the base's: it cannot be merged, so every token pays for it."
    )
    cost: ClassVar[str] = (
        "LoRA's state for the same parameters, a longer backward path, and two matrices more a sublayer."
    )
    evidence: ClassVar[str] = (
        "Close to full fine-tuning in its paper (arXiv:1902.00751, sec. 3); not in PEFT's comparison."
    )
    composes: ClassVar[str] = (
        "Packing, checkpointing, accumulation. Not with 4-bit bases; not mergeable; ftune's own file."
    )
    default_learning_rate: ClassVar[float] = 1e-3
    few_updates_factor: ClassVar[float] = 2.0
    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str] = "its layers are non-linear, so no weight of the base can hold them"
    not_lora_because: ClassVar[str] = "its layers are non-linear: no low-rank matrix computes the same"
    saved_as: ClassVar[Literal["peft", "transformers", "ftune"]] = "ftune"
    replayable: ClassVar[bool] = True

    name: Literal["bottleneck"] = Field("bottleneck", description="Bottleneck adapters.")
    variant: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby",
        description="houlsby: behind attention and behind the feed-forward; pfeiffer (arXiv:2005.00247): behind the "
        "latter only.",
    )
    reduction_factor: int | None = Field(
        None, ge=1, description="Hidden width over bottleneck width. Default: 16, unless bottleneck_size is given."
    )
    bottleneck_size: int | None = Field(None, ge=1, description="Width of the bottleneck itself.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Field("gelu", description="The non-linearity.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout behind the non-linearity.")

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield a width that is given twice."""
        if self.reduction_factor is not None and self.bottleneck_size is not None:
            yield Problem(
                ("method", "bottleneck_size"),
                "`reduction_factor` and `bottleneck_size` both give the width of the bottleneck",
                "remove one",
            )

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield a reduction to less than one unit."""
        if self.size(shape.hidden) < 1:
            yield Problem(
                ("method", "reduction_factor"),
                f"`reduction_factor: {self.reduction_factor}` leaves nothing of a hidden width of {shape.hidden}",
                f"use {DEFAULT_REDUCTION}, or give `bottleneck_size`",
            )

    def resolved(self) -> Self:
        """With the reduction written out where no width is given."""
        if self.bottleneck_size is not None or self.reduction_factor is not None:
            return self
        return self.model_copy(update={"reduction_factor": DEFAULT_REDUCTION})

    def size(self, hidden: int) -> int:
        """Width of the bottleneck in a model of this hidden width."""
        return self.bottleneck_size or hidden // (self.reduction_factor or DEFAULT_REDUCTION)

    def _build(self, model: nn.Module, seed: int) -> nn.Module:
        """Freeze a base model and put adapters into it, in fp32, on the model's device."""
        import torch

        from ftune.methods._bottleneck_layer import BottleneckLayer, attach

        config = cast(Any, model).config.get_text_config()
        hidden = int(config.hidden_size)
        linears = list_linears(model)
        positions = find_positions(linears, hidden, int(config.num_hidden_layers), self.variant, config.model_type)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name in positions:
            projection = model.get_submodule(name)
            adapter = BottleneckLayer(hidden, self.size(hidden), self.activation, self.dropout, generator)
            device = next(projection.parameters()).device
            attach(projection, adapter.to(device).train(projection.training))
        return model

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Put an adapter behind every position; the model keeps its class and its parameters' names.

        Raises:
            ModelError: The architecture has no such projections.
        """
        return self._build(model, context.seed)

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How many adapters there are, and how large their W_up became, which starts at zero."""
        from ftune.methods._bottleneck_layer import bottlenecks

        norms = [float(adapter.up.weight.detach().norm()) for _, adapter in bottlenecks(model)]
        return {
            "adapters": float(len(norms)),
            "up_norm_mean": sum(norms) / max(1, len(norms)),
            "up_norm_min": min(norms, default=0.0),
        }

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """A W_up that is still zero."""
        if not vitals["up_norm_min"] > 0:
            return "a matrix W_up is still zero, so its adapter passes on what it gets"
        return None

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        return (
            f"{vitals['adapters']:.0f} {self.variant} adapters, norm of W_up {vitals['up_norm_mean']:.3g} on average, "
            f"at least {vitals['up_norm_min']:.3g}"
        )

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write the adapters' tensors and a description, both in ftune's own form: PEFT knows no such adapter."""
        from safetensors.torch import save_file

        from ftune.methods._bottleneck_layer import bottlenecks

        found = dict(bottlenecks(model))
        tensors = {
            f"{position}.{key}": tensor.detach().cpu().contiguous()
            for position, adapter in found.items()
            for key, tensor in adapter.state_dict().items()
        }
        save_file(tensors, out / WEIGHTS_NAME, metadata={"format": "pt"})
        described = self._described(model, list(found)) | {
            "base_model_name_or_path": context.base_name or None,
            "revision": context.revision,
        }
        (out / CONFIG_NAME).write_text(json.dumps(described, indent=2) + "\n")

    def _described(self, model: nn.Module, positions: list[str]) -> dict[str, Any]:
        """What must be equal where an adapter is saved and where it is loaded."""
        config = cast(Any, model).config.get_text_config()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "variant": self.variant,
            "activation": self.activation,
            "bottleneck_size": self.size(int(config.hidden_size)),
            "hidden_size": int(config.hidden_size),
            "model_type": config.model_type,
            "positions": positions,
        }

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Put saved adapters behind the projections of a base model, frozen.

        Raises:
            ModelError: The files cannot be read, or belong to another recipe, model or format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from ftune.methods._bottleneck_layer import bottlenecks

        try:
            stored = json.loads((directory / CONFIG_NAME).read_text())
            tensors = load_file(directory / WEIGHTS_NAME)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"cannot read the bottleneck adapters in {directory}: {error}") from error
        model = self._build(base, context.seed)
        found = dict(bottlenecks(model))
        for key, mine in self._described(model, list(found)).items():
            if stored.get(key) != mine:
                raise ModelError(
                    f"{directory} holds adapters with `{key}: {_brief(stored.get(key))}`, and the recipe on this "
                    f"model has {_brief(mine)}",
                    help="load them with the recipe and the base model that they were trained with",
                )
        expected = {f"{position}.{key}" for position, adapter in found.items() for key in adapter.state_dict()}
        if tensors.keys() != expected:
            raise ModelError(f"{WEIGHTS_NAME} in {directory} lacks {sorted(expected - tensors.keys())[:3]}")
        for position, adapter in found.items():
            adapter.load_state_dict({key: tensors[f"{position}.{key}"] for key in adapter.state_dict()})
        return model.requires_grad_(False)

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """Every adapter passes on what it gets."""
        from ftune.methods._bottleneck_layer import disabled

        return disabled(model)

    def _positions(self, shape: ModelShape) -> int:
        return len(find_positions(shape.linears, shape.hidden, shape.layers, self.variant, shape.model_type))

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Two matrices and two biases a position."""
        size = self.size(shape.hidden)
        return self._positions(shape) * (2 * shape.hidden * size + size + shape.hidden)

    def products(self, shape: ModelShape) -> int:
        """Of two matrices, forwards and for two gradients each, and the non-linearity's kernels."""
        return 8

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """A position keeps its input for W_down, and both sides of the non-linearity."""
        return self._positions(shape) * (shape.hidden + 2 * self.size(shape.hidden)) * dtype_bytes


def _brief(value: Any) -> str:
    """A value for a message: the first of a list, and how many there are."""
    return f"{value[0]} and {len(value) - 1} more" if isinstance(value, list) and value else repr(value)
