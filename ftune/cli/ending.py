"""Run the application, and end the process as the outcome asks for."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from typing import NoReturn

import typer

from ftune.cli.output import paint
from ftune.errors import FtuneError, Interrupted, RecipeError
from ftune.run.signals import Interruptible

__all__ = ["run"]


def run(app: typer.Typer, signals: Interruptible) -> NoReturn:
    """Run the command that was given, and exit with its code."""
    try:
        code = app(standalone_mode=False, prog_name="ftune")
        if signals.signal_number:  # typer takes the exception for itself
            leave(signals.signal_number)
    except Interrupted as interrupted:
        tell(paint(interrupted.render()), interrupted.exit_code)
        end(interrupted.exit_code, together=interrupted.together)
    except (KeyboardInterrupt, typer.Abort):
        leave(signals.signal_number or signal.SIGINT)
    except FtuneError as error:
        if signals.signal_number:
            leave(signals.signal_number)
        # A recipe's reports are painted where they are made.
        text = error.render()
        tell(text if isinstance(error, RecipeError) else paint(text), error.exit_code)
        end(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
    except Exception as error:
        # A library that was interrupted at its import, say, makes another exception of it.
        if signals.signal_number:
            leave(signals.signal_number)
        # typer's own usage errors know how to show themselves; anything else is a bug and keeps its traceback.
        show = getattr(error, "show", None)
        from ftune.scrub import scrub

        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            from ftune.run.files import failed

            tell(paint(failed(error, "the command").render()), 1)
            end(1)
        if show is None:
            tell(scrub(traceback.format_exc()).rstrip(), 1)
            end(1)
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


def leave(number: int) -> NoReturn:
    """End after a signal, of which no run was told; what was half written is gone by now."""
    tell("interrupted", 128 + number)
    end(128 + number)


def end(code: int, *, together: bool = False) -> NoReturn:
    """End this process after an error; one of many at once, unless they all end together.

    Others may be waiting in an exchange. Leaving the process group in good order would wait for them (NCCL's does), or
    a thread that waits for them would hold this process back, and its launcher would not learn that it failed.
    """
    if together or os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launched() -> bool:
    from ftune.run.launch import launched

    return launched()


def tell(text: str, code: int) -> None:
    """Print an error; of many processes that ftune launched, the launcher prints the first one's.

    All of them know of an interruption, so the main process tells of it.
    """
    if not _launched():
        print(text, file=sys.stderr)
    elif code > 128:
        if os.environ.get("RANK") == "0":
            print(text, file=sys.stderr)
    else:
        from ftune.run.launch import leave_error

        leave_error(text, code)
