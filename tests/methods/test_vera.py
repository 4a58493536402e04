"""VeRA: projections that depend on the seed alone, are drawn again as they were, and are told when they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from transformers import AutoConfig

from ftune.errors import ModelError, RecipeError, RunFailed
from ftune.methods import METHODS, Method, OptimizerSpec
from ftune.models.quantization import is_4bit
from ftune.ops.vera import draw_projections
from ftune.plan.base_model import load_base
from ftune.plan.shapes import read_shape
from ftune.recipe import require
from ftune.recipe.schema import ModelSpec
from ftune.run.objective import autocast

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"
ALL = {"target_modules": "all-linear"}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("base"))


def on_disk(method: Method, where: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_base(ModelSpec(id=str(where)), method, dtype, torch.device("cpu"))


def disturbed(method: Method, base: torch.nn.Module | None = None, **context: Any) -> torch.nn.Module:
    model = method.adapt(base or tiny.model(), tiny.context(**context))
    tiny.disturb(model, scale=1.0)
    return model


def projections(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.base_model.vera_A["default"], model.base_model.vera_B["default"]


def test_parameters_and_bytes_on_llama_2_7b() -> None:
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "llama-2-7b"))
    method = METHODS["vera"]()
    assert method.trainable_parameters(shape) == 32 * 2 * (256 + 4096) == 278_528
    assert method.adapter_bytes(shape) == 4 * 278_528 + 4 * 256 * (4096 + 4096)
    everywhere = METHODS["vera"](target_modules="all-linear")
    assert everywhere.adapter_bytes(shape) - 4 * everywhere.trainable_parameters(shape) == 4 * 256 * 2 * 11008


@pytest.mark.parametrize("settings", [{}, ALL])
def test_it_is_its_formula(settings: Any) -> None:
    """Against dense weights, with projections from PEFT: ``W + diag(b) B diag(d) A``, A and B cut to size."""
    model = disturbed(tiny.method("vera", **settings))
    targets = "all-linear" if settings else ["q_proj", "v_proj"]
    reference = get_peft_model(tiny.model(), VeraConfig(r=64, target_modules=targets, projection_prng_key=7))
    a_RN, b_MR = projections(reference)
    assert torch.equal(a_RN, projections(model)[0])
    assert torch.equal(b_MR, projections(model)[1])
    assert a_RN.shape == (64, 128 if settings else 64)
    assert b_MR.shape == (128 if settings else 64, 64)
    dense = tiny.model()
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}.vera_lambda_"
            if f"{stem}b.default" in trained:
                rows, columns = parameter.shape
                d, b = trained[f"{stem}d.default"], trained[f"{stem}b.default"]
                parameter += torch.diag(b) @ b_MR[:rows] @ torch.diag(d) @ a_RN[:, :columns]
    assert (tiny.logits(model) - tiny.logits(dense)).abs().max() <= 2e-5
    assert (tiny.logits(model) - tiny.logits(tiny.model())).abs().max() > 1e-2


def test_the_projections_depend_on_the_seed_alone_and_never_train() -> None:
    torch.manual_seed(1)
    model = tiny.method("vera").adapt(tiny.model(), tiny.context())
    torch.manual_seed(2)
    same = projections(tiny.method("vera").adapt(tiny.model(), tiny.context()))
    other = projections(tiny.method("vera").adapt(tiny.model(), tiny.context(seed=8)))
    pinned = projections(tiny.method("vera", projection_seed=7).adapt(tiny.model(), tiny.context(seed=8)))
    for mine, equal, different, chosen in zip(projections(model), same, other, pinned, strict=True):
        assert torch.equal(mine, equal)
        assert torch.equal(mine, chosen)
        assert not torch.equal(mine, different)
        assert not mine.requires_grad
    assert {name.split("vera_")[1] for name, p in model.named_parameters() if p.requires_grad} == {
        "lambda_b.default",
        "lambda_d.default",
    }


def test_stored_or_drawn_again_it_is_the_same_model(tmp_path: Path) -> None:
    logits, sizes = [], []
    for index, save_projection in enumerate((False, True)):
        out = tmp_path / str(index)
        out.mkdir()
        method = tiny.method("vera", save_projection=save_projection)
        model = disturbed(method)
        method.save(model, out, tiny.context())
        # The seed of whoever loads it does not matter: the adapter brings its own.
        again = method.load(tiny.model(), out, tiny.context(seed=99))
        assert torch.equal(tiny.logits(again), tiny.logits(model))
        logits.append(tiny.logits(model))
        sizes.append((out / "adapter_model.safetensors").stat().st_size)
        assert (out / "fingerprint.json").exists() != save_projection
    assert torch.equal(*logits)
    assert sizes[1] - sizes[0] == pytest.approx(4 * 64 * (64 + 64), abs=512)
    assert sizes[0] < 5_000


@pytest.mark.parametrize("save_projection", [False, True])
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B")
def test_plain_peft_loads_it(save_projection: bool, tmp_path: Path) -> None:
    method = tiny.method("vera", save_projection=save_projection)
    model = disturbed(method)
    method.save(model, tmp_path, tiny.context())
    plain = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    assert torch.equal(tiny.logits(plain), tiny.logits(model))


@pytest.mark.parametrize("change", [{"projection_prng_key": 8}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}])
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B", "ignore:Found missing adapter")
def test_other_projections_are_noticed_when_it_is_loaded(change: dict[str, Any], tmp_path: Path) -> None:
    method = tiny.method("vera")
    model = disturbed(method)
    method.save(model, tmp_path, tiny.context())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=r"random projections drawn here|lacks .*vera_lambda"):
        method.load(tiny.model(), tmp_path, tiny.context())
    # Unnoticed it would be another model.
    silent = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    assert (tiny.logits(silent) - tiny.logits(model)).abs().max() > 1e-2


def test_another_generator_is_noticed_when_loading_and_resuming(tmp_path: Path, monkeypatch: Any) -> None:
    method = tiny.method("vera")
    model = disturbed(method)
    method.save(model, tmp_path, tiny.context())
    state = method.state(model)
    method.load_state(model, state)
    monkeypatch.setattr("ftune.ops.vera.draw_projections", lambda *sizes: draw_projections(*sizes[:3], sizes[3] + 1))
    with pytest.raises(ModelError, match="random projections"):
        method.load(tiny.model(), tmp_path, tiny.context())
    with pytest.raises(RunFailed, match="random projections"):
        method.load_state(model, state)


@pytest.mark.parametrize("quantization", [None, {}])
@pytest.mark.parametrize("save_projection", [False, True])
def test_in_bfloat16_what_is_saved_and_merged_is_what_was_trained(
    quantization: Any, save_projection: bool, base_dir: Path, tmp_path: Path
) -> None:
    method = tiny.method("vera", quantization=quantization, save_projection=save_projection, **ALL)
    context = tiny.context(dtype=torch.bfloat16)
    model = disturbed(method, on_disk(method, base_dir, torch.bfloat16), dtype=torch.bfloat16)
    assert {p.dtype for p in projections(model)} == {torch.bfloat16}
    assert (quantization is None) != any(map(is_4bit, model.modules()))
    method.save(model, tmp_path, context)
    loaded = method.load(on_disk(method, base_dir, torch.bfloat16), tmp_path, context)
    with autocast(torch.bfloat16, "cpu"):
        assert torch.equal(tiny.logits(model), tiny.logits(loaded))
    # In fp32 the merge and the adapter are the same to rounding: the projections are those of the training.
    a, b = (p.float() for p in projections(loaded))
    factors = method.to_lora(loaded, None)
    name = "model.layers.0.mlp.down_proj"
    layer = loaded.get_submodule(f"base_model.model.{name}")
    update = torch.diag(layer.vera_lambda_b["default"]) @ b[:64] @ torch.diag(layer.vera_lambda_d["default"]) @ a
    assert (factors[name][1] @ factors[name][0] - update).abs().max() <= 1e-6
    with torch.no_grad():
        expected = tiny.logits(loaded.float()) if quantization is None else None
    merged = method.merge(loaded, context)
    if expected is not None:
        assert (tiny.logits(merged) - expected).abs().max() <= 2e-5
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


def test_merged_onto_a_4_bit_base_it_is_what_was_trained(base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method("vera", quantization={}, **ALL), tiny.context()
    model = disturbed(method, on_disk(method, base_dir))
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)
    merged = method.merge(method.load(on_disk(method, base_dir), tmp_path, context), context)
    assert (tiny.logits(merged) - expected).abs().max() <= 1e-4


def test_no_layer_keeps_a_copy_of_the_projections() -> None:
    """In fp32 autocast would keep a cast copy of A and B for every adapted layer until the backward pass."""
    method = tiny.method("vera", rank=512)
    model = method.adapt(tiny.model().bfloat16(), tiny.context(dtype=torch.bfloat16)).train()
    kept: set[tuple[int, int]] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 2 * 512 * 64:
            kept.add((storage.data_ptr(), storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(torch.bfloat16, "cpu"):
        output = model(**tiny.batch(1, 5), use_cache=False)
    assert output.logits.requires_grad
    assert kept <= {(p.untyped_storage().data_ptr(), p.untyped_storage().nbytes()) for p in projections(model)}


def test_as_lora_at_a_lower_rank_it_is_the_closest_of_that_rank() -> None:
    method = tiny.method("vera")
    model = disturbed(method)
    exact, lower = method.to_lora(model, None), method.to_lora(model, 8)
    for name, (a, b) in lower.items():
        assert a.shape[0] == b.shape[1] == 8
        update = exact[name][1] @ exact[name][0]
        lost = torch.linalg.matrix_norm(update - b @ a)
        assert lost == pytest.approx(float(torch.linalg.svdvals(update)[8:].norm()), rel=1e-3)


def test_weight_decay_leaves_the_vectors_where_they_are() -> None:
    method = tiny.method("vera")
    model = disturbed(method)
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=5e-3, weight_decay=0.1))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(200):
        optimizer.step()
    assert all(map(torch.equal, before, trained))


def test_one_zero_vector_is_noticed() -> None:
    method = tiny.method("vera")
    model = disturbed(method)
    optimizer = method.optimizer(model, OptimizerSpec())
    vitals = method.vitals(model, optimizer)
    assert not method.not_at_work(vitals)
    assert vitals["adapted_layers"] == 4
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lambda_b" in name).zero_()
    assert "still zero" in (method.not_at_work(method.vitals(model, optimizer)) or "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": []}, "would train nothing"),
        ({"target_modules": ["lm_head"]}, "cannot be merged"),
        ({"d_initial": 0}, "d_initial. must be"),
        ({"projection_seed": -1}, "at least 0"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, "vera", method=settings))


def test_an_adapter_without_a_fingerprint_is_trusted(tmp_path: Path) -> None:
    method = tiny.method("vera")
    model = disturbed(method)
    method.save(model, tmp_path, tiny.context())
    shutil.copytree(tmp_path, tmp_path / "foreign")
    (tmp_path / "foreign/fingerprint.json").unlink()
    again = method.load(tiny.model(), tmp_path / "foreign", tiny.context())
    assert torch.equal(tiny.logits(again), tiny.logits(model))
