"""FourierFT: its update against the sum of waves it is, where its coefficients are, and what it costs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoConfig

from ftune.artifacts.training import train
from ftune.errors import ModelError, RecipeError, RunFailed
from ftune.methods import METHODS, Method, OptimizerSpec
from ftune.ops.fourier import update_of
from ftune.ops.low_rank import factorize
from ftune.plan.shapes import read_shape
from ftune.recipe import require
from ftune.run.objective import autocast

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"


def disturbed(method: Method) -> torch.nn.Module:
    model = method.adapt(tiny.model(), tiny.context())
    tiny.disturb(model, scale=1.0)
    return model


def layers(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "fourierft_spectrum")
    }


def waves(spectrum: torch.Tensor, places: torch.Tensor, rows: int, columns: int, scaling: float) -> torch.Tensor:
    """The update as the paper writes it, eq. 3, without an FFT: a cosine wave for each coefficient."""
    total = torch.zeros(rows, columns, dtype=torch.float64)
    p, q = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)[None]
    for value, row, column in zip(spectrum.tolist(), *places.tolist(), strict=True):
        total += value * torch.cos(2 * math.pi * (p * row / rows + q * column / columns))
    return total * scaling / (rows * columns)


def test_parameters_on_llama_2_7b() -> None:
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "llama-2-7b"))
    assert METHODS["fourierft"]().trainable_parameters(shape) == 32 * 2 * 1000 == 64_000


def test_the_update_is_a_sum_of_waves() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(24 * 10, generator=generator)[:30]
    places = torch.stack([places // 10, places % 10])
    spectrum = torch.randn(30, generator=generator)
    expected = waves(spectrum, places, 24, 10, 300.0)
    assert (update_of(spectrum, places, 24, 10, 300.0) - expected).abs().max() <= 1e-5


def test_it_is_its_formula() -> None:
    """Against dense weights, with the places drawn here: ``W + s Re(ifft2(F))``."""
    method = tiny.method("fourierft")
    model = disturbed(method)
    dense = tiny.model()
    with torch.no_grad():
        for name, layer in layers(model).items():
            weight = dense.get_submodule(name).weight
            rows, columns = weight.shape
            flat = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(7))[:100]
            places = torch.stack([flat // columns, flat % columns])
            weight += waves(layer.fourierft_spectrum["default"], places, rows, columns, 2000.0).float()
    assert (tiny.logits(model) - tiny.logits(dense)).abs().max() <= 2e-5
    assert (tiny.logits(model) - tiny.logits(tiny.model())).abs().max() > 1e-2


def test_places_depend_on_the_seed_alone() -> None:
    def places(seed: int = 7, **settings: Any) -> torch.Tensor:
        model = tiny.method("fourierft", **settings).adapt(tiny.model(), tiny.context(seed=seed))
        return next(iter(layers(model).values())).indices["default"]

    torch.manual_seed(1)
    first = places()
    torch.manual_seed(2)
    assert torch.equal(places(), first)
    assert torch.equal(places(seed=8, location_seed=7), first)
    assert not torch.equal(places(seed=8), first)


def test_plain_peft_loads_it_and_the_file_is_small(tmp_path: Path) -> None:
    method = tiny.method("fourierft")
    model = disturbed(method)
    method.save(model, tmp_path, tiny.context())
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.model(), str(tmp_path))), tiny.logits(model))
    # The seed of whoever loads it does not matter: the adapter brings its own.
    again = method.load(tiny.model(), tmp_path, tiny.context(seed=99))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 400 + 600


def test_other_places_are_noticed_when_loading_and_resuming(tmp_path: Path) -> None:
    method = tiny.method("fourierft")
    model = disturbed(method)
    method.save(model, tmp_path, tiny.context())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"random_loc_seed": 8}))
    with pytest.raises(ModelError, match="places of the Fourier coefficients"):
        method.load(tiny.model(), tmp_path, tiny.context())
    # Unnoticed it would be another model.
    silent = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    assert (tiny.logits(silent) - tiny.logits(model)).abs().max() > 1e-2
    method.load_state(model, method.state(model))
    with pytest.raises(RunFailed, match="places of the Fourier coefficients"):
        method.load_state(method.adapt(tiny.model(), tiny.context(seed=8)), method.state(model))


def test_gaussian_does_not_start_as_the_base_and_zero_does() -> None:
    base = tiny.logits(tiny.model())
    zero = METHODS["fourierft"]().adapt(tiny.model(), tiny.context())
    assert torch.equal(tiny.logits(zero), base)
    gaussian = METHODS["fourierft"](init="gaussian").adapt(tiny.model(), tiny.context())
    assert (tiny.logits(gaussian) - base).abs().max() > 0.3


@pytest.mark.parametrize("init", ["zero", "gaussian"])
def test_it_moves_from_where_it_starts(init: str, tmp_path: Path) -> None:
    method = tiny.method("fourierft", init=init)
    model = method.adapt(tiny.model(), tiny.context())
    assert "did not move" in (method.not_at_work(method.vitals(model, method.optimizer(model, OptimizerSpec()))) or "")
    record = train(tiny.recipe(tmp_path, "fourierft", method={"init": init}))
    # Four updates of Adam at 1e-2: no gradient vanishes, with every coefficient at zero or not.
    assert record["vitals"]["change_mean"] > 5e-3
    assert record["vitals"]["adapted_layers"] == 4
    with torch.no_grad():
        for layer in list(layers(model).values())[1:]:
            layer.fourierft_spectrum["default"].add_(0.1)
    assert "did not move" in (method.not_at_work(method.vitals(model, method.optimizer(model, OptimizerSpec()))) or "")


def test_a_spectrum_does_not_decay() -> None:
    method = tiny.method("fourierft")
    model = disturbed(method)
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=5e-3, weight_decay=0.1))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(map(torch.equal, before, trained))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_every_dense_update_is_kept_for_the_backward_pass(dtype: torch.dtype, size: int) -> None:
    method = tiny.method("fourierft")
    model = method.adapt(tiny.model().to(dtype), tiny.context(dtype=dtype)).train()
    updates = {layer.out_features * layer.in_features * size for layer in layers(model).values()}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() in updates and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(dtype, "cpu"):
        output = model(**tiny.batch(1, 5), use_cache=False)
    assert output.logits.requires_grad
    shape = read_shape(tiny.config())
    # One of two blocks: the first gets its input from frozen embeddings, for which no gradient is computed.
    assert sum(kept.values()) * 2 == method.saved_bytes(shape, size)


def test_as_lora_it_is_the_closest_of_its_rank_and_says_what_it_loses() -> None:
    method = tiny.method("fourierft")
    model = disturbed(method)
    dense = {name: layer.get_delta_weight("default").detach() for name, layer in layers(model).items()}
    by_default, low = method.to_lora(model, None), method.to_lora(model, 8)
    for name, update in dense.items():
        values = torch.linalg.svdvals(update)
        a, b = low[name]
        assert a.shape == (8, update.shape[1])
        lost = torch.linalg.matrix_norm(update - b @ a) / torch.linalg.matrix_norm(update)
        assert lost == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-3)
        assert lost > 0.3, "the update is no low-rank matrix"
        a, b = by_default[name]
        assert torch.linalg.matrix_norm(update - b @ a) ** 2 <= 0.00101 * torch.linalg.matrix_norm(update) ** 2


def test_factors_hold_the_energy_asked_for() -> None:
    left, _, right = torch.linalg.svd(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), False)
    update = left * torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 8) @ right
    ranks = {energy: factorize(update, None, energy=energy)[0].shape[0] for energy in (0.5, 0.9, 0.98, 0.999)}
    assert ranks == {0.5: 1, 0.9: 2, 0.98: 3, 0.999: 4}
    assert factorize(update, None, energy=0.999, limit=2)[0].shape == (2, 12)
    a, b = factorize(update, 4)
    assert (b @ a - update).abs().max() <= 1e-5
    assert factorize(torch.zeros(6, 4), None)[0].shape == (1, 4)


def test_more_coefficients_than_elements_are_refused() -> None:
    shape, context = read_shape(tiny.config()), tiny.context()
    [problem] = METHODS["fourierft"](n_frequency=3000).refusals(shape, context)
    assert "2048 elements of model.layers.0.self_attn.v_proj" in problem.message
    assert not list(METHODS["fourierft"](n_frequency=2048).refusals(shape, context))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": []}, "would train nothing"),
        ({"n_frequency": 0}, "n_frequency. must be"),
        ({"quantization": {}}, "quantization"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, "fourierft", method=settings))
