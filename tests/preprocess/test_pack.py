"""Packs: bit for bit what an independent computation makes of the raw samples, broken ones left out."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from preprocess.config import CostConfig, ImageLimits, PlanConfig, PreprocessConfig
from preprocess.cost import pack_cost
from preprocess.executor import SerialExecutor
from preprocess.job import Job, run_job
from preprocess.sources.interleaved import InterleavedConfig
from preprocess.verify import verify_dataset
from shared.errors import UserError
from shared.files import read_json
from shared.geometry import Budget, Geometry
from tests.preprocess.inputs import (
    GEOMETRY,
    captioned,
    encode,
    make_config,
    mixed_samples,
    noise,
    png,
    write_samples,
    write_tar,
)
from tests.preprocess.reference import Reference, Segments


def odd_pictures() -> dict[str, bytes]:
    """Every way of being displayed other than stored, but on its side: that rounds in another order."""
    turned = Image.Exif()
    turned[0x0112] = 3
    grey = noise(1, 30, 20, 1)[..., 0]
    return {
        "turned": encode(noise(2, 40, 24), "JPEG", exif=turned, quality=95),
        "alpha": encode(noise(3, 33, 21, 4)),
        "grey": encode(grey),
        "grey16": encode(Image.fromarray(grey.astype(np.uint16) * 200)),
        "palette": encode(Image.fromarray(noise(4, 20, 50)).quantize(16)),
        "bits": encode(Image.fromarray(grey).convert("1")),
        "cmyk": encode(Image.fromarray(noise(5, 20, 50)).convert("CMYK"), "JPEG"),
        "exact": png(16, 8),
        "strip": png(2, 90),
        "dot": png(1, 1),
    }


def all_samples() -> dict[str, tuple[bytes, str]]:
    odd = {f"odd/{name}": (data, f"a {name} picture, ça va") for name, data in odd_pictures().items()}
    literal = {"literal": (png(9, 9), "<|image|>"), "long": (png(20, 20), "a long caption " * 20 + "end")}
    return {**mixed_samples(60), **odd, **literal}


@pytest.mark.parametrize(
    ("geometry", "budget", "plan"),
    [
        pytest.param(GEOMETRY, Budget(S=64, N=2, L=32), PlanConfig(shard_bytes=8192), id="m = 2"),
        pytest.param(
            Geometry(patch_size=8, merge=1, max_patches_per_image=12, filter="bicubic"),
            Budget(S=50, N=3, L=13),
            PlanConfig(shard_bytes=8192, images_per_row=1, validation_fraction=0.3),
            id="m = 1, one image per row, bicubic",
        ),
        pytest.param(
            Geometry(patch_size=4, merge=2, max_patches_per_image=32, temporal_patch_size=2, resize="fill"),
            Budget(S=333, N=1, L=100),
            PlanConfig(shard_bytes=1 << 20, window=16),
            id="two frames per patch, scaled up",
        ),
    ],
)
def test_every_pack_is_bit_for_bit_what_the_reference_computes(
    tmp_path: Path, geometry: Geometry, budget: Budget, plan: PlanConfig
) -> None:
    samples = all_samples()
    names = list(samples)
    paths = [
        write_samples(tmp_path / f"{number}.tar", {name: samples[name] for name in names[number::3]})
        for number in range(3)
    ]
    config = make_config(tmp_path, *paths, geometry=geometry, budget=budget, plan=plan)
    stats = run_job(config)
    reference = Reference(Path(config.output))
    found = reference.check({("web", key): [*sample] for key, sample in samples.items()})
    assert {key for _, key in found} == set(samples)
    lengths = {key: len(reference.expect([*sample]).tokens) for key, sample in samples.items()}
    assert {key: sum(parts.values()) for (_, key), parts in found.items()} == lengths
    account = stats["account"]["web"]
    cut = [parts for parts in found.values() if len(parts) > 1]
    assert account["read"] == len(samples) and account["rejected"] == {}
    assert (account["packed"], account["split_parts"]) == (len(samples) - len(cut), len(cut))
    number = sum(map(len, cut))
    assert account["parts"] == {"made": number, "packed": number, "rejected": {}, "incomplete_samples": {}}
    assert verify_dataset(Path(config.output))[1] == []


def test_totals_fill_and_cost_are_those_of_the_packs(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_samples(tmp_path / "a.tar", mixed_samples(50)))
    stats = run_job(config)
    manifest = read_json(Path(config.output) / "dataset.json")
    packs = list(Reference(Path(config.output)).packs())
    lengths = [[document["length"] for document in pack["documents"]] for pack in packs]
    assert manifest["totals"] == {
        "packs": len(packs),
        "bytes": sum(path.stat().st_size for path in (Path(config.output) / "shards").iterdir()),
        "tokens": sum(map(sum, lengths)),
        "labels": sum(int((pack["labels"] != -100).sum()) for pack in packs),
        "patches": sum(len(pack["patches"]) for pack in packs),
        "images": 50,
        "documents": 50,
    }
    assert manifest["fill"]["tokens"] == round(sum(map(sum, lengths)) / (64 * len(packs)), 6)
    assert stats["fill"]["vision"] == round(manifest["totals"]["patches"] / (64 * len(packs)), 6)
    for pack, own in zip(packs, lengths, strict=True):
        patches = [image["h"] * image["w"] for image in pack["images"]]
        assert pack["cost"] == pack_cost(own, patches, config.cost)


def test_cost_is_linear_in_parameters_and_square_in_lengths() -> None:
    config = CostConfig(
        encoder_width=10,
        encoder_layers=3,
        encoder_parameters=1000,
        decoder_width=20,
        decoder_layers=5,
        decoder_parameters=2000,
    )
    # Two documents of 4 and 6 tokens, one image of 8 patches.
    linear = 6 * (2000 * 10 + 1000 * 8)
    attention = 6 * 5 * 20 * (16 + 36) + 12 * 3 * 10 * 64
    assert pack_cost([4, 6], [8], config) == linear + attention


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_pictures_become_rejects_and_every_other_sample_is_packed(tmp_path: Path) -> None:
    samples = mixed_samples(40)
    broken = {
        "cut": (png(30, 30)[:500], "image_corrupt"),
        "html": (b"<html>", "image_unreadable"),
        "empty": (b"", "image_empty"),
        "wide": (png(61, 60), "image_too_many_pixels"),
        "heavy": (png(10, 10) + b"\0" * 12_000, "image_too_many_bytes"),
    }
    members = [member for key, sample in samples.items() for member in captioned(key, *sample)]
    for number, (key, (data, _)) in enumerate(broken.items()):
        members[16 * number : 16 * number] = captioned(key, data, "x")
    members += [("nocaption.png", png(5, 5)), ("latin.png", png(5, 5)), ("latin.txt", b"\xe9")]
    limits = ImageLimits(max_pixels=60 * 60, max_bytes=12_000)
    config = make_config(tmp_path, write_tar(tmp_path / "a.tar", members), limits=limits)
    stats = run_job(config)
    reasons = {key: reason for key, (_, reason) in broken.items()}
    reasons |= {"nocaption": "no_caption", "latin": "caption_not_utf8"}
    rejects = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    assert {reject["key"]: reject["reason"] for reject in rejects} == reasons
    assert all(reject["part"] == -1 and reject["source"] == "web" for reject in rejects)
    account = stats["account"]["web"]
    assert (account["read"], account["packed"], account["split_parts"]) == (47, 40, 0)
    assert account["rejected"] == {
        "caption_not_utf8": 1,
        "image_corrupt": 1,
        "image_empty": 1,
        "image_too_many_bytes": 1,
        "image_too_many_pixels": 1,
        "image_unreadable": 1,
        "no_caption": 1,
    }
    found = Reference(Path(config.output)).check({("web", key): [*s] for key, s in samples.items()})
    assert {key for _, key in found} == set(samples)
    assert verify_dataset(Path(config.output))[1] == []


def test_a_picture_that_has_another_size_than_at_the_scan_is_rejected(tmp_path: Path) -> None:
    before, after = png(9, 16), png(16, 9)
    size = max(len(before), len(after))
    config = make_config(tmp_path, tmp_path / "a.tar")
    write_samples(tmp_path / "a.tar", {"a": (png(8, 8), "one"), "b": (before.ljust(size, b"\0"), "two")})
    job = Job(config)
    job.prepare(job.identity)
    job.scan(SerialExecutor(0))
    write_samples(tmp_path / "a.tar", {"a": (png(8, 8), "one"), "b": (after.ljust(size, b"\0"), "two")})
    job.pack(SerialExecutor(0))
    assert job.finish()["account"]["web"]["rejected"] == {"image_corrupt": 1}
    (reject,) = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    assert (reject["key"], reject["detail"]) == ("b", "9 x 16 pixels, 16 x 9 in the scan")


def test_a_picture_of_its_own_file_that_was_written_again_stops_the_job(tmp_path: Path) -> None:
    """Another picture of the same size in pixels would else stand beside the old one's text."""
    picture, records = tmp_path / "a.png", tmp_path / "d.jsonl"
    picture.write_bytes(png(8, 8))
    records.write_text(json.dumps({"texts": ["one", None], "images": [None, "a.png"]}) + "\n")
    config = make_config(tmp_path, records)
    config = replace(config, sources={"docs": InterleavedConfig(paths=(str(records),))})
    job = Job(config)
    job.prepare(job.identity)
    job.scan(SerialExecutor(0))
    time = picture.stat().st_mtime_ns
    os.utime(picture, ns=(time, time + 1))
    with pytest.raises(
        UserError, match=rf"{picture} has changed since the scan; delete index/docs/000000.parquet"
    ):
        job.pack(SerialExecutor(0))
    os.utime(picture, ns=(time, time))
    job.pack(SerialExecutor(0))
    assert job.finish()["account"]["docs"]["packed"] == 1
    picture.unlink()
    (Path(config.output) / "shards" / "train-000000-000.parquet").unlink()
    with pytest.raises(UserError, match=rf"{picture} is gone since the scan"):
        job.pack(SerialExecutor(0))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_decode_has_the_limits_of_the_config(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "a.tar", {"a": (png(8, 8), "one"), "b": (png(9, 9), "two")})
    job = Job(make_config(tmp_path, path))
    job.prepare(job.identity)
    job.scan(SerialExecutor(0))
    lower = Job(make_config(tmp_path, path, limits=ImageLimits(max_pixels=80)))
    lower.pack(SerialExecutor(0))
    assert lower.finish()["account"]["web"]["rejected"] == {"image_too_many_pixels": 1}


