"""How long a run will take, said after its first updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftune.run.events import EvalEnd, Event, Forecast, RunStart, Saved, StepEnd

if TYPE_CHECKING:
    from ftune.plan.resolve import Plan

__all__ = ["Forecaster", "predict_seconds"]

UPDATES = 10  # measured before the run says how long it will take
FORWARD_SHARE = 0.5  # of an update's time for a token, where the base is frozen: what an evaluation is taken to cost


def predict_seconds(
    updates: Sequence[tuple[int, float]], *, tokens_ahead: float, other_spent: float = 0.0, other_ahead: float = 0.0
) -> float:
    """Predict the seconds of a whole run from its first updates.

    Args:
        updates: Tokens and seconds of each update so far. The pace is that of the second half: in the first ones
            libraries load, kernels are compiled, CUDA graphs are recorded.
        tokens_ahead: Tokens of the updates that are still to be made.
        other_spent: Seconds of evaluations and checkpoints so far.
        other_ahead: Seconds of those to come.

    Raises:
        ValueError: There are no updates.
    """
    if not updates:
        raise ValueError("no update to measure")
    paced = updates[len(updates) // 2 :]
    pace = sum(seconds for _, seconds in paced) / sum(tokens for tokens, _ in paced)
    return sum(seconds for _, seconds in updates) + tokens_ahead * pace + other_spent + other_ahead


@dataclass
class Forecaster:
    """Watches the events of this process and says once how long its part of the run will take.

    Attributes:
        tokens_per_update: Mean over the training rows.
        eval_tokens: Tokens of one evaluation.
        eval_steps: Updates after which the held-out loss is measured.
        save_steps: Updates after which a checkpoint is saved.
        predicted: Seconds in all, once they are foretold.
    """

    tokens_per_update: float
    eval_tokens: int
    eval_steps: Sequence[int]
    save_steps: Sequence[int]
    predicted: float | None = None
    _total: int = 0
    _after: int = 0
    _updates: list[tuple[int, float]] = field(default_factory=list)
    _evals: list[float] = field(default_factory=list)
    _saves: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan) -> Forecaster:
        """The forecaster of a plan."""
        recipe, total = plan.recipe, plan.total_steps

        def due(every: int | None) -> list[int]:
            return sorted({*(range(every, total + 1, every) if every else ()), total})

        return cls(
            tokens_per_update=sum(plan.row_lengths) / plan.steps_per_epoch,
            eval_tokens=plan.splits.eval.stats.tokens if plan.splits.eval and plan.eval_rows else 0,
            eval_steps=due(recipe.evaluation.every_steps) if plan.eval_rows else (),
            save_steps=due(recipe.checkpoint.every_steps),
        )

    @property
    def spent(self) -> float:
        """Seconds of updates, evaluations and checkpoints so far."""
        return sum(seconds for _, seconds in self._updates) + sum(self._evals) + sum(self._saves)

    def after(self, event: Event) -> Forecast | None:
        """Take an event; the forecast, once enough updates were made and some are left."""
        if isinstance(event, RunStart):
            self._total = event.total_steps
            mine = event.total_steps - event.step
            self._after = event.step + min(UPDATES, max(2, mine // 3))
        elif isinstance(event, EvalEnd):
            self._evals.append(event.seconds)
        elif isinstance(event, Saved):
            self._saves.append(event.seconds)
        elif isinstance(event, StepEnd):
            self._updates.append((event.tokens, event.seconds))
            if event.step == self._after < self._total:
                self.predicted = self._predict(event.step)
                return Forecast(event.step, self.predicted, len(self._updates))
        return None

    def _predict(self, step: int) -> float:
        tokens = self.tokens_per_update * (self._total - step)
        without = predict_seconds(self._updates, tokens_ahead=tokens)
        pace = (without - sum(seconds for _, seconds in self._updates)) / tokens
        one_eval = _mean(self._evals, pace * FORWARD_SHARE * self.eval_tokens)
        # What is due after this very update has not been done yet.
        evals = sum(due >= step for due in self.eval_steps)
        saves = sum(due >= step for due in self.save_steps)
        return predict_seconds(
            self._updates,
            tokens_ahead=tokens,
            other_spent=sum(self._evals) + sum(self._saves),
            other_ahead=evals * one_eval + saves * _mean(self._saves, 0.0),
        )


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
