"""A base that is no causal language model is refused in one line, by what it is and by what a later token changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from ftune.errors import ModelError
from ftune.methods.lora import Lora
from ftune.plan.base_model import check_causal, load_base, load_config
from ftune.plan.causal import sees_later_tokens, small_sees_later_tokens
from ftune.plan.resolve import resolve
from ftune.recipe.schema import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = SIZES | {"num_key_value_heads": 2}


def made(config: str, **settings: Any) -> Any:
    return getattr(transformers, f"{config}Config")(**settings)


@pytest.mark.parametrize(
    ("kind", "config", "what"),
    [
        ("BertForSequenceClassification", made("Bert", **SIZES), "a model for sequence classification"),
        ("BertForMaskedLM", made("Bert", **SIZES), "a model for masked language modelling"),
        ("ModernBertForMaskedLM", made("ModernBert", **SIZES, pad_token_id=0), "masked language modelling"),
        ("LlamaForSequenceClassification", made("Llama", **DECODER, pad_token_id=0), "sequence classification"),
        ("LlamaForTokenClassification", tiny.config(tie_word_embeddings=True), "token classification"),
        (
            "T5ForConditionalGeneration",
            made("T5", vocab_size=259, d_model=64, d_ff=64, d_kv=16, num_layers=1, num_heads=4),
            "an encoder-decoder",
        ),
        (
            "BartForConditionalGeneration",
            made("Bart", vocab_size=259, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64),
            "an encoder-decoder",
        ),
        ("DistilBertModel", made("DistilBert", vocab_size=259, dim=64, n_layers=1, n_heads=4), "not a causal language"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_by_what_it_is(
    kind: str, config: Any, what: str, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    (tmp_path / "base/model.safetensors").unlink()
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError) as error:
        resolve(recipe)
    assert what in error.value.message
    assert kind in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 200 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "leaks"),
    [
        (made("Llama", **DECODER), False),
        (made("Llama", **DECODER, is_causal=False), True),
        (made("Qwen3", **DECODER, head_dim=16, is_causal=False), True),
        (made("Gemma3Text", **DECODER, head_dim=16, sliding_window=4), False),
        (made("Gemma3Text", **DECODER, head_dim=16, use_bidirectional_attention=True), True),
        (made("Bert", **SIZES), True),  # BertLMHeadModel, without is_decoder
        (made("Bert", **SIZES, is_decoder=True), False),
        (made("XLNet", vocab_size=259, d_model=64, n_layer=2, n_head=4, d_inner=64), True),
        (made("Mixtral", **DECODER, num_local_experts=4), False),
        (made("Mamba2", vocab_size=259, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16), None),
    ],
)
def test_a_small_model_of_the_configuration_tells_whether_it_is_causal(config: Any, leaks: bool | None) -> None:
    before = config.to_dict()
    state = torch.random.get_rng_state()
    assert small_sees_later_tokens(config) is leaks
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_each_kind_of_layer_is_in_the_small_model() -> None:
    layers = ["full_attention"] * 11 + ["sliding_attention"]
    config = made(
        "Gemma3Text", **DECODER | {"num_hidden_layers": 12}, head_dim=16, sliding_window=4, layer_types=layers
    )
    assert small_sees_later_tokens(config) is False
    config.use_bidirectional_attention = True
    assert small_sees_later_tokens(config) is True


def test_a_decoder_made_bidirectional_is_refused_by_the_plan(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_causal": False}))
    with pytest.raises(ModelError, match="is not causal: a later token changes the logits") as error:
        resolve(recipe)
    assert "is_causal" in (error.value.help or "")


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_where_no_small_model_can_be_made_the_loaded_one_is_asked(
    dtype: torch.dtype, causal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.model_dir(tmp_path / "m", is_causal=causal)
    monkeypatch.setattr("ftune.plan.base_model.small_sees_later_tokens", lambda config: None)
    spec = ModelSpec(id=str(directory))
    check_causal(spec)
    if causal:
        assert load_base(spec, Lora(), dtype, torch.device("cpu")).training
        return
    with pytest.raises(ModelError, match="is not causal"):
        load_base(spec, Lora(), dtype, torch.device("cpu"))


def test_logits_that_are_not_finite_tell_nothing() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.get_parameter("lm_head.weight").fill_(float("nan"))
    assert sees_later_tokens(model) is None


@pytest.mark.parametrize("change", [{"architectures": 5}, {"architectures": "Llama"}, {"auto_map": "x"}])
def test_values_that_say_nothing_are_passed_over(change: dict[str, Any], tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = ""
    try:
        layers = resolve(recipe).shape.layers
    except ModelError as error:  # older versions of transformers are strict
        layers, said = 2, error.message
    assert layers == 2
    assert not said or "Field 'architectures' with value" in said


def test_code_that_is_no_name_is_one_sentence(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": 5}}))
    with pytest.raises(ModelError) as error:
        resolve(recipe)
    assert "\n" not in error.value.message


def test_a_decoder_saved_without_architectures_is_taken(tmp_path: Path) -> None:
    path = tiny.model_dir(tmp_path / "m") / "config.json"
    content = json.loads(path.read_text())
    del content["architectures"]
    path.write_text(json.dumps(content))
    spec = ModelSpec(id=str(tmp_path / "m"))
    assert load_config(spec).architectures is None
    check_causal(spec)
