"""The command that talks to a model."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer

from ftune.cli.app import app
from ftune.cli.options import Checkpoint, RunOrRecipe
from ftune.errors import FtuneError
from ftune.run.imports import import_for, quiet_libraries

__all__ = ["chat"]


@app.command()
def chat(
    target: RunOrRecipe,
    base: Annotated[bool, typer.Option("--base", help="Begin with the base model.")] = False,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy; above: sample.")] = 0.0,
    system: Annotated[str | None, typer.Option(help="A system message before every conversation.")] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Talk to the tuned model, or to its base, in the terminal.

    What is typed is put before the model as the run's rows were: in the chat template, or as it is.
    """
    with quiet_libraries():
        import_for(target)
        from ftune.artifacts.chat import HELP, Chat
        from ftune.artifacts.tuned import reading

        # Not for as long as the talk is: the weights are in memory.
        with reading(target, checkpoint, unfinished=True) as found:
            settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
            talk = Chat(found, base=base, system=system, **settings)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        if prompt is not None:
            talk.answer(prompt, sys.stdout)
            return
        if sys.stdin is None:
            raise FtuneError("standard input is closed, and nothing was asked", help="--prompt asks one question")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{HELP}\n{talk.manner}")
        while True:
            try:
                line = input(f"{'base' if talk.base else 'tuned'}> " if interactive else "").strip()
            except EOFError:
                return
            if line.startswith("/"):
                reply = talk.command(line)
                if reply is None:
                    return
                print(reply)
            elif line:
                talk.answer(line, sys.stdout)
