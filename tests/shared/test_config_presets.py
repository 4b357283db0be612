"""Presets: named values between the defaults of a section and the keys that its file writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from shared.config import load_config, to_toml
from shared.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    factor: float = 1.0
    length: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "ball": {"type": "round", "radius": 3, "stretch": {"factor": 2.0, "length": 20}},
        "coin": {"type": "round", "radius": 1},
    }

    type: Literal["round"] = "round"
    radius: int = 7
    weight: float = 0.5
    stretch: Stretch | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Square:
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"tile": {"type": "square", "side": 4}}

    type: Literal["square"] = "square"
    side: int = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Several kinds in one dataclass."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"oak": {"type": "wood", "density": 0.7}}

    type: Literal["wood", "metal"] = "wood"
    density: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    shape: Round | Square = field(default_factory=Round)
    extra: Round = field(default_factory=Round)
    kind: Kind = field(default_factory=Kind)


def load(tmp_path: Path, text: str, *words: str) -> Run:
    (tmp_path / "run.toml").write_text(text)
    return load_config(Run, tmp_path / "run.toml", words)


def test_defaults_yield_to_the_preset_the_preset_to_the_file_and_the_file_to_the_command_line(
    tmp_path: Path,
) -> None:
    run = load(tmp_path, '[extra]\npreset = "ball"\n[extra.stretch]\nlength = 50')
    # Of the preset: radius and factor; of the file: length; of the defaults: weight.
    assert run.extra == Round(radius=3, weight=0.5, stretch=Stretch(factor=2.0, length=50))
    run = load(tmp_path, '[extra]\npreset = "ball"\nradius = 4', "--extra.radius", "5")
    assert run.extra.radius == 5
    run = load(tmp_path, '[extra]\npreset = "ball"\nradius = 4', "--extra.stretch.factor", "8")
    assert run.extra == Round(radius=4, stretch=Stretch(factor=8.0, length=20))


def test_another_preset_on_the_command_line_replaces_that_of_the_file_and_keeps_the_files_keys(
    tmp_path: Path,
) -> None:
    run = load(tmp_path, '[extra]\npreset = "ball"\nweight = 2.0', "--extra.preset", "coin")
    assert run.extra == Round(radius=1, weight=2.0, stretch=None)


def test_the_type_of_a_section_follows_from_its_preset(tmp_path: Path) -> None:
    assert load(tmp_path, '[shape]\npreset = "tile"').shape == Square(side=4)
    assert load(tmp_path, '[shape]\npreset = "tile"', "--shape.side", "5").shape == Square(side=5)
    words = ["--shape.preset", "tile", "--shape.side", "6"]
    assert load_config(Run, None, words).shape == Square(side=6)
    assert load(tmp_path, '[shape]\ntype = "square"\npreset = "tile"').shape == Square(side=4)


def test_the_saved_config_holds_the_values_and_loads_back_equal(tmp_path: Path) -> None:
    run = load(tmp_path, '[shape]\npreset = "ball"\nweight = 2.0\n[extra]\npreset = "coin"')
    saved = to_toml(run)
    assert "preset" not in saved and 'type = "round"' in saved
    assert load(tmp_path, saved) == run


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ('[extra]\npreset = "bal"', [], r"extra\.preset: 'bal' is no preset; did you mean 'ball'\?"),
        ("[extra]\npreset = 3", [], r"extra\.preset: '3' is no preset; known: ball, coin"),
        ('[shape]\npreset = "tle"', [], r"shape\.preset: 'tle' is no preset; did you mean 'tile'\?"),
        (
            '[shape]\ntype = "round"\npreset = "tile"',
            [],
            r"shape\.preset: 'tile' is of type square, but shape\.type is 'round'; set --shape\.type square, or take a",
        ),
        (
            '[kind]\ntype = "metal"',
            ["--kind.preset", "oak"],
            r"kind\.preset: 'oak' is of type wood, but kind\.type is 'metal'",
        ),
        ('[shape]\npreset = "tile"\nradius = 3', [], r"unknown key 'shape\.radius'"),
        ('[extra]\npreste = "ball"', [], r"unknown key 'extra\.preste'; did you mean 'preset'\?"),
        (
            "[shape]\nside = 3",
            [],
            r"missing key 'shape\.type' \(one of round, square\), or set shape\.preset",
        ),
        ("", ["--shape.side", "3"], r"--shape\.side: set --shape\.type or --shape\.preset first"),
        ("", ["--extra.PRESETS", "3"], r"unknown key --extra\.PRESETS"),
        ('[extra.stretch]\npreset = "ball"', [], r"unknown key 'extra\.stretch\.preset'"),
    ],
)
def test_a_wrong_preset_is_reported_with_its_key(
    tmp_path: Path, text: str, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, text, *words)
