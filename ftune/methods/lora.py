"""LoRA: a low-rank update beside frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftune.methods._low_rank import LowRank
from ftune.methods.adapter_files import difference_settings, save_peft
from ftune.methods.adapters import adapter_state, require_same_initial
from ftune.methods.optimizer import OptimizerSpec
from ftune.methods.types import Context, Problem, RecipeView

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Lora"]


class Lora(LowRank):
    """Train ``B A`` of rank r beside each frozen matrix (Hu et al., arXiv:2106.09685)."""

    aliases: ClassVar[tuple[str, ...]] = ("rslora", "lora+", "loraplus", "pissa")
    paper: ClassVar[str] = "arXiv:2106.09685"
    summary: ClassVar[str] = "a low-rank update beside each frozen matrix"
    formula: ClassVar[str] = "h = W x + (alpha/r) B A x"
    typical_share: ClassVar[str] = "0.1-1 %"
    choose: ClassVar[str] = "First. It is the yardstick: well understood, cheap, and served by every inference engine."
    avoid: ClassVar[str] = "When the task is far from what the base knows: then full fine-tuning or GaLore learn more."
    cost: ClassVar[str] = "The yardstick: 16 bytes of state for each trained parameter, a few MB a file."
    evidence: ClassVar[str] = (
        "Matches most of its variants once its own rate is tuned: arXiv:2601.22708; nine variants within 1 to 2 %: "
        "arXiv:2602.04998. .478 to .513 in PEFT's comparison (GSM8K, one seed)."
    )
    composes: ClassVar[str] = "4-bit bases, packing, checkpointing, rsLoRA, LoRA+, PiSSA, OLoRA; merges exactly."
    as_lora: ClassVar[Literal["already", "exact", "approximate"] | None] = "already"
    quantizable: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    name: Literal["lora"] = Field("lora", description="Low-rank adaptation.")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        "default",
        description="Start of A and B. pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) take them out of the "
        "base weights; the saved adapter is converted to one of rank 2r that fits the untouched base.",
    )
    lora_plus_ratio: float | None = Field(
        None,
        gt=0,
        description="Learning rate of B over that of A (LoRA+, arXiv:2402.12354; 16 in the paper).",
    )

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield initialisations that cannot work on 4-bit weights or at an odd rank."""
        yield from super().problems(recipe)
        if self.takes_from_base and self.quantization:
            yield Problem(
                ("method", "init"),
                f"`init: {self.init}` decomposes the base weights, which are quantized here",
                "use `init: default`, or leave out `quantization`",
            )
        if self.init == "orthogonal" and self.rank % 2:
            yield Problem(("method", "rank"), "`init: orthogonal` needs an even rank", f"use {self.rank + 1}")

    @property
    def takes_from_base(self) -> bool:
        """PiSSA and OLoRA do."""
        return self.init in ("pissa", "olora")

    def lora_settings(self) -> dict[str, Any]:
        """The initialisation, in PEFT's words."""
        return {"init_lora_weights": True if self.init == "default" else self.init}

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Attach A and B; remember where they started when they were taken out of the base."""
        adapted = super().adapt(model, context)
        if self.takes_from_base:
            # Buffers of the Python object, not of the module: they are no part of any state_dict.
            object.__setattr__(adapted, "_ftune_initial", adapter_state(adapted))
        return adapted

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """AdamW; with LoRA+ the B matrices form groups of their own with a higher rate."""
        if self.lora_plus_ratio is None:
            return super().optimizer(model, spec)
        from ftune.methods.optimizer import build_optimizer

        rate = spec.learning_rate or self.default_learning_rate
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for name, p in named if is_b == ("lora_B" in name)],
                "lr": lr,
                "weight_decay": decay,
            }
            for is_b, lr, decay in [
                (False, rate, spec.weight_decay),
                (True, rate * self.lora_plus_ratio, spec.weight_decay),
            ]
        ]
        return build_optimizer(groups, spec)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The starting A and B of PiSSA and OLoRA, without which the saved adapter cannot be converted."""
        initial: dict[str, Tensor] = getattr(model, "_ftune_initial", {})
        return {f"initial.{key}": value for key, value in initial.items()}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Check that the base was decomposed as before: the frozen residual must be the same."""
        require_same_initial(model, state)

    def stored_settings(self, config: Any) -> dict[str, Any]:
        """Of rank 2r where A and B were taken out of the base."""
        return difference_settings(config) if self.takes_from_base else {}

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter that fits the untouched base."""
        save_peft(model, out, context, initial=getattr(model, "_ftune_initial", None))
