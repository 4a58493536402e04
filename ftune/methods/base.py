"""The Method protocol: what a fine-tuning method says of itself, and what it does.

A method is frozen recipe data plus verbs. The fields are checked without torch; the verbs import torch and peft
when they are called. Everything else in ftune (planner, loop, checkpoint, merge, evaluation) speaks to a method
through this class alone, so a new method is one file and one line in the union of ``ftune.methods``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ftune.errors import FtuneError
from ftune.methods.memory_model import MemoryModel
from ftune.methods.optimizer import OptimizerSpec, build_optimizer
from ftune.methods.types import Context, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer


__all__ = ["Method"]


class Method(MemoryModel):
    """One fine-tuning method: frozen recipe data plus the verbs acting on it.

    It has three parts: ``Description``, the verbs here, and ``MemoryModel``. A small method writes the first two, and
    ``trainable_parameters``: it adds ``name: Literal["..."]`` and its own fields.
    """

    # --- while parsing: no torch ---

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield what cannot work in this recipe because of this method."""
        yield from ()

    def engine_problems(self, recipe: RecipeView, engine: str) -> Iterator[Problem]:
        """Yield what cannot work in this recipe when ``engine`` shares the model out among processes."""
        if engine == "fsdp2-offload" and self.base_quantization:
            yield Problem(
                ("method", "quantization"),
                "4-bit weights are copied to the host and back by bitsandbytes' own rules, which was not tried",
                "use --engine fsdp2, or leave out `quantization`",
            )
        if engine.startswith("fsdp2") and self.artifact == "model" and recipe.optimizer.needs_bitsandbytes:
            yield Problem(
                ("optimizer", "name"),
                f"`{recipe.optimizer.name}` keeps its moments in blocks, which do not end where the parts of a "
                "weight do",
                "use `adamw`: under fsdp2 each process keeps a part of its moments",
            )
        if engine.startswith("deepspeed") and recipe.optimizer.needs_bitsandbytes:
            yield Problem(
                ("optimizer", "name"),
                f"`{recipe.optimizer.name}` is bitsandbytes' own, and DeepSpeed shares out the moments of plain AdamW",
                "use `adamw`: each process keeps a part of its moments",
            )

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield what cannot work on this model or in this many steps, once the plan knows both."""
        yield from ()

    def remarks(self, context: Context) -> Iterator[str]:
        """Yield what works, but perhaps not as meant: the plan prints it as warnings."""
        yield from ()

    def lighter(self) -> Iterator[tuple[str, Self]]:
        """Yield this method with settings that need less memory, and what to write for them."""
        yield from ()

    def resolved(self) -> Self:
        """This method with every derived setting written out, as ``run.json`` keeps it."""
        return self

    # --- building ---

    @property
    def takes_from_base(self) -> bool:
        """Whether ``adapt`` takes what it trains out of the base weights (PiSSA), so that it needs them."""
        return False

    def quantization_config(self, dtype: torch.dtype) -> Any | None:
        """The ``BitsAndBytesConfig`` with which the base weights are quantized, or None."""
        return self.base_quantization.config(dtype) if self.base_quantization else None

    def base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the base weights are kept while the model computes in ``dtype``."""
        return dtype

    def configure(self, config: Any) -> None:
        """Change the model's configuration before the model is built (LongLoRA's RoPE scaling)."""

    def attention(self, requested: str) -> str:
        """The attention implementation to build the model with, where the recipe asks for ``requested``."""
        return requested

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Turn a freshly loaded base model into the one that trains.

        After it, exactly the parameters this method trains require grad, in fp32.
        """
        raise NotImplementedError

    def lean(self, model: nn.Module, context: Context) -> dict[str, int]:
        """Replace layers of the adapted model by ones that compute the same and keep less; counts them by kind."""
        from ftune.methods._lean import lean_base

        return lean_base(model, context.dtype)

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """AdamW over everything that requires grad; matrices decay, vectors do not."""
        from ftune.methods._decay import undecayed

        vectors = undecayed(model)
        rate = spec.learning_rate or self.default_learning_rate
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decays = name not in vectors and self.decays(name, parameter)
                (decayed if decays else kept).append(parameter)
        groups = [
            {"params": decayed, "lr": rate, "weight_decay": spec.weight_decay},
            {"params": kept, "lr": rate, "weight_decay": 0.0},
        ]
        return build_optimizer([group for group in groups if group["params"]], spec)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay applies to a parameter: to matrices, never to norms, biases or magnitudes."""
        return parameter.ndim >= 2

    # --- in the loop ---

    @property
    def virtual_positions(self) -> int:
        """Positions of the model's context that the method takes in front of every row."""
        return 0

    @property
    def updates_in_backward(self) -> bool:
        """Whether parameters are updated while gradients are computed, and their gradients freed at once."""
        return False

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term added to the training loss once an update, never to the evaluation loss."""
        return None

    def gradient_norm(self, trained: Sequence[nn.Parameter], optimizer: Optimizer) -> float:
        """The global norm of the update's gradients, asked for after the last backward pass."""
        import torch

        from ftune.ops.sharded import whole

        return float(whole(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])))

    def after_step(self, model: nn.Module, step: int) -> dict[str, float]:
        """Act after ``optimizer.step()`` and before the gradients are cleared; returns numbers to log."""
        return {}

    def at_rest(self, model: nn.Module) -> frozenset[str]:
        """Names of trained parameters that the method holds still as the loop begins (pruned, on resuming)."""
        return frozenset()

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """Numbers that prove the method is at work, taken after evaluations and after the last update.

        They describe the whole run: a resumed run gives the same ones, even when no update was left to make.
        """
        return {}

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """Why these numbers show that the method did nothing, or None where they show that it worked.

        Asked after the last update; a reason fails the run.
        """
        return None

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """The vitals in one line for people."""
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in vitals.items())

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold beside trainable parameters and optimizer state."""
        return {}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""

    # --- what it leaves behind ---

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write what was trained into ``out``, in the form other tools load."""
        raise NotImplementedError

    def stored_settings(self, config: Any) -> dict[str, Any]:
        """Fields in which the saved PEFT configuration differs from the attached one, with their saved values."""
        return {}

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Put what ``save`` wrote onto a freshly loaded base model; nothing requires grad afterwards."""
        raise NotImplementedError

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """A context in which the model computes as the base does, or None where it cannot (full)."""
        return None

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Fold the trained part into the base weights, in fp32; returns a plain transformers model.

        ``model`` comes from ``load`` and may be changed in place.
        """
        raise NotImplementedError(self.not_mergeable_because)

    def merge_layer(self, model: nn.Module, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """As ``merge``, for one module: its own parameters with the trained part folded in, in fp32.

        Args:
            model: From ``load`` over a base without weights (``_layer_by_layer.hollow``); not changed.
            name: The module's name in the base model.
            weights: Its parameters by name (``weight``, ``bias``), in fp32, dequantized; not changed.

        Returns:
            The same names. What is not adapted comes back as it is.
        """
        from ftune.methods.layer_by_layer import merge_layer

        return merge_layer(model, name, weights)

    def to_lora(self, model: nn.Module, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """The trained update as the factors of plain LoRA, in fp32.

        Args:
            model: From ``load``; it is not changed.
            rank: Rank of every update; None: the least that is exact, or the method's own rank.

        Returns:
            For each adapted projection of the base model, by name, ``A`` (r, in) and ``B`` (out, r): the update
            is ``B A``.

        Raises:
            FtuneError: The update is no low-rank matrix beside the weights.
        """
        raise FtuneError("this method cannot be written as LoRA", help=self.not_lora_because)
