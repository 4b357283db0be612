"""Configuration: where a value comes from, and how a wrong one is reported."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import load_config, parse_overrides, to_dict, to_toml
from shared.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    lr: float = 1e-3
    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, ...] = (0.9, 0.95)
    fused: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    paths: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    S: int
    N: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    output: str
    size: Size
    steps: int = 10
    merge: Literal[1, 2] = 2
    limit: int | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    spare: Optimizer | None = None
    sources: dict[str, Source] = field(default_factory=dict[str, Source])

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


TOML = """
output = "out"
steps = 20
[size]
S = 8
[optimizer]
lr = 3e-4
[sources.web]
paths = ["a.tar", "b.tar"]
"""
NEEDED = ["--output", "out", "--size.S", "8"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path / "run.toml"


def from_words(*words: str) -> Run:
    return load_config(Run, None, [*NEEDED, *words])


def from_toml(tmp_path: Path, text: str, *words: str) -> Run:
    (tmp_path / "other.toml").write_text(text)
    return load_config(Run, tmp_path / "other.toml", words)


def error_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Precedence


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(path: Path) -> None:
    config = load_config(Run, path, ["--steps", "30", "--optimizer.name=muon"])
    assert config == Run(
        output="out",
        size=Size(S=8, N=1),  # N: default
        steps=30,  # command line, over 20 of the file
        optimizer=Optimizer(lr=3e-4, name="muon"),  # lr: file
        sources={"web": Source(paths=("a.tar", "b.tar"))},
    )


def test_the_last_of_two_words_for_one_key_counts() -> None:
    assert from_words("--steps", "3", "--steps=4").steps == 4


def test_without_a_file_the_command_line_is_enough() -> None:
    assert from_words() == Run(output="out", size=Size(S=8))


# Words of the command line


def test_words_become_keys_and_values() -> None:
    words = ["--a.b", "1", "--c", "x", "y", "--d=5=6", "--e", "--f="]
    expected = [("a.b", ["1"]), ("c", ["x", "y"]), ("d", ["5=6"]), ("e", []), ("f", [""])]
    assert parse_overrides(words) == expected


def test_a_word_without_an_option_is_an_error() -> None:
    assert "'steps' is not an option; write --key value" in error_of(parse_overrides, ["steps", "3"])


def test_every_type_is_read_from_words() -> None:
    config = from_words(
        *("--steps", "1_000", "--limit", "-5", "--merge", "1"),
        *("--optimizer.lr", "3e-4", "--optimizer.betas", "0", "0.5", "--optimizer.fused"),
    )
    assert (config.steps, config.limit, config.merge) == (1000, -5, 1)
    assert config.optimizer == Optimizer(lr=3e-4, betas=(0.0, 0.5), fused=True)
    assert isinstance(config.optimizer.betas[0], float)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.fused"], True),
        (["--optimizer.fused", "False"], False),
        (["--optimizer.fused=true"], True),
    ],
)
def test_a_flag_stands_alone_or_with_true_or_false(words: list[str], expected: bool) -> None:
    assert from_words(*words).optimizer.fused is expected


def test_dashes_are_underscores(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        max_bytes: int = 0

    assert load_config(Config, None, ["--max-bytes", "3"]).max_bytes == 3
    assert load_config(Config, None, ["--max_bytes", "4"]).max_bytes == 4
    (tmp_path / "c.toml").write_text("max-bytes = 3\n")
    assert "did you mean 'max_bytes'" in error_of(load_config, Config, tmp_path / "c.toml")


def test_named_tables_are_added_and_changed_from_the_command_line(path: Path) -> None:
    words = ["--sources.chat.paths", "c.tar", "d.tar", "--sources.web.weight", "2"]
    assert load_config(Run, path, words).sources == {
        "web": Source(paths=("a.tar", "b.tar"), weight=2.0),
        "chat": Source(paths=("c.tar", "d.tar")),
    }


def test_the_name_of_a_table_keeps_its_dashes(tmp_path: Path) -> None:
    text = TOML + '[sources.cc-12m]\npaths = ["a"]\n'
    sources = from_toml(tmp_path, text, "--sources.cc-12m.weight", "2").sources
    assert sources["cc-12m"] == Source(paths=("a",), weight=2.0)
    assert list(sources) == ["web", "cc-12m"]


def test_one_word_for_a_tuple_is_a_tuple_of_one() -> None:
    assert from_words("--sources.a.paths=x y").sources["a"].paths == ("x y",)


# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("[optimizer]\nIr = 3", "unknown key 'optimizer.Ir'; did you mean 'lr'?"),
        ("[sources.web]\npath = []", "unknown key 'sources.web.path'; did you mean 'paths'?"),
        ("zzz = 3", "unknown key 'zzz'; known: limit, merge, optimizer, output, size, sources, spare, steps"),
        ('steps = "3"', "steps: expected an integer, got '3'"),
        ("steps = 3.0", "steps: expected an integer, got 3.0"),
        ("steps = true", "steps: expected an integer, got True"),
        ("limit = false", "limit: expected an integer, got False"),
        ("output = 3", "output: expected a string, got 3"),
        ('[optimizer]\nlr = "3e-4"', "optimizer.lr: expected a number, got '3e-4'"),
        ("[optimizer]\nlr = true", "optimizer.lr: expected a number, got True"),
        ("[optimizer]\nlr = nan", "optimizer.lr: expected a number, got nan"),
        ("[optimizer]\nbetas = [0.9, inf]", "optimizer.betas[1]: expected a number, got inf"),
        ("[optimizer]\nfused = 1", "optimizer.fused: expected true or false, got 1"),
        ("[optimizer]\nbetas = 0.9", "optimizer.betas: expected a list of a number, got 0.9"),
        ('[optimizer]\nbetas = [0.9, "x"]', "optimizer.betas[1]: expected a number, got 'x'"),
        ('[optimizer]\nname = "adamv"', "'adamv' is not one of adamw, muon; did you mean 'adamw'?"),
        ("merge = 3", "merge: expected one of 1, 2, got 3"),
        ("optimizer = 3", "optimizer: expected a table, got 3"),
        ("sources = [1]", "sources: expected a table, got [1]"),
        ("[sources]\nweb = 3", "sources.web: expected a table, got 3"),
        ("[sources.web]\nweight = 3", "missing key 'sources.web.paths' (a list of a string)"),
        ("steps = 0", "other.toml: steps must be at least 1, got 0"),
        ("[optimizer]\nlr = 0", "other.toml: [optimizer] lr must be above 0, got 0.0"),
        ("[spare]\nlr = -1", "other.toml: [spare] lr must be above 0, got -1.0"),
    ],
)
def test_a_wrong_file_is_reported_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    # Only what the text does not say itself is added, in front: keys before tables.
    needed = ("" if text.startswith("output") else 'output = "out"\n') + "size = {S = 8}\n"
    found = error_of(from_toml, tmp_path, needed + text)
    assert found.startswith(f"{tmp_path / 'other.toml'}: ")
    assert message in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stepz", "3"], "unknown key --stepz; did you mean 'steps'?"),
        (["--optimizer.Ir", "3"], "unknown key --optimizer.Ir; did you mean 'optimizer.lr'?"),
        (["--sources.web.path", "3"], "unknown key --sources.web.path; did you mean 'sources.web.paths'?"),
        (["--steps.x", "3"], "--steps.x: steps has no keys of its own"),
        (["--steps", "x"], "--steps: expected an integer, got 'x'"),
        (["--steps", "3.5"], "--steps: expected an integer, got '3.5'"),
        (["--steps"], "--steps: expected one value, got 0"),
        (["--steps", "1", "2"], "--steps: expected one value, got 2"),
        (["--optimizer.lr", "fast"], "--optimizer.lr: expected a number, got 'fast'"),
        (["--optimizer.betas", "1", "x"], "--optimizer.betas: expected a number, got 'x'"),
        (["--optimizer.fused", "yes"], "--optimizer.fused: expected true or false, got 'yes'"),
        (["--optimizer.name", "adamv"], "'adamv' is not one of adamw, muon; did you mean 'adamw'?"),
        (["--merge", "3"], "'3' is not one of 1, 2"),
        (["--optimizer", "3"], "--optimizer: is a section; set one of its keys, --optimizer.KEY"),
        (["--sources.web", "3"], "--sources.web: is a section"),
        (["--sources.web.weight", "3"], "missing key 'sources.web.paths'"),
        (["--optimizer.lr", "0"], "[optimizer] lr must be above 0, got 0.0"),
    ],
)
def test_a_wrong_command_line_is_reported_with_its_key(words: list[str], message: str) -> None:
    found = error_of(from_words, *words)
    assert found.startswith("command line: ")
    assert message in found


def test_an_error_names_the_command_line_beside_the_file_when_both_were_read(path: Path) -> None:
    assert error_of(load_config, Run, path, ["--steps", "0"]).startswith(
        f"{path} and command line: steps must"
    )


def test_a_key_below_a_value_of_the_file_is_an_error(tmp_path: Path) -> None:
    found = error_of(from_toml, tmp_path, 'output = "out"\nsize = 3', "--size.S", "4")
    assert found == "command line: --size.S: size is 3 in the file, expected a table"


def test_a_missing_key_is_named_with_its_type_also_inside_a_section_that_is_not_there(tmp_path: Path) -> None:
    assert "missing key 'output' (a string)" in error_of(from_toml, tmp_path, "size = {S = 8}")
    assert "missing key 'size.S' (an integer)" in error_of(from_toml, tmp_path, 'output = "out"')


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert f"config {tmp_path / 'x.toml'}: no such file" in error_of(load_config, Run, tmp_path / "x.toml")
    assert "is a directory" in error_of(load_config, Run, tmp_path)
    assert "not valid TOML" in error_of(from_toml, tmp_path, "steps = = 3")
    (tmp_path / "latin.toml").write_bytes(b'output = "\xe9"')
    assert "not valid TOML" in error_of(load_config, Run, tmp_path / "latin.toml")


# Out and in again


def test_the_resolved_config_loads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(Run, path, ["--spare.name", "muon", "--sources.cc-12m.paths", "x"])
    assert from_toml(tmp_path, to_toml(config)) == config
    minimal = from_words()
    assert from_toml(tmp_path, to_toml(minimal)) == minimal
    assert "limit" not in to_dict(minimal), "None is left out"


any_text = st.text() | st.text(alphabet="\"\\\n\r\t\x00\x1f\x7f\x85\u2028é日😀.#=[]' ")
any_float = st.floats(allow_nan=False, allow_infinity=False)


@given(
    output=any_text,
    steps=st.integers(1, 2**70),
    limit=st.none() | st.integers(-5, 5),
    betas=st.lists(any_float),
    fused=st.booleans(),
    sources=st.dictionaries(any_text, st.tuples(st.lists(any_text), any_float), max_size=3),
)
def test_any_config_survives_toml(
    tmp_path_factory: pytest.TempPathFactory,
    output: str,
    steps: int,
    limit: int | None,
    betas: list[float],
    fused: bool,
    sources: dict[str, tuple[list[str], float]],
) -> None:
    config = Run(
        output=output,
        size=Size(S=8),
        steps=steps,
        limit=limit,
        optimizer=Optimizer(betas=tuple(betas), fused=fused),
        sources={name: Source(paths=tuple(paths), weight=w) for name, (paths, w) in sources.items()},
    )
    text = to_toml(config)
    assert tomllib.loads(text) == to_dict(config)
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(text, encoding="utf-8", newline="")
    assert load_config(Run, file) == config


@dataclass(frozen=True, kw_only=True, slots=True)
class Tars:
    format: Literal["tar"] = "tar"
    caption: str = "txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    format: Literal["csv", "jsonl"]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    sources: dict[str, Tars | Tables]


def test_a_field_tells_the_tables_of_a_union_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[sources.a]\nformat = "tar"\ncaption = "alt"\n[sources.b]\nformat = "jsonl"\n')
    config = load_config(Inputs, path, ["--sources.b.columns", "x", "y", "--sources.c.format", "csv"])
    assert config.sources == {
        "a": Tars(caption="alt"),
        "b": Tables(format="jsonl", columns=("x", "y")),
        "c": Tables(format="csv"),
    }
    again = tmp_path / "b.toml"
    again.write_text(to_toml(config))
    assert load_config(Inputs, again) == config


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ('[sources.a]\ncaption = "x"', [], r"missing key 'sources.a.format' \(one of tar, csv, jsonl\)"),
        (
            '[sources.a]\nformat = "tra"',
            [],
            "sources.a.format: 'tra' is not one of tar, csv, jsonl; did you mean 'tar'",
        ),
        ("[sources.a]\nformat = [1]", [], "sources.a.format: .1. is not one of tar, csv, jsonl"),
        ('[sources.a]\nformat = "csv"\ncaption = "x"', [], "unknown key 'sources.a.caption'"),
        ("sources = {a = 3}", [], "sources.a: expected a table, got 3"),
        ("", ["--sources.a.caption", "x"], "set --sources.a.format first"),
        ("", ["--sources.a", "x"], "is a section"),
        ('[sources.a]\nformat = "csv"', ["--sources.a.caption", "x"], "unknown key --sources.a.caption"),
    ],
)
def test_a_union_that_is_not_told_apart_is_an_error_that_says_so(
    tmp_path: Path, content: str, overrides: list[str], message: str
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(Inputs, path, overrides)
