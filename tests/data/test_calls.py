"""Tool calls in the form that a template takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data.kit import PROMPT, build_tokenizer
from ftune.data.calls import ARGUMENTS_AS_TEXT, Forms, canonical, check_arguments, other_value
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


@pytest.mark.parametrize("order", [("[1, 2]", {"x": 1}), ({"x": 1}, "[1, 2]"), ({}, {"x": 1}), (["a"], {"x": 1})])
def test_the_form_does_not_depend_on_the_order_of_rows(order: tuple[Any, Any]) -> None:
    tokenizer = build_tokenizer(calls("{{ f.arguments }}"))
    loaded = load_template(tokenizer)
    assert loaded is not None
    forms = Forms(tokenizer, loaded)
    for value in order:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": value}}
        turns = (
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        )
        found = forms.fitted(Conversation(turns, 0))
        expected = value if isinstance(value, str) else json.dumps(value)
        assert f"<call>f{expected}</call>" in apply_template(found.messages, found, tokenizer, loaded)


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


MIXED: list[Any] = [{}, '{"x": 1}', {"x": [1, {"y": None}]}, "[1, 2]", ["a"], "print(1)", 5, {"x": "it's"}]


@pytest.mark.parametrize("first", range(len(MIXED)))
@pytest.mark.parametrize("template", ["{{ f.arguments }}", "{{ f.arguments | tojson }}", "{{ f | tojson }}"])
def test_what_comes_first_changes_nothing(template: str, first: int) -> None:
    tokenizer = build_tokenizer(calls(template))
    loaded = load_template(tokenizer)
    assert loaded is not None

    def texts(forms: Forms, order: list[int]) -> dict[int, str]:
        found = {}
        for i in order:
            call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": MIXED[i]}}
            message = canonical({"role": "assistant", "content": "", "tool_calls": [call]}, "m")
            fitted = forms.fitted(Conversation(({"role": "user", "content": "call {'x': 1}"}, message), 0))
            found[i] = apply_template(fitted.messages, fitted, tokenizer, loaded)
        return found

    alone = {i: texts(Forms(tokenizer, loaded), [i])[i] for i in range(len(MIXED))}
    order = [first, *(i for i in range(len(MIXED)) if i != first)]
    assert texts(Forms(tokenizer, loaded), order) == alone
    assert '{"x": 1}' in alone[1]
    assert '{"x": [1, {"y": null}]}' in alone[2]


def given(arguments: Any) -> Conversation:
    message = canonical(
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}, "m"
    )
    return Conversation(({"role": "user", "content": "q"}, message), 0)


@pytest.mark.parametrize("broken", ['{"x": 1', "{'x': 1}", '{"x": 1}}', "[1, 2", '{"x": NaN}', " {x: 1}"])
def test_broken_json_is_refused_where_it_is_trained(broken: str) -> None:
    with pytest.raises(DataError, match=r"messages\[1\]\.tool_calls\[0\]: `arguments` is no valid JSON"):
        check_arguments(given(broken), [1])
    assert check_arguments(given(broken), []) == [ARGUMENTS_AS_TEXT]


@pytest.mark.parametrize("arguments", ["print(1)", "[1]", ["a"], "5"])
def test_text_as_arguments_is_told(arguments: Any) -> None:
    assert check_arguments(given(arguments), [1]) == [ARGUMENTS_AS_TEXT]


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}', "", None, " {}"])
def test_objects_in_either_form_are_not_told(arguments: Any) -> None:
    assert check_arguments(given(arguments), [1]) == []
