"""What is said of the fields of other tools: the right thing, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ftune.errors import RecipeError
from ftune.recipe import load_recipe, parse_recipe
from ftune.recipe.other_tools import ELSEWHERE, HERE, NO_FIELD, NOTES
from ftune.recipe.spelling import closest


def hint(path: str, value: str = "x", method: str = "lora") -> str:
    """The report about one more field in a short recipe."""
    *parent, name = path.split(".")
    blocks: dict[str, list[str]] = {
        "model": ["id: org/tiny"],
        "method": [f"name: {method}"],
        "data.train": ["path: a.jsonl"],
    }
    root = ["output_dir: runs/x"]
    (root if not parent else blocks.setdefault(".".join(parent), [])).append(f"{name}: {value}")
    train = blocks.pop("data.train")
    blocks["data"] = [f"train: {{{', '.join(train)}}}", *blocks.get("data", [])]
    text = "\n".join([*(f"{block}: {{{', '.join(lines)}}}" for block, lines in blocks.items()), *root])
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text + "\n", "r.yaml")
    report = caught.value.render()
    assert f"unknown field `{name}`" in report
    return report


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("max_samples", "write it as `data.train.max_examples`"),
        ("data.max_samples", "write it as `data.train.max_examples`"),
        ("do_train", "remove it: `ftune train` trains"),
        ("model_type", "remove it: it is read from the model's own files"),
        ("model.model_type", "remove it: it is read from the model's own files"),
        ("streaming", "remove it: rows are read into memory"),
        ("data.streaming", "remove it: rows are read into memory"),
        ("training.optimizer", "`optimizer` stands beside `training`, not in it"),
        ("training.output_dir", "`output_dir` stands beside `training`, not in it"),
        ("lora_r", "write it as `method.rank`"),
        ("method.lora_alpha", "did you mean `alpha`?"),
        ("sequence_len", "write it as `data.max_length`"),
        ("training.per_device_train_batch_size", "did you mean `micro_batch_size`?"),
        ("num_train_epochs", "write it as `training.epochs`"),
        ("val_set_size", "write it as `data.eval_fraction`"),
        ("dataset_text_field", "write it as `data.train.columns.text`"),
        ("load_in_4bit", "`quantization` is a block: {type: nf4}"),
        ("bf16", "write it as `model.dtype`"),
        ("warmup_steps", "`warmup_steps` belongs to `schedule`"),
        ("lr_scheduler_type", "write it as `schedule.name`"),
        ("report_to", "did you mean `tracking`?"),
        ("save_steps", "write it as `checkpoint.every_steps`"),
        ("save_strategy", "`every_steps` is a number of updates"),
        ("datasets", "write it as `data.train`"),
        ("cutoff_len", "write it as `data.max_length`"),
        ("template", "`chat_template` is a Jinja file"),
        ("neftune_noise_alpha", "not supported"),
        ("flash_attention", "write it as `model.attention`"),
        ("sample_packing", "write it as `data.packing`"),
        ("adapter", "write it as `method.name`"),
        ("base_model", "write it as `model.id`"),
        ("overwrite_output_dir", "`ftune train --overwrite`"),
        ("resume_from_checkpoint", "`ftune train --resume`"),
        ("logging_steps", "every update is logged"),
        ("wandb_project", "add the tracker to `tracking`"),
        ("push_to_hub", "uploads nothing"),
        ("group_by_length", "as little padding as can be"),
        ("deepspeed", "--engine fsdp2"),
        ("use_dora", "`name` is `dora` for DoRA"),
        ("beta", "not on preferences"),
        ("evaluation.steps", "did you mean `every_steps`?"),
        ("checkpoint.steps", "did you mean `every_steps`?"),
        ("data.columns", "write it as `data.train.columns`"),
        ("data.max_examples", "write it as `data.train.max_examples`"),
        ("data.train.prompt", "write it as `data.train.columns.prompt`"),
        ("data.train.name", "did you mean `subset`?"),
        ("optimizer.type", "did you mean `name`?"),
        ("schedule.warmup_epochs", "`warmup_ratio` is a share of all updates"),
    ],
)
def test_a_name_of_another_tool_gets_the_right_hint(path: str, said: str) -> None:
    assert said in hint(path)


@pytest.mark.parametrize(
    "path",
    [
        "shuffle_merged_datasets",
        "strict",
        "loss",
        "profiler",
        "freeze_vit",
        "model.type",
        "data.type",
        "data.name",
        "data.train_split",
        "schedule.power",
        "optimizer.momentum",
        "checkpoint.dir",
        "method.layers",
    ],
)
def test_a_name_that_means_nothing_here_gets_none(path: str) -> None:
    report = hint(path)
    assert "did you mean" not in report
    assert "write it as" not in report
    assert "fields of " in report


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("model.dtype", "bf16", "bfloat16"),
        ("model.dtype", "float16", None),
        ("model.attention", "flash_attn", "flash_attention_2"),
        ("model.attention", "eagr", "eager"),
        ("data.too_long", "drop", "skip"),
        ("data.train_on", "completion", "assistant"),
        ("optimizer.name", "adamw_torch", "adamw"),
        ("optimizer.name", "paged_adamw_32bit", "paged_adamw"),
        ("optimizer.name", "sgd", None),
        ("schedule.name", "constant_with_warmup", "constant"),
        ("schedule.name", "polynomial", None),
        ("method.name", "prompt-tuning", "prompt"),
        ("method.name", "loha", None),
        ("method.name", "qlroa", "qlora"),
    ],
)
def test_a_value_of_another_tool_gets_the_right_hint(field: str, value: str, meant: str | None) -> None:
    recipe: dict[str, Any] = {"model": {"id": "org/tiny"}, "method": {"name": "lora"}, "data": {"train": "a.jsonl"}}
    block, _, name = field.partition(".")
    recipe.setdefault(block, {})[name] = value
    with pytest.raises(RecipeError) as caught:
        parse_recipe(yaml.safe_dump(recipe | {"output_dir": "runs/x"}), "r.yaml")
    report = caught.value.render()
    assert (f"did you mean `{meant}`?" in report) if meant else ("did you mean" not in report)


def test_the_tables_do_not_contradict_each_other() -> None:
    assert not ELSEWHERE.keys() & NO_FIELD.keys()
    assert NOTES.keys() <= ELSEWHERE.keys() | NO_FIELD.keys() | {name for _, name in HERE}


@pytest.mark.parametrize(
    ("word", "names", "expected"),
    [
        ("rnak", ["rank", "name"], "rank"),
        ("lerning_rate", ["learning_rate"], "learning_rate"),
        ("learning-rate", ["learning_rate"], "learning_rate"),
        ("Ticket Text", ["ticket_text"], "ticket_text"),
        ("streaming", ["training"], None),
        ("shuffle", ["schedule"], None),
        ("limit", ["split"], None),
        ("nope.yaml", ["t.yaml"], None),
        ("trian.jsonl", ["train.jsonl", "test.jsonl"], "train.jsonl"),
        ("tiny.gguf", ["tiny"], "tiny"),
        ("a", ["b"], None),
        ("", ["b"], None),
    ],
)
def test_the_nearest_word_or_none(word: str, names: list[str], expected: str | None) -> None:
    assert closest(word, names) == expected


def test_another_recipe_of_the_directory_is_not_named_by_chance(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "nope.yaml")
    assert "did you mean" not in caught.value.render()
