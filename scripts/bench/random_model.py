"""Write a model of given sizes with random bfloat16 weights, and a tokenizer, the quickstart's, beside it.

    python scripts/bench/random_model.py SIZES DIRECTORY [CONTEXT [TOKENIZER]]

Time and memory do not depend on what the weights are; losses do, so these say nothing of any real model. Every tensor
is drawn by its own name from the seed, one shard at a time: no more than one shard is in memory. A directory that has
these weights is left as it is, but for the context in its configuration, which is raised to CONTEXT tokens.

Run as a process of its own, so that the one which measures stays small.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import work

STD = 0.02
SEED = 7
SHARD_BYTES = 4 * 2**30
STAMP = "random.json"
WORDS = "words.json"
WORD_COUNT = 2000


def write(
    sizes: Path, directory: Path, context: int = 0, tokenizer_of: str = work.GGUF, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write the model unless it is there.

    Args:
        sizes: A directory with a ``config.json``.
        directory: Where the model goes.
        context: The configuration's context is raised to so many tokens, so that no tool changes its positions.
        tokenizer_of: The model that has the tokenizer, as a recipe's ``model.id``.
        shard_bytes: Largest size of a file of weights, but for one of a single larger tensor.

    Returns:
        What ``random.json`` keeps: the sizes, the parameters, the seed and the standard deviation.

    Raises:
        SystemExit: The vocabulary is smaller than the tokenizer's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from ftune.plan.base_model import load_tokenizer
    from ftune.recipe.schema import ModelSpec

    config = AutoConfig.from_pretrained(sizes)
    tokenizer = load_tokenizer(ModelSpec(id=tokenizer_of))
    if config.vocab_size < len(tokenizer):
        raise SystemExit(f"{sizes}: a vocabulary of {config.vocab_size}, and the tokenizer has {len(tokenizer)} tokens")
    # The special tokens are those of the tokenizer that is there, not of the one that belongs to the sizes.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.max_position_embeddings = max(config.max_position_embeddings, context)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    directory.mkdir(parents=True, exist_ok=True)
    facts = {
        "sizes": json.loads((sizes / "config.json").read_text(encoding="utf-8")),
        "parameters": sum(map(math.prod, shapes.values())),
        "dtype": "bfloat16",
        "std": STD,
        "seed": SEED,
        "drawn_on": _device(),
    }
    stamp = directory / STAMP
    if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != facts:
        stamp.unlink(missing_ok=True)
        for old in directory.glob("*.safetensors"):
            old.unlink()
        _write_weights(shapes, directory, shard_bytes)
        tokenizer.save_pretrained(directory)
        (directory / WORDS).write_text(json.dumps(words(tokenizer)), encoding="utf-8")
        stamp.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    return facts


def _write_weights(shapes: dict[str, tuple[int, ...]], directory: Path, shard_bytes: int) -> None:
    from safetensors.torch import save_file

    files = list(shards(shapes, shard_bytes))
    placed: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # Drawing lets go of the interpreter's lock, and every tensor has a generator of its own.
        with ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))) as pool:
            tensors = dict(zip(names, pool.map(lambda name: draw(name, shapes[name]), names), strict=True))
        save_file(tensors, directory / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(names, file)
        del tensors
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in order, two bytes an element."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if names and filled + size > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    if names:
        yield names


def draw(name: str, shape: tuple[int, ...]) -> Any:
    """One tensor: matrices are normal, norms one and biases zero."""
    import torch

    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16)
    digest = hashlib.blake2b(f"{SEED}/{name}".encode(), digest_size=7).digest()
    device = _device()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest))
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, STD, generator=generator).cpu()


def _device() -> str:
    """Where the numbers are drawn: those of a GPU are others than those of a CPU, and there sooner."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def words(tokenizer: Any, count: int = WORD_COUNT) -> list[str]:
    """Words that are one token each, both at the start of a text and behind a space: n of them are n tokens."""
    known = tokenizer.get_vocab()
    # In byte-level vocabularies a space before a word is written as this letter.
    found = sorted((w[1:] for w in known if re.fullmatch("Ġ[a-z]{2,}", w) and w[1:] in known), key=known.__getitem__)
    return [word for word in found if _tokens(tokenizer, [word, f" {word}"]) == [1, 1]][:count]


def _tokens(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


if __name__ == "__main__":
    print(json.dumps(write(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]), *sys.argv[4:5])))
