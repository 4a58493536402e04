"""What all runs of a study have in common, settled before any of them: length, rows, dtype, metric, methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ftune.artifacts.metrics import NO_MEAN
from ftune.artifacts.scores import key_of
from ftune.data.tokenize import generation_items
from ftune.errors import FtuneError, RunDirError
from ftune.experiments.rows import draw
from ftune.experiments.study import Candidate, LoadedStudy
from ftune.experiments.trials import Trials, reason, recipe_text
from ftune.plan.defaults import usual_rate
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.recipe import Loaded, parse_recipe, require
from ftune.recipe.schema import MetricSpec
from ftune.run.files import write_json

__all__ = ["Settled", "load_settled", "recipe_of", "settle", "store_settled"]

SHORT_ANSWER = 5
"""Words up to which answers are compared whole where no metric is asked for."""


@dataclass(frozen=True)
class Settled:
    """What a study begins with; kept in ``study.json``.

    Attributes:
        asked: What decides it all; a study that asks for something else is another one.
        common: What all recipes have in common, by field.
        own: What a method's recipes have in place of it.
        steps: Steps of a run.
        tokens_a_step: Tokens of a step, on average.
        metric: What is compared.
        seed: Of training while tuning, and the first of those that are reported.
        test: The data source of the test rows.
        counts: Rows of each split; None for the recipe's own validation rows.
        drawn: Splits that were drawn.
        priors: The middle of each method's grid of rates.
        excluded: Methods that do not work with this model or here, and why.
    """

    asked: dict[str, Any]
    common: dict[str, Any]
    own: dict[str, dict[str, Any]]
    steps: int
    tokens_a_step: float
    metric: str
    seed: int
    test: dict[str, Any]
    counts: dict[str, int | None]
    drawn: list[str]
    priors: dict[str, float]
    excluded: dict[str, str]

    @property
    def test_items(self) -> int:
        """Test rows, each of which is an answer to compare."""
        count = self.counts["test"]
        assert count is not None
        return count

    def seeds(self, count: int) -> list[int]:
        """The seeds of so many runs of a method's chosen setting."""
        return [self.seed + i for i in range(count)]


def load_settled(loaded: LoadedStudy, base: Loaded) -> Settled | None:
    """What a study that was begun settled on, with methods that were added since; None where none was begun.

    Raises:
        RunDirError: The directory holds another study or was begun with other rows, or a method cannot be added to it.
    """
    path = loaded.root / "study.json"
    if not path.is_file():
        return None
    kept = Settled(**json.loads(path.read_text(encoding="utf-8")))
    now = json.loads(json.dumps(_asked(loaded, base)))
    known = kept.asked["methods"]
    differs = [name for name in now if name != "methods" and now[name] != kept.asked[name]]
    differs += [f"methods: {label}" for label, block in now["methods"].items() if known.get(label, block) != block]
    if differs:
        raise RunDirError(
            f"{loaded.root} holds a study that was begun with another {', '.join(differs)}",
            help="choose another output_dir; methods and seeds may be added, and margin and prefer changed",
        )
    if now["methods"].keys() <= known.keys():
        draw(base.recipe.data, loaded.study.test, loaded.root / "data", begun=True)
        return kept
    wider = settle(loaded, base, steps=kept.steps)
    names = {**kept.common, **wider.common}
    if other := [name for name in names if kept.common.get(name) != wider.common.get(name)]:
        raise RunDirError(
            f"what was added cannot be compared with the runs in {loaded.root}: {', '.join(other)} would be another",
            help="choose another output_dir: a study of all of them",
        )
    return wider


def store_settled(loaded: LoadedStudy, settled: Settled) -> None:
    """Keep what a study begins with."""
    write_json(loaded.root / "study.json", asdict(settled))


