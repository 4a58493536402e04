"""(IA)^3: vectors that rescale keys, values and the feed-forward's inner activation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftune.errors import ModelError
from ftune.expressions import compiled
from ftune.methods import _roles
from ftune.methods._roles import AUTO
from ftune.methods.adapter_files import load_peft, save_peft
from ftune.methods.adapters import attach, disable_adapter, merge_peft, peft_settings
from ftune.methods.base import Method
from ftune.methods.quantization import Quantization, quantization_failure, quantization_line, quantization_vitals
from ftune.methods.targets import list_linears, match_targets, target_problems
from ftune.methods.types import Context, Linear, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["Ia3"]


class Ia3(Method):
    """Train one factor for each key, value and inner activation (Liu et al., arXiv:2205.05638).

    Sec. 3.3: the feed-forward's vector scales the input of the projection back to the residual stream, the others the
    output of theirs. Where queries, keys and values are one fused projection, all of its output is scaled.

    Computing in bfloat16, a factor closer to one than 2^-9 changes no product; the vectors are fp32, so that
    updates smaller than that add up until they do.
    """

    paper: ClassVar[str] = "arXiv:2205.05638"
    summary: ClassVar[str] = "one factor for each key, value and inner activation"
    formula: ClassVar[str] = "k = l_k * W_k x,  v = l_v * W_v x,  h = W_down (l_ff * a)"
    typical_share: ClassVar[str] = "0.01 %"
    choose: ClassVar[str] = "Few examples, or a great many tasks: a file is 2.5 MB on 7B and overfits little."
    avoid: ClassVar[str] = "When the task needs new features: rescaling what is there cannot make them."
    cost: ClassVar[str] = "Nearly no state; saves the inner activation in fp32, so activations are about as LoRA's."
    evidence: ClassVar[str] = (
        ".311 at its default rate, .455 tuned, in PEFT's comparison (GSM8K, one seed; LoRA .478): it needs a high rate."
    )
    composes: ClassVar[str] = "4-bit bases, packing, checkpointing; merges exactly. Not convertible to LoRA."
    default_learning_rate: ClassVar[float] = 3e-3
    not_lora_because: ClassVar[str] = "the vectors rescale the base weights themselves; use `ftune merge`"
    quantizable: ClassVar[bool] = True
    decaying: ClassVar[bool] = False
    replayable: ClassVar[bool] = True

    name: Literal["ia3"] = Field("ia3", description="Infused adapter by inhibiting and amplifying activations.")
    target_modules: str | tuple[str, ...] = Field(
        AUTO,
        description="Every projection that is scaled. auto: keys, values and the feed-forward's way back; or "
        "all-linear, a list of names, or a regular expression over whole names.",
    )
    feedforward_modules: str | tuple[str, ...] = Field(
        AUTO,
        description="Those of target_modules whose input is scaled instead of their output. auto: the feed-forward's "
        "way back to the residual stream, found by shape.",
    )
    quantization: Quantization | None = Field(None, description="Keep the frozen base weights in 4 bits.")

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield target lists that cannot match anything."""
        yield from target_problems(self.target_modules)
        if isinstance(self.feedforward_modules, str) and self.feedforward_modules != AUTO:
            try:
                compiled(self.feedforward_modules)
            except ValueError as error:
                yield Problem(
                    ("method", "feedforward_modules"),
                    f"not a regular expression: {error}",
                    "or give a list of module names",
                )

    def _scaled(self, linears: Sequence[Linear]) -> tuple[list[Linear], list[Linear]]:
        """The projections whose output is scaled, and those whose input is.

        Raises:
            ModelError: A name matches nothing, or a feed-forward is no target.
        """
        if self.target_modules == AUTO:
            targets = match_targets(linears, _roles.attention(linears, "key", "value"))
            if self.feedforward_modules == AUTO:
                inner = match_targets(linears, _roles.feed_forward(linears))
            else:
                inner = match_targets(linears, self.feedforward_modules, "feedforward_modules")
            targets = [linear for linear in linears if linear in targets or linear in inner]
        else:
            targets = match_targets(linears, self.target_modules)
            if self.feedforward_modules == AUTO:
                back = match_targets(linears, _roles.feed_forward(linears))
                inner = [linear for linear in targets if linear in back]
            else:
                inner = match_targets(linears, self.feedforward_modules, "feedforward_modules")
        stray = [linear.name for linear in inner if linear not in targets]
        if stray:
            raise ModelError(
                f"feedforward_modules: `{stray[0]}` is not among target_modules",
                help="target_modules lists everything that is scaled, the feed-forward included",
            )
        return [linear for linear in targets if linear not in inner], inner

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Freeze the base and attach the vectors, all ones.

        Raises:
            ModelError: A target matches no linear projection inside the blocks.
        """
        from peft import IA3Config

        linears = list_linears(model)
        scaled = self._scaled(linears)
        outputs, inputs = (_roles.shortest(chosen, linears) for chosen in scaled)
        settings = peft_settings(model, (*outputs, *inputs), context)
        targets = settings["target_modules"]
        if not set(inputs) <= set(targets):  # other parts of the model have layers of these names
            inputs = tuple(linear.name for linear in scaled[1])
        config = IA3Config(**settings, feedforward_modules=list(inputs))
        if len(targets) > _LONGEST_LIST:
            config.target_modules, config.feedforward_modules = _exactly(targets), _exactly(inputs)
        with _as_plain_linears(model):
            return attach(model, config, context)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Nothing decays: the vectors, though stored as matrices of one row or column, are neutral at one."""
        return False

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``."""
        save_peft(model, out, context)

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved PEFT adapter, frozen."""
        with _as_plain_linears(base):
            return load_peft(base, directory)

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """PEFT's own switch: the base computes alone."""
        return disable_adapter(model)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Scale rows, columns and biases of the weights, dequantized first where they are 4-bit."""
        # Only 4-bit layers have to be dequantized; PEFT would refuse even to detach the vectors from them.
        with _as_plain_linears(cast(Any, model).get_base_model()):
            return merge_peft(model)

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How many vectors and factors there are, how far the factors are from one, and what is 4-bit.

        ``factors_at_work`` are those that change a product, rounded as the model rounds it.
        """
        import torch

        # The embedding's: that of a 4-bit projection is not what it computes in.
        dtype = cast(Any, model).get_input_embeddings().weight.dtype
        # Half a step, as a share of the largest numbers that have it: 2^-9 in bfloat16.
        least = torch.finfo(dtype).eps / 4
        moved = [(p.detach().float() - 1).abs() for name, p in model.named_parameters() if "ia3_l" in name]
        factors = sum(change.numel() for change in moved)
        return {
            "vectors": float(len(moved)),
            "factors": float(factors),
            "factor_change_mean": sum(float(change.sum()) for change in moved) / max(1, factors),
            "factor_change_max": max((float(change.max()) for change in moved), default=0.0),
            "vector_change_min": min((float(change.max()) for change in moved), default=0.0),
            "factors_at_work": float(sum(int((change > least).sum()) for change in moved)),
            "least_change": least,
        } | quantization_vitals(model)

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """A vector that is still all ones, factors that are rounded away, or a base that should be 4-bit and is not."""
        if not vitals["vector_change_min"] > 0:
            return "a vector is still all ones, so its projection computes as the base does"
        if not vitals["factors_at_work"] > 0:
            return (
                f"every factor is within {vitals['least_change']:.3g} of one, which the model's precision rounds away; "
                "raise the learning rate"
            )
        return quantization_failure(self.quantization, vitals)

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        line = (
            f"{vitals['vectors']:.0f} vectors, {vitals['factors']:,.0f} factors, off one by "
            f"{vitals['factor_change_mean']:.3g} on average, at most {vitals['factor_change_max']:.3g}, "
            f"{vitals['factors_at_work'] / vitals['factors']:.0%} by enough to count"
        )
        return line + quantization_line(vitals)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """One for each scaled output and each scaled input."""
        outputs, inputs = self._scaled(shape.linears)
        return sum(linear.out_features for linear in outputs) + sum(linear.in_features for linear in inputs)

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """What is multiplied: outputs in the dtype of the model, inputs in fp32, to which PEFT casts them."""
        outputs, inputs = self._scaled(shape.linears)
        return dtype_bytes * sum(linear.out_features for linear in outputs) + 4 * sum(
            linear.in_features for linear in inputs
        )


_LONGEST_LIST = 19  # PEFT shortens longer lists, and then refuses to load them: the feed-forward is no longer in them


def _exactly(names: Sequence[str]) -> str:
    """A regular expression that matches these names and no other."""
    return "|".join(re.escape(name) for name in names) or r"\b\B"


@contextmanager
def _as_plain_linears(base: nn.Module) -> Iterator[None]:
    """Hide from PEFT that a base is 4-bit, so that its vectors wrap every linear layer alike.

    PEFT's own 4-bit wrapper returns fp32 under autocast, which turns the residual stream into fp32 and with it
    every activation that is kept; and it refuses to be taken off again.
    """
    flagged = getattr(base, "is_loaded_in_4bit", False)
    try:
        if flagged:
            cast(Any, base).is_loaded_in_4bit = False
        yield
    finally:
        if flagged:
            cast(Any, base).is_loaded_in_4bit = True
