"""What prompt and prefix tuning share: where they start, what is in the loss, answers in batches, PEFT's files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import tiny_config
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.generate import greedy
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.data.batches import collate
from ftune.data.tokenize import Example
from ftune.errors import ModelError, RecipeError
from ftune.methods import Method, OptimizerSpec
from ftune.plan.shapes import read_shape
from ftune.recipe import require
from ftune.run.objective import Objective, autocast

BOTH = pytest.mark.parametrize("name", ["prompt", "prefix"])
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2"]
LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
V = 6


def virtual(name: str, **settings: Any) -> Method:
    return tiny.method(name, **{"virtual_tokens": V} | settings)


def architecture(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(name, vocab_size=len(tiny.tokenizer()), **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model.eval()


def adapted(method: Method, base: nn.Module | None = None, **context: Any) -> nn.Module:
    return method.adapt((base or tiny.model()).requires_grad_(False), tiny.context(**context))


def start_ids(method: Method, base: nn.Module, **context: Any) -> Tensor:
    embedding = base.get_input_embeddings()  # type: ignore[operator]
    return method.start_ids(embedding, tiny.context(**context))  # type: ignore[attr-defined, no-any-return]


def in_front(ids: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """The inputs behind real tokens."""
    return {"input_ids": torch.cat([ids.expand(len(inputs), -1), inputs], dim=1)}


@pytest.mark.parametrize(("name", "count"), [("prompt", 81_920), ("prefix", 5_242_880)])
def test_parameters_on_llama_2_7b(name: str, count: int) -> None:
    assert tiny.method(name).trainable_parameters(read_shape(LLAMA_7B)) == count


@BOTH
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_starts_as_the_base_behind_real_tokens(name: str, kind: str) -> None:
    """The independent reference: virtual tokens that were not trained yet compute as the tokens they start as."""
    method, inputs = virtual(name), tiny.batch()
    with torch.no_grad():
        ids = start_ids(method, architecture(kind))
        whole = architecture(kind)(**in_front(ids, inputs["input_ids"]), use_cache=False).logits[:, V:]
    model = adapted(method, architecture(kind))
    assert (tiny.logits(model, inputs) - whole).abs().max() <= 1e-4 * whole.abs().max()
    assert (tiny.logits(architecture(kind), inputs) - whole).abs().max() > 0.1


@BOTH
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_it_starts_as_the_base_behind_real_tokens_in_short_windows(name: str, kind: str) -> None:
    method, inputs = virtual(name), tiny.batch(length=30)
    base = architecture(kind, sliding_window=V + 4)
    with torch.no_grad():
        behind = in_front(start_ids(method, base), inputs["input_ids"])
        whole = base(**behind, use_cache=False).logits[:, V:]
        wide = architecture(kind)(**behind, use_cache=False).logits[:, V:]
    actual = tiny.logits(adapted(method, base), inputs)
    assert (actual - whole).abs().max() <= 1e-4 * whole.abs().max()
    assert (actual - wide).abs().max() > 0.1, "the window has no effect"


@BOTH
def test_the_text_is_where_it_starts(name: str) -> None:
    text = "Say so"
    method = virtual(name, virtual_tokens=8, init="text", init_text=text)
    ids = tiny.tokenizer()(text).input_ids
    assert len(ids) == 6
    inputs = tiny.batch()
    with torch.no_grad():
        repeated = torch.tensor([*ids, *ids[:2]])
        whole = tiny.model()(**in_front(repeated, inputs["input_ids"]), use_cache=False).logits[:, 8:]
    actual = tiny.logits(adapted(method, tokenizer=tiny.tokenizer()), inputs)
    assert (actual - whole).abs().max() <= 1e-4


@BOTH
def test_it_starts_as_tokens_that_text_has(name: str) -> None:
    """Special tokens, and rows of zeros such as gemma's padding, are no sensible start."""
    tokenizer, base = tiny.tokenizer(), tiny.model()
    weight = base.get_input_embeddings().weight  # type: ignore[operator]
    with torch.no_grad():
        weight[100:200] = 0
    drawn = start_ids(virtual(name, virtual_tokens=2000), base, tokenizer=tokenizer)
    every = set(range(len(tokenizer))) - set(range(100, 200)) - {tokenizer.pad_token_id}  # padding's row is zero, too
    assert len(tokenizer.all_special_ids) == 3
    assert set(drawn.tolist()) == every - set(tokenizer.all_special_ids)
    assert set(start_ids(virtual(name, virtual_tokens=2000), base).tolist()) == every


