"""The one ordered construction: tokenizer, data, total steps, then base model, adapter, optimizer.

The order is fixed because later parts need earlier ones: a method may need the total number of steps before it
can wrap the model (AdaLoRA), and the steps are known once the data is tokenized and packed. ``resolve`` needs no
weights; ``build`` loads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftune.available import available_bytes, least_of_all, on_empty_gpu
from ftune.data.batches import padded_length
from ftune.data.packing import pack
from ftune.data.splits import Split, Splits
from ftune.data.tokenize import load_splits
from ftune.errors import DataError, ModelError
from ftune.memory.advice import certain
from ftune.memory.estimate import MemoryEstimate, estimate
from ftune.memory.kernels import Batching, shapes_of
from ftune.memory.request import Request
from ftune.methods import Context, ModelShape
from ftune.plan.attention import settle_attention
from ftune.plan.base_model import (
    check_causal,
    check_weights,
    choose_device,
    configured,
    load_base,
    load_config,
    load_tokenizer,
)
from ftune.plan.defaults import Choice, choose_length, choose_rate
from ftune.plan.devices import Device
from ftune.plan.documents import may_keep_apart, settle_packing
from ftune.plan.engine import DDP, EngineChoice, require_engine
from ftune.plan.fingerprint import Text, fingerprint, text_fingerprint
from ftune.plan.generation import check_generation
from ftune.plan.missing import require_finite
from ftune.plan.pinned import pin_data, pin_model
from ftune.plan.positions import beyond_context, check_positions
from ftune.plan.precision import choose_dtype
from ftune.plan.quantized import as_stored
from ftune.plan.recompute import Recomputed, choose_blocks, enable_checkpointing, written
from ftune.plan.shapes import build_on_meta, shape_of
from ftune.plan.slow import slower_here
from ftune.plan.summary import summary_of
from ftune.plan.tokens import markers_without_token, require_rows
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import Recipe, TrainingSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["Plan", "Rows", "build", "context_of", "resolve", "written_out"]

Rows = tuple[tuple[int, ...], ...]
"""Rows of a split: each the indices of the examples that share it."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the weights are loaded.

    Attributes:
        recipe: The recipe with everything derived written out (dtype, epochs, learning rate, packing, alpha).
        tokenizer: The model's tokenizer, with the recipe's chat template.
        splits: Tokenized training and held-out examples.
        rows: Training rows; one example each without packing.
        eval_rows: Held-out rows, likewise.
        world_size: Processes that share an update.
        steps_per_epoch: Updates in one pass over the rows.
        total_steps: Updates in the run.
        warmup_steps: Updates before the peak learning rate.
        shape: The base model's sizes.
        context: What the method may know.
        memory: Predicted bytes, itemised.
        available: Bytes that the device has free.
        recomputed: Which blocks are recomputed in the backward pass, and why.
        may_lie_flat: Whether the rows of a micro-batch may be laid into one, as far as sizes tell; whether this
            architecture keeps documents apart is tried once the model is there.
        sizes: Where the sizes came from, when they are not those of the recipe's model.
        engine: How the processes share an update.
        target: The device that was planned for, when it is not the one here.
        choices: Training settings that the recipe left out, and why they are what they are.
        slower: What the recipe asks for by name and the device is much slower in, a warning each.
        notes: What to tell of the base model's files.
        fingerprint: Of the base model's files, where they are on this disk.
        text: Digests of its tokenizer and of the chat template.
    """

    recipe: Recipe
    tokenizer: Any
    splits: Splits
    rows: Rows
    eval_rows: Rows
    world_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    shape: ModelShape
    context: Context
    memory: MemoryEstimate
    available: int
    recomputed: Recomputed
    may_lie_flat: bool
    sizes: Path | None = None
    engine: EngineChoice = DDP
    target: Device | None = None
    choices: tuple[Choice, ...] = ()
    slower: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str | None = None
    text: Text = Text(None, None)

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer update, over all processes."""
        training = self.recipe.training
        return training.micro_batch_size * training.accumulation * self.world_size

    @property
    def budget(self) -> int:
        """Bytes that the run may take: what the recipe says, or what the device has free."""
        return _budget(self.recipe, self.available)

    @property
    def through_host(self) -> bool:
        """Whether the base is read into the host's memory, and the device takes a block at a time: not all fits there.

        For ``fully_shard``, which shares out what it is given block by block; quantized weights are made on the device.
        """
        too_large = self.memory.loading > self.budget
        return too_large and self.engine.name.startswith("fsdp2") and self.recipe.method.base_quantization is None

    @property
    def fits(self) -> bool:
        """Whether the budget is enough, for training and before it for loading."""
        return self.memory.total <= self.budget and (self.through_host or self.memory.loading <= self.budget)

    @property
    def tight(self) -> bool:
        """Whether the run fits by less than a predicted peak may be wrong."""
        return self.fits and self.memory.total > certain(self.budget)

    @cached_property
    def row_lengths(self) -> list[int]:
        """Tokens in each training row."""
        return row_lengths(self.splits.train, self.rows)

    @cached_property
    def micro_batch_tokens(self) -> int:
        """Tokens in a forward pass where rows are laid behind each other; no less than the longest row has."""
        return _micro_batch_tokens(self.recipe.training, self.row_lengths)

    def summary(self) -> dict[str, Any]:
        """The plan as JSON-able data: what is printed, and what ``run.json`` keeps."""
        return summary_of(self)


