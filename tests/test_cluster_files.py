"""The ready files of configs/cluster, run or parsed without a cluster."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[1] / "configs/cluster"
SBATCH = CLUSTER / "slurm.sbatch"
KUBERNETES = CLUSTER / "kubernetes.yaml"

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
  if [ -n "$ended" ]; then sleep 0.2; echo saved >> "$LOG"; exit 1; fi
done
"""


def _start(tmp_path: Path, fail: str = "") -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / "log"
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(TORCHRUN)
    torchrun.chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(SLURM + SBATCH.read_text().replace("/tmp/ftune-", f"{tmp_path}/ftune-"))
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "FAIL": fail,
        "RECIPE": "recipe.yaml",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[0-1]",
    }
    return subprocess.Popen(["bash", str(script)], env=env), log


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_slurm_signals_each_torchrun_once_waits_then_requeues(tmp_path: Path) -> None:
    job, log = _start(tmp_path)
    deadline = time.monotonic() + 5
    while len(_lines(log)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # torchrun's trap is set after its line
    job.send_signal(signal.SIGUSR1)
    assert job.wait(10) == 0
    lines = _lines(log)
    assert all(" --rdzv-endpoint=localhost:29520 -m ftune train recipe.yaml --resume" in line for line in lines[:2])
    assert sorted(lines[2:6]) == ["TERM", "TERM", "saved", "saved"]
    assert lines[6:] == ["requeue 7"]


def test_slurm_passes_a_failure_on_and_does_not_requeue(tmp_path: Path) -> None:
    job, log = _start(tmp_path, fail="yes")
    assert job.wait(10) == 3
    assert "requeue 7" not in _lines(log)


def test_kubernetes_file_is_a_trainjob() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    content = yaml.safe_load(KUBERNETES.read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(content).to_dict() == content  # an unknown key is dropped