def test_a_shard_of_which_nothing_is_left_is_not_in_the_data_set(tmp_path: Path) -> None:
    samples = {"good": (png(8, 8), "a"), "bad": (png(8, 8)[:-40], "b")}
    config = make_config(
        tmp_path,
        write_samples(tmp_path / "a.tar", samples),
        plan=PlanConfig(window=1, shard_bytes=1),
    )
    run_job(config)
    manifest = read_json(Path(config.output) / "dataset.json")
    assert [shard["packs"] for shard in manifest["shards"]] == [1]
    assert verify_dataset(Path(config.output))[0]["packs"] == 1


def document_config(
    directory: Path, documents: Mapping[str, Sequence[str | bytes]], **changes: Any
) -> PreprocessConfig:
    """A config of one source "web" of interleaved documents, whose texts follow each other without a separator."""

    def listed(segments: Sequence[str | bytes]) -> dict[str, list[str | None]]:
        return {
            "texts": [segment if isinstance(segment, str) else None for segment in segments],
            "images": [
                f"data:image/png;base64,{base64.b64encode(segment).decode()}"
                if isinstance(segment, bytes)
                else None
                for segment in segments
            ],
        }

    path = directory / "documents.jsonl"
    lines = [json.dumps({"name": name, **listed(segments)}) for name, segments in documents.items()]
    path.write_text("\n".join(lines))
    source = InterleavedConfig(
        paths=(str(path),), key="name", separator="", bad_media="reject", max_reject_rate=1.0
    )
    return make_config(directory, path, sources={"web": source}, **changes)


