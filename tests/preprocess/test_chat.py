"""Chat data as a source: files of every container, pictures of every kind, and whole jobs proven from outside."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.__main__ import main
from preprocess.budgets import BudgetConfig
from preprocess.config import PlanConfig, PreprocessConfig, VideoConfig
from preprocess.job import run_job
from preprocess.samples import Media, Missing, RawSample, Reject, Text
from preprocess.sources import open_source
from preprocess.sources.base import SourceContext
from preprocess.sources.chat import ChatConfig
from preprocess.verify import verify_dataset
from shared.config import load_config
from shared.dataset import open_dataset
from shared.errors import UserError
from shared.files import read_json
from shared.tokens import TokenNames, load_tokenizer, reopen_tokenizer
from tests.preprocess.chat_inputs import CHATML, GENERATION, STYLES, Style, chat_tokenizer, llava, messages
from tests.preprocess.inputs import GEOMETRY, png
from tests.preprocess.reference import Reference
from tests.preprocess.videos import encode_video, frame_numbers, greys

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "preprocess" / "chat.toml"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"])


def scan(path: Path, tokenizer: Path, **settings: Any) -> list[RawSample | Reject]:
    config = ChatConfig(paths=(str(path),), **settings)
    source = open_source(config, SourceContext("chat", tokenizer, TokenNames()))
    return [entry for unit in source.units() for entry in source.scan(unit)]


def write_json(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(list(records)))
    return path


def kinds(entry: RawSample | Reject) -> str:
    """T for a text, M for a picture, ? for one that is missing."""
    assert isinstance(entry, RawSample), entry
    letters: dict[type, str] = {Text: "T", Media: "M", Missing: "?"}
    return "".join(letters[type(segment)] for segment in entry.segments)


def rejected(entries: list[RawSample | Reject]) -> dict[str, tuple[str, str]]:
    return {entry.key: (entry.reason, entry.detail) for entry in entries if isinstance(entry, Reject)}


# Containers and pictures


def test_json_and_lines_and_tables_give_the_same_conversations(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(png(8, 8))
    records = [llava("<image>Hi", "Yes.", image="a.png", id="x"), llava("Hi", "No.", image=None, id="y")]
    files = [tmp_path / name for name in ("a.json", "a.jsonl", "a.parquet")]
    write_json(files[0], *records)
    files[1].write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), files[2])
    texts: list[list[Any]] = []
    for file in files:
        entries = scan(file, tokenizer, image_root="p")
        assert [kinds(entry) for entry in entries] == ["TMT", "T"]
        assert [entry.key for entry in entries] == [f"{file.name}#0/x", f"{file.name}#1/y"]
        texts.append(
            [s for e in entries if isinstance(e, RawSample) for s in e.segments if isinstance(s, Text)]
        )
    assert texts[0] == texts[1] == texts[2]


def test_pictures_are_bytes_paths_or_data_and_addresses_are_not_fetched(
    tmp_path: Path, tokenizer: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8))
    table = {
        "messages": [[{"role": "user", "content": "<image> ?"}, {"role": "assistant", "content": "A."}]] * 4,
        "images": [
            [{"bytes": png(4, 4), "path": None}],
            [{"bytes": None, "path": "a.png"}],
            [{"bytes": None, "path": "https://example.org/a.png"}],
            [{"bytes": None, "path": None}],
        ],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    entries = scan(tmp_path / "a.parquet", tokenizer)
    assert [kinds(entry) for entry in entries] == ["TMT", "TMT", "T?T", "T?T"]
    found = [s for e in entries if isinstance(e, RawSample) for s in e.segments if not isinstance(s, Text)]
    assert [item.file.read() for item in found if isinstance(item, Media)] == [png(4, 4), png(8, 8)]
    missing = [(item.reason, "fetch" in item.detail) for item in found if isinstance(item, Missing)]
    assert missing == [("image_not_fetched", True), ("image_missing", False)]


def test_items_that_are_no_conversations_are_rejected_one_by_one(shared_data: Path, tokenizer: Path) -> None:
    hostile = shared_data / "hostile" / "chat"
    root = str(shared_data / "chat" / "images")
    entries = scan(hostile / "bad_items.json", tokenizer, image_root=root)
    items = json.loads((hostile / "bad_items.json").read_text())
    assert [entry.key for entry in entries] == [
        f"bad_items.json#{n}/{item['id']}" for n, item in enumerate(items)
    ]
    found = {key.split("/")[1]: value for key, value in rejected(entries).items()}
    assert {key: reason for key, (reason, _) in found.items()} == {
        "no-placeholder": "image_count_differs",
        "placeholder-without-image": "image_count_differs",
        "two-placeholders-one-image": "image_count_differs",
        "ends-with-human": "no_assistant_turn",
        "empty-conversation": "no_turns",
        "no-conversations": "no_turns",
        "value-null": "content_missing",
        "value-not-string": "content_not_text",
        "image-token-in-answer": "image_count_differs",
    }
    assert found["two-placeholders-one-image"][1] == "1 images, 2 places for them in the turns"
    # ChatML takes any order of turns; pictures that are not there are found when they are looked for.
    assert Counter(map(kinds, (entry for entry in entries if isinstance(entry, RawSample)))) == {
        "TMT": 6,
        "T?T": 2,
    }
    strict = chat_tokenizer(tokenizer.with_name("inst"), STYLES["inst"])
    found = {
        key.split("/")[1]: value
        for key, value in rejected(scan(hostile / "bad_items.json", strict, image_root=root)).items()
    }
    refused = {key for key, (reason, _) in found.items() if reason == "template_refuses"}
    assert refused == {"starts-with-gpt", "two-humans-in-a-row"}


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("latin1.json", ["row_not_utf8"]),
        ("lines.jsonl", ["image_count_differs", "json_invalid"]),
        ("not_a_list.json", ["no_turns"]),
        ("empty.json", ["file_empty"]),
    ],
)
def test_damaged_files_cost_what_is_damaged(
    shared_data: Path, tokenizer: Path, name: str, reasons: list[str]
) -> None:
    path = shared_data / "hostile" / "chat" / name
    entries = scan(path, tokenizer, bad_file="reject", image_root="../../chat/images")
    assert [entry.reason for entry in entries if isinstance(entry, Reject)] == reasons


def test_a_file_that_is_cut_off_gives_what_is_whole(shared_data: Path, tokenizer: Path) -> None:
    entries = scan(shared_data / "hostile" / "chat" / "truncated.json", tokenizer)
    assert [entry.key for entry in entries][:1] == ["truncated.json#0/ok"]
    assert isinstance(entries[-1], Reject) and entries[-1].reason == "rest_unreadable"


def test_a_tokenizer_without_a_template_is_one_line(tmp_path: Path) -> None:
    directory = chat_tokenizer(tmp_path / "t", Style("", ()))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_json(tmp_path / "a.json", llava("Hi", "Yes."))
    with pytest.raises(UserError, match=r"no chat template .* name a Jinja file as `template`"):
        scan(path, directory)
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert [kinds(entry) for entry in scan(path, directory, template="../mine.jinja")] == ["T"]


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="date must be YYYY-MM-DD, got '2024-13-01'"):
        ChatConfig(paths=("a",), date="2024-13-01")
    with pytest.raises(ValueError, match="image_marker and video_marker are both '<image>'; change one"):
        ChatConfig(paths=("a",), video_marker="<image>")
    sources = load_config(PreprocessConfig, CONFIG).sources
    assert isinstance(sources["chat"], ChatConfig) and sources["chat"].too_long == "reject"


# Whole jobs


def make_chat_config(
    directory: Path, path: Path, style: Style = STYLES["chatml"], **settings: Any
) -> PreprocessConfig:
    tokenizer = directory / "tokenizer"
    if not tokenizer.exists():
        chat_tokenizer(tokenizer, style)
    return PreprocessConfig(
        output=str(directory / "out"),
        tokenizer=str(tokenizer),
        sources={"chat": ChatConfig(paths=(str(path),), max_reject_rate=1.0, **settings)},
        budget=BudgetConfig(S=256, N=2, L=32),
        geometry=GEOMETRY,
        executor="serial",
        plan=PlanConfig(shard_bytes=8192),
    )


def documents_of(dataset: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and labels by key."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for pack in Reference(dataset).packs():
        for document in pack["documents"]:
            here = slice(document["start"], document["start"] + document["length"])
            found[document["key"]] = (pack["tokens"][here].tolist(), pack["labels"][here].tolist())
    return found


def test_a_lost_picture_costs_itself_where_the_config_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8))
    record = llava("<image>One <image> two", "Yes.", "<image>", "No.", image=["a.png", "absent.png", "a.png"])
    path = write_json(tmp_path / "a.json", record, llava("Hi", "Yes."))
    rejects = run_job(make_chat_config(tmp_path / "1", path))["account"]["chat"]["rejected"]
    assert rejects == {"image_missing": 1}
    config = make_chat_config(tmp_path / "2", path, bad_media="drop")
    account = run_job(config)["account"]["chat"]
    assert account["packed"] == 2 and account["media_dropped"] == {"image_missing": 1}
    dataset = Path(config.output)
    assert verify_dataset(dataset)[1] == []
    tokens, labels = documents_of(dataset)["a.json#0"]
    text = load_tokenizer(dataset / "tokenizer")
    shown = text.decode(tokens).replace("<|image|>", "")
    assert "user\n<|begin_of_image|><|end_of_image|>One  two<|im_end|>" in shown
    assert text.decode([label for label in labels if label >= 0]) == "Yes.<|im_end|>No.<|im_end|>"


def test_a_part_of_a_users_words_alone_is_a_counted_reject_and_no_loss(tmp_path: Path) -> None:
    # Longer than S = 256 and shorter than 2 * S: two parts, the answer at the end of the second.
    records = [llava(f"{number:02}" + "q" * 300, "Yes.") for number in range(20)]
    config = make_chat_config(tmp_path, write_json(tmp_path / "a.json", *records), too_long="split")
    source = replace(config.sources["chat"], max_reject_rate=0.0)
    account = run_job(replace(config, sources={"chat": source}))["account"]["chat"]
    assert (account["packed"], account["split_parts"], account["rejected"]) == (0, 20, {})
    assert account["parts"] == {
        "made": 40,
        "packed": 20,
        "rejected": {"no_labels": 20},
        "incomplete_samples": {"no_labels": 20},
    }
    rejects = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    assert {(row["key"], row["part"], row["reason"]) for row in rejects} == {
        (f"a.json#{number}", 0, "no_labels") for number in range(20)
    }
    assert verify_dataset(Path(config.output))[1] == []


def test_videos_by_path_and_bytes_are_packed_frame_by_frame_under_the_budgets(tmp_path: Path) -> None:
    # Two seconds of eight frames; two frames a second: the frames at the middles of four quarters.
    clip = encode_video(greys(8, 16, 16), rate=4)
    (tmp_path / "v.mp4").write_bytes(clip)
    records = [
        llava("<image>\nWhat?", "Grey.", video="v.mp4"),
        llava("<video>\n<image>?", "Both.", video="v.mp4", image="a.png"),
        llava("<video>", "Gone.", video="absent.mp4"),
        llava("<video>", "No.", video="a.png"),
        llava("<video>", "Far.", video="https://example.org/v.mp4"),
    ]
    (tmp_path / "a.png").write_bytes(png(8, 8))
    table = {
        "messages": [messages("<video> ?", "Bytes.")],
        "videos": [[{"bytes": clip, "path": None}]],
    }
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    write_json(tmp_path / "a.json", *records)
    config = make_chat_config(tmp_path, tmp_path / "a.json")
    source = replace(config.sources["chat"], paths=(str(tmp_path / "a.json"), str(tmp_path / "b.parquet")))
    video = VideoConfig(fps=2, min_frames=2, max_frames=4)
    config = replace(config, sources={"chat": source}, video=video)
    account = run_job(config)["account"]["chat"]
    assert account["packed"] == 3
    # A picture is no video.
    assert account["rejected"] == {"video_missing": 1, "video_not_fetched": 1, "video_unreadable": 1}
    dataset = open_dataset(config.output)
    assert verify_dataset(dataset.path)[1] == []
    grids: list[tuple[int, ...]] = []
    for split in dataset.splits:
        for number in range(dataset.num_packs(split)):
            pack = dataset.pack(split, number)
            for place, entry in enumerate(pack.images):
                grids.append(tuple(int(entry[name]) for name in ("t", "h", "w")))
                patches = pack.read_image(place).reshape(entry["t"], -1)
                if entry["t"] > 1:
                    # Of 16 patches of 4 x 4 pixels that a video may have, each of 4 frames has 2 x 2.
                    assert frame_numbers(patches) == [1, 3, 5, 7]
    assert sorted(grids) == [(1, 2, 2), (4, 2, 2), (4, 2, 2), (4, 2, 2)]


def test_pictures_beyond_a_cap_are_dropped_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 8))
    record = llava("<image> <image>", "Two.", "<image>", "Three.", image=["a.png"] * 3)
    path = write_json(tmp_path / "a.json", record)
    (entry,) = scan(path, tokenizer, max_images_per_document=2, bad_media="drop")
    assert isinstance(entry, RawSample)
    assert [s.detail for s in entry.segments if isinstance(s, Missing)] == ["image 3, limit 2"]
    assert kinds(entry) == "TMTMT?T"
    account = run_job(make_chat_config(tmp_path, path, max_images_per_document=2, bad_media="drop"))[
        "account"
    ]
    assert account["chat"]["packed"] == 1 and account["chat"]["media_dropped"] == {"over_max_images": 1}
    for settings in ({"max_images_per_document": 1}, {"max_images_per_document": -1, "bad_media": "drop"}):
        with pytest.raises(ValueError, match="max_images_per_document"):
            ChatConfig(paths=("a",), **settings)


def test_another_template_is_another_data_set(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", llava("Hi", "Yes."))
    config = make_chat_config(tmp_path, path)
    (tmp_path / "tokenizer" / "mine.jinja").write_text(CHATML)
    named = make_chat_config(tmp_path, path, template="mine.jinja")
    run_job(named)
    kept = Path(named.output) / "tokenizer"
    assert (kept / "source_files" / "chat" / "mine.jinja").read_text() == CHATML
    dataset = open_dataset(named.output)
    assert reopen_tokenizer(kept, dataset.tokens).ids == dataset.tokens
    with pytest.raises(UserError, match=r"holds a run with other settings"):
        run_job(config)
    run_job(replace(config, output=str(tmp_path / "other")))
    assert open_dataset(tmp_path / "other").fingerprint != dataset.fingerprint
    (tmp_path / "tokenizer" / "mine.jinja").write_text(CHATML.replace("You help", "You do not"))
    with pytest.raises(UserError, match=r"holds a run with other settings or inputs \(inputs\)"):
        run_job(named)
    run_job(replace(named, on_change="rebuild"))
    assert open_dataset(named.output).fingerprint != dataset.fingerprint
    (kept / "source_files" / "chat" / "mine.jinja").write_text("another")
    with pytest.raises(UserError, match="is not the one that the data set was made with"):
        reopen_tokenizer(kept, open_dataset(named.output).tokens)
    run_job(replace(config, on_change="rebuild"))
    assert not list(kept.glob("source_files/*/*"))


def test_a_template_file_goes_into_the_data_set_and_a_former_one_leaves_it(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", llava("Hi", "Yes."))
    config = make_chat_config(tmp_path, path)
    before = run_job(config)
    kept = Path(config.output) / "tokenizer" / "chat_template.jinja"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(CHATML.replace("You help", "Help"))
    again = PreprocessConfig(
        **{**{name: getattr(config, name) for name in config.__slots__}, "on_change": "rebuild"}
    )
    run_job(again)
    assert before["account"] and kept.read_text() == CHATML.replace("You help", "Help")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    run_job(again)
    assert not kept.exists() and verify_dataset(Path(config.output))[1] == []


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed config over the conversations of shared/data, with a template that marks what is generated."""
    directory = tmp_path_factory.mktemp("real")
    chat_tokenizer(directory / "tokenizer", STYLES["generation"], base=shared_data / "tokenizer-bpe8k")
    words = ["run", str(CONFIG), "--output", str(directory / "dataset"), "--executor", "serial"]
    words += ["--tokenizer", str(directory / "tokenizer"), "--sources.chat.image_root", "images"]
    words += ["--sources.chat.paths", str(shared_data / "chat" / "llava_style.json")]
    assert main(words) == 0
    return directory / "dataset"


