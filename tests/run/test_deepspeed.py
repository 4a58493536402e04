"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes over gloo, against one process."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_processes import launch, recipe

from ftune.artifacts.training import train
from ftune.methods import METHODS
from ftune.recipe import load_checked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: pip install 'ftune[deepspeed]'",
    ),
]

# A whole model under both, and an adapter; under ZeRO-3, where weights are parted, one that reads the base's. All
# methods are run by scripts/make_engine_table.py.
RUNS = [
    ("deepspeed-zero2", "lora"),
    ("deepspeed-zero2", "full"),
    ("deepspeed-zero3", "full"),
    ("deepspeed-zero3", "dora"),
    ("deepspeed-zero3", "longlora"),
]
TIED = ["longlora"]  # whose head is the trained embedding, which the loss reads outside of any layer
RESUMED = [("deepspeed-zero2", "full"), ("deepspeed-zero3", "dora")]

# All in one launch. Nothing is so small that ZeRO-3 would leave it whole. Some runs are stopped by a signal that the
# second process gets in its first update, resumed, stopped by gradients there that are no numbers in the third, though
# the loss is one, and resumed again.
EACH = """
import json, logging, os, signal, sys
from pathlib import Path
import torch
from ftune.artifacts.training import train
from ftune.errors import Interrupted, RunFailed
from ftune.ops.sharded import local
from ftune.recipe import load_checked
from ftune.run.engines import deepspeed
from ftune.run.loop import Loop

deepspeed.PERSISTENT = 0
held, said = {}, {}
wrap, after, backward = deepspeed.DeepSpeed.wrap, Loop._after, Loop._backward
rank, where = os.environ["RANK"], Path(sys.argv[1])

def measuring(self, objective, optimizer, method):
    sizes = {name: parameter.numel() for name, parameter in objective.named_parameters()}
    wrapped = wrap(self, objective, optimizer, method)
    parts = sum(local(parameter).numel() for parameter in objective.parameters())
    moments = sum(value.numel() for state in self._inner.state.values() for value in state.values() if value.ndim)
    held[f"{method.name}-{self.stage}"] = {"weights": parts / sum(sizes.values()), "moments": moments}
    return wrapped

def signalled(self, step):
    if rank == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    after(self, step)

class Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")

def spoiling(self, step, targets, wrapped, mine):
    bad = step == 2 and rank == "1"
    return backward(self, step, targets, (lambda batch: Spoilt.apply(wrapped(batch))) if bad else wrapped, mine)

def stopped(loaded, error, **settings):
    try:
        train(loaded, progress=False, **settings)
    except error as stop:
        said.setdefault(Path(loaded.recipe.output_dir).name, []).append([str(stop), stop.help])

deepspeed.DeepSpeed.wrap = measuring
for argument in sys.argv[2:]:
    engine, path = argument.split(":")
    loaded = load_checked(Path(path))[0]
    if "resumed" in path:
        Loop._after = signalled
        stopped(loaded, Interrupted, engine=engine)
        Loop._after, Loop._backward = after, spoiling
        stopped(loaded, RunFailed, engine=engine, resume=True)
        Loop._backward = backward
    train(loaded, progress=False, resume="resumed" in path, engine=engine)
(where / f"held-{rank}.json").write_text(json.dumps([held, said]))
logging.getLogger("DeepSpeed").warning("a warning of its own")
"""


