"""What every method of the union must do. A new method is under all of these by being in the union."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.tuned import Target
from ftune.methods import METHODS, Method, OptimizerSpec
from ftune.models.quantization import dequantize, is_4bit
from ftune.plan.base_model import choose_device, load_base
from ftune.plan.shapes import read_shape
from ftune.recipe.schema import ModelSpec

EVERY = pytest.mark.parametrize("name", METHODS)
ADAPTERS = [name for name, cls in METHODS.items() if cls.artifact == "adapter"]
CONVERTIBLE = [name for name, cls in METHODS.items() if cls.as_lora in ("exact", "approximate")]
MERGEABLE = [name for name, cls in METHODS.items() if cls.mergeable]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("base"))


def load(method: Method, where: Path) -> torch.nn.Module:
    """The base model as ftune loads it for a method: quantized where the method wants it."""
    return load_base(ModelSpec(id=str(where)), method, torch.float32, torch.device("cpu"))


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@EVERY
def test_predicted_parameters_are_the_actual_ones(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    model = method.adapt(load(method, base_dir), tiny.context())
    assert sum(p.numel() for p in trained(model).values()) == method.trainable_parameters(read_shape(tiny.config()))


@EVERY
def test_what_trains_is_fp32(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    base = load_base(ModelSpec(id=str(base_dir)), method, torch.bfloat16, torch.device("cpu"))
    model = method.adapt(base, tiny.context(dtype=torch.bfloat16))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


@EVERY
def test_an_update_changes_what_trains_and_nothing_else(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    model = method.adapt(load(method, base_dir), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2))
    before = {key: value.detach().clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    ids = tiny.batch()["input_ids"]
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    names = set(trained(model))
    for key, value in model.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, before[key]) == (key not in names), key


@EVERY
def test_starts_as_the_base(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    expected = tiny.logits(load(method, base_dir))
    actual = tiny.logits(method.adapt(load(method, base_dir), tiny.context()))
    change = (actual - expected).abs().max()
    assert change <= 2e-5 if method.starts_as_base else change > 1e-3


@EVERY
def test_start_depends_on_the_seed_alone(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    torch.manual_seed(1)
    first = trained(method.adapt(load(method, base_dir), tiny.context()))
    torch.manual_seed(2)
    second = trained(method.adapt(load(method, base_dir), tiny.context()))
    assert all(torch.equal(first[key], second[key]) for key in first)


@EVERY
def test_saved_and_loaded_gives_the_same_logits(name: str, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method(name), tiny.context()
    model = method.adapt(load(method, base_dir), context)
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)
    again = method.load(load(method, base_dir), tmp_path, context)
    assert torch.equal(tiny.logits(again), expected)
    assert not trained(again)
    assert (expected - tiny.logits(load(method, base_dir))).abs().max() > 1e-2, "the disturbance has no effect"


@EVERY
def test_saved_bytes_are_the_same_twice(name: str, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method(name), tiny.context()
    for out in ("a", "b"):
        (tmp_path / out).mkdir()
        method.save(method.adapt(load(method, base_dir), context), tmp_path / out, context)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
        assert str(base_dir).encode() not in file.read_bytes(), f"{file.name} names a local path"


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_gives_the_adapter_s_logits(name: str, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method(name), tiny.context()
    model = method.adapt(load(method, base_dir), context)
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)
    merged = method.merge(method.load(load(method, base_dir), tmp_path, context), context)
    bound = 1e-4 if any(map(is_4bit, model.modules())) else 2e-5
    assert (tiny.logits(merged) - expected).abs().max() <= bound
    assert set(merged.state_dict()) == set(tiny.model().state_dict()), "not a plain model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_layer_by_layer_it_is_the_merged_model_bit_for_bit(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftune.artifacts import by_shard
    from ftune.artifacts.divergence import in_fp32

    recipe = tiny.recipe(tmp_path, name, model={"dtype": dtype}).recipe
    method, context, device = recipe.method, tiny.context(dtype=getattr(torch, dtype)), choose_device()

    def base() -> torch.nn.Module:
        found = in_fp32(load_base(recipe.model, method, context.dtype, device))
        # Quantized where a run would, for devices may choose other codes; but merged layer by layer on the CPU.
        return found if device.type == "cpu" else dequantize(found).cpu()

    model = method.adapt(load_base(recipe.model, method, context.dtype, context.device), context)
    tiny.disturb(model, 0.5)
    run = RunDir(tmp_path / "run")
    artifact = run.root / method.artifact
    artifact.mkdir(parents=True)
    method.save(model, artifact, context)
    whole = method.merge(in_fp32(method.load(base(), artifact, context)), context).state_dict()

    monkeypatch.setattr(RunDir, "read", lambda run: {"plan": {"training": {"steps": context.total_steps}}})
    report = by_shard.merge_by_shard(Target(recipe, run), tmp_path / "out", "float32", shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert report["shards"] == len(files) > 1
    parts = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert set(parts) == set(whole)
    assert [key for key in whole if not torch.equal(parts[key], whole[key])] == []
    assert [key for key in whole if not torch.equal(parts[key], load_file(tmp_path / "base/model.safetensors")[key])]


@pytest.mark.parametrize("name", ADAPTERS)
def test_switched_off_it_computes_as_the_base(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    model = method.adapt(load(method, base_dir), tiny.context())
    tiny.disturb(model)
    switch = method.switched_off(model)
    assert switch is not None
    with switch:
        off = tiny.logits(model)
    assert torch.equal(off, tiny.logits(load(method, base_dir)))
    assert not torch.equal(tiny.logits(model), off)


@EVERY
def test_nothing_decays_towards_zero_that_is_not_a_matrix(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    model = method.adapt(load(method, base_dir), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(weight_decay=0.5))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    # Vectors, though some of them are stored as matrices of one row or column, and virtual tokens.
    words = ("magnitude", "ia3_l", "vera_lambda", "lora_E", "prompt_encoder")
    neutral = {
        key for key, parameter in trained(model).items() if parameter.ndim < 2 or any(word in key for word in words)
    }
    assert decayed or neutral == set(trained(model)), "weight decay reaches nothing"
    assert not [key for key, parameter in trained(model).items() if key in neutral and id(parameter) in decayed]


@EVERY
def test_says_what_it_is(name: str) -> None:
    cls = METHODS[name]
    for said in (cls.paper, cls.summary, cls.formula, cls.typical_share, cls.choose, cls.avoid, cls.cost, cls.composes):
        assert said
        assert len(said) < 140
    assert 20 < len(cls.evidence) < 250
    assert cls.mergeable or cls.not_mergeable_because
    assert cls.as_lora or cls.not_lora_because
    assert cls.model_fields["name"].default == name


@EVERY
def test_untrained_it_is_found_not_to_be_at_work(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    model = method.adapt(load(method, base_dir), tiny.context())
    vitals = method.vitals(model, method.optimizer(model, OptimizerSpec()))
    assert vitals
    assert all(type(value) is float for value in vitals.values())
    assert method.not_at_work(vitals), "vitals of a run that never began pass for those of one that trained"


# Whole models are left out: weight decay moves their weights as it should.
@pytest.mark.parametrize("name", ADAPTERS)
def test_weight_decay_alone_does_not_put_it_to_work(name: str, base_dir: Path) -> None:
    method = tiny.method(name)
    model = method.adapt(load(method, base_dir), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2, weight_decay=0.1))
    for _ in range(50):
        for parameter in trained(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert method.not_at_work(method.vitals(model, optimizer)), "the vitals take decay for training"


@EVERY
def test_trained_it_is_at_work(name: str, tmp_path: Path) -> None:
    from ftune.artifacts.training import train

    record = train(tiny.recipe(tmp_path, name))
    assert record["optimizer"].rpartition(".")[2].startswith("GaLoreAdamW" if name == "galore" else "AdamW")
    line = record["vitals_line"]
    assert line
    assert len(line) <= 150
    assert "nan" not in line
    [*_, last] = tiny.events(tmp_path / "run", "vitals")
    assert {key: last[key] for key in record["vitals"]} == record["vitals"]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_as_plain_lora_it_gives_the_same_logits(name: str, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method(name), tiny.context()
    model = method.adapt(load(method, base_dir), context)
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)
    factors = method.to_lora(method.load(load(method, base_dir), tmp_path, context), None)
    plain = load(method, base_dir)
    with torch.no_grad():
        for key, (a, b) in factors.items():
            plain.get_submodule(key).weight += b @ a
    error = (tiny.logits(plain) - expected).abs().max()
    assert (
        error <= 2e-5
        if method.as_lora == "exact"
        else error <= 0.5 * (expected - tiny.logits(load(method, base_dir))).abs().max()
    )
