"""Prove a finished data set from its own bytes: layout, checksums, budgets, placement, labels, totals.

Nothing here trusts the code that wrote the shards; each statement of the format is checked on every pack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from preprocess.download import open_anywhere
from shared.dataset import DataSet, ShardEntry
from shared.errors import UserError
from shared.files import file_checksum
from shared.geometry import Budget
from shared.schema import IGNORE_LABEL, Document, Pack
from shared.tokens import TokenIds, tokenizer_hash


def verify_dataset(path: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of what was checked, and every fault found, one line each.

    Raises:
        UserError: the data set cannot be opened at all.
    """
    with open_anywhere(path) as dataset:
        return _verify(dataset)


def _verify(dataset: DataSet) -> tuple[dict[str, int], list[str]]:
    if not isinstance(dataset.manifest.get("unlearned_tokens"), dict):
        raise UserError(
            f"{dataset.path}: unlearned_tokens in dataset.json is no table; preprocess the data set again"
        )
    kinds = ("shards", "packs", "documents", "images", "tokens", "labels", "patches", "bytes")
    counts: dict[str, int] = dict.fromkeys(kinds, 0)
    by_source: Counter[str] = Counter()
    faults: list[str] = []
    for shard in dataset.shards:
        counts["shards"] += 1
        counts["bytes"] += shard.bytes
        faults += [f"{shard.name}: {fault}" for fault in _verify_shard(dataset, shard, counts, by_source)]
    faults += _tokenizer_faults(dataset)
    try:
        faults += _total_faults(dataset.manifest["totals"], counts)
        faults += _fill_faults(dataset.manifest["fill"], counts, dataset.budget)
        faults += _account_faults(dataset.manifest["account"], by_source)
    except (KeyError, TypeError, AttributeError) as error:
        faults.append(f"totals, fill or account in dataset.json are not valid: {error!r}")
    return counts, faults


def _tokenizer_faults(dataset: DataSet) -> list[str]:
    """Whoever trains or decodes later takes the tokenizer that lies beside the shards."""
    directory = dataset.path / "tokenizer"
    try:
        same = tokenizer_hash(directory) == dataset.tokens.tokenizer_sha256
    except (UserError, OSError) as error:
        return [f"tokenizer: {error}"]
    return [] if same else ["tokenizer: is not the one that the data set was made with; copy it again"]


def _verify_shard(
    dataset: DataSet, shard: ShardEntry, counts: dict[str, int], by_source: Counter[str]
) -> Iterator[str]:
    path = dataset.shard_path(shard)
    damaged = True
    if not path.is_file():
        yield "is missing"
        return
    if path.stat().st_size != shard.bytes:
        yield f"{path.stat().st_size} bytes, dataset.json says {shard.bytes}"
    elif (found := file_checksum(path)) != shard.checksum:
        yield f"file checksum {found}, dataset.json says {shard.checksum}"
    else:
        damaged = False
    try:
        yield from _verify_packs(dataset, shard, counts, by_source)
    except UserError as error:
        yield str(error)
    except Exception as error:
        # A file that is not what was written may fail anywhere in Arrow; one that is, only by a defect here.
        if not damaged:
            raise
        yield f"cannot be read: {type(error).__name__}: {error}"


def _verify_packs(
    dataset: DataSet, shard: ShardEntry, counts: dict[str, int], by_source: Counter[str]
) -> Iterator[str]:
    reader = dataset.reader(shard)
    for row in range(len(reader)):
        pack, documents = reader.pack(row), reader.documents(row)
        counts["packs"] += 1
        counts["documents"] += len(documents)
        by_source.update(document.source for document in documents)
        counts["images"] += len(pack.images)
        counts["tokens"] += sum(document.length for document in documents)
        counts["patches"] += pack.num_patches
        counts["labels"] += int((pack.labels_S != IGNORE_LABEL).sum())
        if damage := reader.damage(row):
            yield f"pack {row}: {damage}"
        faults = list(pack_faults(pack, documents, dataset)) or _frame_faults(pack)
        yield from (f"pack {row}: {fault}" for fault in faults)


def _frame_faults(pack: Pack) -> Iterator[str]:
    """Every frame is decoded; codec raw has none. Only for a pack whose grids are good."""
    for image in range(len(pack.images) if pack.decoder is not None else 0):
        try:
            pack.read_image(image)
        except UserError as error:
            yield str(error).removeprefix(f"{pack.origin}: ")


def pack_faults(pack: Pack, documents: list[Document], dataset: DataSet) -> Iterator[str]:
    """Everything that is wrong with one pack."""
    used = sum(document.length for document in documents)
    starts = np.cumsum([0, *(document.length for document in documents)])[:-1]
    if [document.start for document in documents] != starts.tolist() or used > dataset.budget.S:
        yield f"documents do not lie one after another within S = {dataset.budget.S}"
        return
    lengths = [*(document.length for document in documents), dataset.budget.S - used]
    if not np.array_equal(pack.positions_S, np.concatenate([np.arange(length) for length in lengths])):
        yield "positions do not restart at 0 in every document"
    if (pack.tokens_S[used:] != dataset.tokens.pad).any() or (pack.labels_S[used:] != IGNORE_LABEL).any():
        yield "padding is not pad tokens with label -100"
    if pack.tokens_S.min() < 0 or pack.tokens_S.max() >= dataset.tokens.vocabulary_size:
        yield "a token lies outside the vocabulary"
    unlearned = dataset.manifest["unlearned_tokens"]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], used], strict=True)):
        if (pack.labels_S[start:end] == IGNORE_LABEL).all():
            yield f"document {number} has no label"
    partly = np.repeat([bool(unlearned.get(document.source)) for document in documents], lengths[:-1])
    yield from _label_faults(pack, starts, partly, dataset.tokens)
    yield from _image_faults(pack, dataset)


