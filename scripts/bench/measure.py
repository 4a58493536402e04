"""Run a process and measure it from outside: time, CPU time, peak memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One finished process with the children it waited for.

    Attributes:
        wall_seconds: From its start to its end.
        cpu_seconds: User and system time of all of them.
        peak_bytes: Largest resident size of any one of them, in bytes.
        device_peak_bytes: How much the GPU's used memory grew at most, in bytes; None without a GPU.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    device_peak_bytes: int | None


class ProcessFailed(Exception):
    """A measured process did not end with 0."""


def run(command: list[str], environment: dict[str, str], log: Path, timeout_seconds: float, cuda: bool) -> Measured:
    """Run a command with its output in ``log``.

    The peak counts from this process's own resident size (Linux carries it over ``exec``), so nothing heavy may be
    imported here.

    Raises:
        ProcessFailed: It failed or ran out of time; the end of its log is in the message.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("wb") as output, _device_memory(cuda) as device:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timer = threading.Timer(timeout_seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise ProcessFailed(
            f"{tail}\n{' '.join(command)}\nended with {process.returncode} after {wall:.0f} s; see {log}"
        )
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, device.grown() if device else None)


class _DeviceMemory:
    """The used memory of the first GPU as ``nvidia-smi`` sees it, sampled while a process runs.

    It counts what an allocator keeps as well as what is in use, alike for every tool.
    """

    def __init__(self) -> None:
        self._before = self._peak = self._used()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _used() -> int:
        query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout) * 2**20

    def _watch(self) -> None:
        # Each question is a process that asks the driver, which the measured one needs too. Allocators keep what they
        # once had, so seldom is enough.
        while not self._stop.wait(4.0):
            self._peak = max(self._peak, self._used())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def grown(self) -> int:
        return self._peak - self._before


@contextlib.contextmanager
def _device_memory(cuda: bool) -> Iterator[_DeviceMemory | None]:
    if not cuda:
        yield None
        return
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("nvidia-smi is needed to measure the memory of a GPU")
    meter = _DeviceMemory()
    try:
        yield meter
    finally:
        meter.stop()


def physical_cores() -> int:
    """Cores this process may use, two hardware threads of one core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(tuple((topology / name).read_text() for name in ("physical_package_id", "core_id")))
        except OSError:
            cores.add((str(cpu),))
    return len(cores)


def device_name(cuda: bool) -> str:
    """The GPU's or the CPU's name."""
    if cuda:
        query = ["nvidia-smi", "--id=0", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"
