"""Commands on many runs: compare, report, leaderboard, recommend."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from ftune.cli.app import app
from ftune.cli.options import DOES_NOT_FIT, AsJson, Overrides, RecipePath, home, homes
from ftune.cli.output import color_of, command_line, load, method_names, print_json
from ftune.errors import FtuneError
from ftune.run.imports import quiet_libraries
from ftune.streams import terminal_width

__all__ = ["compare", "leaderboard", "recommend", "report"]


@app.command()
def compare(
    target: Annotated[
        Path,
        typer.Argument(metavar="STUDY_OR_RECIPE", callback=home, help="A study; or a recipe, and options below."),
    ],
    methods: Annotated[
        str | None, typer.Option("--methods", help="Of a recipe: lora,dora,ia3; default: every one that works.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Learning rates for each method.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of each method's best setting.")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="2h, 5000 steps, 3M tokens, or '$20 at $2.50/h'.")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="What is compared.")] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="The smallest difference that matters, in points.")
    ] = None,
    prefer: Annotated[
        str | None, typer.Option("--prefer", help="What is spared among equals: memory, time or size.")
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="Rows for the report alone.")] = None,
    rewind: Annotated[
        bool | None, typer.Option("--rewind", help="Measure where each method forgets less: earlier, or scaled.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", help="The study's directory.")] = None,
    devices: Annotated[str | None, typer.Option("--devices", help="GPUs to use, a run on each: 0,1,2.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="ray: a run on each GPU of a Ray cluster (RAY_ADDRESS, or here).")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the study takes and can show, and train nothing but a few steps.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find out whether another method beats LoRA on your data, and how sure that is.

    Every method is tuned alike on validation rows, trained with several seeds, and judged once on test rows. Stopped
    at any time, the same command goes on.
    """
    from ftune.experiments.study import is_study, load_study, study_of

    options = {
        "methods": tuple(methods.split(",")) if methods not in (None, "all") else methods,
        "trials": trials,
        "seeds": seeds,
        "budget": budget,
        "metric": metric,
        "margin": margin,
        "prefer": prefer,
        "test": test,
        "rewind": rewind,
        "output_dir": output_dir,
    }
    if is_study(target):
        if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
            raise FtuneError(f"{', '.join(given)}: options of a recipe", help=f"{target} is a study: change it there")
        loaded = load_study(target, color=color_of(sys.stderr))
    else:
        loaded = study_of(target, **options)
    numbers = _numbers(devices)
    if engine not in (None, "ray"):
        raise FtuneError(f"--engine {engine}: no engine of a study", help="--engine ray, or leave it out")
    if engine and devices:
        raise FtuneError(
            "--engine ray and --devices do not go together", help="leave out --devices: Ray chooses the devices"
        )
    with quiet_libraries():
        from ftune.experiments.compare import compare as run_study
        from ftune.experiments.forecast import Forecast
        from ftune.experiments.markdown import forecast_text, markdown, summary
        from ftune.experiments.page import page
        from ftune.run.files import write_text

        def agreed(forecast: Forecast) -> bool:
            print(forecast_text(forecast, terminal_width()), file=sys.stderr if as_json else sys.stdout, flush=True)
            if plan or yes or loaded.study.budget is not None or forecast.begun:
                return not plan
            if not sys.stdin.isatty():
                raise FtuneError("the study has no budget", help="--yes begins it as it is, --budget 2h bounds it")
            return typer.confirm("begin?")

        result = run_study(
            loaded,
            devices=numbers,
            ray=engine == "ray",
            agree=agreed,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if result is None:
            return
        command = command_line()
        write_text(loaded.root / "compare.md", markdown(result, command))
        write_text(loaded.root / "compare.html", page(result, loaded.root, command))
    print_json(result) if as_json else print(summary(result, str(loaded.root), terminal_width()))


def _numbers(devices: str | None) -> list[int]:
    """GPUs by their numbers."""
    parts = devices.split(",") if devices else []
    if wrong := [part for part in parts if not part.strip().isdigit()]:
        raise FtuneError(f"--devices: `{wrong[0]}` is no number of a GPU", help="--devices 0,1")
    return [int(part) for part in parts]


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", callback=homes, help="Run directories; all are compared with the first that has scores."
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", callback=home, help="Where report.html, .md and .json go.")
    ] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Put runs side by side on one page: settings, losses, scores with intervals, memory, time and size.

    Scores are compared row by row where `ftune eval` kept them for the same rows. Runs are not tuned alike: which
    method is better, `ftune compare` finds out.
    """
    with quiet_libraries():
        from ftune.artifacts.report import table
        from ftune.experiments.report import costs, overview, statements, write_report

        result = write_report(runs, output_dir, command_line())
    if as_json:
        print_json(result)
        return
    for head, rows in (overview(result), costs(result)):
        print(table(head, rows, right=range(2, len(head))), end="\n\n")
    for said in statements(result):
        print(textwrap.fill(said, terminal_width(), break_on_hyphens=False))
    print(f"written: {output_dir}/report.html, report.md, report.json")


@app.command()
def leaderboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", callback=home, help="Studies are looked for below it.")],
    out: Annotated[
        Path | None, typer.Option("--out", callback=home, help="Write a page here, too: studies.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show every study below a directory: its verdict, and its methods with their differences from LoRA.

    Numbers of different studies are not comparable, and are not ranked against each other.
    """
    from ftune.run.outputs import require_output, write_output

    if out is not None:
        require_output(out, "--out", [])
    with quiet_libraries():
        from ftune.experiments.leaderboard import leaderboard as gather
        from ftune.experiments.leaderboard import leaderboard_page, leaderboard_text

        found = gather(directory)
        if out is not None:
            write_output(out, leaderboard_page(found, out.parent), "--out")
    print_json(found) if as_json else print(leaderboard_text(found, terminal_width()))


