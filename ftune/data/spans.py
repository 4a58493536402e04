"""What the assistant writes in a rendered conversation: the character spans that are trained.

A turn is trained where the rendered conversation shows it as the model has to write it: as it is rendered when it is
the last message, behind the generation prompt. Templates may render a turn otherwise once others follow (without its
reasoning, or with another end); what the model never writes is not trained, and said so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftune.data.chat import ChatTemplate, Span, apply_marked, apply_template, generation_prompt
from ftune.data.formats import Conversation, Message
from ftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rendered", "assistant_turns", "render"]

HELP = (
    "put {% generation %} and {% endgeneration %} around what the assistant writes, in a copy of the "
    "template, and name that file as `data.chat_template`"
)
NOT_AS_WRITTEN = (
    "the chat template shows earlier assistant turns otherwise than the model writes them (without their reasoning, "
    "perhaps): such turns are not in the loss. To train each, give each a row of its own, and set `train_on: last`"
)


NOT_BEHIND_PROMPT = (
    "the chat template renders answers behind another text than its generation prompt: the model is trained on another "
    "beginning than it is given to answer from"
)
# a tag that is opened where generation prompt and finished turn go apart
OPEN_TAG = re.compile(r"<(\w+)>\s*\Z")
# characters at the end of a generation prompt that tell where it ends in a conversation
HEADER = 8


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: All of it, as it is trained: it begins with the generation prompt of the last assistant turn wherever that
            is the last message and its answer can be told apart.
        whole: All of it, as the template renders it.
        trained: Indices of the messages that are trained.
        spans: What is trained, in order. A span ends with the end-of-turn token; white space that the template
            puts behind that is left out, as generation stops before it.
        prompt_end: Where the generation prompt of the last assistant turn ends in the text; None where the text
            does not begin with it.
        notes: What to tell the user about this row, each once.
    """

    text: str
    whole: str
    trained: tuple[int, ...]
    spans: tuple[Span, ...]
    prompt_end: int | None
    notes: tuple[str, ...] = ()


def assistant_turns(conversation: Conversation) -> list[int]:
    """Indices of the assistant's messages that may be trained."""
    messages = conversation.messages
    return [i for i in range(conversation.trained_from, len(messages)) if messages[i]["role"] == "assistant"]


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    turns: Sequence[int] | None = None,
) -> Rendered:
    """The rendered conversation and what is trained of it.

    Args:
        conversation: At least one assistant message.
        tokenizer: For its template functions and special tokens.
        template: What renders.
        turns: Indices of the assistant messages to train, ascending; all that may be, where not given.

    Raises:
        DataError: The template refuses the conversation, or gives no way to tell what the assistant writes.
    """
    turns = assistant_turns(conversation) if turns is None else turns
    if template.marks_generation:
        return _Marked(conversation, tokenizer, template).render(turns)
    return _Unmarked(conversation, tokenizer, template).render(turns)


