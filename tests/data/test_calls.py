"""Tool calls in the form that a template takes."""

from __future__ import annotations

from typing import Any

import pytest

from data.kit import PROMPT, build_tokenizer
from ftune.data.calls import Forms, canonical, other_value
from ftune.data.chat import apply_template, load_template
from ftune.data.formats import Conversation
from ftune.errors import DataError

ARGUMENTS = {"city": "Oslo", "on": True, "what": None}
AS_JSON = '{"city": "Oslo", "on": true, "what": null}'
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}


def messages(*, content: str = "", role: str = "tool") -> tuple[dict[str, Any], ...]:
    return (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": role, "content": "19", "tool_call_id": "c1"},
        {"role": "assistant", "content": "1 9"},
    )


def shown(template: str, conversation: tuple[dict[str, Any], ...] | None = None) -> str:
    tokenizer = build_tokenizer(template)
    loaded = load_template(tokenizer)
    assert loaded is not None
    found = Forms(tokenizer, loaded).fitted(Conversation(conversation or messages(), 0))
    return apply_template(found.messages, found, tokenizer, loaded)


def calls(arguments: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}"
        "<call>{{ f.name }}" + arguments + "</call>{% endfor %}\n{% endfor %}" + PROMPT
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("{{ f.arguments | tojson }}", AS_JSON),
        ("{{ f.arguments }}", AS_JSON),  # an object would come as Python prints it
        ("{{ '' + f.arguments }}", AS_JSON),  # an object cannot be added to a text
        (
            "{% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }};{% endfor %}",
            'city="Oslo";on=true;what=null;',
        ),
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", AS_JSON),
        ("{{ f | tojson }}", f'{{"name": "f", "arguments": {AS_JSON}}}'),
    ],
)
def test_arguments_are_written_once(arguments: str, text: str) -> None:
    assert f"<call>f{text}</call>" in shown(calls(arguments))


@pytest.mark.parametrize("condition", ["m.content is none", "m.content is not defined", "m.content == ''"])
def test_a_turn_that_only_calls_has_the_content_that_the_template_asks_for(condition: str) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.tool_calls and " + condition + " %}"
        "<call>{{ m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson) }}</call>"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}" + PROMPT
    )
    assert "<call>f" in shown(template)


@pytest.mark.parametrize("role", ["tool", "ipython", "observation", "function"])
def test_a_result_has_the_role_that_the_template_knows(role: str) -> None:
    base = calls("{{ f.arguments | tojson }}")
    silent = base.replace(
        "{{ m.role }}:", f"{{% if m.role in ('user', 'assistant', '{role}') %}}{{{{ m.role }}}}:"
    ).replace("{{ m.content }}", "{{ m.content }}{% endif %}")
    refuses = f"{{% if m.role not in ('user', 'assistant', '{role}') %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    strict = base.replace("{{ m.role }}:", f"{refuses}{{{{ m.role }}}}:")
    for template in (silent, strict):
        assert f"{role}:19" in shown(template)


@pytest.mark.parametrize(
    "call",
    [
        {"id": "c1", "name": "f", "arguments": ARGUMENTS},
        {"id": "c1", "name": "f", "arguments": AS_JSON},
        {"id": "c1", "name": "f", "parameters": ARGUMENTS},
        {"id": "c1", "function": {"name": "f", "arguments": AS_JSON}},
        f'{{"id": "c1", "type": "function", "function": {{"name": "f", "arguments": {AS_JSON}}}}}',
    ],
)
def test_every_form_is_openais(call: Any) -> None:
    assert canonical({"role": "assistant", "tool_calls": [call]}, "messages[1]")["tool_calls"] == [CALL]


def test_arguments_that_are_no_object_stay_and_none_are_an_empty_one() -> None:
    for given, kept in [("Oslo", "Oslo"), ("[1]", "[1]"), ("", {}), (None, {})]:
        (call,) = canonical({"tool_calls": [{"name": "f", "arguments": given}]}, "messages[1]")["tool_calls"]
        assert call["function"]["arguments"] == kept


@pytest.mark.parametrize("call", [3, "f()", {"arguments": {}}, {"function": {}}])
def test_what_is_no_call_is_refused(call: Any) -> None:
    with pytest.raises(DataError, match=r"messages\[1\].tool_calls\[0\]"):
        canonical({"tool_calls": [call]}, "messages[1]")


@pytest.mark.parametrize(
    "value", ["a", "Q", "q", "1", "12", '{"a": "b"}', "[1]", "!", "", 3, 2.5, True, {"a": ["b"]}, None]
)
def test_another_value_is_another(value: Any) -> None:
    other = other_value(value)
    assert other != value
    if isinstance(value, str):
        assert other.lower() != value.lower()
        assert not value.isalnum() or len(other) == len(value)
