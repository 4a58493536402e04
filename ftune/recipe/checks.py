"""What a recipe that parses can still get wrong: combinations that cannot work, files and packages not there.

Each check is a generator of ``Problem``s over the whole recipe; ``check`` collects all of them. Nothing heavy
is imported: packages are looked for, not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ftune.errors import DataError, FtuneError, RunDirError
from ftune.methods import Problem
from ftune.recipe.columns import FORMATS, Field, format_of, is_template, parse_template
from ftune.recipe.data_files import locate_data
from ftune.recipe.doubts import _escapes, doubtful
from ftune.recipe.locate import as_path, is_installed, locate_model, near_path
from ftune.recipe.schema import DataSource, Recipe
from ftune.recipe.spelling import closest
from ftune.recipe.variables import unbraced
from ftune.regular import kind_of
from ftune.scrub import find_secret

__all__ = ["advise", "check", "check_stored", "metric_names"]

BUILTIN_METRICS = (
    "exact_match",
    "contains",
    "regex",
    "strict",
    "f1",
    "rouge_l",
    "json",
    "choice",
    "accuracy",
    "macro_f1",
)
CLASS_METRICS = ("accuracy", "macro_f1")

_TRACKER_PACKAGES = {
    "tensorboard": ("tensorboard", "pip install 'ftune[tracking]'"),
    "wandb": ("wandb", "pip install wandb"),
    "mlflow": ("mlflow", "pip install mlflow"),
    "trackio": ("trackio", "pip install trackio"),
    "comet_ml": ("comet_ml", "pip install comet_ml"),
    "aim": ("aim", "pip install aim"),
    "clearml": ("clearml", "pip install clearml"),
}


_NOT_SEPARATORS = {
    **dict.fromkeys(("lines", "newline", "newlines", "new_line", "Line", "row", "rows"), "line"),
    **dict.fromkeys(
        ("blank_lines", "blank", "blankline", "blank line", "empty_line", "empty_lines", "paragraph", "paragraphs"),
        "blank_line",
    ),
}
"""Words that stand for a place to cut at, and are none of the names that `split_on` knows."""


def check(recipe: Recipe) -> list[Problem]:
    """Everything that would stop this recipe on this machine."""
    return [
        *recipe.method.problems(recipe),
        *_model(recipe),
        *_data(recipe),
        *_held_out(recipe),
        *_metrics(recipe),
        *_schedule(recipe),
        *_packages(recipe),
        *_output(recipe),
        *_unbraced(recipe),
        *_secrets(recipe.model_dump(mode="json"), ()),
    ]


def check_stored(recipe: Recipe) -> list[Problem]:
    """What would stop the recipe of a run that was trained already, wherever its data and its packages are now."""
    return [*recipe.method.problems(recipe), *_metrics(recipe)]


def advise(recipe: Recipe) -> list[Problem]:
    """What works but is unlikely to be meant."""
    return [*_trusted(recipe), *_escapes(recipe), *doubtful(recipe)]


def has_held_out(recipe: Recipe) -> bool:
    """Whether there are rows to evaluate on."""
    return recipe.data.eval is not None or recipe.data.eval_fraction > 0


def metric_names() -> list[str]:
    """Every metric that can be named here: the built-in ones and those of installed packages."""
    from importlib.metadata import entry_points

    return sorted({*BUILTIN_METRICS, *entry_points(group="ftune.metrics").names})


def _model(recipe: Recipe) -> Iterator[Problem]:
    spec = recipe.model
    try:
        located = locate_model(spec)
    except FtuneError as error:
        inside = spec.gguf_file is not None and Path(spec.id).expanduser().is_dir()
        yield Problem(("model", "gguf_file" if inside else "id"), error.message, error.help)
        return
    if spec.revision is not None and located.kind != "hub":
        yield Problem(
            ("model", "revision"),
            "`model.revision` is for models on the hub, and this one is on disk",
            "remove it",
        )
    if spec.gguf_file is not None and not spec.gguf_file.lower().endswith(".gguf"):
        yield Problem(("model", "gguf_file"), f"`{spec.gguf_file}` does not end in .gguf")
    if located.gguf_file is not None and not is_installed("gguf"):
        yield Problem(
            ("model", "id"),
            "GGUF models need the package `gguf`, which is not installed",
            "pip install 'ftune[gguf]'",
        )
    if spec.attention == "flash_attention_2" and not is_installed("flash_attn"):
        yield Problem(
            ("model", "attention"),
            "`attention: flash_attention_2` needs the package `flash_attn`, which is not installed",
            "use `attention: sdpa`, or pip install flash-attn",
        )


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    yield from _source(data.train, "train")
    if data.eval is not None:
        yield from _source(data.eval, "eval")
    if data.packing is True and not recipe.method.packable:
        yield Problem(
            ("data", "packing"),
            f"`packing: true` cannot work with method `{recipe.method.name}`: what it trains stands in front of a row, "
            "not of each document in it",
            "use `packing: auto` or `packing: false`",
        )
    if data.chat_template is not None:
        try:
            path = as_path(data.chat_template, DataError)
        except DataError as error:
            yield Problem(("data", "chat_template"), error.message)
            return
        if not path.is_file():
            near = near_path(path)
            kind = kind_of(path, follow=True)
            message = (
                f"`{data.chat_template}` is {kind}"
                if kind is not None
                else f"there is no chat template file `{data.chat_template}`"
            )
            yield Problem(
                ("data", "chat_template"),
                message,
                f"did you mean `{near}`?" if near and near != path else None,
            )


def _columns(source: DataSource, key: str) -> Iterator[Problem]:
    """Templates that do not parse, and fields that contradict each other."""
    given = source.columns.given() if source.columns else {}
    at = ("data", key, "columns")
    formats = format_of(set(given))
    if len(formats) > 1:
        groups = [", ".join(f"`{name}`" for name in FORMATS[name_of] if name in given) for name_of in formats]
        yield Problem(at, f"`columns` maps to {len(formats)} formats: {' and '.join(groups)}", "keep those of one")
    elif formats and source.format not in ("auto", "sharegpt" if formats == ["messages"] else "auto", formats[0]):
        yield Problem(
            ("data", key, "format"),
            f"`columns` maps to `{formats[0]}`, and `format` is `{source.format}`",
            "remove one of them",
        )
    for name, value in given.items():
        if not value.strip():
            yield Problem((*at, name), f"`{name}` names no column", "remove it, or name one")
        if not is_template(value):
            continue
        if name in ("messages", "history", "tools"):
            yield Problem((*at, name), f"`{name}` is a list, which no text with columns in it can be", "name a column")
            continue
        try:
            if not any(isinstance(part, Field) for part in parse_template(value)):
                yield Problem(
                    (*at, name), f"no column stands in the text of `{name}`", "write {column} where it stands"
                )
        except ValueError as error:
            yield Problem((*at, name), str(error))


def _source(source: DataSource, key: Literal["train", "eval"]) -> Iterator[Problem]:
    yield from _columns(source, key)
    try:
        located = locate_data(source, key)
    except FtuneError as error:
        yield Problem(("data", key, "path"), error.message, error.help)
        return
    texts = all(file.suffix.lower() == ".txt" for file in located.files) and located.kind != "hub"
    if source.split_on is not None and not texts:
        yield Problem(("data", key, "split_on"), "`split_on` cuts .txt files, and this is none", "remove it")
    elif source.split_on is not None and not source.split_on:
        yield Problem(("data", key, "split_on"), "`split_on` is empty", "line, blank_line, or the text of a separator")
    elif source.split_on in _NOT_SEPARATORS:
        help = f"did you mean `{_NOT_SEPARATORS[source.split_on]}`?"
        yield Problem(("data", key, "split_on"), f"`split_on` cannot be the word `{source.split_on}`", help)
    if located.kind == "hub":
        return
    given = {
        "subset": source.subset is not None,
        "split": source.split != DataSource.model_fields["split"].default,
        "revision": source.revision is not None,
    }
    for name in (name for name, is_given in given.items() if is_given):
        yield Problem(
            ("data", key, name),
            f"`data.{key}.{name}` is for data sets on the hub, and this one is on disk",
            "remove it",
        )


def _held_out(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.eval is not None and recipe.data.eval_fraction > 0:
        yield Problem(
            ("data", "eval_fraction"),
            "`data.eval` and `data.eval_fraction` are both given",
            "remove one: `eval_fraction` takes held-out rows from the training rows",
        )
    if has_held_out(recipe):
        return
    help = "add `data.eval`, or `data.eval_fraction`"
    if recipe.evaluation.every_steps is not None:
        yield Problem(("evaluation", "every_steps"), "there are no held-out rows to evaluate on", help)
    if recipe.evaluation.metrics:
        yield Problem(("evaluation", "metrics"), "there are no held-out rows to measure metrics on", help)


def _metrics(recipe: Recipe) -> Iterator[Problem]:
    seen: set[object] = set()
    for index, metric in enumerate(recipe.evaluation.metrics):
        at = ("evaluation", "metrics", index)
        if metric.name not in BUILTIN_METRICS and metric.name not in (names := metric_names()):
            near = closest(metric.name, names)
            help = f"did you mean `{near}`?" if near else f"metrics: {', '.join(names)}"
            yield Problem((*at, "name"), f"unknown metric `{metric.name}`", help)
        elif metric.name == "regex":
            yield from _pattern(metric.pattern, at)
        elif metric.pattern is not None and metric.name in BUILTIN_METRICS:
            yield Problem(
                (*at, "pattern"),
                f"metric `{metric.name}` takes no `pattern`",
                "use the metric `regex`, or remove it",
            )
        if metric.name in CLASS_METRICS and not is_installed("sklearn"):
            yield Problem(
                (*at, "name"),
                f"metric `{metric.name}` needs the package scikit-learn, which is not installed",
                "pip install 'ftune[metrics]'",
            )
        if metric in seen:
            yield Problem((*at, "name"), f"metric `{metric.name}` is given twice", "remove one")
        seen.add(metric)


def _pattern(pattern: str | None, at: tuple[str | int, ...]) -> Iterator[Problem]:
    if pattern is None:
        yield Problem(at, "metric `regex` has no `pattern`", "add `pattern: 'answer is (.*)'`, or whatever marks it")
        return
    import regex

    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        yield Problem((*at, "pattern"), f"`pattern` is not a regular expression: {error}")


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    schedule, training = recipe.schedule, recipe.training
    if schedule.warmup_steps and training.max_steps and schedule.warmup_steps >= training.max_steps:
        yield Problem(
            ("schedule", "warmup_steps"),
            f"a warm-up of {schedule.warmup_steps} steps never ends in a run of {training.max_steps}",
            "use fewer, or `warmup_ratio`",
        )
    if schedule.name == "constant" and schedule.min_lr_ratio > 0:
        yield Problem(
            ("schedule", "min_lr_ratio"),
            "`min_lr_ratio` is where a decay ends, and `name: constant` has none",
            "remove it, or use `name: linear`",
        )
    for index, beta in enumerate(recipe.optimizer.betas):
        if not 0 <= beta < 1:
            yield Problem(
                ("optimizer", "betas", index),
                f"`optimizer.betas` must be at least 0 and less than 1, not {beta:g}",
            )


def _packages(recipe: Recipe) -> Iterator[Problem]:
    if not is_installed("bitsandbytes"):
        help = "pip install 'ftune[qlora]'"
        if recipe.method.base_quantization is not None:
            yield Problem(
                ("method", "quantization"),
                "4-bit weights need the package `bitsandbytes`, which is not installed",
                help,
            )
        if recipe.optimizer.needs_bitsandbytes:
            yield Problem(
                ("optimizer", "name"),
                f"`{recipe.optimizer.name}` needs the package `bitsandbytes`, which is not installed",
                help,
            )
    for index, tracker in enumerate(recipe.tracking):
        package, help = _TRACKER_PACKAGES.get(tracker, ("", ""))
        if package and not is_installed(package):
            yield Problem(
                ("tracking", index),
                f"`{tracker}` needs the package `{package}`, which is not installed",
                help,
            )
        if tracker in recipe.tracking[:index]:
            yield Problem(("tracking", index), f"`{tracker}` is given twice", "remove one")


def _output(recipe: Recipe) -> Iterator[Problem]:
    try:
        path = as_path(recipe.output_dir, RunDirError)
    except RunDirError as error:
        yield Problem(("output_dir",), error.message)
        return
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            yield Problem(
                ("output_dir",),
                f"`{part}` is a file, so `output_dir` cannot be made",
                "name a directory that is free",
            )
            return


def _unbraced(recipe: Recipe) -> Iterator[Problem]:
    """A path with ``$NAME`` in it: a directory of that name is hardly meant."""
    data = recipe.data
    paths: list[tuple[tuple[str | int, ...], str | None]] = [
        (("output_dir",), recipe.output_dir),
        (("model", "id"), recipe.model.id),
        (("data", "train", "path"), data.train.path),
        (("data", "eval", "path"), data.eval.path if data.eval is not None else None),
        (("data", "chat_template"), data.chat_template),
    ]
    for at, path in paths:
        if path is not None and (name := unbraced(path)) is not None:
            yield Problem(
                at, f"`${name}` is not expanded", f"write `${{{name}}}`: the environment's variable in braces"
            )


def _secrets(value: Any, at: tuple[str | int, ...]) -> Iterator[Problem]:
    """A secret in a field: run.json keeps fields as they are, and cannot be read with a hole in one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, (*at, index))
    elif isinstance(value, str) and (what := find_secret(value)) is not None:
        yield Problem(
            at,
            f"`{'.'.join(map(str, at))}` holds {what}, and run.json keeps every field",
            "take it out of the recipe: the hub's token is read from HF_TOKEN",
        )


def _trusted(recipe: Recipe) -> Iterator[Problem]:
    if recipe.model.trust_remote_code:
        yield Problem(
            ("model", "trust_remote_code"),
            "TRUST_REMOTE_CODE IS ON: Python code that comes with the model runs on this machine, as you",
            "read that code, name its commit as `model.revision`, or remove this",
        )
