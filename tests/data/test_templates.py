"""Rows of many kinds under templates with the habits of well-known models: what is trained, told or refused."""

from __future__ import annotations

import re
from functools import cache
from itertools import groupby
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.templates import TEMPLATES
from ftune.data.chat import generation_prompt, load_template
from ftune.data.encode import BEHIND_LAST, CALLS_AS_TEXT, OTHER_IDS, Encoder
from ftune.data.encoded import Part, RowError
from ftune.data.examples import IGNORE
from ftune.data.formats import Conversation
from ftune.data.spans import NOT_AS_WRITTEN
from ftune.data.turns import messages_in
from ftune.data.unrendered import NOT_SHOWN

SPECIALS = (
    "<|pad|> <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] "
    "[/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "<start_of_turn> <end_of_turn> <|start|> <|end|> <|message|> <|channel|> <|call|> <|return|> <|User|> "
    "<|Assistant|> <|sep|> <|output|> <|system|> <|user|> <|assistant|> <|observation|>"
).split()


@cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATES[template]
    return fast


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any, number: str = "abcdefghi") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "w", "parameters": SCHEMA}},)
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"}
AS_STRING = '{"city":"Oslo"}'
ARGUMENTS = {"city": "Oslo"}


def with_call(*calls: dict[str, Any], content: str | None = None) -> list[dict[str, Any]]:
    return [user("q"), says(content, tool_calls=list(calls)), RESULT, says("3 degrees")]


ROWS: dict[str, tuple[list[dict[str, Any]], tuple[Any, ...]]] = {
    "plain": ([user("q"), says("yes"), user("r"), says("no")], ()),
    "system": ([{"role": "system", "content": "Be kind."}, user("q"), says("yes")], ()),
    "developer": ([{"role": "developer", "content": "Be kind."}, user("q"), says("yes")], ()),
    "call": (with_call(call("weather", ARGUMENTS)), TOOLS),
    "call, no tools": (with_call(call("weather", ARGUMENTS)), ()),
    "last call, no tools": ([user("q"), says(None, tool_calls=[call("weather", ARGUMENTS)])], ()),
    "call with text": ([user("q"), says("Let me see.", tool_calls=[call("weather", ARGUMENTS)])], TOOLS),
    "two calls": (with_call(call("weather", ARGUMENTS), call("rain", {}, "bbbbbbbbb")), TOOLS),
    "tools": ([user("q"), says("yes")], TOOLS),
    "reasoning": ([user("q"), says("yes", reasoning_content="Hm."), user("r"), says("no", reasoning="Ah.")], ()),
    "think": ([user("q"), says("<think>\nHm hm.\n</think>\n\nyes")], ()),
    "name": ([user("q", name="bob"), says("yes")], ()),
    "without ids": (
        [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": '{"degrees": 3}'},
            {"from": "gpt", "value": "3 degrees"},
        ],
        (),
    ),
    "OpenAI's ids": (
        [
            user("q"),
            says(None, tool_calls=[call("weather", ARGUMENTS, "call_abc")]),
            {**RESULT, "tool_call_id": "call_abc"},
            says("3 degrees"),
        ],
        TOOLS,
    ),
    "asks last": ([user("q"), says("yes"), user("bye")], ()),
}


def part(
    template: str, messages: list[dict[str, Any]], tools: tuple[Any, ...] = (), train_on: str = "assistant"
) -> Part:
    tokenizer = tokenizer_of(template)
    encoder = Encoder(tokenizer, load_template(tokenizer), train_on=train_on, max_length=9000, too_long="error")
    return encoder.encode([Conversation(tuple(messages_in({"messages": messages}, "messages")), 0, tools=tools)])


def trained(template: str, found: Part) -> list[str]:
    """The trained texts of the one example that there is."""
    return [
        tokenizer_of(template).decode([int(example.input_ids[i]) for i in places])
        for example in found.examples
        for kept, places in groupby(range(len(example)), key=lambda i: bool(example.labels[i] != IGNORE))
        if kept
    ]


JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
EXPECTED: dict[tuple[str, str], list[str]] = {
    ("chatml_tools", "plain"): ["yes<|im_end|>", "no<|im_end|>"],
    ("chatml_tools", "developer"): ["yes<|im_end|>"],  # as a system message: the template knows no developer
    ("chatml_tools", "call"): [JSON_CALL, "3 degrees<|im_end|>"],
    ("chatml_tools", "without ids"): [JSON_CALL, "3 degrees<|im_end|>"],
    ("chatml_tools", "call with text"): [f"Let me see.\n{JSON_CALL}"],
    ("llama3", "call"): ['{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "3 degrees<|eot_id|>"],
    ("llama3", "system"): ["yes<|eot_id|>"],
    ("mistral3", "plain"): [" yes</s>", " no</s>"],
    ("mistral3", "system"): [" yes</s>"],
    ("mistral3", "call"): [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]</s>',
        " 3 degrees</s>",
    ],
    # its ids must have nine letters or digits
    ("mistral3", "without ids"): [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "000000001"}]</s>',
        " 3 degrees</s>",
    ],
    ("mistral3", "OpenAI's ids"): [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "000000001"}]</s>',
        " 3 degrees</s>",
    ],
    ("qwen3", "plain"): ["<think>\n\n</think>\n\nno<|im_end|>"],
    ("qwen3", "reasoning"): ["<think>\nAh.\n</think>\n\nno<|im_end|>"],
    ("qwen3", "call with text"): [f"<think>\n\n</think>\n\nLet me see.\n{JSON_CALL}"],
    ("qwen3", "asks last"): ["<think>\n\n</think>\n\nyes<|im_end|>"],
    ("gemma", "plain"): ["yes<end_of_turn>", "no<end_of_turn>"],
    ("gpt_oss", "plain"): ["<|channel|>final<|message|>yes", "<|channel|>final<|message|>no<|return|>"],
    ("gpt_oss", "reasoning"): [
        "<|channel|>analysis<|message|>Ah.<|end|><|start|>assistant<|channel|>final<|message|>no<|return|>"
    ],
    ("gpt_oss", "call"): [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        "<|channel|>final<|message|>3 degrees<|return|>",
    ],
    # takes a string, and calls only where there is no content at all
    ("deepseek_r1", "call, no tools"): [
        "3 degrees<|end|>",
    ],
    ("deepseek_r1", "last call, no tools"): [
        '<|call|>function<|sep|>weather\n```json\n{"city": "Oslo"}\n```<|end|>',
    ],
    ("plain", "plain"): ["yes<|end|>", "no<|end|>\n</s>"],
    ("arguments_one_by_one", "call"): [
        "<function=weather><parameter=city>Oslo</parameter></function><|end|>",
        "3 degrees<|end|>",
    ],
}


@pytest.mark.parametrize(("template", "row"), EXPECTED)
def test_what_the_assistant_writes_is_trained(template: str, row: str) -> None:
    assert trained(template, part(template, *ROWS[row])) == EXPECTED[template, row]


CALLING = ["chatml_tools", "llama3", "mistral3", "qwen3", "gpt_oss", "arguments_one_by_one", "deepseek_r1"]


@pytest.mark.parametrize("template", CALLING)
def test_a_call_is_the_same_in_every_form(template: str) -> None:
    tools = () if template == "deepseek_r1" else TOOLS
    forms = [
        call("weather", ARGUMENTS),
        call("weather", AS_STRING),
        {"id": "abcdefghi", "name": "weather", "arguments": ARGUMENTS},
        {"id": "abcdefghi", "name": "weather", "parameters": AS_STRING},
    ]
    found = [part(template, with_call(form)[:2], tools) for form in forms]
    assert len({one.examples.fingerprint() for one in found}) == 1
    # nothing is escaped: neither JSON in a string nor a dictionary as Python prints it
    (text,) = trained(template, found[1])
    assert "Oslo" in text
    assert "\\" not in text
    assert "'" not in text