def row_lengths(split: Split, rows: Rows) -> list[int]:
    """Tokens in each row of a split."""
    return [sum(len(split.examples[index].input_ids) for index in row) for row in rows]


def make_rows(split: Split, recipe: Recipe) -> Rows:
    """Share rows between examples where the recipe packs, else give each its own."""
    if not recipe.packing:
        return tuple((index,) for index in range(len(split.examples)))
    lengths = [len(example.input_ids) for example in split.examples]
    return tuple(tuple(row) for row in pack(lengths, recipe.data.max_length))


def resolve(
    recipe: Recipe,
    *,
    world_size: int = 1,
    sizes: Path | None = None,
    engine: EngineChoice = DDP,
    target: Device | None = None,
) -> Plan:
    """Decide everything that needs no weights.

    Args:
        recipe: What to run.
        world_size: Processes that share an update.
        sizes: A directory whose ``config.json`` gives the model's sizes instead of the recipe's model, to plan
            for a model that is not there; its tokens are counted with the tokenizer of the recipe's.
        engine: How the processes share an update.
        target: A CUDA device to plan for instead of the one here.

    Raises:
        ModelError: The configuration or the tokenizer cannot be read, or a target matches nothing.
        DataError: The data cannot be read or cannot be trained on.
        FtuneError: The engine cannot run this recipe.
    """
    device = choose_device()
    require_engine(recipe, engine)
    dtype = choose_dtype(recipe.model.dtype, device, target)
    slower = slower_here(recipe, device, target)
    packing = recipe.data.packing
    recipe = written_out(recipe, dtype)
    recipe = recipe.model_copy(update={"model": pin_model(recipe.model)})
    notes: tuple[str, ...] = ()
    if sizes is None:
        recipe = as_stored(recipe, load_config(recipe.model))
        require_engine(recipe, engine)
        check_causal(recipe.model)
        notes = check_weights(recipe.model, download=False)
        check_generation(recipe.model)
    sized = recipe.model
    if sizes is not None:
        sized = sized.model_copy(update={"id": str(sizes), "gguf_file": None, "revision": None})
    config = configured(sized, recipe.method)
    built = build_on_meta(config, trust_remote_code=recipe.model.trust_remote_code)
    shape = shape_of(built)
    recipe, chosen = _settled_by_architecture(recipe, packing, config, built)
    notes += _left_out(recipe, shape)
    tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
    if sizes is None:
        require_rows(tokenizer, built, recipe.model.id)
    splits = load_splits(recipe.data, tokenizer, recipe.training.seed)
    if splits.train.format in ("messages", "sharegpt"):
        notes += tuple(markers_without_token(tokenizer, recipe.model.id))
    recipe = recipe.model_copy(update={"data": pin_data(recipe.data, splits)})
    if recipe.evaluation.metrics and splits.eval is not None and splits.eval.format == "text":
        raise DataError(
            "evaluation.metrics compare answers, and held-out rows of format `text` have none",
            help="leave out evaluation.metrics: loss and perplexity are measured anyway",
        )
    rows = make_rows(splits.train, recipe)
    eval_rows = make_rows(splits.eval, recipe) if splits.eval else ()
    longest_row = max(row_lengths(splits.train, rows) + (row_lengths(splits.eval, eval_rows) if splits.eval else []))
    check_positions(config, sized.id, longest_row, recipe.method.virtual_positions)
    notes += beyond_context(config, max(split.stats.longest for split in (splits.train, splits.eval) if split))

    schedule = recipe.schedule
    length = choose_length(
        recipe.training,
        len(rows),
        world_size,
        fill=splits.train.stats.tokens / (len(rows) * recipe.data.max_length),
        one_pass=recipe.method.updates_in_backward,
    )
    training, total_steps = length.training, length.total_steps
    rate, rate_chosen = choose_rate(recipe, total_steps)
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": rate})
    recipe = recipe.model_copy(update={"training": training, "optimizer": optimizer})
    global_batch = training.micro_batch_size * training.accumulation * world_size
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * total_steps)

    lengths = row_lengths(splits.train, rows)

    context = context_of(
        recipe,
        device,
        dtype,
        total_steps=total_steps,
        world_size=world_size,
        tokenizer=tokenizer,
        row_lengths=lengths,
    )
    _refuse(recipe, config, shape, context)

    fp32_on_cuda = dtype.itemsize == 4 and (target is not None or device.type == "cuda")
    flat = not fp32_on_cuda and _needs_no_mask(recipe, shape, longest=max(map(len, splits.train.examples)))
    flat = flat and may_keep_apart(config, recipe)
    # Tried here only: of a device that is not, it is taken for granted.
    fused = target is not None or device.type != "cuda" or _has_fused()

    targets = [sum(splits.train.examples[index].target_tokens for index in row) for row in rows]
    batching = Batching(
        steps=total_steps,
        global_batch=global_batch,
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=_micro_batch_tokens(training, lengths),
        flat=flat,
        by_length=not (recipe.packing or flat),
        seed=training.seed,
        world=world_size,
    )
    shapes = shapes_of(lengths, targets, batching)

    longest = padded_length(max(lengths))
    regrouped = 0  # tokens of a forward pass for which the rows of an update are laid behind each other
    if flat:
        update = training.micro_batch_size * training.accumulation * max(lengths)
        regrouped = shapes.most_tokens or padded_length(min(_micro_batch_tokens(training, lengths), update))

    request = Request(
        method=recipe.method,
        shape=shape,
        optimizer=recipe.optimizer.name,
        dtype_bytes=dtype.itemsize,
        rows=1 if regrouped else training.micro_batch_size,
        length=regrouped or longest,
        target_tokens=shapes.most_targets or regrouped or training.micro_batch_size * max(targets),
        recomputed_blocks=0,
        attention=recipe.model.attention,
        device_type="cuda" if target else device.type,
        packed=any(len(row) > 1 for row in rows),
        engine=engine.name,
        processes=world_size,
        fused_loss=fused,
        row_shapes=shapes.different,
        longest=longest if flat else None,
    )

    def predicted(recomputed_blocks: int) -> MemoryEstimate:
        return estimate(replace(request, recomputed_blocks=recomputed_blocks))

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    # The least of all processes: they recompute the same blocks, which ZeRO-3 gathers again.
    available = (
        on_empty_gpu(target.memory) if target else least_of_all(available_bytes(device.type, processes=local), device)
    )
    recomputed = choose_blocks(
        training.gradient_checkpointing,
        shape.layers,
        needed=lambda blocks: predicted(blocks).total,
        budget=certain(_budget(recipe, available)),
        recomputable=recipe.method.recomputable,
    )
    training = training.model_copy(update={"gradient_checkpointing": written(recomputed)})
    return Plan(
        recipe=recipe.model_copy(update={"training": training}),
        tokenizer=tokenizer,
        splits=splits,
        rows=rows,
        eval_rows=eval_rows,
        world_size=world_size,
        steps_per_epoch=length.steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=min(warmup, total_steps),
        shape=shape,
        context=replace(context, recomputed_blocks=recomputed.blocks),
        memory=predicted(recomputed.blocks),
        available=available,
        recomputed=recomputed,
        may_lie_flat=flat,
        sizes=sizes,
        engine=engine,
        target=target,
        choices=length.choices + rate_chosen + chosen,
        slower=slower,
        notes=notes,
        fingerprint=None if sizes is not None else fingerprint(recipe.model),
        text=Text(None, None) if sizes is not None else text_fingerprint(recipe.model, recipe.data.chat_template),
    )


