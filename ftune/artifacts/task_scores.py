"""Scores of a model on tasks of lm-evaluation-harness, and those of two models compared item by item."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ftune.artifacts.paired import difference
from ftune.artifacts.stops import end_token_ids
from ftune.artifacts.tasks import SEED, Tasks
from ftune.data.chat import load_template
from ftune.data.prompts import prompting_of
from ftune.errors import FtuneError
from ftune.installed import version_of
from ftune.plan.base_model import configured
from ftune.plan.plan import Plan
from ftune.plan.positions import context_of_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Score", "TaskRun", "compared", "item_lines", "run_tasks", "tasks_result"]

RESAMPLES = 200
"""Draws of the items from which the error of a score that is no mean is known."""


@dataclass(frozen=True)
class Score:
    """One score of one model on a task, or on a group of tasks.

    Attributes:
        task: The task's name.
        metric: The metric's, with the filter of answers where it has one.
        n: Items.
        value: The score.
        items: (n,) the score of each item, where the score is their mean.
        draws: Of any other score, its values on ``RESAMPLES`` draws of the items, the same for every model.
        lower_is_better: As the task says.
        shown: Whether it is of what was asked for, and not of a part of a group.
        shots: Solved examples before each item.
        version: Of the task.
    """

    task: str
    metric: str
    n: int
    value: float
    items: list[float] | None
    draws: list[float] | None
    lower_is_better: bool
    shown: bool
    shots: int
    version: str


@dataclass(frozen=True)
class TaskRun:
    """What one model did on tasks.

    Attributes:
        scores: A score for each metric of each task and group.
        items: Every item with its prompt, what is right, what the model answered, and its scores.
        chat: Whether prompts were put into the chat template.
        cut: Prompts that were longer than the model's context, and lost their beginning.
        context: That context, in tokens.
        digest: Of what was asked and what is right: only runs of one digest can be compared by item.
    """

    scores: list[Score]
    items: list[dict[str, Any]]
    chat: bool
    cut: int
    context: int
    digest: str


def run_tasks(tasks: Tasks, model: nn.Module, plan: Plan, stops: Sequence[int]) -> TaskRun:
    """Run tasks on a model, whatever wraps it, in the dtype of its plan and in batches of ``evaluation.batch_size``.

    Args:
        tasks: The tasks.
        model: A causal model in evaluation mode.
        plan: How it was loaded, and its tokenizer. Prompts are put into the chat template where the run's rows are.
        stops: Tokens that end an answer, beside those of model and tokenizer.

    Raises:
        FtuneError: A task fails on one of its items.
    """
    from lm_eval.evaluator import evaluate

    recipe = plan.recipe
    chat = prompting_of(recipe.data, plan.tokenizer).kind == "chat"
    lm = _language_model(model, plan, stops, chat)
    for task in tasks.tasks.values():
        task.set_fewshot_seed(SEED)  # every model gets the same examples
    try:
        # Not simple_evaluate, which asks the hub for the model's commit and pip for all packages, and sets seeds.
        found = evaluate(
            lm=lm,
            task_dict={"tasks": tasks.tasks, "groups": tasks.groups},
            limit=tasks.limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except (FtuneError, RuntimeError, OSError, MemoryError):  # of the model, or of the machine
        raise
    except Exception as error:
        names = ", ".join(f"`{name}`" for name in tasks.names)
        raise FtuneError(f"{names} failed at an item: {type(error).__name__}: {error}") from error
    of_tasks = list(_of_tasks(tasks, found))
    scores = sorted([*_of_groups(tasks, found, of_tasks), *of_tasks], key=lambda score: not score.shown)
    samples = found["samples"]
    return TaskRun(scores, _items(samples), chat, lm.cut, lm.max_length, _digest(samples))


def _language_model(model: nn.Module, plan: Plan, stops: Sequence[int], chat: bool) -> Any:
    """The harness's view of a model that is loaded already."""
    import torch
    from lm_eval.models.huggingface import HFLM

    recipe, dtype = plan.recipe, plan.context.dtype
    ends = end_token_ids(model, plan.tokenizer, stops)
    config = configured(recipe.model, recipe.method)
    context = context_of_model(config)
    # The window of a short prompt would end in padding, before it comes to the method's own tokens.
    alone = recipe.method.virtual_positions and getattr(config.get_text_config(), "sliding_window", None)
    template = load_template(plan.tokenizer, recipe.data.chat_template) if chat else None

    quiet = not sys.stderr.isatty()

    class Loaded(HFLM):  # type: ignore[misc]
        cut = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
            self.cut += sum(len(before or ()) + len(answer) > self.max_length + 1 for _, before, answer in requests)
            return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, **kwargs)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=quiet)

        def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> Any:
            room = kwargs.get("left_truncate_len") or self.max_length
            self.cut += sum(len(self.tok_encode(text)) > room for text in strings)
            return super().tok_batch_encode(strings, *args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            return super()._model_generate(*args, **{"eos_token_id": ends or None, **kwargs})

    with _keeps_its_weights(model):
        return Loaded(
            model,
            backend="causal",
            tokenizer=plan.tokenizer,
            max_length=None if context is None else context - recipe.method.virtual_positions,
            batch_size=1 if alone else recipe.evaluation.batch_size,
            mixed_precision_dtype=None if dtype == torch.float32 else dtype,
            softmax_dtype=torch.float32,
            add_bos_token=False if chat else None,  # the template writes it
            chat_template_args={} if template is None else {"chat_template": template.source},
        )


@contextmanager
def _keeps_its_weights(model: Any) -> Iterator[None]:
    """The harness ties the weights of whatever it is given: not those of a model that was loaded and trained."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights


def _of_tasks(tasks: Tasks, found: Mapping[str, Any]) -> Iterator[Score]:
    for name, task in tasks.tasks.items():
        for key, value in found["results"][name].items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            raw = [sample[metric] for sample in found["samples"][name] if sample["filter"] == filtered]
            items = _numbers(raw, float(value))
            yield Score(
                task=name,
                metric=_metric(metric, filtered),
                n=len(raw),
                value=float(value),
                items=items,
                draws=None if items is not None else _draws(raw, task.aggregation().get(metric)),
                lower_is_better=task.higher_is_better().get(metric) is False,
                shown=name in tasks.shown,
                shots=int(found["n-shot"].get(name) or 0),
                version=str(found["versions"].get(name)),
            )


def _of_groups(tasks: Tasks, found: Mapping[str, Any], of_tasks: Sequence[Score]) -> Iterator[Score]:
    """Scores of groups; where one is the mean of all items, the items are known."""
    of_task = {(score.task, score.metric): score for score in of_tasks}
    for name in (name for name in tasks.groups if name in found.get("groups", {})):
        members = [task.task_name for task in tasks.groups[name].get_all_tasks()]
        for key, value in found["groups"][name].items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            parts = [of_task.get((member, _metric(metric, filtered))) for member in members]
            known = [part for part in parts if part is not None]
            items = [item for part in known for item in part.items or ()]
            whole = all(part.items is not None for part in known)
            yield Score(
                task=name,
                metric=_metric(metric, filtered),
                n=sum(part.n for part in known),
                value=float(value),
                items=_numbers(items, float(value)) if whole else None,
                draws=None,
                lower_is_better=any(part.lower_is_better for part in known),
                shown=name in tasks.shown,
                shots=max((part.shots for part in known), default=0),
                version=str(found["versions"].get(name)),
            )


def _metric(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _numbers(raw: Sequence[Any], mean: float) -> list[float] | None:
    """What the items scored, where the score is the mean of that."""
    if not raw or not all(isinstance(one, int | float | np.number | np.bool_) for one in raw):
        return None
    items = [float(one) for one in raw]
    return items if math.isclose(sum(items) / len(items), mean, rel_tol=1e-6, abs_tol=1e-9) else None


def _draws(raw: Sequence[Any], aggregate: Any) -> list[float] | None:
    """A score on draws of its items with replacement; which, depends on their number alone."""
    if aggregate is None or len(raw) < 2:
        return None
    generator = np.random.default_rng(len(raw))
    drawn = generator.integers(len(raw), size=(RESAMPLES, len(raw)))
    try:
        return [float(aggregate([raw[i] for i in row])) for row in drawn]
    except Exception:  # an aggregate that some draws have no value of
        return None


def _items(samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "item": sample["doc_id"],
            **({"filter": sample["filter"]} if sample["filter"] != "none" else {}),
            "prompt": str(sample["arguments"][0][0]),
            "target": sample["target"],
            "answer": sample["filtered_resps"],
            "scores": {metric: sample[metric] for metric in sample["metrics"]},
        }
        for name, found in samples.items()
        for sample in sorted(found, key=lambda sample: (sample["filter"], sample["doc_id"]))
    ]


def _digest(samples: Mapping[str, Any]) -> str:
    fields = ("filter", "doc_id", "arguments", "target")
    asked = [[name, *(one[field] for field in fields)] for name, found in samples.items() for one in found]
    return hashlib.sha256(json.dumps(asked, default=_plain).encode()).hexdigest()


def compared(scores: Mapping[str, Sequence[Score]]) -> list[dict[str, Any]]:
    """A row for each score: of the base, of the tuned model, and where both are known tuned less base.

    Args:
        scores: Of ``base``, ``tuned`` or both, of the same tasks.

    Returns:
        Rows with ``task``, ``metric``, ``n``, a value for each model, ``difference`` as ``[d, lo, hi]`` at 95 %, paired
        by item (its ends None where they cannot be known), and what ``Score`` says of the task.
    """
    rows = []
    for ours in zip(*scores.values(), strict=True):
        of = dict(zip(scores, ours, strict=True))
        first = ours[0]
        rows.append(
            {
                "task": first.task,
                "metric": first.metric,
                "n": first.n,
                **{who: _finite(one.value) for who, one in of.items()},
                **({"difference": _difference(of["base"], of["tuned"])} if len(of) == 2 else {}),
                "share": all(one.items is not None and 0 <= min(one.items) <= max(one.items) <= 1 for one in ours),
                "lower_is_better": first.lower_is_better,
                "shown": first.shown,
                "shots": first.shots,
                "version": first.version,
            }
        )
    return rows


def _difference(base: Score, tuned: Score) -> list[float | None]:
    d = tuned.value - base.value
    if base.items is not None and tuned.items is not None and base.n > 1:
        change = np.array(tuned.items) - np.array(base.items)
        scale = max(1.0, float(np.abs(change).max()))
        found = difference(change[None] / scale)
        return [d, found.lo * scale, found.hi * scale]
    if base.draws is not None and tuned.draws is not None:
        half = 1.96 * float(np.std(np.array(tuned.draws) - np.array(base.draws), ddof=1))
        if math.isfinite(half):
            return [d, d - half, d + half]
    return [_finite(d), None, None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tasks_result(tasks: Tasks, runs: Mapping[str, TaskRun]) -> dict[str, Any]:
    """What ``eval.json`` keeps of tasks.

    Args:
        tasks: The tasks.
        runs: Of ``base``, and of ``tuned`` where there is a run.
    """
    one = next(iter(runs.values()))
    return {
        "harness": version_of("lm_eval"),
        "limit": tasks.limit,
        "shots": tasks.shots,
        "chat_template": one.chat,
        "context": one.context,
        "prompts_cut": one.cut,
        "rows": compared({who: run.scores for who, run in runs.items()}),
    }


def item_lines(runs: Mapping[str, TaskRun]) -> Iterator[str]:
    """A line of JSON for each item, with the answer and the scores of each model."""
    for items in zip(*(run.items for run in runs.values()), strict=True):
        given = {key: value for key, value in items[0].items() if key not in ("answer", "scores")}
        given |= {
            who: {"answer": item["answer"], "scores": item["scores"]} for who, item in zip(runs, items, strict=True)
        }
        yield json.dumps(given, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """What numpy and the harness have in place of JSON's values."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
