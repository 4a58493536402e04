"""Loading a base model from every kind of place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.errors import ModelError
from ftune.methods.full import Full
from ftune.methods.lora import Lora
from ftune.methods.qlora import QLora
from ftune.plan.base_model import load_base, load_config, load_tokenizer
from ftune.plan.resolve import resolve
from ftune.recipe.schema import ModelSpec

CPU = torch.device("cpu")


def hub_cache(root: Path, name: str, model: Path, revision: str = "a" * 40) -> None:
    """Lay a model out as the hub's cache does."""
    repository = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)


def test_a_hub_id_is_read_from_the_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub_cache(tmp_path / "hub", "tiny/llama", tiny.model_dir(tmp_path / "model"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "main", "a" * 40):
        spec = ModelSpec(id="tiny/llama", revision=revision)
        assert load_config(spec).hidden_size == 64
        assert load_tokenizer(spec).chat_template == tiny.CHATML
        base = load_base(spec, Lora(), torch.float32, CPU)
        assert torch.equal(tiny.logits(base), tiny.logits(tiny.model()))


def test_a_hub_miss_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot read the tokenizer of model `nobody/nothing`") as missed:
        load_tokenizer(ModelSpec(id="nobody/nothing"))
    assert "HF_HUB_OFFLINE" in (missed.value.help or "")


def test_rotary_frequencies_stay_fp32_in_a_16_bit_model(tmp_path: Path) -> None:
    base = load_base(ModelSpec(id=str(tiny.model_dir(tmp_path / "m"))), Lora(), torch.bfloat16, CPU)
    frequencies = dict(base.named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(frequencies, dict(tiny.model().named_buffers())["model.rotary_emb.inv_freq"])
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}


def test_full_keeps_fp32_master_weights_whatever_it_computes_in(tmp_path: Path) -> None:
    base = load_base(ModelSpec(id=str(tiny.model_dir(tmp_path / "m"))), Full(), torch.bfloat16, CPU)
    assert {p.dtype for p in base.parameters()} == {torch.float32}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are mapped")
def test_a_quantized_model_lets_go_of_the_file_it_was_made_of(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny.model().bfloat16().save_pretrained(directory)
    method = QLora(name="qlora")
    quantized = load_base(ModelSpec(id=str(directory)), method, torch.bfloat16, torch.device("cpu"))
    assert str(directory) not in Path("/proc/self/maps").read_text()
    dense = load_base(ModelSpec(id=str(directory)), Lora(name="lora"), torch.bfloat16, torch.device("cpu"))
    assert str(directory) in Path("/proc/self/maps").read_text()  # where nothing is copied: the file is the weights
    embeddings = [model.get_input_embeddings().weight for model in (quantized, dense)]
    assert torch.equal(*embeddings)


def test_the_configuration_is_a_copy(tmp_path: Path) -> None:
    spec = ModelSpec(id=str(tiny.model_dir(tmp_path / "m")))
    load_config(spec).hidden_size = 1
    assert load_config(spec).hidden_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2", "head_dim": 16}, "attention: eager"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "method: full"),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    loaded = tiny.recipe(tmp_path, model={"attention": "sdpa"})
    sizes = {name: value for name, value in tiny.config().to_dict().items() if isinstance(value, int)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | change)).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=str(change["model_type"])) as refused:
        resolve(loaded.recipe)
    assert message in (refused.value.help or "")
