"""Where a prompt ends in tokens: training has the tokens that generation has, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data.kit import SPECIALS, TEMPLATES, build_tokenizer, chat
from ftune.data.borders import Borders
from ftune.data.chat import generation_prompt, load_template
from ftune.data.encode import Encoder
from ftune.data.examples import IGNORE
from ftune.data.formats import Conversation, Plain, Record

WORDS = ["hello", "yes", "no", "user", "assistant", "system", "ab", "abc", "b", "c", "a", "q", ":", ".", "1", "12"]


def _metaspace(scheme: str) -> Tokenizer:
    """Unigram, as T5's and Llama's: a word with the space before it is one token."""
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in SPECIALS), ("▁", -3.0), ("\n", -4.0)]
    pieces += [(character, -8.0) for character in "abcdefghijklmnopqrstuvwxyz:.12<>|_-[]/IN ST\té日"]
    known = {piece for piece, _ in pieces}
    pieces += [(piece, -5.0) for word in WORDS for piece in (word, f"▁{word}") if piece not in known]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return raw


def _sentencepiece() -> Tokenizer:
    """BPE that falls back to bytes, as Llama 2's: a space is put before every text, and no words are split apart."""
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s"), ("y", "e"), ("ye", "s"), ("a", "b"), ("ab", "c"), ("\n", "\n")]
    characters = [*"abcdefghijklmnopqrstuvwxyz:.\n", "▁"]
    vocabulary = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *map("".join, merges)]
    raw = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def _wordpiece() -> Tokenizer:
    """As BERT's: white space is dropped."""
    characters = [piece for character in "abcdefghijklmnopqrstuvwxyz" for piece in (character, f"##{character}")]
    vocabulary = ["<unk>", *SPECIALS, *characters, *".:<>|_-[]/12", *(word for word in WORDS if len(word) > 1)]
    raw = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return raw


def _split_words() -> Tokenizer:
    """Byte-level BPE behind GPT-2's regular expression, which looks ahead over white space."""
    raw = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return raw


def _with_prefix_space() -> Tokenizer:
    """As RoBERTa's: a space is put before every text, and before what follows a special token."""
    raw = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    return raw


def _normalizing() -> Tokenizer:
    """Upper case becomes lower, and what is composed is taken apart: offsets are not those of the text."""
    raw = Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str())
    raw.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
    return raw


# those whose text comes back to the last space
EXACT = ("bytes", "words", "sentencepiece", "stripping")
RAW = {
    "bytes": lambda: Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str()),
    "words": _split_words,
    "first": lambda: _metaspace("first"),
    "always": lambda: _metaspace("always"),
    "sentencepiece": _sentencepiece,
    "wordpiece": _wordpiece,
    "prefix space": _with_prefix_space,
    "normalizing": _normalizing,
    # as Phi-3's: special tokens take the white space beside them
    "stripping": lambda: Tokenizer.from_str(build_tokenizer().backend_tokenizer.to_str()),
}


@cache
def tokenizer_of(kind: str, template: str | None = None, *, adds: bool = False) -> PreTrainedTokenizerFast:
    raw = RAW[kind]()
    strips = kind == "stripping"
    raw.add_special_tokens([AddedToken(token, special=True, rstrip=strips, lstrip=strips) for token in SPECIALS])
    if adds:
        ends = [(token, raw.token_to_id(token)) for token in ("<|bos|>", "<|eos|>")]
        raw.post_processor = processors.TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATES[template] if template else None
    return fast


def encoded(
    tokenizer: PreTrainedTokenizerFast, records: Sequence[Record]
) -> list[tuple[list[int], list[int], list[bool]]]:
    """Tokens of each record, those of its generation prompt, and which are trained."""
    template = load_template(tokenizer) if tokenizer.chat_template else None
    encoder = Encoder(tokenizer, template, train_on="assistant", max_length=1000, too_long="error")
    examples = encoder.encode(records).examples
    assert len(examples) == len(records)
    prompts = []
    for record in records:
        if isinstance(record, Plain):
            prompts.append(record.prompt)
        else:
            assert template is not None
            prompts.append(generation_prompt(record, len(record.messages) - 1, tokenizer, template))
    prompt_ids = encoder.prompt_ids(prompts, [isinstance(record, Plain) for record in records])
    return [
        (example.input_ids.tolist(), prompt, (example.labels != IGNORE).tolist())
        for example, prompt in zip(examples, prompt_ids, strict=True)
    ]


def said(random: Random, *, blank: bool = False) -> str:
    while True:
        text = "".join(random.choices("aabbc  \n\n1é.", k=random.randint(1 - blank, 7)))
        if blank or text.strip():
            return text


