"""Commands on a run: evaluate, predict, merge, convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ftune.cli.app import app
from ftune.cli.options import AsJson, Checkpoint, RunOrRecipe, RunPath, Scale, home
from ftune.cli.output import print_json
from ftune.errors import FtuneError
from ftune.run.imports import quiet_libraries

__all__ = ["convert", "evaluate", "merge", "predict"]


@app.command("eval")
def evaluate(
    target: RunOrRecipe,
    base: Annotated[bool, typer.Option("--base", help="Measure the base model too, side by side.")] = False,
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="Compare with the base on neutral text and questions, too.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Run tasks of lm-evaluation-harness on both: hellaswag,my_task.yaml."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Of each task the first N items.")] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Solved examples before each item; default: the task's.")
    ] = None,
    checkpoint: Checkpoint = None,
    scale: Scale = 1.0,
    as_json: AsJson = False,
) -> None:
    """Measure held-out loss, perplexity and task metrics.

    Every answer and its scores are kept in RUN/predictions.jsonl, those of --tasks in RUN/tasks.jsonl. Of a run that
    has not ended, the newest checkpoint is measured; of a recipe that was not trained yet, its base model.
    """
    from ftune.api.using import evaluate as measure

    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    if tasks is None and (limit is not None or shots is not None):
        raise FtuneError(f"{'--limit' if limit is not None else '--shots'} is of --tasks, and there are none")
    found = measure(
        target,
        base=base,
        forgetting=forgetting,
        tasks=names,
        limit=limit,
        shots=shots,
        checkpoint=checkpoint,
        scale=scale,
    )
    print_json(found.data) if as_json else print(found)


@app.command()
def predict(
    target: RunOrRecipe,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows like the run's data; they need no answers.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=home, help="Where to write, as .jsonl; default: standard output."),
    ] = None,
    checkpoint: Checkpoint = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: evaluation.max_new_tokens.")
    ] = None,
) -> None:
    """Answer the rows of a new file.

    It is read as the run's data were: in their format, and through the recipe's columns.
    """
    with quiet_libraries():
        from ftune.artifacts.predict import predict as answer
        from ftune.artifacts.tuned import reading
        from ftune.run.outputs import is_standard_output, is_stream

        if output is not None and is_standard_output(output):
            output = None
        with reading(target, checkpoint, unfinished=True) as found:
            result = answer(found, file, output, max_new_tokens, recipe_file=target if target.is_file() else None)
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if output is not None and not is_stream(output):
        print(f"{result['rows']} rows answered: {result['out']}")


@app.command()
def merge(
    run: RunPath,
    out: Annotated[
        Path | None, typer.Option("--out", callback=home, help="Where to write; default RUN/merged.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or bfloat16; default: what the run computed in.")
    ] = None,
    by_shard: Annotated[
        bool | None,
        typer.Option(
            "--by-shard/--in-memory", help="One tensor at a time, or all at once; default: what memory allows."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", "--step", metavar="N", help="Merge the checkpoint of this step, not the end."),
    ] = None,
    scale: Scale = 1.0,
    as_json: AsJson = False,
) -> None:
    """Fold what was trained into the base weights.

    The plain model is written, read back from the disk, and compared with the tuned one on real text. A model
    larger than memory is merged one tensor at a time, and compared layer by layer. A checkpoint (--step), or a part
    of the change (--scale), often forgets less than the end.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise FtuneError(f"--dtype {dtype}: not a dtype that can be merged to", help="float32 or bfloat16")
    from ftune.api.using import merge as merge_run

    made = merge_run(run, out, dtype=dtype, by_shard=by_shard, checkpoint=checkpoint, scale=scale)
    print_json(made.data) if as_json else print(made)


@app.command()
def convert(
    run: RunPath,
    out: Annotated[Path | None, typer.Option("--out", callback=home, help="Where to write; default RUN/lora.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter; default: the least that is exact.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what was trained as a plain LoRA adapter, which every engine serves.

    It is read back from the disk and compared with the tuned model on real text. A method whose update is no
    low-rank matrix is refused with the reason, or approximated and the error printed.
    """
    from ftune.api.using import convert as convert_run

    made = convert_run(run, out, rank=rank)
    print_json(made.data) if as_json else print(made)
