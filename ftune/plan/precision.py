"""What is faster on this machine: measured once, kept, and asked instead of the machine's name.

A processor's flags say which instructions it has, not whether the libraries use them well: bfloat16 products are
several times faster than float32 ones on some CPUs and tens of times slower on others. So candidates are timed in
turns, and what was found is kept below the cache for the processor, the instructions that the libraries may use of it,
the version of torch and the number of threads.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftune.cache import cache_dir, publish, touch

if TYPE_CHECKING:
    import torch


__all__ = [
    "DTYPES",
    "MARGIN",
    "bf16_speedup",
    "choose_dtype",
    "faster",
    "machine",
    "matmul_speed",
    "matmul_speeds",
    "seconds_of",
    "takes_bfloat16",
]

CAPS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "OPENBLAS_CORETYPE",
)
"""Variables of the environment by which torch, oneDNN, MKL and OpenBLAS leave instructions of a processor unused."""

MARGIN = 1.1
"""How many times faster bfloat16 must be than float32 to be taken: it costs precision, so a draw is float32's."""

BUDGET_SECONDS = 0.25
ROUNDS = 25
MEASUREMENTS = 5
"""By how many processes at most."""
DTYPES = ("float32", "bfloat16")
AGREEMENT = 1.25
"""How many times slower than a second measurement the first may be, for both to be believed."""

_found: dict[str, dict[str, float]] = {}
"""What this process measured or read, by file name: with no cache on disk, one measurement a process."""


def faster(key: str, candidates: Mapping[str, Callable[[], object]], margin: float) -> str:
    """Name the candidate to use on this machine: the first, unless another is ``margin`` times as fast.

    The first candidate is the default and must be able to run; of several others over the margin, the fastest is
    taken. See ``seconds_of`` for how they are timed, kept, and agreed on between processes.

    Args:
        key: What is compared, with everything that decides it and that this module does not see: the shapes, the
            device, a version of the code. A file name: letters, digits, dots, dashes.
        candidates: Name to a call that does the work once, and waits for it where the device is asynchronous.
        margin: Ratio of the default's time to the candidate's, 1.1 for ten per cent.

    Returns:
        A key of ``candidates``.
    """
    seconds = seconds_of(key, candidates)
    default = next(iter(candidates))
    best = min(candidates, key=lambda name: seconds[name])
    return best if seconds[default] >= margin * seconds[best] else default


