"""What an architecture decides of a recipe, and what it cannot do."""

from __future__ import annotations

from typing import Any, Literal

from ftune.errors import ModelError
from ftune.methods import Context, ModelShape
from ftune.plan.attention import settle_attention
from ftune.plan.defaults import Choice
from ftune.plan.documents import settle_packing
from ftune.recipe.schema import Recipe

__all__ = ["left_out", "needs_no_mask", "refuse", "settled_by_architecture"]


def settled_by_architecture(
    recipe: Recipe, packing: bool | Literal["auto"], config: Any, built: Any
) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with attention and packing as this architecture can do them.

    Args:
        recipe: Written out.
        packing: As the recipe was written.
        config: The model's configuration.
        built: The model on the meta device.

    Raises:
        ModelError: It cannot do what the recipe asks for.
    """
    attention, attention_chosen = settle_attention(recipe.model, recipe.method, built)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": attention})})
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": packing})})
    packs, packing_chosen = settle_packing(asked, config)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": packs})})
    return recipe, attention_chosen + packing_chosen


def refuse(recipe: Recipe, config: Any, shape: ModelShape, context: Context) -> None:
    """Refuse what this architecture, or the method on it, cannot do.

    Raises:
        ModelError: Names the architecture and the way out.
    """
    for problem in recipe.method.refusals(shape, context):
        raise ModelError(problem.message, help=problem.help)
    if shape.extra["transposed"] and recipe.method.base_quantization is not None:
        raise ModelError(
            f"{config.model_type} keeps its weights transposed (Conv1D), which transformers cannot quantize",
            help="leave out `quantization`, or take another model",
        )
    if recipe.method.base_quantization is not None and not any(linear.quantizable for linear in shape.linears):
        raise ModelError(
            f"{config.model_type} has no linear layer of torch's own kind in its blocks, and no other is quantized",
            help="leave out `quantization`, or take another model",
        )
    if shape.extra["fused_experts"] and recipe.method.artifact == "adapter":
        # PEFT adapts the fused tensor of all experts, in other numbers than it was asked for.
        raise ModelError(
            f"{config.model_type} keeps its experts in one tensor, beside which adapters are not proven yet",
            help="use `method: full`, or a dense model",
        )


def left_out(recipe: Recipe, shape: ModelShape) -> tuple[str, ...]:
    """What ``all-linear`` leaves out, because nothing beside it would have an effect."""
    if recipe.method.artifact != "adapter" or getattr(recipe.method, "target_modules", None) != "all-linear":
        return ()
    past = [linear.name for linear in shape.linears if not linear.adaptable]
    if not past:
        return ()
    one = len(past) == 1
    layers, them, shown = ("1 layer", "it", past[0]) if one else (f"{len(past)} layers", "them", f"{past[0]}, ...")
    return (
        f"`all-linear` leaves out {layers} whose weights the model reads itself ({shown}): an adapter beside {them} "
        f"would have no effect. `method: full` trains {them}",
    )


def needs_no_mask(recipe: Recipe, shape: ModelShape, longest: int) -> bool:
    """Whether attention over concatenated documents of at most ``longest`` tokens takes no mask."""
    window = shape.extra.get("sliding_window")
    masked = (window is not None and window < longest) or shape.extra.get("attention_dropout")
    attention = recipe.model.attention
    return recipe.method.packable and attention == recipe.method.attention(attention) == "sdpa" and not masked
