"""Weights that are cast are read one by one: the model is the same, and its checkpoint is never beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from plan.test_gguf import assert_same
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.errors import ModelError
from ftune.methods.lora import Lora
from ftune.methods.qlora import QLora
from ftune.plan.base_model import load_base
from ftune.plan.weights import load_cast
from ftune.recipe.schema import ModelSpec

CPU = torch.device("cpu")


def settings(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    return {"config": AutoConfig.from_pretrained(path), "dtype": dtype, "attn_implementation": "sdpa"}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_that_of_from_pretrained(shards: bool, tied: bool, tmp_path: Path) -> None:
    model: Any = tiny.model(tie_word_embeddings=tied)
    model.generation_config.temperature = 0.3
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path, max_shard_size="50KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    streamed = load_cast(str(tmp_path), None, settings(tmp_path, torch.bfloat16))
    assert streamed is not None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **settings(tmp_path, torch.bfloat16))
    assert_same(streamed, plain)
    assert streamed.generation_config == plain.generation_config
    assert streamed.config.to_dict() | {"_name_or_path": ""} == plain.config.to_dict() | {"_name_or_path": ""}
    assert (streamed.lm_head.weight is streamed.model.embed_tokens.weight) == tied
    assert streamed.training == plain.training


def test_quantizing_reads_one_by_one_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(id=str(tiny.model_dir(tmp_path / "m")))
    streamed = load_base(spec, QLora(), torch.bfloat16, CPU)
    with monkeypatch.context() as patched:
        patched.setattr("ftune.plan.base_model.load_cast", lambda *_: None)
        assert_same(streamed, load_base(spec, QLora(), torch.bfloat16, CPU))


def test_what_need_not_be_cast_is_left_to_transformers(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "fp32")
    assert load_cast(str(tmp_path / "fp32"), None, settings(tmp_path / "fp32", torch.float32)) is None


def test_weights_that_are_not_floating_are_left_to_transformers(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert load_cast(str(tmp_path), None, settings(tmp_path, torch.bfloat16)) is None


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_cast(str(tmp_path), None, settings(tmp_path, torch.bfloat16)) is None
    with pytest.raises(ModelError, match="pickle"):
        load_base(ModelSpec(id=str(tmp_path)), Lora(), torch.bfloat16, CPU)


def test_without_its_own_settings_for_generation_it_is_left_to_transformers(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert load_cast(str(tmp_path), None, settings(tmp_path, torch.bfloat16)) is None


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    spec = ModelSpec(id=str(tiny.model_dir(tmp_path / "m")))
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is cut short"):
        load_base(spec, Lora(), torch.bfloat16, CPU)


PEAK = """
import sys, torch
from pathlib import Path
from transformers.models.llama import modeling_llama
from ftune.methods.lora import Lora
from ftune.plan.base_model import load_base, load_config
from ftune.recipe.schema import ModelSpec

def resident(what):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024

spec = ModelSpec(id=sys.argv[1])
load_config(spec)
before = resident("VmRSS")
model = load_base(spec, Lora(), torch.bfloat16, torch.device("cpu"))
print(resident("VmHWM") - before, sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_the_peak_is_the_model_not_the_model_and_its_checkpoint(tmp_path: Path) -> None:
    tiny.model(hidden_size=768, intermediate_size=3072, num_hidden_layers=8, head_dim=64).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    grown, weights = map(int, done.stdout.split())
    assert weights > 100e6, "large against what the libraries load on the way"
    # The checkpoint is twice the model.
    assert weights < grown < 2 * weights
