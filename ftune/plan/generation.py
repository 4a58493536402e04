"""Whether what stands in a base model's generation_config.json can be generated with."""

from __future__ import annotations

from pathlib import Path

from ftune.errors import ModelError
from ftune.recipe.locate import locate_model
from ftune.recipe.no_model import damage
from ftune.recipe.schema import ModelSpec

__all__ = ["check_generation"]


def check_generation(spec: ModelSpec) -> None:
    """Hold that a model's settings for generation can be read: it is loaded, and saved, with them.

    Of a model of the hub only what is in the cache is looked at.

    Raises:
        ModelError: Names the setting.
    """
    from transformers import GenerationConfig

    located = locate_model(spec)
    if located.gguf_file:
        return
    try:
        GenerationConfig.from_pretrained(located.path_or_id, revision=located.revision, local_files_only=True)
    except OSError as error:
        if "not a valid JSON" in str(error):
            found = damage(Path(located.path_or_id) / "generation_config.json")
            what = found[0] if found else "is damaged"
            raise ModelError(f"the generation_config.json of `{spec.id}` {what}", help=_HELP) from error
        # There is none, which is common: transformers derives one from the configuration.
    except (ValueError, TypeError, AttributeError) as error:
        why = str(error).strip().splitlines()[0]
        raise ModelError(f"the generation_config.json of `{spec.id}` cannot be: {why}", help=_HELP) from error


_HELP = "correct the file, or remove it: then transformers' defaults hold"
