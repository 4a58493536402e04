"""LongLoRA: attention in shifted groups inside whole models, trained embeddings and norms, longer contexts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import tiny_config
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import ModelError, RecipeError
from ftune.methods import Method, OptimizerSpec, _context, _s2
from ftune.methods.longlora import LongLora
from ftune.plan.base_model import load_base
from ftune.plan.recompute import enable_checkpointing
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.plan.summary import summary_of
from ftune.recipe import require
from ftune.recipe.schema import ModelSpec
from ftune.run.objective import autocast

GROUP = 8
LENGTH = 36
DOCUMENTS = (11, 9, 16)
ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2"]


def load(method: Method, where: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(ModelSpec(id=str(where)), method, dtype, torch.device("cpu"))


def adapted(where: Path, **settings: Any) -> Any:
    method = tiny.method("longlora", **settings)
    return method.adapt(load(method, where), tiny.context())


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return tiny.batch(rows, length)["input_ids"] % 120


def training_logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    model.train()
    return model(input_ids=ids, use_cache=False, **inputs).logits


# --- attention -------------------------------------------------------------------------------------------


def dense_attention(documents: torch.Tensor, real: torch.Tensor) -> Callable[..., Any]:
    """Attention of transformers' form by a dense mask for every head, built from the definition alone.

    documents, real: (B, L), the number of each token's document, and whether it is no padding.
    """

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
        rows, heads, length, dim = query.shape
        repeats = heads // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        place = torch.arange(length)
        seen = (place[:, None] >= place[None]) & (documents[:, :, None] == documents[:, None, :]) & real[:, None, :]
        window = kwargs.get("sliding_window")
        if window is not None:
            seen = seen & (place[:, None] - place[None] < window)
        allowed = seen[:, None].repeat(1, heads, 1, 1)
        for head in range(heads):
            group = (place + (GROUP // 2 if head >= heads // 2 else 0)) // GROUP
            allowed[:, head] &= group[:, None] == group[None]
        scores = (query @ key.transpose(2, 3) * (scaling or dim**-0.5)).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1).nan_to_num() @ value).transpose(1, 2), None

    return forward


def twins(architecture: str, documents: torch.Tensor, real: torch.Tensor) -> tuple[Any, Any]:
    """One tiny model with S2-Attn and one with the dense reference, with the same weights, both training."""
    config: dict[str, Any] = {
        "mistral": {"sliding_window": 6},
        "gemma3_text": {
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "gpt2": {"embd_pdrop": 0.0},
    }.get(architecture, {})
    _s2.register()
    ALL_ATTENTION_FUNCTIONS.register("dense_reference", dense_attention(documents, real))
    models = []
    for name in (_s2.NAME, "dense_reference"):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(tiny_config(architecture, **config), attn_implementation=name)
        models.append(made.float().train())
    with torch.no_grad():
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            mine.mul_(3 if mine.ndim > 1 else 1)
            theirs.copy_(mine)
    assert _s2.mark(models[0], GROUP) == 3
    return models[0], models[1]


@pytest.mark.parametrize("rows_of", ["one document", "packed", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_training_a_model_equals_the_dense_reference(architecture: str, rows_of: str) -> None:
    documents, real = torch.zeros(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)
    inputs: dict[str, Any] = {}
    if rows_of == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].repeat(2, 1)
        documents = (inputs["position_ids"] == 0).cumsum(1)
    if rows_of == "padded":
        real[1, 13:] = False
        inputs["attention_mask"] = real.long()
    mine, reference = twins(architecture, documents, real)
    ids = tokens()
    actual, expected = training_logits(mine, ids, **inputs), training_logits(reference, ids, **inputs)
    assert (actual - expected)[real].abs().max() <= 1e-5
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * real[..., None]
    for logits in (actual, expected):
        (logits * pull).sum().backward()
    for (name, a), b in zip(mine.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm().clamp_min(1e-2), name
    assert all(groups.shifted == 2 for groups in _s2.groups_of(mine))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_training_no_token_sees_a_later_one(architecture: str) -> None:
    everywhere = torch.zeros(1, LENGTH), torch.ones(1, LENGTH, dtype=torch.bool)
    mine, _ = twins(architecture, *everywhere)
    ids = tokens(1)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % 120
    before, after = training_logits(mine, ids), training_logits(mine, other)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def test_in_training_packed_documents_do_not_see_each_other(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base, group_size=GROUP)
    places = torch.cat([torch.arange(20), torch.arange(16)])[None]
    ids = tokens(1)
    other = ids.clone()
    other[0, :20] = (ids[0, :20] + 1) % 120

    def change() -> float:
        logits = [training_logits(model, rows, position_ids=places)[:, 20:] for rows in (ids, other)]
        return float((logits[0] - logits[1]).detach().abs().max())

    assert change() == 0.0
    # What the mask function is registered for: without it transformers gives attention no mask.
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, _s2.NAME)
    assert change() > 0.1


def test_in_evaluation_it_is_sdpa_exactly_with_and_without_a_cache(base: Path) -> None:
    model = load(tiny.method("longlora"), base)
    _s2.mark(model, GROUP)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    inputs = {"input_ids": tokens()}
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(plain, inputs))
    assert not torch.equal(training_logits(model, tokens()), tiny.logits(plain, inputs))
    model.eval()
    answers = [m.generate(tokens(1), max_new_tokens=8, do_sample=False, attention_mask=torch.ones(1, LENGTH))
               for m in (model, plain)]  # fmt: skip
    assert torch.equal(*answers)


def test_checkpointing_gives_the_same_gradients_and_counts_the_recomputation(base: Path) -> None:
    gradients, passes = [], []
    for checkpointing in (False, True):
        model = adapted(base, group_size=GROUP)
        tiny.disturb(model)
        if checkpointing:
            enable_checkpointing(model)
        training_logits(model, tokens()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        passes.append([groups.shifted for groups in _s2.groups_of(model)])
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())
    assert passes == [[2, 2], [4, 4]]


def test_attention_is_computed_in_the_dtype_of_autocast(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.ops import s2_attention

    model = adapted(base, group_size=GROUP)
    dtypes, attend = [], s2_attention.s2_attention

    def watched(*states: Any, **settings: Any) -> torch.Tensor:
        dtypes.extend(x.dtype for x in states[:3])
        return attend(*states, **settings)

    monkeypatch.setattr(s2_attention, "s2_attention", watched)
    # The trained embedding is fp32, and so are the positions' cosines.
    with torch.autocast("cpu", torch.bfloat16):
        training_logits(model, tokens())
    assert set(dtypes) == {torch.bfloat16}


def test_the_group_is_a_quarter_of_the_longest_row_unless_given(base: Path) -> None:
    method = LongLora()
    for length, size in ((512, 128), (100, 24), (8, 2)):
        model = method.adapt(load(method, base), tiny.context(max_length=length))
        assert {groups.size for groups in _s2.groups_of(model)} == {size}


# --- embeddings and norms --------------------------------------------------------------------------------


def test_trains_the_papers_parameters() -> None:
    shape = read_shape(LlamaConfig())
    assert shape.parameters == 6_738_415_616
    assert LongLora().trainable_parameters(shape) == 139_726_848
    assert LongLora(train_embeddings=False, train_norms=False).trainable_parameters(shape) == 8_388_608


@pytest.mark.parametrize("quantization", [None, {}])
def test_tied_embeddings_stay_tied_through_save_load_merge_and_reload(
    quantization: Any, tied: Path, tmp_path: Path
) -> None:
    method, context = tiny.method("longlora", quantization=quantization), tiny.context()
    model = method.adapt(load(method, tied), context)
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)

    again = method.load(load(method, tied), tmp_path, context)
    assert torch.equal(tiny.logits(again), expected)
    merged: Any = method.merge(again, context)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    bound = 1e-4 if quantization is not None else 1e-5
    assert (tiny.logits(merged) - expected).abs().max() <= bound

    merged.save_pretrained(tmp_path / "merged")
    assert "s2" not in (tmp_path / "merged/config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert repr(reloaded.lm_head) == repr(merged.lm_head)
    assert (tiny.logits(reloaded) - expected).abs().max() <= bound


@pytest.mark.parametrize("head", ["tied", "of its own"])
def test_peft_alone_loads_embeddings_and_norms_with_the_adapter(
    head: str, base: Path, tied: Path, tmp_path: Path
) -> None:
    where, method = (tied if head == "tied" else base), tiny.method("longlora")
    model = method.adapt(load(method, where), tiny.context())
    tiny.disturb(model)
    method.save(model, tmp_path, tiny.context())
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), str(tmp_path))
    assert (tiny.logits(plain) - tiny.logits(model)).abs().max() <= 1e-5
    # Merely unfrozen, embeddings and norms would be lost: then only A and B could be loaded.
    for wrapper in (m for m in plain.modules() if isinstance(m, ModulesToSaveWrapper)):
        wrapper.enable_adapters(False)
    assert (tiny.logits(plain) - tiny.logits(model)).abs().max() > 0.1


def test_switches_take_embeddings_and_norms_out(tied: Path) -> None:
    names = {
        switches: {name for name, p in adapted(tied, **dict(switches)).named_parameters() if p.requires_grad}
        for switches in (
            (("train_embeddings", False), ("train_norms", False)),
            (("train_embeddings", True), ("train_norms", False)),
            (("train_embeddings", False), ("train_norms", True)),
        )
    }
    neither, embeddings, norms = names.values()
    assert all("lora_" in name for name in neither)
    assert {name for name in embeddings if "lora_" not in name} == {
        "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    }
    assert len(norms) - len(neither) == 5


def test_only_a_and_b_decay(tied: Path) -> None:
    method = tiny.method("longlora")
    model = method.adapt(load(method, tied), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }


# --- vitals ----------------------------------------------------------------------------------------------


def test_vitals_say_what_was_shifted_and_moved(tmp_path: Path) -> None:
    vitals = train(tiny.recipe(tmp_path, "longlora"))["vitals"]
    assert vitals["row_passes"] == 8  # four updates of two rows
    assert vitals["row_passes_shifted"] >= 6
    assert vitals["layers_shifted"] == 2
    assert 6 <= vitals["groups_per_row"] <= 8
    assert vitals["heads_shifted"] == 2
    assert vitals["embedding_change"] > 1e-3
    assert vitals["norm_change_min"] > 1e-3
    assert vitals["context_length"] == 512


def test_rows_no_longer_than_a_group_are_refused_by_the_plan(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, "longlora", method={"group_size": 200}, data={"packing": False})
    with pytest.raises(ModelError, match="no row is longer than a group: the longest has 75 tokens, a group 200"):
        resolve(loaded.recipe)
    few = tiny.recipe(tmp_path, "longlora", method={"group_size": 70}, data={"packing": False}).recipe
    assert any("rows are longer than a group of 70 tokens" in line for line in summary_of(resolve(few))["warnings"])


def test_rows_no_longer_than_a_group_are_found_in_the_run(base: Path) -> None:
    method = tiny.method("longlora", group_size=200)
    model = method.adapt(load(method, base), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2))
    for _ in range(2):
        training_logits(model, tokens(2, 60)).square().mean().backward()
        optimizer.step()
    reason = method.not_at_work(method.vitals(model, optimizer))
    assert reason is not None
    assert reason.startswith("no row was longer than a group of 200 tokens")


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_an_extension_that_could_not_be_saved_is_refused(rope: Any) -> None:
    # Phi-3 knows longrope alone: trained, the model could not be merged.
    config = tiny_config("phi3")
    with pytest.raises(ModelError, match=f"phi3 cannot scale its rotary positions by `rope: {rope}`"):
        _context.extend(config, 1024, rope)
    _context.extend(tiny_config("phi3"), 1024, "none")


@pytest.mark.parametrize("still", ["embed_tokens", "norm"])
def test_an_embedding_or_norm_that_stays_is_found(still: str, base: Path) -> None:
    method = tiny.method("longlora")
    model = method.adapt(load(method, base), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2))
    model.get_submodule("base_model.model.model." + still).requires_grad_(False)
    for _ in range(2):
        training_logits(model, tokens(2, 60)).square().mean().backward()
        optimizer.step()
    reason = method.not_at_work(method.vitals(model, optimizer))
    assert reason == ("the embedding is still the base's" if still == "embed_tokens" else "a norm is still the base's")


def test_counts_survive_a_checkpoint(base: Path) -> None:
    method = tiny.method("longlora")
    first, second = (method.adapt(load(method, base), tiny.context()) for _ in range(2))
    training_logits(first, tokens(2, 60))
    training_logits(first, tokens(1, 20))
    method.load_state(second, method.state(first))
    assert _s2.groups_of(second) == _s2.groups_of(first) == [_s2.Groups(32, rows=3, shifted=2, groups=4)] * 2


# --- context ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["linear", "yarn", "none"])
def test_an_extended_context_is_kept_with_the_adapter_and_the_merged_model(rope: str, tmp_path: Path) -> None:
    method = {"context_length": 2048, "rope": rope}
    train(tiny.recipe(tmp_path, "longlora", method=method, training={"max_steps": 2}))
    run = RunDir(tmp_path / "run")
    kept = json.loads((run.root / "adapter/ftune.json").read_text())
    assert kept["max_position_embeddings"] == 2048
    assert (
        kept["rope_parameters"]
        == {
            "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "yarn": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            "none": {"rope_type": "default", "rope_theta": 10000.0},
        }[rope]
    )

    report = merge(run, dtype="float32")
    assert report["merged_vs_adapter"]["max_error"] <= 1e-5
    config = json.loads((run.root / "merged/config.json").read_text())
    assert {name: config[name] for name in kept} == kept
    merged = AutoModelForCausalLM.from_pretrained(run.root / "merged")
    tuned = LongLora(rank=4, group_size=32, context_length=2048, rope=rope)
    model = tuned.load(load(tuned, tmp_path / "base"), run.root / "adapter", tiny.context())
    ids = {"input_ids": tokens(1, 700)}
    assert (tiny.logits(merged, ids) - tiny.logits(model, ids)).abs().max() <= 1e-5

    # On the positions of the untouched base the same adapter is another model.
    plain = LongLora(rank=4, group_size=32)
    with pytest.raises(ModelError, match="other positions"):
        plain.load(load(plain, tmp_path / "base"), run.root / "adapter", tiny.context())
    if rope != "none":
        off = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(run.root / "adapter")
        )
        assert (tiny.logits(off, ids) - tiny.logits(model, ids)).abs().max() > 0.1


def test_linear_scaling_divides_positions(base: Path) -> None:
    scaled, plain = (load(LongLora(context_length=length), base).eval() for length in (2048, None))
    assert torch.equal(scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq / 4)
    ids = tokens(1, 10)
    with torch.no_grad():
        # The mask says that positions so far apart are one document.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": 4 * torch.arange(10)[None]}
        spread = scaled(**inputs, use_cache=False).logits
    assert (spread - tiny.logits(plain, {"input_ids": ids})).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("gpt2", {}, "gpt2 has no rotary positions"),
        ("gemma3_text", {}, "gemma3_text has other rotary positions in each kind of layer"),
        ("llama", {"max_position_embeddings": 2048}, "is 2048 tokens already"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"scales its rotary positions already \(linear\)",
        ),
    ],
)
def test_a_context_that_cannot_be_extended_is_refused(architecture: str, changes: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        LongLora(context_length=2048).configure(tiny_config(architecture, **changes))
    assert refused.value.help == "leave out `context_length`"


def test_rows_beyond_the_context_are_refused_at_planning() -> None:
    shape = read_shape(tiny.config())
    assert not list(LongLora().refusals(shape, tiny.context(max_length=512)))
    [problem] = LongLora().refusals(shape, tiny.context(max_length=600))
    assert problem.message == "rows of 600 tokens, and the context of this model is 512"
    assert problem.help is not None
    assert "context_length: 600" in problem.help


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"model": {"attention": "eager"}}, "`eager` has no groups"),
        ({"model": {"attention": "flash_attention_2"}}, "`flash_attention_2` has no groups"),
        ({"method": {"group_size": 256}}, "nothing would be shifted"),
        ({"method": {"group_size": 31}}, "multiple of 2"),
        ({"method": {"context_length": 128}}, "do not fit a context of 128"),
        ({"method": {"rope": "yarn"}}, "which is not given"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(blocks: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, "longlora", **blocks))


def test_what_is_trained_whole_is_loaded_in_fp32_over_a_16_bit_base(tmp_path: Path) -> None:
    base = tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    method, context = tiny.method("longlora"), tiny.context(dtype=torch.bfloat16)
    spec, cpu = ModelSpec(id=str(base)), torch.device("cpu")
    model = method.adapt(load_base(spec, method, torch.bfloat16, cpu), context)
    tiny.disturb(model)
    (tmp_path / "adapter").mkdir()
    method.save(model, tmp_path / "adapter", context)
    again = method.load(load_base(spec, method, torch.bfloat16, cpu), tmp_path / "adapter", context)
    trained = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    loaded = {name: p for name, p in again.named_parameters() if "modules_to_save" in name}
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    inner = again.get_base_model()
    assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    with autocast(torch.bfloat16, "cpu"):
        assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_over_a_4_bit_base_it_trains_in_bf16(tmp_path: Path) -> None:
    # Trained norms are fp32, and so is what a 4-bit layer answers when it is asked in fp32.
    recipe = tiny.recipe(
        tmp_path,
        "longlora",
        method={"quantization": {"type": "nf4"}},
        model={"dtype": "bfloat16"},
        training={"max_steps": 2},
    )
    assert "embedding moved" in train(recipe)["vitals_line"]