def written(where: Path, name: str, accumulation: int, run: str) -> Path:
    path = recipe(where, name, accumulation, run)
    if name in TIED:
        tied = where / "tied"
        if not tied.exists():
            tiny.model_dir(tied, tie_word_embeddings=True)
        path.write_text(path.read_text().replace(str(where / "base"), str(tied)))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs in one process (``NAME``) and in two (``NAME-ENGINE``, ``NAME-ENGINE-resumed``)."""
    where = tmp_path_factory.mktemp("deepspeed")
    for name in sorted({name for _, name in RUNS}):
        train(load_checked(written(where, name, 4, name))[0], progress=False)
    (where / "each.py").write_text(EACH)
    made = [f"{engine}:{written(where, name, 2, f'{name}-{engine}')}" for engine, name in RUNS]
    for engine, name in RESUMED:
        made.append(f"{engine}:{recipe(where, name, 2, f'{name}-{engine}-resumed')}")
    done = launch(2, str(where / "each.py"), str(where), *made)
    assert done.returncode == 0, done.stderr
    (where / "stdout").write_text(done.stdout)
    (where / "stderr").write_text(done.stderr)
    return where


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_deepspeed_equals_one_process(engine: str, name: str, runs: Path) -> None:
    results = [runs / name, runs / f"{name}-{engine}"]
    assert json.loads((results[1] / "run.json").read_text())["device"]["engine"] == engine
    for kind in ("step", "eval"):
        for a, b in zip(*(tiny.events(run, kind) for run in results), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
            assert a["target_tokens"] == b["target_tokens"]
            if kind == "step":
                assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
    ones, twos = (load_file(run / "checkpoints/step-4/trained.safetensors") for run in results)
    assert ones.keys() == twos.keys()
    for key in ones:
        assert (ones[key] - twos[key]).abs().mean() <= 1e-5 * ones[key].abs().mean(), key


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_what_it_leaves_behind_is_what_one_process_leaves(engine: str, name: str, runs: Path) -> None:
    one, two = (runs / run / METHODS[name].artifact for run in (name, f"{name}-{engine}"))
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for file in one.glob("*.safetensors"):
        a, b = load_file(file), load_file(two / file.name)
        assert {key: (value.shape, value.dtype) for key, value in a.items()} == {
            key: (value.shape, value.dtype) for key, value in b.items()
        }
    # Adapters in parts are gathered for them.
    vitals = [json.loads((path.parent / "run.json").read_text())["vitals"] for path in (one, two)]
    for found in vitals:  # a process counts its own rows
        for key in ("row_passes", "row_passes_shifted", "groups_per_row"):
            found.pop(key, None)
    assert vitals[1] == pytest.approx(vitals[0], rel=1e-3)
    states = [torch.load(path.parent / "checkpoints/step-4/optimizer.pt", weights_only=True) for path in (one, two)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        for key, value in state.items():
            assert torch.allclose(
                value, states[1]["state"][index][key], rtol=1e-4, atol=1e-5 * float(value.abs().max())
            )


def test_weights_and_moments_are_in_parts(runs: Path) -> None:
    for rank in range(2):
        held, _ = json.loads((runs / f"held-{rank}.json").read_text())
        assert held["full-2"]["weights"] == 1
        assert held["full-3"]["weights"] == pytest.approx(0.5, abs=0.01)
        assert held["dora-3"]["weights"] == pytest.approx(0.5, abs=0.01)
        # Two moments of half of the elements.
        elements = sum(p.numel() for p in tiny.model().parameters())
        assert held["full-2"]["moments"] == pytest.approx(elements, rel=0.01)
        assert held["full-3"]["moments"] == pytest.approx(elements, rel=0.01)


@pytest.mark.parametrize(("engine", "name"), RESUMED)
def test_resumed_equals_uninterrupted(engine: str, name: str, runs: Path) -> None:
    through, resumed = (runs / f"{name}-{engine}{which}/checkpoints/step-4" for which in ("", "-resumed"))
    assert [event["step"] for event in tiny.events(runs / f"{name}-{engine}-resumed", "resume")] == [1, 2]
    a, b = (load_file(path / "trained.safetensors") for path in (through, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a | b)
    a, b = (torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (through, resumed))
    assert all(torch.equal(a[index][key], b[index][key]) for index in a for key in a[index])


@pytest.mark.parametrize(("engine", "name"), RESUMED)
def test_a_gradient_that_is_no_number_stops_all_before_it_is_applied(engine: str, name: str, runs: Path) -> None:
    for rank in range(2):
        _, said = json.loads((runs / f"held-{rank}.json").read_text())
        (stop, help_), (failure, remedy) = said[f"{name}-{engine}-resumed"]
        assert stop == "stopped after step 1 of 4"
        assert "--resume" in help_
        assert re.match(r"the gradient norm is nan, the loss \d\S+, at step 3, rows \[\d+, \d+, \d+\]", failure)
        assert "step-2 has the state before it" in remedy


def test_deepspeed_writes_nothing_to_standard_output(runs: Path) -> None:
    assert (runs / "stdout").read_text() == ""
    assert "a warning of its own" in (runs / "stderr").read_text()