def _settled_by_architecture(
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


def _refuse(recipe: Recipe, config: Any, shape: ModelShape, context: Context) -> None:
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


def _left_out(recipe: Recipe, shape: ModelShape) -> tuple[str, ...]:
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


def written_out(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """The recipe with every value in place that needs no data, so that it means the same on another machine."""
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")}),
            "method": recipe.method.resolved(),
            "data": recipe.data.model_copy(update={"packing": recipe.packing}),
        }
    )


def context_of(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, *, total_steps: int = 1, **counted: Any
) -> Context:
    """What the recipe's method may know; ``counted`` are further fields of the context."""
    located = locate_model(recipe.model)
    return Context(
        total_steps=total_steps,
        seed=recipe.training.seed,
        dtype=dtype,
        device=device,
        base_name=located.public_name,
        revision=located.revision,
        max_length=recipe.data.max_length,
        **counted,
    )


def build(plan: Plan) -> tuple[nn.Module, Optimizer]:
    """Load the base model, let the method adapt it, and make its optimizer.

    Raises:
        ModelError: The weights cannot be read or do not fit the method.
    """
    import torch

    recipe, context = plan.recipe, plan.context
    device = torch.device("cpu") if plan.through_host else context.device
    base = load_base(recipe.model, recipe.method, context.dtype, device)
    require_finite(base, recipe.model.id)
    model = recipe.method.adapt(base, context)
    if context.recomputed_blocks:
        enable_checkpointing(model, context.recomputed_blocks)
    return model, recipe.method.optimizer(model, recipe.optimizer)


def _needs_no_mask(recipe: Recipe, shape: ModelShape, longest: int) -> bool:
    """Whether attention over documents of at most ``longest`` tokens behind each other takes no mask."""
    window = shape.extra.get("sliding_window")
    masked = (window is not None and window < longest) or shape.extra.get("attention_dropout")
    attention = recipe.model.attention
    return recipe.method.packable and attention == recipe.method.attention(attention) == "sdpa" and not masked


def _micro_batch_tokens(training: TrainingSpec, lengths: Sequence[int]) -> int:
    longest = max(lengths)
    return max(training.micro_batch_tokens or training.micro_batch_size * longest, longest)


def _has_fused() -> bool:
    from ftune.ops.kernels import has_fused

    return has_fused()


def _budget(recipe: Recipe, available: int) -> int:
    gib = recipe.training.memory_gib
    return available if gib is None else int(gib * 2**30)
