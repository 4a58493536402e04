"""The ready files of configs/cluster, run or parsed without a cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[1] / "configs/cluster"
SBATCH = CLUSTER / "slurm.sbatch"
KUBERNETES = CLUSTER / "kubernetes.yaml"
SKYPILOT = CLUSTER / "skypilot.yaml"
RUN = "a damaged run"  # as a checkpoint that is set aside is called

# Two nodes in one shell: srun runs its command once a node, each with a process-id file of its own.
SLURM = """
srun() {
  while [ "$1" != bash ]; do shift; done
  for node in 0 1; do pidfile="$pidfile.$node" "$@" & pids="$pids $!"; done
  for pid in $pids; do wait "$pid" || code=$?; done
  return ${code:-0}
}
scontrol() { [ "$1" = show ] && echo localhost || echo "$@" >> "$LOG"; }
"""
TORCHRUN = """#!/bin/bash
echo "start $*" >> "$LOG"
trap 'echo TERM >> "$LOG"; ended=1' TERM
for _ in $(seq 100); do
  sleep 0.05
  if [ -n "$FAIL" ]; then exit 3; fi
  if [ -n "$ended" ]; then sleep 0.2; [ -n "$FULL" ] || mkdir -p "$SAVES"; echo saved >> "$LOG"; exit 4; fi
