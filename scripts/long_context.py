"""Extend a model's context for real, and measure what that gave.

Writes rows of long documents (modules of this Python's standard library; the longest are held out), measures the
perplexity of held-out windows at 1, 2 and 4 times the base's context, trains a recipe with `ftune train`, measures
again, prints a table and writes DIRECTORY/long_context.json.

    python scripts/long_context.py runs/long_context
    python scripts/long_context.py runs/small --base-length 256 --set data.max_length=512 --set training.max_steps=2

One forward pass over the longest window gives every shorter one, since attention is causal: the perplexity at n is
that of its first n tokens. The last column is that of the tokens which only the longest window reaches. Logits are
made for a thousand tokens at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

HEAD_CHUNK = 1024
TRAINING_DOCUMENTS = 20  # each more than 50,000 characters: enough to fill a row of 16,384 tokens


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where rows, the run and the figures go")
    parser.add_argument("--recipe", default="recipes/longlora-extend.yaml")
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 2, 4], help="lengths, in base contexts")
    parser.add_argument("--windows", type=int, default=1, help="held-out documents; one window from each")
    parser.add_argument("--base-length", type=int, help="take this for the base's context (for a quick check)")
    parser.add_argument("--untrained", action="store_true", help="measure the stretched, untrained base too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed to `ftune train`")
    return parser.parse_args(argv)


def documents() -> list[str]:
    """The modules of the standard library that are one file each, the longest first."""
    found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in found]
    return sorted(texts, key=len, reverse=True)


def write_rows(directory: Path, held_out: int) -> None:
    """Write the longest documents to eval.jsonl and the next ones to train.jsonl."""
    texts = documents()
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in (("eval", texts[:held_out]), ("train", texts[held_out : held_out + TRAINING_DOCUMENTS])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def held_out_windows(directory: Path, tokenizer: Any, length: int) -> list[list[int]]:
    """The first ``length`` tokens of every held-out document."""
    windows = []
    for line in (directory / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer(text, verbose=False).input_ids[:length]
        if len(ids) < length:
            sys.exit(f"a held-out document has {len(ids)} tokens, fewer than {length}: ask for fewer --windows")
        windows.append(ids)
    return windows


def token_losses(model: Any, ids: list[int], dtype: Any) -> Any:
    """The loss at every token but the first: (L - 1,), fp32."""
    import torch
    from torch.nn.functional import cross_entropy

    from ftune.run.objective import autocast

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    tokens = torch.tensor(ids, device=device)
    losses = []
    with torch.no_grad(), autocast(dtype, device.type):
        hidden = causal.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
        for start in range(0, len(hidden), HEAD_CHUNK):
            logits = causal.get_output_embeddings()(hidden[start : start + HEAD_CHUNK]).float()
            losses.append(cross_entropy(logits, tokens[start + 1 : start + 1 + len(logits)], reduction="none"))
    return torch.cat(losses)


def measure(model: Any, windows: list[list[int]], lengths: list[int], dtype: Any) -> dict[str, float]:
    """Perplexity of the first n tokens for every length, and of what the longest window adds to the one before."""
    import torch

    began = time.perf_counter()
    losses = torch.stack([token_losses(model.eval(), ids, dtype) for ids in windows])
    found = {str(n): math.exp(float(losses[:, : n - 1].mean())) for n in lengths}
    if len(lengths) > 1:
        found["last"] = math.exp(float(losses[:, lengths[-2] - 1 :].mean()))
    found["seconds"] = time.perf_counter() - began
    print(json.dumps(found), file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    from ftune.artifacts.run_dir import RunDir
    from ftune.artifacts.tuned import load_plain, load_tuned
    from ftune.methods.lora import Lora
    from ftune.plan.base_model import choose_device, load_base, load_config, load_tokenizer
    from ftune.plan.precision import choose_dtype
    from ftune.plan.resolve import resolve
    from ftune.recipe import load_checked

    directory: Path = args.directory
    write_rows(directory, args.windows)
    changes = [f"data.train={directory / 'train.jsonl'}", f"output_dir={directory / 'run'}", *args.set]
    recipe = load_checked(Path(args.recipe), changes)[0].recipe
    base_length = args.base_length or load_config(recipe.model).max_position_embeddings
    lengths = sorted(multiple * base_length for multiple in args.multiples)
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    windows = held_out_windows(directory, load_tokenizer(recipe.model), lengths[-1])

    figures: dict[str, Any] = {"model": recipe.model.id, "base_length": base_length, "lengths": lengths}
    figures["base"] = measure(load_base(recipe.model, Lora(), dtype, device), windows, lengths, dtype)
    began = time.perf_counter()
    command = [sys.executable, "-m", "ftune", "train", args.recipe, "--overwrite", *(f"--set={c}" for c in changes)]
    subprocess.run(command, check=True)
    figures["training_seconds"] = time.perf_counter() - began

    run = RunDir(directory / "run")
    plan = resolve(run.recipe())
    stretched = load_plain(plan)
    if args.untrained:
        figures["stretched, untrained"] = measure(stretched, windows, lengths, dtype)
    figures["tuned"] = measure(load_tuned(stretched, plan, run), windows, lengths, dtype)
    record = run.read()
    figures |= {"settings": record["plan"]["method"]["settings"], "measured": record["measured"]}
    figures |= {"vitals": record["vitals"], "versions": record["versions"], "device": record["device"]}
    (directory / "long_context.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    columns = [*(str(n) for n in lengths), *(["last"] if len(lengths) > 1 else [])]
    titles = [f"first {n:,}" for n in lengths] + [f"{lengths[-2]:,} to {lengths[-1]:,}"] * (len(lengths) > 1)
    print("perplexity".ljust(22) + "".join(title.rjust(18) for title in titles))
    for name in ("base", "stretched, untrained", "tuned"):
        if name in figures:
            print(name.ljust(22) + "".join(f"{figures[name][column]:18.2f}" for column in columns))
    print(record["vitals_line"])


if __name__ == "__main__":
    main()
