"""Configuration: one TOML file per run, dotted overrides on the command line, frozen dataclasses.

    defaults  <  preset  <  file.toml  <  --section.key value

A config is a tree of dataclasses. Each validates itself in `__post_init__` and raises `ValueError` with the
value in the message; this module adds where the value came from. Supported field types: int, float, bool,
str, `Literal`, `int | Literal["auto"]`, `tuple[T, ...]`, `X | None`, nested dataclasses, `dict[str, Dataclass]` for
named tables, and unions of dataclasses that a `Literal` field tells apart, such as `format`.
A dataclass with a class attribute `PRESETS`, tables of values by name, takes `preset = "NAME"` beside its keys;
what is resolved and saved are the values.
An unknown key, a wrong type and a missing key are `UserError`s that name the key (and the closest match).
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shared.errors import UserError, closest

T = TypeVar("T")


def load_config(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Build `cls` from its defaults, the TOML file at `path` and `--key value` overrides.

    Raises:
        UserError: the file cannot be read, or a key or value does not fit; names the key and its origin.
    """
    tree = _read_toml(path) if path is not None else {}
    origins = [str(path)] if path is not None else []
    if overrides or not origins:
        origins.append("command line")
    origin = " and ".join(origins)
    for key, values in parse_overrides(overrides):
        _set(tree, cls, key, values)
    return _build(cls, tree, origin, "")


