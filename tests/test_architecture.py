"""What no single module can promise: the import arrows, the frozen format, configs that load.

preprocess -> shared <- trainer
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.config import load_config
from shared.schema import FORMAT_VERSION, shard_schema

ROOT = Path(__file__).resolve().parents[1]

# What a package must never import. Tokenizers and PIL would make a GPU node install a text and picture stack.
FORBIDDEN = {
    "shared": {"preprocess", "trainer", "torch", "ray"},
    "preprocess": {"trainer"},
    "trainer": {"preprocess", "ray", "tokenizers", "PIL"},
}
RAY_FILE = "preprocess/ray_job.py"


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ is empty"
    return files


def imports_of(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, anywhere in it, also inside functions."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*above, *([node.module] if node.module else [])])


def packages_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_only_where_they_may(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(packages_of(path) & FORBIDDEN[package])
        for path in files_of(package)
    }
    assert {path: names for path, names in wrong.items() if names} == {}


def test_only_the_job_file_imports_ray() -> None:
    found = {str(path.relative_to(ROOT)) for path in files_of("preprocess") if "ray" in packages_of(path)}
    assert found == {RAY_FILE}


@pytest.mark.parametrize("package", ["preprocess", "shared", "trainer"])
def test_no_program_imports_its_tests(package: str) -> None:
    for path in files_of(package):
        assert not packages_of(path) & {"tests", "pytest", "hypothesis"}, path


def modules_after(*statements: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter that ran the statements."""
    program = "; ".join([*statements, "import sys", "print(*{name.split('.')[0] for name in sys.modules})"])
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_all(package: str, skip: str = "__main__.py") -> list[str]:
    return [f"import {module_name(path)}" for path in files_of(package) if path.name != skip]


def test_the_trainer_runs_without_ray_tokenizers_and_picture_decoders() -> None:
    found = modules_after(*import_all("trainer"))
    assert {"trainer", "shared", "torch"} <= found
    assert not found & {"ray", "preprocess", "tokenizers"}


def test_the_shared_modules_run_without_torch_and_ray() -> None:
    found = modules_after(*import_all("shared"))
    assert {"shared", "pyarrow"} <= found
    # `tokenizers` is imported when a tokenizer is loaded, which a GPU node never does.
    assert not found & {"torch", "ray", "tokenizers", "preprocess", "trainer"}


def test_the_steps_of_preprocess_run_without_ray() -> None:
    steps = ("scan", "plan", "pack", "verify", "job", "__main__")
    found = modules_after(*(f"import preprocess.{name}" for name in steps))
    assert not found & {"ray", "trainer"}


# Configs


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "preprocess").rglob("*.toml")), ids=lambda p: p.stem
)
def test_every_preprocess_config_loads(path: Path) -> None:
    from preprocess.config import PreprocessConfig
    from preprocess.fetch.config import FetchConfig

    if path.stem == "fetch":
        assert load_config(FetchConfig, path).input.paths
    else:
        assert load_config(PreprocessConfig, path).sources


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_train_config_loads(path: Path) -> None:
    from trainer.config import RunConfig

    assert load_config(RunConfig, path).steps >= 1


def test_every_config_is_of_one_of_the_two_stages_and_opens_with_its_command() -> None:
    paths = sorted((ROOT / "configs").rglob("*.toml"))
    assert {path.relative_to(ROOT).parts[1] for path in paths} <= {"preprocess", "train"}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        opening = text[: text.index("\n\n")] if "\n\n" in text else text
        commands = [line for line in opening.splitlines() if line.startswith("#")]
        assert any(f"configs/{path.parent.name}/{path.name}" in line for line in commands), path


# The frozen format

FORMAT_1 = """\
tokens: fixed_size_binary[32] not null
labels: fixed_size_binary[32] not null
positions: fixed_size_binary[32] not null
patches: large_binary not null
images: list<element: struct<token_start: int32 not null, row: int32 not null, offset: int32 not null, \
t: int32 not null, h: int32 not null, w: int32 not null, nbytes: int64 not null> not null> not null
documents: list<element: struct<start: int32 not null, length: int32 not null, \
source: dictionary<values=string, indices=int32, ordered=0> not null, key: string not null, \
part: int32 not null> not null> not null
cost: int64 not null
checksum: uint64 not null
parquetry.fingerprint: abc
parquetry.format_version: 1
"""


def test_the_shard_format_changes_only_with_its_version() -> None:
    # A shard written yesterday must be read tomorrow: a change here needs a new FORMAT_VERSION.
    schema = shard_schema(8, "abc")
    lines = [f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in schema]
    lines += [f"{key.decode()}: {value.decode()}" for key, value in sorted(schema.metadata.items())]
    assert "\n".join(lines) + "\n" == FORMAT_1
    assert FORMAT_VERSION == 1
