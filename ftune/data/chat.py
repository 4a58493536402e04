"""Chat templates: loading one, and conversations as text. transformers renders, in its sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftune.data.deadline import TooLongError, within
from ftune.data.formats import Conversation, Message
from ftune.errors import DataError
from ftune.regular import read_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatTemplate",
    "Span",
    "apply_marked",
    "apply_template",
    "generation_prompt",
    "load_template",
    "special_tokens",
]

# start and end in characters, end excluded
Span = tuple[int, int]

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MAX_TEMPLATE_BYTES = 1_000_000
TEMPLATE_SECONDS = 10.0
"""For one conversation; an ordinary template needs a thousandth of a second."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what a probe found out about it.

    Attributes:
        source: The Jinja text.
        marks_generation: Whether ``{% generation %}`` says what the assistant writes.
        specials: The text of every special token of the tokenizer.
        end_of_turn: The special token behind an assistant turn, where there is one.
        parts: Whether a message's text is shown only as a list of parts, as templates of models that see images ask.
    """

    source: str
    marks_generation: bool
    specials: tuple[str, ...]
    end_of_turn: str | None = None
    parts: bool = False


def load_template(tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> ChatTemplate | None:
    """The template in a file, else the tokenizer's own, else None.

    Raises:
        DataError: The file cannot be read, the template does not compile, or it marks the wrong text.
    """
    if path is not None:
        try:
            source = read_regular(Path(path).expanduser(), MAX_TEMPLATE_BYTES, follow=True).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not valid UTF-8"
            raise DataError(f"data.chat_template: {path}: {reason}") from error
    elif tokenizer.chat_template is None:
        return None
    else:
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates and none of them the default
            raise DataError(
                f"the tokenizer's chat template: {error}", help="name one as `data.chat_template`"
            ) from error
    specials = tuple(special_tokens(tokenizer))
    return _probe(tokenizer, ChatTemplate(source, GENERATION.search(source) is not None, specials), path)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of every special token: those named (eos, pad, ...) and those added as special."""
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return named | added


def apply_template(
    messages: Sequence[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    prompt: bool = False,
) -> str:
    """Some messages of a conversation as text; with ``prompt``, followed by what opens an assistant turn.

    Raises:
        DataError: The template refuses them.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # not through apply_chat_template, which takes a null away that some templates ask for (``content is none``)
        with within(TEMPLATE_SECONDS):
            texts, _ = render_jinja_template(
                conversations=[_given(messages, template)],
                tools=list(conversation.tools) or None,
                chat_template=template.source,
                add_generation_prompt=prompt,
                **tokenizer.special_tokens_map,
            )
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise _refused(error) from error
    text: str = texts[0]
    return text


def apply_marked(
    messages: Sequence[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
) -> tuple[str, list[Span]]:
    """Some messages as text, and what ``{% generation %}`` encloses in it.

    Not through ``apply_chat_template(return_assistant_tokens_mask=True)``: its mask stays empty from the
    first span on whose first character belongs to no token (white space that the tokenizer drops). The spans
    behind that mask are in characters, and are what is wanted here.

    Raises:
        DataError: The template refuses the messages.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with within(TEMPLATE_SECONDS):
            texts, marked = render_jinja_template(
                conversations=[_given(messages, template)],
                tools=list(conversation.tools) or None,
                chat_template=template.source,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise _refused(error) from error
    return texts[0], [(start, end) for start, end in marked[0] if start < end]


REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a turn has its reasoning; the first is the one that most templates read."""


def _given(messages: Sequence[Message], template: ChatTemplate) -> list[Message]:
    """The messages as the template reads them: parts where it wants parts, and reasoning under the names it knows."""
    return [_in_parts(_with_reasoning(message)) if template.parts else _with_reasoning(message) for message in messages]


def _with_reasoning(message: Message) -> Message:
    """As transformers does from 5.20 or so on."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _in_parts(message: Message) -> Message:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def generation_prompt(
    conversation: Conversation, upto: int, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> str:
    """The first ``upto`` messages (at least one), followed by what opens an assistant turn."""
    return apply_template(conversation.messages[:upto], conversation, tokenizer, template, prompt=True)


def _refused(error: Exception) -> DataError:
    if isinstance(error, TooLongError):
        return DataError(
            f"the chat template needs more than {TEMPLATE_SECONDS:g} seconds for one conversation",
            help="look for loops inside of loops in it, or name another as `data.chat_template` (a Jinja file)",
        )
    return DataError(
        f"the chat template refuses this conversation: {type(error).__name__}: {error}",
        help="change or remove such rows, or name a template that takes them as `data.chat_template` (a Jinja file)",
    )


# --- what a template is ---


def _probe(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, path: str | None) -> ChatTemplate:
    """Render two short exchanges to see what ends a turn, and whether the marks are in place."""
    from jinja2 import TemplateSyntaxError

    said = ("\ue000first\ue001", "\ue000second\ue001")
    turns: list[Message] = []
    for word in said:
        turns += [{"role": "user", "content": "x"}, {"role": "assistant", "content": word}]
    conversation = Conversation(tuple(turns), row=0)
    as_parts = replace(template, parts=True)
    text: str | None
    try:
        text = apply_template(turns, conversation, tokenizer, template)
    except DataError as error:
        if isinstance(error.__cause__, TooLongError):
            raise
        if isinstance(error.__cause__, TemplateSyntaxError):
            name = f"{path}:{error.__cause__.lineno}" if path else f"the tokenizer's, line {error.__cause__.lineno}"
            raise DataError(f"chat template ({name}) does not compile: {error.__cause__.message}") from error
        text = None
    if text is None or not all(word in text for word in said):
        try:
            text_of_parts = apply_template(turns, conversation, tokenizer, as_parts)
        except DataError:
            text_of_parts = ""
        if all(word in text_of_parts for word in said):
            template, text = as_parts, text_of_parts
    if text is None:
        # a template may refuse the probe and accept the data; each row is checked on its own
        return template
    if template.marks_generation:
        text, spans = apply_marked(turns, conversation, tokenizer, template)
        if not all(any(word in text[start:end] for start, end in spans) for word in said):
            # transformers counts characters wrongly where the block stands inside a macro, a filter or a set
            raise DataError(
                "the chat template's {% generation %} blocks do not enclose what the assistant says",
                help="keep the block outside macros, filters and {% set %}, around the assistant's content",
            )
    behind = text[text.find(said[1]) + len(said[1]) :].lstrip() if said[1] in text else ""
    end = max((token for token in template.specials if behind.startswith(token)), key=len, default=None)
    return replace(template, end_of_turn=end)
