"""Adapters by PEFT on the disk: saved, written as plain LoRA, loaded."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import ModelError
from ftune.methods.adapters import adapter_state, attach, peft_settings
from ftune.methods.agreement import require_tensors
from ftune.methods.targets import list_linears, match_targets
from ftune.methods.types import Context

if TYPE_CHECKING:
    from torch import Tensor, nn


__all__ = ["difference_settings", "load_peft", "save_as_lora", "save_peft"]


def save_peft(
    model: nn.Module,
    out: Path,
    context: Context,
    initial: dict[str, Tensor] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Save an adapter in PEFT's format, naming the base model without a local path.

    Args:
        model: The wrapped model.
        out: An existing, empty directory.
        context: Gives the public name and revision of the base.
        initial: The adapter at the start, when it was taken out of the base weights: the saved adapter is then
            the difference, of rank 2r, and fits the untouched base.
        settings: What the saved configuration says instead, where the saved tensors are other ones than trained.
    """
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    config = copy.deepcopy(cast(Any, model).peft_config["default"])
    config.base_model_name_or_path = context.base_name or None
    config.revision = context.revision
    config.inference_mode = True
    state = adapter_state(model)
    if initial is not None:
        state = _difference(state, initial, config)
    save_file(state, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    # PEFT keeps sets in its configuration: sorted, two runs of one recipe write the same bytes.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain |= settings or {}
    (out / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def _difference(state: dict[str, Tensor], initial: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The adapter of rank 2r that adds ``scale (B A - B0 A0)``; changes the configuration to match."""
    import torch

    for key, value in difference_settings(config).items():
        setattr(config, key, value)
    return {
        name: torch.cat([tensor, initial[name]], dim=0)
        if "lora_A" in name
        else torch.cat([tensor, -initial[name]], dim=1)
        for name, tensor in state.items()
    }


def difference_settings(config: Any) -> dict[str, Any]:
    """How the configuration of ``scale (B A - B0 A0)`` differs from that of ``scale B A``."""
    # rsLoRA divides by the root of the rank, which grows by the root of two.
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    return {"r": 2 * config.r, "lora_alpha": alpha, "init_lora_weights": True}


def save_as_lora(factors: dict[str, tuple[Tensor, Tensor]], base: nn.Module, out: Path, context: Context) -> int:
    """Save low-rank updates as a plain LoRA adapter of scale 1; returns its rank.

    Every update is padded with zeros to the largest rank among them: inference engines know one rank an adapter.

    Args:
        factors: For each projection, by name, ``A`` (r, in) and ``B`` (out, r).
        base: The model that the names belong to; afterwards it is as it was.
        out: An existing, empty directory.
        context: Names the base model.
    """
    import torch
    from peft import LoraConfig

    rank = max(1, *(a.shape[0] for a, _ in factors.values()))
    leaves = {name.rsplit(".", 1)[-1] for name in factors}
    fitting = {linear.name for linear in match_targets(list_linears(base), tuple(sorted(leaves)))}
    targets = tuple(sorted(leaves if fitting == set(factors) else factors))
    config = LoraConfig(r=rank, lora_alpha=rank, **peft_settings(base, targets, context))
    wrapped = attach(base, config, context)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = cast(Any, wrapped.get_submodule(f"base_model.model.{name}"))
            for weight, given in ((layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b)):
                weight.zero_()
                weight[: given.shape[0], : given.shape[1]] = given
    save_peft(wrapped, out, context)
    cast(Any, wrapped).unload()
    return rank


def load_peft(base: nn.Module, directory: Path) -> nn.Module:
    """Attach an adapter saved by ``save_peft``; nothing requires grad.

    Raises:
        ModelError: There is no safetensors file: PEFT would take a pickle in its place, or ask the hub.
    """
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    weights = directory / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(
            f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}, and ftune reads no pickle",
            help="train the run again, or restore the file",
        )
    wrapped = cast("nn.Module", PeftModel.from_pretrained(cast(Any, base), str(directory)))
    require_tensors(wrapped, weights)
    return wrapped.requires_grad_(False)
