"""What the DeepSpeed engine makes of DeepSpeed's answers, without DeepSpeed and in one process."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ftune.methods import METHODS
from ftune.plan.engine import EngineChoice, EngineName
from ftune.run.engines.deepspeed import DeepSpeed


def _engine(stage: int, *, main: bool = True, norms: tuple[float, ...] = ()) -> DeepSpeed:
    accelerator: Any = SimpleNamespace(num_processes=2, is_main_process=main)
    engine = DeepSpeed(EngineChoice(name=cast(EngineName, f"deepspeed-zero{stage}")), accelerator)
    groups = list(range(len(norms)))
    zero = SimpleNamespace(
        averaged_gradients=groups,
        params_in_partition=groups,
        fp16_groups=groups,
        get_grad_norm_direct=lambda gradients, group: torch.tensor(norms[group]),
    )
    engine._engine = SimpleNamespace(optimizer=zero, destroy=lambda: None)
    return engine


@pytest.mark.parametrize("stage", [2, 3])
def test_a_norm_that_is_not_finite_is_none_of_the_sum(stage: int) -> None:
    def norm(*norms: float) -> float:
        return _engine(stage, norms=norms).gradient_norm(METHODS["full"](), [], cast(Any, None))

    assert norm(3.0, 4.0) == 5.0
    # DeepSpeed's sign for one that is not finite
    assert math.isnan(norm(-1.0))
    assert math.isnan(norm(3.0, -1.0))


@pytest.mark.parametrize("main", [True, False])
def test_every_process_asks_for_a_tied_weight_once(main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def whole(parameter: torch.Tensor) -> torch.Tensor:
        asked.append(parameter)
        return parameter

    monkeypatch.setattr("ftune.run.engines.base.whole", whole)
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    embedding, head = cast(Any, model["embedding"]), cast(Any, model["head"])
    before = head.weight = embedding.weight
    _engine(3, main=main).make_whole(model)
    assert len(asked) == 1, "one process alone in an exchange waits for ever"
    assert head.weight is embedding.weight
    assert (head.weight is before) == (not main)
