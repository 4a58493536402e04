"""Conversations as text, with the character spans that are trained.

Every template is rendered by transformers, in its sandbox. Where a template says with ``{% generation %}``
what the assistant writes, its word is taken. Elsewhere an assistant turn is what rendering adds to the
conversation before it, generation prompt included: exactly what the model has to write there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftune.data.formats import Conversation, Message
from ftune.errors import DataError
from ftune.regular import read_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Span", "generation_prompt", "load_template", "render", "special_tokens"]

# start and end in characters, end excluded
Span = tuple[int, int]

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MAX_TEMPLATE_BYTES = 1_000_000
HELP = (
    "put {% generation %} and {% endgeneration %} around what the assistant writes, in a copy of the "
    "template, and name that file as `data.chat_template`"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what a probe found out about it.

    Attributes:
        source: The Jinja text.
        marks_generation: Whether ``{% generation %}`` says what the assistant writes.
        specials: The text of every special token of the tokenizer.
        end_of_turn: The special token behind an assistant turn, where there is one.
    """

    source: str
    marks_generation: bool
    specials: tuple[str, ...]
    end_of_turn: str | None = None


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


def render(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[str, list[Span]]:
    """The rendered conversation and the spans that the assistant writes, in order.

    A span ends with the end-of-turn token; white space that the template puts behind that is left out, as
    generation stops before it.

    Raises:
        DataError: The template refuses the conversation, or gives no way to tell what the assistant writes.
    """
    if template.marks_generation:
        text, spans = _render_marked(conversation, tokenizer, template)
    else:
        text = _apply(conversation.messages, conversation, tokenizer, template)
        spans = [_turn(index, text, conversation, tokenizer, template) for index in _trained(conversation)]
    return text, [_without_tail(text, span, template.specials) for span in spans]


def generation_prompt(
    conversation: Conversation, upto: int, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> str:
    """The first ``upto`` messages (at least one), followed by what opens an assistant turn."""
    return _apply(conversation.messages[:upto], conversation, tokenizer, template, prompt=True)


def _trained(conversation: Conversation) -> list[int]:
    """Indices of the messages that are trained."""
    messages = conversation.messages
    return [i for i in range(conversation.trained_from, len(messages)) if messages[i]["role"] == "assistant"]


def _without_tail(text: str, span: Span, specials: tuple[str, ...]) -> Span:
    """The span without white space behind a special token; where there is none, white space ends the turn."""
    start, end = span
    stripped = text[start:end].rstrip()
    return (start, start + len(stripped)) if stripped.endswith(specials) else span


# --- rendering ---


def _apply(
    messages: Sequence[Message],
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    *,
    prompt: bool = False,
) -> str:
    """Some messages of a conversation as text."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=list(conversation.tools) or None,
            chat_template=template.source,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise _refused(error) from error
    return text


def _refused(error: Exception) -> DataError:
    return DataError(f"the chat template refuses this conversation: {type(error).__name__}: {error}")


def _render_marked(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> tuple[str, list[Span]]:
    """Text and spans from ``{% generation %}``.

    Not through ``apply_chat_template(return_assistant_tokens_mask=True)``: its mask stays empty from the
    first span on whose first character belongs to no token (white space that the tokenizer drops). The spans
    behind that mask are in characters, and are what is wanted here.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    # None values are left out as apply_chat_template does: templates test for presence
    messages = [{k: v for k, v in message.items() if v is not None} for message in conversation.messages]
    try:
        texts, marked = render_jinja_template(
            conversations=[messages],
            tools=list(conversation.tools) or None,
            chat_template=template.source,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise _refused(error) from error
    text: str = texts[0]
    spans: list[Span] = [(start, end) for start, end in marked[0] if start < end]
    if conversation.trained_from:
        before = sum(m["role"] == "assistant" for m in conversation.messages[: conversation.trained_from])
        if len(spans) != before + len(_trained(conversation)):
            raise DataError(
                f"the chat template marks {len(spans)} spans with {{% generation %}} in a conversation of "
                f"{before + len(_trained(conversation))} assistant turns, so the prompt cannot be told apart"
            )
        spans = spans[before:]
    if not spans:
        raise DataError("the chat template marks nothing of this conversation with {% generation %}")
    return text, spans


def _turn(
    index: int,
    text: str,
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
) -> Span:
    """The span of one assistant turn in the rendered conversation, found by rendering what precedes it."""
    messages = conversation.messages
    start = None
    if index > 0:  # templates cannot render no messages at all
        prefix = generation_prompt(conversation, index, tokenizer, template)
        start = len(prefix) if text.startswith(prefix) else None
    if start is None:
        # the template renders a message differently once others follow, or opens a turn in a way of its own
        start = _starts_by_substitution(text, conversation, tokenizer, template).get(index)
    last = index == len(messages) - 1
    until = text if last else _apply(messages[: index + 1], conversation, tokenizer, template)
    if start is not None and text.startswith(until) and len(until) > start:
        return start, len(until)
    if start is not None and template.end_of_turn is not None:
        end = text.find(template.end_of_turn, start)
        # all of the turn must be there: a template that drops reasoning from earlier turns would train what
        # the model never writes
        if end >= 0 and messages[index]["content"].strip() in text[start:end]:
            return start, end + len(template.end_of_turn)
    raise DataError(
        f"the chat template renders messages[{index}] differently once more messages follow (it may drop "
        "reasoning from earlier turns, or move the system message), so the trained text cannot be found",
        help=HELP,
    )


def _starts_by_substitution(
    text: str, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> dict[int, int]:
    """Where each assistant message's content starts, by message index.

    Empty where the template changes contents.

    Renders the conversation once with placeholders for what the assistant says. What stands between the
    placeholders must stand between the contents too, to the last character, so nothing is found by accident.
    """
    indices = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    marks = {i: f"\ue000{i}\ue001" for i in indices}
    messages = [{**m, "content": marks.get(i, m["content"])} for i, m in enumerate(conversation.messages)]
    rendered = _apply(messages, conversation, tokenizer, template)
    between = re.split("|".join(marks.values()), rendered)
    if len(between) != len(indices) + 1 or not text.startswith(between[0]):
        return {}
    starts: dict[int, int] = {}
    position = len(between[0])
    for index, following in zip(indices, between[1:], strict=True):
        content = conversation.messages[index]["content"]
        starts[index] = position
        for variant in (content, content.rstrip(), content.lstrip(), content.strip()):
            if text.startswith(variant + following, position):
                position += len(variant) + len(following)
                break
        else:
            return {}
    return starts if position == len(text) else {}


# --- what a template is ---


def _probe(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, path: str | None) -> ChatTemplate:
    """Render two short exchanges to see what ends a turn, and whether the marks are in place."""
    from jinja2 import TemplateSyntaxError

    said = ("\ue000first\ue001", "\ue000second\ue001")
    turns: list[Message] = []
    for word in said:
        turns += [{"role": "user", "content": "x"}, {"role": "assistant", "content": word}]
    conversation = Conversation(tuple(turns), row=0)
    try:
        text = _apply(turns, conversation, tokenizer, template)
    except DataError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            name = f"{path}:{error.__cause__.lineno}" if path else f"the tokenizer's, line {error.__cause__.lineno}"
            raise DataError(f"chat template ({name}) does not compile: {error.__cause__.message}") from error
        # a template may refuse the probe and accept the data; each row is checked on its own
        return template
    if template.marks_generation:
        text, spans = _render_marked(conversation, tokenizer, template)
        if not all(any(word in text[start:end] for start, end in spans) for word in said):
            # transformers counts characters wrongly where the block stands inside a macro, a filter or a set
            raise DataError(
                "the chat template's {% generation %} blocks do not enclose what the assistant says",
                help="keep the block outside macros, filters and {% set %}, around the assistant's content",
            )
    behind = text[text.find(said[1]) + len(said[1]) :].lstrip() if said[1] in text else ""
    end = max((token for token in template.specials if behind.startswith(token)), key=len, default=None)
    return replace(template, end_of_turn=end)
