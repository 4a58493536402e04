"""One global batch gives one result, on one process, two or four: over gloo, launched by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from run.test_loop import stop_after
from safetensors.torch import load_file

from ftune.artifacts.training import train
from ftune.errors import Interrupted
from ftune.methods import METHODS
from ftune.recipe import load_checked

pytestmark = pytest.mark.slow


# All methods in one launch: starting processes and importing the libraries takes longer than training.
EACH = """
import atexit, json, os, sys
from pathlib import Path

@atexit.register  # before any other, and so the last to run
def note_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(sys.argv[0]).with_name(f"threads-{os.environ.get('WORLD_SIZE', 1)}-{os.environ.get('RANK', 0)}").write_text(
        json.dumps(names)
    )

import torch
from ftune.artifacts.training import train
from ftune.errors import RunFailed
from ftune.ops.sharded import whole
from ftune.plan.plan import Plan
from ftune.recipe import load_checked
from ftune.run.objective import Objective

gradients, clip = [], torch.nn.utils.clip_grads_with_norm_

def keep(parameters, *rest):
    # Before it is clipped, which the loop does by this function.
    gradients.append(torch.cat([whole(p.grad).flatten().clone() for p in parameters if p.grad is not None]))
    clip(parameters, *rest)

forward = Objective.forward

def bounded(self, batch):
    # Only on the last process, and not in its first micro-batch: gradients are there already.
    bounded.count += self.training
    if self.training and bounded.count > 1 and len(batch.rows) > bounded.most:
        raise torch.OutOfMemoryError("out of memory")
    return forward(self, batch)

torch.nn.utils.clip_grads_with_norm_ = keep
for path in sys.argv[1:]:
    recipe, _, how = path.partition(":")
    loaded = load_checked(Path(recipe))[0]
    gradients.clear()
    if how.startswith("short"):
        bounded.count, bounded.most = 0, int(how[5:])
        Objective.forward = bounded if os.environ["RANK"] == "1" else forward
    engine = "fsdp2" if how in ("fsdp2", "host") else None
    if how == "host":
        Plan.through_host = True
    try:
        record = train(loaded, progress=False, resume=how == "resume", engine=engine, auto_batch="short" in how)
    except RunFailed as error:
        if how != "short0":
            raise
        (Path(loaded.recipe.output_dir) / f"error-{os.environ['RANK']}").write_text(str(error))
        continue
    finally:
        Objective.forward = forward
    found = [gradients[0], {"vitals": record["vitals"]}]
    torch.save(found, Path(loaded.recipe.output_dir) / f"rank-{os.environ.get('RANK', 0)}.pt")
"""

FOUR = ("lora", "adalora", "galore", "full")
"""Methods that run on four processes too: one of each kind, for each process costs its imports."""

SHARED = ("lora", "full")
"""Methods that run on four processes under FSDP2: the third update has three rows, so a process has none."""

HOST = ("lora", "galore", "full")
"""Methods that run on two processes under FSDP2 with their base read through the host's memory, as if too large."""

SHORT = (("lora", "short1"), ("full", "short1"), ("lora", "short0"))
"""Runs with --auto-batch whose second process has memory for so many rows at once."""


