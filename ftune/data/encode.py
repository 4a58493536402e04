"""Records as token ids with what is trained of them.

An ``Encoder`` and what it is given and returns can be sent to another process; see ``workers``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftune.data.borders import Borders
from ftune.data.calls import Forms, canonical, check_arguments
from ftune.data.chat import ChatTemplate, Span, special_tokens
from ftune.data.control import ControlTokens
from ftune.data.encoded import Encoded, Part, RowError
from ftune.data.examples import Examples, Ids
from ftune.data.formats import Conversation, Plain, Record
from ftune.data.huge import HUGE, Bound, bound_of
from ftune.data.pieces import pieces
from ftune.data.spans import Rendered, assistant_turns, render
from ftune.data.unrendered import Unrendered
from ftune.data.weights import weighed
from ftune.data.windows import windows
from ftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "encodable"]

CALLS_AS_TEXT = "the chat template shows no tool calls: they are trained as the text that the rows have"
BEHIND_LAST = "messages behind the last answer are left out: no trained token follows them"
BEGINNING_ONLY = (
    f"of {HUGE:,} characters or more: no more of the beginning is tokenized than data.max_length needs, and at least "
    "as many tokens are lost as are counted"
)
OTHER_IDS = "tool calls get ids of nine digits: the chat template takes no others"


class Encoder:
    """Records to token ids and what is trained of them, many at a time.

    Args:
        tokenizer: A fast one.
        template: For conversations.
        train_on: ``assistant``, ``last`` or ``all``, as in the recipe.
        max_length: Tokens that are kept of an example.
        too_long: What becomes of longer ones: ``truncate``, ``skip``, ``error`` (which skips, and leaves the error
            to whoever knows the rows) or ``split``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        *,
        train_on: str,
        max_length: int,
        too_long: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._max_length = max_length
        self._too_long = too_long
        self._specials = frozenset(special_tokens(tokenizer).values())
        self._is_special = np.zeros(max(len(tokenizer), *self._specials) + 1, dtype=np.bool_)
        self._is_special[list(self._specials)] = True
        self._blank: dict[int, bool] = {}
        self._control = ControlTokens(tokenizer)
        self._borders = Borders(tokenizer, self._specials)
        self._forms = Forms(tokenizer, template) if template is not None else None
        self._unrendered = Unrendered(tokenizer, template) if template is not None else None

    def encode(self, records: Sequence[Record]) -> Part:
        """Every record as an example, in order.

        Raises:
            RowError: A record cannot be rendered, or the tokenizer lacks what it needs.
        """
        notes: Counter[str] = Counter()
        plain = iter(self._plain([record for record in records if isinstance(record, Plain)], notes))
        chats = iter(self._conversations([record for record in records if isinstance(record, Conversation)], notes))
        encoded = [next(plain if isinstance(record, Plain) else chats) for record in records]
        return self._part(records, encoded, notes)

    def prepared(self, conversation: Conversation) -> Conversation:
        """The conversation as it is given to the template.

        Raises:
            DataError: A tool call or a weight is none.
        """
        return self._fitted(_canonical(conversation))

    def _fitted(self, conversation: Conversation) -> Conversation:
        """The same of a conversation whose tool calls are canonical."""
        weightless, _, _ = weighed(conversation, "assistant")
        return self._forms.fitted(weightless) if self._forms is not None else weightless

    def prompt_ids(self, prompts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
        """The tokens that the model is given to answer from: those with which the trained row begins.

        Args:
            prompts: Generation prompts, rendered or plain.
            plain: Whether each is plain text, before which stands what the tokenizer puts before every text.
        """
        found = self._borders.ids(prompts)
        return [self._led(ids) if untouched else ids for ids, untouched in zip(found, plain, strict=True)]

    @cached_property
    def _bound(self) -> Bound | None:
        """How much text a token can stand for; found out when there is a huge text."""
        return bound_of(self._tokenizer)

    def _surely_too_long(self, *texts: str) -> int:
        """How many tokens huge texts have at least, where that alone leaves the row out; 0 otherwise."""
        if not _huge(*texts) or self._too_long not in ("skip", "error"):
            return 0
        # each rounded up: the texts are tokenized apart
        least = sum(map(self._least, texts))
        return least if least > self._max_length else 0

    def _least(self, text: str) -> int:
        """How many tokens a text has at least; 0 where that is not known."""
        return self._bound.least(text) if self._bound is not None else 0

    def _in_pieces(
        self, text: str, prompt_end: int | None, spans: Sequence[Span] | None, notes: Counter[str]
    ) -> Encoded:
        """A huge text, as far as it can be kept; all behind the prompt is trained where there are no spans."""
        ids, trained = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        count = end = 0
        for piece in pieces(text, self._borders, prompt_end):
            ids.append(piece.ids)
            if spans is None:
                trained.append(np.full(len(piece.ids), piece.start >= (prompt_end or 0)))
            else:
                trained.append(self._inside(piece.ids, piece.offsets, spans))
            count, end = count + len(piece.ids), piece.end
            if self._too_long != "split" and count > self._max_length:
                break
        behind = trained_behind = 0
        if end < len(text):
            notes[BEGINNING_ONLY] += 1
            behind = self._least(text[end:])
            within = [(prompt_end or 0, len(text))] if spans is None else spans
            trained_behind = sum(self._least(text[max(start, end) : last]) for start, last in within if last > end)
        return Encoded(np.concatenate(ids), np.concatenate(trained), behind, trained_behind)

    def _led(self, ids: list[int]) -> list[int]:
        """Ids behind what the tokenizer puts before every text, unless the text brings it itself."""
        lead = self._borders.lead
        return ids if ids[: len(lead)] == lead else [*lead, *ids]

    def _plain(self, records: list[Plain], notes: Counter[str]) -> list[Encoded | int]:
        """Prompt, completion and end-of-sequence token; of rows that are left out, their least number of tokens."""
        if not records:
            return []
        eos, eos_text = self._tokenizer.eos_token_id, self._tokenizer.eos_token
        if eos is None:
            raise RowError(None, "plain text ends with an end-of-sequence token, and the tokenizer has none", help=None)
        texts: list[tuple[str, str]] = []
        for record in records:
            # what stands behind a written end, a line break mostly, is never generated
            stripped = record.completion.rstrip()
            texts.append((record.prompt, stripped if stripped.endswith(eos_text) else record.completion))
        small = [("", "") if _huge(*both) else both for both in texts]
        prompts, answers = [prompt for prompt, _ in small], [answer for _, answer in small]
        examples: list[Encoded | int] = []
        for both, before, answer in zip(
            texts, self._borders.ids(prompts), self._borders.behind(prompts, answers), strict=True
        ):
            if _huge(*both):
                examples.append(self._surely_too_long(*both) or self._huge_plain(*both, eos, notes))
                continue
            context = len(self._led(before)) if before else 0
            ids = self._led([*before, *answer])
            ids += [] if ids[-1:] == [eos] else [eos]
            # a beginning that the text brings itself is no target: nothing precedes it
            context = context or len(self._borders.lead)
            examples.append(Encoded(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= context))
        return examples

    def _huge_plain(self, prompt: str, answer: str, eos: int, notes: Counter[str]) -> Encoded:
        """As ``_plain`` makes it, in pieces."""
        found = self._in_pieces(prompt + answer, len(prompt), None, notes)
        lead = self._borders.lead
        brought = list(found.ids[: len(lead)]) == lead
        # of what is cut off, the end of the sequence is one
        cut = found.behind > 0 or (self._too_long != "split" and len(found.ids) > self._max_length)
        end = [] if cut or list(found.ids[-1:]) == [eos] else [eos]
        ids = np.array([*([] if brought else lead), *found.ids, *end], dtype=np.int32)
        trained = np.concatenate(
            [np.zeros(0 if brought else len(lead), np.bool_), found.trained, np.ones(len(end), np.bool_)]
        )
        trained[: len(lead)] = False
        return found._replace(ids=ids, trained=trained)

    def _conversations(self, records: list[Conversation], notes: Counter[str]) -> list[Encoded | int]:
        """The whole rendered text in the tokens that the model meets when it is used."""
        if not records:
            return []
        if self._template is None:
            raise RowError(
                records[0].row,
                "messages need a chat template, and the tokenizer has none",
                help="name a Jinja file as `data.chat_template`, or give the data as strings",
            )
        found: list[Rendered] = []
        for record in records:
            try:
                rendered = self._rendered(record, self._template, notes)
            except DataError as error:
                raise RowError(record.row, error.message, error.help) from error
            found.append(rendered)
        texts = ["" if _huge(rendered.text) else rendered.text for rendered in found]
        ends = [None if _huge(rendered.text) else rendered.prompt_end for rendered in found]
        batch = self._borders.tokenized(texts, return_offsets_mapping=True)
        agree = self._borders.agree(texts, ends, batch)
        examples: list[Encoded | int] = []
        for rendered, fits, ids, offsets in zip(found, agree, batch["input_ids"], batch["offset_mapping"], strict=True):
            if _huge(rendered.text):
                # only the whole text: a template may leave out what the row says
                examples.append(
                    self._surely_too_long(rendered.text)
                    or self._in_pieces(rendered.text, rendered.prompt_end, rendered.spans, notes)
                )
                continue
            if not fits:
                assert rendered.prompt_end is not None
                ids, offsets = self._borders.split(rendered.text, rendered.prompt_end)
            whole = np.array(ids, dtype=np.int32)
            examples.append(Encoded(whole, self._inside(whole, offsets, rendered.spans)))
        return examples

    def _rendered(self, record: Conversation, template: ChatTemplate, notes: Counter[str]) -> Rendered:
        """One conversation as text; counts what is to be told of it."""
        _, turns, said = weighed(record, self._train_on)
        given = _canonical(record)
        conversation = self._fitted(given)
        if _calls(record):
            trained_on = range(len(record.messages)) if self._train_on == "all" else turns
            said += check_arguments(given, trained_on)
        if self._train_on != "all":
            # a question without an answer would only make the last answer look like an earlier one
            end = 1 + max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
            if end < len(conversation.messages):
                conversation = replace(conversation, messages=conversation.messages[:end])
                said.append(BEHIND_LAST)
        rendered = render(conversation, self._tokenizer, template, turns)
        encodable(rendered.text)
        assert self._unrendered is not None
        everything = assistant_turns(conversation) if self._train_on == "all" else None
        wanted, trained = everything or turns, everything or rendered.trained
        lost = self._unrendered.check(conversation, rendered, wanted, trained)
        if _calls(record) and not _calls(conversation):
            said.append(CALLS_AS_TEXT)
        if _calls(conversation) and _ids(record) - _ids(conversation):
            said.append(OTHER_IDS)
        notes.update({*said, *rendered.notes, *lost})
        return rendered

    def _inside(
        self, ids: Ids, offsets: Sequence[Span] | NDArray[np.int64], spans: Sequence[Span]
    ) -> NDArray[np.bool_]:
        """Which tokens lie inside a span: (L,) bool.

        One that lies across an end belongs to neither side, unless it is special (and takes white space with it).
        """
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        special = self._is_special[ids]
        inside = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            whole = (starts >= start) & (starts < end) & (ends <= end)
            inside |= whole | special & (starts < end) & (ends > start)
        return inside

    def _ends(self, trained: Ids) -> bool:
        """Whether the last trained token is special; white space that a template puts behind it does not count."""
        for token in map(int, trained[::-1]):
            if token in self._specials:
                return True
            if token not in self._blank:
                self._blank[token] = not self._tokenizer.decode([token]).strip()
            if not self._blank[token]:
                return False
        return False

    def _part(self, records: Sequence[Record], encoded: list[Encoded | int], notes: Counter[str]) -> Part:
        """Cut or split what is too long, leave out what has no target, count both."""
        kept: list[tuple[Encoded, int]] = []
        too_long: list[tuple[int, int]] = []
        first_targets: list[int] = []
        counts: Counter[str] = Counter()
        longest = 0
        for record, found in zip(records, encoded, strict=True):
            length = found if isinstance(found, int) else len(found.ids) + found.behind
            longest = max(longest, length)
            if length > self._max_length:
                too_long.append((record.row, length))
            if isinstance(found, int):
                counts["lost_tokens"] += found
                continue
            ids, trained, _, trained_behind = found
            if self._train_on == "all":
                trained, trained_behind = np.ones_like(trained), found.behind
            if length > self._max_length and self._too_long != "split":
                behind = self._max_length if self._too_long == "truncate" else 0
                counts["lost_tokens"] += length - behind
                counts["lost_target_tokens"] += int(np.count_nonzero(trained[max(behind, 1) :])) + trained_behind
                if not behind:
                    continue
            cut = [Encoded(ids, trained)]
            if length > self._max_length:
                cut = [Encoded(*window) for window in windows(ids, trained, self._max_length, self._borders.lead)]
                cut = cut if self._too_long == "split" else cut[:1]
            cut = [example for example in cut if example.trained[1:].any()]
            if not cut:
                counts["no_target"] += 1
                first_targets += [1 + int(i) for i in np.flatnonzero(trained[1:])[:1]]
                continue
            counts["split"] += len(cut) > 1
            if length > self._max_length and self._too_long == "truncate":
                counts["truncated"] += 1
                counts["cut_answers"] += bool(trained[self._max_length :].any() or trained_behind)
            else:
                counts["ended"] += self._ends(ids[trained])
            kept += [(example, record.row) for example in cut]
        examples = Examples(
            np.concatenate([example.ids for example, _ in kept] or [np.zeros(0, np.int32)]),
            np.concatenate([example.trained for example, _ in kept] or [np.zeros(0, np.bool_)]),
            np.array([len(example.ids) for example, _ in kept], dtype=np.int64),
            np.array([row for _, row in kept], dtype=np.int64),
        )
        control = tuple(
            (record.row, token)
            for record in records
            if isinstance(record, Conversation) and (token := self._control.first_in(record)) is not None
        )
        return Part(
            examples,
            tuple(too_long),
            tuple(first_targets),
            notes,
            longest_before=longest,
            control=control,
            **counts,
        )


def _huge(*texts: str) -> bool:
    return sum(map(len, texts)) >= HUGE


def _calls(conversation: Conversation) -> bool:
    return any(message.get("tool_calls") for message in conversation.messages)


def _canonical(conversation: Conversation) -> Conversation:
    """The conversation with its tool calls as ``canonical`` makes them.

    Raises:
        DataError: A tool call is none.
    """
    if not _calls(conversation):
        return conversation
    messages = tuple(canonical(message, f"messages[{i}]") for i, message in enumerate(conversation.messages))
    return replace(conversation, messages=messages)


def _ids(conversation: Conversation) -> set[str]:
    """The ids of its tool calls."""
    calls = [call for message in conversation.messages for call in message.get("tool_calls") or ()]
    return {str(call["id"]) for call in calls if isinstance(call, Mapping) and call.get("id")}


def encodable(text: str) -> str:
    """A rendered text as it is; a ``tools`` string may bring in what no reader of files has seen.

    Raises:
        DataError: It holds half of a surrogate pair, which tokenizers refuse without saying where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"the rendered conversation holds {escape}, half of a surrogate pair, which is no character",
            help="write both halves of the pair, or the character itself in UTF-8",
        ) from error
    return text
