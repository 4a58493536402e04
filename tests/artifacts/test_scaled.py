"""Earlier checkpoints and smaller changes: merged is W0 + s (W - W0), and what is measured is what is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ftune.artifacts import by_shard, evaluate, merge
from ftune.artifacts.merge import merge as merge_run
from ftune.artifacts.objective import make_objective
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target, load_plain, scaled
from ftune.cli import app
from ftune.errors import FtuneError, RunDirError, RunFailed
from ftune.methods import METHODS
from ftune.models.quantization import dequantize
from ftune.plan.resolve import resolve
from ftune.run.objective import Objective

MERGEABLE = [name for name, cls in METHODS.items() if cls.mergeable]
WHOLE = [name for name in MERGEABLE if METHODS[name].artifact == "model"]


def run_of(where: Path, name: str = "lora", until: int | None = None, **blocks: Any) -> RunDir:
    train(tiny.recipe(where, name, checkpoint={"every_steps": 2, "keep": 4}, **blocks), until=until)
    return RunDir(where / "run")


def merged(run: RunDir, name: str, **asked: Any) -> dict[str, torch.Tensor]:
    """The tensors of a merge in fp32, and of the file, beside the run."""
    out = run.root.parent / name
    report = merge_run(run, out, "float32", **asked)
    assert json.loads((out / "merge.json").read_text()) == report
    return {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}


def base_of(run: RunDir) -> dict[str, torch.Tensor]:
    """What the run's weights were before training, in fp32."""
    plain = dequantize(load_plain(resolve(run.recipe())))
    return {name: parameter.detach().float() for name, parameter in plain.named_parameters()}


def require_between(run: RunDir, scale: float) -> None:
    base, whole, part = base_of(run), merged(run, "whole"), merged(run, "part", scale=scale)
    assert base.keys() == whole.keys() == part.keys()
    changed = 0
    for name, before in base.items():
        change = whole[name] - before
        assert torch.allclose(part[name], before + scale * change, rtol=0, atol=1e-6), name
        changed += bool(change.abs().max() > 1e-4)
    assert changed >= 3, "training changed nothing, so any scale is right"


@pytest.mark.parametrize("name", MERGEABLE)
def test_every_weight_is_between_the_base_s_and_the_trained_one(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, name)
    require_between(run, 0.25)
    in_memory, shards = merged(run, "memory", scale=0.6), merged(run, "shards", scale=0.6, by_shard=True)
    assert all(torch.equal(in_memory[key], shards[key]) for key in in_memory)


@pytest.mark.parametrize("name", MERGEABLE)
def test_so_it_is_in_bfloat16_with_a_tied_head(name: str, tmp_path: Path) -> None:
    tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    run = run_of(tmp_path, name, model={"dtype": "bfloat16"})
    require_between(run, 0.5)
    assert merge_run(run, scale=0.5)["dtype"] == "bfloat16"
    shards = merged(run, "shards", scale=0.5, by_shard=True)
    assert all(torch.equal(value, shards[key]) for key, value in merged(run, "memory", scale=0.5).items())


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_checkpoint_is_merged_as_the_run_that_ended_there(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, name, until=2)
    early = merged(run, "early", checkpoint="step-2")
    train(tiny.recipe(tmp_path, name, checkpoint={"every_steps": 2, "keep": 4}), resume=True)
    end = merged(run, "end")
    last = merged(run, "last", checkpoint="4")
    assert all(torch.allclose(last[key], end[key], rtol=0, atol=1e-6) for key in end)
    again = merged(run, "again", checkpoint="2")
    assert all(torch.equal(again[key], early[key]) for key in early)
    assert any(not torch.allclose(early[key], end[key], rtol=0, atol=1e-4) for key in end)
    if name in WHOLE:
        stored = load_file(run.checkpoints / "step-2/trained.safetensors")
        assert all(torch.equal(early[key], stored[key].float()) for key in stored)
        with pytest.raises(FtuneError, match="cannot be merged shard by shard"):
            merge_run(run, checkpoint="2", by_shard=True)
    else:
        shards = merged(run, "shards", checkpoint="2", by_shard=True)
        assert all(torch.equal(shards[key], early[key]) for key in early)


