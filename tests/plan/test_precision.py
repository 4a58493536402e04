"""Choosing by measurement: the choice follows the clock, is made once, and is the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ftune.cache import cache_dir
from ftune.plan import precision
from ftune.plan.precision import choose_dtype, faster, seconds_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(precision, "_found", {})


class Timed:
    """A candidate that takes a given time by the test's clock."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds, self.calls = clock, seconds, 0

    def __call__(self) -> None:
        self.calls += 1
        self.clock[0] += self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def unsupported() -> None:
    raise RuntimeError("\"addmm\" not implemented for 'BFloat16'")


@pytest.mark.parametrize(("other", "taken"), [(0.090, "b"), (0.095, "a"), (0.2, "a")])
def test_another_candidate_must_beat_the_first_by_the_margin(clock: list[float], other: float, taken: str) -> None:
    assert faster("x", {"a": Timed(clock, 0.1), "b": Timed(clock, other)}, 1.1) == taken


def test_what_cannot_run_here_is_not_taken(clock: list[float]) -> None:
    assert faster("x", {"a": Timed(clock, 1.0), "b": unsupported}, 1.1) == "a"


@pytest.fixture(autouse=True)
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The load of the machine, and an idle one at first."""
    load = [0.0]
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0.0, 0.0))
    return load


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_found", {})


def test_it_is_measured_once_in_a_process_and_twice_on_a_machine(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = {"a": Timed(clock, 0.1), "b": Timed(clock, 0.01)}
    found = seconds_of("x", timed)
    assert found == pytest.approx({"a": 0.1, "b": 0.01})
    calls = timed["a"].calls
    assert seconds_of("x", timed) == found
    assert timed["a"].calls == calls
    another_process(monkeypatch)
    assert seconds_of("x", timed) == pytest.approx(found)
    again = timed["a"].calls
    assert again > calls, "nothing says yet that the first was right"
    another_process(monkeypatch)
    assert seconds_of("x", timed) == pytest.approx(found)
    assert timed["a"].calls == again
    assert seconds_of("y", timed) == pytest.approx(found)
    assert timed["a"].calls > again, "another key is another measurement"


def test_what_a_busy_machine_measured_does_not_stay(
    clock: list[float], load: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = {"a": Timed(clock, 0.1), "b": Timed(clock, 0.5)}
    idle = {"a": Timed(clock, 0.1), "b": Timed(clock, 0.05)}
    load[0] = 100.0
    for _ in range(3):
        assert faster("x", busy, 1.1) == "a"
        another_process(monkeypatch)
    load[0] = 0.0
    assert faster("x", idle, 1.1) == "b"
    another_process(monkeypatch)
    calls = idle["a"].calls
    for _ in range(2):
        assert faster("x", busy, 1.1) == "b"
        another_process(monkeypatch)
    assert idle["a"].calls == calls
    calls = busy["a"].calls
    assert faster("x", busy, 1.1) == "b"
    assert busy["a"].calls == calls, "five times are enough"


def test_the_number_of_threads_is_part_of_the_machine(clock: list[float]) -> None:
    timed = {"a": Timed(clock, 0.1)}
    seconds_of("x", timed)
    calls, threads = timed["a"].calls, torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        seconds_of("x", timed)
    finally:
        torch.set_num_threads(threads)
    assert timed["a"].calls > calls


@pytest.mark.parametrize("cap", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"])
def test_what_the_libraries_may_use_is_part_of_the_machine(
    clock: list[float], cap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = {"a": Timed(clock, 0.1)}
    seconds_of("x", timed)
    calls = timed["a"].calls
    monkeypatch.setenv(cap, "SSE41")
    seconds_of("x", timed)
    assert timed["a"].calls > calls


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"a": 1.0}',
        *(
            f'{{"seconds": {seconds}, "measurements_left": 0}}'
            for seconds in ("1", '{"a": "x"}', '{"a": -1.0}', '{"b": 1.0}', '{"a": NaN}')
        ),
    ],
)
def test_a_damaged_entry_is_measured_again(clock: list[float], content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = {"a": Timed(clock, 0.1)}
    seconds_of("x", timed)
    directory = cache_dir("machine")
    assert directory is not None
    (entry,) = directory.iterdir()
    entry.write_text(content)
    monkeypatch.setattr(precision, "_found", {})
    assert seconds_of("x", timed) == pytest.approx({"a": 0.1})
    assert json.loads(entry.read_text())["seconds"] == pytest.approx({"a": 0.1})


def test_without_a_cache_it_is_measured_in_every_process(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    timed = {"a": Timed(clock, 0.1)}
    assert seconds_of("x", timed) == seconds_of("x", timed) == pytest.approx({"a": 0.1})
    assert not list(tmp_path.iterdir())


def test_a_slow_machine_is_not_kept_waiting(clock: list[float]) -> None:
    timed = {"a": Timed(clock, 10.0), "b": Timed(clock, 20.0)}
    seconds_of("x", timed)
    assert timed["b"].calls <= 2


@pytest.mark.parametrize(("speedup", "dtype"), [(2.0, torch.bfloat16), (1.05, torch.float32), (0.0, torch.float32)])
def test_auto_follows_the_measurement(speedup: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda device: speedup)
    assert choose_dtype("auto", CPU) == dtype
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_the_measurement_takes_nothing_from_a_run_and_finds_a_speed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert precision.bf16_speedup(CPU) > 0
    assert torch.equal(torch.get_rng_state(), state)


AGREE = """
import sys, torch
torch.distributed.init_process_group("gloo")
from ftune.plan import precision
rank = torch.distributed.get_rank()
precision._read = lambda path: None
precision._measure = lambda candidates: {
    name: 1.0 if name.startswith("float32") else 0.5 if rank == 0 else 2.0 for name in candidates
}
sys.stdout.write(f"{precision.choose_dtype('auto', torch.device('cpu'))}\\n")
"""


def test_processes_agree_although_each_would_choose_otherwise(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["torch.bfloat16"] * 2, done.stderr