@app.command()
def recommend(
    recipe: RecipePath,
    memory: Annotated[str | None, typer.Option("--memory", help="What a run may take here: 24GB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="For this device: h100-80g.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="The longest that a run may take: 2h.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=home, help="Write a study of the methods that fit: study.yaml.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say which methods fit a recipe, what is known of each, and what was found on this machine before.

    Exits 3 where none fits.
    """
    from dataclasses import asdict

    from ftune.experiments.study import Budget
    from ftune.plan.devices import find_device
    from ftune.run.outputs import require_output, write_output

    if memory is not None and device is not None:
        raise FtuneError("--memory is of this machine's device, --device of another: give one of them")
    seconds: float | None = None
    if time is not None:
        try:
            longest = Budget.read(time)
        except ValueError:
            longest = Budget("steps", 0)
        if longest.unit != "seconds":
            raise FtuneError(f"--time {time}: no time", help="2h, 90min")
        seconds = longest.amount
    settings = list(overrides or ())
    if memory is not None:
        settings.append(f"training.memory_gib={find_device(memory).memory / 2**30}")
    if out is not None:
        require_output(out, "--out", [(recipe, "the recipe")])
    loaded = load(recipe, settings)
    with quiet_libraries():
        from ftune.experiments.fits import fits
        from ftune.experiments.recommend import recommend as recommended
        from ftune.experiments.recommend import recommendation_text, study_text

        found = fits(loaded, method_names("all"), target=find_device(device) if device else None)
        made = recommended(loaded.recipe, found, seconds, Path("studies"))
    print_json(asdict(made)) if as_json else print(recommendation_text(made, seconds, terminal_width()))
    if not made.methods:
        raise typer.Exit(DOES_NOT_FIT)
    if out is not None:
        write_output(out, study_text(str(recipe), made), "--out")
        print(f"wrote {out}\nnext: ftune compare {out} --plan", file=sys.stderr if as_json else sys.stdout)
