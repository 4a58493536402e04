"""A run directory is checked as a recipe is: damage and forgery are located errors, never another model."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import load_plain, load_tuned
from ftune.errors import FtuneError, RunDirError
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.run.manifest import write_manifest

CONFIG, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    where = tmp_path_factory.mktemp("finished")
    changes = {"training": {"max_steps": 2, "gradient_accumulation_steps": 1}, "checkpoint": {"every_steps": 1}}
    train(tiny.recipe(where, **changes), progress=False)
    return where, resolve(RunDir(where / "run").recipe())


@pytest.fixture
def run(finished: tuple[Path, Plan], tmp_path: Path) -> Path:
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


def without_digests(run: Path) -> Path:
    """As a stranger writes it, or an older version."""
    edit(run / "run.json", lambda record: record.pop("artifact_sha256") and None)
    return run


def load(run: Path, plan: Plan) -> torch.nn.Module:
    RunDir(run).recipe()
    return load_tuned(load_plain(plan), plan, RunDir(run))


def test_an_untouched_run_is_read_with_and_without_digests(run: Path, finished: tuple[Path, Plan]) -> None:
    weights = [tiny.logits(load(run, finished[1])), tiny.logits(load(without_digests(run), finished[1]))]
    assert torch.equal(*weights)
    (run / "adapter/README.md").write_text("my own words")
    load(run, finished[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 8}, "`r` is 8, and the recipe has 4"),
        ({"lora_alpha": 1e6}, "`lora_alpha`"),
        ({"use_rslora": True}, "`use_rslora`"),
        ({"use_dora": True}, "`use_dora`"),
        ({"peft_type": "IA3"}, "`peft_type`"),
        ({"peft_type": "NO_SUCH"}, "`peft_type`"),
        ({"target_modules": ["q_proj"]}, "`target_modules`"),
        ({"target_modules": "(a+)+$"}, "`target_modules`"),
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, "`target_modules`"),
        ({"layers_to_transform": [0]}, "`layers_to_transform`"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "`layer_replication`"),
        ({"rank_pattern": {"(a+)+$": 8}}, "`rank_pattern`"),
        ({"alpha_pattern": {"q_proj": 1000}}, "`alpha_pattern`"),
        ({"exclude_modules": "(a|a)*b"}, "`exclude_modules`"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights`"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "`megatron_config`"),
        ({"auto_mapping": {"parent_library": "antigravity", "base_model_class": "X"}}, "`auto_mapping`"),
        ({"base_model_name_or_path": "/etc"}, "`base_model_name_or_path`"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices`"),
        ({"no_such_field": "x"}, "`no_such_field`"),
        ({"fan_in_fan_out": 1}, "`fan_in_fan_out`"),
    ],
)
def test_an_adapter_that_is_not_the_recipes_is_refused_by_field(
    change: dict[str, Any], said: str, run: Path, finished: tuple[Path, Plan]
) -> None:
    without_digests(run)
    edit(run / CONFIG, lambda config: config.update(change))
    with pytest.raises(FtuneError, match="does not fit the recipe") as refused:
        load(run, finished[1])
    assert said in str(refused.value)


def test_an_adapter_of_an_older_peft_is_read(run: Path, finished: tuple[Path, Plan]) -> None:
    without_digests(run)
    edit(run / CONFIG, lambda config: {k: v for k, v in config.items() if k not in ("use_dora", "peft_version")})
    load(run, finished[1])


def header(change: Callable[[dict[str, Any], list[str]], Any]) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + length])
        change(head, [name for name in head if name != "__metadata__"])
        new = json.dumps(head).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return mutate


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return mutate


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


DAMAGE: dict[str, Callable[[Path], None]] = {
    "deleted": lambda path: path.unlink(),
    "empty": content(lambda data: b""),
    "half": content(lambda data: data[: len(data) // 2]),
    "noise": content(lambda data: random.Random(3).randbytes(300)),
    "deep": content(lambda data: b"[" * 100_000),
    "null": content(lambda data: b"null"),
    "a list": content(lambda data: b"[1, 2]"),
    "a directory": lambda path: (path.unlink(), path.mkdir()) and None,
}
WEIGHTS_DAMAGE: dict[str, Callable[[Path], None]] = {
    "header of 2^60": content(lambda data: struct.pack("<Q", 2**60) + data[8:]),
    "overlap": header(lambda head, names: head[names[0]].update(data_offsets=head[names[-1]]["data_offsets"])),
    "offsets far out": header(lambda head, names: head[names[0]].update(data_offsets=[0, 10**15])),
    "transposed": header(lambda head, names: head[names[0]].update(shape=head[names[0]]["shape"][::-1])),
    "another rank": tensors(lambda found: found.update({name: t.repeat(2, 1) for name, t in found.items()})),
    "one renamed": tensors(lambda found: found.update({"x.lora_A.weight": found.pop(next(iter(found)))})),
    "one missing": tensors(lambda found: found.pop(next(iter(found)))),
    "the base's head too": tensors(
        lambda found: found.update({"base_model.model.lm_head.weight": torch.zeros(len(tiny.tokenizer()), 64)})
    ),
    "not a number": tensors(lambda found: next(iter(found.values())).fill_(float("nan"))),
}


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, how) for name in (CONFIG, WEIGHTS) for how in DAMAGE] + [(WEIGHTS, how) for how in WEIGHTS_DAMAGE],
)
def test_a_damaged_adapter_is_refused_by_name(
    name: str, damage: str, digests: bool, run: Path, finished: tuple[Path, Plan]
) -> None:
    if not digests:
        without_digests(run)
    (DAMAGE | WEIGHTS_DAMAGE)[damage](run / name)
    with pytest.raises(FtuneError) as refused:
        load(run, finished[1])
    assert Path(name).name in str(refused.value) or str(run / "adapter") in str(refused.value)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize(
    "change",
    [
        tensors(lambda found: next(iter(found.values())).mul_(1.01)),  # of the right shape: another training
        lambda path: shutil.copyfile(path, path.with_name("model-2.safetensors")),
    ],
)
def test_weights_of_another_training_are_seen_by_their_digest(
    change: Callable[[Path], Any], run: Path, finished: tuple[Path, Plan]
) -> None:
    change(run / WEIGHTS)
    with pytest.raises(RunDirError, match="is not what was trained"):
        load(run, finished[1])


def test_a_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.artifacts import stored

    monkeypatch.setattr(stored, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(stored, "_SAMPLE_BYTES", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(random.Random(3).randbytes(20_000))
    before = stored.digests_of(tmp_path)
    stored.require_digests(tmp_path, before)
    for place in (0, -1):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(RunDirError, match="not the file that was written"):
            stored.require_digests(tmp_path, before)
        data[place] ^= 1
        path.write_bytes(data)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunDirError, match="not the file that was written"):
        stored.require_digests(tmp_path, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("resolved"), "resolved"),
        (lambda r: r.update(resolved="x"), "resolved"),
        (lambda r: r["resolved"].update(method={"name": "lora", "rank": "x"}), "resolved.method"),
        (lambda r: r["resolved"].update(unknown=1), "resolved.unknown"),
        (lambda r: r["resolved"]["evaluation"].update(metrics=[{"name": "regex", "pattern": "("}]), "pattern"),
        (lambda r: r["resolved"]["method"].update(target_modules="(" * 1000), "target_modules"),
        (lambda r: r["resolved"]["training"].update(seed=10**30), "resolved.training.seed"),
        (lambda r: r.update(plan=[]), "plan"),
        (lambda r: r["plan"].pop("training"), "plan.training"),
        (lambda r: r["plan"]["training"].update(global_batch=0), "plan.training.global_batch"),
        (lambda r: r["plan"]["training"].update(steps="many"), "plan.training.steps"),
        (lambda r: r["plan"]["data"].update(fingerprint=3), "plan.data.fingerprint"),
        (lambda r: r["plan"]["data"].update(format="nope"), "plan.data.format"),
        (lambda r: r.update(pinned={"model": {"asked": None}}), "pinned.model.commit"),
        (lambda r: r.update(pinned=[1]), "pinned"),
        (lambda r: r.update(lean=None), "lean"),
        (lambda r: r.update(status=["finished"]), "status"),
        (lambda r: r.update(data_changed={"a": 1}), "data_changed"),
        (lambda r: r.update(artifact_sha256="abc"), "artifact_sha256"),
    ],
)
def test_a_record_of_another_shape_is_refused_by_field(change: Callable[[Any], Any], said: str, run: Path) -> None:
    def changed(record: Any) -> None:
        change(record)

    edit(run / "run.json", changed)
    with pytest.raises(RunDirError) as refused:
        RunDir(run).recipe()
    assert said in str(refused.value)
    assert "run.json" in str(refused.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused_by_name(damage: str, run: Path) -> None:
    DAMAGE[damage](run / "run.json")
    with pytest.raises(RunDirError, match=r"run\.json"):
        RunDir(run).recipe()


def interrupted(run: Path) -> Path:
    """As if it had been stopped after the first step; returns that checkpoint."""
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/step-2")
    edit(run / "run.json", lambda record: record.update(status="interrupted"))
    return run / "checkpoints/step-1"


def rewritten(path: Path, **changes: Any) -> None:
    edit(path, lambda progress: progress.update(changes))


FORGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "optimizer of another kind": ("optimizer.pt", lambda path: torch.save({"state": {}, "param_groups": [3]}, path)),
    "optimizer is a number": ("optimizer.pt", lambda path: torch.save(7, path)),
    "optimizer is noise": ("optimizer.pt", DAMAGE["noise"]),
    "no progress": ("progress.json", DAMAGE["a list"]),
    "deep progress": ("progress.json", DAMAGE["deep"]),
    "step of another": ("progress.json", lambda path: rewritten(path, step=10**9)),
    "step is text": ("progress.json", lambda path: rewritten(path, step="1")),
    "step is true": ("progress.json", lambda path: rewritten(path, step=True)),
    "halvings is text": ("progress.json", lambda path: rewritten(path, halvings="x")),
    "header of 2^60": ("trained.safetensors", WEIGHTS_DAMAGE["header of 2^60"]),
    "one renamed": ("trained.safetensors", WEIGHTS_DAMAGE["one renamed"]),
    "method's own": ("method.safetensors", DAMAGE["noise"]),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_checkpoint_with_checksums_that_fit_is_refused_all_the_same(
    forged: str, run: Path, finished: tuple[Path, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftune.plan.build import build
    from ftune.run.checkpoint import Checkpoints

    step = interrupted(run)
    name, change = FORGED[forged]
    change(step / name)
    (step / "manifest.json").unlink()
    write_manifest(step)
    plan = finished[1]
    model, optimizer = build(plan)
    checkpoints = Checkpoints(run / "checkpoints", 2)
    path, damaged = checkpoints.newest()
    assert path == step, damaged
    with pytest.raises(FtuneError) as refused:
        checkpoints.load(step, model, plan.recipe.method, optimizer)
    assert "step-1" in str(refused.value)


def test_a_checkpoint_after_the_end_is_refused(run: Path, finished: tuple[Path, Plan]) -> None:
    step = interrupted(run)
    rewritten(step / "progress.json", step=3)
    os.rename(step, step.with_name("step-3"))
    (run / "checkpoints/step-3/manifest.json").unlink()
    write_manifest(run / "checkpoints/step-3")
    record = json.loads((run / "run.json").read_text())
    record["resolved"]["output_dir"] = str(run)
    (run / "run.json").write_text(json.dumps(record))
    text = (finished[0] / "run/run.json").read_text()
    recipe = json.loads(json.loads(text)["recipe"]) | {"output_dir": str(run)}
    from ftune.recipe.load import parse_recipe

    with pytest.raises(RunDirError, match="is after step 3, and this run has 2"):
        train(parse_recipe(json.dumps(recipe), "r.yaml"), resume=True, progress=False)


def test_a_whole_model_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    from ftune.artifacts.stored import put_on

    trained = tiny.model()
    with torch.no_grad():
        trained.get_parameter("model.norm.weight")[-1] = float("nan")
    tiny.method("full").save(trained, tmp_path, tiny.context())
    with pytest.raises(RunDirError, match=r"not finite, in `model\.norm\.weight`"):
        put_on(tiny.method("full"), tiny.model(), tmp_path, tiny.context(), ())
