"""Adapters by PEFT: attached, saved, loaded, switched off and merged."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import RunFailed
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
    "disable_adapter",
    "merge_factors",
    "merge_peft",
    "peft_settings",
    "require_same_initial",
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
