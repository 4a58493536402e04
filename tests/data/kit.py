"""A small fast tokenizer, chat templates of many habits, and shorthand for conversations."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
# merges across a line break: a token that straddles the end of the generation prompt is possible
MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ċ", "Ċ"),
    ("Ġ", "y"),
    ("Ġy", "e"),
    ("Ġye", "s"),
]

OPEN = "<|im_start|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": "{% for m in messages %}" + OPEN + "{{ m['content'] }}<|im_end|>\n{% endfor %}" + PROMPT,
    "trims": "{% for m in messages %}" + OPEN + "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}" + PROMPT,
    "marks": (
        "{% for m in messages %}" + OPEN + "{% if m['role'] == 'assistant' %}"
        "{%- generation -%}{{ m['content'] + '<|im_end|>\n' }}{%- endgeneration -%}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
    ),
    "bare": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    # as Mistral's: the system message goes into the last user turn, so earlier turns change as others follow
    "moves_system": (
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}<|bos|>"
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{% if m['content'] == users[-1]['content'] and messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
    ),
    # as Mistral's third version: the system message is shown only where the last message is a question
    "shows_system_last": (
        "<|bos|>{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
    ),
    # as Qwen3's: reasoning is dropped from all but the last turn, which gets an empty one where there is none
    "drops_reasoning": (
        "{% for m in messages %}{% set c = m['content'] %}" + OPEN + "{% if m['role'] == 'assistant' %}"
        "{% set answer = c.split('</think>')[-1].lstrip('\n') %}"
        "{% set reasoning = c.split('</think>')[0].split('<think>')[-1] if '</think>' in c else '' %}"
        "{% if loop.last %}<think>\n{{ reasoning | trim }}\n</think>\n\n{% endif %}{{ answer }}"
        "{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
    ),
    "drops_reasoning_marked": (
        "{% for m in messages %}{% set c = m['content'] %}" + OPEN + "{% if m['role'] == 'assistant' %}"
        "{% set answer = c.split('</think>')[-1].lstrip('\n') %}"
        "{% set reasoning = c.split('</think>')[0].split('<think>')[-1] if '</think>' in c else '' %}"
        "{%- generation -%}{% if loop.last %}{{ '<think>\n' + reasoning | trim + '\n</think>\n\n' }}{% endif %}"
        "{{ answer }}<|im_end|>{%- endgeneration -%}"
        "{% else %}{{ c }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT
    ),
    # as gpt-oss': the generation prompt stops before the header's end, and the last turn has an end of its own
    "returns": (
        "{% for m in messages %}{{ m['role'] + '<|im_start|>' + m['content'] }}"
        "{{ '<|eos|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    ),
    # as DeepSeek-R1's: the generation prompt opens a reasoning that finished turns do not show
    "prompts_reasoning": "{% for m in messages %}" + OPEN + "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "alternates": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}" + OPEN + "{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}" + PROMPT
    ),
}


def build_tokenizer(template: str | None = "chatml", *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; ``template`` is a name in TEMPLATES or a Jinja text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *("".join(pair) for pair in MERGES)]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", SPECIALS.index("<|bos|>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATES.get(template, template) if template is not None else None
    return fast


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant in alternation."""
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns
