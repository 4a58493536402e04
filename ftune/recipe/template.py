"""What the schema says of itself: an annotated recipe for ``ftune init``, a JSON Schema for editors."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftune.errors import FtuneError
from ftune.methods import METHODS
from ftune.recipe.load import is_plain_string
from ftune.recipe.schema import Recipe
from ftune.recipe.spelling import closest
from ftune.recipe.suggestions import models_in

__all__ = ["annotated_recipe", "json_schema"]

SCHEMA_ID = "urn:ftune:recipe:1"
WIDTH = 100
COMMENT_COLUMN = 36

_Given = dict[tuple[str, ...], str | float]
"""Values that are live in an annotated recipe, by their path."""

_EXAMPLES = {"path": "data/eval.jsonl", "name": "exact_match"}


def annotated_recipe(
    method_name: str,
    *,
    model: str,
    data: str,
    output_dir: str,
    schema: str = "recipe.schema.json",
    eval_fraction: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> str:
    """A recipe with every field of every block, what is optional commented out with its default.

    Args:
        method_name: A key of ``METHODS``.
        model: The value of ``model.id``.
        data: The value of ``data.train.path``.
        output_dir: Where the run goes.
        schema: Path of the JSON Schema, for the editor's first line.
        eval_fraction: The value of ``data.eval_fraction``; 0 leaves it commented out.
        columns: The value of ``data.train.columns``.

    Returns YAML that parses to the same recipe as these values alone.

    Raises:
        FtuneError: There is no such method.
    """
    if method_name not in METHODS:
        near = closest(method_name, METHODS)
        raise FtuneError(
            f"no method `{method_name}`",
            help=f"did you mean `{near}`?" if near else f"methods: {', '.join(METHODS)}",
        )
    given: _Given = {
        ("model", "id"): model,
        ("method", "name"): method_name,
        ("data", "train", "path"): data,
        ("output_dir",): output_dir,
    }
    given |= {("data", "train", "columns", field): name for field, name in (columns or {}).items()}
    if eval_fraction:
        given[("data", "eval_fraction")] = eval_fraction
    method = METHODS[method_name]
    out = [
        f"# yaml-language-server: $schema={schema}",
        f"# Method {method_name}: {method.summary} ({method.paper}).",
        "# What is commented out shows its default.",
    ]
    for name, info in Recipe.model_fields.items():
        block = method if name == "method" else next(models_in(info.annotation), None)
        if block is None or name == "tracking":
            out += ["", *_line(name, info, 0, given.get((name,)))]
            continue
        about = (block.__doc__ or "").strip().splitlines()[0].replace("``", "`")
        told = {}
        if name == "optimizer":
            own = f"Peak learning rate. Default: {method_name}'s own, {_yaml(method.default_learning_rate)}, higher "
            told["learning_rate"] = own + "for under 1000 updates."
        out += ["", f"# {about}", f"{name}:", *_block(block, (name,), given, told)]
    return "\n".join(out) + "\n"


def _block(
    model: type[BaseModel], path: tuple[str, ...], given: _Given, told: dict[str, str] | None = None
) -> Iterator[str]:
    """The lines of a block: live where a value is given in it, commented out elsewhere.

    told: What to say of a field in place of its description.
    """
    live = any(key[: len(path)] == path for key in given) or len(path) == 1
    depth = len(path)
    for name, info in sorted(model.model_fields.items(), key=lambda field: field[0] != "name"):
        inner = next(models_in(info.annotation), None)
        here = (*path, name)
        if inner is None:
            yield from _line(name, info, depth, given.get(here), told=(told or {}).get(name))
            continue
        if any(key[: len(here)] == here for key in given):
            yield f"{'  ' * depth}{name}:"
            yield from _block(inner, here, given)
            continue
        sequence = get_origin(info.annotation) is tuple
        head = f"{'  ' * depth if live else ''}# {'' if live else '  ' * (depth - 1)}{name}:"
        yield from _commented(head, info.description or "", "  " * depth)
        for index, (child, child_info) in enumerate(inner.model_fields.items()):
            lead = ("  - " if index == 0 else "    ") if sequence else "  "
            example = _example(child, child_info)
            yield from _commented(f"{'  ' * depth}# {lead}{child}: {example}", _about(child_info), "  " * depth)


def _example(name: str, info: FieldInfo) -> str:
    """The default, or for a field that has none an example."""
    return _EXAMPLES[name] if info.is_required() else _yaml(info.get_default())


def _line(name: str, info: FieldInfo, depth: int, given: str | float | None, told: str | None = None) -> Iterator[str]:
    indent, about = "  " * depth, told or _about(info)
    if given is not None:
        yield from _commented(f"{indent}{name}: {_yaml(given)}", about, indent)
    else:
        yield from _commented(f"{indent}# {name}: {_yaml(info.get_default())}", about, indent)


def _about(info: FieldInfo) -> str:
    """The description, and the allowed values that it does not name."""
    text = info.description or ""
    choices = [str(choice) for choice in _choices(info.annotation)]
    if len(choices) > 1 and not all(choice in text for choice in choices):
        text = f"{text} One of {', '.join(choices)}."
    return text


def _choices(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    for argument in get_args(annotation):
        yield from _choices(argument)


def _commented(start: str, about: str, indent: str) -> Iterator[str]:
    """A line with its description behind it, wrapped below itself where it is long."""
    if not about:
        yield start
        return
    column = max(COMMENT_COLUMN, len(start) + 2)
    if column > COMMENT_COLUMN + 16:
        yield from textwrap.wrap(about, WIDTH, initial_indent=f"{indent}## ", subsequent_indent=f"{indent}## ")
        yield start
        return
    first, *rest = textwrap.wrap(about, WIDTH - column - 2)
    yield f"{start:<{column}}# {first}"
    for line in rest:
        yield f"{indent + '#':<{column}}# {line}"


def _yaml(value: object) -> str:
    """A value as this package's loader reads it back."""
    if isinstance(value, str):
        return value if is_plain_string(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", repr(value))
    return "null" if value is None else str(value).lower()


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema (draft 2020-12), short forms included."""
    schema = Recipe.model_json_schema(mode="validation")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "ftune recipe",
        "description": "One fine-tuning run.",
    }
    return head | {key: value for key, value in schema.items() if key not in head}
