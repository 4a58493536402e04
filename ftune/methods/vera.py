"""VeRA: vectors that rescale frozen random projections shared by all layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftune.methods import _fingerprint, _roles
from ftune.methods._roles import AUTO
from ftune.methods.adapter_files import load_peft, save_peft
from ftune.methods.adapters import attach, disable_adapter, merge_factors, peft_settings
from ftune.methods.base import Method
from ftune.methods.quantization import Quantization, quantization_failure, quantization_line, quantization_vitals
from ftune.methods.targets import different, list_linears, match_targets, target_problems
from ftune.methods.types import Context, Linear, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Vera"]


class Vera(Method):
    """Train ``b`` and ``d`` of ``diag(b) B diag(d) A`` (Kopiczko et al., arXiv:2310.11454, sec. 3).

    A and B are random, frozen, and shared by all layers: each takes the part of its size. They are drawn in fp32
    from the seed alone and kept in the dtype in which the model computes: in fp32 autocast would keep a cast copy
    of both for every layer until the backward pass.
    """

    paper: ClassVar[str] = "arXiv:2310.11454"
    summary: ClassVar[str] = "two vectors a matrix around shared random projections"
    formula: ClassVar[str] = "h = W x + b * (B (d * (A x))), A and B random, frozen and shared"
    typical_share: ClassVar[str] = "0.004 %"
    choose: ClassVar[str] = (
        "A great many adapters of one base: 1.1 MB each on 7B, a thirtieth of LoRA's on the same targets."
    )
    avoid: ClassVar[str] = "When few adapters are kept: its high rank costs more time than LoRA, for no more learning."
    cost: ClassVar[str] = "Nearly no state; a LoRA of rank 256 in time; the projections once, 8 MiB at 4096 x 4096."
    evidence: ClassVar[str] = (
        ".354 in PEFT's comparison (GSM8K, one seed; LoRA .478), at a fifth of the file; it needs a high rate."
    )
    composes: ClassVar[str] = "4-bit bases, packing, checkpointing; merges exactly; converts to LoRA exactly."
    default_learning_rate: ClassVar[float] = 4e-3
    # By a study of 60 updates (docs/compare.md), where the best rate was 5.1e-2, and 1.6e-2 too low.
    few_updates_factor: ClassVar[float] = 15.0
    quantizable: ClassVar[bool] = True
    decaying: ClassVar[bool] = False
    as_lora: ClassVar[Literal["exact", "approximate"] | None] = "exact"
    replayable: ClassVar[bool] = True

    name: Literal["vera"] = Field("vera", description="Vector-based random matrix adaptation.")
    rank: int = Field(256, ge=1, description="Rank of the shared projections; far above LoRA's, for it is cheap.")
    d_initial: float = Field(0.1, gt=0, description="Start of every d; b starts at zero.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update.")
    target_modules: str | tuple[str, ...] = Field(
        AUTO,
        description="auto: queries and values, by whatever name; or all-linear, a list of module names, or a regular "
        "expression over whole names.",
    )
    projection_seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the shared projections. Default: training.seed."
    )
    save_projection: bool = Field(
        False,
        description="Store the projections with the adapter. Without, they are drawn again from the seed when it is "
        "loaded, and compared with a fingerprint.",
    )
    quantization: Quantization | None = Field(None, description="Keep the frozen base weights in 4 bits.")

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield target lists that cannot match anything."""
        yield from target_problems(self.target_modules)

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Freeze the base, draw the shared projections, attach ``b`` and ``d`` in fp32 to every target.

        Raises:
            ModelError: A target matches no linear projection inside the blocks.
        """
        from peft import VeraConfig

        targets = _roles.or_attention(list_linears(model), self.target_modules, "query", "value")
        with _told_elsewhere():
            config = VeraConfig(
                r=self.rank,
                d_initial=self.d_initial,
                vera_dropout=self.dropout,
                projection_prng_key=context.seed if self.projection_seed is None else self.projection_seed,
                save_projection=self.save_projection,
                **peft_settings(model, targets, context),
            )
            adapted = attach(model, config, context)
        return _put_projections(adapted, _drawn(adapted), context)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The fingerprint of the projections, which are not stored themselves."""
        return _fingerprint.as_state(_digest(model))

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Check that the projections are those the run started with."""
        _fingerprint.require_same_state(state, _DRAWN, _digest(model))

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter, and the fingerprint of its projections where they are not in it."""
        save_peft(model, out, context)
        if not _config(model).save_projection:
            _fingerprint.write(out, _DRAWN, _digest(model))

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved PEFT adapter, frozen, on the projections it was trained with.

        Raises:
            ModelError: The projections drawn from its configuration are others.
        """
        with _told_elsewhere():
            model = load_peft(base, directory)
        if _config(model).save_projection:
            return _put_projections(model, _projections(model), context)
        _fingerprint.check(directory, _DRAWN, _digest(model), _WAY_OUT)
        return _put_projections(model, _drawn(model), context)

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """PEFT's own switch: the base computes alone."""
        return disable_adapter(model)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Add ``diag(b) B diag(d) A`` to the weights it was trained against, dequantized where they are 4-bit."""
        return merge_factors(model, self.to_lora(model, None))

    def merge_layer(self, model: nn.Module, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """As ``merge``; PEFT's own product has other rounding."""
        layer = dict(_layers(model)).get(name)
        if layer is None:
            return weights
        a, b = _factors(layer, _in_fp32(model), None)
        update = b @ a
        return weights | {"weight": weights["weight"] + (update.T if layer.fan_in_fan_out else update)}

    def to_lora(self, model: nn.Module, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """``diag(d) A`` and ``diag(b) B``: exact at VeRA's rank or the matrix's own, the best of its rank below."""
        projections = _in_fp32(model)
        return {name: _factors(layer, projections, rank) for name, layer in _layers(model)}

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How many matrices are adapted, how large b became, how far d is from its start, and what is 4-bit."""
        pairs = [
            tuple(vectors["default"].detach().float() for vectors in (layer.vera_lambda_b, layer.vera_lambda_d))
            for _, layer in _layers(model)
        ]
        count = max(1, len(pairs))
        return {
            "adapted_layers": float(len(pairs)),
            "b_mean": sum(float(b.abs().mean()) for b, _ in pairs) / count,
            "b_max_min": min((float(b.abs().max()) for b, _ in pairs), default=0.0),
            "d_change_mean": sum(float((d - self.d_initial).abs().mean()) for _, d in pairs) / count,
        } | quantization_vitals(model)

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """A b that is still zero, or a base that should be 4-bit and is not."""
        if not vitals["b_max_min"] > 0:
            return "a vector b is still zero, so its projection computes as the base does"
        return quantization_failure(self.quantization, vitals)

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        line = (
            f"{vitals['adapted_layers']:.0f} projections adapted, mean |b| {vitals['b_mean']:.3g}, "
            f"d off its start by {vitals['d_change_mean']:.3g}"
        )
        return line + quantization_line(vitals)

    def _targets(self, shape: ModelShape) -> list[Linear]:
        targets = _roles.or_attention(shape.linears, self.target_modules, "query", "value")
        return match_targets(shape.linears, targets)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """``rank`` and one for each output, for each target."""
        return sum(self.rank + linear.out_features for linear in self._targets(shape))

    def adapter_bytes(self, shape: ModelShape) -> int:
        """The vectors, and the shared projections at the size they have in fp32."""
        targets = self._targets(shape)
        widest = max(linear.in_features for linear in targets) + max(linear.out_features for linear in targets)
        return 4 * (self.trainable_parameters(shape) + self.rank * widest)

    def products(self, shape: ModelShape) -> int:
        """With A and with B forwards, and for the gradients of what they are multiplied with: some 3 for each shape."""
        return 3 * different(self._targets(shape))

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """What ``d`` and ``b`` multiply: ``A x`` and ``B (d * A x)``. Frozen, A and B keep no input."""
        return dtype_bytes * sum(self.rank + linear.out_features for linear in self._targets(shape))


# --- the shared projections ----------------------------------------------------------------------------------

_DRAWN = "random projections"
_WAY_OUT = (
    "restore projection_prng_key, r and target_modules in adapter_config.json, or use the version of torch that "
    "trained it; `save_projection: true` stores the projections of adapters to come"
)


def _config(model: nn.Module) -> Any:
    return cast(Any, model).peft_config["default"]


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each adapted layer, with the name of its projection in the base model."""
    for name, module in model.named_modules():
        if hasattr(module, "vera_lambda_b"):
            yield name.removeprefix("base_model.model."), module


def _projections(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B as the model multiplies with them."""
    tuner = cast(Any, model).base_model
    return tuner.vera_A["default"], tuner.vera_B["default"]


def _in_fp32(model: nn.Module) -> tuple[Tensor, Tensor]:
    a_RN, b_MR = _projections(model)
    return a_RN.detach().float(), b_MR.detach().float()


def _factors(layer: Any, projections: tuple[Tensor, Tensor], rank: int | None) -> tuple[Tensor, Tensor]:
    """``diag(d) A`` and ``diag(b) B`` of one layer, at most of this rank."""
    from ftune.ops.low_rank import factorize

    a_RN, b_MR = projections
    d_R, b_M = (vectors["default"].detach().float() for vectors in (layer.vera_lambda_d, layer.vera_lambda_b))
    a, b = d_R[:, None] * a_RN[:, : layer.in_features], b_M[:, None] * b_MR[: layer.out_features]
    # No update has a higher rank than its matrix, however high that of the projections is.
    highest = min(layer.in_features, layer.out_features, rank or len(d_R))
    return (a, b) if highest >= len(d_R) else factorize(b @ a, highest)


def _drawn(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B drawn anew from the adapter's seed, in fp32: PEFT rounds them to the dtype of the base."""
    from ftune.ops.vera import draw_projections

    a_RN, b_MR = _projections(model)
    return draw_projections(a_RN.shape[0], a_RN.shape[1], b_MR.shape[0], _config(model).projection_prng_key)


def _digest(model: nn.Module) -> str:
    return _fingerprint.of(*_drawn(model))


def _put_projections(model: nn.Module, projections: tuple[Tensor, Tensor], context: Context) -> nn.Module:
    """Replace A and B for all layers at once: they share one dictionary."""
    tuner = cast(Any, model).base_model
    for held, projection in zip((tuner.vera_A, tuner.vera_B), projections, strict=True):
        held["default"] = projection.to(held["default"].device, context.dtype)
    return model


@contextmanager
def _told_elsewhere() -> Iterator[None]:
    """Keep PEFT from warning that projections drawn again may be others: here their fingerprint decides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A and vera_B")
        yield
