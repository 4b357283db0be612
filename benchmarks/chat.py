"""Conversations to tokens and labels: per second and thread, beside transformers' own `apply_chat_template`.

    python benchmarks/chat.py CONVERSATIONS.json TOKENIZER_DIRECTORY

The conversations are LLaVA's; no picture is opened. The baseline renders and tokenizes each with a template that
marks what is generated (`return_assistant_tokens_mask`), as trainers do; it cuts nothing at pictures, and special
tokens that a user writes become special tokens. Both learn the same characters. They run in turn, by CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from preprocess.sources.chat_rendering import specials_of
from preprocess.sources.chat_template import load_template
from preprocess.sources.chat_text import chat_texts
from preprocess.sources.chat_turns import ROLES, read_conversation
from preprocess.text import encode_texts
from shared.tokens import load_tokenizer

# No special token but the end of text: it renders with any tokenizer.
TEMPLATE = """\
{%- for message in messages -%}
    {{- '[' + message.role + ']\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("conversations", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument(
        "--repeat", type=int, default=20, help="each conversation so often, numbered: no two are alike"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    records = [
        {**record, "conversations": [{**t, "value": f"{t['value']} {n}"} for t in record["conversations"]]}
        for n in range(options.repeat)
        for record in json.loads(options.conversations.read_text())
    ]
    ours, theirs = our_way(options.tokenizer), their_way(options.tokenizer)
    rounds = [(seconds(ours, records), seconds(theirs, records)) for _ in range(options.rounds)]
    figures = {
        "conversations": len(records),
        "per_s": len(records) / statistics.median(first for first, _ in rounds),
        "baseline_per_s": len(records) / statistics.median(second for _, second in rounds),
        "ratio": statistics.median(second / first for first, second in rounds),
    }
    print(
        f"{len(records)} conversations, median of {options.rounds} rounds: {figures['per_s']:.0f}/s, "
        f"baseline {figures['baseline_per_s']:.0f}/s, ratio {figures['ratio']:.2f}"
    )
    if options.json:
        print(json.dumps(figures))


def our_way(directory: Path) -> Callable[[list[Any]], object]:
    tokenizer = load_tokenizer(directory)
    specials = specials_of(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "template.jinja"
        file.write_text(TEMPLATE)
        template = load_template(directory, file=file, name="default", date="")

    def work(records: list[Any]) -> object:
        texts = [
            text
            for record in records
            for text in chat_texts(read_conversation(record), template, specials, "all")[0]
        ]
        return encode_texts(texts, tokenizer)

    return work


def their_way(directory: Path) -> Callable[[list[Any]], object]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)

    def work(records: list[Any]) -> object:
        return [
            tokenizer.apply_chat_template(
                [{"role": ROLES[t["from"]], "content": t["value"]} for t in record["conversations"]],
                chat_template=TEMPLATE,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            for record in records
        ]

    return work


def seconds(work: Callable[[list[Any]], object], records: list[Any]) -> float:
    start = time.process_time()
    work(records)
    return time.process_time() - start


if __name__ == "__main__":
    main()
