"""Why a base model cannot be read, and what to do.

transformers' own errors speak of its classes, list all that it knows, or are of any type. So the files are looked at
again: what they hold says more than what was raised.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ftune.errors import FtuneError, ModelError
from ftune.installed import version_of
from ftune.plan.bounds import zero_sizes
from ftune.recipe.locate import Located, locate_model, near_path
from ftune.recipe.no_model import AGAIN, Told, damage
from ftune.recipe.schema import ModelSpec
from ftune.recipe.spelling import closest

__all__ = ["CORRECT", "explained", "why_not"]

Part = Literal["configuration", "tokenizer", "weights"]

CORRECT = "correct config.json, or copy it again from where the model comes from"
_FILES: dict[Part, tuple[str, ...]] = {
    "configuration": ("config.json",),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    "weights": (),
}
_HELP: dict[Part, str] = {
    "configuration": CORRECT,
    "tokenizer": "copy the tokenizer's files again; `pip install -U transformers tokenizers` reads newer ones",
    "weights": f"{AGAIN}, or take another revision",
}
_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json", "vocab.txt")
_AS_SAFETENSORS = "take the model that it was made of, in safetensors"
_CUT_SHORT = (struct.error, IndexError, EOFError, UnicodeDecodeError)


@contextlib.contextmanager
def explained(spec: ModelSpec, what: Part) -> Iterator[None]:
    """Turn what is raised for a model that cannot be read into a sentence, with what to do.

    Args:
        spec: The recipe's model block.
        what: What is read of it. Around weights ftune's own code runs too, and around the rest a trusted model's: there
            only errors of reading are turned, so that a defect keeps its traceback.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (FtuneError, MemoryError):
        raise
    except Exception as error:
        reading = isinstance(error, (OSError, ValueError, SafetensorError, StrictDataclassError, ImportError))
        if not reading and (what == "weights" or spec.trust_remote_code):
            raise
        message, help = _why(spec, locate_model(spec), what, error)
        raise ModelError(message, help=help) from error


def _in_a_sentence(error: Exception) -> str:
    """The first sentence of an error's text, in at most 200 characters."""
    text = " ".join(str(error).split())
    # StrictDataclassError names the validator and the error behind it.
    text = re.sub(r"\A(Class v|V)alidation error for .*?: (?=\w+Error: )", "", text)
    text = re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0].removeprefix("ValueError: ").removeprefix("TypeError: ")
    return f"{text[:200]}..." if len(text) > 200 else text


