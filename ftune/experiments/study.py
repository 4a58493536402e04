"""A study: one recipe, several methods, and how they are compared. Text to a checked ``Study``, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ftune.artifacts.metrics import NO_MEAN
from ftune.artifacts.tasks import check_names
from ftune.errors import FtuneError
from ftune.methods import METHODS
from ftune.recipe.load import read_mapping
from ftune.recipe.places import Mistake, Positions, Source
from ftune.recipe.rendering import fail
from ftune.recipe.spelling import closest
from ftune.recipe.variables import frozen

__all__ = ["BASE", "REFERENCE", "Budget", "Candidate", "LoadedStudy", "Study", "is_study", "load_study", "study_of"]

BASE = "base"
"""The label of the model before training."""
REFERENCE = "lora"
"""The method, and its label, that every other is compared with."""


class Study(BaseModel):
    """What is compared, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(1, description="Version of the study format.")
    recipe: str = Field(min_length=1, description="The recipe that every run is made from: model, data, length.")
    methods: tuple[str | dict[str, Any], ...] | Literal["all"] = Field(
        "all",
        description="Names of methods, or blocks with their fields and a `label`; all: every one that works with this "
        "model here. LoRA and the model before training are always compared.",
    )
    trials: int = Field(5, ge=3, le=15, description="Learning rates tried for each method.")
    search: dict[str, tuple[Any, ...]] = Field(
        {}, description="Other fields to try, with their values: {method.rank: [8, 32]}; each with every rate."
    )
    seeds: int = Field(3, ge=1, le=20, description="Runs of each method's best setting.")
    budget: str | None = Field(
        None, description="What the study may take: 2h, 90min, 5000 steps, 3M tokens, or $20 at $2.50/h."
    )
    metric: str | None = Field(
        None,
        description="What is compared, a mean over rows: not macro_f1. Default: the recipe's first such metric, else "
        "exact_match; rouge_l for long answers.",
    )
    margin: float = Field(1.0, gt=0, le=50, description="The smallest difference that matters, in points of 100.")
    prefer: Literal["memory", "time", "size"] = Field("memory", description="What is spared among equals.")
    test: str | None = Field(
        None, description="Rows for the report alone, as data.train. Default: drawn from the training rows."
    )
    forgetting: bool = Field(True, description="Measure of each method what it lost of the base's knowledge.")
    tasks: tuple[str, ...] = Field(
        (),
        description="Tasks of lm-evaluation-harness, by name or YAML file, run on the base and one run of each method.",
    )
    rewind: bool = Field(
        False, description="Measure of each method's chosen run where it forgets less: earlier, and at a smaller scale."
    )
    output_dir: str | None = Field(None, min_length=1, description="Default: studies/NAME, of the study's file.")

    @field_validator("budget")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            Budget.read(text)
        return text

    @field_validator("metric")
    @classmethod
    def _paired(cls, name: str | None) -> str | None:
        if name is not None and name.split(" ")[0] in NO_MEAN:
            raise ValueError(f"`{name}` is no mean over rows, so methods cannot be compared by it: take exact_match")
        return name

    @field_validator("tasks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names:
            try:
                check_names(names)
            except FtuneError as error:
                raise ValueError(f"{error.message}; {error.help}" if error.help else error.message) from None
        return names


@dataclass(frozen=True)
class Candidate:
    """One method of a study.

    Attributes:
        label: What it is called in the report; unique in the study.
        method: A key of ``METHODS``.
        fields: Its fields, in place of the recipe's.
    """

    label: str
    method: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """How much a study may take.

    Attributes:
        unit: ``seconds``, ``steps`` or ``tokens``.
        amount: Of that.
    """

    unit: Literal["seconds", "steps", "tokens"]
    amount: float

    @classmethod
    def read(cls, text: str) -> Budget:
        """Read ``2h``, ``90min``, ``5000 steps``, ``3M tokens`` or ``$20 at $2.50/h``.

        Raises:
            ValueError: It is none of these.
        """
        number = r"(\d+(?:\.\d+)?)"
        plain = text.replace(",", "").strip().lower()
        if found := re.fullmatch(rf"\$\s*{number} at \$\s*{number}\s*/\s*h(?:our)?", plain):
            cost, price = map(float, found.groups())
            if price:
                return cls("seconds", 3600 * cost / price)
        elif found := re.fullmatch(rf"{number}\s*(s|sec|min|m|h|hours?|d|days?)", plain):
            unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2][0]]
            return cls("seconds", float(found[1]) * unit)
        elif found := re.fullmatch(rf"{number}\s*([kmb]?)\s*(steps?|updates?|tokens?)", plain):
            amount = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2]]
            return cls("tokens" if found[3].startswith("token") else "steps", amount)
        raise ValueError("write 2h, 90min, 5000 steps, 3M tokens, or $20 at $2.50/h")


@dataclass(frozen=True)
class LoadedStudy:
    """A study and where it came from.

    Attributes:
        study: The checked study.
        candidates: Its methods; those of ``all`` are not yet known to work here. LoRA is one of them.
        root: The study's directory.
        text: The file as written; of a study made of options, as YAML would have it.
    """

    study: Study
    candidates: tuple[Candidate, ...]
    root: Path
    text: str

    @property
    def every(self) -> bool:
        """Whether methods that do not work here are left out, in place of being refused."""
        return self.study.methods == "all"


