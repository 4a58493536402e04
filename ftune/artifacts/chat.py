"""Talk to a base or tuned model in the terminal."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, TextIO, cast

import torch

from ftune.artifacts.generate import decoded
from ftune.artifacts.one_pass import settings_of
from ftune.artifacts.stops import end_token_ids, saved_stops, text_stop, until
from ftune.artifacts.terminal import printable
from ftune.artifacts.tuned import Target, load_target
from ftune.data.prompts import prompt_ids, prompting_of
from ftune.errors import FtuneError
from ftune.plan.base_model import choose_device, configured, load_base, load_tokenizer
from ftune.plan.positions import positions
from ftune.plan.precision import choose_dtype
from ftune.plan.resolve import context_of
from ftune.run.objective import autocast

__all__ = ["Chat"]

HELP = "/base and /tuned choose the model, /new forgets the conversation, /quit leaves"


class Chat:
    """A conversation with a model that can be switched between tuned and base.

    What is typed is put before the model as the run's rows were: in the chat template, in the recipe's own prompt, or
    as it is, each text by itself.

    Args:
        target: A run, or a recipe whose base model is talked to.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily; above it samples.
        base: Begin with the base model.
        system: A system message before every conversation.

    Raises:
        FtuneError: There is a system message, and the run's prompts have no place for one.
    """

    def __init__(
        self, target: Target, *, max_new_tokens: int, temperature: float, base: bool, system: str | None = None
    ) -> None:
        recipe = target.recipe
        device = choose_device()
        self._dtype = choose_dtype(recipe.model.dtype, device)
        self._tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
        trained = target.run.read()["plan"]["data"]["format"] if target.run is not None else None
        self._prompting = prompting_of(recipe.data, self._tokenizer, trained)
        if system is not None and self._prompting.kind == "raw":
            raise FtuneError(
                "--system: this run's prompts have no system message: it was trained on prompts as they are",
                help="write it into the prompt, as the training rows have it",
            )
        self._before: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._before)
        self._model = load_base(recipe.model, recipe.method, self._dtype, device).eval()
        self._recipe = recipe
        found = positions(configured(recipe.model, recipe.method))
        self._positions = None if found is None else found - recipe.method.virtual_positions
        self._stops = saved_stops(target.run, recipe, self._tokenizer)
        self._end_text = text_stop(recipe, self._tokenizer, trained)
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self.tuned = target.run is not None and not (base and recipe.method.artifact == "model")
        if self.tuned:
            self._model = load_target(self._model, target, context_of(recipe, device, self._dtype))
        self.base = base or not self.tuned

    @property
    def manner(self) -> str:
        """How what is typed is put before the model, in words."""
        before, behind = self._prompting.template or ("", "")
        if before or behind:
            return f"your text is set into the recipe's prompt: {before}...{behind}"
        return {
            "chat": "your text is a turn of a conversation, in the model's chat template",
            "raw": "your text is the whole prompt, each by itself: so the run was trained",
            "alpaca": "your text is an instruction in Alpaca's prompt, each by itself: so the run was trained",
        }[self._prompting.kind]

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; returns what to tell the user, or None to leave."""
        if line == "/quit":
            return None
        if line == "/new":
            self._messages = list(self._before)
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
        """Answer a text, writing tokens as they come; a conversation remembers both.

        Raises:
            DataError: The tokenizer has no chat template, or the template refuses the conversation.
            FtuneError: The prompt is empty.
        """
        from transformers import TextStreamer

        found = prompt_ids(self._prompting, text, self._messages, self._recipe.data, self._tokenizer)
        if not found:
            raise FtuneError("an empty prompt: there is nothing to answer")
        room = self._max_new_tokens
        if self._positions is not None:
            room = min(room, self._positions - len(found))
            if room < 1:
                raise FtuneError(
                    f"the prompt has {len(found)} tokens, and the model positions for {self._positions}: no room is "
                    "left for an answer",
                    help="/new begins a new conversation; else write less",
                )
        ids = torch.tensor([found], device=self._device)
        ends = end_token_ids(self._model, self._tokenizer, self._stops)

        class Streamer(TextStreamer):  # type: ignore[misc]
            def put(self, value: Any) -> None:
                if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in ends:
                    super().put(value)

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                out.write(printable(text, lines=True) + ("\n" if stream_end else ""))
                out.flush()

        settings = settings_of(self._tokenizer, ends)
        if self._end_text is not None:
            settings |= {"stop_strings": [self._end_text], "tokenizer": self._tokenizer}
        if self._temperature > 0:
            settings |= {"do_sample": True, "temperature": self._temperature}
        off = self._recipe.method.switched_off(self._model) if self.base and self.tuned else None
        with autocast(self._dtype, self._device.type), off or nullcontext():
            output = cast(Any, self._model).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                streamer=Streamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
                **settings,
            )
        (answer,) = decoded([output[0, ids.shape[1] :].tolist()], self._tokenizer, ends)
        answer = until(answer, self._end_text)
        if self._prompting.kind == "chat":
            self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.whole}]
        return answer.whole

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device
