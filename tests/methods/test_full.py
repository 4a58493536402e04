"""Full fine-tuning: what is saved."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    method, context = tiny.method("full"), tiny.context(dtype=torch.bfloat16)
    model = method.adapt(tiny.model(tie_word_embeddings=True), context)
    tiny.disturb(model)
    method.save(model, tmp_path, context)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_a_tied_model_is_loaded_over_its_base(tmp_path: Path) -> None:
    method, context = tiny.method("full"), tiny.context()
    model = method.adapt(tiny.model(tie_word_embeddings=True), context)
    tiny.disturb(model)
    method.save(model, tmp_path, context)
    again = method.load(tiny.model(tie_word_embeddings=True), tmp_path, context)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(tiny.logits(again), tiny.logits(model))