def settle(loaded: LoadedStudy, base: Loaded, *, steps: int | None = None) -> Settled:
    """Find out what all runs have in common, from LoRA's plan, and which methods can take part.

    Args:
        loaded: The study.
        base: Its recipe.
        steps: Of a run; None: as the recipe has it.

    Raises:
        FtuneError: The recipe, the data or a method that the study names cannot work.
    """
    study = loaded.study
    begun = (loaded.root / "study.json").is_file()
    drawn = draw(base.recipe.data, study.test, loaded.root / "data", begun=begun)
    rows = {f"data.{name}": value for name, value in drawn.data.items()}
    # What every run has: events to read losses from, one checkpoint to go on from, no rows but the study's.
    common: dict[str, Any] = {**rows, "tracking": ["jsonl"], "checkpoint": {"keep": 1}}
    common |= {"evaluation.every_steps": None, "evaluation.max_examples": None}
    own: dict[str, dict[str, Any]] = {}
    trials = Trials(loaded.root, base, common, own, "", base.recipe.training.seed)
    packs = all(_packable(trials, candidate) for candidate in loaded.candidates)
    if not packs and base.recipe.data.packing == "auto":
        common["data.packing"] = False  # or the order of the rows would differ between methods
    reference = loaded.candidates[0]
    made = recipe_of(trials, reference, {} if steps is None else _length(steps))
    require(made)
    plan = resolve(made.recipe)
    common |= {
        "model.dtype": str(plan.context.dtype).removeprefix("torch."),
        "training.micro_batch_size": plan.recipe.training.micro_batch_size,
        "training.gradient_accumulation_steps": plan.recipe.training.accumulation,
        **_length(plan.total_steps),
    }
    metric, spec = _metric(loaded, base, plan)
    common["evaluation.metrics"] = [spec]
    priors: dict[str, float] = {}
    excluded: dict[str, str] = {}
    for candidate in loaded.candidates:
        try:
            made = recipe_of(trials, candidate, {})
            if made.recipe.method.updates_in_backward:  # which cannot accumulate: the same rows at once
                own[candidate.label] = {
                    "training.micro_batch_size": plan.global_batch,
                    "training.gradient_accumulation_steps": 1,
                }
                made = recipe_of(trials, candidate, {})
            require(made)
            if candidate is not reference:
                resolve(made.recipe)
            _require_searched(study.search, candidate, trials)
        except FtuneError as error:
            if not loaded.every or candidate is reference:
                raise FtuneError(
                    f"method `{candidate.label}` cannot take part: {error.message}", help=error.help
                ) from error
            excluded[candidate.label] = reason(error)
            continue
        # The middle of its grid is what a recipe would have by default; LoRA's is the recipe's own, if it has one.
        given = made.recipe.optimizer.learning_rate if candidate.label == base.recipe.method.name else None
        priors[candidate.label] = given or usual_rate(made.recipe.method, plan.total_steps)
    return Settled(
        asked=_asked(loaded, base),
        common=common,
        own=own,
        steps=plan.total_steps,
        tokens_a_step=plan.splits.train.stats.tokens / plan.steps_per_epoch,
        metric=metric,
        seed=base.recipe.training.seed,
        test=drawn.test,
        counts=drawn.counts,
        drawn=list(drawn.drawn),
        priors=priors,
        excluded=excluded,
    )


def recipe_of(trials: Trials, candidate: Candidate, changes: Mapping[str, Any]) -> Loaded:
    """A method's recipe, checked as one that was written by hand.

    Raises:
        RecipeError: It is wrong; the message names the method.
    """
    raw = trials.raw(candidate, {**changes, "output_dir": str(trials.run(candidate.label, "plan"))})
    return parse_recipe(recipe_text(raw), f"recipe of `{candidate.label}`")


def _length(steps: int) -> dict[str, Any]:
    return {"training.max_steps": steps, "training.epochs": None}


def _packable(trials: Trials, candidate: Candidate) -> bool:
    try:
        return recipe_of(trials, candidate, {}).recipe.method.packable
    except FtuneError:
        return True  # told when its turn comes


def _require_searched(search: Mapping[str, Sequence[Any]], candidate: Candidate, trials: Trials) -> None:
    """Hold that a method takes the fields that are tried.

    Raises:
        RecipeError: It does not, or not all values.
    """
    for path, values in search.items():
        for value in values:
            require(recipe_of(trials, candidate, {path: value}))


def _metric(loaded: LoadedStudy, base: Loaded, plan: Plan) -> tuple[str, dict[str, Any]]:
    """The name of what is compared, and its block in a recipe."""
    specs = [spec for spec in base.recipe.evaluation.metrics if spec.name not in NO_MEAN]
    asked = loaded.study.metric
    if asked is None and not specs:
        held_out = plan.splits.eval
        assert held_out is not None
        items = generation_items(held_out.rows, plan.tokenizer, plan.recipe.data, held_out.format)
        lengths = sorted(len(item.reference.text.split()) for item in items)
        asked = "exact_match" if lengths[len(lengths) // 2] <= SHORT_ANSWER else "rouge_l"
    found = [spec for spec in specs if asked in (None, spec.name, key_of(spec, specs))]
    spec = found[0] if found else MetricSpec.model_validate({"name": asked})
    return spec.name, spec.model_dump(mode="json", exclude_defaults=True)


def _asked(loaded: LoadedStudy, base: Loaded) -> dict[str, Any]:
    """What decides every number of a study."""
    study = loaded.study
    return {
        "recipe": hashlib.sha256(json.dumps(base.raw, sort_keys=True, default=str).encode()).hexdigest(),
        "methods": {c.label: {"name": c.method, **c.fields} for c in loaded.candidates},
        "trials": study.trials,
        "search": study.search,
        "metric": study.metric,
        "test": study.test,
    }
