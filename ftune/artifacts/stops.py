"""Where generation stops: read from a run, written to everything that is saved.

``generation_config.json`` is the file that transformers, vLLM and others read it from.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.artifacts.run_dir import RunDir
from ftune.data.answers import Answer
from ftune.data.formats import Format
from ftune.data.prompts import prompting_of
from ftune.data.stops import end_text, learned_ends, template_end
from ftune.errors import RunDirError
from ftune.plan.plan import Plan
from ftune.recipe.schema import Recipe
from ftune.regular import read_regular
from ftune.run.files import write_text

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "end_token_ids",
    "saved_stops",
    "stops_of_plan",
    "stops_of_run",
    "text_stop",
    "until",
    "write_generation_config",
]

FILE = "generation_config.json"
MAX_BYTES = 1_000_000


def end_token_ids(model: nn.Module | None, tokenizer: Any, learned: Sequence[int] = ()) -> list[int]:
    """Tokens that end an answer, ascending.

    Args:
        model: Those of its generation config; None: without.
        tokenizer: Its end of sequence.
        learned: Those that end a trained turn.
    """
    config = getattr(model, "generation_config", None)
    found = {*_listed(getattr(config, "eos_token_id", None)), *learned}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(found)


def stops_of_plan(plan: Plan) -> tuple[int, ...]:
    """The tokens that end the trained turns of a plan's data."""
    return learned_ends(plan.splits.train, plan.tokenizer, plan.recipe.data)


def text_stop(recipe: Recipe, tokenizer: Any, trained: Format | None = None) -> str | None:
    """The text that ends an answer where no token does, of a run that prompts in a chat template.

    Args:
        recipe: The run's.
        tokenizer: The run's.
        trained: The format that the run recorded, for where its data cannot be read any more.
    """
    text = end_text(tokenizer, recipe.data.chat_template)
    # The data are looked at only where it matters.
    return text if text is not None and prompting_of(recipe.data, tokenizer, trained).kind == "chat" else None


def until(answer: Answer, text: str | None) -> Answer:
    """An answer up to the text that ends it."""
    if text is None:
        return answer
    said, whole = (part.partition(text)[0].rstrip() for part in (answer.text, answer.whole))
    return replace(answer, text=said, whole=whole)


def stops_of_run(run: RunDir | None, plan: Plan) -> tuple[int, ...]:
    """The stop tokens that a run saved with its artifact; those of the data where it saved none.

    Raises:
        RunDirError: The file is damaged.
    """
    found = _saved(run, plan.recipe, plan.tokenizer)
    return stops_of_plan(plan) if found is None else found


def saved_stops(run: RunDir | None, recipe: Recipe, tokenizer: Any) -> tuple[int, ...]:
    """The stop tokens that a run saved, without reading data; where it saved none, the one of the chat template.

    Raises:
        RunDirError: The file is damaged.
    """
    found = _saved(run, recipe, tokenizer)
    return template_end(tokenizer, recipe.data.chat_template) if found is None else found


def _saved(run: RunDir | None, recipe: Recipe, tokenizer: Any) -> tuple[int, ...] | None:
    path = run.root / recipe.method.artifact / FILE if run is not None else None
    if path is None or not path.is_file():
        return None
    try:
        ids = _listed(json.loads(read_regular(path, MAX_BYTES)).get("eos_token_id"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise RunDirError(f"{path} is damaged: {error}", help="delete it, or train the run again") from error
    if not all(type(i) is int and 0 <= i < len(tokenizer) for i in ids):
        raise RunDirError(f"{path} is damaged: `eos_token_id` has what is no token", help="delete it, or correct it")
    return tuple(ids)


def write_generation_config(out: Path, model: nn.Module, tokenizer: Any, learned: Sequence[int]) -> None:
    """Write the base's generation config with every stop token in it, over the one that is there.

    Args:
        out: The directory of an adapter or model.
        model: Adapted or not; its generation config is the base's.
        tokenizer: The run's.
        learned: Those that end a trained turn.
    """
    from transformers import GenerationConfig

    path = out / FILE
    found = getattr(model, "generation_config", None)
    if path.is_file():
        found = GenerationConfig.from_pretrained(str(out))
    config = copy.deepcopy(found) if isinstance(found, GenerationConfig) else GenerationConfig()
    ids = sorted({*_listed(config.eos_token_id), *end_token_ids(model, tokenizer, learned)})
    # A base's configuration may name tokens of another vocabulary (Qwen2-VL's defaults do), which never come.
    ids = [token for token in ids if 0 <= token < len(tokenizer)]
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    # Or transformers may take it for derived from config.json, which knows one token only.
    config._from_model_config = False
    # Not save_pretrained: it refuses what many published models have (a temperature without sampling).
    write_text(path, config.to_json_string(use_diff=True))


def _listed(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
