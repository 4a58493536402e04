"""FSDP2 in two processes over gloo, against one process, for every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_processes import launch, recipe

from ftune.artifacts.training import train
from ftune.methods import METHODS
from ftune.recipe import load_checked

pytestmark = pytest.mark.slow

RESUMED = ["lora", "adalora", "galore", "full"]
"""Adapters and whole models, a method with state of its own, an optimizer with state of its own."""

OFFLOADED = ["lora", "full"]

# All methods in one launch. What each process holds after sharding is written beside the run; some runs are stopped
# after their second update and resumed.
EACH = """
import json, os, sys
from pathlib import Path
from ftune.artifacts.training import train
from ftune.errors import Interrupted
from ftune.ops.sharded import local
from ftune.recipe import load_checked
from ftune.run.engines.fsdp2 import Fsdp2
from ftune.run.loop import Loop

held = {}
wrap, after = Fsdp2.wrap, Loop._after

def measuring(self, objective, optimizer, method):
    wrapped = wrap(self, objective, optimizer, method)
    shares = {True: [0, 0], False: [0, 0]}
    for parameter in objective.parameters():
        shares[parameter.requires_grad][0] += local(parameter).numel()
        shares[parameter.requires_grad][1] += parameter.numel()
    policy = objective._get_fsdp_state()._fsdp_param_group.offload_policy
    which = method.name + "-offload" * self.choice.offload
    held[which] = {"trained": shares[True], "frozen": shares[False], "policy": type(policy).__name__}
    return wrapped

def stopping(self, step):
    after(self, step)
    if step == 2:
        raise Interrupted("stopped", signal_number=15)

Fsdp2.wrap = measuring
rank, where = os.environ["RANK"], Path(sys.argv[1])
for path in sys.argv[2:]:
    loaded = load_checked(Path(path))[0]
    if "resumed" not in path:
        train(loaded, progress=False, engine="fsdp2-offload" if "offload" in path else "fsdp2")
        continue
    Loop._after = stopping
    try:
        train(loaded, progress=False, engine="fsdp2")
    except Interrupted:
        pass
    Loop._after = after
    train(loaded, progress=False, resume=True, engine="fsdp2")
(where / f"held-{rank}.json").write_text(json.dumps(held))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of every method in one process (``NAME-1``) and in two (``NAME-2``, and ``-resumed``, ``-offload``)."""
    where = tmp_path_factory.mktemp("engines")
    for name in METHODS:
        train(load_checked(recipe(where, name, 4, f"{name}-1"))[0], progress=False)
    (where / "each.py").write_text(EACH)
    paths = [recipe(where, name, 2, f"{name}-2") for name in METHODS]
    paths += [recipe(where, name, 2, f"{name}-offload") for name in OFFLOADED]
    for name in RESUMED:
        path = recipe(where, name, 2, f"{name}-resumed")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": {"every_steps": 2}}))
        paths.append(path)
    done = launch(2, str(where / "each.py"), str(where), *map(str, paths))
    assert done.returncode == 0, done.stderr
    return where


@pytest.mark.parametrize("name", METHODS)
def test_fsdp2_equals_one_process(name: str, runs: Path) -> None:
    results = [runs / f"{name}-1", runs / f"{name}-2"]
    assert json.loads((results[1] / "run.json").read_text())["device"]["engine"] == "fsdp2"
    for kind in ("step", "eval"):
        for a, b in zip(*(tiny.events(run, kind) for run in results), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            assert a["target_tokens"] == b["target_tokens"]
            if kind == "step":
                # GaLore's subspace turns with the last bits of a gradient.
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5 if name == "galore" else 1e-6)
    ones, twos = (load_file(run / "checkpoints/step-4/trained.safetensors") for run in results)
    assert ones.keys() == twos.keys()
    for key in ones:
        assert (ones[key] - twos[key]).abs().mean() <= 1e-5 * ones[key].abs().mean(), key


@pytest.mark.parametrize("name", OFFLOADED)
def test_parts_on_the_host_change_nothing(name: str, runs: Path) -> None:
    assert json.loads((runs / f"{name}-offload/run.json").read_text())["device"]["engine"] == "fsdp2-offload"
    for rank in range(2):
        held = json.loads((runs / f"held-{rank}.json").read_text())
        assert [held[which]["policy"] for which in (name, f"{name}-offload")] == ["OffloadPolicy", "CPUOffloadPolicy"]
    a, b = (load_file(runs / f"{name}-{which}/checkpoints/step-4/trained.safetensors") for which in ("2", "offload"))
    assert all(torch.equal(a[key], b[key]) for key in a | b)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_frozen_is_in_parts_and_adapters_are_whole(name: str, runs: Path) -> None:
    for rank in range(2):
        held = json.loads((runs / f"held-{rank}.json").read_text())[name]
        mine, all_of_it = held["trained"]
        whole_model = METHODS[name].artifact == "model"
        assert mine / all_of_it == pytest.approx(0.5, abs=0.01) if whole_model else mine == all_of_it
        mine, all_of_it = held["frozen"]
        assert whole_model or mine / all_of_it == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_what_it_leaves_behind_is_what_one_process_leaves(name: str, runs: Path) -> None:
    one, two = (runs / f"{name}-{which}" / METHODS[name].artifact for which in "12")
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for file in one.glob("*.safetensors"):
        a, b = load_file(file), load_file(two / file.name)
        assert {key: (value.shape, value.dtype) for key, value in a.items()} == {
            key: (value.shape, value.dtype) for key, value in b.items()
        }
    states = [torch.load(runs / f"{name}-{which}/checkpoints/step-4/optimizer.pt", weights_only=True) for which in "12"]
    shapes = [
        {index: {key: value.shape for key, value in state.items()} for index, state in found["state"].items()}
        for found in states
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_under_fsdp2_equals_uninterrupted(name: str, runs: Path) -> None:
    through, resumed = (runs / f"{name}-{which}/checkpoints/step-4" for which in ("2", "resumed"))
    assert tiny.events(runs / f"{name}-resumed", "resume")
    for file in ("trained.safetensors", "method.safetensors"):
        a, b = load_file(through / file), load_file(resumed / file)
        assert all(torch.equal(a[key], b[key]) for key in a | b)
    a, b = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (through, resumed))
    assert all(torch.equal(a[index][key], b[index][key]) for index in a for key in a[index])
