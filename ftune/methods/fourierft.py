"""FourierFT: a few trained coefficients of each update's Fourier transform."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftune.methods import _fingerprint, _roles
from ftune.methods._roles import AUTO
from ftune.methods.adapter_files import load_peft, save_peft
from ftune.methods.adapters import attach, disable_adapter, merge_peft, peft_settings
from ftune.methods.base import Method
from ftune.methods.saved_bytes import low_rank_saved_bytes
from ftune.methods.targets import different, list_linears, match_targets, target_problems
from ftune.methods.types import Context, Linear, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["FourierFt"]


class FourierFt(Method):
    """Train n coefficients of the spectrum of each update (Gao et al., arXiv:2405.03003, sec. 3).

    Their places are drawn from a seed and shared by all matrices of a size. In every forward pass PEFT makes each
    update dense by an inverse FFT, and autograd keeps it: few numbers to store are not few to compute with.
    """

    paper: ClassVar[str] = "arXiv:2405.03003"
    summary: ClassVar[str] = "a few Fourier coefficients of each update"
    formula: ClassVar[str] = "h = (W + s Re(ifft2(F))) x, F zero but for n places drawn once"
    typical_share: ClassVar[str] = "0.001 %"
    choose: ClassVar[str] = "When the size of a file decides: 4 kB a matrix, whatever its size."
    avoid: ClassVar[str] = "When memory or time decides, or the base should be 4-bit: the update is dense in training."
    cost: ClassVar[str] = "Nearly no state; but a dense update of each matrix and an FFT of it in every pass."
    evidence: ClassVar[str] = ".000 by default, .096 with n 5000, in PEFT's comparison (GSM8K, one seed; LoRA .478)."
    composes: ClassVar[str] = "Packing, checkpointing; merges exactly; converts to LoRA approximately. No 4-bit base."
    default_learning_rate: ClassVar[float] = 3e-3
    decaying: ClassVar[bool] = False
    as_lora: ClassVar[Literal["exact", "approximate"] | None] = "approximate"
    replayable: ClassVar[bool] = True

    name: Literal["fourierft"] = Field("fourierft", description="Fine-tuning in the discrete Fourier domain.")
    n_frequency: int = Field(1000, ge=1, description="Trained coefficients of each matrix.")
    scaling: float = Field(
        300.0, gt=0, description="Factor of the update: 300 in the paper for LLaMA, 100 to 150 for RoBERTa."
    )
    init: Literal["zero", "gaussian"] = Field(
        "zero",
        description="Start of the coefficients. gaussian is the paper's; the model then does not start as its base, "
        "and a narrow one is wrecked by it.",
    )
    target_modules: str | tuple[str, ...] = Field(
        AUTO,
        description="auto: queries and values, by whatever name; or all-linear, a list of module names, or a regular "
        "expression over whole names.",
    )
    location_seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the coefficients' places. Default: training.seed."
    )

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield target lists that cannot match anything."""
        yield from target_problems(self.target_modules)

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield a matrix with fewer elements than it is to have coefficients."""
        smallest = min(self._targets(shape), key=lambda linear: linear.elements)
        if self.n_frequency > smallest.elements:
            yield Problem(
                ("method", "n_frequency"),
                f"{self.n_frequency} coefficients are more than the {smallest.elements} elements of {smallest.name}",
                f"set n_frequency to at most {smallest.elements}, or leave that matrix out of target_modules",
            )

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Freeze the base and attach a spectrum in fp32 to every target.

        Raises:
            ModelError: A target matches no linear projection inside the blocks.
        """
        from peft import FourierFTConfig

        targets = _roles.or_attention(list_linears(model), self.target_modules, "query", "value")
        config = FourierFTConfig(
            n_frequency=self.n_frequency,
            scaling=self.scaling,
            init_weights=self.init == "zero",
            random_loc_seed=context.seed if self.location_seed is None else self.location_seed,
            **peft_settings(model, targets, context),
        )
        adapted = attach(model, config, context)
        # Drawn from the seed, so a resumed run has the same; a buffer of the Python object, in no state_dict.
        start = {name: _spectrum(layer).detach().clone() for name, layer in _layers(adapted)}
        object.__setattr__(adapted, "_ftune_start", start)
        return adapted

    def lean(self, model: nn.Module, context: Context) -> dict[str, int]:
        """As any method, and the coefficients' places where the spectra are: PEFT copies them in every forward pass."""
        for _, layer in _layers(model):
            layer.indices["default"] = layer.indices["default"].to(_spectrum(layer).device)
        return super().lean(model, context)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The fingerprint of the coefficients' places, which are not stored themselves."""
        return _fingerprint.as_state(_digest(model))

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Check that the places are those the run started with."""
        _fingerprint.require_same_state(state, _DRAWN, _digest(model))

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter, and the fingerprint of its coefficients' places."""
        save_peft(model, out, context)
        _fingerprint.write(out, _DRAWN, _digest(model))

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved PEFT adapter, frozen.

        Raises:
            ModelError: The coefficients' places drawn from its configuration are others.
        """
        model = load_peft(base, directory)
        _fingerprint.check(directory, _DRAWN, _digest(model), _WAY_OUT)
        return model

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """PEFT's own switch: the base computes alone."""
        return disable_adapter(model)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Add the dense updates to the weights."""
        return merge_peft(model)

    def to_lora(self, model: nn.Module, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """The best factors of a rank; by default of the least that holds 99.9 % of the energy, at most 256.

        The update is not low-rank: n coefficients in general places have rank 2 n, up to the matrix's own.
        """
        from ftune.ops.fourier import update_of
        from ftune.ops.low_rank import factorize

        factors = {}
        for name, layer in _layers(model):
            spectrum = _spectrum(layer).detach().float()
            locations = layer.indices["default"].to(spectrum.device)
            update = update_of(
                spectrum, locations, layer.out_features, layer.in_features, layer.fourierft_scaling["default"]
            )
            factors[name] = factorize(update, rank, energy=_ENERGY, limit=_HIGHEST_RANK)
        return factors

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How many matrices have a spectrum, how large it is, and how far it is from its start."""
        start: dict[str, Tensor] = getattr(model, "_ftune_start", {})
        spectra = {name: _spectrum(layer).detach().float() for name, layer in _layers(model)}
        changes = [(spectrum - start[name]).abs() for name, spectrum in spectra.items()]
        count = max(1, len(spectra))
        return {
            "adapted_layers": float(len(spectra)),
            "coefficient_mean": sum(float(spectrum.abs().mean()) for spectrum in spectra.values()) / count,
            "change_mean": sum(float(change.mean()) for change in changes) / count,
            "change_max_min": min((float(change.max()) for change in changes), default=0.0),
        }

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """A spectrum that is where it started."""
        if not vitals["change_max_min"] > 0:
            return "a spectrum did not move from where it started"
        return None

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        return (
            f"{vitals['adapted_layers']:.0f} projections adapted, {self.n_frequency:,} coefficients each, "
            f"{vitals['coefficient_mean']:.3g} on average, moved by {vitals['change_mean']:.3g}"
        )

    def _targets(self, shape: ModelShape) -> list[Linear]:
        targets = _roles.or_attention(shape.linears, self.target_modules, "query", "value")
        return match_targets(shape.linears, targets)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """``n_frequency`` for each target."""
        return self.n_frequency * len(self._targets(shape))

    def saved_bytes(self, shape: ModelShape, dtype_bytes: int) -> int:
        """Every update made dense, which autograd keeps until the backward pass."""
        return dtype_bytes * sum(linear.elements for linear in self._targets(shape))

    def products(self, shape: ModelShape) -> int:
        """For the gradients of dense updates; forwards they are part of the weight."""
        return different(self._targets(shape))

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """The input of each dense update; in 16 bits a cast copy for each, in fp32 shared by q and v."""
        targets = self._targets(shape)
        if dtype_bytes < 4:
            return dtype_bytes * sum(linear.in_features for linear in targets)
        names = tuple(linear.name for linear in targets)
        return low_rank_saved_bytes(shape.linears, names, 0, dtype_bytes)


_DRAWN = "places of the Fourier coefficients"
_WAY_OUT = "restore random_loc_seed and n_frequency in adapter_config.json, or use the version of torch that trained it"
_ENERGY, _HIGHEST_RANK = 0.999, 256


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each adapted layer, with the name of its projection in the base model."""
    for name, module in model.named_modules():
        if hasattr(module, "fourierft_spectrum"):
            yield name.removeprefix("base_model.model."), module


def _spectrum(layer: Any) -> Tensor:
    return cast("Tensor", layer.fourierft_spectrum["default"])


def _digest(model: nn.Module) -> str:
    """SHA-256 of the places in use, once for each size of matrix: those of a size are the same."""
    places = {(layer.out_features, layer.in_features): layer.indices["default"] for _, layer in _layers(model)}
    return _fingerprint.of(*(places[size] for size in sorted(places)))
