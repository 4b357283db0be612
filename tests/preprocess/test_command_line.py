"""`python -m preprocess`: a mistake is one line that says what, where and what to do; --json is one object."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocess.__main__ import main
from preprocess.config import PlanConfig
from shared.config import to_toml
from shared.files import read_json, write_json
from tests.preprocess.inputs import captioned, make_config, mixed_samples, png, write_tar

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DIRECTORY/config.toml, its inputs, and the data set that it made."""
    directory = tmp_path_factory.mktemp("finished")
    samples = {**mixed_samples(12), "bad": (b"<html>", "caption")}
    members = [member for key, sample in samples.items() for member in captioned(key, *sample)]
    config = make_config(directory, write_tar(directory / "a.tar", members), plan=PlanConfig())
    (directory / "config.toml").write_text(to_toml(config))
    assert main(["run", str(directory / "config.toml"), "--json"]) == 0
    return directory


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its config makes `new`, and `out` is a finished data set."""
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    text = (place / "config.toml").read_text().replace(str(finished), str(place))
    (place / "config.toml").write_text(text.replace("/out", "/new"))
    return place


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line of a command that must fail."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("\n") and said.err.count("\n") == 1, said.err
    assert said.err.startswith("preprocess: ") and "Traceback" not in said.err
    return said.err


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def edit(old: str, new: str) -> Callable[[Path], None]:
    """Change the config file."""

    def spoil(place: Path) -> None:
        path = place / "config.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def nothing(place: Path) -> None:
    pass


# What is wrong, the words after `run CONFIG`, and what the line must say: what, where, what to do.
BAD_RUNS = {
    "config missing": (remove("config.toml"), [], ["config.toml: no such file", "configs/ for examples"]),
    "config no TOML": (write("config.toml", "budget = {"), [], ["config.toml: not valid TOML: "]),
    "config not UTF-8": (write("config.toml", b"a = '\xff'"), [], ["config.toml: not valid TOML"]),
    "section typo": (edit("[budget]", "[budgt]"), [], ["unknown key 'budgt'", "did you mean 'budget'"]),
    "key typo": (edit("patch_size", "patchsize"), [], ["unknown key 'geometry.patchsize'", "'patch_size'"]),
    "option typo": (nothing, ["--budget.SS", "5"], ["--budget.SS", "did you mean 'budget.S'"]),
    "option of no section": (nothing, ["--seed.x", "5"], ["--seed.x: ", "expected a table"]),
    "no option": (nothing, ["seed", "5"], ["'seed' is not an option; write --key value"]),
    "wrong type": (
        edit("S = 64", 'S = "64"'),
        [],
        ["config.toml: budget.S: expected an integer or auto, got '64'"],
    ),
    "wrong word": (nothing, ["--budget.S", "many"], ["--budget.S: expected an integer or auto, got 'many'"]),
    "two words": (nothing, ["--budget.S", "6", "7"], ["--budget.S: expected one value, got 2"]),
    "a section": (nothing, ["--budget", "6"], ["--budget", "is a section; set one of its keys"]),
    "key missing": (edit("S = 64\n", ""), [], ["missing key 'budget.S' (an integer or auto)"]),
    "no such choice": (nothing, ["--codec", "rwa"], ["codec: 'rwa' is not one of raw", "'raw'"]),
    "value out of range": (nothing, ["--budget.N", "0"], ["[budget] N must be at least 1, got 0"]),
    "image above a row": (
        nothing,
        ["--geometry.max_patches_per_image", "40"],
        ["max_patches_per_image 40 is above budget.L 32", "an image must fit one vision row"],
    ),
    "row of no cells": (
        nothing,
        ["--budget.L", "33"],
        ["budget.L 33 is not a multiple of merge * merge = 4"],
    ),
    "negative seed": (nothing, ["--seed", "-1"], ["seed must be at least 0, got -1"]),
    "no output": (nothing, ["--output", ""], ["output is empty; name a directory"]),
    "no path": (nothing, ["--sources.web.paths"], ["[sources.web] paths is empty; name at least one file"]),
    "unknown caption": (nothing, ["--sources.web.caption", "jsn"], ['caption must be "txt" or "json:FIELD"']),
    "unknown source": (
        nothing,
        ["--sources.wbe.caption", "txt"],
        ["set --sources.wbe.format first, or did you mean 'web'?"],
    ),
    "tar missing": (
        remove("a.tar"),
        [],
        ["source 'web'", "a.tar: no such file", "correct sources.web.paths"],
    ),
    "pattern of nothing": (
        nothing,
        ["--sources.web.paths", "/nowhere/*.tar"],
        ["pattern '/nowhere/*.tar' matches no file", "correct sources.web.paths"],
    ),
    "tar is text": (
        write("a.tar", "not a tar" * 200),
        [],
        ["a.tar: not a readable tar", "sources.web.paths"],
    ),
    "tar is empty": (write("a.tar", ""), [], ["a.tar: not a readable tar (empty file)"]),
    "tar without a sample": (
        write("a.tar", bytes(10240)),
        [],
        ["the sources hold no sample", "check their paths"],
    ),
    "tokenizer missing": (
        remove("tokenizer"),
        [],
        [
            "/tokenizer: no tokenizer.json",
            "expected a directory with tokenizer.json and tokenizer_config.json",
        ],
    ),
    "tokenizer half": (remove("tokenizer/tokenizer_config.json"), [], ["no tokenizer_config.json"]),
    "tokenizer no JSON": (
        write("tokenizer/tokenizer_config.json", "{"),
        [],
        ["tokenizer_config.json: not valid JSON"],
    ),
    "tokenizer a list": (
        write("tokenizer/tokenizer_config.json", "[]"),
        [],
        ["tokenizer_config.json is not a JSON object"],
    ),
    "tokenizer of another kind": (
        write("tokenizer/tokenizer.json", '{"a": 1}'),
        [],
        ["tokenizer.json is not a tokenizer"],
    ),
    "tokenizer without image tokens": (
        lambda place: write_json(
            place / "tokenizer/tokenizer_config.json",
            {"eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"},
        ),
        [],
        ["special tokens missing: image (no img_token), begin_image (no boi_token)", "section [tokens]"],
    ),
    "token not in the vocabulary": (
        nothing,
        ["--tokens.image", "<img>"],
        ["special tokens missing: image ('<img>' is not in the vocabulary)"],
    ),
    "output a file": (write("new", ""), [], ["/new: cannot be made", "choose another"]),
    "rejects above the ceiling": (
        lambda place: write_tar(
            place / "a.tar",
            [m for n in range(30) for m in captioned(f"{n}", png(8, 8) if n < 9 else b"<html>", "caption")],
        ),
        ["--sources.web.max_reject_rate", "0.5"],
        ["21 of 30 samples rejected in the scan (image_unreadable 21)", "max_reject_rate 0.5"],
    ),
    "another run's output": (
        edit("/new", "/out"),
        ["--seed", "7"],
        ["holds a run with other settings or inputs", "--on_change rebuild"],
    ),
}


@pytest.mark.parametrize(("spoil", "words", "parts"), BAD_RUNS.values(), ids=BAD_RUNS)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_bad_input_of_run_is_one_line_and_exit_code_2(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    words: list[str],
    parts: list[str],
    as_json: bool,
) -> None:
    spoil(place)
    line = refused(capsys, ["run", str(place / "config.toml"), *words, *(["--json"] if as_json else [])])
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rnu"], ["unknown command 'rnu'; did you mean 'run'"]),
        (["run"], ["the first argument is the config, a TOML file"]),
        (["run", "--seed", "1"], ["the first argument is the config, a TOML file"]),
        (["run", "{}"], ["is a directory, expected a TOML file"]),
        (["plan", "{}/config.toml"], ["1 of 1 inputs are not scanned; run `scan` first"]),
        (["pack", "{}/config.toml"], ["1 of 1 inputs are not scanned; run `scan` first"]),
        (["verify"], ["the data set's directory"]),
        (["verify", "{}/nowhere"], ["/nowhere: no such directory; make it with `python -m preprocess run`"]),
        (
            ["verify", "{}/tokenizer"],
            ["/tokenizer: no dataset.json, so it is not complete", "run `python -m"],
        ),
        (["inspect", "{}/tokenizer"], ["/tokenizer: no dataset.json, so it is not complete"]),
        (["inspect", "{}/out", "--pack", "99"], ["pack 99 of", "packs are numbered from 0"]),
        (["inspect", "{}/out", "--pack", "-1"], ["pack -1 of"]),
        (["inspect", "{}/out", "--split", "trian"], ["has no split 'trian'; did you mean 'train'"]),
        (["inspect", "{}/out", "--sample", "nobody"], ["no sample 'nobody'"]),
        (["inspect", "{}/out", "--smaple", "0001"], ["unknown key", "did you mean 'sample'"]),
        (
            ["report", "{}/tokenizer"],
            ["/tokenizer/report/stats.json: cannot be read", "run `python -m preprocess run`"],
        ),
        (["synthesize"], ["no DIRECTORY given"]),
    ],
)
def test_a_bad_input_of_another_command_is_one_line_and_exit_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    line = refused(capsys, [word.format(place) for word in words])
    for part in parts:
        assert part in line


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "dataset.json: not valid JSON"),
        ("[]", "format version None, this program knows 1"),
        ('{"format_version": 1}', "dataset.json is not valid: KeyError('fingerprint')"),
    ],
)
def test_a_broken_manifest_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, content: str, part: str
) -> None:
    (place / "out" / "dataset.json").write_text(content)
    assert part in refused(capsys, [command, str(place / "out")])


def run_json(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    said = capsys.readouterr()
    assert said.err == ""
    record = json.loads(said.out)
    assert isinstance(record, dict)
    return record


def test_every_command_prints_one_json_object_when_asked(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, dataset = str(place / "config.toml"), str(place / "new")
    assert run_json(capsys, ["scan", config]) == {"index": f"{dataset}/index", "units": 1}
    planned = run_json(capsys, ["plan", config])
    packed = run_json(capsys, ["pack", config])
    ran = run_json(capsys, ["run", config])
    manifest = read_json(place / "new" / "dataset.json")
    assert (planned["shards"], planned["packs"]) == (1, manifest["totals"]["packs"])
    assert packed == {"dataset": dataset, "fill": manifest["fill"]}
    assert ran["dataset"] == dataset and ran["account"] == manifest["account"]
    assert run_json(capsys, ["report", dataset]) == read_json(place / "new" / "report" / "stats.json")
    verified = run_json(capsys, ["verify", dataset])
    assert verified["faults"] == [] and verified["documents"] == 12
    run_json(capsys, ["inspect", dataset, "--pack", "0"])
    run_json(capsys, ["inspect", dataset, "--sample", "0003"])
    run_json(capsys, ["synthesize", str(place / "shapes"), "--samples", "2"])


def test_every_command_speaks_to_people_otherwise(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, dataset = str(place / "config.toml"), str(place / "new")
    for words, part in (
        (["run", config], "image_unreadable 1"),
        (["report", dataset], "13"),
        (["verify", dataset], "no fault in 1 shards"),
        (["inspect", dataset, "--sample", "bad"], "image_unreadable"),
    ):
        capsys.readouterr()
        assert main(words) == 0
        said = capsys.readouterr()
        assert part in said.out and said.err == ""


def test_verify_ends_with_1_and_lists_the_faults(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_json(place / "out" / "dataset.json")
    manifest["account"]["web"]["read"] += 1
    write_json(place / "out" / "dataset.json", manifest)
    fault = "account of web: 14 samples read, 13 accounted for"
    assert run_json(capsys, ["verify", str(place / "out")], code=1)["faults"] == [fault]
    assert main(["verify", str(place / "out")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == fault and said[1].startswith(f"{place}/out: 1 faults in 1 shards, ")


def test_help_and_no_command_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ((["--help"], 0), ([], 2)):
        assert main(words) == code
        said = capsys.readouterr()
        assert said.out.startswith("usage: python -m preprocess COMMAND ...") and said.err == ""


def spawn(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "preprocess", *words], capture_output=True, text=True, cwd=CHECKOUT
    )


def test_a_real_process_ends_with_2_and_one_line_for_a_missing_tar(place: Path) -> None:
    (place / "a.tar").unlink()
    done = spawn("run", str(place / "config.toml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"preprocess: source 'web': {place}/a.tar: no such file; correct sources.web.paths\n"
    )


def test_a_real_process_runs_with_damaged_pictures_and_prints_nothing_but_its_result(place: Path) -> None:
    # A TIFF whose tags are cut: Pillow warns, the job counts.
    damaged = [("t.tif", b"II*\0\x08\0\0\0\xff\xff" + b"\x01\x01\x04\0\xff\xff\xff\xff" * 3), ("t.txt", b"x")]
    members = [*captioned("a", png(8, 8), "caption"), *damaged]
    write_tar(place / "a.tar", members)
    done = spawn("run", str(place / "config.toml"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    account = json.loads(done.stdout)["account"]["web"]
    assert (account["packed"], account["rejected"]) == (1, {"image_unreadable": 1})


def test_a_real_process_whose_reader_has_gone_ends_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "preprocess", "--help"],
            cwd=CHECKOUT, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_real_process_is_not_killed_by_a_socket_that_breaks() -> None:
    program = """
import runpy, socket, sys
import preprocess.verify

def broken(path):
    ours, theirs = socket.socketpair()
    theirs.close()
    ours.send(b"x")

preprocess.verify.verify_dataset = broken
sys.argv = ["preprocess", "verify", "data"]
runpy.run_module("preprocess", run_name="__main__")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1 and ended.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_a_config_written_out_in_full_runs_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_json(capsys, ["run", str(place / "config.toml")])
    second = run_json(capsys, ["run", str(place / "new" / "config.toml")])
    assert first == second


def test_reading_a_data_set_takes_no_torch_no_ray_and_no_picture_decoder(place: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'ray', 'PIL', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "from preprocess.__main__ import main\n"
        "sys.exit(max(main([command, sys.argv[1]]) for command in ('report', 'verify')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place / "out")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