def parse_overrides(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`["--a.b", "1", "--c", "x", "y"]` -> `[("a.b", ["1"]), ("c", ["x", "y"])]`; `--a.b=1` works too."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            pairs.append((key, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            raise UserError(f"command line: {word!r} is not an option; write --key value")
    return pairs


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars; `None` entries are left out, as in TOML."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
            return {name: plain(entry) for name, entry in fields if entry is not None}
        if isinstance(value, Mapping):
            return {str(key): plain(entry) for key, entry in value.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, tuple):
            return [plain(entry) for entry in value]  # pyright: ignore[reportUnknownVariableType]
        return value

    return plain(config)


def to_toml(config: Any) -> str:
    """The resolved config as a TOML file that loads back to an equal config."""
    lines: list[str] = []

    def emit(table: dict[str, Any], prefix: str) -> None:
        scalars = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if prefix and (scalars or not table):
            lines.extend(["", f"[{prefix}]"])
        lines.extend(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in scalars.items())
        for key, value in table.items():
            if isinstance(value, dict):
                emit(value, f"{prefix}.{_toml_key(key)}" if prefix else _toml_key(key))

    emit(to_dict(config), "")
    return "\n".join(lines).lstrip("\n") + "\n"


def require_at_least(config: Any, minimum: int, *names: str) -> None:
    """For `__post_init__`: the named fields of a config are at least `minimum`.

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {getattr(config, name)}")


def require_above_zero(config: Any, *names: str) -> None:
    """For `__post_init__`: the named fields of a config are above 0.

    Raises:
        ValueError: names the field and its value.
    """
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m.group()):04X}", escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(entry) for entry in value) + "]"  # pyright: ignore[reportUnknownVariableType]
    return repr(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file; see configs/ for examples") from None
    except IsADirectoryError:
        raise UserError(f"config {path}: is a directory, expected a TOML file") from None
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); correct the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid TOML: {error}") from None


def _set(tree: dict[str, Any], cls: type, key: str, values: list[str]) -> None:
    """Store one override in the tree, converted to the type that its field declares."""
    where, node, hint = "command line", tree, Any
    current: Any = cls
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if dataclasses.is_dataclass(current):
            # --max-bytes is max_bytes; the name of a table (below) is the user's own and keeps its dashes.
            part = parts[depth] = part.replace("-", "_")
            keys = _keys(current)
            if part not in keys:
                prefix = ".".join(parts[:depth])
                options = [f"{prefix}.{name}" if prefix else name for name in keys]
                raise UserError(
                    f"{where}: unknown key --{key}; {closest('.'.join(parts[: depth + 1]), options)}"
                )
            hint = keys[part]
        elif get_origin(current) is dict:
            hint = get_args(current)[1]
        else:
            raise UserError(f"{where}: --{key}: {'.'.join(parts[:depth])} has no keys of its own")
        current = _without_none(hint)
        if _is_union(current) and depth < len(parts) - 1:
            table = node.get(part)
            tag, options = _variants(current)
            # The table in the file says which it is, or an override before this one; the tag itself is in all.
            presets = _presets(current)
            told = {**presets.get(str(table.get("preset")), {}), **table} if isinstance(table, dict) else {}
            chosen = str(told.get(tag))
            after = parts[depth + 1 : depth + 2]
            if chosen not in options and after != [tag] and not (presets and after == ["preset"]):
                others = [name for name in node if name != part]
                meant = f", or {closest(part, others)}" if others else ""
                section = "--" + ".".join(parts[: depth + 1])
                told_by = f"{section}.{tag}" + (f" or {section}.preset" if presets else "")
                raise UserError(f"{where}: --{key}: set {told_by} first{meant}")
            current = options.get(chosen) or next(iter(options.values()))
        if depth < len(parts) - 1:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                section = ".".join(parts[: depth + 1])
                raise UserError(f"{where}: --{key}: {section} is {node!r} in the file, expected a table")
    node[parts[-1]] = _from_words(hint, values, f"{where}: --{key}")


def _from_words(hint: Any, words: list[str], where: str) -> Any:
    inner = _without_none(hint)
    if get_origin(inner) is tuple:
        return [_from_words(get_args(inner)[0], [word], where) for word in words]
    if inner is bool and not words:
        return True
    if len(words) != 1:
        raise UserError(f"{where}: expected one value, got {len(words)}")
    word = words[0]
    if dataclasses.is_dataclass(inner) or get_origin(inner) is dict or _is_union(inner):
        raise UserError(f"{where}: is a section; set one of its keys, {where.split()[-1]}.KEY")
    try:
        return _scalar(inner, word)
    except (KeyError, ValueError):
        raise UserError(f"{where}: expected {_name(inner)}, got {word!r}") from None


def _scalar(hint: Any, word: str) -> Any:
    """What a word means; one that is no option of a `Literal` is left for `_convert` to refuse."""
    if hint is bool:
        return {"true": True, "false": False}[word.lower()]
    if hint in (int, float):
        return hint(word)
    options = {str(option): option for option in _literals(hint)}
    if _is_choice(hint) and word not in options:
        return next(_scalar(option, word) for option in get_args(hint) if get_origin(option) is not Literal)
    return options.get(word, word)


def _build(cls: type[T], tree: Mapping[str, Any], origin: str, prefix: str) -> T:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass type
    for key in tree:
        if key not in fields:
            raise UserError(f"{origin}: unknown key {prefix + key!r}; {closest(key, _keys(cls))}")
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        if name in tree:
            arguments[name] = _convert(hints[name], tree[name], origin, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            inner = _without_none(hints[name])
            if not dataclasses.is_dataclass(inner):
                raise UserError(f"{origin}: missing key {prefix + name!r} ({_name(hints[name])})")
            arguments[name] = _build(inner, {}, origin, prefix + name + ".")  # type: ignore[arg-type]
    try:
        return cls(**arguments)
    except UserError:
        raise
    except ValueError as error:
        section = prefix.rstrip(".")
        raise UserError(f"{origin}: {f'[{section}] ' if section else ''}{error}") from None


def _convert(hint: Any, value: Any, origin: str, key: str) -> Any:
    inner = _without_none(hint)
    value = _with_preset(inner, value, origin, key)
    if _is_union(inner):
        inner = _choose(inner, value, origin, key)
    kind = get_origin(inner)
    fits = False
    if dataclasses.is_dataclass(inner):
        if isinstance(value, Mapping):
            return _build(inner, value, origin, key + ".")  # type: ignore[arg-type]
    elif kind is dict:
        if isinstance(value, Mapping):
            entry = get_args(inner)[1]
            return {name: _convert(entry, item, origin, f"{key}.{name}") for name, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    elif kind is tuple:
        if isinstance(value, list):
            element = get_args(inner)[0]
            return tuple(_convert(element, item, origin, f"{key}[{i}]") for i, item in enumerate(value))  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
    elif _is_choice(inner):
        others = [option for option in get_args(inner) if get_origin(option) is not Literal]
        fits = value in _literals(inner) or (type(value) in others)
    elif kind is Literal:
        fits = value in get_args(inner)
        if not fits and isinstance(value, str):
            options = [str(option) for option in get_args(inner)]
            raise UserError(
                f"{origin}: {key}: {value!r} is not one of {', '.join(options)}; {closest(value, options)}"
            )
    elif inner is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        value = float(value) if fits else value
    elif inner is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, inner)
    if not fits:
        raise UserError(f"{origin}: {key}: expected {_name(inner)}, got {value!r}")
    return value


def _presets(hint: Any) -> dict[str, dict[str, Any]]:
    """Tables of values by name, of a dataclass or of all in a union."""
    classes = get_args(hint) if _is_union(hint) else (hint,)
    return {name: values for cls in classes for name, values in getattr(cls, "PRESETS", {}).items()}


def _keys(cls: Any) -> dict[str, Any]:
    """What may stand in the table of a dataclass, and its types."""
    hints = get_type_hints(cls)
    keys = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return {"preset": str, **keys} if _presets(cls) else keys


def _with_preset(hint: Any, table: Any, origin: str, key: str) -> Any:
    """The table with the values of its preset under its own."""
    presets = _presets(hint)
    if not presets or not isinstance(table, Mapping) or "preset" not in table:
        return table
    name = str(table["preset"])
    if name not in presets:
        raise UserError(f"{origin}: {key}.preset: {name!r} is no preset; {closest(name, presets)}")
    own = {name: value for name, value in table.items() if name != "preset"}
    # What tells the dataclasses of a union apart, or the kinds that one of them describes.
    tag = _variants(hint)[0] if _is_union(hint) else "type"
    kind = presets[name].get(tag)
    if kind is not None and own.get(tag, kind) != kind:
        raise UserError(
            f"{origin}: {key}.preset: {name!r} is of {tag} {kind}, but {key}.{tag} is {own[tag]!r}; "
            f"set --{key}.{tag} {kind}, or take a preset of that {tag}"
        )
    return _laid_over(presets[name], own)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables in one; where both hold a key, `above` holds, and tables in them are merged likewise."""
    both = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping):
            both[name] = _laid_over(below[name], above[name])
    return both


