"""A tokenizer in a store: the job copies it, workers copy it, and the bytes are those of the local one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig, RayConfig
from preprocess.job import run_job
from preprocess.sources.chat import ChatConfig
from preprocess.tokenizer_copy import copy_tokenizer, find_tokenizer
from shared import remote
from shared.errors import UserError
from tests.preprocess.chat_inputs import STYLES, chat_tokenizer, llava
from tests.preprocess.inputs import byte_tokenizer, make_config, mixed_samples, write_samples
from tests.preprocess.stores import BUCKET, put, s3_server

ROOT = Path(__file__).parents[2]
# Copies a tokenizer, says that it did, and waits to be killed.
COPY = """
import sys, time
from preprocess.tokenizer_copy import copy_tokenizer, find_tokenizer
print(copy_tokenizer(find_tokenizer(sys.argv[1], [])), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


def upload(directory: Path, name: str) -> str:
    """Put all files of a directory; its URI."""
    for path in directory.rglob("*"):
        if path.is_file():
            put(f"{name}/{path.relative_to(directory)}", path.read_bytes())
    return f"s3://{BUCKET}/{name}"


def dataset(config: PreprocessConfig) -> dict[str, bytes]:
    """What is made of the tokenizer: shards, dataset.json and the copy that the data set keeps."""
    output = Path(config.output)
    names = ("shards/*", "tokenizer/**/*", "dataset.json")
    found = [path for pattern in names for path in output.glob(pattern) if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_job_with_a_tokenizer_in_a_store_writes_the_bytes_of_one_with_a_local_one(
    tmp_path: Path, executor: str
) -> None:
    config = make_config(tmp_path, write_samples(tmp_path / "a.tar", mixed_samples(8)))
    run_job(config)
    uri = upload(tmp_path / "tokenizer", f"plain-{executor}")
    put(f"plain-{executor}/model.safetensors", b"no part of a tokenizer")
    stored = replace(
        config,
        tokenizer=f"{uri}/",
        output=str(tmp_path / "stored"),
        executor=executor,
        ray=RayConfig(workers=1),
    )
    run_job(stored)
    found = dataset(stored)
    assert {"tokenizer/tokenizer.json", "dataset.json"} < found.keys()
    assert found == dataset(config)
    run_job(stored)  # the same identity: nothing is refused
    put(f"plain-{executor}/tokenizer_config.json", b"{}")
    with pytest.raises(UserError, match=rf"^tokenizer {uri}/: special tokens missing"):
        run_job(stored)


def test_chat_templates_come_along_named_by_a_source_or_the_tokenizers_own(tmp_path: Path) -> None:
    directory = chat_tokenizer(tmp_path / "chat", STYLES["chatml"])
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    (directory / "mine.jinja").write_text(template)
    (directory / "chat_template.jinja").write_text(template)
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(llava(f"Say {n}", f"It is {n}.")) for n in range(4)))
    sources = {
        "mine": ChatConfig(paths=(str(lines),), template="mine.jinja", max_reject_rate=1.0),
        "own": ChatConfig(paths=(str(lines),), max_reject_rate=1.0),
    }
    config = make_config(tmp_path, tmp_path, sources=sources)
    config = replace(config, tokenizer=str(directory))
    account = run_job(config)["account"]
    assert account["mine"]["packed"] == account["own"]["packed"] == 4
    uri = upload(directory, "chat")
    stored = replace(config, tokenizer=uri, output=str(tmp_path / "stored"))
    run_job(stored)
    assert "tokenizer/chat_template.jinja" in dataset(stored)
    assert dataset(stored) == dataset(config)
    missing = replace(stored, sources={"mine": replace(sources["mine"], template="none.jinja")})
    with pytest.raises(UserError, match=rf"^tokenizer {uri}: no none\.jinja"):
        run_job(missing)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"s3://{BUCKET}/nothing", "no tokenizer.json; expected a directory with"),
        ("s3://no-such-bucket/a", "no tokenizer.json"),
        ("https://example.org/a", "a web server has no list of its files; download it"),
        ("nowhere://a/b", "cannot be opened"),
    ],
)
def test_what_is_no_tokenizer_is_one_line_that_names_it(tmp_path: Path, uri: str, message: str) -> None:
    config = make_config(tmp_path, write_samples(tmp_path / "a.tar", mixed_samples(1)))
    with pytest.raises(UserError, match=message) as caught:
        run_job(replace(config, tokenizer=uri))
    assert uri in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_replaced_while_the_job_runs_is_not_taken_by_a_worker(tmp_path: Path) -> None:
    uri = upload(byte_tokenizer(tmp_path), "replaced")
    files = find_tokenizer(uri, [])
    put("replaced/tokenizer_config.json", b"{}")
    with pytest.raises(UserError, match=rf"^tokenizer {uri}: tokenizer_config\.json has changed since"):
        copy_tokenizer(files)


def test_the_copy_of_a_killed_process_goes_with_the_next_one_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(byte_tokenizer(tmp_path / "tokenizer"), "killed")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    process = subprocess.Popen([sys.executable, "-c", COPY, uri], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        files = find_tokenizer(uri, [])
        copy_tokenizer.cache_clear()
        copy_tokenizer(files)
        assert theirs.parent == temporary and (theirs / "tokenizer.json").exists()
    finally:
        process.kill()
        process.communicate()
    copy_tokenizer.cache_clear()
    ours = copy_tokenizer(files)
    assert not theirs.exists() and (ours / "tokenizer.json").exists()
