"""Talk to a base or tuned model in the terminal."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch

from ftune.artifacts.stops import end_token_ids, saved_stops
from ftune.artifacts.tuned import Target
from ftune.errors import FtuneError
from ftune.plan.base_model import choose_device, load_base, load_tokenizer
from ftune.plan.precision import choose_dtype
from ftune.plan.resolve import context_of
from ftune.run.objective import autocast

if TYPE_CHECKING:
    pass

__all__ = ["Chat"]

HELP = "/base and /tuned choose the model, /new forgets the conversation, /quit leaves"


class Chat:
    """A conversation with a model that can be switched between tuned and base.

    Args:
        target: A run, or a recipe whose base model is talked to.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily; above it samples.
        base: Begin with the base model.

    Raises:
        FtuneError: The base was asked for and the method cannot be switched off.
    """

    def __init__(self, target: Target, *, max_new_tokens: int, temperature: float, base: bool) -> None:
        recipe = target.recipe
        device = choose_device()
        self._dtype = choose_dtype(recipe.model.dtype, device)
        self._tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
        self._model = load_base(recipe.model, recipe.method, self._dtype, device).eval()
        self._recipe = recipe
        self._stops = saved_stops(target.run, recipe, self._tokenizer)
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._settings["temperature"] = temperature
        self._messages: list[dict[str, str]] = []
        self.tuned = target.run is not None and not (base and recipe.method.artifact == "model")
        if target.run is not None and self.tuned:
            context = context_of(recipe, device, self._dtype)
            self._model = recipe.method.load(self._model, target.run.artifact(recipe), context).to(device).eval()
        self.base = base or not self.tuned

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; returns what to tell the user, or None to leave."""
        if line == "/quit":
            return None
        if line == "/new":
            self._messages = []
            return "a new conversation"
        if line in ("/base", "/tuned"):
            wanted = line == "/base"
            if wanted == self.base:
                return f"already talking to the {line[1:]} model"
            if not self.tuned or self._recipe.method.switched_off(self._model) is None:
                return "this model cannot be switched: start `ftune chat` with or without --base"
            self.base = wanted
            return f"now talking to the {line[1:]} model"
        return HELP

    @torch.no_grad()
    def answer(self, text: str, out: TextIO) -> str:
        """Answer a message, writing tokens as they come; remembers both.

        Raises:
            FtuneError: The tokenizer has no chat template.
        """
        from transformers import TextStreamer

        if not self._tokenizer.chat_template:
            raise FtuneError("this model has no chat template", help="set data.chat_template in the recipe")
        self._messages.append({"role": "user", "content": text})
        ids = self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._device)

        class Streamer(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                out.write(text + ("\n" if stream_end else ""))
                out.flush()

        off = self._recipe.method.switched_off(self._model) if self.base and self.tuned else None
        with autocast(self._dtype, self._device.type), off or nullcontext():
            output = cast(Any, self._model).generate(
                **ids,
                **self._settings,
                streamer=Streamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
                use_cache=True,
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=end_token_ids(self._model, self._tokenizer, self._stops) or None,
            )
        answer: str = self._tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer.strip()})
        return answer.strip()

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device
