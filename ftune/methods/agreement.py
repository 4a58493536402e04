"""What an adapter on disk says of itself, held against what its recipe attaches.

``adapter_config.json`` decides how PEFT computes: another rank, scale, tuner or list of layers is another model, and
some of its fields make PEFT import modules, draw anew, or change the base. So it is compared, field by field, with the
configuration that the method makes from the recipe; and the tensors with those that such an adapter has.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import ModelError
from ftune.methods.adapters import asked_for
from ftune.methods.base import Method
from ftune.methods.types import Context
from ftune.regular import read_regular

if TYPE_CHECKING:
    from torch import nn

__all__ = ["require_agreement", "require_tensors"]

MAX_CONFIG_BYTES = 10_000_000
# What depends on the library or the place, not on the recipe; or, as AdaLoRA's schedule, ends with training.
_FREE = frozenset(
    ("peft_version", "inference_mode", "revision", "tinit", "tfinal", "total_step", "deltaT", "target_modules")
)
_HELP = "it is not what this run's recipe trained: restore the directory, or train the run again"


def require_agreement(
    method: Method, base: nn.Module, directory: Path, context: Context, base_names: Collection[str] = ()
) -> None:
    """Hold that ``adapter_config.json`` is the one that a method writes for its recipe.

    Args:
        method: Of the recipe.
        base: The model that the adapter is for; it stays as it is.
        directory: Where the adapter is.
        context: What the method may know.
        base_names: How the base may be called beside its name in ``context``; empty: in any way.

    Raises:
        ModelError: It cannot be read, or says something else; the message names each field.
    """
    from peft.utils import CONFIG_NAME
    from peft.utils.other import _prepare_prompt_learning_config

    path = directory / CONFIG_NAME
    try:
        stored = json.loads(read_regular(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}", help=_HELP) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", help=_HELP) from error
    if not isinstance(stored, dict):
        raise ModelError(f"{path} is damaged: it is no JSON object", help=_HELP)
    config = asked_for(method, base, context)
    if config.is_prompt_learning:
        # as PEFT does when it attaches one: sizes of the base, and one stack of blocks where there is no encoder
        config.num_transformer_submodules = config.num_transformer_submodules or 1
        _prepare_prompt_learning_config(config, cast(Any, base).config)
    expected = _plain(config.to_dict())
    expected |= _plain(method.stored_settings(config)) | {"base_model_name_or_path": context.base_name or None}
    called = stored.get("base_model_name_or_path")
    if not base_names or (isinstance(called, str) and called in base_names):
        expected["base_model_name_or_path"] = called
    usual = _plain({field.name: field.default for field in fields(config) if field.default is not MISSING})
    wrong = [
        f"`{key}` is {_brief(stored.get(key))}, and the recipe has {_brief(expected.get(key))}"
        for key in sorted({*stored, *expected} - _FREE)
        if not _same(stored, expected, usual, key)
    ]
    if wrong_targets := _other_targets(stored.get("target_modules"), expected.get("target_modules"), base):
        wrong.append(wrong_targets)
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ModelError(f"{path} does not fit the recipe:\n  " + "\n  ".join(wrong[:10]) + more, help=_HELP)


def _same(stored: dict[str, Any], expected: dict[str, Any], usual: dict[str, Any], key: str) -> bool:
    if key not in expected:  # of a newer version of PEFT
        return not stored[key]
    # of an older version: what it did not know yet was as it is now by default
    found, meant = stored.get(key, usual.get(key)), expected[key]
    if isinstance(found, float | int) and isinstance(meant, float | int) and type(found) is not type(meant):
        return bool(found == meant) and bool not in (type(found), type(meant))
    return type(found) is type(meant) and bool(found == meant)


def _other_targets(stored: Any, expected: Any, base: nn.Module) -> str | None:
    """What differs between two lists of target modules, by the projections that they match."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if stored == expected:
        return None
    if isinstance(stored, list) and all(isinstance(name, str) for name in stored):
        head = cast(Any, base).get_output_embeddings()
        # all that PEFT would take, not only what ftune adapts
        modules = [(name, module) for name, module in base.named_modules() if module is not head]
        names = [name for name, module in modules if isinstance(module, (torch.nn.Linear, Conv1D))]

        def matched(targets: list[str]) -> set[str]:
            endings = set(targets)
            # the last components of a name, as many as a target has
            return {name for name in names if any(ending in endings for ending in _endings(name))}

        meant = set(names) if expected == "all-linear" else matched(expected) if isinstance(expected, list) else None
        if meant is not None and matched(stored) == meant and all(_is_ending(name, names) for name in stored):
            return None
    return f"`target_modules` is {_brief(stored)}, and the recipe has {_brief(expected)}"


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _is_ending(target: str, names: list[str]) -> bool:
    return any(name == target or name.endswith("." + target) for name in names)


def require_tensors(model: nn.Module, path: Path) -> None:
    """Hold that a file has the tensors of the adapter that it was loaded into: no other, none missing, all finite.

    PEFT fills what is missing with a fresh start, and takes weights of the base from the file too.

    Raises:
        ModelError: It has not.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    expected = get_peft_model_state_dict(cast(Any, model), save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for what, found in (("lacks", shapes.keys() - names), ("has, beyond the adapter,", names - shapes.keys())):
            if found:
                raise ModelError(f"{path} {what} {_brief(sorted(found))}", help=_HELP)
        for name in sorted(names):
            tensor = file.get_tensor(name)
            if tuple(tensor.shape) != shapes[name]:
                raise ModelError(
                    f"{path}: `{name}` has the shape {tuple(tensor.shape)}, the adapter's {shapes[name]}", help=_HELP
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{path}: `{name}` holds numbers that are not finite", help=_HELP)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back; sets as sorted lists."""
    sorted_sets = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    plain: dict[str, Any] = json.loads(json.dumps(sorted_sets))
    return plain


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
