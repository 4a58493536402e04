"""Lean layers change no loss and no gradient, keep less, and are put in only where they compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftune.data.batches import Batch, collate
from ftune.data.tokenize import Example
from ftune.methods import METHODS, Context
from ftune.plan.lean import PER_DOCUMENT, make_lean
from ftune.run.objective import Objective


def context(dtype: torch.dtype = torch.float32) -> Context:
    return Context(
        total_steps=10, seed=0, dtype=dtype, device=torch.device("cpu"), tokenizer=tiny.tokenizer(), max_length=512,
        row_lengths=[387],
    )  # fmt: skip


def adapted(name: str) -> Any:
    method = METHODS[name](**tiny.SETTINGS.get(name, {}))
    base: Any = tiny.model()
    base.set_attn_implementation(method.attention("sdpa"))
    model = method.adapt(base.requires_grad_(False).train(), context())
    torch.manual_seed(1)
    with torch.no_grad():  # adapters that begin at zero would hide what goes wrong behind them
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.train(), method


def batch(packable: bool) -> Batch:
    torch.manual_seed(2)
    documents = []
    for row, length in enumerate((50, 90, 30, 7, 210)):
        ids = torch.randint(3, 250, (length,)).numpy().astype("int32")
        labels = ids.copy()
        labels[: length // 2] = -100
        documents.append(Example(ids, labels, row))
    return collate([documents] if packable else [[document] for document in documents], 0)


def plain_loss(model: Any, given: Batch) -> Tensor:
    """All logits of the model, as it came from transformers and PEFT."""
    positions = {} if given.position_ids is None else {"position_ids": given.position_ids}
    logits = model(input_ids=given.input_ids, use_cache=False, **positions).logits
    logits = logits[:, -given.labels.shape[1] :]  # without virtual tokens
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), given.labels[:, 1:].flatten(), reduction="sum")


def gradients(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_a_lean_model_has_the_loss_and_the_gradients_of_the_plain_one(name: str) -> None:
    plain, method = adapted(name)
    given = batch(method.packable)
    expected, reference = gradients(plain, plain_loss(plain, given))
    lean, _ = adapted(name)
    found = make_lean(lean, method, context(), "sdpa")
    assert found["norms"] >= 5
    assert found["gates"] == found["rotary"] == 2
    assert found["attention"] == (PER_DOCUMENT if name != "longlora" else "sdpa")
    if name in ("lora", "qlora", "dora", "adalora"):
        assert found["low_rank"] == 14
    loss, grads = gradients(lean, Objective(lean, torch.float32)(given))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == reference.keys()
    for key, grad in grads.items():
        assert (grad - reference[key]).norm() <= 1e-5 * reference[key].norm(), key


def test_an_attention_that_computes_otherwise_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.methods import documents

    model, method = adapted("lora")
    monkeypatch.setattr(documents, "_borders", lambda sees, length, device: torch.tensor([0, length]))
    assert make_lean(model, method, context(), "sdpa")["attention"] == "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_a_norm_and_a_gate_that_compute_otherwise_stay() -> None:
    model, method = adapted("lora")
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = type("OddRMSNorm", (type(module),), {"forward": lambda self, x: 2 * x})
        if type(module).__name__ == "LlamaMLP":
            module.__class__ = type(
                "OddMLP", (type(module),), {"forward": lambda self, x: self.down_proj(self.gate_proj(x))}
            )
    found = make_lean(model, method, context(), "sdpa")
    assert (found["norms"], found["gates"]) == (0, 0)


def test_positions_that_are_turned_otherwise_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return q * cos.unsqueeze(unsqueeze_dim), k

    usual = modeling_llama.apply_rotary_pos_emb
    model, method = adapted("lora")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", half)
        assert make_lean(model, method, context(), "sdpa")["rotary"] == 0
    assert make_lean(model, method, context(), "sdpa")["rotary"] == 2
    assert modeling_llama.apply_rotary_pos_emb is usual


def test_a_part_of_the_width_is_turned_by_the_models_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.methods import _lean

    monkeypatch.setattr(_lean, "_rotary", None)
    forward = _lean._rotating(tiny.model().model.layers[0].self_attn.forward.__func__)
    turn = forward.__globals__["apply_rotary_pos_emb"]
    q, cos = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8)
    for arguments, kwargs in (((q, q, cos, cos), {"unsqueeze_dim": 1}), ((q, q, cos[0], cos[0]), {"unsqueeze_dim": 0})):
        assert turn(*arguments, **kwargs)[0].shape == q.shape
    with pytest.raises(RuntimeError, match="size of tensor"):  # the model's own words
        turn(q, q, cos[..., :4], cos[..., :4])


def test_what_stands_below_the_first_trained_layer_keeps_nothing() -> None:
    def kept(layers: str) -> int:
        method = METHODS["lora"](rank=4, target_modules=rf".*layers\.{layers}\..*_proj")
        model = method.adapt(tiny.model().requires_grad_(False).train(), context())
        make_lean(model, method, context(), "sdpa")
        found: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = Objective(model, torch.float32)(batch(True))
        del loss
        return sum(size for at, size in found.items() if at not in own)

    both, last = kept("[01]"), kept("1")
    assert last < 0.6 * both


@pytest.mark.parametrize("window", [None, 20])
def test_a_window_shorter_than_a_document_gets_a_mask(window: int | None) -> None:
    """transformers says what a query may see; borders alone would forget the window."""
    from transformers import AutoModelForCausalLM, MistralConfig

    from ftune.methods import documents

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    given = batch(True)
    inputs = {"input_ids": given.input_ids, "position_ids": given.position_ids, "use_cache": False}
    with torch.no_grad():
        before = model(**inputs).logits
        model.set_attn_implementation(documents.register())
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)


def test_a_gate_with_dropout_and_a_norm_with_a_second_input_stay() -> None:
    class DropoutMLP:
        residual_dropout = 0.1

        def forward(self: Any, x: Tensor) -> Tensor:
            out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return F.dropout(out, self.residual_dropout, self.training)

    class GatedRMSNorm:
        def forward(self: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
            normed: Tensor = self.weight * F.rms_norm(x, x.shape[-1:], eps=self.variance_epsilon)
            return normed if gate is None else normed * F.silu(gate)

    model, method = adapted("lora")
    for module in model.modules():
        for name, odd in (("LlamaMLP", DropoutMLP), ("LlamaRMSNorm", GatedRMSNorm)):
            if type(module).__name__ == name:
                module.__class__ = type(odd.__name__, (odd, type(module)), {})
                if odd is DropoutMLP:
                    module.residual_dropout = 0.1
    found = make_lean(model, method, context(), "sdpa")
    assert (found["norms"], found["gates"]) == (0, 0)


def test_a_norm_that_rounds_last_keeps_its_dtype_under_fp32_gains() -> None:
    from ftune.methods._lean import lean_base

    class LateRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.full((8,), 1.3)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * F.rms_norm(x.float(), (8,), eps=self.eps)).to(x.dtype)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = LateRMSNorm()

        def get_output_embeddings(self) -> None:
            return None

    model = Model()
    lean_base(model, torch.bfloat16)
    assert model.norm(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
