"""The tokenizer's own chat template: found, compiled as inference compiles it, rendered.

    chat_template.jinja (and additional_chat_templates/NAME.jinja)  <- first that is there
    tokenizer_config.json: chat_template, a string or a list of named ones
    chat_template.json: chat_template

Filters, tags and white space are those of transformers, so that a rendering here equals the one at inference. What
would make two renderings differ is left out: lipsum, the filter `random`, and the clock unless a date is given.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shared.errors import UserError, closest
from shared.files import read_json

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# Unicode sets 32 characters aside for the inner use of programs: no text that is exchanged holds them. The first
# few mark places in a rendering.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
PICTURE, CONTENT, CONTENT_END, GENERATED, GENERATED_END = NONCHARACTERS[:5]

Message = dict[str, Any]


class TemplateError(ValueError):
    """The template does not render these messages; the message is its own where it raises one."""


@dataclass(frozen=True, eq=False, slots=True)
class ChatTemplate:
    """A compiled template.

    content: how it wants a message's text, as it is or as the one part of a list.
    marks_generation: it says itself what the assistant generates, with {% generation %} blocks; a rendering then
        holds GENERATED and GENERATED_END around them.
    """

    compiled: Template
    variables: dict[str, str]
    content: Callable[[str], object]
    marks_generation: bool

    def render(self, messages: list[Message], tools: object = None) -> str:
        """The conversation as text.

        Raises:
            TemplateError: the template raises, or fails over what the messages hold.
        """
        import jinja2

        try:
            return self.compiled.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **self.variables
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise TemplateError(str(error) or type(error).__name__) from None
        except RecursionError:
            raise TemplateError("nested too deeply") from None


def load_template(directory: Path, *, file: Path | None, name: str, date: str) -> ChatTemplate:
    """The template of the tokenizer in `directory`, or the one in `file`.

    name: which one, where there are several. date: what day it is for a template that asks; "" for none.

    Raises:
        UserError: there is none, or it is no template, or it does not render a question and an answer.
    """
    import jinja2

    config = read_json(directory / "tokenizer_config.json", mend="take the tokenizer's own file again")
    where, source = _find(directory, config, file, name)
    try:
        compiled = _environment(date).from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: not a chat template ({error}); correct it") from None
    tokens = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    variables = {key: value for key, value in tokens.items() if value is not None}
    marks = _has_generation(compiled.environment, source)
    return _probed(where, partial(ChatTemplate, compiled, variables, marks_generation=marks))


def _find(directory: Path, config: dict[str, Any], file: Path | None, name: str) -> tuple[str, str]:
    """Where the template is, for messages, and its text."""
    if file is not None:
        return str(file), _read(file)
    found: dict[str, str] = {}
    where = directory / "chat_template.jinja"
    if where.is_file():
        found["default"] = _read(where)
        found |= {path.stem: _read(path) for path in directory.glob("additional_chat_templates/*.jinja")}
    elif (declared := config.get("chat_template")) is not None:
        where = directory / "tokenizer_config.json"
        found = _named(where, declared)
    elif (where := directory / "chat_template.json").is_file():
        found = _named(where, read_json(where, mend="take the tokenizer's own file again"))
    if not found:
        raise UserError(
            f"tokenizer {directory}: no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json or chat_template.json); take it from the model's instruct version, or name "
            f"a Jinja file as `template` of the source"
        )
    if name not in found:
        raise UserError(f"{where}: no chat template {name!r}; {closest(name, found)}")
    return str(where), found[name]


def _named(where: Path, declared: Any) -> dict[str, str]:
    """A string, {"chat_template": ...} or [{"name": ..., "template": ...}] -> templates by name."""
    try:
        if isinstance(declared, dict):
            declared = declared["chat_template"]
        entries = [{"name": "default", "template": declared}] if isinstance(declared, str) else declared
        return {str(entry["name"]): str(entry["template"]) for entry in entries}
    except (KeyError, TypeError):
        raise UserError(
            f"{where}: chat_template is neither a string nor a list of objects with name and template; "
            f"take the tokenizer's own file again"
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name the chat template's file (relative to the "
            f"tokenizer's directory)"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a chat template is UTF-8 text ({error}); convert it") from None


def _environment(date: str) -> Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} .. {% endgeneration %}: its body between two marks."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                nodes.Output([nodes.TemplateData(mark)]).set_lineno(line)
                for mark in (GENERATED, GENERATED_END)
            )
            # A scope of its own, as transformers' macro call gives it.
            return [begin, nodes.Scope(body).set_lineno(line), end]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    known = cast(dict[str, Any], environment.globals)
    known["raise_exception"] = raise_exception
    del known["lipsum"], environment.filters["random"]
    if date:
        known["strftime_now"] = datetime.datetime.fromisoformat(date).strftime
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja2's own filter writes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _has_generation(environment: Environment, source: str) -> bool:
    words = [(kind, value) for _, kind, value in environment.lex(source) if kind != "whitespace"]
    return any(
        before[0] == "block_begin" and word == ("name", "generation") for before, word in pairwise(words)
    )


def _content(entry: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    value = entry.get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else None


def _as_part(text: str) -> object:
    return [{"type": "text", "text": text}]


def _probed(where: str, make: Callable[..., ChatTemplate]) -> ChatTemplate:
    """The template with the form of content in which it shows both sides of a conversation.

    Text alone is tried first: a template that takes it writes no picture token of its own, which nobody needs here.
    """
    words = [CONTENT + number + CONTENT_END for number in "01"]
    problem = ""
    for content in (str, _as_part):
        template = make(content=content)
        turns = zip(("user", "assistant"), words, strict=True)
        try:
            rendered = template.render([{"role": role, "content": content(word)} for role, word in turns])
        except TemplateError as error:
            problem = problem or f"it raises: {error}"
            continue
        if all(word in rendered for word in words):
            return template
        problem = problem or "it leaves them out"
    hint = "set `date` of the source" if "strftime_now" in problem else "take another template"
    raise UserError(f"{where}: does not render a question and its answer ({problem}); {hint}")
