"""Stop tokens: found by every command, written to everything that is saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoTokenizer, GenerationConfig

from ftune.artifacts.chat import Chat
from ftune.artifacts.convert import to_lora
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.stops import end_token_ids, saved_stops
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.errors import RunDirError
from ftune.recipe.load import Loaded

END = 2  # <|im_end|>


def other_end(where: Path, method: str = "lora", generation: dict[str, Any] | None = None, **blocks: Any) -> Loaded:
    """A recipe on a base whose end of sequence is not the end of turn of its template."""
    loaded = tiny.recipe(where, method, **blocks)
    tokenizer = AutoTokenizer.from_pretrained(where / "base")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(where / "base")
    for name, change in {"config.json": {"eos_token_id": 0}, "generation_config.json": generation or {}}.items():
        path = where / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0} | change))
    return loaded


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_end_that_was_learned_is_saved_and_stops(method: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ok"}]})
            + "\n"
            for i in range(8)
        )
    )
    rows = str(tmp_path / "rows.jsonl")
    loaded = other_end(
        tmp_path,
        method,
        data={"train": rows, "eval": rows, "train_on": "all", "packing": False},
        training={"max_steps": 40, "micro_batch_size": 4},
        evaluation={"metrics": ["exact_match"], "max_new_tokens": 12},
    )
    train(loaded)
    run = RunDir(tmp_path / "run")
    for directory in (run.artifact(loaded.recipe), Path(merge(run)["out"])):
        assert GenerationConfig.from_pretrained(directory).eos_token_id == [0, END]
    result = evaluate(find_target(tmp_path / "run"), base=True)
    assert result["tuned"]["metrics"]["exact_match"] == 1.0
    talk = Chat(find_target(tmp_path / "run"), max_new_tokens=12, temperature=0.0, base=False)
    assert talk.answer("q3", io.StringIO()) == "ok"


def test_merged_by_shard_and_converted_models_have_it_too(tmp_path: Path) -> None:
    train(other_end(tmp_path, training={"max_steps": 2}))
    run = RunDir(tmp_path / "run")
    merge(run, by_shard=True)
    assert GenerationConfig.from_pretrained(tmp_path / "run/merged").eos_token_id == [0, END]
    train(other_end(tmp_path, "adalora", training={"max_steps": 30}, output_dir=str(tmp_path / "other")))
    to_lora(RunDir(tmp_path / "other"))
    assert GenerationConfig.from_pretrained(tmp_path / "other/lora").eos_token_id == [0, END]


def test_what_else_the_base_says_of_generation_stays(tmp_path: Path) -> None:
    # A temperature without sampling: transformers refuses to save what many models are published with.
    said = {"eos_token_id": [0, 9], "temperature": 0.6, "repetition_penalty": 1.1}
    loaded = other_end(tmp_path, generation=said, training={"max_steps": 2})
    train(loaded)
    merge(RunDir(tmp_path / "run"))
    for name in ("adapter", "merged"):
        found = json.loads((tmp_path / "run" / name / "generation_config.json").read_text())
        assert found["eos_token_id"] == [0, END, 9]
        assert found["temperature"] == 0.6
        assert found["repetition_penalty"] == 1.1


def test_a_run_that_saved_none_stops_where_its_template_does(tmp_path: Path) -> None:
    loaded = other_end(tmp_path, training={"max_steps": 2})
    train(loaded)
    run, tokenizer = RunDir(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "base")
    file = tmp_path / "run/adapter/generation_config.json"
    assert set(saved_stops(run, loaded.recipe, tokenizer)) == {0, END}
    file.unlink()
    assert saved_stops(run, loaded.recipe, tokenizer) == (END,)
    assert end_token_ids(None, tokenizer, (END,)) == [0, END]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [1e9]}', '{"eos_token_id": -1}']
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    loaded = other_end(tmp_path, training={"max_steps": 2})
    train(loaded)
    (tmp_path / "run/adapter/generation_config.json").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    with pytest.raises(RunDirError, match=r"generation_config\.json is damaged"):
        saved_stops(RunDir(tmp_path / "run"), loaded.recipe, tokenizer)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_an_end_that_is_no_token_stops_as_text(method: str, tmp_path: Path) -> None:
    """ChatML on a tokenizer that has other marks: the end of turn is learned letter by letter."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "chat.jinja").write_text(template)
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ok"}]} for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {key: str(tmp_path / "rows.jsonl") for key in ("train", "eval")}
    loaded = tiny.recipe(
        tmp_path,
        method,
        data={**data, "chat_template": str(tmp_path / "chat.jinja"), "packing": False},
        training={"max_steps": 40, "micro_batch_size": 4},
        evaluation={"metrics": ["strict"], "max_new_tokens": 16},
    )
    train(loaded)
    result = evaluate(find_target(tmp_path / "run"), base=False)
    assert result["samples"][0]["reference"] == "ok"
    assert result["samples"][0]["tuned"] == "ok"
    talk = Chat(find_target(tmp_path / "run"), max_new_tokens=16, temperature=0.0, base=False)
    assert talk.answer("q3", io.StringIO()) == "ok"