class _Unmarked:
    """Turns found by rendering what precedes them."""

    def __init__(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self.conversation, self.tokenizer, self.template = conversation, tokenizer, template
        self.messages = conversation.messages
        self.last = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        self.notes: dict[str, None] = {}
        # whether spans are parts of turns, and it is not known of which
        self.parted = False
        self._prompts: dict[int, str] = {}
        self.whole = self.rendered()
        self.text = self.as_generated()

    def rendered(self) -> str:
        """All messages."""
        return apply_template(self.messages, self.conversation, self.tokenizer, self.template)

    def as_generated(self) -> str:
        """The last answer behind its generation prompt, also where the template renders the two together otherwise.

        Mistral's leaves out the system message once the last message is an answer; DeepSeek-R1's opens a reasoning in
        the prompt that no finished turn shows.
        """
        prompt = self.prompt(self.last)
        if not prompt or self.last < len(self.messages) - 1 or self.whole.startswith(prompt):
            return self.whole
        same = self._behind_header(self.whole, self.last)
        if same is not None:
            tag = OPEN_TAG.search(prompt, 0, same)
            if tag is None or f"</{tag[1]}>" not in prompt[same:]:
                self.notes[
                    f"the chat template's generation prompt goes on with {prompt[same:][:40]!r}, which finished turns "
                    "do not show: the answers are trained right behind it"
                ] = None
                return prompt + self.whole[same:]
            # the prompt closes a reasoning that the answer goes on with
            return self.whole
        start = self._starts(self.whole, self.messages, self.last)
        if start is not None:
            # white space that the template puts before an answer is the model's to write, unless it ends the prompt
            for end in (len(self.whole[:start].rstrip()), start):
                if self.whole[max(0, end - HEADER) : end] == prompt[-HEADER:]:
                    return prompt + self.whole[end:]
        return self.whole

    def prompt(self, index: int) -> str:
        """What the model is given when it has to write the message at ``index``; empty for the first."""
        if index == 0:  # templates cannot render no messages at all
            return ""
        if index not in self._prompts:
            self._prompts[index] = generation_prompt(self.conversation, index, self.tokenizer, self.template)
        return self._prompts[index]

    def render(self, turns: Sequence[int]) -> Rendered:
        """The text with the spans of these turns."""
        spans = self.spans(turns)
        prompt = self.prompt(self.last)
        prompt_end = len(prompt) if prompt and self.text.startswith(prompt) else None
        trained = tuple(turns) if self.parted else tuple(index for index, _ in spans)
        if prompt and prompt_end is None and self.last == len(self.messages) - 1:
            self.notes[NOT_BEHIND_PROMPT] = None
        return Rendered(self.text, self.whole, trained, tuple(span for _, span in spans), prompt_end, tuple(self.notes))

    def spans(self, turns: Sequence[int]) -> list[tuple[int, Span]]:
        """Every turn that is trained, with its span."""
        return [(index, span) for index in turns if (span := self.span(index)) is not None]

    def span(self, index: int) -> Span | None:
        """Where a turn stands in the text; None where it is not shown as the model writes it.

        Raises:
            DataError: It is the last turn, and cannot be found.
        """
        upto = self.messages[: index + 1]
        alone = (
            self.text
            if len(upto) == len(self.messages)
            else apply_template(upto, self.conversation, self.tokenizer, self.template)
        )
        prompt = self.prompt(index)
        if prompt and self.text.startswith(prompt) and alone.startswith(prompt):
            start = written = len(prompt)
        elif index < self.last and prompt and not alone.startswith(prompt):
            # behind another prompt than the model is given
            self.notes[NOT_AS_WRITTEN] = None
            return None
        else:
            # the template shows what precedes differently once others follow, or opens a turn in a way of its own
            found = self._behind_header(self.text, index) if index == self.last else None
            if found is None:
                found = self._starts(self.text, self.messages, index)
            other = found if alone is self.text else self._starts(alone, upto, index)
            if found is None or other is None:
                if index == self.last:
                    raise DataError(
                        f"the chat template shows messages[{index}] in a way of its own (it may drop reasoning, or "
                        "open a turn differently), so the trained text cannot be found",
                        help=HELP,
                    )
                self.notes[NOT_AS_WRITTEN] = None
                return None
            start, written = found, other
        return self.compared(start, alone[written:])

    def compared(self, start: int, written: str) -> Span | None:
        """The span of what stands at ``start`` as far as it is ``written`` by the model; None where it is not."""
        specials = self.template.specials
        stripped = written.rstrip()
        end = next((token for token in specials if stripped.endswith(token)), None)
        # where no special token ends the turn, white space does
        answer = written if end is None else stripped
        if self.text.startswith(answer, start):
            return (start, start + len(answer)) if answer else None
        if end is not None:
            body = stripped[: -len(end)]
            closed = body.rstrip()
            if closed.endswith(specials) and self.text.startswith(closed, start):
                # the turn ends before; what follows the last one ends the conversation
                return start, start + len(closed)
            behind = start + len(body)
            shown = next((token for token in specials if self.text.startswith(token, behind)), None)
            if body and shown is not None and self.text.startswith(body, start):
                self.notes[
                    f"the chat template ends earlier assistant turns with {shown}, where the model has to write "
                    f"{end}: {shown} is not in the loss"
                ] = None
                return start, behind
        self.notes[NOT_AS_WRITTEN] = None
        return None

    def _starts(self, text: str, messages: Sequence[Message], index: int) -> int | None:
        """Where what the assistant says in a message starts, without looking at what precedes it.

        Renders the messages once with placeholders for what the assistant says. What stands between the
        placeholders must stand between the contents too, to the last character, so nothing is found by accident.
        Where the template changes contents, or the message has none: where the generation prompt and the rendered
        turn go apart.
        """
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("content")]
        marks = {i: f"\ue000{i}\ue001" for i in indices}
        replaced = [{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)]
        rendered = apply_template(replaced, self.conversation, self.tokenizer, self.template)
        between = re.split("|".join(marks.values()), rendered) if marks else []
        starts: dict[int, int] = {}
        if len(between) == len(indices) + 1 and text.startswith(between[0]):
            position = len(between[0])
            for i, following in zip(indices, between[1:], strict=True):
                content = str(messages[i]["content"])
                starts[i] = position
                for variant in (content, content.rstrip(), content.lstrip(), content.strip()):
                    if text.startswith(variant + following, position):
                        position += len(variant) + len(following)
                        break
                else:
                    return self._behind_header(text, index)
            if position == len(text) and index in starts:
                return starts[index]
        return self._behind_header(text, index)

    def _behind_header(self, text: str, index: int) -> int | None:
        """Where the header ends that the generation prompt and a turn in the text have in common."""
        prompt = self.prompt(index)
        if not prompt:
            return None
        before = apply_template(self.messages[:index], self.conversation, self.tokenizer, self.template)
        if not prompt.startswith(before) or not text.startswith(before):
            return None
        same = os.path.commonprefix([prompt, text])
        # not within a tag of which both have the first characters
        opened = max(same.rfind("<", len(before)), same.rfind("[", len(before)))
        closed = max(same.rfind(">", len(before)), same.rfind("]", len(before)))
        return opened if opened > closed else len(same)