TEMPLATES["glued"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", ["chatml", "trims", "marks", "bare", "alternates", "returns", "glued"])
@pytest.mark.parametrize("kind", RAW)
def test_a_chat_begins_with_the_tokens_of_its_generation_prompt(kind: str, template: str) -> None:
    tokenizer, random = tokenizer_of(kind, template), Random(f"{kind} {template}")
    chats = [chat(*(said(random) for _ in range(2 * random.randint(1, 3)))) for _ in range(24)]
    found = encoded(tokenizer, [Conversation(tuple(turns), 0) for turns in chats])
    for turns, (ids, prompt, trained) in zip(chats, found, strict=True):
        assert ids[: len(prompt)] == prompt
        assert prompt == tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        # what the model has to write begins right behind the prompt
        assert trained[len(prompt)]
        # and nothing was put in between, or lost
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        texts = [tokenizer.decode(x) for x in (ids, whole)]
        if kind in EXACT:
            assert texts[0] == texts[1]
        # an unknown word swallows what is written without a space before it
        if "<unk>" not in "".join(texts):
            assert len({text.replace(" ", "") for text in texts}) == 1


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("kind", RAW)
def test_prompt_and_completion_meet_where_generation_begins(kind: str, adds: bool) -> None:
    tokenizer, random = tokenizer_of(kind, adds=adds), Random(f"{kind} {adds}")
    records = [Plain(said(random, blank=True), said(random), 0) for _ in range(50)]
    for record, (ids, prompt, trained) in zip(records, encoded(tokenizer, records), strict=True):
        alone = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
        assert prompt == [*([tokenizer.bos_token_id] if adds else []), *alone]
        assert ids[: len(prompt)] == prompt
        assert trained == [i >= max(len(prompt), 0) for i in range(len(ids))]
        assert ids.count(tokenizer.bos_token_id) == adds
        assert ids.count(tokenizer.eos_token_id) == 1
        if kind in EXACT:
            whole = tokenizer(record.prompt + record.completion, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(whole)


def test_an_answer_gets_no_space_that_was_not_written() -> None:
    for kind, prompt, answer, tokens in [
        ("first", "q: ", "hello", ["hello"]),
        ("always", "q:\n", "yes", ["yes"]),
        ("sentencepiece", "q:\n", "yes", ["yes"]),
        ("sentencepiece", "q:", " yes", ["▁yes"]),
        ("bytes", "hell", "o", ["o"]),
        ("wordpiece", "a", "b", ["##b"]),
    ]:
        tokenizer = tokenizer_of(kind)
        borders = Borders(tokenizer, frozenset())
        (ids,) = borders.behind([prompt], [answer])
        assert tokenizer.convert_ids_to_tokens(ids) == tokens, kind


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("", "<|bos|>hello<|eos|>\n", "<|bos|>hello<|eos|>"),
        ("", "hello <|eos|>", "<|bos|>hello <|eos|>"),
        ("", "hello", "<|bos|>hello<|eos|>"),
        ("", "<|bos|>hello", "<|bos|>hello<|eos|>"),
        ("<|bos|>q", "yes<|eos|>\n\n", "<|bos|>qyes<|eos|>"),
        ("q", "yes", "<|bos|>qyes<|eos|>"),
    ],
)
def test_a_beginning_and_an_end_come_once(prompt: str, completion: str, text: str) -> None:
    tokenizer = tokenizer_of("bytes", adds=True)
    ((ids, _, trained),) = encoded(tokenizer, [Plain(prompt, completion, 0)])
    assert tokenizer.decode(ids) == text
    assert not trained[0]
    assert trained[-1]


def test_a_template_that_begins_with_bos_gets_no_second() -> None:
    for adds in (True, False):
        tokenizer = tokenizer_of("bytes", "moves_system", adds=adds)
        ((ids, prompt, _),) = encoded(tokenizer, [Conversation(tuple(chat("q", "yes")), 0)])
        assert ids.count(tokenizer.bos_token_id) == prompt.count(tokenizer.bos_token_id) == 1
        assert ids.count(tokenizer.eos_token_id) == 1


def test_what_a_tokenizer_puts_before_every_text_is_found() -> None:
    raw = RAW["bytes"]()
    marks = [(token, raw.token_to_id(token)) for token in ("<|im_start|>", "<|bos|>", "<|eos|>")]
    # as GLM's: two tokens before every text
    raw.post_processor = processors.TemplateProcessing(single="<|im_start|> <|bos|> $A <|eos|>", special_tokens=marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|eos|>")
    assert Borders(fast, frozenset()).lead == [raw.token_to_id("<|im_start|>"), raw.token_to_id("<|bos|>")]
    assert Borders(tokenizer_of("bytes"), frozenset()).lead == []
