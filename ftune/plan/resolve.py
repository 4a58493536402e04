"""The one ordered construction: tokenizer, data, total steps, then memory.

The order is fixed because later parts need earlier ones: a method may need the total number of steps before it
can wrap the model (AdaLoRA), and the steps are known once the data is tokenized and packed. No weights are needed
here; ``ftune.plan.build`` loads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.data.batches import padded_length
from ftune.data.splits import Splits
from ftune.data.tokenize import load_splits
from ftune.errors import DataError
from ftune.memory.advice import certain
from ftune.memory.estimate import estimate
from ftune.memory.kernels import Batching, shapes_of
from ftune.memory.request import Request
from ftune.methods import Context, ModelShape
from ftune.plan.architecture import left_out, needs_no_mask, refuse, settled_by_architecture
from ftune.plan.base_model import check_causal, check_weights, configured, load_config, load_tokenizer
from ftune.plan.defaults import Choice, choose_length, choose_rate
from ftune.plan.documents import may_keep_apart
from ftune.plan.engine import DDP, EngineChoice, require_engine
from ftune.plan.fingerprint import Text, fingerprint, text_fingerprint
from ftune.plan.generation import check_generation
from ftune.plan.machine import Machine
from ftune.plan.pinned import pin_data, pin_model
from ftune.plan.plan import Plan, Rows, budget_of, make_rows, row_lengths, tokens_at_once
from ftune.plan.positions import beyond_context, check_positions
from ftune.plan.quantized import as_stored
from ftune.plan.recompute import choose_blocks, written
from ftune.plan.shapes import build_on_meta, shape_of
from ftune.plan.slow import slower_on
from ftune.plan.tokens import markers_without_token, require_rows
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["context_of", "resolve", "written_out"]


@dataclass(frozen=True)
class _Base:
    """The base model without its weights, and the recipe as it settles it."""

    recipe: Recipe
    config: Any
    shape: ModelShape
    tokenizer: Any
    name: str
    choices: tuple[Choice, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    """Tokenized rows, and the recipe with what they settle."""

    recipe: Recipe
    splits: Splits
    rows: Rows
    eval_rows: Rows
    lengths: list[int]
    notes: tuple[str, ...]

    @property
    def targets(self) -> list[int]:
        """Tokens in the loss, of each training row."""
        examples = self.splits.train.examples
        return [sum(examples[index].target_tokens for index in row) for row in self.rows]


@dataclass(frozen=True)
class _Length:
    """How many updates there are, and the recipe with what that settles."""

    recipe: Recipe
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    choices: tuple[Choice, ...]


def resolve(
    recipe: Recipe,
    *,
    world_size: int = 1,
    sizes: Path | None = None,
    engine: EngineChoice = DDP,
    machine: Machine | None = None,
) -> Plan:
    """Decide everything that needs no weights.

    Args:
        recipe: What to run.
        world_size: Processes that share an update.
        sizes: A directory whose ``config.json`` gives the model's sizes instead of the recipe's model, to plan
            for a model that is not there; its tokens are counted with the tokenizer of the recipe's.
        engine: How the processes share an update.
        machine: What to plan for. None: the machine here, which is then asked.

    Raises:
        ModelError: The configuration or the tokenizer cannot be read, or a target matches nothing.
        DataError: The data cannot be read or cannot be trained on.
        FtuneError: The engine cannot run this recipe.
    """
    require_engine(recipe, engine)
    machine = machine or Machine.here()
    dtype = machine.dtype(recipe.model.dtype)
    slower = slower_on(machine, recipe)
    base = _read_base(recipe, dtype, sizes, engine)
    data = _read_data(base)
    length = _choose_length(data, world_size)
    recipe = length.recipe
    context = context_of(
        recipe,
        machine.device,
        dtype,
        total_steps=length.total_steps,
        world_size=world_size,
        tokenizer=base.tokenizer,
        row_lengths=data.lengths,
    )
    refuse(recipe, base.config, base.shape, context)
    examples = data.splits.train.examples
    flat = not (dtype.itemsize == 4 and machine.device.type == "cuda")
    flat = flat and needs_no_mask(recipe, base.shape, longest=max(map(len, examples)))
    flat = flat and may_keep_apart(base.config, recipe)
    request = _memory_request(recipe, base.shape, data, context, flat=flat)
    request = replace(request, engine=engine.name, fused_loss=machine.fused_loss)
    recomputed = choose_blocks(
        recipe.training.gradient_checkpointing,
        base.shape.layers,
        needed=lambda blocks: estimate(replace(request, recomputed_blocks=blocks)).total,
        budget=certain(budget_of(recipe, machine)),
        recomputable=recipe.method.recomputable,
    )
    training = recipe.training.model_copy(update={"gradient_checkpointing": written(recomputed)})
    return Plan(
        recipe=recipe.model_copy(update={"training": training}),
        tokenizer=base.tokenizer,
        splits=data.splits,
        rows=data.rows,
        eval_rows=data.eval_rows,
        world_size=world_size,
        steps_per_epoch=length.steps_per_epoch,
        total_steps=length.total_steps,
        warmup_steps=length.warmup_steps,
        shape=base.shape,
        context=replace(context, recomputed_blocks=recomputed.blocks),
        machine=machine,
        memory=estimate(replace(request, recomputed_blocks=recomputed.blocks)),
        recomputed=recomputed,
        may_lie_flat=flat,
        sizes=sizes,
        engine=engine,
        choices=length.choices + base.choices,
        slower=slower,
        notes=base.notes + data.notes,
        fingerprint=None if sizes is not None else fingerprint(recipe.model),
        text=Text(None, None) if sizes is not None else text_fingerprint(recipe.model, recipe.data.chat_template),
    )


def _read_base(recipe: Recipe, dtype: torch.dtype, sizes: Path | None, engine: EngineChoice) -> _Base:
    """Configuration, sizes and tokenizer of the base, or of the model whose sizes are asked for."""
    packing = recipe.data.packing
    recipe = written_out(recipe, dtype)
    recipe = recipe.model_copy(update={"model": pin_model(recipe.model)})
    notes: tuple[str, ...] = ()
    sized = recipe.model
    if sizes is None:
        recipe = as_stored(recipe, load_config(recipe.model))
        require_engine(recipe, engine)
        check_causal(recipe.model)
        notes = check_weights(recipe.model, download=False)
        check_generation(recipe.model)
    else:
        sized = sized.model_copy(update={"id": str(sizes), "gguf_file": None, "revision": None})
    config = configured(sized, recipe.method)
    built = build_on_meta(config, trust_remote_code=recipe.model.trust_remote_code)
    shape = shape_of(built)
    recipe, choices = settled_by_architecture(recipe, packing, config, built)
    tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
    if sizes is None:
        require_rows(tokenizer, built, recipe.model.id)
    return _Base(recipe, config, shape, tokenizer, sized.id, choices, notes + left_out(recipe, shape))


def _read_data(base: _Base) -> _Data:
    """The splits, tokenized and packed, within the positions that the model has."""
    recipe = base.recipe
    splits = load_splits(recipe.data, base.tokenizer, recipe.training.seed)
    notes: tuple[str, ...] = ()
    if splits.train.format in ("messages", "sharegpt"):
        notes = tuple(markers_without_token(base.tokenizer, recipe.model.id))
    recipe = recipe.model_copy(update={"data": pin_data(recipe.data, splits)})
    if recipe.evaluation.metrics and splits.eval is not None and splits.eval.format == "text":
        raise DataError(
            "evaluation.metrics compare answers, and held-out rows of format `text` have none",
            help="leave out evaluation.metrics: loss and perplexity are measured anyway",
        )
    rows = make_rows(splits.train, recipe)
    eval_rows = make_rows(splits.eval, recipe) if splits.eval else ()
    lengths = row_lengths(splits.train, rows)
    longest_row = max(lengths + (row_lengths(splits.eval, eval_rows) if splits.eval else []))
    check_positions(base.config, base.name, longest_row, recipe.method.virtual_positions)
    notes += beyond_context(base.config, max(split.stats.longest for split in (splits.train, splits.eval) if split))
    return _Data(recipe, splits, rows, eval_rows, lengths, notes)


def _choose_length(data: _Data, world_size: int) -> _Length:
    """Updates, warm-up and learning rate, where the recipe leaves them open."""
    recipe, rows = data.recipe, len(data.rows)
    length = choose_length(
        recipe.training,
        rows,
        world_size,
        fill=data.splits.train.stats.tokens / (rows * recipe.data.max_length),
        one_pass=recipe.method.updates_in_backward,
    )
    rate, rate_chosen = choose_rate(recipe, length.total_steps)
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": rate})
    recipe = recipe.model_copy(update={"training": length.training, "optimizer": optimizer})
    warmup = recipe.schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(recipe.schedule.warmup_ratio * length.total_steps)
    return _Length(
        recipe,
        length.steps_per_epoch,
        length.total_steps,
        min(warmup, length.total_steps),
        length.choices + rate_chosen,
    )


def _memory_request(recipe: Recipe, shape: ModelShape, data: _Data, context: Context, *, flat: bool) -> Request:
    """The memory of the run's largest micro-batch, on one process of DDP.

    flat: Whether the rows of a micro-batch are concatenated.
    """
    training, lengths, targets = recipe.training, data.lengths, data.targets
    batching = Batching(
        steps=context.total_steps,
        global_batch=training.micro_batch_size * training.accumulation * context.world_size,
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=tokens_at_once(training, lengths),
        flat=flat,
        by_length=not (recipe.packing or flat),
        seed=training.seed,
        world=context.world_size,
    )
    shapes = shapes_of(lengths, targets, batching)
    longest = padded_length(max(lengths))
    concatenated = 0  # tokens of a forward pass for which the rows of an update are concatenated
    if flat:
        update = training.micro_batch_size * training.accumulation * max(lengths)
        concatenated = shapes.most_tokens or padded_length(min(batching.micro_batch_tokens, update))
    return Request(
        method=recipe.method,
        shape=shape,
        optimizer=recipe.optimizer.name,
        dtype_bytes=context.dtype.itemsize,
        rows=1 if concatenated else training.micro_batch_size,
        length=concatenated or longest,
        target_tokens=shapes.most_targets or concatenated or training.micro_batch_size * max(targets),
        recomputed_blocks=0,
        attention=recipe.model.attention,
        device_type=context.device.type,
        packed=any(len(row) > 1 for row in data.rows),
        processes=context.world_size,
        row_shapes=shapes.different,
        longest=longest if flat else None,
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