def test_documents_of_many_images_and_texts_are_what_the_reference_computes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents: dict[str, Segments] = {}
    for number in range(40):
        segments: Segments = []
        for _ in range(int(rng.integers(1, 7))):
            if rng.random() < 0.5:
                segments.append(png(*rng.integers(3, 40, 2).tolist(), seed=number))
            else:
                segments.append("t" * int(rng.integers(1, 60)))
        documents[f"{number}"] = segments
    config = document_config(tmp_path, documents, budget=Budget(S=61, N=2, L=24))
    account = run_job(config)["account"]["web"]
    found = Reference(Path(config.output)).check({("web", key): s for key, s in documents.items()})
    assert {key for _, key in found} == set(documents)
    # Parts of pictures alone are rejected: nothing would be learned from them.
    rejects = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    assert {row["reason"] for row in rejects} == {"no_labels"}
    cut = {key for (_, key), parts in found.items() if len(parts) > 1} | {row["key"] for row in rejects}
    assert len(cut) > 5
    assert (account["packed"], account["split_parts"]) == (40 - len(cut), len(cut))
    assert verify_dataset(Path(config.output))[1] == []


def test_the_account_holds_to_the_unit_when_some_or_all_parts_of_a_cut_sample_fail(tmp_path: Path) -> None:
    good, bad = png(16, 16), png(16, 16)[:-60]
    # A picture of 16 x 16 is 4 x 4 patches, 4 tokens and begin and end: 6. S = 8 holds one of them.
    documents: dict[str, Sequence[str | bytes]] = {
        "whole": [good],
        "whole and bad": [bad],
        "one of two fails": [good, bad],
        "the first of three fails": [bad, good, good],
        "both fail": [bad, bad],
        "all three fail": [bad, bad, bad],
        "text only": ["t" * 20],
    }
    config = document_config(tmp_path, documents, budget=Budget(S=8, N=1, L=16))
    stats = run_job(config)
    # The reference needs the size of every picture; those that cannot be decoded are in no pack.
    mended = {("web", key): [good if s == bad else s for s in own] for key, own in documents.items()}
    found = Reference(Path(config.output)).check(mended)
    # 2 pictures: bos + 6 | 6 + eos = 7, 7. 3 pictures: 7, 6, 7. Text: bos + 20 + eos = 22, equal parts of 7, 8, 7.
    # A picture before a picture has nothing to learn: of pictures alone, the end of text in the last part is all.
    assert found == {
        ("web", "whole"): {0: 8},
        ("web", "the first of three fails"): {2: 7},
        ("web", "text only"): {0: 7, 1: 8, 2: 7},
    }
    assert stats["account"]["web"] == {
        "read": 7,
        "packed": 1,
        "split_parts": 2,
        "rejected": {"image_corrupt": 4},
        "parts": {
            "made": 2 + 3 + 2 + 3 + 3,
            "packed": 1 + 3,
            "rejected": {"image_corrupt": 1 + 1 + 2 + 3, "no_labels": 1 + 1},
            "incomplete_samples": {"image_corrupt": 1},
        },
        "repeated": 0,
        "media_dropped": {},
    }
    rejects = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    assert sorted((r["key"], r["part"]) for r in rejects) == [
        ("all three fail", 0),
        ("all three fail", 1),
        ("all three fail", 2),
        ("both fail", 0),
        ("both fail", 1),
        ("one of two fails", 0),
        ("one of two fails", 1),
        ("the first of three fails", 0),
        ("the first of three fails", 1),
        ("whole and bad", -1),
    ]
    assert verify_dataset(Path(config.output))[1] == []


