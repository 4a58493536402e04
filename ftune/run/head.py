"""A model's head, taken out of its forward pass, and what the model does to the logits behind it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ftune.ops.kernels import TRIAL_TOKENS

__all__ = ["AfterHead", "HeadTap", "autocast", "measure_after_head"]


def autocast(dtype: torch.dtype, device_type: str) -> AbstractContextManager[Any]:
    """The context in which a model computes in ``dtype`` while its trained weights stay fp32."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class AfterHead:
    """What becomes of the head's output: ``softcap * tanh(scale * x / softcap)``, or ``scale * x``.

    Attributes:
        vocab: Width of the head's output.
        scale: Granite divides its logits, Cohere multiplies them.
        softcap: Gemma caps them.
    """

    vocab: int
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Do the same to logits of any shape."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class HeadTap:
    """While it is open, the model's head computes nothing: it keeps its input and hands on ``answer``.

    Attributes:
        head: The output head, whatever wraps it.
        hidden: The head's input of the last forward pass, (..., D).
    """

    def __init__(self, model: nn.Module, answer: Tensor | None = None) -> None:
        self.head: nn.Module = cast(Any, model).get_output_embeddings()
        self.hidden: Tensor
        self._answer = answer

    def __enter__(self) -> Self:
        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            self.hidden = hidden
            # Empty logits: whatever the model does to them costs nothing.
            return hidden[..., :0] if self._answer is None else self._answer.expand(*hidden.shape[:-1], -1)

        # An attribute of the instance hides the class's method until it is deleted.
        cast(Any, self.head).forward = forward
        return self

    def __exit__(self, *_: object) -> None:
        del self.head.__dict__["forward"]


@torch.no_grad()
def measure_after_head(model: nn.Module, dtype: torch.dtype, device: torch.device) -> AfterHead | None:
    """Send known numbers through what stands behind the head.

    Returns:
        The scale and the cap that explain what came out; None where none do, or where the model has no head.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    sized = getattr(head, "original_module", head)  # of a head that PEFT trains a copy of
    vocab = getattr(sized, "out_features", None) or getattr(getattr(sized, "weight", None), "shape", [None])[0]
    if head is None or vocab is None or "forward" in vars(head):
        return None
    sent = torch.cat([torch.linspace(-50, 50, 101), torch.tensor([1e-3, 1e4])]).to(device)
    was_training = model.training
    model.eval()  # no dropout, and nothing that counts what it sees in training
    try:
        with HeadTap(model, sent), autocast(dtype, device.type):
            ids = torch.arange(TRIAL_TOKENS, device=device)[None] % vocab
            came: Tensor = cast(Any, model)(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    except (ValueError, TypeError, RuntimeError, IndexError):  # it expects logits over its vocabulary
        return None
    finally:
        model.train(was_training)
    if came.shape[-1] != len(sent):
        return None
    came = came.flatten(0, -2)[-1].float()
    scale = float(came[-2] / sent[-2])
    for found in (AfterHead(vocab), AfterHead(vocab, scale), AfterHead(vocab, scale, float(came[-1].abs()))):
        if found.softcap != 0 and torch.allclose(found(sent), came, rtol=1e-5, atol=1e-6):
            return found
    return None
