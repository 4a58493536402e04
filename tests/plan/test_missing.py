"""A base model whose files do not hold all of its weights is refused, by the plan and at every load."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

from ftune.errors import ModelError
from ftune.methods.full import Full
from ftune.methods.lora import Lora
from ftune.methods.qlora import QLora
from ftune.plan.base_model import check_weights, load_base
from ftune.plan.build import build
from ftune.plan.missing import require_whole
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.recipe.schema import ModelSpec

CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"
FILE = "model.safetensors"

Weights = dict[str, torch.Tensor]


def edit(directory: Path, change: Callable[[Weights], Any]) -> Path:
    """Change what the one file of a model holds."""
    weights = load_file(directory / FILE)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / FILE, {"format": "pt"})
    return directory


def configure(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def refused(directory: Path) -> ModelError:
    """The refusal, which must be the same of the headers alone and of a load."""
    spec = ModelSpec(id=str(directory))
    with pytest.raises(ModelError) as planned:
        check_weights(spec, download=False)
    for method, dtype in ((Lora(), torch.float32), (Lora(), torch.bfloat16), (QLora(), torch.float32)):
        with pytest.raises(ModelError) as loaded:
            load_base(spec, method, dtype, CPU)
        assert loaded.value.message == planned.value.message
    return planned.value


def test_a_missing_tensor_is_named_by_the_plan(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    edit(tmp_path / "base", lambda weights: weights.pop(DOWN))
    with pytest.raises(ModelError) as error:
        resolve(recipe)
    assert "do not hold 1 of the 21 tensors of LlamaForCausalLM" in error.value.message
    assert f"no `{DOWN}`" in error.value.message
    assert "\n" not in error.value.message
    refused(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_missing_after_a_load_is_refused_without_the_plan(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = edit(tiny.model_dir(tmp_path / "m"), lambda weights: weights.pop(DOWN))
    monkeypatch.setattr("ftune.plan.base_model.check_weights", lambda spec: ())
    for method in (Lora(), QLora(), Full()):
        with pytest.raises(ModelError, match=f"no `{DOWN}`"):
            load_base(ModelSpec(id=str(directory)), method, dtype, CPU)


def test_another_shape_is_named_with_both(tmp_path: Path) -> None:
    error = refused(configure(tiny.model_dir(tmp_path / "m"), intermediate_size=96))
    assert "6 of the 21 tensors" in error.message
    assert "`model.layers.0.mlp.down_proj.weight` (64 x 128, not 64 x 96)" in error.message
    assert error.message.endswith("and 2 more")


def test_more_layers_in_the_configuration_than_in_the_files(tmp_path: Path) -> None:
    assert "model.layers.2." in refused(configure(tiny.model_dir(tmp_path / "m"), num_hidden_layers=3)).message


def test_names_of_another_kind_are_told_beside_what_is_missing(tmp_path: Path) -> None:
    def rename(weights: Weights) -> None:
        for name in list(weights):
            weights[f"module.{name}"] = weights.pop(name)

    message = refused(edit(tiny.model_dir(tmp_path / "m"), rename)).message
    assert "21 of the 21" in message
    assert "instead they hold 21 tensors (`module.lm_head.weight`" in message


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_head_that_is_really_missing_is_refused(kind: Any, tmp_path: Path) -> None:
    kind(tiny.config()).save_pretrained(tmp_path / "m")
    error = refused(configure(tmp_path / "m", architectures=["LlamaForCausalLM"]))
    assert "no `lm_head.weight`" in error.message
    assert "classifier" in (error.help or "")


def test_what_is_absent_rightly_is_no_refusal(tmp_path: Path) -> None:
    def head_alone(weights: Weights) -> None:
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")

    tied = tiny.model_dir(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / FILE)
    swapped = edit(tiny.model_dir(tmp_path / "swapped", tie_word_embeddings=True), head_alone)
    bare = edit(
        tiny.model_dir(tmp_path / "bare"),
        lambda weights: [weights.update({name.removeprefix("model."): weights.pop(name)}) for name in list(weights)],
    )
    frequencies = edit(
        tiny.model_dir(tmp_path / "frequencies"),
        lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    for directory, ties in ((tied, True), (swapped, True), (bare, False), (frequencies, False)):
        spec = ModelSpec(id=str(directory))
        assert check_weights(spec) == ()
        base = load_base(spec, Lora(), torch.float32, CPU)
        assert torch.equal(tiny.logits(base), tiny.logits(tiny.model(tie_word_embeddings=ties)))


def test_tensors_that_the_model_does_not_use_are_told_once(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    edit(tmp_path / "base", lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}))
    warnings = [line for line in summary_of(resolve(recipe))["warnings"] if "does not use" in line]
    assert len(warnings) == 1
    assert "1 tensor (`model.layers.2.mlp.up_proj.weight`)" in warnings[0]


@pytest.mark.parametrize("row", [0, 129])  # what the plan samples, and what shows only when all of it is read
def test_a_head_tied_by_the_configuration_and_other_in_the_files(row: int, tmp_path: Path) -> None:
    def untie(weights: Weights) -> None:
        head = weights["model.embed_tokens.weight"].clone()
        head[row] += 1
        weights["lm_head.weight"] = head

    spec = ModelSpec(id=str(edit(tiny.model_dir(tmp_path / "m", tie_word_embeddings=True), untie)))
    if row == 0:
        with pytest.raises(ModelError, match="are tied by the config.json"):
            check_weights(spec)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=r"`lm_head.weight` and `model.embed_tokens.weight` are tied") as error:
            load_base(spec, Lora(), dtype, CPU)
        assert "tie_word_embeddings" in (error.value.help or "")


def test_a_tied_head_that_the_file_repeats_is_taken(tmp_path: Path) -> None:
    directory = edit(
        tiny.model_dir(tmp_path / "m", tie_word_embeddings=True),
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
    )
    assert check_weights(ModelSpec(id=str(directory))) == ()
    load_base(ModelSpec(id=str(directory)), Lora(), torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_need_scales_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = edit(
        tiny.model_dir(tmp_path / "m"), lambda weights: weights.update({DOWN: (weights[DOWN] * 9).to(dtype)})
    )
    assert "do not say how they are scaled" in refused(directory).message


def mixture(path: Path) -> Path:
    sizes = {name: value for name, value in tiny.config().to_dict().items() if isinstance(value, int)}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = AutoConfig.for_model("qwen3_moe", **sizes | experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_experts_are_looked_for_as_they_are_stored(tmp_path: Path) -> None:
    directory = mixture(tmp_path / "whole")
    assert "model.layers.1.mlp.experts.2.gate_proj.weight" in load_file(directory / FILE)
    assert check_weights(ModelSpec(id=str(directory))) == ()
    lost = "model.layers.1.mlp.experts.2.gate_proj.weight"
    assert f"`{lost}` missing" in refused(edit(directory, lambda weights: weights.pop(lost))).message
    expert = edit(
        mixture(tmp_path / "expert"),
        lambda weights: [weights.pop(name) for name in list(weights) if ".1.mlp.experts.2." in name],
    )
    assert "`model.layers.1.mlp.experts.down_proj` (3 x 64 x 32, not 4 x 64 x 32)" in refused(expert).message


def sharded(path: Path) -> Path:
    tiny.model().save_pretrained(path, max_shard_size="100KB")
    return path


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "m")
    last = sorted(directory.glob("model-*.safetensors"))[-1]
    last.unlink()
    error = refused(directory)
    assert f"lacks 1 of the 5 files that its index names: `{last.name}`" in error.message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{not json", "is damaged at line 1, column 2"),
        ("{}", "maps no tensors to files"),
        ('{"weight_map": []}', "maps no tensors to files"),
        ('{"weight_map": {}}', "its index names none"),
        ('{"weight_map": {"a": "nothing.safetensors"}}', "lacks 1 of the 1 files"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no file beside it"),
    ],
)
def test_an_index_that_points_to_nothing(index: str, message: str, tmp_path: Path) -> None:
    directory = sharded(tmp_path / "m")
    (directory / f"{FILE}.index.json").write_text(index)
    assert message in refused(directory).message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<html>404</html>" * 9, "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    ],
)
def test_a_file_that_is_no_safetensors_file(content: bytes, message: str, tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    (directory / FILE).write_bytes(content)
    error = refused(directory)
    assert f"`m/{FILE}`" in error.message
    assert message in error.message


def test_a_truncated_file_and_one_without_tensors(tmp_path: Path) -> None:
    cut = tiny.model_dir(tmp_path / "cut")
    (cut / FILE).write_bytes((cut / FILE).read_bytes()[:-100])
    assert "cut short" in refused(cut).message
    empty = edit(tiny.model_dir(tmp_path / "empty"), lambda weights: weights.clear())
    assert "21 of the 21" in refused(empty).message


def test_safetensors_under_another_name_are_named(tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    (directory / FILE).rename(directory / "consolidated.safetensors")
    assert "`consolidated.safetensors`" in refused(directory).message


def test_links_to_a_directory_and_to_its_file_are_followed(tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    (directory / FILE).rename(tmp_path / "blob")
    (directory / FILE).symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(directory)
    assert check_weights(ModelSpec(id=str(tmp_path / "link"))) == ()


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_no_base_model(whole: bool, tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m") if whole else tmp_path
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(ModelError, match="adapter") as error:
        check_weights(ModelSpec(id=str(directory)))
    assert "merge" in (error.value.help or "")


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": "two"}, {"hidden_size": 65}, {"num_hidden_layers": -1}, {"rope_parameters": 3}]
)
def test_a_configuration_with_values_that_cannot_be(change: dict[str, Any], tmp_path: Path) -> None:
    directory = configure(tiny.model_dir(tmp_path / "m"), **change)
    with pytest.raises(ModelError, match="cannot be that of a model") as error:
        check_weights(ModelSpec(id=str(directory)))
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500 + len(str(tmp_path))


def test_transformers_prints_no_report_of_its_own(tmp_path: Path) -> None:
    directory = edit(tiny.model_dir(tmp_path / "m"), lambda weights: weights.pop(DOWN))
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("transformers.modeling_utils")
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        refused(directory)
    finally:
        logger.removeHandler(handler)
    assert records == []


def test_a_whole_load_is_whole() -> None:
    found: dict[str, Any] = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"x"}}
    require_whole(found, tiny.model(), "m")
    with pytest.raises(ModelError, match="no `a`, `b`, `c`, `d` and 1 more"):
        require_whole(found | {"missing_keys": set("abcde")}, tiny.model(), "m")


@pytest.mark.parametrize(("value", "dtype"), [("nan", torch.float32), ("inf", torch.bfloat16), ("-inf", torch.float32)])
def test_a_weight_that_is_no_number_is_named_before_training(value: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def spoil(weights: Weights) -> None:
        weights[DOWN][3, 3] = float(value)

    recipe = tiny.recipe(tmp_path, model={"dtype": str(dtype).removeprefix("torch.")}).recipe
    plan = resolve(recipe)
    build(plan)
    edit(tmp_path / "base", spoil)
    with pytest.raises(ModelError, match=f"are NaN or infinite: `{DOWN}`"):
        build(plan)
