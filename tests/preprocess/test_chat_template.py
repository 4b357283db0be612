"""Chat templates: found where tokenizers keep them, rendered as transformers renders them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from preprocess.sources.chat_template import (
    GENERATED,
    GENERATED_END,
    ChatTemplate,
    TemplateError,
    load_template,
)
from shared.errors import UserError
from tests.preprocess.chat_inputs import EVERYDAY, GENERATION, HEADERS, STYLES, Style, messages, open_style

CONVERSATIONS = [
    messages("Hi", "Hello."),
    messages("  white\n\n", "\tspace \n", "'quotes' & <b>\"html\"</b> \\n", "{{ no template }} {% raw %}"),
    messages("\u00e9\u4f60\U0001f600", "<|im_end|> [/INST] </s>", "user\n", "<end_of_turn>"),
]


def as_template_wants(template: ChatTemplate, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": template.content(turn["content"])} for turn in turns]


def template_of(directory: Path, text: str, **settings: str) -> ChatTemplate:
    """A template in a directory with nothing else."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text(text)
    return load_template(directory, file=None, **{"name": "default", "date": "", **settings})


def refusal(directory: Path, config: dict[str, Any] | None = None, **settings: Any) -> str:
    if config is not None:
        directory.mkdir(exist_ok=True)
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_template(directory, **{"file": None, "name": "default", "date": "", **settings})
    return str(caught.value)


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_rendering_equals_that_of_transformers(name: str, tmp_path: Path) -> None:
    today = datetime.date.today().isoformat() if name == "headers" else ""
    opened = open_style(tmp_path / "t", STYLES[name], date=today)
    systems = ["", "Be brief. "] if name != "turns" else [""]
    for system in systems:
        for turns in CONVERSATIONS:
            said = as_template_wants(opened.template, ([*messages(system=system), *turns]))
            ours = opened.template.render(said).replace(GENERATED, "").replace(GENERATED_END, "")
            assert ours == opened.reference.apply_chat_template(said, tokenize=False)


def test_tags_filters_and_globals_render_as_in_transformers(tmp_path: Path) -> None:
    text = """
    {%- set ns = namespace(count=0, open=true) %}
    {%- macro shout(words) %}{{ words | upper }}!{% endmacro %}
      {% for message in messages %}
        {% if loop.index > 3 %}{% break %}{% endif %}
        {% set inside = 1 %}
        {% generation %}
        {% set inside = 2 %}
        {% set ns.count = ns.count + 1 %}
        {{ shout(message.content) }} {{ message | tojson(indent=2) }} {{ message | tojson }}
        {% endgeneration %}
        {{ inside }}
        {% if loop.last %}{% continue %}{% endif %}
        {# a comment #}{{ dict(a=ns.count) | items | list }} {{ range(3) | join('-') }} {{ message.content[:2] }}
      {% endfor %}
      {{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ eos_token }} {{ messages | length }}
    """
    opened = open_style(tmp_path / "t", Style(text, ()))
    for turns in CONVERSATIONS:
        ours = opened.template.render(turns).replace(GENERATED, "").replace(GENERATED_END, "")
        assert ours == opened.reference.apply_chat_template(turns, tokenize=False)
        assert "SPACE \n!" in ours or "HELLO" in ours or "[/INST]" in ours


def test_marks_of_generation_lie_where_transformers_finds_them(tmp_path: Path) -> None:
    opened = open_style(tmp_path / "t", STYLES["generation"])
    assert opened.template.marks_generation
    for turns in CONVERSATIONS:
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], [spans] = render_jinja_template(
            [turns], chat_template=GENERATION, return_assistant_tokens_mask=True
        )
        generated = [
            part.split(GENERATED_END)[0] for part in opened.template.render(turns).split(GENERATED)[1:]
        ]
        assert generated == [text[start:end] for start, end in spans]