def _label_faults(
    pack: Pack, starts: npt.NDArray[Any], partly: npt.NDArray[np.bool_], ids: TokenIds
) -> Iterator[str]:
    """A label is the next token of the same document, or -100 before an image's own tokens and at the end.

    partly: the tokens of sources that learn only part of their text; there, -100 is right anywhere.
    """
    tokens, labels, used = pack.tokens_S, pack.labels_S, len(partly)
    ends = np.append(starts[1:], used).astype(np.int64) - 1
    inside = np.ones(used, bool)
    inside[ends[ends >= 0]] = False
    expected = np.full(used, IGNORE_LABEL, np.int64)
    following = np.append(tokens[1:used], 0)
    learned = inside & ~np.isin(following, (ids.image, ids.begin_image, ids.end_image))
    expected[learned] = following[learned]
    # The last label of a part is the first token of the next part, which lies in another pack.
    unlearned = partly & (labels[:used] == IGNORE_LABEL)
    if ((labels[:used] != expected) & ~unlearned)[inside].any():
        yield "a label is not the next token of its document"
    # Where only a part is learned, turns may end in it too, and a cut may lie behind one.
    ends = ends[(ends >= 0) & ~np.append(partly, False)[ends]]
    if (labels[ends][tokens[ends] == ids.eos] != IGNORE_LABEL).any():
        yield "an end-of-text token has a label"
    if np.isin(labels, (ids.image, ids.begin_image, ids.end_image, ids.pad)).any() and ids.pad != ids.eos:
        yield "a label is an image or padding token"


def _image_faults(pack: Pack, dataset: DataSet) -> Iterator[str]:
    images, budget, geometry = pack.images, dataset.budget, dataset.geometry
    patches = images["t"].astype(np.int64) * images["h"] * images["w"]
    frames = images["h"].astype(np.int64) * images["w"]
    least = np.minimum(np.minimum(images["h"], images["w"]), images["t"])
    if (frames > geometry.max_patches_per_image).any() or (least < 1).any():
        yield f"an image or a frame has more than {geometry.max_patches_per_image} patches, or none"
    if dataset.codec == "raw" and (images["nbytes"] != patches * geometry.values_per_patch).any():
        yield "an image's bytes are not its patches times P"
    if len(images) and (images["row"].min() < 0 or images["row"].max() >= budget.N):
        yield f"an image lies outside the N = {budget.N} vision rows"
    if ((images["h"] % geometry.merge) | (images["w"] % geometry.merge)).any():
        yield f"an image's grid is not a multiple of m = {geometry.merge}"
    if (np.diff(images["row"]) < 0).any():
        yield "images are not in the order of vision rows"
    for row in np.unique(images["row"]):
        here = images["row"] == row
        ends = np.cumsum(patches[here])
        if not np.array_equal(images["offset"][here], ends - patches[here]) or ends[-1] > budget.L:
            yield f"vision row {row}: images do not lie one after another within L = {budget.L}"
    yield from _placeholder_faults(pack, patches // geometry.patches_per_token, dataset.tokens)


def _placeholder_faults(pack: Pack, num_tokens: npt.NDArray[np.int64], ids: TokenIds) -> Iterator[str]:
    """Image tokens stand exactly where the images column says, between a begin and an end token."""
    expected = np.zeros(len(pack.tokens_S), bool)
    for start, count in zip(pack.images["token_start"].tolist(), num_tokens.tolist(), strict=True):
        inside = 1 <= start and start + count < len(expected)
        if (
            not inside
            or pack.tokens_S[start - 1] != ids.begin_image
            or pack.tokens_S[start + count] != ids.end_image
        ):
            yield f"the image at token {start} is not between its begin and end token"
            continue
        if expected[start : start + count].any():
            yield f"two images share tokens at {start}"
        expected[start : start + count] = True
    if not np.array_equal(expected, pack.tokens_S == ids.image):
        yield "image tokens are not where the images column says"


def _total_faults(totals: dict[str, int], counts: dict[str, int]) -> Iterator[str]:
    for name in ("packs", "documents", "images", "tokens", "labels", "patches", "bytes"):
        if totals[name] != counts[name]:
            yield f"total of {name}: dataset.json says {totals[name]}, the shards hold {counts[name]}"


def _fill_faults(fill: dict[str, float], counts: dict[str, int], budget: Budget) -> Iterator[str]:
    """The shares of the budgets of all packs that hold data, to six digits."""
    room = {"tokens": counts["packs"] * budget.S, "vision": counts["packs"] * budget.N * budget.L}
    for name, used in (("tokens", counts["tokens"]), ("vision", counts["patches"])):
        found = round(used / max(1, room[name]), 6)
        if fill[name] != found:
            yield f"fill of {name}: dataset.json says {fill[name]}, in the shards it is {found}"


def _account_faults(account: dict[str, Any], by_source: Counter[str]) -> Iterator[str]:
    for name, line in account.items():
        accounted = line["packed"] + line["split_parts"] + sum(line["rejected"].values())
        if line["read"] + line["repeated"] != accounted:
            read = f"{line['read']} samples read" + f" and {line['repeated']} repeated" * bool(
                line["repeated"]
            )
            yield f"account of {name}: {read}, {accounted} accounted for"
        parts = line["parts"]
        if parts["made"] != parts["packed"] + sum(parts["rejected"].values()):
            yield f"account of {name}: the parts of cut samples do not add up"
        if (packed := line["packed"] + parts["packed"]) != by_source[name]:
            yield f"account of {name}: {packed} samples and parts packed, the shards hold {by_source[name]}"
    for name in by_source.keys() - account.keys():
        yield f"account of {name}: missing, but the shards hold {by_source[name]} of its samples"
