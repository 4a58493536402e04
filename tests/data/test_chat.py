"""Chat templates: which is taken, and how it renders."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.kit import PROMPT, TEMPLATES, build_tokenizer, chat
from ftune.data.chat import apply_template, generation_prompt, load_template
from ftune.data.formats import Conversation
from ftune.data.spans import render
from ftune.errors import DataError


def test_a_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATES["bare"])
    tokenizer = build_tokenizer("chatml")
    loaded = load_template(tokenizer, str(file))
    assert loaded is not None
    conversation = Conversation(tuple(chat("q", "yes")), 0)
    assert apply_template(conversation.messages, conversation, tokenizer, loaded) == "user: q\nassistant: yes\n"
    assert generation_prompt(conversation, 1, tokenizer, loaded) == "user: q\nassistant: "
    assert load_template(build_tokenizer(None)) is None


def test_a_template_runs_in_the_sandbox() -> None:
    tokenizer = build_tokenizer("{{ messages.__class__.__mro__ }}")
    loaded = load_template(tokenizer)
    assert loaded is not None
    conversation = Conversation(tuple(chat("q", "yes")), 0)
    with pytest.raises(DataError, match="SecurityError"):
        apply_template(conversation.messages, conversation, tokenizer, loaded)


@pytest.mark.parametrize("marks", [False, True])
def test_a_template_that_reads_texts_as_parts_gets_parts(marks: bool) -> None:
    # as those of models that see images; a string would show nothing, or stop the template
    inner = "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
    if marks:
        inner = (
            "{% if m.role == 'assistant' %}{% generation %}"
            + inner
            + "{% endgeneration %}{% else %}"
            + inner
            + "{% endif %}"
        )
    tokenizer = build_tokenizer("{% for m in messages %}{{ m.role }}:" + inner + "\n{% endfor %}" + PROMPT)
    loaded = load_template(tokenizer)
    assert loaded is not None
    assert loaded.parts
    found = render(Conversation(tuple(chat("q", "yes")), 0), tokenizer, loaded)
    assert "user:q" in found.text
    assert [found.text[start:end].strip() for start, end in found.spans] == ["assistant:yes" if not marks else "yes"]
    assert not load_template(build_tokenizer("chatml")).parts  # type: ignore[union-attr]