def is_study(path: Path) -> bool:
    """Whether a file looks like a study: it has a field of one, and names no model. What cannot be read is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")[:100_000]
    except (OSError, UnicodeDecodeError):
        return False
    fields = set(re.findall(r"^(\w+)\s*:", text, re.M))
    return bool(fields & {"recipe", "extends", "methods", "trials", "seeds"}) and "model" not in fields


def load_study(path: Path, *, color: bool = False) -> LoadedStudy:
    """Read and check a study's file.

    Raises:
        RecipeError: The file cannot be read or is wrong; names every mistake, with its line.
    """
    raw, positions = read_mapping(path, color=color)
    if "extends" in raw and "recipe" not in raw:
        raw["recipe"] = raw.pop("extends")
        positions.at = {("recipe", *at[1:]) if at[0] == "extends" else at: p for at, p in positions.at.items()}
    try:
        study = Study.model_validate(frozen(raw))
    except ValidationError as error:
        raise fail(_mistakes(error, positions), positions.source, color=color) from None
    candidates, wrong = _candidates(study, positions)
    if wrong:
        raise fail(wrong, positions.source, color=color)
    root = Path(study.output_dir or f"studies/{path.stem}").expanduser()
    return LoadedStudy(study, candidates, root, positions.source.text)


def study_of(recipe: Path, **options: Any) -> LoadedStudy:
    """The study of a recipe, from options of the command line.

    Args:
        recipe: The recipe's file.
        options: Fields of ``Study``; None: not given.

    Raises:
        FtuneError: An option is wrong.
    """
    given = {name: value for name, value in options.items() if value is not None}
    positions = Positions(Source("command line", ""))
    try:
        study = Study.model_validate({"recipe": str(recipe), **frozen(given)})
    except ValidationError as error:
        raise FtuneError("; ".join(mistake.message for mistake in _mistakes(error, positions))) from None
    candidates, wrong = _candidates(study, positions)
    if wrong:
        raise FtuneError(wrong[0].message, help=wrong[0].help or wrong[0].label or None)
    root = Path(study.output_dir or f"studies/{recipe.stem}").expanduser()
    lines = [f"{name}: {value}" for name, value in study.model_dump(mode="json", exclude_defaults=True).items()]
    return LoadedStudy(study, candidates, root, "\n".join(lines) + "\n")


def _candidates(study: Study, positions: Positions) -> tuple[tuple[Candidate, ...], list[Mistake]]:
    """The methods of a study, LoRA first, and what is wrong with them."""
    blocks: Sequence[Any] = list(METHODS) if study.methods == "all" else study.methods
    found: list[Candidate] = []
    wrong: list[Mistake] = []
    for index, block in enumerate(blocks):
        fields = {"name": block} if isinstance(block, str) else dict(block)
        name, label = fields.pop("name", None), fields.pop("label", None)
        at = positions.nearest(("methods", index))
        span = at[1].value if at else None
        if name not in METHODS:
            near = closest(str(name), METHODS)
            if name is None:
                message, label_text = "a method's block has no `name`", "add `name` to it"
            else:
                message, label_text = f"unknown method `{name}`", f"did you mean `{near}`?" if near else ""
            wrong.append(Mistake(message, span, label_text, None if label_text else f"methods: {', '.join(METHODS)}"))
            continue
        label = str(label or (name if not fields else _label(name, fields)))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,60}", label):
            message = f"the label `{label}` is no name of a directory"
            wrong.append(Mistake(message, span, help="use letters, digits, - and ."))
        elif label == BASE or label in {other.label for other in found}:
            what = "is the model before training" if label == BASE else "is given twice"
            wrong.append(Mistake(f"the label `{label}` {what}", span, help="give each block a `label` of its own"))
        else:
            found.append(Candidate(label, name, fields))
    if not any(candidate.label == REFERENCE for candidate in found):
        found.insert(0, Candidate(REFERENCE, REFERENCE, {}))
    found.sort(key=lambda candidate: candidate.label != REFERENCE)
    if next(c for c in found if c.label == REFERENCE).method != REFERENCE:
        message = "the label `lora` is LoRA's: every method is compared with it"
        wrong.append(Mistake(message, help="choose another label"))
    return tuple(found), wrong


def _label(name: str, fields: Mapping[str, Any]) -> str:
    parts = [f"{field}{value}" for field, value in fields.items() if isinstance(value, str | int | float)]
    return "-".join([name, *parts])[:60]


def _mistakes(error: ValidationError, positions: Positions) -> list[Mistake]:
    """Pydantic's errors, one for each field, at the lines where they are written."""
    found: dict[tuple[str | int, ...], Mistake] = {}
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        path: tuple[str | int, ...] = (name,)
        if path in found:
            continue
        at = positions.nearest(path)
        span = (at[1].key if item["type"] == "extra_forbidden" or at[1].block else at[1].value) if at else None
        field = Study.model_fields.get(name)
        if item["type"] == "missing":
            found[path] = Mistake(f"the study has no `{name}`", None, "", f"add `{name}: recipe.yaml`")
        elif field is None:
            near = closest(name, list(Study.model_fields))
            label = f"did you mean `{near}`?" if near else ""
            help = None if near else f"fields of a study: {', '.join(Study.model_fields)}"
            found[path] = Mistake(f"unknown field `{name}` in the study", span, label, help)
        else:
            said = item["msg"].removeprefix("Value error, ")
            found[path] = Mistake(f"`{name}`: {said[:1].lower()}{said[1:]}", span, "", field.description)
    return list(found.values())