def test_a_word_in_a_text_is_no_generation_tag(tmp_path: Path) -> None:
    body = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert not template_of(
        tmp_path, "{# generation #}{% set generation = 1 %} generation " + body
    ).marks_generation
    block = "{%- generation -%}\n{{ m.content }}{%- endgeneration %}"
    assert template_of(tmp_path, body.replace("{{ m.content }}", block)).marks_generation


def test_without_a_date_the_clock_is_not_there_and_with_one_it_stands(tmp_path: Path) -> None:
    rendered = [
        template_of(tmp_path / "t", HEADERS.replace("bos_token", "''"), date=date).render(messages("a", "b"))
        for date in ("", "2031-02-03")
    ]
    assert "Today Date: 26 Jul 2024\n" in rendered[0] and "Today Date: 03 Feb 2031\n" in rendered[1]
    needs = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"strftime_now.*set `date` of the source"):
        template_of(tmp_path / "t", needs)
    assert template_of(tmp_path / "t", needs, date="2031-02-03").render(messages("a", "b")) == "2031ab"


@pytest.mark.parametrize("text", ["{{ lipsum() }}", "{{ [1, 2] | random }}"])
def test_what_chance_decides_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lipsum|random"):
        template_of(tmp_path, text + "{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set x = cycler.__init__.__globals__ %}{{ x.os }}",
        "{{ raise_exception.__globals__.os }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not render"):
        template_of(tmp_path, attack + "{% for m in messages %}{{ m.content }}{% endfor %}")


def test_what_a_template_raises_is_the_message(tmp_path: Path) -> None:
    opened = open_style(tmp_path / "t", STYLES["inst"])
    with pytest.raises(TemplateError, match="roles must alternate"):
        opened.template.render(messages("a", "b")[::-1])
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        opened.reference.apply_chat_template(messages("a", "b")[::-1], tokenize=False)


# Where it is found


def test_templates_are_found_in_the_order_of_transformers(tmp_path: Path) -> None:
    def write(name: str, content: object) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    def first_word(name: str = "default") -> str:
        template = load_template(tmp_path, file=None, name=name, date="")
        return template.render(messages("a", "b")).split()[0]

    body = " {% for m in messages %}{{ m.content }}{% endfor %}"
    write("tokenizer_config.json", {})
    write("chat_template.json", {"chat_template": "processor" + body})
    assert first_word() == "processor"
    write("tokenizer_config.json", {"chat_template": "config" + body})
    assert first_word() == "config"
    named = [{"name": "default", "template": "one" + body}, {"name": "tool_use", "template": "two" + body}]
    write("tokenizer_config.json", {"chat_template": named})
    assert (first_word(), first_word("tool_use")) == ("one", "two")
    write("chat_template.jinja", "file" + body)
    write("additional_chat_templates/rag.jinja", "more" + body)
    assert (first_word(), first_word("rag")) == ("file", "more")
    write("other.jinja", "named" + body)
    named_file = load_template(tmp_path, file=tmp_path / "other.jinja", name="default", date="")
    assert named_file.render(messages("a", "b")) == "named ab"


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    assert "no chat template" in refusal(tmp_path, {}) and "name a Jinja file" in refusal(tmp_path, {})
    several = {"chat_template": [{"name": "tool_use", "template": "x"}]}
    assert "no chat template 'default'; known: tool_use" in refusal(tmp_path, several)
    assert "did you mean 'tool_use'?" in refusal(tmp_path, several, name="tools_use")
    assert "neither a string nor a list" in refusal(tmp_path, {"chat_template": [1]})
    assert "not a chat template" in refusal(tmp_path, {"chat_template": "{% for %}"})
    assert "cannot be read (No such file" in refusal(tmp_path, file=tmp_path / "absent.jinja")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    assert "is UTF-8 text" in refusal(tmp_path, file=tmp_path / "latin.jinja")
    assert "(it leaves them out)" in refusal(tmp_path, {"chat_template": "nothing of it"})
    assert "(it raises: never)" in refusal(tmp_path, {"chat_template": "{{ raise_exception('never') }}"})
