"""Merge a synthetic model of 8 GB under a limit of 2 GiB, and say what was limited and what was measured.

    python scripts/merge_large.py DIRECTORY            # needs 17 GB of disk; what it made is deleted afterwards

The model is a Llama of random bf16 weights in shards of at most 1 GB, the run a LoRA of rank 16 on all of its
projections. ``ftune merge --by-shard`` runs in a process of its own under ``RLIMIT_DATA``: the kernel refuses it
more private writable memory than that, heap and anonymous maps alike. Its peak resident memory, shared libraries
and all, is measured as ``ru_maxrss``. Files are read and written through the page cache, which belongs to no process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.tensor_files import plan_shards, write_shards
from ftune.methods import Context
from ftune.methods.lora import Lora
from ftune.plan.stored import hollow_base
from ftune.recipe.load import parse_recipe

SHARD_BYTES = 1_000_000_000
RANK = 16


def make_base(out: Path, layers: int) -> int:
    """Write the model; returns its bytes."""
    out.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(out)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(out)
    from ftune.recipe.schema import ModelSpec

    model = hollow_base(ModelSpec(id=str(out)), Lora())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    random = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return (torch.rand(shapes[name], generator=random) - 0.5).mul_(0.07).bfloat16()

    write_shards(out, plan_shards(shapes, 2, SHARD_BYTES), torch.bfloat16, make)
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def make_run(out: Path, base: Path) -> int:
    """Write a finished LoRA run whose B is random; returns the adapter's bytes."""
    recipe = {
        "model": {"id": str(base)},
        "method": {"name": "lora", "rank": RANK, "alpha": 2 * RANK},
        "data": {"train": str(base / "none.jsonl")},
        "output_dir": str(out),
    }
    resolved = parse_recipe(json.dumps(recipe), "recipe.json").recipe
    (out / "adapter").mkdir(parents=True)
    context = Context(total_steps=1, seed=0, dtype=torch.bfloat16, device=torch.device("cpu"), base_name="random")
    adapted = resolved.method.adapt(hollow_base(resolved.model, resolved.method), context)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    resolved.method.save(adapted, out / "adapter", context)
    RunDir(out).write({"resolved": resolved.model_dump(mode="json"), "status": "finished"})
    return sum(file.stat().st_size for file in (out / "adapter").iterdir())


def largest_error(base: Path, run: Path, name: str) -> float:
    """Largest difference of one written weight from ``W + 2 B A``, as a share of its largest element."""

    def read(directory: Path, key: str) -> torch.Tensor:
        for file in directory.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                if key in opened.keys():  # noqa: SIM118
                    return opened.get_tensor(key).double()
        raise KeyError(key)

    a, b = (read(run / "adapter", f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
    expected = read(base, f"{name}.weight") + 2 * b @ a
    found = read(run / "merged", f"{name}.weight")
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    """Make, merge, measure, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    arguments = parser.parse_args()
    root: Path = arguments.directory / "merge-large"
    root.mkdir(parents=True)
    try:
        base_bytes = make_base(root / "base", arguments.layers)
        adapter_bytes = make_run(root / "run", root / "base")
        limit = int(arguments.limit_gib * 2**30)
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ftune", "merge", str(root / "run"), "--by-shard", "--dtype", "bfloat16", "--json"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:] + done.stdout[-500:])
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads(done.stdout)
        figures = {
            "base_bytes": base_bytes,
            "adapter_bytes": adapter_bytes,
            "RLIMIT_DATA": limit,
            "peak_resident_bytes": peak,
            "seconds": round(time.monotonic() - begun, 1),
            "merged_bytes": report["bytes"],
            "shards": report["shards"],
            "layers_compared": report["layers_compared"],
            "merge_error": report["merge_error"],
            "written_vs_adapter": report["written_vs_adapter"],
            "base_vs_adapter": report["base_vs_adapter"],
            "one_weight_by_hand": largest_error(root / "base", root / "run", "model.layers.3.mlp.down_proj"),
        }
        print(json.dumps(figures, indent=2))
        if not peak < limit or not figures["one_weight_by_hand"] < 2**-8:
            sys.exit("failed: the peak is above the limit, or a written weight is not W + 2 B A")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