def test_lora_s_checkpoint_by_hand(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    stored = load_file(run.checkpoints / "step-2/trained.safetensors")
    found, base = merged(run, "half", checkpoint="2", scale=0.5), base_of(run)
    lora = run.recipe().method
    for name, weight in base.items():
        a, b = (
            stored.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.default.weight") for x in ("A", "B")
        )
        if a is not None and b is not None:
            weight = weight + 0.5 * lora.scaled_alpha / lora.rank * (b @ a)  # type: ignore[attr-defined]
        assert torch.allclose(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "apart"),
    [*((name, "float32", 1e-5) for name in MERGEABLE), ("lora", "bfloat16", 1e-3), ("dora", "bfloat16", 1e-3)],
)
def test_what_is_measured_is_what_is_merged(
    name: str, dtype: str, apart: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean: list[dict[str, Any]] = []

    def watched(*arguments: Any) -> tuple[Objective, dict[str, Any]]:
        objective, replaced = make_objective(*arguments)
        lean.append(replaced)
        return objective, replaced

    monkeypatch.setattr(evaluate, "make_objective", watched)
    asked = {"evaluation": {"metrics": ["f1"], "max_new_tokens": 4}, "model": {"dtype": dtype}}
    tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    run = run_of(tmp_path, name, **asked)
    whole = evaluate.evaluate(find_target(run.root), base=True)
    found = evaluate.evaluate(scaled(find_target(run.root, "2"), 0.5), base=True)
    assert found["scale"] == 0.5
    assert [bool(one["low_rank"]) for one in lean] == [True, True] * (dtype == "bfloat16"), "in 16 bits alone"
    assert found["base"]["loss"] == pytest.approx(whole["base"]["loss"], rel=1e-6), "a scaled adapter is switched off"
    assert json.loads((run.root / "eval.json").read_text())["tuned"] == whole["tuned"], "it was replaced"
    assert json.loads((run.root / "evaluations/step-2-scale-0.5/eval.json").read_text())["tuned"] == found["tuned"]
    merged(run, "half", checkpoint="2", scale=0.5)
    plain = tiny.recipe(
        tmp_path,
        **{**asked, "model": {"dtype": dtype, "id": str(tmp_path / "half")}},
        output_dir=str(tmp_path / "none"),
    )
    (tmp_path / "plain.yaml").write_text(plain.text)
    alone = evaluate.evaluate(find_target(tmp_path / "plain.yaml"), base=True)["base"]
    assert found["tuned"]["loss"] == pytest.approx(alone["loss"], rel=apart)
    assert found["tuned"]["metrics"] == alone["metrics"]
    assert alone["loss"] != pytest.approx(whole["tuned"]["loss"], rel=1e-2)


@pytest.mark.parametrize("shards", [False, True])
def test_weights_that_are_not_scaled_leave_nothing_behind(
    shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)
    for module in (merge, by_shard):
        monkeypatch.setattr(module, "interpolated", lambda base, tuned, scale: tuned)
    with pytest.raises(RunFailed, match="nothing was written"):
        merge_run(run, scale=0.5, by_shard=shards)
    assert not (run.root / "merged").exists()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    with pytest.raises(RunDirError, match="no checkpoint 3") as refused:
        merge_run(run, checkpoint="3")
    assert refused.value.help == "its checkpoints: step-2, step-4"
    for scale in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(FtuneError, match="not above 0 and at most 1"):
            merge_run(run, scale=scale)
    (tmp_path / "other.yaml").write_text(tiny.recipe(tmp_path, output_dir=str(tmp_path / "none")).text)
    with pytest.raises(FtuneError, match="no run yet"):
        scaled(find_target(tmp_path / "other.yaml"), 0.5)


def test_what_is_no_change_of_weights_has_no_scale(tmp_path: Path) -> None:
    run = run_of(tmp_path, "prompt")
    with pytest.raises(FtuneError, match="has no scale"):
        scaled(find_target(run.root), 0.5)


def test_a_pissa_run_is_scaled_at_its_end_and_its_checkpoints_are_merged(tmp_path: Path) -> None:
    run = run_of(tmp_path, method={"init": "pissa"})
    require_between(run, 0.5)
    end, last = merged(run, "end"), merged(run, "last", checkpoint="4")
    assert all(torch.allclose(last[key], end[key], rtol=0, atol=1e-5) for key in end)
    with pytest.raises(FtuneError, match="has no scale: its base"):
        merge_run(run, checkpoint="2", scale=0.5)
    with pytest.raises(FtuneError, match="cannot be merged shard by shard"):
        merge_run(run, checkpoint="2", by_shard=True)


def test_the_commands_take_a_step_and_a_scale(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    said = CliRunner().invoke(app, ["merge", str(run.root), "--step", "2", "--scale", "0.5"])
    assert said.exit_code == 0, said.output
    assert f"merged step-2 at scale 0.5: {run.root}/merged" in said.output
    said = CliRunner().invoke(app, ["merge", str(run.root), "--step", "2", "--scale", "0.5", "--by-shard"])
    assert f"merged step-2 at scale 0.5 shard by shard: {run.root}/merged" in said.output
    assert json.loads((run.root / "merged/merge.json").read_text())["checkpoint"] == "step-2"
    said = CliRunner().invoke(app, ["eval", str(run.root), "--step", "2", "--scale", "0.5"])
    assert "the trained change is applied at scale 0.5" in said.output