REFUSED = {
    ("llama3", "two calls"): "only supports single tool-calls",
    ("llama3", "call with text"): r"does not show `content` of messages\[1\], which is trained",
    ("mistral3", "call with text"): r"does not show `content` of messages\[1\], which is trained",
    ("gpt_oss", "two calls"): r"does not show the tool call of messages\[1\], which is trained",
    ("gemma", "system"): "System role not supported",
    ("gemma", "call with text"): "does not show `tools`, which the messages use",
    ("deepseek_r1", "call"): "does not show `tools`, which the messages use",
    ("deepseek_r1", "think"): r"does not show 'Hm hm.' of messages\[1\].content, which is trained",
    (
        "plain",
        "call",
    ): r"does not show `tools`, which the messages use, and the tool call of messages\[1\], which is trained",
    ("plain", "call, no tools"): r"does not show the tool call of messages\[1\], which is trained",
}


@pytest.mark.parametrize(("template", "row"), REFUSED)
def test_an_answer_that_is_not_shown_is_refused(template: str, row: str) -> None:
    with pytest.raises(RowError) as caught:
        part(template, *ROWS[row])
    assert re.search(REFUSED[template, row], caught.value.message)
    # a turn that is not trained may be left out of the text, but not without a word
    if row == "call, no tools":
        messages, tools = ROWS[row]
        found = part(template, [messages[0], {**messages[1], "weight": 0}, *messages[2:]], tools)
        assert f"{NOT_SHOWN}`tool_calls[].name` of earlier assistant messages" in found.notes


TOLD: dict[tuple[str, str], list[str]] = {
    ("chatml_tools", "plain"): [],
    ("chatml_tools", "name"): [f"{NOT_SHOWN}`name` of user messages"],
    ("chatml_tools", "call"): [
        f"{NOT_SHOWN}`tool_call_id` of tool messages",
        f"{NOT_SHOWN}`tool_calls[].id` of earlier assistant messages",
    ],
    ("mistral3", "call"): [],
    ("mistral3", "OpenAI's ids"): [OTHER_IDS],
    ("mistral3", "without ids"): [],
    ("mistral3", "system"): [],  # it is in the generation prompt, behind which the answer is trained
    ("llama3", "reasoning"): [
        f"{NOT_SHOWN}`reasoning_content` of earlier assistant messages",
        f"{NOT_SHOWN}`reasoning` of assistant messages",
    ],
    ("qwen3", "reasoning"): [NOT_AS_WRITTEN, f"{NOT_SHOWN}`reasoning_content` of earlier assistant messages"],
    ("gemma", "tools"): [f"{NOT_SHOWN}`tools`"],
    ("plain", "without ids"): [CALLS_AS_TEXT],
    ("qwen3", "asks last"): [BEHIND_LAST],
}


@pytest.mark.parametrize(("template", "row"), TOLD)
def test_what_is_not_shown_is_named(template: str, row: str) -> None:
    assert sorted(part(template, *ROWS[row]).notes) == sorted(TOLD[template, row])


def test_a_call_that_a_row_has_as_text_stays_text_where_calls_are_not_shown() -> None:
    found = trained("plain", part("plain", *ROWS["without ids"]))
    assert found[0] == '{"name": "weather", "arguments": {"city": "Oslo"}}<|end|>'


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ["plain", "system", "call", "reasoning", "without ids"])
def test_a_row_begins_with_its_generation_prompt(template: str, row: str) -> None:
    messages, tools = ROWS[row]
    try:
        found = part(template, messages, tools)
    except RowError:
        pytest.skip("refused")
    tokenizer = tokenizer_of(template)
    loaded = load_template(tokenizer)
    assert loaded is not None
    encoder = Encoder(tokenizer, loaded, train_on="assistant", max_length=9000, too_long="error")
    record = Conversation(tuple(messages_in({"messages": messages}, "messages")), 0, tools=tools)
    prompt = generation_prompt(encoder.prepared(record), len(record.messages) - 1, tokenizer, loaded)
    (ids,) = encoder.prompt_ids([prompt], [False])
    (example,) = found.examples
    assert example.input_ids[: len(ids)].tolist() == ids


def test_the_last_turn_alone_can_be_trained() -> None:
    found = part("qwen3", *ROWS["reasoning"], train_on="last")
    assert trained("qwen3", found) == ["<think>\nAh.\n</think>\n\nno<|im_end|>"]
    assert NOT_AS_WRITTEN not in found.notes
