"""The command line: parse, call one function, print.

Only typer, pydantic and yaml are imported here; a command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import ftune
from ftune.errors import FtuneError, Interrupted, LocatedDataError, RecipeError
from ftune.heap import begin_again
from ftune.run.imports import quiet_libraries as _libraries
from ftune.run.signals import Interruptible
from ftune.streams import outlive_reader

if TYPE_CHECKING:
    from ftune.recipe import Loaded

__all__ = ["app", "main"]

app = typer.Typer(
    name="ftune",
    help="Fine-tune a language model from a recipe; evaluate, merge and talk to what comes out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SCHEMA_FILE = "recipe.schema.json"
"""Written beside a recipe by `ftune init`, for editors; the recipe's first line points to it."""

DOES_NOT_FIT = 3
"""Exit code of `ftune plan` where the run needs more memory than there is."""


def _home(path: Path | None) -> Path | None:
    """A path whose ``~`` the shell left as it was (``--out=~/x``)."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise FtuneError(f"`{path}`: {error}", help="write the path out") from error


def _homes(paths: list[Path]) -> list[Path]:
    return [path for path in map(_home, paths) if path is not None]


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", callback=_home, help="A recipe (YAML).")]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", callback=_home, help="A run directory (a recipe's output_dir).")
]
RunOrRecipe = Annotated[
    Path, typer.Argument(metavar="RUN_OR_RECIPE", callback=_home, help="A run directory, or a recipe.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", "--step", metavar="N", help="Take the checkpoint of this step, also while the run goes on."
    ),
]
Scale = Annotated[
    float, typer.Option("--scale", metavar="S", help="Take this share of what training changed: W0 + S (W - W0).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: training.max_steps=20. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]


def main() -> NoReturn:
    """Run the command line.

    Exits 0, 1 (failed), 2 (the user's mistake), 3 (a plan that does not fit), or 128 + a signal's number (interrupted).
    """
    # Rows of many lengths would cut a GPU's memory into pieces. Read when the first tensor goes there.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if sys.argv[1:2] == ["train"]:
        begin_again()
    with Interruptible() as signals:
        _run(signals)


def _run(signals: Interruptible) -> NoReturn:
    try:
        code = app(standalone_mode=False, prog_name="ftune")
        if signals.signal_number:  # typer takes the exception for itself
            _leave(signals.signal_number)
    except Interrupted as interrupted:
        _tell(_paint(interrupted.render()), interrupted.exit_code)
        _exit(interrupted.exit_code, together=interrupted.together)
    except (KeyboardInterrupt, typer.Abort):
        _leave(signals.signal_number or signal.SIGINT)
    except FtuneError as error:
        if signals.signal_number:
            _leave(signals.signal_number)
        # A recipe's reports are painted where they are made.
        text = error.render()
        _tell(text if isinstance(error, RecipeError) else _paint(text), error.exit_code)
        _exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
    except Exception as error:
        # A library that was interrupted at its import, say, makes another exception of it.
        if signals.signal_number:
            _leave(signals.signal_number)
        # typer's own usage errors know how to show themselves; anything else is a bug and keeps its traceback.
        show = getattr(error, "show", None)
        from ftune.scrub import scrub

        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            from ftune.run.files import failed

            _tell(_paint(failed(error, "the command").render()), 1)
            _exit(1)
        if show is None:
            _tell(scrub(traceback.format_exc()).rstrip(), 1)
            _exit(1)
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


def _leave(number: int) -> NoReturn:
    """End after a signal, of which no run was told; what was half written is gone by now."""
    _tell("interrupted", 128 + number)
    _exit(128 + number)


def _exit(code: int, *, together: bool = False) -> NoReturn:
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


def _tell(text: str, code: int) -> None:
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


def _paint(text: str) -> str:
    """Colour ``error:`` and ``help:`` for a terminal."""
    if not _color(sys.stderr):
        return text
    return text.replace("error:", "\x1b[1;31merror:\x1b[0m").replace("help:", "\x1b[1;36mhelp:\x1b[0m")


def _color(stream: Any) -> bool:
    return bool(stream.isatty()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _load(path: Path, overrides: list[str] | None) -> Loaded:
    """Load and check a recipe; what is only doubtful is printed to standard error."""
    from ftune.recipe import load_checked

    loaded, warnings = load_checked(path, overrides or (), color=_color(sys.stderr))
    if os.environ.get("RANK", "0") == "0":
        for warning in warnings:
            print(warning, file=sys.stderr)
    return loaded


@contextlib.contextmanager
def _located(loaded: Loaded) -> Iterator[None]:
    """Show what the data says of fields of the recipe at the fields."""
    from ftune.recipe import at_fields

    try:
        yield
    except LocatedDataError as error:
        raise at_fields(error, loaded, color=_color(sys.stderr)) from error


def _import_for(target: Path) -> None:
    """Import at once what a command on a run or a recipe uses; not where it will only say that there is none."""
    if target.exists():
        from ftune.run.imports import import_libraries

        import_libraries(peft=True)


def _version(value: bool) -> None:
    if value:
        print(f"ftune {ftune.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method: see `ftune methods`.")] = "lora",
    model: Annotated[str, typer.Option(help="Hub id, directory, .gguf file or package://NAME/FILE.gguf.")] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
    data: Annotated[str, typer.Option(help="Training data: a file, a directory or a hub data set.")] = (
        "data/train.jsonl"
    ),
    out: Annotated[
        Path | None, typer.Option(callback=_home, help="Where to write; default: METHOD.yaml. `-` prints.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write an annotated recipe for a method.

    Every field stands in it, with its default and what it does; a tenth of the rows is held out.
    """
    from ftune.recipe.template import annotated_recipe, json_schema
    from ftune.run.files import write_text
    from ftune.run.outputs import is_standard_output, is_stream, require_output, write_output

    columns = _columns_for(data)
    text = annotated_recipe(
        method,
        model=model,
        data=data,
        output_dir=f"runs/{method}",
        schema=SCHEMA_FILE,
        eval_fraction=0.1,
        columns=columns,
    )
    if out is not None and is_standard_output(out):
        print(text, end="")
        return
    path = out or Path(f"{method}.yaml")
    if path.is_dir():
        raise FtuneError(f"{path} is a directory", help=f"--out names a file: {path / f'{method}.yaml'}")
    streamed = is_stream(path)
    require_output(path, "--out", [(Path(data), "the training data"), (Path(model), "the model")])
    if path.exists() and not force and not streamed:
        raise FtuneError(f"{path} exists", help="--force replaces it, --out writes elsewhere")
    schema_path = path.parent / SCHEMA_FILE
    try:
        write_output(path, text, "--out")
        if not streamed and not os.path.lexists(schema_path):
            write_text(schema_path, json.dumps(json_schema(), indent=2) + "\n")
    except OSError as error:
        raise FtuneError(
            f"cannot write the recipe: {error}", help="--out names a file in a directory that exists"
        ) from error
    if not streamed:
        if columns:
            said = ", ".join(f"`{name}` is the {field}" for field, name in columns.items())
            print(f"of {data}: {said}; change data.train.columns in the recipe if that is wrong")
        print(f"wrote {path}\nnext: ftune validate {path}, then ftune train {path} or ftune compare {path}")


def _columns_for(data: str) -> dict[str, str]:
    """What a recipe has to say of the columns of a file; nothing where it cannot be read, which `validate` tells."""
    if not Path(data).expanduser().is_file():
        return {}
    from ftune.data.read import columns_for
    from ftune.recipe.schema import DataSource

    with contextlib.suppress(FtuneError):
        return columns_for(DataSource(path=data))
    return {}


@app.command()
def validate(
    recipe: RecipePath,
    data: Annotated[
        bool | None,
        typer.Option("--data/--no-data", help="Show three examples too; or check the recipe alone, without its data."),
    ] = None,
    row: Annotated[
        list[int] | None, typer.Option("--row", metavar="N", min=1, help="Show row N as it is trained. Repeatable.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe and its data: all mistakes at once, each with its place."""
    if data is False and row:
        raise FtuneError("--row needs the data: leave out --no-data")
    loaded = _load(recipe, overrides)
    checked = {"valid": True, "recipe": loaded.recipe.model_dump(mode="json")}
    name = f"{recipe}: valid ({loaded.recipe.method.name} on {loaded.recipe.model.id})"
    if data is not False:
        with _libraries(), _located(loaded):
            from ftune.artifacts.validation import validated

            said = validated(loaded.recipe, rows=row or (), examples=3 if data else 0, color=_color(sys.stdout))
        checked |= {"data": said.counts, "shown": list(said.shown)}
        name = "\n".join([*said.shown, name, *said.told])
    _print_json(checked) if as_json else print(name)


@app.command()
def plan(
    recipe: RecipePath,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes", help="Plan for another model's sizes: llama-3-8b, mistral-7b, ..., or a config.json's directory."
        ),
    ] = None,
    num_processes: Annotated[int, typer.Option("--num-processes", min=1, help="Processes that share an update.")] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="How they share what they hold: ddp (the default), fsdp2, fsdp2-offload, deepspeed-zero2 or "
            "deepspeed-zero3.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Plan for this device, h100-80g, or this much memory, 24GiB.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="One line for each of these methods, lora,dora,ia3; or for all.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do and need, without loading weights.

    Exits 3 where it does not fit into the device's memory; of several methods, where none does.
    """
    from ftune.plan.devices import find_device
    from ftune.plan.engine import choose_engine, require_several
    from ftune.plan.sizes import find_sizes

    other = find_sizes(sizes) if sizes is not None else None
    choice = choose_engine(engine, {})
    require_several(choice, num_processes)
    target = find_device(device) if device else None
    if methods is not None and num_processes > 1:
        raise FtuneError("--methods plans one process: leave out --num-processes")
    loaded = _load(recipe, overrides)
    if methods is not None:
        with _libraries():
            from dataclasses import asdict

            from ftune.experiments.fits import fits, fits_table

            found = fits(loaded, _method_names(methods), sizes=other, target=target)
        _print_json([asdict(fit) for fit in found]) if as_json else print(fits_table(found, _width()))
        if not any(fit.verdict in ("fits", "may just fit") for fit in found):
            raise typer.Exit(DOES_NOT_FIT)
        return
    with _libraries(), _located(loaded):
        from ftune.plan.machine import Machine
        from ftune.plan.resolve import resolve
        from ftune.plan.summary import summary_of

        summary = summary_of(
            resolve(
                loaded.recipe,
                sizes=other,
                world_size=num_processes,
                engine=choice,
                machine=Machine.of(target) if target else None,
            )
        )
    _print_json(summary) if as_json else _print_plan(summary)
    if not summary["fits"]:
        raise typer.Exit(DOES_NOT_FIT)


def _method_names(text: str) -> list[str]:
    """Methods that an option names.

    Raises:
        FtuneError: There is no such method.
    """
    from ftune.methods import METHODS
    from ftune.recipe.spelling import closest

    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            near = closest(name, METHODS)
            help = f"did you mean `{near}`?" if near else f"methods: {', '.join(METHODS)}, or all"
            raise FtuneError(f"--methods: unknown method `{name}`", help=help)
    return names


def _print_plan(summary: dict[str, Any], stream: Any = None) -> None:
    from ftune.plan.table import render_plan

    print(render_plan(summary, _width()), file=stream or sys.stdout, flush=True)


@app.command()
def train(
    recipe: RecipePath,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: go on although the data changed.")
    ] = False,
    accept_changed_model: Annotated[
        bool, typer.Option("--accept-changed-model", help="With --resume: go on although the base model changed.")
    ] = False,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Where memory runs out, halve the micro-batches: the same result.")
    ] = False,
    until: Annotated[
        int | None,
        typer.Option("--until", metavar="N", min=1, help="Pause after step N, evaluated and saved; --resume goes on."),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help="Share every update among N processes, here.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="How several processes share the model: ddp, fsdp2, fsdp2-offload, deepspeed-zero2 or "
            "deepspeed-zero3; or ray: on the workers of a Ray cluster. Default: as launched, else ddp.",
        ),
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option("--num-workers", min=1, help="Processes in all, with --engine ray.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe into its output_dir."""
    from ftune.run.launch import follow_launcher, launch, require_launchable

    follow_launcher()
    if resume and overwrite:
        raise FtuneError("--resume and --overwrite exclude each other")
    if accept_changed_data and not resume:
        raise FtuneError("--accept-changed-data goes with --resume: a new run takes the data as it is")
    if accept_changed_model and not resume:
        raise FtuneError("--accept-changed-model goes with --resume: a new run takes the base model as it is")
    if (engine == "ray") != (num_workers is not None):
        raise FtuneError("--engine ray and --num-workers go together", help="--engine ray --num-workers 2")
    if num_workers is not None:
        if num_processes is not None or accept_changed_data or accept_changed_model or auto_batch or until:
            raise FtuneError(
                "--num-processes, --accept-changed-data, --accept-changed-model, --auto-batch and --until do not go "
                "with --engine ray"
            )
        from ftune.artifacts.ray_engine import require_ray

        require_ray()
    if num_processes is not None:
        require_launchable(num_processes)
    if num_processes is not None and num_processes > 1:
        from ftune.plan.engine import engine_for
        from ftune.recipe import load_checked

        # A mistake is told before anything starts; what is only doubtful, by the main process.
        checked = load_checked(recipe, overrides or (), color=_color(sys.stderr))[0]
        engine_for(checked.recipe, engine, os.environ, auto_batch=auto_batch)
        flags = [
            flag
            for flag, on in (
                ("--resume", resume),
                ("--overwrite", overwrite),
                ("--accept-changed-data", accept_changed_data),
                ("--accept-changed-model", accept_changed_model),
                ("--auto-batch", auto_batch),
                ("--json", as_json),
            )
            if on
        ]
        flags += ["--engine", engine] if engine is not None else []
        flags += ["--until", str(until)] if until is not None else []
        settings = [part for override in overrides or () for part in ("--set", override)]
        raise typer.Exit(launch(num_processes, ["train", str(recipe), *flags, *settings]))
    loaded = _load(recipe, overrides)
    with _libraries(), outlive_reader():
        if num_workers is not None:
            from ftune.artifacts.ray_engine import train_on_ray

            record = train_on_ray(loaded, num_workers=num_workers, resume=resume, overwrite=overwrite)
        else:
            from ftune.run.imports import import_libraries

            import_libraries(peft=loaded.recipe.method.saved_as == "peft")
            from ftune.artifacts.training import train as run_recipe

            record = run_recipe(
                loaded,
                resume=resume,
                overwrite=overwrite,
                accept_changed_data=accept_changed_data,
                accept_changed_model=accept_changed_model,
                engine=engine,
                auto_batch=auto_batch,
                until=until,
                show_plan=lambda summary: _print_plan(summary, sys.stderr if as_json else sys.stdout),
            )
        if os.environ.get("RANK", "0") != "0":
            return
        if as_json:
            _print_json({key: value for key, value in record.items() if key != "recipe"})
            return
        from ftune.artifacts.report import training_summary

        print(training_summary(record, loaded.recipe.output_dir, _width()))


@app.command()
def compare(
    target: Annotated[
        Path,
        typer.Argument(metavar="STUDY_OR_RECIPE", callback=_home, help="A study; or a recipe, and options below."),
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
        loaded = load_study(target, color=_color(sys.stderr))
    else:
        loaded = study_of(target, **options)
    numbers = _numbers(devices)
    if engine not in (None, "ray"):
        raise FtuneError(f"--engine {engine}: no engine of a study", help="--engine ray, or leave it out")
    if engine and devices:
        raise FtuneError(
            "--engine ray and --devices do not go together", help="leave out --devices: Ray chooses the devices"
        )
    with _libraries():
        from ftune.experiments.compare import compare as run_study
        from ftune.experiments.forecast import Forecast
        from ftune.experiments.markdown import forecast_text, markdown, summary
        from ftune.experiments.page import page
        from ftune.run.files import write_text

        def agreed(forecast: Forecast) -> bool:
            print(forecast_text(forecast, _width()), file=sys.stderr if as_json else sys.stdout, flush=True)
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
        command = _command()
        write_text(loaded.root / "compare.md", markdown(result, command))
        write_text(loaded.root / "compare.html", page(result, loaded.root, command))
    _print_json(result) if as_json else print(summary(result, str(loaded.root), _width()))


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
            metavar="RUN", callback=_homes, help="Run directories; all are compared with the first that has scores."
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", callback=_home, help="Where report.html, .md and .json go.")
    ] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Put runs side by side on one page: settings, losses, scores with intervals, memory, time and size.

    Scores are compared row by row where `ftune eval` kept them for the same rows. Runs are not tuned alike: which
    method is better, `ftune compare` finds out.
    """
    with _libraries():
        from ftune.artifacts.report import table
        from ftune.experiments.report import costs, overview, statements, write_report

        result = write_report(runs, output_dir, _command())
    if as_json:
        _print_json(result)
        return
    for head, rows in (overview(result), costs(result)):
        print(table(head, rows, right=range(2, len(head))), end="\n\n")
    for said in statements(result):
        print(textwrap.fill(said, _width(), break_on_hyphens=False))
    print(f"written: {output_dir}/report.html, report.md, report.json")


@app.command()
def leaderboard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", callback=_home, help="Studies are looked for below it.")],
    out: Annotated[
        Path | None, typer.Option("--out", callback=_home, help="Write a page here, too: studies.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show every study below a directory: its verdict, and its methods with their differences from LoRA.

    Numbers of different studies are not comparable, and are not ranked against each other.
    """
    from ftune.run.outputs import require_output, write_output

    if out is not None:
        require_output(out, "--out", [])
    with _libraries():
        from ftune.experiments.leaderboard import leaderboard as gather
        from ftune.experiments.leaderboard import leaderboard_page, leaderboard_text

        found = gather(directory)
        if out is not None:
            write_output(out, leaderboard_page(found, out.parent), "--out")
    _print_json(found) if as_json else print(leaderboard_text(found, _width()))


def _command() -> str:
    """The command as it was given."""
    return " ".join(["ftune", *map(shlex.quote, sys.argv[1:])])


@app.command()
def recommend(
    recipe: RecipePath,
    memory: Annotated[str | None, typer.Option("--memory", help="What a run may take here: 24GB.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="For this device: h100-80g.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="The longest that a run may take: 2h.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=_home, help="Write a study of the methods that fit: study.yaml.")
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
    loaded = _load(recipe, settings)
    with _libraries():
        from ftune.experiments.fits import fits
        from ftune.experiments.recommend import recommend as recommended
        from ftune.experiments.recommend import recommendation_text, study_text

        found = fits(loaded, _method_names("all"), target=find_device(device) if device else None)
        made = recommended(loaded.recipe, found, seconds, Path("studies"))
    _print_json(asdict(made)) if as_json else print(recommendation_text(made, seconds, _width()))
    if not made.methods:
        raise typer.Exit(DOES_NOT_FIT)
    if out is not None:
        write_output(out, study_text(str(recipe), made), "--out")
        print(f"wrote {out}\nnext: ftune compare {out} --plan", file=sys.stderr if as_json else sys.stdout)


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
    from ftune.artifacts.report import evaluation_table
    from ftune.artifacts.tasks import check_names, load_tasks

    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    if tasks is not None:
        check_names(names)
    elif limit is not None or shots is not None:
        raise FtuneError(f"{'--limit' if limit is not None else '--shots'} is of --tasks, and there are none")
    with _libraries():
        _import_for(target)
        from ftune.artifacts.evaluate import evaluate as measure
        from ftune.artifacts.tuned import reading, scaled

        with reading(target, checkpoint, unfinished=True) as found:
            found = scaled(found, scale)
            if forgetting and found.run is None:
                raise FtuneError("--forgetting compares a run with its base, and there is no run yet")
            ready = load_tasks(names, limit=limit, shots=shots) if names else None
            result = measure(found, base=base, forgetting=forgetting, tasks=ready)
    _print_json(result) if as_json else print(evaluation_table(result, _width()))


@app.command()
def predict(
    target: RunOrRecipe,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows like the run's data; they need no answers.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=_home, help="Where to write, as .jsonl; default: standard output."),
    ] = None,
    checkpoint: Checkpoint = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: evaluation.max_new_tokens.")
    ] = None,
) -> None:
    """Answer the rows of a new file.

    It is read as the run's data were: in their format, and through the recipe's columns.
    """
    with _libraries():
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
        Path | None, typer.Option("--out", callback=_home, help="Where to write; default RUN/merged.")
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
    from ftune.artifacts.report import merge_summary

    with _libraries():
        _import_for(run)
        from ftune.artifacts.merge import merge as merge_run
        from ftune.artifacts.run_dir import RunDir

        with RunDir(run).reading():
            report = merge_run(RunDir(run), out, dtype, by_shard, checkpoint=checkpoint, scale=scale)
    _print_json(report) if as_json else print(merge_summary(report))


@app.command()
def convert(
    run: RunPath,
    out: Annotated[Path | None, typer.Option("--out", callback=_home, help="Where to write; default RUN/lora.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the adapter; default: the least that is exact.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what was trained as a plain LoRA adapter, which every engine serves.

    It is read back from the disk and compared with the tuned model on real text. A method whose update is no
    low-rank matrix is refused with the reason, or approximated and the error printed.
    """
    from ftune.artifacts.report import convert_summary

    with _libraries():
        from ftune.artifacts.convert import to_lora
        from ftune.artifacts.run_dir import RunDir

        with RunDir(run).reading():
            report = to_lora(RunDir(run), out, rank)
    _print_json(report) if as_json else print(convert_summary(report))


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
    with _libraries():
        _import_for(target)
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


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every method; of one: when to choose it, what it costs, what it composes with."""
    from ftune.artifacts.method_table import method_card, method_row, method_rows, method_table

    if as_json:
        _print_json(method_rows() if name is None else method_row(name))
    else:
        print(method_table(_width()) if name is None else method_card(name, _width()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors and other tools."""
    from ftune.recipe.template import json_schema

    _print_json(json_schema())
