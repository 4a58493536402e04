"""Start the processes of a run on this machine, and tell their story as one.

torch elastic starts them, watches them, hands signals on and stops all when one fails; it never restarts them: a
run continues from its checkpoint (``--resume``). Every process leaves its error in a file, of which the launcher
reports the first, once.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ftune.errors import FtuneError

__all__ = [
    "Failure",
    "as_flags",
    "end_with_parent",
    "first_cause",
    "follow_launcher",
    "launch",
    "launched",
    "leave_error",
    "require_launchable",
]

_LAUNCHER = "FTUNE_LAUNCHER_PID"
# Where torch elastic looks for what a process has to say.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# A process may need this long to finish its update and to save, once a signal asked it to stop.
_GRACE_SECONDS = 600
# The launcher notices a death at its next look, and stamps it in whole seconds.
_NOTICED_LATE = 1.2
# What has not ended half a minute after it was asked to, it kills. What was killed earlier was killed from outside,
# however late a busy machine let the launcher look.
_KILLED_BY_LAUNCHER = 25
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """How one process ended.

    Attributes:
        rank: Which one.
        code: Its exit code; minus the number of the signal that killed it.
        time: When, in seconds; of a process that left no message, when the launcher noticed.
        message: What it left, or None.
    """

    rank: int
    code: int
    time: float
    message: str | None = None


def as_flags(options: Mapping[str, bool | int | str | None]) -> list[str]:
    """Options by their name in Python, as the command line takes them; what is False or None is left out."""
    flags: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def require_launchable(processes: int, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse what cannot be launched, before anything is loaded.

    Raises:
        FtuneError: Another launcher has started this process, or there are too few GPUs or too little memory.
    """
    if "WORLD_SIZE" in environment:
        raise FtuneError(
            f"--num-processes {processes}: this process was itself started by a launcher, as one of "
            f"{environment['WORLD_SIZE']} (WORLD_SIZE is set)",
            help="leave out --num-processes under torchrun and accelerate launch, or start ftune without them",
        )
    import torch

    from ftune.available import available_bytes
    from ftune.memory.estimate import RUNTIME_BYTES

    if torch.cuda.is_available() and processes > (gpus := torch.cuda.device_count()):
        raise FtuneError(
            f"--num-processes {processes}: there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'} here, and each "
            "process needs its own",
            help=f"use --num-processes {gpus} with as much more gradient_accumulation_steps: the result is the same",
        )
    most = max(1, available_bytes("cpu") // RUNTIME_BYTES["cpu"])
    if processes > most:
        raise FtuneError(
            f"--num-processes {processes}: the libraries of {most} fill the memory that is free here",
            help=f"use at most as many as there are CPU cores or GPUs ({os.cpu_count()} cores), with as much more "
            "gradient_accumulation_steps: the result is the same",
        )


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``python -m ftune ARGUMENTS`` in processes that share an update; returns the exit code.

    SIGTERM and SIGINT reach every process, which saves a checkpoint; a second one ends them at once. Should the
    launcher itself be killed, the system sends them SIGTERM.

    Args:
        processes: How many, all on this machine.
        arguments: The command line, without ``--num-processes``.

    Raises:
        FtuneError: As ``require_launchable`` does.
    """
    require_launchable(processes)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_for(processes)))
    os.environ[_LAUNCHER] = str(os.getpid())
    # Its lines repeat, at length, what is reported below.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="ftune-launch-") as scratch:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",  # the machine's own name may not resolve
            max_restarts=0,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP",
            shutdown_timeout=_GRACE_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "ftune", *arguments)
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except ChildFailedError as failed:
            found = (
                _failure(rank, failure.exitcode, failure.timestamp, failure.error_file)
                for rank, failure in failed.failures.items()
            )
            return _report(first_cause(found))
        finally:
            logging.disable(logging.NOTSET)
    return 0


def threads_for(processes: int) -> int:
    """Threads of each of ``processes``: its share of the cores that this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # outside Linux
        cores = os.cpu_count() or 1
    return max(1, cores // processes)


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that made the others fail.

    When one process dies, the others lose their connection to it, or the launcher stops them with SIGTERM. So it is
    the earliest, those last that SIGTERM ended; one that was killed is noticed a moment after it died, and SIGKILL
    comes from outside unless the launcher had waited long for the process to stop.
    """

    def place(failure: Failure) -> tuple[bool, float]:
        if failure.message:
            return False, failure.time
        late = _KILLED_BY_LAUNCHER if failure.code == -signal.SIGKILL else _NOTICED_LATE
        return failure.code == -signal.SIGTERM, failure.time - late

    return min(failures, key=place)


def _failure(rank: int, code: int, noticed: float, path: str) -> Failure:
    """How a process ended: by what it left, for the launcher may have stopped it on its way out."""
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file)
        return Failure(rank, int(said["code"]), float(said["seconds"]), str(said["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Failure(rank, code, noticed)


def _report(failure: Failure) -> int:
    """Print why the run ended; returns the exit code."""
    code = failure.code if failure.code > 0 else 128 - failure.code
    if failure.message is not None:
        print(failure.message, file=sys.stderr)
    elif failure.code < 0:
        name = signal.Signals(-failure.code).name
        cause = " (often by the kernel, for want of memory)" if name == "SIGKILL" else ""
        error = FtuneError(
            f"process {failure.rank} was killed by {name}{cause}; the others were stopped",
            help="continue from the last checkpoint with --resume",
        )
        print(error.render(), file=sys.stderr)
    elif code not in (129, 130, 143):  # of an interruption process 0 has told
        print(FtuneError(f"process {failure.rank} ended with exit code {code}").render(), file=sys.stderr)
    return code


# --- in the processes that were launched ---


def launched() -> bool:
    """Whether ``launch`` started this process."""
    return _LAUNCHER in os.environ


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies, on Linux: a run must not go on with nobody who could stop it."""
    if not launched() or sys.platform != "linux":
        return
    end_with_parent()
    if os.getppid() != int(os.environ[_LAUNCHER]):  # it died before
        sys.exit(143)


def end_with_parent() -> None:
    """Get SIGTERM when the process that started this one dies, on Linux: a step that is being made is saved."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_error(text: str, code: int) -> None:
    """Leave for the launcher what it prints if this process failed first."""
    path, now = os.environ.get(_ERROR_FILE), time.time()
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": text, "code": code, "timestamp": int(now), "seconds": now}, file)