def seconds_of(key: str, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds that each candidate takes on this machine: its best of several turns, kept once two processes agree.

    Each runs once to warm up and once to be timed, then they take turns until a quarter of a second is over, so that
    a machine that slows down slows them all. A candidate that torch cannot run here takes ``inf``. In a group of
    processes the first one measures while the others wait, and all get its figures: every process of the group must
    make the call.

    Args:
        key: As of ``faster``.
        candidates: As of ``faster``.
    """
    import torch

    name = f"{key}-{machine()}.json"
    if name in _found and _found[name].keys() == candidates.keys():
        return _found[name]
    shared: list[Any] = [None]
    distributed = torch.distributed
    grouped = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not grouped or distributed.get_rank() == 0:
        shared[0] = _kept(name, candidates)
    if grouped:
        distributed.broadcast_object_list(shared, src=0)
    _found[name] = shared[0]
    return _found[name]


def _kept(name: str, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Read what was measured before, or measure and keep it.

    Where other programs take the processor, threads that wait for each other make a matmul tens of times slower. So
    what one process measured the next ones measure again, until two agree on a machine that is not busy.
    """
    directory = cache_dir("machine")
    path = directory / name if directory else None
    before, left = (_read(path) if path else None) or ({}, MEASUREMENTS)
    known = before.keys() == candidates.keys()
    if path and known and not left:
        touch(path)
        return before
    seconds = _measure(candidates)
    left = (left if known else MEASUREMENTS) - 1
    if known:
        if not _busy() and all(value <= AGREEMENT * seconds[key] for key, value in before.items()):
            left = 0
        seconds = {key: min(value, seconds[key]) for key, value in before.items()}
    if path:
        text = json.dumps({"seconds": seconds, "measurements_left": left})
        publish(path, lambda temporary: cast(None, temporary.write_text(text, encoding="utf-8")))
    return seconds


def _busy() -> bool:
    """Whether the processor had more to do in the last minute than this process gave it."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > max(1.0, (os.cpu_count() or 1) / 2)


def _read(path: Path) -> tuple[dict[str, float], int] | None:
    """The seconds in a file, and how often to measure again at most; None where there is none or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        seconds = {str(name): float(value) for name, value in found["seconds"].items()}
        left = int(found["measurements_left"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return (seconds, left) if all(value > 0 for value in seconds.values()) and left >= 0 else None


def _measure(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    seconds = dict.fromkeys(candidates, math.inf)
    able = []
    for name, run in candidates.items():
        try:
            run()
        except (RuntimeError, NotImplementedError):
            continue
        able.append(name)
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for name in able:
            before = time.perf_counter()
            candidates[name]()
            seconds[name] = min(seconds[name], time.perf_counter() - before)
        if time.perf_counter() - began > BUDGET_SECONDS:
            break
    return seconds


def machine() -> str:
    """Stands for the processor, what the libraries may use of it, torch and its threads in a file's name."""
    import torch

    parts = [processor(), torch.__version__, str(torch.get_num_threads()), platform.machine()]
    parts.append(torch.backends.cpu.get_cpu_capability())
    parts += [f"{name}={os.environ[name]}" for name in CAPS if name in os.environ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def processor() -> str:
    """The processor's name and instructions: virtual machines give several processors one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()}{_apple()}"
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in wanted or line.startswith("CPU "))


def _apple() -> str:
    """The processor's name on macOS, where Python calls each one ``arm``; nothing elsewhere."""
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def choose_dtype(name: str, device: torch.device, bfloat16: bool | None = None) -> torch.dtype:
    """The dtype to compute in: as the recipe says, or with ``auto`` bfloat16 where it is faster on the device.

    Args:
        name: ``auto``, or a dtype of torch.
        device: Where the model computes.
        bfloat16: Whether ``auto`` takes it; None: as ``takes_bfloat16`` finds.
    """
    import torch

    if name == "auto":
        fast = takes_bfloat16(device) if bfloat16 is None else bfloat16
        name = "bfloat16" if fast else "float32"
    return cast("torch.dtype", getattr(torch, name))


def takes_bfloat16(device: torch.device) -> bool:
    """Whether ``auto`` is bfloat16: on a CPU that is measured, on a GPU it is whether it has instructions for it."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bf16_speedup(device) >= MARGIN


def bf16_speedup(device: torch.device) -> float:
    """How many times faster than float32 this device multiplies in bfloat16; 0 where torch cannot."""
    seconds, _ = _matmul_seconds(device)
    return seconds["float32"] / seconds["bfloat16"]


def matmul_speed(dtype: str, device: torch.device) -> float:
    """Floating-point operations a second of matmuls in a dtype, float32 or bfloat16; 0 where torch cannot."""
    seconds, flops = _matmul_seconds(device)
    return flops / seconds[dtype]


def matmul_speeds(device: torch.device) -> dict[str, float]:
    """``matmul_speed`` of every dtype."""
    return {dtype: matmul_speed(dtype, device) for dtype in DTYPES}


def _matmul_seconds(device: torch.device) -> tuple[dict[str, float], float]:
    """Seconds by dtype, and floating-point operations, of the three matmuls of a linear layer in training.

    They are those of the forward pass, the gradient of the input and the gradient of the weight, for 256 tokens and a
    width of 768; on a GPU 2,048 and 2,048, which keep all of it busy.
    """
    tokens, width = (256, 768) if device.type == "cpu" else (2048, 2048)
    key = f"matmul-{tokens}x{width}"
    if device.type != "cpu":
        key = f"{key}-{_accelerator(device)}"
    parts = {f"{dtype}-{part}": run for dtype in DTYPES for part, run in _matmuls(dtype, tokens, width, device).items()}
    found = seconds_of(key, parts)
    seconds = {dtype: sum(found[name] for name in parts if name.startswith(dtype)) for dtype in DTYPES}
    return seconds, 3 * 2.0 * tokens * width * width


def _accelerator(device: torch.device) -> str:
    """What a GPU calls itself and how it multiplies float32, in characters of a file's name."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tf32 = torch.get_float32_matmul_precision()
    return "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{tf32}")


def _matmuls(dtype: str, tokens: int, width: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """By name. Each is timed by itself: short ones get through undisturbed where something else runs."""

    @functools.cache
    def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input, weight and gradient: not zeros, and from a generator of their own, which no seed is taken from."""
        import torch

        generator, kind = torch.Generator(device).manual_seed(0), getattr(torch, dtype)
        x, weight, grad = (
            torch.randn(rows, width, generator=generator, device=device).to(kind) for rows in (tokens, width, tokens)
        )
        return x, weight, grad

    def timed(multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            import torch

            result = multiply(*operands())
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return result

        return run

    return {
        "forward": timed(lambda x, weight, grad: x @ weight.T),
        "input": timed(lambda x, weight, grad: grad @ weight),
        "weight": timed(lambda x, weight, grad: grad.T @ x),
    }