done
"""


def _start(tmp_path: Path, **settings: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / "log"
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(TORCHRUN)
    torchrun.chmod(0o755)
    script = tmp_path / "job.sh"
    text = SBATCH.read_text().replace("/tmp/ftune-", f"{tmp_path}/ftune-")
    if "LATE" in settings:  # the process id comes half a second after the step
        text = text.replace("  echo $$ >", '  touch "$LOG.begun"; sleep 0.5; echo $$ >')
    script.write_text(SLURM + text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/{RUN}\n")
    # One of before, and one that was set aside: its number is that of the checkpoint to come.
    for name in ("step-9", "step-10.damaged"):
        (tmp_path / f"{RUN}/checkpoints/{name}").mkdir(parents=True)
        os.utime(tmp_path / f"{RUN}/checkpoints/{name}", (1e9, 1e9))
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LOG": str(log),
        "SAVES": f"{tmp_path}/{RUN}/checkpoints/step-10",
        "RECIPE": str(recipe),
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[0-1]",
        **settings,
    }
    return subprocess.Popen(["bash", str(script)], env=env, stderr=subprocess.PIPE), log


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _signalled(job: subprocess.Popen[bytes], log: Path) -> str:
    """Send USR1 once both nodes train; what the script says on standard error."""
    deadline = time.monotonic() + 5
    while len(_lines(log)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # torchrun's trap is set after its line
    job.send_signal(signal.SIGUSR1)
    return job.communicate(timeout=10)[1].decode()


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_slurm_signals_each_torchrun_once_waits_then_requeues(tmp_path: Path) -> None:
    job, log = _start(tmp_path)
    _signalled(job, log)
    assert job.returncode == 0
    lines = _lines(log)
    command = f" --rdzv-endpoint=localhost:29520 -m ftune train {tmp_path}/recipe.yaml --resume"
    assert all(command in line for line in lines[:2])
    assert sorted(lines[2:6]) == ["TERM", "TERM", "saved", "saved"]
    assert lines[6:] == ["requeue 7"]


def test_slurm_waits_for_the_process_id_of_a_step_that_only_starts(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as before:  # has the number of a torchrun before the job was requeued
        for node in "01":
            (tmp_path / f"ftune-7-0.pid.{node}").write_text(str(before.pid))
        job, log = _start(tmp_path, LATE="yes", SLURM_RESTART_COUNT="1")
        deadline = time.monotonic() + 5
        while not (tmp_path / "log.begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=15)
        assert before.poll() is None
        before.kill()
    assert job.returncode == 0
    assert sorted(_lines(log)[2:6]) == ["TERM", "TERM", "saved", "saved"]
    assert _lines(log)[6:] == ["requeue 7"]


def test_slurm_requeues_where_a_checkpoint_of_the_same_number_is_newer(tmp_path: Path) -> None:
    job, log = _start(tmp_path, SAVES=f"{tmp_path}/{RUN}/checkpoints/step-9/anew")
    _signalled(job, log)
    assert job.returncode == 0
    assert _lines(log)[6:] == ["requeue 7"]


def test_slurm_does_not_requeue_a_job_that_saved_nothing(tmp_path: Path) -> None:
    job, log = _start(tmp_path, FULL="yes")
    said = _signalled(job, log)
    assert job.returncode == 4
    assert f"error: no checkpoint was saved since this job began, in {tmp_path}/{RUN}: not requeued" in said
    assert "requeue 7" not in _lines(log)


def test_slurm_does_not_requeue_a_run_that_finished_meanwhile(tmp_path: Path) -> None:
    (tmp_path / RUN).mkdir(parents=True)
    (tmp_path / RUN / "run.json").write_text('{\n  "status": "finished"\n}\n')
    job, log = _start(tmp_path)
    _signalled(job, log)
    assert job.returncode == 0
    assert "requeue 7" not in _lines(log)


def test_slurm_passes_a_failure_on_and_does_not_requeue(tmp_path: Path) -> None:
    job, log = _start(tmp_path, FAIL="yes")
    job.communicate(timeout=10)
    assert job.returncode == 3
    assert "requeue 7" not in _lines(log)


def test_kubernetes_file_is_a_trainjob() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    content = yaml.safe_load(KUBERNETES.read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(content).to_dict() == content  # an unknown key is dropped


# Of the schemas that skypilot 0.14 publishes (sky/utils/schemas.py: task, resources, storage), the keys that a job of
# this kind may have, with their types; skypilot itself, nearly a hundred packages, is only asked where it is installed.
SKYPILOT_KEYS: dict[str, Any] = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "setup": str,
    "run": str,
    "envs": {str: str},
    "resources": {
        "infra": str,
        "accelerators": str,
        "use_spot": bool,
        "disk_size": int,
        "image_id": str,
        "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": list},
    },
    "file_mounts": {str: {"name": str, "source": str, "store": str, "persistent": bool, "mode": str}},
}


def _unknown(value: Any, allowed: Any, where: str = "") -> list[str]:
    """Where a value is not as ``allowed`` says."""
    if not isinstance(allowed, dict):
        return [] if type(value) is allowed else [f"{where}: {value!r}"]
    if not isinstance(value, dict):
        return [f"{where}: {value!r}"]
    rule = {key: allowed.get(key, allowed.get(str)) for key in value}
    return [
        wrong
        for key, content in value.items()
        for wrong in (_unknown(content, rule[key], f"{where}/{key}") if rule[key] else [f"{where}/{key}"])
    ]


def test_skypilot_file_has_only_keys_of_a_managed_job() -> None:
    content = yaml.safe_load(SKYPILOT.read_text())
    assert _unknown(content, SKYPILOT_KEYS) == []
    wrong = {"num_node": 2, "num_nodes": "2", "resources": {"use_spots": True}, "file_mounts": {"/shared": {"mod": ""}}}
    assert len(_unknown(wrong, SKYPILOT_KEYS)) == 4
    # in MOUNT, files cannot be appended to, and not every store can rename
    assert [mount["mode"] for mount in content["file_mounts"].values()] == ["MOUNT_CACHED"]


def test_skypilot_itself_takes_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where it keeps a state of its own
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    content = yaml.safe_load(SKYPILOT.read_text())
    jsonschema.validate(content, schemas.get_task_schema())
    jsonschema.validate(content["resources"], schemas.get_resources_schema())
    for mount in content["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_skypilot_starts_every_node_with_its_rank_at_the_first_ones_address(tmp_path: Path) -> None:
    torchrun, log = tmp_path / "torchrun", tmp_path / "log"
    torchrun.write_text('#!/bin/bash\necho "$*" >> "$LOG"\nexit 3\n')
    torchrun.chmod(0o755)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    env = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    script = yaml.safe_load(SKYPILOT.read_text())["run"]
    for rank in "01":
        # how it ended reaches SkyPilot, which counts on it
        assert (
            subprocess.run(["bash", "-c", script], env={**env, "SKYPILOT_NODE_RANK": rank}, check=False).returncode == 3
        )
    assert _lines(log) == [
        f"--nnodes=2 --node-rank={rank} --nproc-per-node=8 --max-restarts=0 --master-addr=10.0.0.1 --master-port=29520 "
        "-m ftune train /shared/recipe.yaml --resume"
        for rank in "01"
    ]