def _without_none(hint: Any) -> Any:
    """`X | None` -> `X`."""
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return options[0] if len(options) == 1 else hint
    return hint


def _is_union(hint: Any) -> bool:
    """A union of tables."""
    return get_origin(hint) in (Union, types.UnionType) and all(map(dataclasses.is_dataclass, get_args(hint)))


def _is_choice(hint: Any) -> bool:
    """A scalar, or a word in its place: `int | Literal["auto"]`."""
    return get_origin(hint) in (Union, types.UnionType) and not _is_union(hint)


def _literals(hint: Any) -> tuple[Any, ...]:
    options = get_args(hint) if _is_choice(hint) else (hint,)
    return tuple(word for option in options if get_origin(option) is Literal for word in get_args(option))


def _variants(union: Any) -> tuple[str, dict[str, type]]:
    """The field that tells the dataclasses of a union apart, and which of its values means which."""
    classes = get_args(union)
    hints = [get_type_hints(cls) for cls in classes]
    for tag in hints[0]:
        if all(get_origin(of_class.get(tag)) is Literal for of_class in hints):
            options = {
                value: cls
                for cls, of_class in zip(classes, hints, strict=True)
                for value in get_args(of_class[tag])
            }
            if len(options) == sum(len(get_args(of_class[tag])) for of_class in hints):
                return tag, options
    raise TypeError(f"no Literal field tells {union} apart")


def _choose(union: Any, table: Any, origin: str, key: str) -> Any:
    """The dataclass that a table asks for; the union itself for what is no table."""
    if not isinstance(table, Mapping):
        return union
    tag, options = _variants(union)
    names = list(options)
    if tag not in table:
        instead = f", or set {key}.preset" if _presets(union) else ""
        raise UserError(f"{origin}: missing key {f'{key}.{tag}'!r} (one of {', '.join(names)}){instead}")
    if str(table[tag]) not in options:
        raise UserError(
            f"{origin}: {key}.{tag}: {table[tag]!r} is not one of {', '.join(names)}; "
            f"{closest(str(table[tag]), names)}"
        )
    return options[str(table[tag])]


def _name(hint: Any) -> str:
    inner = _without_none(hint)
    if _is_choice(inner):
        return " or ".join(_name(option).replace("one of ", "") for option in get_args(inner))
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(inner))
    if get_origin(inner) is tuple:
        return f"a list of {_name(get_args(inner)[0])}"
    if get_origin(inner) is dict or dataclasses.is_dataclass(inner) or _is_union(inner):
        return "a table"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(
        inner, str(inner)
    )
