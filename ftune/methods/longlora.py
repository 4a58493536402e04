"""LongLoRA: LoRA for longer rows, by shifted sparse attention and trained embeddings and norms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field

from ftune.errors import ModelError
from ftune.methods import _context, _s2
from ftune.methods._low_rank import LowRank
from ftune.methods._vitals import never_pulled
from ftune.methods.types import Context, ModelShape, Problem, RecipeView
from ftune.models.language import in_language_model, language_prefixes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["LongLora"]

_ATTENTION = r".*(attn|attention)\.[^.]+"


class LongLora(LowRank):
    """LoRA on attention, whole embeddings and norms, over S2-Attn (Chen et al., arXiv:2309.12307)."""

    paper: ClassVar[str] = "arXiv:2309.12307"
    summary: ClassVar[str] = "LoRA, embeddings, norms; attention in shifted groups"
    formula: ClassVar[str] = "h = W x + (alpha/r) B A x; half of the heads attend in groups shifted by half a group"
    typical_share: ClassVar[str] = "2.1 %"
    choose: ClassVar[str] = "Rows of many thousand tokens, or a longer context than the base has (`context_length`)."
    avoid: ClassVar[str] = "Rows of up to about 2,000 tokens: attention costs little there, and LoRA trains exactly."
    cost: ClassVar[str] = "Attention at a quarter of its scores; embeddings add their size in weights, gradient, state."
    evidence: ClassVar[str] = (
        "Made for longer contexts: in its paper close to full fine-tuning there (arXiv:2309.12307, sec. 3.3), which "
        "plain LoRA was not."
    )
    composes: ClassVar[str] = "4-bit bases, packing, checkpointing, tied embeddings; merges exactly. `sdpa` only."
    not_lora_because: ClassVar[str] = (
        "trained embeddings and norms are no low-rank update (use `ftune merge`); without them it is plain LoRA"
    )
    few_updates_factor: ClassVar[float] = 2.5
    quantizable: ClassVar[bool] = True

    name: Literal["longlora"] = Field("longlora", description="LoRA with shifted sparse attention.")
    rank: int = Field(8, ge=1, description="Rank of the update.")
    target_modules: str | tuple[str, ...] = Field(
        _ATTENTION,
        description="all-linear, a list of module names (a suffix is enough: q_proj), or a regular expression "
        "matched against the whole name. Default: every projection of the attention.",
    )
    group_size: int | None = Field(
        None,
        ge=2,
        multiple_of=2,
        description="Tokens in a group of attention while training. Default: a quarter of data.max_length.",
    )
    train_embeddings: bool = Field(True, description="Train the input embedding whole (and a head tied to it).")
    train_norms: bool = Field(True, description="Train every norm.")
    context_length: int | None = Field(
        None, ge=8, description="Extend the model's context to this many tokens. Default: as it is."
    )
    rope: _context.Scaling | None = Field(
        None,
        description="How rotary positions are scaled to context_length: linear (the paper's), yarn "
        "(arXiv:2309.00071), or none. Default: linear.",
    )

    # --- checks ---

    def resolved(self) -> Self:
        """With alpha and the scaling written out."""
        rope = (self.rope or "linear") if self.context_length else None
        return super().resolved().model_copy(update={"rope": rope})

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield another attention, rows that are never longer than a group, and a scaling without a length."""
        yield from super().problems(recipe)
        attention, max_length = recipe.model.attention, recipe.data.max_length
        if attention not in ("auto", "sdpa"):
            yield Problem(
                ("model", "attention"),
                f"`longlora` brings its own attention, which computes as sdpa does; `{attention}` has no groups",
                "leave out `attention`",
            )
        if self.group_size is not None and self.group_size >= max_length:
            yield Problem(
                ("method", "group_size"),
                f"no row is longer than a group: data.max_length is {max_length}, so nothing would be shifted",
                f"use {_quarter(max_length)}, a quarter of a row",
            )
        if self.context_length is not None and max_length > self.context_length:
            yield Problem(
                ("data", "max_length"),
                f"rows of {max_length} tokens do not fit a context of {self.context_length}",
                "raise `context_length`, or lower data.max_length",
            )
        if self.rope is not None and self.context_length is None:
            yield Problem(
                ("method", "rope"), "`rope` scales positions to `context_length`, which is not given", "give both"
            )

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield capped attention scores, and rows beyond the context of a base that is not extended."""
        if shape.extra.get("softcap"):
            yield Problem(
                ("method",),
                f"{shape.model_type} caps its attention scores, which attention in groups cannot do",
                "use `method: lora` with `attention: eager`",
            )
        group = self.group_size or _quarter(context.max_length)
        longest_row = max(context.row_lengths, default=group + 1)
        if longest_row <= group:
            yield Problem(
                ("method", "group_size"),
                f"no row is longer than a group: the longest has {longest_row} tokens, a group {group}, so nothing "
                "would be shifted",
                f"set `group_size: {_quarter(longest_row)}`, or train on longer rows (data.packing)",
            )
        longest = shape.extra.get("max_positions")
        if longest and context.max_length > longest:
            yield Problem(
                ("data", "max_length"),
                f"rows of {context.max_length} tokens, and the context of this model is {longest}",
                f"set `context_length: {context.max_length}` to extend it, or lower data.max_length",
            )

    def remarks(self, context: Context) -> Iterator[str]:
        """Yield that few rows are long enough to be shifted."""
        group = self.group_size or _quarter(context.max_length)
        long = sum(length > group for length in context.row_lengths)
        if 2 * long < len(context.row_lengths):
            yield f"only {long} of {len(context.row_lengths)} rows are longer than a group of {group} tokens"

    # --- building ---

    def attention(self, requested: str) -> str:
        """S2-Attn in place of ``sdpa``."""
        return _s2.register() if requested == "sdpa" else requested

    def configure(self, config: Any) -> None:
        """Extend the context where the recipe asks for it."""
        if self.context_length is not None:
            _context.extend(config, self.context_length, self.rope or "linear")

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Attach A and B, train embedding and norms in fp32 copies, and group every attention layer.

        Raises:
            ModelError: A target matches nothing, attention is not causal, or a tied head came loose.
        """
        whole = cast(Any, model)
        tied, names = _is_tied(whole), self.trained_whole(model)["modules_to_save"]
        adapted = super().adapt(model, context)
        # PEFT takes the tied head off the list, and without it would not tie again when it loads the adapter.
        cast(Any, adapted).peft_config["default"].modules_to_save = names
        if tied and not _is_tied(whole):
            raise ModelError(
                f"the output head of {whole.config.model_type} does not stay tied to a trained embedding",
                help="set `train_embeddings: false`",
            )
        if not _s2.mark(adapted, self.group_size or _quarter(context.max_length)):
            raise ModelError(f"{whole.config.model_type} has no causal attention layer of transformers' form")
        return adapted

    def trained_whole(self, model: nn.Module) -> dict[str, Any]:
        """The embedding and the norms, by the shortest names that mean exactly them."""
        whole, prefixes = cast(Any, model), language_prefixes(model)
        names = {module: name for name, module in model.named_modules()}
        norms = {name for name, module in model.named_modules() if self.train_norms and _is_norm(module)}
        wanted = {name for name in norms if in_language_model(name, prefixes)}
        tied = self.train_embeddings and _is_tied(whole)
        if self.train_embeddings:
            wanted.add(names[whole.get_input_embeddings()])
        if tied:
            # PEFT ties by the head's name where it does not know the embedding's.
            wanted.add(names[whole.get_output_embeddings()])
        leaves = {name.rpartition(".")[2] for name in wanted}
        # PEFT takes every module whose name ends so.
        exact = wanted == {name for name in names.values() if name.endswith(tuple(leaves))} if leaves else True
        return {"modules_to_save": sorted(leaves if exact else wanted) or None, "ensure_weight_tying": tied}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Only A and B decay: zero is the neutral value of neither an embedding nor a norm."""
        return "modules_to_save" not in name and super().decays(name, parameter)

    # --- vitals ---

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What every attention layer counted."""
        import torch

        counts = [[groups.rows, groups.shifted, groups.groups] for groups in _s2.groups_of(model)]
        return {"s2_counts": torch.tensor(counts, dtype=torch.int64)}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Count on from a checkpoint."""
        for groups, counts in zip(_s2.groups_of(model), state["s2_counts"].tolist(), strict=True):
            groups.rows, groups.shifted, groups.groups = counts

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """LoRA's vitals, what attention did in groups, and how far embedding and norms moved."""
        from ftune.ops.s2_attention import shifted_heads

        layers = _s2.groups_of(model)
        text = cast(Any, model).config.get_text_config()
        found = super().vitals(model, optimizer) | {
            "group_size": float(layers[0].size),
            "heads_shifted": float(shifted_heads(text.num_attention_heads)),
            "layers_shifted": float(sum(layer.shifted > 0 for layer in layers)),
            "row_passes": float(layers[0].rows),
            "row_passes_shifted": float(min(layer.shifted for layer in layers)),
            "groups_per_row": layers[0].groups / max(1, layers[0].shifted),
            "context_length": float(text.max_position_embeddings),
        }
        changes = [(before, (now - before).square()) for before, now in _trained_copies(model, optimizer)]
        embedding = [(b, c) for b, c in changes if b.ndim > 1]
        norms = [float(c.mean().sqrt()) for b, c in changes if b.ndim == 1]
        if embedding:
            found["embedding_change"] = float((embedding[0][1].sum() / embedding[0][0].square().sum()).sqrt())
        if norms:
            found["norm_change_mean"] = sum(norms) / len(norms)
            found["norm_change_min"] = min(norms)
        return found

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """Rows that were never longer than a group, an embedding or norm that stayed, or LoRA's reason."""
        if not vitals["row_passes_shifted"] > 0:
            return (
                f"no row was longer than a group of {vitals['group_size']:.0f} tokens, so nothing was shifted; "
                "raise data.max_length or lower group_size"
            )
        if not vitals.get("embedding_change", 1) > 0:
            return "the embedding is still the base's"
        if not vitals.get("norm_change_min", 1) > 0:
            return "a norm is still the base's"
        return super().not_at_work(vitals)

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        line = (
            f"{vitals['row_passes_shifted']:.0f} of {vitals['row_passes']:.0f} row passes shifted, "
            f"{vitals['groups_per_row']:.3g} groups a row; "
        )
        if "embedding_change" in vitals:
            line += f"embedding moved {vitals['embedding_change']:.2%}, "
        if "norm_change_mean" in vitals:
            line += f"norms by {vitals['norm_change_mean']:.2g}, "
        return line + f"norm of B {vitals['lora_b_norm_mean']:.3g}"

    # --- what it leaves behind ---

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter, and beside it the positions it needs where the context was extended."""
        super().save(model, out, context)
        if self.context_length is not None:
            _context.save_positions(cast(Any, model).config, out)

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Attach a saved adapter to a base with the positions it was trained on."""
        _context.require_positions(cast(Any, base).config, directory)
        return _restore_whole(super().load(base, directory, context), directory)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """Add the update to the weights, put embedding and norms in their place, and attend as sdpa does."""
        merged = super().merge(model, context)
        whole = cast(Any, merged)
        head = whole.get_output_embeddings()
        # PEFT makes the head of a tied model anew with its two sizes exchanged.
        head.out_features, head.in_features = head.weight.shape
        whole.tie_weights()
        whole.set_attn_implementation("sdpa")
        return merged

    # --- arithmetic ---

    def trainable_parameters(self, shape: ModelShape) -> int:
        """LoRA's, the embedding, and the norms."""
        whole = shape.embedding * self.train_embeddings + shape.norms * self.train_norms
        return super().trainable_parameters(shape) + whole

    def gradient_bytes(self, shape: ModelShape) -> int:
        """All, and of a tied embedding the head's part, which waits whole until the embedding's own is there."""
        waiting = 4 * shape.embedding if self.train_embeddings and not shape.head else 0
        return super().gradient_bytes(shape) + waiting

    @property
    def trains_head(self) -> bool:
        """A tied head is the embedding."""
        return self.train_embeddings

    def mask_cells(self, length: int, packed: bool) -> int:
        """Only the blocks on the diagonal: of every group, on either half of the heads."""
        return 0 if not packed else min(length**2, 2 * length * (self.group_size or _quarter(length)))

    def stream_bytes(self, stored: int) -> int:
        """fp32 where the embedding trains, which is fp32 then."""
        return 4 if self.train_embeddings else stored

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """LoRA's, the residual stream in fp32, and attention's operands once more as groups and beside each other.

        Keys and values are counted for every query head, as under a mask; without one they may be shared. In 16 bits
        the projections read a cast copy of a norm's output.
        """
        fp32_residual = self.train_embeddings or self.train_norms
        norms = (4 - dtype_bytes) * shape.extra["norm_width"] * fp32_residual
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        copies = (4 if dtype_bytes < 4 else 3) * query - 2 * key
        return int(super().saved_bytes_per_token(shape, dtype_bytes) + norms + dtype_bytes * shape.layers * copies)


def _quarter(length: int) -> int:
    """A quarter of a row in whole, even tokens (the paper's share)."""
    return max(2, length // 8 * 2)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def _is_tied(model: Any) -> bool:
    """Whether the output head multiplies with the input embedding itself."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _restore_whole(model: nn.Module, directory: Path) -> nn.Module:
    """Take what was trained whole from the file again, in fp32: PEFT rounds it to the dtype of the base."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
    from safetensors.torch import load_file

    stored = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, parameter in cast(Any, module).modules_to_save["default"].named_parameters():
                # In place: a tied head is this very parameter.
                parameter.data = stored[f"{name}.{key}"].to(parameter.device)
    return model


def _trained_copies(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter of the base that is trained whole, in fp32: before and now.

    A tied head is left out, and what never got a gradient but zero: the base multiplies by zero what comes of it.
    """
    from peft.utils import ModulesToSaveWrapper

    from ftune.ops.sharded import whole

    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            now = dict(cast(Any, module).modules_to_save["default"].named_parameters())
            for name, before in cast(Any, module).original_module.named_parameters():
                if id(now[name]) not in seen and not never_pulled(optimizer.state.get(now[name], {})):
                    seen.add(id(now[name]))
                    yield whole(before).detach().float(), now[name].detach().float()