def launch(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script or a module in several processes, through torchrun; in one, without."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else ()), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def recipe(where: Path, name: str, accumulation: int, run: str) -> Path:
    """Write a recipe: 19 chats in updates of 8 rows without packing, so that the last update of an epoch is short."""
    loaded = tiny.recipe(
        where,
        name,
        data={"packing": False, "train": {"path": str(where / "train.jsonl"), "max_examples": 19}},
        training={"max_steps": 4, "micro_batch_size": 2, "gradient_accumulation_steps": accumulation},
        output_dir=str(where / run),
    )
    path = where / f"{run}.yaml"
    path.write_text(loaded.text)
    return path


def interrupted(path: Path) -> None:
    """Begin a run in this process and stop it after two of its four updates."""
    loaded = load_checked(path)[0]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            train(loaded, progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of every method in one process (``NAME-1``) and in two (``NAME-2``), and of some in four."""
    where = tmp_path_factory.mktemp("processes")
    script = where / "each.py"
    script.write_text(EACH)
    resumed = recipe(where, "lora", 4, "resumed")
    interrupted(resumed)
    for processes, names in ((1, METHODS), (2, METHODS), (4, FOUR)):
        made = [str(recipe(where, name, 4 // processes, f"{name}-{processes}")) for name in names]
        if processes == 2:
            made.append(f"{resumed}:resume")
            made += [f"{recipe(where, name, 2, f'{name}-{run}')}:{run}" for name, run in SHORT]
            # The last ones: they stay so.
            made += [f"{recipe(where, name, 2, f'{name}-host')}:host" for name in HOST]
        if processes == 4:
            made += [f"{recipe(where, name, 1, f'{name}-4-fsdp2')}:fsdp2" for name in SHARED]
        done = launch(processes, str(script), *made)
        assert done.returncode == 0, done.stderr
        (where / f"stderr-{processes}").write_text(done.stderr)
    return where


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    done = launch(2, "-m", "ftune", "train", str(recipe(tmp_path, "lora", 2, "run")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at work:") == 1, "one process speaks"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named in /proc")
@pytest.mark.parametrize(("processes", "rank"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_no_thread_of_gloo_outlives_the_process_group(processes: int, rank: int, runs: Path) -> None:
    # One that does may abort the interpreter as it ends.
    threads = json.loads((runs / f"threads-{processes}-{rank}").read_text())
    assert threads
    assert not [name for name in threads if "gloo" in name]


AGREE = """
import os, sys
from pathlib import Path
from ftune.artifacts.training import train
from ftune.errors import RunFailed
from ftune.recipe import load_checked

where = Path(sys.argv[1])
recipe = where / ("mine.yaml" if os.environ["RANK"] == "1" else "run.yaml")
try:
    train(load_checked(recipe)[0], progress=False)
except RunFailed as error:
    (where / f"said-{os.environ['RANK']}").write_text(str(error))
"""


def test_processes_that_see_other_files_do_not_train_together(tmp_path: Path) -> None:
    recipe(tmp_path, "lora", 2, "run")
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "other.jsonl").write_text("".join(reversed((tmp_path / "train.jsonl").read_text().splitlines(True))))
    changed = text.replace("train.jsonl", "other.jsonl").replace('"max_steps": 4', '"max_steps": 5')
    assert changed.count("other.jsonl") == 1
    assert changed.count('"max_steps": 5') == 1
    (tmp_path / "mine.yaml").write_text(changed)
    (tmp_path / "agree.py").write_text(AGREE)
    done = launch(2, str(tmp_path / "agree.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("process 1 is not about to do what process 0 is: the recipe's `data`")
    for what in ("the recipe's `training`", "the training data", "the steps of the run"):
        assert what in said[0]
    assert "libraries" not in said[0]
    assert not (tmp_path / "run/run.json").exists()


def gradient(run: Path, rank: int = 0) -> torch.Tensor:
    """The gradient of a run's first update, before clipping."""
    found: torch.Tensor = torch.load(run / f"rank-{rank}.pt")[0]
    return found


@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in METHODS), *((name, 4) for name in FOUR)])
def test_processes_equal_accumulation(name: str, processes: int, runs: Path) -> None:
    results = [runs / f"{name}-1", runs / f"{name}-{processes}"]
    for count, run in zip((1, processes), results, strict=True):
        training = json.loads((run / "run.json").read_text())["plan"]["training"]
        assert (training["world_size"], training["gradient_accumulation_steps"]) == (count, 4 // count)
    one, many = (tiny.events(run, "step") for run in results)
    assert [step["target_tokens"] for step in one] == [step["target_tokens"] for step in many]
    assert len({step["target_tokens"] for step in one}) > 2, "the third update is a short one"
    assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-6)
    expected = gradient(results[0])
    for rank in range(processes):
        assert (gradient(results[1], rank) - expected).norm() <= 1e-6 * expected.norm()
    for a, b in zip(one, many, strict=True):
        # AdamW divides by the root of the second moment: a difference in the last bit of a tiny gradient grows.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    ones, others = (load_file(run / "checkpoints/step-4/trained.safetensors") for run in results)
    for key in ones:
        assert (ones[key] - others[key]).abs().mean() <= 1e-3 * ones[key].abs().mean(), key
    held_out = [tiny.events(run, "eval")[-1] for run in results]
    assert held_out[1]["loss"] == pytest.approx(held_out[0]["loss"], rel=1e-5)
    assert held_out[1]["target_tokens"] == held_out[0]["target_tokens"]


@pytest.mark.parametrize("name", SHARED)
def test_four_processes_under_fsdp2_equal_one(name: str, runs: Path) -> None:
    one, four = (tiny.events(runs / run, "step") for run in (f"{name}-1", f"{name}-4-fsdp2"))
    for a, b in zip(one, four, strict=True):
        assert a["target_tokens"] == b["target_tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
    expected = gradient(runs / f"{name}-1")
    for rank in range(4):
        assert (gradient(runs / f"{name}-4-fsdp2", rank) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", HOST)
def test_read_through_the_host_a_run_is_the_same(name: str, runs: Path) -> None:
    one, host = (tiny.events(runs / run, "step") for run in (f"{name}-1", f"{name}-host"))
    assert json.loads((runs / f"{name}-host/run.json").read_text())["device"]["engine"] == "fsdp2"
    for a, b in zip(one, host, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("name", "processes"), [("adalora", 2), ("adalora", 4), ("galore", 4)])
def test_every_process_has_the_same_vitals(name: str, processes: int, runs: Path) -> None:
    # Of AdaLoRA the ranks, of GaLore the subspaces.
    found = [torch.load(runs / f"{name}-{processes}" / f"rank-{rank}.pt")[1] for rank in range(processes)]
    assert all(vitals == found[0] for vitals in found)


def test_resumed_on_two_processes_equals_one_uninterrupted(runs: Path) -> None:
    record = json.loads((runs / "resumed/run.json").read_text())
    assert record["device"]["processes"] == 2
    assert record["plan"]["training"]["gradient_accumulation_steps"] == 2
    resumed, whole = (tiny.events(runs / run, "step") for run in ("resumed", "lora-1"))
    assert len(resumed) == 4
    for a, b in zip(whole, resumed, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["target_tokens"] == a["target_tokens"]
    line = "note: 2 processes now, 1 before: gradient_accumulation_steps 2 instead of 4 keeps the global batch of 8"
    assert (runs / "stderr-2").read_text().count(line) == 1


@pytest.mark.parametrize("name", ["lora", "full"])
def test_where_memory_runs_out_in_one_process_all_make_smaller_micro_batches(name: str, runs: Path) -> None:
    (halved,) = tiny.events(runs / f"{name}-short1", "halved")
    assert halved["step"] == 0
    assert halved["now"] > halved["before"]
    one, short = (tiny.events(runs / run, "step") for run in (f"{name}-1", f"{name}-short1"))
    for a, b in zip(one, short, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
    expected = gradient(runs / f"{name}-1")
    for rank in range(2):
        assert (gradient(runs / f"{name}-short1", rank) - expected).norm() <= 1e-6 * expected.norm()


def test_where_one_row_is_too_much_for_one_process_all_say_so(runs: Path) -> None:
    for rank in range(2):
        assert "memory ran out after 0 of 4 updates" in (runs / f"lora-short0/error-{rank}").read_text()
