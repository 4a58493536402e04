"""What a method says of itself: the first of its three parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ftune.methods.quantization import Quantization

__all__ = ["Description"]


class Description(BaseModel):
    """A method's recipe fields, with what ``ftune methods`` prints of it and what the recipe layer checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aliases: ClassVar[tuple[str, ...]] = ()
    """What other tools call it, in lower case with underscores."""
    paper: ClassVar[str]
    """Where the method comes from, e.g. ``arXiv:2106.09685``."""
    summary: ClassVar[str]
    """One line for people: what it trains."""
    formula: ClassVar[str]
    """The forward pass in one line."""
    typical_share: ClassVar[str]
    """Trainable share of a 7B model at the defaults, e.g. ``0.6 %``."""
    choose: ClassVar[str]
    """When to choose it, in a sentence or two."""
    avoid: ClassVar[str]
    """When not to."""
    cost: ClassVar[str]
    """What it costs in memory, time and storage, against LoRA."""
    evidence: ClassVar[str]
    """What was found of its quality, by whom; shares of right answers unless said otherwise."""
    composes: ClassVar[str]
    """What it works with, and what it refuses."""
    default_learning_rate: ClassVar[float] = 2e-4
    """The peak rate of a run of a thousand updates or more."""
    few_updates_factor: ClassVar[float] = 5.0
    """How many times that rate 40 updates or fewer bear: found by the recipe in ``recipes/``, or by a study."""
    mergeable: ClassVar[bool] = True
    not_mergeable_because: ClassVar[str] = ""
    quantizable: ClassVar[bool] = False
    """Whether the base weights can be 4-bit under it."""
    packable: ClassVar[bool] = True
    """Whether several documents may share a row (false for methods that prepend virtual tokens)."""
    decaying: ClassVar[bool] = True
    """Whether weight decay reaches anything that trains (false where every parameter is a vector of factors)."""
    recomputable: ClassVar[bool] = True
    """Whether blocks may be recomputed in the backward pass (gradient checkpointing)."""
    replayable: ClassVar[bool] = False
    """Whether a block does the same work in every training step, whatever its weights are: then a GPU may replay it."""
    starts_as_base: ClassVar[bool] = True
    """Whether the adapted model computes as its base before the first update."""
    artifact: ClassVar[Literal["adapter", "model"]] = "adapter"
    """Directory under the run that holds what was trained."""
    saved_as: ClassVar[Literal["peft", "transformers", "ftune"]] = "peft"
    """Which library loads what ``save`` wrote."""
    keeps_whole_state: ClassVar[bool] = False
    """Whether the optimizer's state stays whole on every process where the weights it belongs to are shared out."""
    as_lora: ClassVar[Literal["already", "exact", "approximate"] | None] = None
    """Whether the trained update is, or can be written as, a plain LoRA adapter."""
    not_lora_because: ClassVar[str] = ""

    @property
    def base_quantization(self) -> Quantization | None:
        """The recipe's ``quantization`` block, where the method has that field and the recipe gives it."""
        return getattr(self, "quantization", None)
