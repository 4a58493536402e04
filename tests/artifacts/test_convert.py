"""``ftune convert``: what was trained, as plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftune.artifacts.convert import to_lora
from ftune.artifacts.merge import merge
from ftune.artifacts.report import convert_summary
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import FtuneError, RunFailed
from ftune.methods import METHODS

CONVERTIBLE = [name for name, cls in METHODS.items() if cls.as_lora in ("exact", "approximate")]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_adapter_is_plain_lora_and_loads_in_peft(name: str, tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, name))
    run = RunDir(tmp_path / "run")
    report = to_lora(run)
    assert report["exact"] == (METHODS[name].as_lora == "exact")
    assert report["lora_vs_tuned"]["max_error"] <= (2e-5 if report["exact"] else report["base_vs_tuned"]["max_error"])
    config = json.loads((tmp_path / "run/lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (report["rank"], {}, report["rank"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = tiny.logits(base)
    lora = tiny.logits(PeftModel.from_pretrained(base, str(tmp_path / "run/lora")))
    assert (lora - plain).abs().max() > 1e-3
    to_lora(run)  # an older conversion is replaced


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CONVERTIBLE])
def test_what_is_no_lora_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, name, training={"max_steps": 4}))
    with pytest.raises(FtuneError) as refused:
        to_lora(RunDir(tmp_path / "run"))
    assert refused.value.help
    assert not (tmp_path / "run/lora").exists()


def test_wrong_factors_are_found_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name in CONVERTIBLE if METHODS[name].as_lora == "exact")
    train(tiny.recipe(tmp_path, name))
    right = METHODS[name].to_lora

    def doubled(self: object, model: object, rank: object) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {key: (2 * a, b) for key, (a, b) in right(self, model, rank).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(METHODS[name], "to_lora", doubled)
    with pytest.raises(RunFailed, match="are not the model that was trained"):
        to_lora(RunDir(tmp_path / "run"))
    assert not (tmp_path / "run/lora").exists()


def test_a_rank_that_holds_everything_is_exact(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, "vera", method={"rank": 256}))
    run = RunDir(tmp_path / "run")
    report = to_lora(run)
    assert (report["rank"], report["exact"]) == (64, True), "the matrices are no larger"
    assert "no more than rank 64 is needed" in convert_summary(to_lora(run, rank=5000))
    low = to_lora(run, rank=2)
    assert (low["rank"], low["exact"]) == (2, False)


def test_what_cannot_be_written_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, "vera"))
    for command in (to_lora, merge):
        with pytest.raises(FtuneError, match="cannot write to"):
            command(RunDir(tmp_path / "run"), out=Path("/proc/x"))


def test_a_directory_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, CONVERTIBLE[0]))
    (tmp_path / "run/lora").mkdir()
    (tmp_path / "run/lora/thesis.txt").write_text("dear")
    with pytest.raises(FtuneError, match="no converted adapter"):
        to_lora(RunDir(tmp_path / "run"))