def test_every_real_conversation_is_packed_and_verified(real: Path) -> None:
    manifest = read_json(real / "dataset.json")
    assert manifest["account"]["chat"]["read"] == manifest["account"]["chat"]["packed"] == 51
    counts, faults = verify_dataset(real)
    assert faults == [] and counts["documents"] == 51
    assert manifest["unlearned_tokens"]["chat"] > 0


def test_tokens_and_labels_of_real_conversations_are_those_of_transformers(
    real: Path, shared_data: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = Reference(real)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(real / "tokenizer")
    pictures = {
        (place["token_start"] - document["start"], document["key"]): place["h"] * place["w"] // 4
        for pack in reference.packs()
        for document in pack["documents"]
        for place in pack["images"]
        if document["start"] <= place["token_start"] < document["start"] + document["length"]
    }
    documents = documents_of(real)
    roles = {"human": "user", "gpt": "assistant"}
    records = json.loads((shared_data / "chat" / "llava_style.json").read_text())
    mark = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    for number, record in enumerate(records):
        key = f"llava_style.json#{number}/{record['id']}"
        turns = [
            {"role": roles[turn["from"]], "content": turn["value"].replace("<image>", "<|video_pad|>")}
            for turn in record["conversations"]
        ]
        found = tokenizer.apply_chat_template(
            turns,
            chat_template=GENERATION,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, learned = [reference.bos], [False]
        for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True):
            if token == mark:
                count = pictures.pop((len(tokens) + 1, key))
                tokens += [reference.begin, *[reference.image] * count, reference.end]
                learned += [False] * (count + 2)
            else:
                tokens.append(token)
                learned.append(bool(mask))
        end = len(tokens) - tokens[::-1].index(reference.eos)
        labels = [
            token if inside else -100 for token, inside in zip(tokens[1:end], learned[1:end], strict=True)
        ]
        assert documents[key] == (tokens[:end], [*labels, -100]), key
    assert pictures == {} and len(documents) == len(records)
