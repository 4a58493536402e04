"""What methods are told: the run they build for, and the shape of the base model; and what they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ftune.methods.optimizer import OptimizerSpec

__all__ = ["Context", "Linear", "ModelShape", "Problem", "RecipeView"]


@dataclass(frozen=True)
class Problem:
    """A recipe that parses but cannot work: where, why, and what to do instead.

    ``loc`` is the path of keys from the recipe's root, as in pydantic's errors.
    """

    loc: tuple[str | int, ...]
    message: str
    help: str | None = None


@dataclass(frozen=True)
class Context:
    """What a method may know of its run when it builds.

    Attributes:
        total_steps: Optimizer updates of the whole run (AdaLoRA's schedule needs it).
        seed: The run's seed; anything random that a method makes must depend on it alone.
        dtype: The dtype in which the base model computes.
        device: Where the model lives.
        recomputed_blocks: How many of the model's blocks are recomputed in the backward pass.
        base_name: How the base model is named in files that leave the machine; never a local path.
        revision: The hub revision of the base model, where it has one.
        world_size: Processes that share an update.
        max_length: Tokens in the longest row that the recipe allows.
        row_lengths: Tokens in each training row, where the run has counted them.
        tokenizer: The base model's tokenizer, where the run has loaded it.
    """

    total_steps: int
    seed: int
    dtype: torch.dtype
    device: torch.device
    recomputed_blocks: int = 0
    base_name: str = ""
    revision: str | None = None
    world_size: int = 1
    max_length: int = 1024
    row_lengths: Sequence[int] = ()
    tokenizer: Any = None


@dataclass(frozen=True)
class Linear:
    """One linear projection of the base model.

    Attributes:
        name: Its qualified name.
        in_features: Its width on one side.
        out_features: And on the other.
        transposed: Whether its weight is (I, O).
        adaptable: Whether what stands beside it has an effect: the model reads no weight past it.
        quantizable: Whether it can be 4-bit: adaptable, and torch's own class.
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool = False
    adaptable: bool = True
    quantizable: bool = True

    @property
    def elements(self) -> int:
        """Elements of the weight, without bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a base model, read from its configuration: no weights needed.

    Attributes:
        model_type: The architecture's name in transformers (``llama``, ``qwen2``, ...).
        linears: Every linear projection inside the language model's blocks; the output head is not among them.
        parameters: All parameters, tied ones counted once.
        fixed: Elements of those that no method trains (``_language.fixed_parameters``).
        embedding: Elements of the input embedding.
        head: Elements of the output head, 0 when it is tied to the embedding.
        norms: Elements of all norm weights.
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward block.
        layers: Number of blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Rows of the embedding.
    """

    model_type: str
    linears: tuple[Linear, ...]
    parameters: int
    embedding: int
    head: int
    norms: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    extra: dict[str, Any] = field(default_factory=dict)
    fixed: int = 0


class RecipeView(Protocol):
    """What methods read of a recipe before anything is loaded (``Method.problems``): no import of the recipe layer."""

    @property
    def model(self) -> _ModelView:
        """The base model's block."""

    @property
    def data(self) -> _DataView:
        """The block of the data."""

    @property
    def optimizer(self) -> OptimizerSpec:
        """The optimizer's block."""

    @property
    def training(self) -> _TrainingView:
        """The block of the run's length and memory."""


class _ModelView(Protocol):
    @property
    def attention(self) -> str: ...

    @property
    def dtype(self) -> str: ...


class _DataView(Protocol):
    @property
    def max_length(self) -> int: ...


class _TrainingView(Protocol):
    @property
    def gradient_accumulation_steps(self) -> int | None: ...

    @property
    def max_grad_norm(self) -> float | None: ...

    @property
    def gradient_checkpointing(self) -> Any: ...