@BOTH
def test_a_row_of_zeros_at_the_start_does_not_hide_how_far_they_moved(name: str) -> None:
    base = tiny.model()
    with torch.no_grad():
        base.get_input_embeddings().weight[tiny.tokenizer()("S").input_ids[0]] = 0  # type: ignore[operator]
    method = virtual(name, init="text", init_text="Say so")
    model = adapted(method, base, tokenizer=tiny.tokenizer())
    tiny.disturb(model)
    vitals = method.vitals(model, method.optimizer(model, OptimizerSpec()))
    assert 0.05 < vitals["moved"] < 0.2


def examples() -> list[list[Example]]:
    random = np.random.default_rng(0)
    rows = []
    for row, length in enumerate((5, 9, 3)):
        ids = random.integers(3, 200, length).astype(np.int32)
        labels = ids.copy()
        labels[1 : length // 2] = -100  # position 0 has a label, which no token in the row predicts
        rows.append([Example(ids, labels, row)])
    return rows


@BOTH
def test_the_loss_is_over_the_right_positions_and_padding_is_inert(name: str) -> None:
    """Summed by hand, one row after another, unpadded; PEFT's own loss also predicts token 1 from a virtual token."""
    method = virtual(name)
    model = adapted(method).eval()
    tiny.disturb(model)
    expected, count, with_first = 0.0, 0, 0.0
    for [example] in examples():
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :].log_softmax(-1)
        for at in range(1, len(ids)):
            if example.labels[at] != -100:
                expected -= float(logits[at - 1, example.labels[at]])
                count += 1
        labels = torch.from_numpy(example.labels.astype(np.int64))[None]
        with torch.no_grad():
            own = model(input_ids=ids[None], labels=labels, use_cache=False).loss
        with_first += float(own) * (int((labels != -100).sum()) - (name == "prefix"))
    objective = Objective(model, torch.float32)
    for multiple_of in (1, 16):
        batch = collate(examples(), 0, multiple_of=multiple_of)
        assert batch.target_tokens == count
        assert float(objective(batch).detach()) == pytest.approx(expected, rel=1e-5)
        assert float(objective.train()(batch).detach()) == pytest.approx(expected, rel=1e-5)
        objective.eval()
    if name == "prompt":
        assert with_first > expected + 1
    else:
        assert with_first == pytest.approx(expected, rel=1e-5)


def one_after_another(model: nn.Module, prompt: list[int], count: int) -> str:
    """Greedy answers without a cache, without a batch."""
    tokenizer, ids = tiny.tokenizer(), list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    answer: str = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    return answer


@BOTH
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_in_a_batch_are_those_of_one_row_without_a_cache(name: str, kind: str, tmp_path: Path) -> None:
    method, context = virtual(name), tiny.context()
    model = adapted(method, architecture(kind)).eval()
    tiny.disturb(model, 1.0)
    method.save(model, tmp_path, context)
    loaded = copy.deepcopy(method.load(architecture(kind), tmp_path, context).eval())
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer(text).input_ids for text in ("Hi", "A longer prompt", "Which?")]
    expected = [one_after_another(model, prompt, 8) for prompt in prompts]

    def answers(of: Any) -> list[str]:
        found = greedy(of, tokenizer, prompts, dtype=torch.float32, batch_size=3, max_new_tokens=8)
        return [answer.text for answer in found]

    assert answers(model) == expected
    assert answers(loaded) == expected
    plain = [one_after_another(architecture(kind), prompt, 8) for prompt in prompts]
    assert plain != expected
    switch = method.switched_off(loaded)
    assert switch is not None
    with switch:
        assert answers(loaded) == plain
    assert answers(loaded) == expected


@BOTH
@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text"])
def test_in_short_windows_prompts_of_one_length_share_a_batch(name: str, kind: str) -> None:
    model = adapted(virtual(name), architecture(kind, sliding_window=16)).eval()
    tiny.disturb(model, 1.0)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 200, (length,), generator=generator).tolist() for length in (5, 27, 21, 5)]

    def answers(batch_size: int, equal_lengths: bool) -> list[str]:
        found = greedy(
            model,
            tiny.tokenizer(),
            prompts,
            dtype=torch.float32,
            batch_size=batch_size,
            max_new_tokens=8,
            equal_lengths=equal_lengths,
        )
        return [answer.text for answer in found]

    expected = [one_after_another(model, prompt, 8) for prompt in prompts]
    assert answers(1, False) == expected
    assert answers(3, True) == expected
    assert answers(3, False) != expected, "the padding has no effect, and need not be kept away"