def _why(spec: ModelSpec, located: Located, what: Part, error: Exception) -> Told:
    if located.kind == "hub" and (told := _on_hub(spec, what, error)):
        return told
    if "trust_remote_code" in str(error) and not spec.trust_remote_code:
        return (
            f"the {what} of model `{spec.id}` needs Python code that comes with the model, and ftune runs none unless "
            "the recipe says so",
            f"read that code; if you trust it, write `model: {{id: {spec.id}, trust_remote_code: true}}`"
            + (", and its commit as `revision`" if located.kind == "hub" else ""),
        )
    files = {name: _local(located, name) for name in ([located.gguf_file] if located.gguf_file else _FILES[what])}
    for name, file in files.items():
        if file is not None and (found := damage(file)):
            which = f"`{spec.id}`" if spec.id.endswith(str(name)) else f"`{name}` of model `{spec.id}`"
            return f"{which} {found[0]}", found[1]
    if located.gguf_file:
        found = _gguf(located.gguf_file, files[located.gguf_file], error)
    elif what == "configuration":
        found = _configuration(located, files["config.json"], error)
    else:
        found = _tokenizer(located, files) if what == "tokenizer" else None
    if found:
        return f"model `{spec.id}` {found[0]}", found[1]
    reason = (
        _in_a_sentence(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {_in_a_sentence(error)}"
    )
    help = _AS_SAFETENSORS if located.gguf_file else _HELP[what]
    return f"cannot read the {what} of model `{spec.id}`: {reason}", help


def _on_hub(spec: ModelSpec, what: Part, error: Exception) -> Told | None:
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    path = Path(spec.id)
    near = near_path(path) or ((parent := near_path(path.parent)) and parent / path.name)
    meant = f"did you mean the directory `{near}`? Else " if near and near.is_dir() else ""
    if raised(errors.GatedRepoError):
        page = f"https://huggingface.co/{spec.id}"
        return f"model `{spec.id}` is gated, and you have no access", f"ask for it at {page}, and `hf auth login`"
    if raised(errors.RepositoryNotFoundError):
        return (
            f"`{spec.id}` is no model of the hub, and no directory here",
            f"{meant}correct the id; for a private model `hf auth login`",
        )
    if raised(errors.RevisionNotFoundError):
        return (
            f"model `{spec.id}` has no revision `{spec.revision}`",
            "write `model.revision` as a branch, a tag or a commit of it",
        )
    if raised(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        offline = constants.HF_HUB_OFFLINE
        return (
            f"cannot read the {what} of model `{spec.id}`: there is no directory of this name, the hub's cache does "
            f"not have it, and {'HF_HUB_OFFLINE is set' if offline else 'the hub does not answer'}",
            f"{meant}correct the id, or {'unset HF_HUB_OFFLINE' if offline else 'the network'}",
        )
    if raised(errors.HfHubHTTPError) and not raised(errors.EntryNotFoundError):
        return (
            f"cannot read the {what} of model `{spec.id}`: {_in_a_sentence(error)}",
            "try again later; HF_HUB_OFFLINE=1 reads the local cache only",
        )
    return None


def _local(located: Located, name: str) -> Path | None:
    """A model's file where it is on this disk."""
    if located.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(located.path_or_id, name, revision=located.revision)
        return Path(found) if isinstance(found, str) else None
    file = Path(located.path_or_id) / name
    return file if file.is_file() else None


def _configuration(located: Located, file: Path | None, error: Exception) -> Told | None:
    if file is None:
        return (
            "has no config.json",
            "take a model of transformers; of a repository of GGUF files write `model: {id: ..., gguf_file: NAME}`",
        )
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind, code = config.get("model_type"), config.get("auto_map")
    if isinstance(code, dict):
        for name in {f"{str(name).split('.')[0]}.py" for name in code.values() if "--" not in str(name)}:
            if _local(located, name) is None:
                return f"needs its own code, and `{name}` is not there", "copy the model's .py files beside config.json"
    if kind is None:
        return "has a config.json without `model_type`, so it is not one of transformers'", CORRECT
    if not isinstance(kind, str):
        return f"has a config.json whose `model_type` is {kind!r}, not a name", CORRECT
    from transformers import CONFIG_MAPPING

    installed = version_of("transformers") or ""
    if written := _newer(config.get("transformers_version"), installed):
        newer = f"`pip install 'transformers>={written}'`: it was written by that version, and {installed} is installed"
    if kind not in CONFIG_MAPPING:
        near = closest(kind, CONFIG_MAPPING)
        meant = f"did you mean `{near}`? Else " if near else ""
        help = newer if written else f"{meant}a newer transformers may know it: `pip install -U transformers`"
        return f"is of type `{kind}`, which transformers {installed} does not know", help
    return f"has a config.json that cannot be that of a model: {why_not(config, error)}", newer if written else CORRECT


def why_not(config: dict[str, Any], error: Exception) -> str:
    """What is wrong in a configuration of which transformers makes no model.

    Args:
        config: As config.json has it.
        error: What transformers raised.
    """
    reason = _in_a_sentence(error)
    if isinstance(error, ArithmeticError) and (zeros := zero_sizes(config)):
        return zeros
    if "adding_idx" in reason:
        return "`pad_token_id` is no number below `vocab_size`"
    if not isinstance(error, (KeyError, AttributeError)):
        return reason
    # The value that was looked up stands in the error's text.
    blocks = [config, *(value for value in config.values() if isinstance(value, dict))]
    values = {value: key for block in blocks for key, value in block.items() if isinstance(value, str)}
    unknown = next((value for value in re.findall("'([^']*)'", reason) if value in values), None)
    if unknown is None:
        return f"a value in it is not what it should be ({reason})"
    return f"transformers knows no `{values[unknown]}: {unknown}`"


def _newer(written: object, installed: str) -> str | None:
    """The version of transformers that wrote a configuration, where it is newer than what is installed."""
    from packaging.version import InvalidVersion, Version

    try:
        version = Version(Version(str(written)).base_version)
        return str(version) if version > Version(installed) else None
    except InvalidVersion:
        return None


def _tokenizer(located: Located, files: dict[str, Path | None]) -> Told | None:
    if (file := files["tokenizer.json"]) is not None:
        if "model" not in json.loads(file.read_text(encoding="utf-8")):
            return "has a tokenizer.json without `model`, which is no tokenizer", "copy it again"
        return None
    help = "copy tokenizer.json and tokenizer_config.json from the model that it was made of"
    found = next((name for name in _VOCABULARIES if _local(located, name)), None)
    if found is None:
        return "has no tokenizer (tokenizer.json)", help
    needed = "sentencepiece tiktoken" if found.endswith(".model") else "mistral-common" if "tekken" in found else ""
    also = f"; or `pip install {needed}`, with which `{found}` may be read" if needed else ""
    return f"has no tokenizer.json, and its `{found}` cannot be read instead", help + also


def _gguf(name: str, file: Path | None, error: Exception) -> Told | None:
    text = str(error)
    if file is None:
        return f"has no file `{name}`", "correct `model.gguf_file`"
    if "architecture" in text and "not supported" in text:
        # By convention this is the first of its keys.
        with file.open("rb") as opened:
            named = re.search(rb"general\.architecture\x08\0{3}.{8}([\w.-]+)", opened.read(256), re.DOTALL)
        which = f"of architecture `{named[1].decode()}`" if named else "of another architecture"
        return f"is a GGUF file {which}, which transformers does not read", _AS_SAFETENSORS
    if kind := re.search(r"ggml type (\d+)", text):
        return (
            f"is a GGUF file with tensors quantized in a way that transformers does not read (type {kind[1]})",
            f"take another quantization, Q8_0 say, or {_AS_SAFETENSORS}",
        )
    if "tokenizer" in text:
        return "is a GGUF file whose tokenizer transformers does not read", _AS_SAFETENSORS
    if isinstance(error, _CUT_SHORT) or "reshape" in text:
        return f"is a GGUF file that is damaged, or cut short at {file.stat().st_size:,} bytes", AGAIN
    return None
