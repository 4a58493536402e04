"""What prompt and prefix tuning have in common: trained positions in front of every row, and PEFT's files.

A method file adds what is its own; it does not subclass another method.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftune.methods.adapter_files import load_peft
from ftune.methods.adapters import disable_adapter
from ftune.methods.base import Method
from ftune.methods.types import Context, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["VirtualTokens", "trained_rows"]

COMMON_TOKENS = 5000
"""Rows of the vocabulary to sample from: the commonest, which tokenizers number first (arXiv:2104.08691, sec. 2.1.)"""


def trained_rows(model: nn.Module) -> Tensor:
    """What stands for the virtual tokens, one row each: (V, width), fp32, on the CPU."""
    rows: Tensor = cast(Any, model).get_prompt_embedding_to_save("default")
    return rows.float()


class VirtualTokens(Method):
    """Fields and verbs of every method that trains what stands in front of the row, and nothing else."""

    mergeable: ClassVar[bool] = False
    packable: ClassVar[bool] = False
    decaying: ClassVar[bool] = False
    starts_as_base: ClassVar[bool] = False

    virtual_tokens: int = Field(20, ge=1, description="Trained positions in front of every row.")
    init: Literal["vocabulary", "text"] = Field(
        "vocabulary",
        description="Where they start. vocabulary: as tokens drawn from the 5000 commonest, special ones left out; "
        "text: as `init_text`, repeated to fill them.",
    )
    init_text: str | None = Field(None, description="The text for `init: text`; a description of the task serves well.")

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield a text that is missing, or that nothing reads."""
        if self.init == "text" and not (self.init_text or "").strip():
            yield Problem(("method", "init"), "`init: text` needs a text", "add `init_text`")
        if self.init != "text" and self.init_text is not None:
            yield Problem(("method", "init_text"), f"`init: {self.init}` does not read `init_text`", "set `init: text`")

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield rows that are longer than the model's context, and a text that would be cut."""
        limit = shape.extra["max_positions"]
        needed = context.max_length + self.virtual_tokens
        if limit is not None and needed > limit:
            yield Problem(
                ("method", "virtual_tokens"),
                f"{self.virtual_tokens} virtual tokens and `data.max_length: {context.max_length}` need {needed} "
                f"positions, and this {shape.model_type} has {limit}",
                f"set `data.max_length: {limit - self.virtual_tokens}` or less"
                if limit > self.virtual_tokens
                else "use fewer virtual tokens",
            )
        if self.init == "text" and context.tokenizer is not None:
            count = len(self._text_ids(context))
            if count > self.virtual_tokens:
                yield Problem(
                    ("method", "virtual_tokens"),
                    f"`init_text` has {count} tokens, and there are {self.virtual_tokens} virtual ones",
                    f"set `virtual_tokens: {count}`, or shorten the text",
                )

    @property
    def virtual_positions(self) -> int:
        """Every row is longer by the virtual tokens."""
        return self.virtual_tokens

    def _text_ids(self, context: Context) -> list[int]:
        ids: list[int] = context.tokenizer(self.init_text, add_special_tokens=False)["input_ids"]
        return ids

    def start_ids(self, embedding: nn.Module, context: Context) -> Tensor:
        """The real tokens that the virtual ones start as: (V,), on the embedding's device.

        A function of recipe, base model and seed alone, so that a resumed run has the same.
        """
        import torch

        weight: Tensor = cast(Any, embedding).weight
        if self.init == "text":
            ids = self._text_ids(context)
            repeated = (ids * math.ceil(self.virtual_tokens / len(ids)))[: self.virtual_tokens]
            return torch.tensor(repeated, device=weight.device)
        # Rows of zeros say nothing; padding has one.
        usable = weight[:COMMON_TOKENS].any(dim=1).cpu()
        usable[[index for index in _special_ids(context.tokenizer) if index < len(usable)]] = False
        [candidates] = usable.nonzero(as_tuple=True)
        generator = torch.Generator().manual_seed(context.seed)
        drawn = torch.randint(len(candidates), (self.virtual_tokens,), generator=generator)
        start: Tensor = candidates[drawn].to(weight.device)
        return start

    def _remember_start(self, model: nn.Module) -> nn.Module:
        # An attribute of the Python object, no buffer: a resumed run computes it again from the seed.
        object.__setattr__(model, "_ftune_start", trained_rows(model))
        return model

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Nothing decays: zero is neither where a virtual token starts nor where it has no effect.

        So it is with the encoder of a prefix, which starts as what makes the keys and values of real tokens.
        """
        return False

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How far the virtual tokens are from where they started.

        ``moved`` is that of all together, as a share of their length there; ``moved_min`` that of the one that moved
        least, in the unit of its numbers.
        """
        start_VD = cast(Any, model)._ftune_start
        change_VD = trained_rows(model) - start_VD
        return {
            "virtual_tokens": float(len(change_VD)),
            "moved": float(change_VD.norm() / start_VD.norm()),
            "moved_min": float(change_VD.norm(dim=1).min()),
        }

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """A virtual token that stayed where it started."""
        if not vitals["moved_min"] > 0:
            return "a virtual token is still where it started"
        return None

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        return (
            f"{vitals['virtual_tokens']:.0f} virtual tokens moved by {vitals['moved']:.1%} of their length together, "
            f"each by {vitals['moved_min']:.3g} or more"
        )

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved PEFT adapter, frozen."""
        return mend_generation(load_peft(base, directory))

    def switched_off(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """PEFT's own switch: the base computes alone, on the rows as they are."""
        return disable_adapter(model)


def _special_ids(tokenizer: Any) -> set[int]:
    """Tokens that no text has: padding, ends, and whatever was added to the vocabulary."""
    if tokenizer is None:
        return set()
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}


def mend_generation(model: nn.Module) -> nn.Module:
    """Give generated rows the positions that training gave them, where PEFT drops them (prompt tuning).

    PEFT puts the virtual tokens in front of the padding on the left and then numbers all positions in a row, so
    that the answer to a short prompt depends on the longest one in its batch.
    """
    from peft import PeftType

    wrapped = cast(Any, model)
    if wrapped.active_peft_config.peft_type == PeftType.PROMPT_TUNING:
        # A partial of the bound method: a deep copy binds it to the copy.
        wrapped.prepare_inputs_for_generation = functools.partial(
            _prepare_inputs, wrapped.prepare_inputs_for_generation
        )
    return model


def _prepare_inputs(prepare: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """PEFT's inputs of one generation step, with positions that count what is attended to."""
    # Positions of the row without virtual tokens; PEFT would warn that it drops them.
    kwargs.pop("position_ids", None)
    inputs = prepare(*args, **kwargs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        given = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -given.shape[1] :]
    return inputs
