"""The objective taps the head: the same loss as the model's own, whatever stands behind the head."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftune.data.batches import collate
from ftune.data.tokenize import Example
from ftune.methods import METHODS
from ftune.methods._lean import lean_base
from ftune.ops.cross_entropy import linear_cross_entropy
from ftune.run.head import AfterHead, measure_after_head
from ftune.run.objective import Objective

CPU = torch.device("cpu")


class Behind(nn.Module):
    """A model that does something to its logits."""

    def __init__(self, model: Any, what: Any) -> None:
        super().__init__()
        self.model, self.what, self.config = model, what, model.config

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()
        return head

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        out.logits = self.what(out.logits)
        return out


def batch() -> Any:
    ids = tiny.batch(rows=2, length=20)["input_ids"].numpy().astype("int32")
    rows = []
    for row, sequence in enumerate(ids):
        labels = sequence.copy()
        labels[: 5 + 6 * row] = -100
        rows.append([Example(sequence, labels, row)])
    return collate(rows, 0)


def own_loss(model: Any, given: Any) -> Tensor:
    logits = model(input_ids=given.input_ids, use_cache=False).logits[:, -given.input_ids.shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), given.labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (lambda x: x, AfterHead(259)),
        (lambda x: x / 8, AfterHead(259, 0.125)),
        (lambda x: 30 * torch.tanh(x / 30), AfterHead(259, 1.0, 30.0)),
        (lambda x: 20 * torch.tanh(x * 0.5 / 20), AfterHead(259, 0.5, 20.0)),
        (lambda x: x - x.mean(-1, keepdim=True), None),
        (torch.relu, None),
    ],
)
def test_what_stands_behind_the_head_is_measured(what: Any, expected: AfterHead | None) -> None:
    model = Behind(tiny.model().train(), what)
    found = measure_after_head(model, torch.float32, CPU)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.vocab, found.scale) == (expected.vocab, pytest.approx(expected.scale))
        assert found.softcap == (None if expected.softcap is None else pytest.approx(expected.softcap))
    assert model.training
    mine, given = Objective(model, torch.float32)(batch()), list(model.parameters())
    theirs = own_loss(model, batch())
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    pairs = zip(torch.autograd.grad(mine, given), torch.autograd.grad(theirs, given), strict=True)
    for actual, reference in pairs:
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    base: Any = tiny.model(tie_word_embeddings=tied)
    model: Any = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    mine, theirs = Objective(model, torch.float32)(batch()), own_loss(model, batch())
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    for actual, reference in zip(torch.autograd.grad(mine, trained), torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)


def test_the_head_is_itself_again_afterwards() -> None:
    model: Any = tiny.model().train()
    given = batch()
    before = own_loss(model, given)
    Objective(model, torch.float32)(given)
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(own_loss(model, given), before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_no_method_makes_whole_logits(name: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny.method(name)
    model = method.adapt(tiny.model(tie_word_embeddings=tied), tiny.context(row_lengths=[20] * 8))
    given = batch()
    expected = own_loss(model.eval(), given)
    method.lean(model, tiny.context())
    lean_base(model, torch.float32)
    objective = Objective(model, torch.float32)
    heads = []

    def watching(*arguments: Any, **named: Any) -> Tensor:
        heads.append(arguments[1])
        return linear_cross_entropy(*arguments, **named)

    monkeypatch.setattr("ftune.run.objective.linear_cross_entropy", watching)
    loss = objective(given)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (weight,) = heads
    assert weight.shape == (259, tiny.config().hidden_size)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A tied head that trains is the embedding that trains.
    assert any(weight is parameter for parameter in trains) == (
        method.artifact == "model" or (method.trains_head and tied)
    )
