"""What LoRA, QLoRA and DoRA have in common: their fields, their targets and PEFT's files.

A method file adds what is its own; it does not subclass another method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from ftune.methods._vitals import update_vitals
from ftune.methods.adapter_files import load_peft, save_peft
from ftune.methods.adapters import attach, disable_adapter, merge_peft, peft_settings
from ftune.methods.base import Method
from ftune.methods.quantization import Quantization, quantization_failure, quantization_line, quantization_vitals
from ftune.methods.saved_bytes import lean_saved_bytes, lean_saved_copies
from ftune.methods.targets import different, match_targets, target_problems
from ftune.methods.types import Context, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["LowRank"]


class LowRank(Method):
    """Fields and verbs of every method that adds ``scale * B A`` to a frozen matrix through PEFT."""

    rank: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float | None = Field(None, gt=0, description="Scale of the update is alpha / rank. Default: 2 x rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update.")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear, a list of module names (a suffix is enough: q_proj), or a regular expression "
        "matched against the whole name.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).")
    quantization: Quantization | None = Field(None, description="Keep the frozen base weights in 4 bits.")

    @property
    def scaled_alpha(self) -> float:
        """The alpha in force: as written, or twice the rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def resolved(self) -> Self:
        """With alpha written out."""
        return self.model_copy(update={"alpha": self.scaled_alpha})

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield target lists that cannot match anything."""
        yield from target_problems(self.target_modules)

    def lora_settings(self) -> dict[str, Any]:
        """Keyword arguments of ``peft.LoraConfig`` that are this method's own."""
        return {}

    def trained_whole(self, model: nn.Module) -> dict[str, Any]:
        """Keyword arguments of ``peft.LoraConfig`` that name modules to train whole, beside the updates."""
        return {}

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Freeze the base and attach ``A`` and ``B`` in fp32 to every target.

        Raises:
            ModelError: A target matches no linear projection inside the blocks.
        """
        from peft import LoraConfig

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.scaled_alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            **self.lora_settings(),
            **self.trained_whole(model),
            **peft_settings(model, self.target_modules, context),
        )
        return attach(model, config, context)

    def lean(self, model: nn.Module, context: Context) -> dict[str, int]:
        """And the adapted projections."""
        from ftune.methods._lean_low_rank import lean_low_rank

        return super().lean(model, context) | {"low_rank": lean_low_rank(model, context.dtype)}

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``."""
        save_peft(model, out, context)

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved PEFT adapter, frozen."""
        return load_peft(base, directory)

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """PEFT's own switch: the base computes alone."""
        return disable_adapter(model)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Add the update to the weights it was trained against, dequantized first where they are 4-bit."""
        return merge_peft(model)

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How many projections are adapted, how large B became, and what is 4-bit."""
        return update_vitals(model, optimizer) | quantization_vitals(model)

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """A B that is still zero, or a base that should be 4-bit and is not."""
        if not vitals["lora_b_norm_min"] > 0:
            return "a matrix B is still zero, so its projection computes as the base does"
        return quantization_failure(self.quantization, vitals)

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        line = (
            f"{vitals['adapted_layers']:.0f} projections adapted, norm of B {vitals['lora_b_norm_mean']:.3g} on "
            f"average, at least {vitals['lora_b_norm_min']:.3g}"
        )
        if idle := vitals.get("idle_layers"):
            line += f", {idle:.0f} more without effect on this base"
        return line + quantization_line(vitals)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """``rank * (in + out)`` for each target."""
        return sum(
            self.rank * (linear.in_features + linear.out_features)
            for linear in match_targets(shape.linears, self.target_modules)
        )

    def saved_bytes(self, shape: ModelShape, dtype_bytes: int) -> int:
        """A and B as they were computed with: cast, or in fp32 A below that of its neighbours."""
        targets = match_targets(shape.linears, self.target_modules)
        return 0 if self.dropout else lean_saved_copies(targets, self.rank, dtype_bytes)

    def products(self, shape: ModelShape) -> int:
        """With A and with B: forwards, and for the gradients of each and of what it is multiplied with."""
        return 6 * different(match_targets(shape.linears, self.target_modules))

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """``xA``, and inputs that no norm or gate makes again, in the dtype the model computes in.

        With dropout every projection keeps its dropped input and the mask.
        """
        targets = match_targets(shape.linears, self.target_modules)
        if self.dropout:
            inputs = sum(linear.in_features for linear in targets)
            return inputs * (2 * dtype_bytes) + sum(self.rank for _ in targets) * dtype_bytes
        return lean_saved_bytes(shape, targets, self.rank, dtype_bytes)
