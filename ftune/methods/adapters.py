"""Adapters by PEFT: attached, saved, loaded, switched off and merged."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import ModelError, RunFailed
from ftune.methods.targets import Targets, list_linears, match_targets
from ftune.methods.types import Context
from ftune.models.quantization import dequantize, is_4bit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftune.methods.base import Method

__all__ = [
    "adapter_state",
    "asked_for",
    "attach",
    "cast_inputs",
    "difference_settings",
    "disable_adapter",
    "load_peft",
    "merge_factors",
    "merge_peft",
    "peft_settings",
    "require_same_initial",
    "save_as_lora",
    "save_peft",
]


def peft_settings(model: nn.Module, targets: Targets, context: Context) -> dict[str, Any]:
    """Keyword arguments that every PEFT configuration over linear layers shares.

    Raises:
        ModelError: A target matches nothing.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    matched = {linear.name for linear in match_targets(list_linears(model), targets)}
    head = cast(Any, model).get_output_embeddings()
    linear = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}
    if targets == "all-linear":
        found = linear
    elif isinstance(targets, tuple):
        found = {name for name in linear if any(name == target or name.endswith(f".{target}") for target in targets)}
    else:
        # PEFT would match the expression against everything, the output head and whole blocks included.
        found = set()
    if found != matched:
        targets = tuple(sorted(matched))
    kinds = {isinstance(module, Conv1D) for name, module in model.named_modules() if name in matched}
    return {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "fan_in_fan_out": True in kinds,
        "task_type": "CAUSAL_LM",
    }


_only_asking: ContextVar[bool] = ContextVar("_only_asking", default=False)


class _Asked(Exception):
    """Carries the configuration that ``attach`` was called with."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def asked_for(method: Method, base: nn.Module, context: Context) -> Any:
    """The PEFT configuration that a method would attach to a base, without attaching it.

    Raises:
        ModelError: As the method's ``adapt`` does.
    """
    token = _only_asking.set(True)
    try:
        # AdaLoRA refuses a run too short for its phases; how long it was is not asked here.
        method.adapt(base, dataclasses.replace(context, total_steps=10**9))
    except _Asked as asked:
        return asked.config
    finally:
        _only_asking.reset(token)
    raise AssertionError(f"{type(method).__name__}.adapt does not attach by PEFT")


def attach(model: nn.Module, config: Any, context: Context) -> nn.Module:
    """Wrap a model with PEFT: the base frozen, the adapter in fp32, its start drawn from the seed alone."""
    import torch
    from peft import get_peft_model

    if _only_asking.get():
        raise _Asked(config)
    # PEFT draws from the global generator; the loop reseeds it before every forward pass.
    torch.manual_seed(context.seed)
    wrapped = cast("nn.Module", get_peft_model(cast(Any, model), config))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # Under autocast the adapter's products run in the compute dtype anyway; casting its input to fp32 first
    # would only save a second, larger copy of it for the backward pass.
    return cast_inputs(wrapped, enabled=context.dtype == torch.float32)


def cast_inputs(model: nn.Module, *, enabled: bool) -> nn.Module:
    """Whether PEFT layers cast their input to the adapter's dtype."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            cast(Any, module).cast_input_dtype_enabled = enabled
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors, with the names PEFT saves."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(cast(Any, model), save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def require_same_initial(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Hold that a resumed PiSSA or OLoRA run took the same matrices out of its base.

    Raises:
        RunFailed: The decomposition came out differently, so the frozen residual is another one.
    """
    import torch

    mine: dict[str, Tensor] = getattr(model, "_ftune_initial", {})
    stored = {key.removeprefix("initial."): value for key, value in state.items()}
    if mine.keys() != stored.keys() or any(not torch.equal(mine[key], stored[key]) for key in mine):
        raise RunFailed(
            "the decomposition of the base weights differs from the one this run started with",
            help="resume on the machine and with the library versions that began the run",
        )


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

    from ftune.methods._agreement import require_tensors

    weights = directory / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(
            f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}, and ftune reads no pickle",
            help="train the run again, or restore the file",
        )
    wrapped = cast("nn.Module", PeftModel.from_pretrained(cast(Any, base), str(directory)))
    require_tensors(wrapped, weights)
    return wrapped.requires_grad_(False)


def disable_adapter(model: nn.Module) -> AbstractContextManager[Any]:
    """PEFT's context in which the base computes alone."""
    return cast("AbstractContextManager[Any]", cast(Any, model).disable_adapter())


def merge_peft(model: nn.Module) -> nn.Module:
    """Merge a PEFT adapter in fp32 into the weights it was trained against.

    4-bit layers are dequantized first, so that the merged model is the one that was trained: merging onto the
    original weights gives another model (peft#2105), merging in 4 bits rounds the update away.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    peft_model = cast(Any, model)
    if any(is_4bit(module) for module in model.modules()):
        state, config = adapter_state(model), copy.deepcopy(peft_model.peft_config["default"])
        plain = dequantize(peft_model.unload())
        config.base_model_name_or_path = None
        peft_model = get_peft_model(cast(Any, plain), config)
        set_peft_model_state_dict(peft_model, state)
    merged = peft_model.float().merge_and_unload(safe_merge=True)
    return cast("nn.Module", merged)


def merge_factors(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Take a PEFT adapter off and add its low-rank updates, in fp32, to the weights it was trained against.

    Args:
        model: The wrapped model; its base is changed in place, 4-bit layers dequantized.
        factors: For each projection, by name, ``A`` (r, in) and ``B`` (out, r), fp32.
    """
    from transformers.pytorch_utils import Conv1D

    plain = cast("nn.Module", cast(Any, model).unload())
    if any(is_4bit(module) for module in plain.modules()):
        plain = dequantize(plain)
    plain = plain.float()
    for name, (a, b) in factors.items():
        layer = cast(Any, plain.get_submodule(name))
        update = b @ a
        layer.weight.data += update.T if isinstance(layer, Conv1D) else update
    return plain