@BOTH
def test_answers_of_a_run_in_short_windows_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    architecture("mistral", sliding_window=32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 5, start=100)
    answers = []
    for size in (1, 5):
        spec = {"batch_size": size, "metrics": ["exact_match"], "max_new_tokens": 8}
        recipe = tiny.recipe(tmp_path, name, evaluation=spec, output_dir=str(tmp_path / f"run{size}"))
        train(recipe)
        result = evaluate(find_target(tmp_path / f"run{size}"), base=False)
        answers.append([sample["tuned"] for sample in result["samples"]])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


@pytest.mark.parametrize(("name", "projection"), [("prompt", False), ("prefix", False), ("prefix", True)])
def test_plain_peft_loads_it_with_the_same_logits(name: str, projection: bool, tmp_path: Path) -> None:
    method = virtual(name, **({"projection": True, "encoder_hidden_size": 32} if projection else {}))
    model = adapted(method)
    tiny.disturb(model)
    method.save(model, tmp_path, tiny.context())
    assert (
        tiny.logits(PeftModel.from_pretrained(tiny.model(), str(tmp_path))) - tiny.logits(model)
    ).abs().max() <= 1e-5
    assert (tiny.logits(adapted(method)) - tiny.logits(model)).abs().max() > 1e-2


@BOTH
def test_fp32_virtual_tokens_on_a_bfloat16_base(name: str) -> None:
    method, inputs = virtual(name), tiny.batch()
    model = adapted(method, tiny.model().bfloat16(), dtype=torch.bfloat16)
    exact = tiny.logits(adapted(method))
    with autocast(torch.bfloat16, "cpu"):
        rounded = tiny.logits(model)
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    with autocast(torch.bfloat16, "cpu"):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum(-1).min() > 0 for p in parameters)


@BOTH
def test_vitals_tell_how_far_they_moved(name: str) -> None:
    method = virtual(name)
    model = adapted(method)
    optimizer = method.optimizer(model, OptimizerSpec())
    before = method.vitals(model, optimizer)
    assert before == {"virtual_tokens": V, "moved": 0.0, "moved_min": 0.0}
    assert "where it started" in str(method.not_at_work(before))
    [parameter] = [p for p in model.parameters() if p.requires_grad]
    start = parameter.detach().clone()
    with torch.no_grad():
        parameter[1:] *= 1.5
    after = method.vitals(model, optimizer)
    assert after["moved"] == pytest.approx(float(0.5 * start[1:].norm() / start.norm()), rel=1e-5)
    assert method.not_at_work(after), "one of them did not move"
    with torch.no_grad():
        parameter[0] *= 1.1
    assert method.vitals(model, optimizer)["moved_min"] == pytest.approx(float(0.1 * start[0].norm()), rel=1e-5)
    assert method.not_at_work(method.vitals(model, optimizer)) is None


@BOTH
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"packing": True}}, "`packing: true` cannot work"),
        ({"method": {"init": "text"}}, "needs a text"),
        ({"method": {"init_text": "Say so"}}, "does not read `init_text`"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, name, **changes))


@BOTH
@pytest.mark.parametrize(
    ("changes", "message", "help"),
    [
        ({"data": {"max_length": 500}}, "need 520 positions, and this llama has 512", "max_length: 492"),
        (
            {"method": {"init": "text", "init_text": "Answer with one word.", "virtual_tokens": 7}},
            "`init_text` has 21 tokens",
            "virtual_tokens: 21",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(
    name: str, changes: dict[str, Any], message: str, help: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        train(tiny.recipe(tmp_path, name, **changes))
    assert help in (refused.value.help or "")


@BOTH
def test_the_plan_counts_rows_as_long_as_they_are(name: str) -> None:
    from ftune.memory.estimate import estimate

    settings: dict[str, Any] = {"dtype_bytes": 4, "device_type": "cpu"}
    shape = read_shape(tiny.config())
    short, long = (
        estimate(tiny.request(virtual(name, virtual_tokens=v), shape, length=80 + 20 - v, **settings)) for v in (1, 20)
    )
    assert short.activations == long.activations
    assert math.isclose(long.adapters, 20 * short.adapters)