def test_a_cut_sample_that_loses_its_picture_counts_towards_the_ceiling(tmp_path: Path) -> None:
    # The caption fills two packs; the broken picture rejects the first part, the second is text alone.
    broken = png(8, 8)[:60]
    samples = {f"{number:02}": (broken, "x" * 100) for number in range(20)}
    path = write_samples(tmp_path / "a.tar", samples)
    config = make_config(tmp_path, path, source={"max_reject_rate": 0.5})
    with pytest.raises(UserError, match=r"20 of 20 samples rejected in the job \(image_corrupt 20\)"):
        run_job(config)


def test_a_part_of_which_only_the_last_label_is_left_is_a_reject_and_no_document(tmp_path: Path) -> None:
    # bos and 17 | the picture's 16 tokens, begin and end | 17 and eos: three parts of 18 for S = 20.
    documents: dict[str, Sequence[str | bytes]] = {
        "k": ["t" * 17, png(32, 32)[:-60], "u" * 17],
        "good": ["v"],
    }
    config = document_config(
        tmp_path,
        documents,
        budget=Budget(S=20, N=1, L=64),
        geometry=replace(GEOMETRY, max_patches_per_image=64),
    )
    source = replace(config.sources["web"], bad_media="drop")  # type: ignore[arg-type]
    config = replace(config, sources={"web": source})
    account = run_job(config)["account"]["web"]
    documents_of = [d for pack in Reference(Path(config.output)).packs() for d in pack["documents"]]
    assert all(document["length"] > 0 for document in documents_of)
    assert account["parts"]["rejected"] == {"image_corrupt": 1}
    assert account["media_dropped"] == {}, "the picture goes with its part, which is the reject"
    (reject,) = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    assert (reject["key"], reject["part"], reject["media"]) == ("k", 1, -1)
    assert verify_dataset(Path(config.output))[1] == []
