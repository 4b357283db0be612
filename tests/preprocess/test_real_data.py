"""The committed config on real pictures: every sample packed or rejected, every bit as computed another way.

129 captioned pictures: JPEG, PNG, WebP, GIF, TIFF, AVIF, JPEG 2000 and MPO; grey, palette, CMYK, 16 bit, alpha,
turned by EXIF, from icons to 20 megapixels.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from preprocess.__main__ import main
from preprocess.verify import verify_dataset
from shared.files import read_json
from tests.preprocess.reference import (
    Reference,
    Segments,
    displayed,
    pillow_resized,
    resized,
    webdataset_samples,
)

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "preprocess" / "captions.toml"


@pytest.fixture(scope="module")
def tars(shared_data: Path) -> list[Path]:
    found = [shared_data / "cc12m" / "cc12m-train-0000.tar", *sorted((shared_data / "photos").glob("*.tar"))]
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def samples(tars: list[Path]) -> dict[tuple[str, str], Segments]:
    """By (tar, key): the keys of the first two tars are the same numbers."""
    return {(str(path), key): segments for path in tars for key, segments in webdataset_samples(path).items()}


@pytest.fixture(scope="module")
def dataset(shared_data: Path, tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "dataset"
    words = ["run", str(CONFIG), "--output", str(output), "--executor", "serial"]
    words += ["--tokenizer", str(shared_data / "tokenizer-bpe8k")]
    # What the reference does not do: decode to fewer pixels, and follow profiles.
    words += ["--images.dct_scaling", "false", "--images.convert_profiles", "false"]
    words += ["--sources.captions.paths", *map(str, tars)]
    assert main(words) == 0
    return output


def test_every_sample_is_packed_or_rejected_with_a_reason_and_the_account_balances(
    dataset: Path, samples: dict[tuple[str, str], Segments]
) -> None:
    assert len(samples) == 32 + 49 + 48
    account = read_json(dataset / "dataset.json")["account"]["captions"]
    rejects = pq.read_table(dataset / "rejects.parquet").to_pylist()
    assert account["read"] == len(samples)
    assert account["read"] == account["packed"] + account["split_parts"] + sum(account["rejected"].values())
    assert Counter(reject["reason"] for reject in rejects) == account["rejected"]
    packed = Counter(
        document["key"]
        for pack in Reference(dataset).packs()
        for document in pack["documents"]
        if document["part"] == 0
    )
    packed.update(reject["key"] for reject in rejects)
    assert packed == Counter(key for _, key in samples)
    counts, faults = verify_dataset(dataset)
    assert faults == [] and counts["documents"] == counts["images"] == account["packed"] == len(samples)


def test_tokens_labels_and_patches_of_every_sample_equal_the_reference(
    dataset: Path, samples: dict[tuple[str, str], Segments]
) -> None:
    reference = Reference(dataset)
    expected = {name: reference.expect(segments) for name, segments in samples.items()}
    found: Counter[tuple[str, str]] = Counter()
    for pack in reference.packs():
        first = 0
        blobs: dict[int, np.ndarray] = {}
        for image in pack["images"]:
            count = image["h"] * image["w"]
            blobs[image["token_start"]] = pack["patches"][first : first + count]
            first += count
        for document in pack["documents"]:
            here = slice(document["start"], document["start"] + document["length"])
            tokens, labels = pack["tokens"][here].tolist(), pack["labels"][here].tolist()
            # Two tars use the same keys: the tokens say which one this is.
            (name,) = [
                name
                for name, sample in expected.items()
                if name[1] == document["key"] and sample.tokens == tokens
            ]
            found[name] += 1
            assert labels == expected[name].labels
            ((start, h, w, patches),) = expected[name].images
            image = next(i for i in pack["images"] if i["token_start"] == here.start + start)
            assert (image["t"], image["h"], image["w"]) == (1, h, w), name
            levels = np.abs(blobs[image["token_start"]].astype(int) - patches)
            # What lies on its side is turned after the resize: its two passes round in the other order.
            assert levels.max() <= lies_on_its_side(samples[name]), name
    assert found == Counter(samples.keys())


def lies_on_its_side(segments: Segments) -> bool:
    (picture,) = (segment for segment in segments if isinstance(segment, bytes))
    opened = Image.open(io.BytesIO(picture))
    return opened.format != "TIFF" and opened.getexif().get(0x0112, 1) >= 5


def test_every_caption_comes_back_from_its_tokens(
    dataset: Path, samples: dict[tuple[str, str], Segments]
) -> None:
    reference = Reference(dataset)
    special = {reference.image, reference.begin, reference.end, reference.bos, reference.eos}
    captions: Counter[tuple[str, str]] = Counter()
    for pack in reference.packs():
        for document in pack["documents"]:
            tokens = pack["tokens"][document["start"] :][: document["length"]].tolist()
            text = [token for token in tokens if token not in special]
            captions[document["key"], reference.tokenizer.decode(text, skip_special_tokens=False)] += 1
    assert captions == Counter((key, str(segments[1])) for (_, key), segments in samples.items())


def test_the_resize_is_within_one_level_of_pillow_but_for_one_value_in_a_million(
    dataset: Path, samples: dict[tuple[str, str], Segments]
) -> None:
    reference = Reference(dataset)
    p = reference.geometry.patch_size
    values = beyond = 0
    for name, (data, _) in samples.items():
        assert isinstance(data, bytes)
        pixels = displayed(data)
        ((_, h, w, _),) = reference.expect([data]).images
        ours = resized(pixels, h * p, w * p, "bilinear")
        levels = np.abs(ours - pillow_resized(pixels, h * p, w * p, "bilinear"))
        assert levels.max() <= 2, name
        values, beyond = values + levels.size, beyond + int((levels > 1).sum())
    assert beyond <= values / 1e6


def test_sizes_and_formats_are_those_of_the_manifest(dataset: Path, shared_data: Path) -> None:
    listed: list[dict[str, Any]] = json.loads((shared_data / "photos" / "manifest.json").read_text())
    expected = set()
    for entry in listed:
        size = (entry["height"], entry["width"])
        turned = (entry["exif_orientation"] or 1) >= 5
        key = entry["member"].rsplit(".", 1)[0]
        expected.add((entry["tar"], key, *(size[::-1] if turned else size)))
    found = set()
    for path in sorted((dataset / "plan").glob("*-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            tar = Path(row["unit"]).name
            if tar.startswith("photos"):
                found.add((tar, row["key"], row["segments"][0]["height"], row["segments"][0]["width"]))
    assert found == expected
