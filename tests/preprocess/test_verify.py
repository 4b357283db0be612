"""`verify` proves a good data set and finds each kind of fault, made here one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess.config import PlanConfig
from preprocess.job import run_job
from preprocess.verify import verify_dataset
from shared.codecs import image_encoder, store_patches
from shared.dataset import describe_contract, fingerprint_of, open_dataset
from shared.errors import UserError
from shared.files import file_checksum, read_json, write_json
from shared.schema import IGNORE_LABEL, Document, Pack
from shared.shard_writer import ShardWriter
from tests.preprocess.inputs import make_config, mixed_samples, write_samples

IMAGE, PAD, BOS, EOS = 256, 259, 260, 261  # as `synthetic.SPECIAL_TOKENS` orders them behind 256 bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    tar = write_samples(directory / "a.tar", mixed_samples(30))
    run_job(make_config(directory, tar, plan=PlanConfig(shard_bytes=16_384)))
    return directory / "out"


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def shards(dataset: Path) -> list[Path]:
    return sorted((dataset / "shards").iterdir())


def faults(dataset: Path) -> list[str]:
    return verify_dataset(dataset)[1]


def edit_manifest(dataset: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = read_json(dataset / "dataset.json")
    edit(manifest)
    write_json(dataset / "dataset.json", manifest)


def test_a_good_data_set_has_no_fault_and_everything_in_it_is_counted(made: Path) -> None:
    counts, found = verify_dataset(made)
    manifest = read_json(made / "dataset.json")
    assert found == []
    assert counts == {
        "shards": len(manifest["shards"]),
        "packs": manifest["totals"]["packs"],
        "documents": 30,
        "images": 30,
        "tokens": manifest["totals"]["tokens"],
        "labels": manifest["totals"]["labels"],
        "patches": manifest["totals"]["patches"],
        "bytes": sum(path.stat().st_size for path in shards(made)),
    }
    assert counts["shards"] > 1 and counts["packs"] > 5


def test_a_flipped_bit_is_found_wherever_it_is_and_never_ends_the_check(dataset: Path) -> None:
    first, *others = shards(dataset)
    data = first.read_bytes()
    rng = np.random.default_rng(0)
    places = [
        *rng.integers(0, len(data), 40),
        *rng.integers(len(data) - 5000, len(data), 60),
        0,
        len(data) - 1,
    ]
    for place in map(int, places):
        broken = bytearray(data)
        broken[place] ^= 1 << int(rng.integers(8))
        first.write_bytes(broken)
        counts, found = verify_dataset(dataset)
        assert found and found[0].startswith(f"{first.name}: file checksum"), place
        assert counts["shards"] == 1 + len(others)


def test_a_flipped_pixel_names_its_pack(dataset: Path) -> None:
    path = shards(dataset)[0]
    reader = open_dataset(dataset).reader(open_dataset(dataset).shards[0])
    patches = reader.pack(1).patches_XP.tobytes()
    data = path.read_bytes()
    assert data.count(patches) == 1
    spoiled = bytearray(patches)
    spoiled[7] ^= 1
    path.write_bytes(data.replace(patches, spoiled))
    named = [fault for fault in faults(dataset) if "pack" in fault]
    assert len(named) == 1 and named[0].startswith(f"{path.name}: pack 1: checksum is ")


def test_a_missing_a_shortened_and_a_lengthened_shard_are_named(dataset: Path) -> None:
    first, second = shards(dataset)[:2]
    size = second.stat().st_size
    for content in (second.read_bytes()[:-100], second.read_bytes() + b"\0"):
        second.write_bytes(content)
        found = [fault for fault in faults(dataset) if fault.startswith(second.name)]
        assert found[0] == f"{second.name}: {len(content)} bytes, dataset.json says {size}"
    first.unlink()
    assert f"{first.name}: is missing" in faults(dataset)


def test_two_shards_that_changed_places_are_both_named(dataset: Path) -> None:
    first, second = shards(dataset)[:2]
    aside = first.rename(dataset / "aside")
    second.rename(first)
    aside.rename(second)
    found = "\n".join(faults(dataset))
    assert f"{first.name}: " in found and f"{second.name}: " in found


def test_a_shard_of_another_data_set_is_named(dataset: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "other", write_samples(tmp_path / "b.tar", mixed_samples(30)), seed=5)
    other = replace(config, geometry=replace(config.geometry, mean=(0.4, 0.5, 0.5)))
    run_job(replace(other, plan=PlanConfig(shard_bytes=16_384)))
    theirs, ours = shards(Path(other.output))[0], shards(dataset)[0]
    shutil.copy(theirs, ours)
    found = [fault for fault in faults(dataset) if fault.startswith(ours.name)]
    assert any("belongs to another data set" in fault for fault in found)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (
            lambda m: m["account"]["web"].update(read=31),
            "account of web: 31 samples read, 30 accounted for",
        ),
        (
            lambda m: m["account"]["web"]["rejected"].update(image_empty=2),
            "account of web: 30 samples read, 32 accounted for",
        ),
        (
            lambda m: m["account"]["web"].update(read=31, packed=31),
            "account of web: 31 samples and parts packed, the shards hold 30",
        ),
        (
            lambda m: m["account"]["web"]["parts"].update(made=1),
            "account of web: the parts of cut samples do not add up",
        ),
        (
            lambda m: m["account"].update(other=m["account"].pop("web")),
            "account of web: missing, but the shards hold 30 of its samples",
        ),
        (
            lambda m: m["totals"].update(images=29),
            "total of images: dataset.json says 29, the shards hold 30",
        ),
        (
            lambda m: m["totals"].update(labels=1 + m["totals"]["labels"]),
            "total of labels: dataset.json says 535, the shards hold 534",
        ),
        (
            lambda m: m["totals"].update(tokens=1 + m["totals"]["tokens"]),
            "total of tokens: dataset.json says 725, the shards hold 724",
        ),
        (
            lambda m: m["totals"].update(patches=m["totals"]["patches"] - 1),
            "total of patches: dataset.json says 399, the shards hold 400",
        ),
        (
            lambda m: m["fill"].update(tokens=0.999999),
            "fill of tokens: dataset.json says 0.999999, in the shards it is 0.942708",
        ),
        (
            lambda m: m["fill"].update(vision=0.5),
            "fill of vision: dataset.json says 0.5, in the shards it is 0.520833",
        ),
        (
            lambda m: m.pop("account"),
            "totals, fill or account in dataset.json are not valid: KeyError('account')",
        ),
        (lambda m: m.pop("fill"), "totals, fill or account in dataset.json are not valid: KeyError('fill')"),
    ],
)
def test_an_edited_account_or_total_is_found(
    dataset: Path, edit: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    edit_manifest(dataset, edit)
    assert expected in faults(dataset)


def test_a_shard_struck_off_the_list_shows_in_account_and_totals(dataset: Path) -> None:
    edit_manifest(dataset, lambda m: m["shards"].pop())
    found = "\n".join(faults(dataset))
    assert "total of packs: dataset.json says" in found and "account of web: 30 samples" in found


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["budget"].update(S=128), "fingerprint in dataset.json does not match"),
        (lambda m: m["geometry"].update(merge=1), "fingerprint in dataset.json does not match"),
        (lambda m: m.update(format_version=2), "format version 2, this program knows 1"),
        (lambda m: m.pop("shards"), "dataset.json is not valid"),
        (lambda m: m.pop("unlearned_tokens"), "unlearned_tokens in dataset.json is no table"),
    ],
)
def test_an_edited_contract_is_refused(
    dataset: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_manifest(dataset, edit)
    with pytest.raises(UserError, match=message):
        verify_dataset(dataset)


Spoil = Callable[[Pack, list[Document]], Any]


def spoil_first_pack(dataset: Path, spoil: Spoil) -> list[str]:
    """Write the first shard again with its first pack changed, checksums and all, as a wrong writer would."""
    opened = open_dataset(dataset)
    entry = opened.shards[0]
    reader = opened.reader(entry)
    path = dataset / "shards" / entry.name
    packs = [(copy_of(reader.pack(row)), reader.documents(row)) for row in range(len(reader))]
    before = amounts(*packs[0])
    changed = spoil(*packs[0])
    packs[0] = changed if isinstance(changed, tuple) else packs[0]
    writer = ShardWriter(path.with_name("new"), opened.budget.S, opened.fingerprint)
    for pack, documents in packs:
        writer.append(pack, documents)
    writer.close()
    more = amounts(*packs[0]) - before
    edit_manifest(dataset, lambda m: add_to_totals(m, *more.tolist()))
    path.with_name("new").rename(path)
    size, checksum = path.stat().st_size, file_checksum(path)
    edit_manifest(dataset, lambda m: m["shards"][0].update(bytes=size, checksum=checksum))
    edit_manifest(dataset, lambda m: m["totals"].update(bytes=sum(shard["bytes"] for shard in m["shards"])))
    prefix = f"{entry.name}: pack 0: "
    found = faults(dataset)
    assert all(fault.startswith(prefix) for fault in found), found
    return [fault.removeprefix(prefix) for fault in found]


def amounts(pack: Pack, documents: list[Document]) -> Any:
    """Tokens, labels and patches of a pack."""
    tokens = sum(document.length for document in documents)
    return np.array([tokens, (pack.labels_S != IGNORE_LABEL).sum(), pack.num_patches])


def add_to_totals(manifest: dict[str, Any], tokens: int, labels: int, patches: int) -> None:
    totals, budget = manifest["totals"], manifest["budget"]
    for name, more in (("tokens", tokens), ("labels", labels), ("patches", patches)):
        totals[name] += more
    vision = totals["packs"] * budget["N"] * budget["L"]
    manifest["fill"] = {
        "tokens": round(totals["tokens"] / (totals["packs"] * budget["S"]), 6),
        "vision": round(totals["patches"] / vision, 6),
    }


def copy_of(pack: Pack) -> Pack:
    arrays = ("tokens_S", "labels_S", "positions_S", "stored", "images")
    return replace(pack, **{name: getattr(pack, name).copy() for name in arrays})


def test_a_shard_written_again_unchanged_has_no_fault(dataset: Path) -> None:
    assert spoil_first_pack(dataset, lambda pack, documents: None) == []


def set_at(name: str, place: Any, value: Any) -> Spoil:
    """Change one entry of an array; `place` may be computed from (pack, documents)."""

    def spoil(pack: Pack, documents: list[Document]) -> None:
        getattr(pack, name)[place(pack, documents) if callable(place) else place] = value

    return spoil


def last_of_first(pack: Pack, documents: list[Document]) -> int:
    return documents[0].length - 1


def image_field(name: str, value: Any) -> Spoil:
    def spoil(pack: Pack, documents: list[Document]) -> None:
        pack.images[name][0] = value(pack.images[0]) if callable(value) else value

    return spoil


def end_of_first_image(pack: Pack, documents: list[Document]) -> int:
    image = pack.images[0]
    return int(image["token_start"] + image["h"] * image["w"] // 4)


NEXT_TOKEN = "a label is not the next token of its document"
PLACES = "image tokens are not where the images column says"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        # The label of the end of a document is the first token of the next one.
        pytest.param(
            set_at("labels_S", last_of_first, BOS), "an end-of-text token has a label", id="label crosses"
        ),
        pytest.param(set_at("labels_S", 0, ord("a")), NEXT_TOKEN, id="label where none belongs"),
        pytest.param(
            set_at("labels_S", lambda pack, documents: last_of_first(pack, documents) - 1, -100),
            NEXT_TOKEN,
            id="end of text not learned",
        ),
        pytest.param(
            set_at("labels_S", -1, ord("a")),
            "padding is not pad tokens with label -100",
            id="label on padding",
        ),
        pytest.param(
            set_at("labels_S", 1, IMAGE), "a label is an image or padding token", id="label is an image token"
        ),
        pytest.param(
            set_at("tokens_S", -1, ord("a")),
            "padding is not pad tokens with label -100",
            id="token in padding",
        ),
        pytest.param(
            set_at("tokens_S", last_of_first, 262), "a token lies outside the vocabulary", id="id 262"
        ),
        pytest.param(
            set_at("tokens_S", last_of_first, -1), "a token lies outside the vocabulary", id="id -1"
        ),
        pytest.param(
            set_at("positions_S", lambda pack, documents: documents[1].start, 9),
            "positions do not restart at 0 in every document",
            id="position goes on",
        ),
        pytest.param(set_at("tokens_S", last_of_first, IMAGE), PLACES, id="an image token too many"),
        pytest.param(
            image_field("token_start", lambda image: image["token_start"] + 1),
            "is not between its begin and end token",
            id="image begins one token late",
        ),
        pytest.param(
            image_field("token_start", 70), "is not between its begin and end token", id="beyond the pack"
        ),
        pytest.param(
            set_at("tokens_S", end_of_first_image, ord("a")),
            "is not between its begin and end token",
            id="no end token",
        ),
        pytest.param(image_field("row", 2), "an image lies outside the N = 2 vision rows", id="row 2 of 2"),
        pytest.param(image_field("row", -1), "an image lies outside the N = 2 vision rows", id="row -1"),
        pytest.param(
            image_field("offset", 4),
            "vision row 0: images do not lie one after another within L = 32",
            id="a gap before an image",
        ),
        pytest.param(
            image_field("h", lambda image: image["h"] + 2),
            "an image's bytes are not its patches times P",
            id="h",
        ),
        pytest.param(
            image_field("h", 0), "an image or a frame has more than 16 patches, or none", id="no patch"
        ),
        pytest.param(
            image_field("t", 0), "an image or a frame has more than 16 patches, or none", id="no frame"
        ),
        pytest.param(image_field("w", 3), "an image's grid is not a multiple of m = 2", id="odd grid"),
        pytest.param(
            image_field("h", 10),
            "an image or a frame has more than 16 patches, or none",
            id="too many patches",
        ),
        pytest.param(
            image_field("t", 9), "images do not lie one after another within L = 32", id="too many frames"
        ),
    ],
)
def test_a_pack_that_breaks_the_format_is_named_with_what_is_wrong(
    dataset: Path, spoil: Spoil, expected: str
) -> None:
    found = spoil_first_pack(dataset, spoil)
    assert any(expected in fault for fault in found), found


def test_where_only_a_part_is_learned_a_label_may_be_missing_but_never_wrong(dataset: Path) -> None:
    def forget(pack: Pack, documents: list[Document]) -> None:
        pack.labels_S[int(np.flatnonzero(pack.labels_S != IGNORE_LABEL)[0])] = IGNORE_LABEL

    assert spoil_first_pack(dataset, forget) == ["a label is not the next token of its document"]
    edit_manifest(dataset, lambda m: m["unlearned_tokens"].update(web=1))
    assert faults(dataset) == []

    def mistake(pack: Pack, documents: list[Document]) -> None:
        pack.labels_S[int(np.flatnonzero(pack.labels_S != IGNORE_LABEL)[0])] += 1

    assert spoil_first_pack(dataset, mistake) == ["a label is not the next token of its document"]


def test_another_tokenizer_beside_the_shards_is_found(dataset: Path) -> None:
    path = dataset / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    (fault,) = verify_dataset(dataset)[1]
    assert "is not the one that the data set was made with" in fault
    path.unlink()
    (fault,) = verify_dataset(dataset)[1]
    assert "tokenizer.json" in fault


def test_a_document_of_which_nothing_is_learned_is_found(dataset: Path) -> None:
    edit_manifest(dataset, lambda manifest: manifest["unlearned_tokens"].update(web=1))

    def unlearn(pack: Pack, documents: list[Document]) -> Any:
        labels_S = pack.labels_S.copy()
        labels_S[documents[1].start : documents[1].start + documents[1].length] = IGNORE_LABEL
        return replace(pack, labels_S=labels_S), documents

    assert spoil_first_pack(dataset, unlearn) == ["document 1 has no label"]


def test_images_in_another_order_than_their_rows_are_found(dataset: Path) -> None:
    def swap(pack: Pack, documents: list[Document]) -> None:
        images = pack.images
        patches = images["h"] * images["w"]
        images["row"], images["row"][0] = 0, 1
        images["offset"][0], images["offset"][1:] = 0, np.cumsum(patches[1:]) - patches[1:]

    assert "images are not in the order of vision rows" in spoil_first_pack(dataset, swap)


def test_two_images_that_point_at_one_place_are_found(dataset: Path) -> None:
    def point(pack: Pack, documents: list[Document]) -> None:
        pack.images["token_start"][1] = pack.images["token_start"][0]

    assert any("share tokens" in fault or PLACES in fault for fault in spoil_first_pack(dataset, point))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda first, second: [replace(first, length=first.length + 1), second], id="overlap"),
        pytest.param(lambda first, second: [replace(first, length=first.length - 1), second], id="gap"),
        pytest.param(lambda first, second: [first, replace(second, length=64)], id="beyond S"),
        pytest.param(lambda first, second: [second, first], id="order"),
    ],
)
def test_documents_that_do_not_lie_one_after_another_are_found(
    dataset: Path, change: Callable[[Document, Document], list[Document]]
) -> None:
    def spoil(pack: Pack, documents: list[Document]) -> tuple[Pack, list[Document]]:
        return pack, [*change(*documents[:2]), *documents[2:]]

    found = spoil_first_pack(dataset, spoil)
    assert found == ["documents do not lie one after another within S = 64"]


# Codecs


def recode(directory: Path, codec: str) -> None:
    """The same data set with its patches stored by another codec."""
    opened = open_dataset(directory)
    contract = describe_contract(opened.budget, opened.geometry, opened.tokens, codec)
    encode = image_encoder(codec, opened.geometry, jpeg_quality=95, zstd_level=1)
    entries = read_json(directory / "dataset.json")["shards"]
    for shard, entry in zip(opened.shards, entries, strict=True):
        reader = opened.reader(shard)
        path = directory / "shards" / shard.name
        writer = ShardWriter(path.with_suffix(".new"), opened.budget.S, fingerprint_of(contract))
        for row in range(len(reader)):
            pack = copy_of(reader.pack(row))
            stored = store_patches(pack.stored, pack.images, encode)
            writer.append(replace(pack, stored=stored), reader.documents(row))
        writer.close()
        path.with_suffix(".new").rename(path)
        entry.update(bytes=path.stat().st_size, checksum=file_checksum(path))
    edit_manifest(
        directory,
        lambda m: m.update(contract, fingerprint=fingerprint_of(contract), shards=entries),
    )
    edit_manifest(directory, lambda m: m["totals"].update(bytes=sum(entry["bytes"] for entry in entries)))


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_a_data_set_of_frames_is_proven_down_to_its_pixels(dataset: Path, codec: str) -> None:
    recode(dataset, codec)
    assert faults(dataset) == []
    shard = open_dataset(dataset).shards[0]
    reader = open_dataset(dataset).reader(shard)
    row = next(row for row in range(len(reader)) if len(reader.images(row)) > 1)
    data = bytearray(shards(dataset)[0].read_bytes())
    data[reader.byte_ranges(row)["patches"].stop - 2] ^= 1
    shards(dataset)[0].write_bytes(data)
    found = [fault for fault in faults(dataset) if f"pack {row}: " in fault]
    assert found[0].startswith(f"{shard.name}: pack {row}: checksum is ")
    last = len(reader.images(row)) - 1
    assert found[1].startswith(f"{shard.name}: pack {row}: image {last} is damaged: ")
    assert len(found) == 2


def test_a_frame_that_does_not_decode_is_found_although_every_other_checksum_is_right(dataset: Path) -> None:
    recode(dataset, "zstd")

    def flip(pack: Pack, documents: list[Document]) -> None:
        pack.stored[int(pack.images["nbytes"][0]) - 1] ^= 1

    (found,) = spoil_first_pack(dataset, flip)
    assert found.startswith("image 0 is damaged: ")
