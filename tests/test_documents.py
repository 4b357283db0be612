"""Documents tell the truth: their commands run, their listings exist, their numbers are what is printed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document with this word behind the opening fence."""
    found: list[str] = []
    lines: list[str] | None = None
    kind = ""
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```"):
            if lines is None:
                kind, lines = line[3:].strip(), []
            else:
                found += ["".join(lines)] if kind == language else []
                lines = None
        elif lines is not None:
            lines.append(line)
    return found


def run(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo's raw data and data set, made by the demo's own commands and configs."""
    directory = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "configs", directory / "configs")
    python = [sys.executable, "-m", "preprocess"]
    for words in (
        [*python, "synthesize", "demo/raw"],
        [*python, "run", "configs/preprocess/demo.toml", "--executor", "serial"],
    ):
        done = run(words, directory)
        assert done.returncode == 0, done.stderr
    return directory


def test_pipelines_prints_what_it_says(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    programs, outputs = blocks("pipelines.md", "python"), blocks("pipelines.md", "text")
    assert len(programs) == len(outputs) == 6
    names: dict[str, object] = {}
    for program, expected in zip(programs, outputs, strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, "pipelines.md", "exec"), names)
        assert printed.getvalue() == expected


def test_commands_of_pipelines_run(demo: Path) -> None:
    for block in blocks("pipelines.md", ""):
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "python"
            done = run([sys.executable, *words[1:]], demo)
            assert done.returncode == 0, done.stderr


def readme_commands() -> list[str]:
    """The commands of the section `Your data`, continuation lines joined."""
    block = next(block for block in blocks("README.md", "") if "preprocess run" in block)
    return [line.split("#")[0].strip() for line in block.replace("\\\n", " ").strip().splitlines()]


def test_commands_of_the_readme_run_in_their_order(demo: Path, shared_data: Path) -> None:
    replaced = {
        "TOKENIZER_DIRECTORY": str(shared_data / "tokenizer-bpe8k"),
        "A.tar": str(shared_data / "cc12m" / "cc12m-train-0000.tar"),
        "B.tar": str(shared_data / "photos" / "photos-jpeg-000000.tar"),
    }
    commands = readme_commands()
    assert len(commands) == 6
    for command in commands:
        words = [replaced.get(word, word) for word in shlex.split(command)]
        if words[0] == "torchrun":  # the demo's model, but not its length
            short = ["--steps", "2", "--schedule.warmup_steps", "1", "--eval.packs", "2"]
            words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *short]
        elif words[0] == "python":
            words = [sys.executable, *words[1:]]
        if words[2:4] == ["preprocess", "run"]:
            words += ["--ray.workers", "1"]
        done = run(words, demo)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), command


def test_every_entry_of_the_tree_exists() -> None:
    tree = next(block for block in blocks("README.md", "") if block.startswith("preprocess/"))
    entries = [line.split()[0] for line in tree.strip().splitlines()]
    assert len(entries) >= 7
    for entry in entries:
        assert (ROOT / entry).exists(), entry


def test_make_has_every_target_that_a_document_names() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = "".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "pipelines.md")
    )
    # As a command: in a code span or behind a prompt.
    named = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text))
    assert {"demo", "test", "check"} <= named <= targets
    assert set(re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)) <= targets


def test_links_between_documents_lead_somewhere() -> None:
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{document.name}: {target}"


def test_no_document_or_config_waits_for_a_number() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("configs/*/*.toml"), *ROOT.glob("benchmarks/*.md")]:
        text = path.read_text(encoding="utf-8")
        assert text.strip(), path.name
        assert not re.search(r"@[A-Z]+@|TODO|FIXME|XXX", text), path.name


def test_every_config_says_its_command_its_cost_and_its_result() -> None:
    for path in ROOT.glob("configs/*/*.toml"):
        header = path.read_text(encoding="utf-8").split("\n\n[")[0]
        comment = "\n".join(line for line in header.splitlines() if line.startswith("#"))
        assert "# Cost and result: " in comment, path.name
