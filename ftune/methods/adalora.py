"""AdaLoRA: a low-rank update in the form of an SVD, its rank shared out among the matrices while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field

from ftune.errors import ModelError
from ftune.methods._adalora_layers import adalora_layers, allocator_of, config_of, ranks_of
from ftune.methods.adapter_files import load_peft, save_peft
from ftune.methods.adapters import attach, disable_adapter, merge_peft, peft_settings
from ftune.methods.base import Method
from ftune.methods.quantization import Quantization, quantization_failure, quantization_line, quantization_vitals
from ftune.methods.saved_bytes import lean_saved_bytes, lean_saved_copies, low_rank_saved_bytes
from ftune.methods.targets import different, match_targets, target_problems
from ftune.methods.types import Context, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["AdaLora"]


class AdaLora(Method):
    """Train ``B diag(E) A`` beside each frozen matrix and prune it where it matters least (Zhang et al.).

    A run has three phases (sec. 3.3): every triplet of singular value and vectors trains; the budget of triplets
    falls from ``init_rank`` to ``target_rank`` for each matrix by a cubic schedule, and the least important of the
    whole model are set to zero; what is left trains on.
    """

    paper: ClassVar[str] = "arXiv:2303.10512"
    summary: ClassVar[str] = "LoRA whose rank moves to the matrices that need it"
    formula: ClassVar[str] = "h = W x + (alpha/r) B diag(E) A x, with ||E||_0 shared out over all matrices"
    typical_share: ClassVar[str] = "0.2-1 %"
    choose: ClassVar[str] = "A tight budget of parameters, and a run long enough (hundreds of steps) to learn where."
    avoid: ClassVar[str] = "Short runs, and runs that will go on later: the schedule needs to know where it ends."
    cost: ClassVar[str] = "LoRA at init_rank with 28 instead of 16 bytes of state a parameter, and its file size."
    evidence: ClassVar[str] = (
        ".373 in PEFT's comparison (GSM8K, one seed; LoRA .478): slow to learn, so that few updates or a low rate "
        "leave it at the base."
    )
    composes: ClassVar[str] = (
        "4-bit bases, packing, checkpointing, processes; merges exactly, converts to LoRA exactly."
    )
    default_learning_rate: ClassVar[float] = 1e-3
    # By a study of 60 updates (docs/compare.md), where the best rate was 1.3e-2, and 4e-3 was too low.
    few_updates_factor: ClassVar[float] = 15.0
    quantizable: ClassVar[bool] = True
    as_lora: ClassVar[Literal["already", "exact", "approximate"] | None] = "exact"
    replayable: ClassVar[bool] = True

    name: Literal["adalora"] = Field("adalora", description="Adaptive low-rank adaptation.")
    target_rank: int = Field(8, ge=1, description="Mean rank of the updates at the end of the run.")
    init_rank: int = Field(12, ge=2, description="Rank of every update at its start; the paper's is 1.5 x target_rank.")
    alpha: float | None = Field(None, gt=0, description="Scale is alpha / init_rank. Default: 2 x init_rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update.")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear, a list of module names (a suffix is enough: q_proj), or a regular expression "
        "matched against the whole name.",
    )
    init_warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of the updates before the first pruning; at least one update."
    )
    final_warmup: float = Field(
        0.3, ge=0, lt=1, description="Share of the updates after the last pruning; at least one update."
    )
    allocate_every: int = Field(
        1, ge=1, description="Updates between two prunings; between them what was pruned may grow back."
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="Decay of the average importance of a weight.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Decay of the average uncertainty of that importance.")
    orthogonal_weight: float = Field(
        0.5, ge=0, description="Weight of the penalty that keeps the singular vectors orthonormal."
    )
    quantization: Quantization | None = Field(None, description="Keep the frozen base weights in 4 bits.")

    @property
    def scaled_alpha(self) -> float:
        """The alpha in force: as written, or twice the initial rank, by which PEFT divides to the end."""
        return self.alpha if self.alpha is not None else 2.0 * self.init_rank

    def resolved(self) -> Self:
        """With alpha written out."""
        return self.model_copy(update={"alpha": self.scaled_alpha})

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Updates before the first and after the last pruning.

        Each is at least one: before the first update every singular value is zero and none more important than
        another, and what is left after the last pruning must train on as it is.
        """
        return max(1, round(self.init_warmup * total_steps)), max(1, round(self.final_warmup * total_steps))

    # --- refusals ---

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield a budget that does not fall, phases that leave no room, and targets that cannot match."""
        yield from target_problems(self.target_modules)
        if self.init_rank <= self.target_rank:
            yield Problem(
                ("method", "init_rank"),
                f"init_rank {self.init_rank} is not above target_rank {self.target_rank}: nothing would be pruned",
                f"the paper starts at 1.5 x target_rank: {self.target_rank * 3 // 2 + self.target_rank % 2}",
            )
        if self.init_warmup + self.final_warmup >= 1:
            yield Problem(
                ("method", "final_warmup"),
                f"init_warmup {self.init_warmup} and final_warmup {self.final_warmup} leave no update to prune in",
                "their sum must stay below 1",
            )

    def engine_problems(self, recipe: RecipeView, engine: str) -> Iterator[Problem]:
        """Yield DeepSpeed: importance is read off gradients after the update."""
        yield from super().engine_problems(recipe, engine)
        if engine.startswith("deepspeed"):
            yield Problem(
                ("method", "name"),
                "importance scores read the gradients of an update after it, and DeepSpeed has dropped them by then",
                "use --engine fsdp2, or ddp",
            )

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield runs too short for the three phases, and matrices too small for the rank."""
        total = context.total_steps
        first, last = self.phases(total)
        if first + last >= total:
            yield Problem(
                ("training",),
                f"the run has {total} update{'s' * (total != 1)}; adalora takes {first} before it prunes and {last} "
                "after, and at least one between",
                "train for more updates, or lower init_warmup or final_warmup",
            )
        elif (total - last) // self.allocate_every <= first // self.allocate_every:
            yield Problem(
                ("method", "allocate_every"),
                f"adalora prunes from update {first + 1} to {total - last} of {total}, and allocate_every "
                f"{self.allocate_every} has no multiple there",
                "set `allocate_every: 1`, or train for more updates",
            )
        for linear in match_targets(shape.linears, self.target_modules):
            if self.init_rank > min(linear.in_features, linear.out_features):
                yield Problem(
                    ("method", "init_rank"),
                    f"init_rank {self.init_rank} exceeds the size of {linear.name} "
                    f"({linear.in_features} x {linear.out_features}): so many vectors cannot be orthogonal",
                    f"use init_rank {min(linear.in_features, linear.out_features)} or less, or leave it out of "
                    "target_modules",
                )
                return

    # --- building ---

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Freeze the base and attach ``A``, ``B`` and ``E = 0`` in fp32 to every target.

        Raises:
            ModelError: A target matches no linear projection, or the run is too short to prune in.
        """
        from peft import AdaLoraConfig

        first, last = self.phases(context.total_steps)
        if first + last >= context.total_steps:
            raise ModelError(f"a run of {context.total_steps} updates is too short for adalora's three phases")
        config = AdaLoraConfig(
            init_r=self.init_rank,
            target_r=self.target_rank,
            lora_alpha=cast(int, self.scaled_alpha),
            lora_dropout=self.dropout,
            tinit=first,
            tfinal=last,
            deltaT=self.allocate_every,
            total_step=context.total_steps,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orthogonal_weight,
            **peft_settings(model, self.target_modules, context),
        )
        adapted = self._hold_scale(attach(model, config, context))
        allocator_of(adapted).allocations = 0
        return adapted

    def lean(self, model: nn.Module, context: Context) -> dict[str, int]:
        """And the adapted projections."""
        from ftune.methods._lean_low_rank import lean_adalora

        return super().lean(model, context) | {"low_rank": lean_adalora(model, context.dtype)}

    def _hold_scale(self, model: nn.Module) -> nn.Module:
        """Keep what PEFT divides by at the initial rank.

        On a 16-bit base it rounds this number to the base's dtype, and then makes it a trained parameter.
        """
        for layer in adalora_layers(model).values():
            layer.ranknum["default"].requires_grad_(False).fill_(self.init_rank)
        return model

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Singular values do not decay, though stored as matrices of one column: pruning alone takes them to zero."""
        return "lora_E" not in name and super().decays(name, parameter)

    # --- in the loop ---

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The orthogonality of all singular vectors; PEFT adds its own only where it computes the loss itself."""
        from ftune.ops.adalora import orthogonality

        if self.orthogonal_weight == 0:
            return None
        layers = list(adalora_layers(model).values())
        distance = orthogonality(
            [layer.lora_A["default"] for layer in layers], [layer.lora_B["default"] for layer in layers]
        )
        return self.orthogonal_weight * distance

    def after_step(self, model: nn.Module, step: int) -> dict[str, float]:
        """Update the importance of every weight; prune to the budget of this step when pruning is due."""
        config, allocator = config_of(model), allocator_of(model)
        before = config.rank_pattern
        cast(Any, model).base_model.update_and_allocate(step)
        if config.rank_pattern is not before:
            allocator.allocations += 1
            # PEFT saves the names without the adapter's, and accepts both.
            config.rank_pattern = {name.removesuffix(".default"): kept for name, kept in config.rank_pattern.items()}
        return {"budget": float(allocator.budget_schedule(step)[0]), "ranks": float(sum(ranks_of(model)))}

    def at_rest(self, model: nn.Module) -> frozenset[str]:
        """The triplets of matrices whose whole update is pruned: their singular values are held at zero."""
        pruned = {
            name.removesuffix(".lora_E")
            for name, kept in (config_of(model).rank_pattern or {}).items()
            if not any(kept)
        }
        return frozenset(
            f"base_model.model.{name}.{part}.default" for name in pruned for part in ("lora_A", "lora_B", "lora_E")
        )

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Ranks as the singular values have them, against the budget and by module, and how often they were pruned."""
        ranks = ranks_of(model)
        return {
            "ranks_mean": sum(ranks) / len(ranks),
            "ranks_min": float(min(ranks)),
            "ranks_max": float(max(ranks)),
            "ranks_total": float(sum(ranks)),
            "budget": float(self.target_rank * len(ranks)),
            "modules": float(len(ranks)),
            "modules_pruned": float(ranks.count(0)),
            "allocations": float(allocator_of(model).allocations),
            **{f"rank of {name}": float(rank) for name, rank in zip(adalora_layers(model), ranks, strict=True)},
        } | quantization_vitals(model)

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """No pruning, or ranks that are not the budget: with all of them left it is plain LoRA."""
        total, budget = vitals["ranks_total"], vitals["budget"]
        if not vitals["allocations"] > 0:
            return f"ranks were never allocated: {total:.0f} of {vitals['modules'] * self.init_rank:.0f} are in use"
        # Triplets of equal importance are pruned together, so the last of them may take the total just below.
        if not 0.99 * budget - 1 <= total <= budget:
            return f"the ranks add up to {total:.0f}, and the budget is {budget:.0f}"
        return quantization_failure(self.quantization, vitals)

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        line = (
            f"ranks {self.init_rank} → {vitals['ranks_mean']:.3g} on average over {vitals['modules']:.0f} projections "
            f"({vitals['ranks_min']:.0f} to {vitals['ranks_max']:.0f}), {vitals['ranks_total']:,.0f} of a budget of "
            f"{vitals['budget']:,.0f}"
        )
        return line + quantization_line(vitals)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages of importance and uncertainty, which triplets are kept, and how often that was decided."""
        import torch

        allocator, pattern = allocator_of(model), config_of(model).rank_pattern or {}
        return (
            {f"importance.{name}": value for name, value in allocator.exp_avg_ipt.items()}
            | {f"uncertainty.{name}": value for name, value in allocator.exp_avg_unc.items()}
            | {f"kept.{name}": torch.tensor(kept) for name, kept in pattern.items()}
            | {"allocations": torch.tensor(allocator.allocations)}
        )

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore the averages and the kept triplets; the singular values themselves are trained parameters."""
        import torch

        config, allocator = config_of(model), allocator_of(model)
        found: dict[str, dict[str, Tensor]] = {"importance": {}, "uncertainty": {}, "kept": {}}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if name:
                found[kind][name] = value
        inner = cast(Any, model).base_model.model
        averages = {
            kind: {name: value.to(inner.get_parameter(name).device) for name, value in found[kind].items()}
            for kind in ("importance", "uncertainty")
        }
        allocator.exp_avg_ipt, allocator.exp_avg_unc = averages["importance"], averages["uncertainty"]
        # Each update computes it anew; but where it is missing, PEFT begins the averages at zero.
        allocator.ipt = {name: torch.zeros_like(value) for name, value in allocator.exp_avg_ipt.items()}
        config.rank_pattern = {name: kept.tolist() for name, kept in found["kept"].items()} or None
        allocator.allocations = int(state["allocations"])

    # --- what it leaves behind ---

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter of rank ``init_rank``, whose pruned triplets have the singular value zero.

        Without PEFT's rank pattern: from a file that has one, PEFT warns of keys that match nothing, rounds what it
        loads to the dtype of the base, and between two prunings leaves out what has grown back.
        """
        config = config_of(model)
        pattern, config.rank_pattern = config.rank_pattern, None
        try:
            save_peft(model, out, context)
        finally:
            config.rank_pattern = pattern

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved PEFT adapter, frozen."""
        return self._hold_scale(load_peft(base, directory))

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """PEFT's own switch: the base computes alone."""
        return disable_adapter(model)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Add the update to the weights it was trained against, dequantized first where they are 4-bit."""
        return merge_peft(model)

    def to_lora(self, model: nn.Module, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Singular values and PEFT's scale folded into ``A``; each update at the rank that is left to it."""
        from ftune.ops.adalora import low_rank_factors

        return {
            name: low_rank_factors(
                layer.lora_A["default"].float(),
                layer.lora_E["default"].float(),
                layer.lora_B["default"].float(),
                # As PEFT computes it.
                layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5),
                rank,
            )
            for name, layer in adalora_layers(model).items()
        }

    # --- arithmetic ---

    def trainable_parameters(self, shape: ModelShape) -> int:
        """``init_rank * (in + out + 1)`` for each target; pruned triplets keep their place until the end."""
        return sum(
            self.init_rank * (linear.in_features + linear.out_features + 1)
            for linear in match_targets(shape.linears, self.target_modules)
        )

    def optimizer_bytes(self, shape: ModelShape, optimizer: str) -> int:
        """The optimizer's, and three fp32 values a parameter: its importance and the averages of it."""
        return super().optimizer_bytes(shape, optimizer) + 12 * self.trainable_parameters(shape)

    def products(self, shape: ModelShape) -> int:
        """As LoRA's: with ``diag(E) A`` and with B, forwards and for two gradients each."""
        return 6 * different(match_targets(shape.linears, self.target_modules))

    def saved_bytes(self, shape: ModelShape, dtype_bytes: int) -> int:
        """``diag(E) A`` in fp32, with dropout in the compute dtype; copies of A and B that are computed with."""
        targets = match_targets(shape.linears, self.target_modules)
        if not self.dropout:
            scaled = 4 * self.init_rank * sum(linear.in_features for linear in targets)
            return scaled + lean_saved_copies(targets, self.init_rank, dtype_bytes)
        sizes = sum(linear.in_features + (linear.out_features if dtype_bytes < 4 else 0) for linear in targets)
        return self.init_rank * sizes * dtype_bytes

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """As LoRA's at ``init_rank``: the product with ``diag(E) A``, and inputs; with dropout all of them."""
        if not self.dropout:
            targets = match_targets(shape.linears, self.target_modules)
            return lean_saved_bytes(shape, targets, self.init_rank, dtype_bytes)
        return low_rank_saved_bytes(shape.linears, self.target_modules, self.init_rank, dtype_bytes)
