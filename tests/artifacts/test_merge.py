"""The gates of a merge: what is written is what was trained, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftune.artifacts import merge as merging
from ftune.artifacts.divergence import divergence
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import FtuneError, RunDirError, RunFailed
from ftune.methods import METHODS
from ftune.methods.lora import Lora

MERGEABLE = [name for name, cls in METHODS.items() if cls.mergeable]


def run_of(where: Path, name: str = "lora", **blocks: Any) -> RunDir:
    train(tiny.recipe(where, name, **blocks))
    return RunDir(where / "run")


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_loads_as_a_plain_model_and_is_the_tuned_one(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, name)
    report = merge(run)
    assert report["merge_error"] <= 2e-4
    assert report["merged_vs_adapter"]["max_error"] <= 2e-4
    assert report["base_vs_adapter"]["max_error"] > 0.05, "training had no effect to merge"
    assert json.loads((run.root / "merged/merge.json").read_text()) == report
    model = AutoModelForCausalLM.from_pretrained(str(run.root / "merged"))
    assert model.dtype == torch.float32
    assert model.config.use_cache
    assert AutoTokenizer.from_pretrained(str(run.root / "merged")).chat_template == tiny.CHATML


@pytest.mark.parametrize("name", MERGEABLE)
def test_what_was_trained_in_bfloat16_merges_exactly(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, name, model={"dtype": "bfloat16"})
    report = merge(run, dtype="float32")
    assert report["merge_error"] <= 2e-4
    assert report["merged_vs_adapter"]["max_error"] <= 2e-4
    assert merge(run)["dtype"] == "bfloat16"


def test_bfloat16_is_close_and_half_the_size(tmp_path: Path) -> None:
    run = run_of(tmp_path, training={"max_steps": 12})
    exact, rounded = merge(run, tmp_path / "exact"), merge(run, tmp_path / "rounded", "bfloat16")
    assert rounded["bytes"] == pytest.approx(exact["bytes"] / 2, rel=0.05)
    assert exact["merged_vs_adapter"]["kl"] < rounded["merged_vs_adapter"]["kl"] < rounded["base_vs_adapter"]["kl"]


def test_weights_that_are_not_the_trained_ones_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)
    # The commonest failure of a merge: the base model is written out unchanged.
    monkeypatch.setattr(Lora, "merge", lambda self, model, context: model.unload())
    with pytest.raises(RunFailed, match="not the model that was trained") as failed:
        merge(run)
    assert failed.value.exit_code == 1
    assert sorted(path.name for path in run.root.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
    ]


def test_a_file_that_reads_back_differently_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)
    reload = merging.reload

    def damaged(directory: Path, plan: Any) -> torch.nn.Module:
        model = reload(directory, plan)
        with torch.no_grad():
            next(model.parameters()).add_(0.01)
        return model

    monkeypatch.setattr(merging, "reload", damaged)
    with pytest.raises(RunFailed, match="read back from the disk"):
        merge(run)
    assert not (run.root / "merged").exists()


def test_rounding_that_undoes_the_training_is_refused(tmp_path: Path) -> None:
    # A learning rate so small that bfloat16 rounds the update away.
    run = run_of(tmp_path, optimizer={"learning_rate": 1e-6})
    with pytest.raises(RunFailed, match="no closer to the tuned model"):
        merge(run, dtype="bfloat16")
    assert merge(run, dtype="float32")["merged_vs_adapter"]["max_error"] <= 1e-4


def test_a_method_that_cannot_be_merged_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    monkeypatch.setattr(Lora, "mergeable", False)
    monkeypatch.setattr(Lora, "not_mergeable_because", "its vectors are no weights")
    with pytest.raises(FtuneError, match="cannot be merged") as refused:
        merge(run)
    assert refused.value.exit_code == 2
    assert refused.value.help == "its vectors are no weights"


def test_an_unfinished_run_and_a_foreign_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunDirError, match="recipe.yaml is a file, not a run directory"):
        merge(RunDir(tmp_path / "recipe.yaml"))
    with pytest.raises(RunDirError, match="no run directory"):
        merge(RunDir(tmp_path / "nowhere"))
    run = run_of(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    with pytest.raises(FtuneError, match="no merged model"):
        merge(run, tmp_path / "mine")
    (run.root / "adapter").rename(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match="no adapter/ yet"):
        merge(run)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    for name in MERGEABLE:
        run = run_of(tmp_path, name, output_dir=str(tmp_path / "run"), training={"max_steps": 4})
        assert merge(run)["merged_vs_adapter"]["max_error"] <= 2e-4
        model = AutoModelForCausalLM.from_pretrained(str(run.root / "merged"))
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        shutil.rmtree(run.root)


def test_divergence_of_known_distributions() -> None:
    a = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    found = divergence([a], [b])
    assert found.max_error == 2.0
    assert found.top1 == 0.5
    p = torch.tensor([2.0, 0.0]).softmax(0)
    expected = float((p * (p / p.flip(0)).log()).sum()) / 2
    assert found.kl == pytest.approx(expected)
    same = divergence([a], [a])
    assert (same.max_error, same.kl, same.top1) == (0.0, 0.0, 1.0)


def test_a_divergence_below_fp32_s_rounding_is_still_one() -> None:
    a = torch.randn(100, 300, generator=torch.Generator().manual_seed(0))
    b = a + 1e-5 * torch.randn(100, 300, generator=torch.Generator().manual_seed(1))
    # For a small difference d of logits, half the variance of d under the model's own distribution.
    p, d = a.double().softmax(-1), b.double() - a.double()
    expected = float(((p * d**2).sum(-1) - (p * d).sum(-1) ** 2).mean()) / 2
    assert divergence([a], [b]).kl == pytest.approx(expected, rel=1e-3)