class _Marked(_Unmarked):
    """Turns as ``{% generation %}`` marks them."""

    def rendered(self) -> str:
        text, self.marks = apply_marked(self.messages, self.conversation, self.tokenizer, self.template)
        if not self.marks:
            raise DataError("the chat template marks nothing of this conversation with {% generation %}")
        return text

    def as_generated(self) -> str:
        """The same with the marks where they then are; those of turns that are shown otherwise are empty."""
        if len(self.marks) != sum(message["role"] == "assistant" for message in self.messages):
            return self.whole
        text = super().as_generated()
        if text != self.whole:
            moved, same = len(text) - len(self.whole), len(os.path.commonprefix([text, self.whole]))
            start, end = self.marks[-1]
            earlier = [mark if mark[1] <= same else (0, 0) for mark in self.marks[:-1]]
            self.marks = [*earlier, (start + moved, end + moved)]
        return text

    def spans(self, turns: Sequence[int]) -> list[tuple[int, Span]]:
        """The marks of the turns; all where there are not as many as turns: some are shown in several parts, say."""
        indices = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(self.marks) == len(indices):
            self._mark_of = dict(zip(indices, self.marks, strict=True))
            return super().spans(turns)
        if list(turns) == indices:
            found = [self.compared(start, self.text[start:end]) for start, end in self.marks]
            self.parted = True
            return [(self.last, span) for span in found if span is not None]
        raise DataError(
            f"the chat template marks {len(self.marks)} spans with {{% generation %}} in a conversation of "
            f"{len(indices)} assistant turns, so the turns to train cannot be told apart"
        )

    def span(self, index: int) -> Span | None:
        start, end = self._mark_of[index]
        written = self.text[start:end]
        prompt = self.prompt(index)
        if index < self.last:
            upto = self.messages[: index + 1]
            alone, marks = apply_marked(upto, self.conversation, self.tokenizer, self.template)
            # behind another prompt than the model is given, it would write something else
            written = alone[slice(*marks[-1])] if marks and (not prompt or alone.startswith(prompt)) else ""
        found = self.compared(start, written)
        if found is None and not written:
            self.notes[NOT_AS_WRITTEN] = None
        if found is not None and self.text.startswith(prompt):
            # a mark that takes in the header, which the model is given
            found = max(found[0], len(prompt)), found[1]
        return found if found is not None and found[0] < found[1] else None
