"""What a template leaves out of a row."""

from __future__ import annotations

from typing import Any

import pytest

from data.kit import PROMPT, build_tokenizer, chat
from ftune.data.chat import load_template
from ftune.data.encode import Encoder
from ftune.data.encoded import RowError
from ftune.data.formats import Conversation
from ftune.data.unrendered import NOT_SHOWN

TURN = "<|im_start|>{{ m.role }}\n"


def notes(content: str, *conversations: list[dict[str, Any]], tools: tuple[Any, ...] = ()) -> dict[str, int]:
    """What is told of conversations under a template that shows a message's ``content`` so."""
    tokenizer = build_tokenizer(f"{{% for m in messages %}}{TURN}{content}<|im_end|>\n{{% endfor %}}{PROMPT}")
    encoder = Encoder(tokenizer, load_template(tokenizer), train_on="assistant", max_length=1000, too_long="error")
    return dict(
        encoder.encode([Conversation(tuple(turns), i, tools=tools) for i, turns in enumerate(conversations)]).notes
    )


@pytest.mark.parametrize(
    "shown", ["{{ m.content | upper }}", "{{ m.content | lower }}", "{{ m.content | trim | tojson }}"]
)
@pytest.mark.parametrize("said", ["yes Q", 'a "q"', "\n3 1 \n", "!?", "<think>Z</think>Q", "ÄQ\n\nq"])
def test_what_is_shown_in_another_way_is_shown(shown: str, said: str) -> None:
    assert notes(shown, chat("q", said)) == {}


@pytest.mark.parametrize(
    ("shown", "said", "missing"),
    [
        ("{{ m.content.split('.')[0] }}", "Yes. So it is", "`content` of messages"),
        ("{{ m.content.split('</think>')[-1] }}", "<think>Hm hm</think>yes", "'Hm hm' of messages"),
        ("{{ m.content.split('.')[-1] }}", "Yes, it is. So", "'Yes, it is. So' of messages"),
        ("{{ m.role }}", "yes", "`content` of messages"),
    ],
)
def test_part_of_an_answer_that_is_not_shown_is_refused(shown: str, said: str, missing: str) -> None:
    if missing.startswith("'Yes"):
        # the end is shown, the beginning is not
        assert notes(shown, chat("q", "So")) == {}
    with pytest.raises(RowError) as caught:
        notes(shown, chat("q", said))
    assert missing in caught.value.message
    assert "data.chat_template" in (caught.value.help or "")


def test_a_later_row_is_looked_at_as_the_first_is() -> None:
    shown = "{{ m.content.split('</think>')[-1] }}"
    with pytest.raises(RowError) as caught:
        notes(shown, chat("q", "yes"), chat("q", "<think>Hm hm</think>yes"))
    assert caught.value.row == 1


def test_keys_are_counted_by_row() -> None:
    named = [{"role": "user", "content": "q", "name": "bob"}, {"role": "assistant", "content": "yes"}]
    found = notes("{{ m.content }}", named, named, chat("q", "yes"))
    assert found == {f"{NOT_SHOWN}`name` of user messages": 2}
    assert notes("{{ m.name }}{{ m.content }}", named) == {}
    # an empty value says nothing
    assert notes("{{ m.content }}", [{**named[0], "name": ""}, {**named[1], "tags": []}]) == {}


def test_a_context_that_is_not_shown_is_told_and_not_refused() -> None:
    shown = "{{ m.content if m.role != 'system' }}"
    assert notes(shown, chat("q", "yes", system="be kind")) == {f"{NOT_SHOWN}`content` of system messages": 1}


def test_tools_that_are_not_all_shown_are_told() -> None:
    tools = tuple({"type": "function", "function": {"name": name}} for name in ("first", "second"))
    shown = "{{ tools[%s].function.name if loop.first }}{{ m.content }}"
    assert notes(shown % 1, chat("q", "yes"), tools=tools) == {}
    assert notes(shown % 0, chat("q", "yes"), tools=tools) == {f"{NOT_SHOWN}`tools`": 1}
