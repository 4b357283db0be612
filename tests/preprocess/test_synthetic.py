"""The demo's data set: its bytes are fixed, its captions are true, its tokenizer loses nothing."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from preprocess.shapes import BACKGROUNDS, COLOURS, PLACES, RGB, Sample, encode_jpeg, make_sample
from preprocess.synthetic import SPECIAL_TOKENS, main, train_tokenizer, write_shapes
from shared.errors import UserError
from shared.files import read_json

SAMPLES = 150  # enough for every kind of file: 5 % of the pictures are turned or transparent


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [make_sample(0, index) for index in range(SAMPLES)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    main([str(directory), "--samples", "40", "--samples_per_tar", "16"])
    return directory


def _displayed(picture: bytes) -> Image.Image:
    """As a browser shows it: turned by its EXIF orientation, over white."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    white.alpha_composite(upright)
    return white.convert("RGB")


def _named(pixel: Any, names: dict[str, RGB]) -> str:
    """The name whose colour is nearest to the pixel."""
    return min(names, key=lambda name: math.dist(pixel, names[name]))


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def test_the_same_seed_gives_byte_identical_tars_and_another_seed_does_not(tmp_path: Path) -> None:
    first, second, other = (
        [
            path.read_bytes()
            for path in write_shapes(tmp_path / name, samples=20, samples_per_tar=8, seed=seed)
        ]
        for name, seed in (("first", 3), ("second", 3), ("other", 4))
    )
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_another_process_writes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    # A fresh interpreter has another hash seed: no byte may depend on the order of a set.
    program = "import sys; from preprocess.synthetic import main; main(sys.argv[1:])"
    options = [str(tmp_path), "--samples", "40", "--samples_per_tar", "16"]
    subprocess.run([sys.executable, "-c", program, *options], check=True, cwd=Path(__file__).parents[2])
    files = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    assert len(files) == 6  # config.toml, 3 tars, 2 tokenizer files
    assert all((made / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_a_sample_is_the_same_whatever_the_count(made: Path, tmp_path: Path) -> None:
    few = write_shapes(tmp_path, samples=10, samples_per_tar=7, seed=0)
    many = {name: data for path in sorted((made / "tars").iterdir()) for name, data in _members(path).items()}
    assert len(many) == 40 * 3
    for name, data in [item for path in few for item in _members(path).items()]:
        assert many[name] == data, name


def test_no_two_pictures_are_equal(samples: list[Sample]) -> None:
    assert len({sample.picture for sample in samples}) == SAMPLES


def test_tars_are_ordinary_webdataset_with_three_members_per_sample(made: Path) -> None:
    paths = sorted((made / "tars").iterdir())
    assert [path.name for path in paths] == [f"shapes-{n:06d}.tar" for n in range(3)]
    assert [len(_members(path)) for path in paths] == [16 * 3, 16 * 3, 8 * 3]
    members = _members(paths[1])
    keys = list(dict.fromkeys(name.split(".")[0] for name in members))
    assert keys == [f"{index:09d}" for index in range(16, 32)]
    for key in keys:
        record = json.loads(members[f"{key}.json"])
        assert record["caption"] == members[f"{key}.txt"].decode()
        assert (f"{key}.jpg" in members) != (f"{key}.png" in members)


def test_the_pixel_at_the_centre_of_every_object_has_its_colour_as_displayed(samples: list[Sample]) -> None:
    for index, sample in enumerate(samples):
        picture, record = _displayed(sample.picture), sample.record
        assert picture.size == (record["width"], record["height"]), index
        for item in record["objects"]:
            pixel = picture.getpixel((int(item["x"]), int(item["y"])))
            assert _named(pixel, COLOURS | BACKGROUNDS) == item["colour"], (index, item)


def test_outside_the_objects_everything_has_the_colour_of_the_background(
    samples: list[Sample],
) -> None:
    for index, sample in enumerate(samples):
        pixels = np.asarray(_displayed(sample.picture))
        y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
        outside = np.full(y.shape, True)
        for item in sample.record["objects"]:
            # JPEG rings and blurs colour around edges.
            outside &= np.hypot(x - item["x"], y - item["y"]) > item["radius"] + 8
        off = np.abs(pixels[outside].astype(int) - BACKGROUNDS[sample.record["background"]]).max()
        assert off <= 30, (index, off)  # the jitter and JPEG; the names are 52 apart in some channel


def test_an_object_is_placed_by_the_thirds_in_which_its_centre_lies(samples: list[Sample]) -> None:
    for sample in samples:
        width, height = sample.record["width"], sample.record["height"]
        for item in sample.record["objects"]:
            row = ["top", "middle", "bottom"][int(3 * item["y"] / height)]
            column = ["left", "middle", "right"][int(3 * item["x"] / width)]
            words = [word for word in (row, column) if word != "middle"]
            assert item["place"] == (f"at the {' '.join(words)}" if words else "in the centre")


def test_objects_are_inside_the_picture_and_do_not_overlap(samples: list[Sample]) -> None:
    for sample in samples:
        items, sides = sample.record["objects"], (sample.record["width"], sample.record["height"])
        for number, item in enumerate(items):
            for position, side in zip((item["x"], item["y"]), sides, strict=True):
                assert item["radius"] - 0.2 <= position <= side - item["radius"] + 0.2  # rounded to 0.1
            for other in items[:number]:
                distance = math.hypot(item["x"] - other["x"], item["y"] - other["y"])
                assert distance >= item["radius"] + other["radius"] - 0.3


def test_the_caption_names_every_object_in_reading_order_and_the_background(samples: list[Sample]) -> None:
    order = [place for row in PLACES for place in row]
    for sample in samples:
        items = sample.record["objects"]
        places = [order.index(item["place"]) for item in items]
        assert 1 <= len(items) <= 3 and places == sorted(set(places))
        phrases = [f"{item['colour']} {item['shape']} {item['place']}" for item in items]
        words = sample.caption.replace(",", "").replace(" and ", " ").replace(" an ", " a ").split(" ", 1)[1]
        background = f"on a {sample.record['background']} background"
        assert words == " ".join([phrases[0], *(f"a {phrase}" for phrase in phrases[1:]), background])


def test_captions_read_as_english() -> None:
    assert make_sample(0, 3).caption == (
        "a black cross at the top left and an orange square at the bottom left on a mint background"
    )
    assert make_sample(0, 7).caption == (
        "a blue circle at the top left, a red diamond at the top and a red diamond at the bottom left "
        "on a pink background"
    )


def test_all_sizes_are_within_bounds_and_many(samples: list[Sample]) -> None:
    sizes = [(sample.record["width"], sample.record["height"]) for sample in samples]
    assert all(48 <= side <= 192 for size in sizes for side in size)
    assert all(max(size) <= 3 * min(size) for size in sizes)
    assert len(set(sizes)) > SAMPLES // 2
    assert max(w / h for w, h in sizes) > 2.5 and min(w / h for w, h in sizes) < 0.4


def test_a_few_files_are_turned_or_transparent_and_most_are_jpeg(samples: list[Sample]) -> None:
    pictures = [Image.open(io.BytesIO(sample.picture)) for sample in samples]
    formats = [f"{picture.format} {picture.mode}" for picture in pictures]
    # binomial, 150 draws: JPEG 120 +- 5 (one sigma), turned 6 +- 2.4, transparent 6 +- 2.4
    assert 100 <= formats.count("JPEG RGB") <= 140
    assert 1 <= formats.count("PNG RGBA") <= 15 and formats.count("PNG RGB") > 5
    assert 1 <= sum(picture.getexif().get(0x0112, 1) != 1 for picture in pictures) <= 15
    extensions = {"JPEG": "jpg", "PNG": "png"}
    assert [extensions[str(picture.format)] for picture in pictures] == [s.extension for s in samples]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_of_any_orientation_is_displayed_as_it_was_painted(orientation: int) -> None:
    quarters = Image.new("RGBA", (64, 32), "white")
    for colour, corner in (("red", (0, 0)), ("blue", (32, 0)), ("black", (0, 16))):
        quarters.paste(colour, (*corner, corner[0] + 32, corner[1] + 16))
    stored = encode_jpeg(quarters, orientation)
    picture = Image.open(io.BytesIO(stored))
    assert picture.getexif().get(0x0112, 1) == orientation
    assert picture.size == ((32, 64) if orientation >= 5 else (64, 32))
    error = np.asarray(_displayed(stored)).astype(int) - np.asarray(quarters.convert("RGB"))
    assert np.abs(error).mean() < 3  # a quarter in the wrong place costs at least 30


def test_tars_that_are_there_are_kept_and_missing_ones_are_made(tmp_path: Path) -> None:
    paths = write_shapes(tmp_path, samples=6, samples_per_tar=2, seed=0)
    whole = paths[2].read_bytes()
    paths[1].write_bytes(b"kept")
    paths[2].unlink()
    seen: list[int] = []
    assert write_shapes(tmp_path, samples=6, samples_per_tar=2, seed=0, on_progress=seen.append) == paths
    assert paths[1].read_bytes() == b"kept" and paths[2].read_bytes() == whole
    assert sum(seen) == 6
    assert sorted(tmp_path.iterdir()) == paths  # no temporary files


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> Tokenizer:
    return Tokenizer.from_file(str(made / "tokenizer" / "tokenizer.json"))


@given(text=st.text())
def test_the_tokenizer_gives_back_any_text_without_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_tokenizer_gives_back_captions_at_about_one_token_per_word(
    tokenizer: Tokenizer, made: Path
) -> None:
    captions = [make_sample(0, index).caption for index in range(40)]
    ids = [tokenizer.encode(caption).ids for caption in captions]
    assert [tokenizer.decode(one) for one in ids] == captions
    words = sum(len(caption.replace(",", " ,").split()) for caption in captions)
    assert sum(map(len, ids)) <= 1.1 * words


def test_a_literal_special_token_in_text_is_text_when_asked(tokenizer: Tokenizer) -> None:
    text = "a red <|image|> at <|end_of_text|> the top <|pad|>"
    special = {tokenizer.token_to_id(content) for content in SPECIAL_TOKENS.values()}
    tokenizer.encode_special_tokens = False
    assert special & set(tokenizer.encode(text).ids)
    tokenizer.encode_special_tokens = True
    assert not special & set(tokenizer.encode(text).ids)


def test_the_tokenizer_files_agree_on_the_special_tokens(tokenizer: Tokenizer, made: Path) -> None:
    config = read_json(made / "tokenizer" / "tokenizer_config.json")
    vocabulary = tokenizer.get_vocab_size()
    last = list(range(vocabulary - 6, vocabulary))
    assert [int(token_id) for token_id in config["added_tokens_decoder"]] == last
    added = [{"id": int(key), **entry} for key, entry in config["added_tokens_decoder"].items()]
    assert added == read_json(made / "tokenizer" / "tokenizer.json")["added_tokens"]
    assert all(entry["special"] for entry in added)
    assert [config[name] for name in SPECIAL_TOKENS] == [tokenizer.id_to_token(token_id) for token_id in last]
    assert 262 < vocabulary <= 512


def test_the_vocabulary_stays_within_the_size_asked_for(made: Path, tmp_path: Path) -> None:
    tars = sorted((made / "tars").iterdir())
    train_tokenizer(tars, tmp_path, vocabulary_size=270)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 270
    with pytest.raises(ValueError, match="at least 262, got 261"):
        train_tokenizer(tars, tmp_path, vocabulary_size=261)


def test_a_tokenizer_that_is_there_is_kept(made: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("kept")
    train_tokenizer(sorted((made / "tars").iterdir()), tmp_path, vocabulary_size=300)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"kept"}


def test_a_tar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"not a tar")
    for name in ("bad.tar", "missing.tar"):
        with pytest.raises(UserError, match=f"{name}: no captions"):
            train_tokenizer([tmp_path / name], tmp_path / "tokenizer", vocabulary_size=300)


def test_the_command_says_what_it_made_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(tmp_path), "--samples", "4", "--samples_per_tar", "3"]
    main(options)
    text = capsys.readouterr()
    main([*options, "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    tar_bytes = sum(path.stat().st_size for path in (tmp_path / "tars").iterdir())
    assert result["samples"] == 4 and result["tars"] == 2 and result["tar_bytes"] == tar_bytes
    assert f"4 captioned pictures in 2 tars ({tar_bytes / 1e6:.1f} MB) in {tmp_path / 'tars'}" in text.out
    assert f"a tokenizer of {result['vocabulary']} tokens in {tmp_path / 'tokenizer'}" in text.out
    assert text.err == ""  # no progress bar where nobody looks


def test_the_command_refuses_a_directory_made_with_other_options(tmp_path: Path) -> None:
    main([str(tmp_path), "--samples", "4"])
    with pytest.raises(UserError, match=r"made with other options \(samples = 4, .*another directory"):
        main([str(tmp_path), "--samples", "5"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no DIRECTORY given; usage"),
        (["--samples", "4"], "no DIRECTORY given; usage"),
        (["{}", "--sample", "4"], "did you mean 'samples'"),
        (["{}", "--samples", "many"], "expected an integer, got 'many'"),
        (["{}", "--samples", "0"], "samples must be at least 1, got 0"),
        (["{}", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["{}", "--vocabulary_size", "100"], "vocabulary_size must be at least 262, got 100"),
        (["{}/file/below"], "cannot write here"),
    ],
)
def test_wrong_options_are_one_line_that_names_them(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        main([word.format(tmp_path) for word in words])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
