"""For the tests of chat data: templates in the styles that are in use, tokenizers for them, conversations.

Each template is written for these tests in the manner of a family of models: the same structure, tags and quirks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from preprocess.sources.chat_rendering import Specials, specials_of
from preprocess.sources.chat_template import ChatTemplate, load_template
from preprocess.synthetic import train_tokenizer
from shared.tokens import TextTokenizer, TokenNames, load_tokenizer

CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A date, white space trimmed, a loop variable in a namespace.
HEADERS = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set day = strftime_now("%d %b %Y") %}
{%- else %}
    {%- set day = "26 Jul 2024" %}
{%- endif %}
{%- set ns = namespace(system='') %}
{%- for message in messages if message['role'] == 'system' %}{% set ns.system = message['content'] | trim %}{% endfor %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + day + "\\n\\n" + ns.system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
"""

# Roles must alternate, the system's text goes into the first question, every answer ends a text.
INST = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if loop.first and system is defined -%}
            {%- set system = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -%}
            {{ bos_token + '[INST] ' + system + message['content'].strip() + ' [/INST]' }}
        {%- else -%}
            {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
        {%- endif -%}
    {%- else -%}
        {{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
"""

# The assistant is called model, the system is refused.
TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
"""

# Only lists of parts are shown.
PARTS = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}
{% if part['type'] == 'image' or 'image_url' in part %}<|vision|>
{%- elif 'text' in part %}{{ part['text'] }}{% endif %}
{% endfor %}
<|im_end|>
{% endfor %}
"""

# The template says what is generated, tool calls as JSON.
GENERATION = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- generation -%}
            {%- if message.reasoning_content -%}
                {{- '<think>' + message.reasoning_content + '</think>' -}}
            {%- endif -%}
            {{- message.content -}}
            {%- for call in message.tool_calls or [] -%}
                {{- '<tool_call>' + (call | tojson) + '</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
"""

# Special tokens swallow the line break that the template writes behind them.
SWALLOWING = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}
"""


@dataclass(frozen=True)
class Style:
    """A template, the special tokens of its family, and what the stream begins and ends with."""

    template: str
    special: tuple[str, ...]
    eos: str = ""
    rstrip: bool = False
    tokens: dict[str, Any] = field(default_factory=dict)


STYLES = {
    "chatml": Style(CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "headers": Style(HEADERS, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), eos="<|eot_id|>"),
    "inst": Style(INST, ()),
    "turns": Style(TURNS, ("<start_of_turn>", "<end_of_turn>")),
    "parts": Style(PARTS, ("<|im_start|>", "<|im_end|>", "<|vision|>")),
    "generation": Style(GENERATION, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "swallowing": Style(SWALLOWING, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), rstrip=True),
}
EVERYDAY = ["chatml", "headers", "inst", "turns", "parts", "generation", "swallowing"]


def chat_tokenizer(directory: Path, style: Style, *, base: Path | None = None) -> Path:
    """Bytes (or the tokenizer in `base`) with the special tokens of a style, and its template in the config."""
    if base is None:
        train_tokenizer([], directory, vocabulary_size=262)
    else:
        directory.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((base / name).read_bytes())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, rstrip=style.rstrip) for name in style.special]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = style.template
    if style.eos:
        config["eos_token"] = style.eos
    for name in style.special:
        config.setdefault("added_tokens_decoder", {})[str(tokenizer.token_to_id(name))] = {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": style.rstrip,
            "single_word": False,
            "special": True,
        }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def space_tokenizer(directory: Path, style: Style, scheme: str) -> Path:
    """A BPE over words that begin with a space, which "first" or "always" (or "never") gets one of its own."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    names = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "img": "<img>", "boi": "<boi>", "eoi": "<eoi>"}
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *names.values(), *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hi [INST] there, a cat. No [/INST]"] * 9, trainer)
    added = [AddedToken(name, normalized=False) for name in (*names.values(), *style.special)]
    directory.mkdir(parents=True)
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {f"{part}_token": name for part, name in names.items()} | {"chat_template": style.template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@dataclass(frozen=True, repr=False)
class Opened:
    directory: Path
    tokenizer: TextTokenizer
    template: ChatTemplate
    specials: Specials
    reference: Any


def open_style(directory: Path, style: Style, *, base: Path | None = None, date: str = "") -> Opened:
    """Our tokenizer and template, and transformers' own tokenizer over the same files as `reference`."""
    return open_directory(chat_tokenizer(directory, style, base=base), date)


def open_directory(directory: Path, date: str = "") -> Opened:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load_tokenizer(directory, TokenNames())
    template = load_template(directory, file=None, name="default", date=date)
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    return Opened(directory, tokenizer, template, specials_of(tokenizer), reference)


def messages(*turns: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return [*first, *({"role": roles[n % 2], "content": text} for n, text in enumerate(turns))]


def llava(*turns: str, image: Any = None, **fields: Any) -> dict[str, Any]:
    """A LLaVA record, human and gpt in turn."""
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"conversations": said, **({} if image is None else {"image": image}), **fields}
