"""The plan as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ftune.data.notes import notes_of_splits
from ftune.memory.advice import what_to_change
from ftune.memory.sharding import communication, on_host
from ftune.plan.defaults import few_updates, usual_rate
from ftune.plan.duration import duration_of

if TYPE_CHECKING:
    from ftune.plan.plan import Plan

__all__ = ["summary_of"]


def summary_of(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able data: what is printed, and what ``run.json`` keeps."""
    recipe, train, held_out = plan.recipe, plan.splits.train, plan.splits.eval
    training, context, method = recipe.training, plan.context, recipe.method
    trainable = method.trainable_parameters(plan.shape)
    total = plan.shape.parameters + (trainable if method.artifact == "adapter" else 0)
    lengths = plan.row_lengths
    return {
        "model": {
            "id": str(plan.sizes or recipe.model.id),
            "public_name": context.base_name,
            "type": plan.shape.model_type,
            "parameters": plan.shape.parameters,
            "dtype": str(context.dtype).removeprefix("torch."),
            "vocab": plan.shape.vocab,
            "fingerprint": plan.fingerprint,
            **plan.text._asdict(),
        },
        "method": {
            "name": recipe.method.name,
            "artifact": method.artifact,
            "saved_as": method.saved_as,
            "trainable": trainable,
            "share": trainable / total,
            "settings": method.model_dump(mode="json", exclude={"name"}),
        },
        "data": {
            "format": train.format,
            "rows": train.stats.rows,
            "files": len(train.rows.origin),
            "documents": train.rows.origin[0].lower().endswith(".txt"),
            "examples": len(train.examples),
            "tokens": train.stats.tokens,
            "target_tokens": train.stats.target_tokens,
            "truncated": train.stats.truncated,
            "split": train.stats.split,
            "lost_tokens": train.stats.lost_tokens,
            "lost_target_tokens": train.stats.lost_target_tokens,
            "skipped": train.stats.skipped,
            "no_target": train.stats.no_target,
            "ends_with_eos": train.stats.ends_with_eos,
            "max_length": recipe.data.max_length,
            "packing": recipe.packing,
            "rows_packed": len(plan.rows),
            "fill": sum(lengths) / (len(lengths) * recipe.data.max_length),
            "longest": train.stats.longest,
            "eval_rows": held_out.stats.rows if held_out else 0,
            "eval_tokens": held_out.stats.tokens if held_out else 0,
            "repeated": plan.splits.overlap.repeated,
            "eval_also_trained": plan.splits.overlap.whole,
            "eval_prompts_trained": plan.splits.overlap.prompts,
            "fingerprint": train.fingerprint,
            "eval_fingerprint": held_out.fingerprint if held_out else None,
        },
        "training": {
            "steps": plan.total_steps,
            "epochs": plan.total_steps / plan.steps_per_epoch,
            "global_batch": plan.global_batch,
            "micro_batch_size": training.micro_batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "world_size": plan.world_size,
            "learning_rate": recipe.learning_rate,
            "usual_learning_rate": usual_rate(method, plan.total_steps),
            "optimizer": recipe.optimizer.name,
            "schedule": recipe.schedule.name,
            "warmup_steps": plan.warmup_steps,
            "blocks": plan.recomputed.of,
            "recomputed_blocks": plan.recomputed.blocks,
            "recomputed_because": plan.recomputed.why,
            "chosen": [asdict(choice) for choice in plan.choices],
        },
        "time": duration_of(plan),
        "memory": plan.memory.as_dict(),
        **({"ranks": _ranks(plan)} if plan.world_size > 1 else {}),
        "device": {
            "type": plan.machine.device.type,
            "name": plan.machine.name,
            "available": plan.machine.available,
        },
        "budget": plan.budget,
        "fits": plan.fits,
        "tight": plan.tight,
        "advice": _advice(plan),
        "warnings": _warnings(plan),
    }


def _ranks(plan: Plan) -> dict[str, Any]:
    """How many processes share the run, how, and the bytes that each sends in an update."""
    request, loading = plan.memory.request, plan.memory.loading
    sent, host = communication(request, plan.recipe.training.accumulation), on_host(request)
    return {
        "processes": plan.world_size,
        "engine": plan.engine.name,
        "sent_bytes_an_update": sent,
        **({"host_bytes": host} if host else {}),
        **({"loading_bytes": loading, "through_host": plan.through_host} if loading > plan.memory.total else {}),
    }


def _advice(plan: Plan) -> list[str]:
    """What to change where the run does not fit for certain."""
    if plan.fits and not plan.tight:
        return []
    if plan.memory.total > plan.budget or plan.tight:
        return what_to_change(plan.memory, plan.budget, plan.recipe)
    if plan.recipe.method.base_quantization is not None:
        return ["4-bit weights are made on the device, all of them, before they are shared out: take a larger device"]
    return ["--engine fsdp2 reads a base that is too large for one device through the host's memory"]


def _warnings(plan: Plan) -> list[str]:
    """What works, but perhaps not as meant."""
    recipe = plan.recipe
    found = list(plan.notes)
    if plan.sizes is not None:
        found.append(f"sizes only: the tokens are those of {recipe.model.id}'s tokenizer")
    found += notes_of_splits(plan.splits)
    found += recipe.method.remarks(plan.context)
    if recipe.optimizer.weight_decay and not recipe.method.decaying:
        found.append(
            f"optimizer.weight_decay has no effect: what `{recipe.method.name}` trains is not neutral at zero, "
            "and never decays"
        )
    if recipe.optimizer.name.startswith("paged") and plan.context.device.type != "cuda":
        found.append(f"`{recipe.optimizer.name}` pages on CUDA only: here its state stays where it is")
    found += plan.slower
    if recipe.model.trust_remote_code:
        found.append("trust_remote_code is ON: the model's own Python code runs on this machine")
    if not plan.eval_rows:
        found.append(
            "no rows are held out: whether the model gets better at rows it was not trained on will not be known. "
            "`data.eval_fraction: 0.1` holds out a tenth, `data.eval: FILE` names others"
        )
    packed = any(len(row) > 1 for row in plan.rows)
    if few := few_updates(recipe, plan.total_steps, plan.steps_per_epoch, packed=packed):
        found.append(few)
    if plan.warmup_steps >= plan.total_steps and plan.total_steps > 1:
        found.append(f"all {plan.total_steps} steps are warm-up: the learning rate never reaches its peak")
    return found
