"""Raw tars -> shards -> batch, compared with what the raw tars say, recomputed here from nothing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from preprocess.budgets import BudgetConfig
from preprocess.config import PlanConfig, PreprocessConfig
from preprocess.job import run_job
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.synthetic import train_tokenizer, write_shapes
from shared.dataset import DataSet, open_dataset
from shared.geometry import Budget, Geometry
from trainer.data.batch import Batch, BatchShape, assemble_batch

P_SIDE, MERGE = 16, 2
BUDGET = Budget(S=96, N=2, L=64)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("raw")
    tars = write_shapes(directory / "tars", samples=40, samples_per_tar=20, seed=5)
    train_tokenizer(tars, directory / "tokenizer", vocabulary_size=300)
    return directory


@pytest.fixture(scope="module")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    output = tmp_path_factory.mktemp("out") / "dataset"
    run_job(
        PreprocessConfig(
            output=str(output),
            tokenizer=str(raw / "tokenizer"),
            sources={"shapes": WebDatasetConfig(paths=(str(raw / "tars" / "*.tar"),))},
            budget=BudgetConfig(S=BUDGET.S, N=BUDGET.N, L=BUDGET.L),
            geometry=Geometry(patch_size=P_SIDE, merge=MERGE, max_patches_per_image=64),
            plan=PlanConfig(shard_bytes=1 << 20, validation_fraction=0.2),
            executor="serial",
        )
    )
    return open_dataset(output)


def raw_samples(raw: Path) -> dict[str, tuple[np.ndarray, str, bool]]:
    """Key -> picture as displayed over white, uint8 [H, W, 3], caption, and whether it is stored turned."""
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted((raw / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = file.read()
    samples: dict[str, tuple[np.ndarray, str, bool]] = {}
    for key, parts in members.items():
        stored = Image.open(io.BytesIO(parts.get("jpg") or parts["png"]))
        turned = stored.getexif().get(0x0112, 1) != 1
        picture = ImageOps.exif_transpose(stored)
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        samples[key] = (
            np.asarray(Image.alpha_composite(white, layer).convert("RGB")),
            parts["txt"].decode().strip(),
            turned,
        )
    return samples


def cell_by_cell(picture_hwc: np.ndarray) -> np.ndarray:
    """Patches [h*w, P] of a picture, by loops: m x m patches of one cell follow each other."""
    h, w = (side // P_SIDE for side in picture_hwc.shape[:2])
    patches = []
    for cell_row in range(0, h, MERGE):
        for cell_column in range(0, w, MERGE):
            for row in range(cell_row, cell_row + MERGE):
                for column in range(cell_column, cell_column + MERGE):
                    patch = picture_hwc[row * P_SIDE :, column * P_SIDE :][:P_SIDE, :P_SIDE]
                    patches.append(patch.reshape(-1))
    return np.stack(patches)


def resized(picture_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """torch's antialiased bilinear resize of a uint8 picture, in the layout of a photograph in memory."""
    tensor = torch.from_numpy(picture_hwc.copy()).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(tensor, size=(height, width), mode="bilinear", antialias=True)
    return out[0].permute(1, 2, 0).numpy()


def batch_of(dataset: DataSet, split: str, number: int) -> Batch:
    shape = BatchShape(
        packs=1, budget=dataset.budget, geometry=dataset.geometry, pad_token=dataset.tokens.pad
    )
    return assemble_batch([dataset.pack(split, number)], [dataset.document_spans(split, number)], shape)


def test_every_sample_arrives_in_a_batch_bit_for_bit(raw: Path, dataset: DataSet) -> None:
    samples, ids = raw_samples(raw), dataset.tokens
    tokenizer = Tokenizer.from_file(str(raw / "tokenizer" / "tokenizer.json"))
    seen: list[str] = []
    for split in dataset.splits:
        for number in range(dataset.num_packs(split)):
            batch = batch_of(dataset, split, number)
            visual = batch.visual_index_BS[0].numpy()
            pixels = batch.pixel_values_NLP.numpy().reshape(-1, MERGE**2, dataset.geometry.values_per_patch)
            grid = batch.grid_thw_NL3.numpy().reshape(-1, MERGE**2, 3)
            sizes = batch.image_sizes_NL2.numpy().reshape(-1, MERGE**2, 2)
            for document in dataset.documents(split, number):
                picture, caption, turned = samples[document.key]
                here = slice(document.start, document.start + document.length)
                places = visual[here][visual[here] >= 0]
                h, w = sizes[places[0], 0].tolist()
                text = tokenizer.encode(caption, add_special_tokens=False).ids
                count = h * w // MERGE**2
                tokens = [ids.bos, ids.begin_image, *[ids.image] * count, ids.end_image, *text, ids.eos]
                assert batch.tokens_BS[0, here].tolist() == tokens
                labels = [-100] * (count + 2) + [*text, ids.eos, -100]
                assert batch.labels_BS[0, here].tolist() == labels
                assert batch.positions_BS[0, here].tolist() == list(range(len(tokens)))
                expected = cell_by_cell(resized(picture, h * P_SIDE, w * P_SIDE))
                found = pixels[places].reshape(len(expected), -1)
                # A turned picture is turned behind the resize, which rounds after each of its two directions.
                assert np.abs(found.astype(int) - expected).max() <= int(turned)
                rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
                order = (
                    np.stack([rows, columns], -1).reshape(h // 2, 2, w // 2, 2, 2).transpose(0, 2, 1, 3, 4)
                )
                assert np.array_equal(grid[places].reshape(-1, 3)[:, 1:], order.reshape(-1, 2))
                seen.append(document.key)
    assert sorted(seen) == sorted(samples)


def test_padding_of_a_batch_holds_nothing(dataset: DataSet) -> None:
    batch = batch_of(dataset, "train", 0)
    used = sum(document.length for document in dataset.documents("train", 0))
    assert (batch.tokens_BS[0, used:] == dataset.tokens.pad).all()
    assert (batch.labels_BS[0, used:] == -100).all()
    assert (batch.visual_index_BS[0, used:] == -1).all()
    empty = batch.image_ids_NL < 0
    assert empty.any() and (batch.pixel_values_NLP[empty] == 0).all()


def test_account_and_shards_tell_the_same(raw: Path, dataset: DataSet) -> None:
    account = dataset.manifest["account"]["shapes"]
    assert account["read"] == account["packed"] == 40 and not account["rejected"]
    assert set(dataset.splits) == {"train", "validation"}
