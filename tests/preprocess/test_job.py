"""The job: resumes without doing anything twice, refuses what does not fit, and says so in one line."""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preprocess import identity as identity_module
from preprocess import pack as pack_module
from preprocess.budgets import BudgetConfig
from preprocess.config import ImageLimits, PlanConfig, PreprocessConfig
from preprocess.executor import SerialExecutor
from preprocess.job import Job, open_job, run_job
from preprocess.sources.text import TextConfig
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.verify import verify_dataset
from shared.config import load_config
from shared.errors import UserError
from shared.files import read_json, write_json
from shared.tokens import TokenNames
from tests.preprocess.inputs import (
    GEOMETRY,
    captioned,
    make_config,
    mixed_samples,
    png,
    write_samples,
    write_tar,
)

State = dict[str, tuple[bytes, int]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    directory = tmp_path_factory.mktemp("finished")
    paths = [write_samples(directory / f"{n}.tar", mixed_samples(20, n, prefix=f"{n}-")) for n in range(3)]
    config = make_config(directory, *paths, plan=PlanConfig(shard_bytes=8192, validation_fraction=0.1))
    run_job(config)
    return config


@pytest.fixture
def config(finished: PreprocessConfig, tmp_path: Path) -> PreprocessConfig:
    """A finished run whose output is a copy that the test may spoil."""
    shutil.copytree(finished.output, tmp_path / "out")
    return replace(finished, output=str(tmp_path / "out"))


def state(config: PreprocessConfig) -> State:
    """Content and time of every file."""
    output = Path(config.output)
    return {
        str(path.relative_to(output)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def contents(files: State) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files.items() if name != "config.toml"}


def changed(before: State, after: State) -> set[str]:
    """Files of the passes, that is not those of the last step, that were written again."""
    names = [name for name in after if name.split("/")[0] in ("index", "plan", "shards")]
    names = [name for name in names if not name.endswith("identity.json")]
    return {name for name in names if before.get(name) != after[name]}


def test_a_finished_run_started_again_does_nothing_but_the_last_step(config: PreprocessConfig) -> None:
    before = state(config)
    run_job(config)
    after = state(config)
    assert changed(before, after) == set()
    assert contents(after) == contents(before)


def test_a_lost_dataset_json_comes_back_the_same_without_redoing_a_pass(config: PreprocessConfig) -> None:
    before = state(config)
    for name in ("dataset.json", "rejects.parquet", "report/stats.json", "tokenizer/tokenizer.json"):
        (Path(config.output) / name).unlink()
    run_job(config)
    after = state(config)
    assert changed(before, after) == set()
    assert contents(after) == contents(before)


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        (
            ["shards/train-000000-001.parquet"],
            {"shards/train-000000-001.parquet", "plan/train-000000-001.result.json"},
        ),
        (
            ["plan/train-000000-001.result.json"],
            {"shards/train-000000-001.parquet", "plan/train-000000-001.result.json"},
        ),
        (["index/web/000001.parquet"], {"index/web/000001.parquet", "index/web/000001.tokens"}),
        (["plan/plan.json"], None),  # the plan is written again: other times, same bytes
    ],
)
def test_a_lost_file_is_made_again_byte_for_byte_and_alone(
    config: PreprocessConfig, lost: list[str], redone: set[str] | None
) -> None:
    before = state(config)
    for name in lost:
        (Path(config.output) / name).unlink()
    run_job(config)
    after = state(config)
    assert contents(after) == contents(before)
    if redone is not None:
        assert changed(before, after) == redone
    else:
        assert not any(name.startswith(("shards/", "index/")) for name in changed(before, after))


def test_a_job_killed_half_way_goes_on_where_it_stopped(config: PreprocessConfig) -> None:
    before = state(config)
    output = Path(config.output)
    shards = sorted((output / "shards").iterdir())
    assert len(shards) > 4
    lost = shards[2:]
    for path in lost:
        path.unlink()
        (output / "plan" / f"{path.stem}.result.json").unlink()
    # What a killed worker and a killed last step leave behind.
    (output / "dataset.json").unlink()
    for name in (
        "shards/train-000000-002.parquet.4711.tmp",
        "dataset.json.4711.tmp",
        "index/web/x.parquet.9.tmp",
    ):
        (output / name).write_bytes(b"half")
    run_job(config)
    after = state(config)
    assert contents(after) == contents(before)  # and no temporary file
    redone = {f"shards/{p.name}" for p in lost} | {f"plan/{p.stem}.result.json" for p in lost}
    assert changed(before, after) == redone
    assert verify_dataset(output)[1] == []


def test_a_job_that_fails_in_a_pass_leaves_no_data_set_and_resumes(
    finished: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(finished, output=str(tmp_path / "out"))
    whole, calls = pack_module.load_image, []

    def fail_later(data: bytes, **limits: Any) -> Any:
        calls.append(0)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return whole(data, **limits)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "load_image", fail_later)
        with pytest.raises(KeyboardInterrupt):
            run_job(config)
    before = state(config)
    assert "dataset.json" not in before and not any(name.endswith(".tmp") for name in before)
    kept = {name for name in before if name.startswith("shards/")}
    assert 1 <= len(kept)
    run_job(config)
    after = state(config)
    assert not kept & changed(before, after)
    assert contents(after) == contents(state(finished))


CHANGES: list[tuple[str, Callable[[PreprocessConfig], PreprocessConfig], str]] = [
    ("seed", lambda c: replace(c, seed=1), "seed: 0, now 1"),
    ("S", lambda c: replace(c, budget=BudgetConfig(S=65, N=2, L=32)), "budget.S: 64, now 65"),
    (
        "merge",
        lambda c: replace(c, geometry=replace(GEOMETRY, merge=1)),
        "geometry.merge: 2, now 1",
    ),
    (
        "caption",
        lambda c: replace(c, sources={"web": replace(c.sources["web"], caption="json:text")}),
        "sources.web.caption: 'txt', now 'json:text'",
    ),
    (
        "cutting",
        lambda c: replace(c, sources={"web": replace(c.sources["web"], too_long="reject")}),
        "rules.web.too_long: 'split', now 'reject'",
    ),
    ("tokens", lambda c: replace(c, tokens=TokenNames(bos="none")), "tokens.bos: '', now 'none'"),
    (
        "limits",
        lambda c: replace(c, limits=ImageLimits(max_pixels=1 << 20)),
        "limits.max_pixels: 64000000, now 1048576",
    ),
    ("plan", lambda c: replace(c, plan=replace(c.plan, window=9)), "plan.window: 65536, now 9"),
    (  # fewer shards than before: none of the old ones may stay
        "shards",
        lambda c: replace(c, plan=replace(c.plan, shard_bytes=1 << 20)),
        "plan.shard_bytes: 8192, now 1048576",
    ),
    (
        "inputs",
        lambda c: replace(c, sources={"web": replace(c.sources["web"], paths=c.sources["web"].paths[:2])}),
        "inputs",
    ),
]


@pytest.mark.parametrize(("change", "named"), [pytest.param(c, n, id=i) for i, c, n in CHANGES])
def test_a_changed_setting_is_refused_by_name_and_nothing_is_touched(
    config: PreprocessConfig, change: Callable[[PreprocessConfig], PreprocessConfig], named: str
) -> None:
    before = state(config)
    with pytest.raises(UserError, match="holds a run with other settings or inputs") as caught:
        run_job(change(config))
    assert f"({named})" in str(caught.value) and "--on_change rebuild" in str(caught.value)
    assert {n: f for n, f in state(config).items() if not n.endswith("identity.json")} == {
        n: f for n, f in before.items() if not n.endswith("identity.json")
    }
    run_job(config)  # the old settings still fit


@pytest.mark.parametrize("change", [pytest.param(c, id=i) for i, c, _ in CHANGES if i != "caption"])
def test_rebuild_throws_the_old_work_away_and_equals_a_fresh_run(
    config: PreprocessConfig, change: Callable[[PreprocessConfig], PreprocessConfig], tmp_path: Path
) -> None:
    run_job(replace(change(config), on_change="rebuild"))
    fresh = replace(change(config), output=str(tmp_path / "fresh"))
    run_job(fresh)
    assert contents(state(config)) == contents(state(fresh))


def test_a_change_of_the_plan_alone_keeps_the_index(config: PreprocessConfig) -> None:
    before = state(config)
    for change in ({"seed": 3}, {"geometry": replace(GEOMETRY, filter="bicubic", mean=(0.4, 0.5, 0.6))}):
        run_job(replace(config, **change, on_change="rebuild"))
        redone = changed(before, state(config))
        assert redone and not any(name.startswith("index/") for name in redone)


def test_settings_that_change_no_byte_are_not_refused(config: PreprocessConfig) -> None:
    before = state(config)
    source = replace(config.sources["web"], max_reject_rate=0.5, bad_file="reject")
    limits = replace(config.limits, max_seconds=99.0, max_memory=1 << 31)
    other = replace(config, sources={"web": source}, retries=7, limits=limits)
    run_job(other)
    assert changed(before, state(config)) == set()


def test_an_input_that_grew_or_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "a.tar", mixed_samples(5))
    config = make_config(tmp_path, path)
    run_job(config)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    os.utime(path, ns=(times[0], times[1] + 1))  # rewritten in place, to the same size
    with pytest.raises(UserError, match="inputs"):
        run_job(config)
    with open(path, "ab") as file:
        file.write(b"\0" * 512)
    os.utime(path, ns=times)
    with pytest.raises(UserError, match="inputs"):
        run_job(config)
    os.truncate(path, path.stat().st_size - 512)
    os.utime(path, ns=times)
    tokenizer = Path(config.tokenizer) / "tokenizer_config.json"
    write_json(tokenizer, {**read_json(tokenizer), "note": "another file"})
    with pytest.raises(UserError, match="tokenizer_sha256"):
        run_job(config)


def test_work_whose_identity_is_gone_is_not_taken_for_this_run_s(config: PreprocessConfig) -> None:
    # A rebuild killed while it removed the index: the identity may go first.
    (Path(config.output) / "index" / "identity.json").unlink()
    with pytest.raises(UserError, match=r"index/identity.json is gone"):
        run_job(config)
    before = contents(state(config))
    run_job(replace(config, on_change="rebuild"))
    assert contents(state(config)) == {
        **before,
        "index/identity.json": contents(state(config))["index/identity.json"],
    }


def test_an_output_that_cannot_be_a_directory_is_refused(finished: PreprocessConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: cannot be made"):
            run_job(replace(finished, output=str(tmp_path / name)))


def rate_config(directory: Path, bad: bytes, count: int, total: int, limit: float) -> PreprocessConfig:
    members = [
        member
        for n in range(total)
        for member in captioned(f"{n:03d}", bad if n < count else png(8, 8), "caption")
    ]
    return make_config(directory, write_tar(directory / "a.tar", members), source={"max_reject_rate": limit})


@pytest.mark.parametrize(
    ("bad", "step", "reason"),
    [(b"<html>", "scan", "image_unreadable"), (png(8, 8)[:-40], "job", "image_corrupt")],
)
def test_too_many_rejects_stop_the_job_with_one_line_and_no_data_set(
    tmp_path: Path, bad: bytes, step: str, reason: str
) -> None:
    # 3 of 30 is 0.1: allowed at 0.1, above 0.09.
    with pytest.raises(UserError) as caught:
        run_job(rate_config(tmp_path / "strict", bad, 3, 30, 0.09))
    assert str(caught.value) == (
        f"source 'web': 3 of 30 samples rejected in the {step} ({reason} 3), above max_reject_rate 0.09; "
        "look at the inputs, or raise sources.web.max_reject_rate"
    )
    assert not (tmp_path / "strict" / "out" / "dataset.json").exists()
    stats = run_job(rate_config(tmp_path / "lax", bad, 3, 30, 0.1))
    assert stats["account"]["web"]["rejected"] == {reason: 3}


def test_a_raised_ceiling_goes_on_with_the_work_that_is_there(tmp_path: Path) -> None:
    config = rate_config(tmp_path, png(8, 8)[:-40], 3, 30, 0.0)
    with pytest.raises(UserError, match=r"above max_reject_rate 0\.0;"):
        run_job(config)
    before = state(config)
    run_job(replace(config, sources={"web": replace(config.sources["web"], max_reject_rate=0.2)}))
    assert changed(before, state(config)) == set()


def test_a_rate_over_few_samples_stops_nothing(tmp_path: Path) -> None:
    stats = run_job(rate_config(tmp_path, b"", 10, 19, 0.0))
    assert stats["account"]["web"]["packed"] == 9


@pytest.mark.parametrize(("bad", "step"), [(b"", "scan"), (png(8, 8)[:-40], "job")])
def test_a_source_of_which_nothing_is_left_stops_the_job_however_small_it_is(
    tmp_path: Path, bad: bytes, step: str
) -> None:
    with pytest.raises(UserError, match=rf"'web': no sample is left, all 3 were rejected in the {step} \("):
        run_job(rate_config(tmp_path, bad, 3, 3, 1.0))


def test_files_that_are_lost_in_part_count_as_files_and_not_as_a_sample(tmp_path: Path) -> None:
    # Three files of 100 samples each, one of them cut in its middle: 1 reject of 251 samples, 1 of 3 files.
    members = [member for n in range(100) for member in captioned(f"{n:03d}", png(8, 8), "caption")]
    paths = [write_tar(tmp_path / f"{name}.tar", members) for name in "abc"]
    os.truncate(paths[1], paths[1].stat().st_size // 2 + 600)
    config = make_config(tmp_path, *paths, source={"max_reject_rate": 0.3})
    with pytest.raises(UserError) as caught:
        run_job(config)
    assert "1 of 3 files are lost in part or whole, above max_reject_rate 0.3" in str(caught.value)
    assert "(the first: b.tar#rest: " in str(caught.value)
    source = replace(config.sources["web"], max_reject_rate=0.34)
    assert run_job(replace(config, sources={"web": source}))["account"]["web"]["packed"] > 240


def test_a_table_that_breaks_off_is_a_file_that_is_lost_in_part(tmp_path: Path) -> None:
    lines = gzip.compress(
        b"".join(b'{"text": "%d %s"}\n' % (n, os.urandom(20).hex().encode()) for n in range(20_000))
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(lines[: len(lines) // 2])
    config = make_config(tmp_path, path)
    source = TextConfig(paths=(str(path),))
    with pytest.raises(
        UserError, match=r"'web': 1 of 1 files are lost in part or whole.* \(the first: a\.jsonl\.gz#"
    ):
        run_job(replace(config, sources={"web": source}))


def test_sources_without_a_sample_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the sources hold no sample; check their paths"):
        run_job(make_config(tmp_path, write_tar(tmp_path / "a.tar", [])))


def test_equal_keys_of_two_sources_and_two_files_are_different_samples(tmp_path: Path) -> None:
    tars = [write_samples(tmp_path / f"{n}.tar", mixed_samples(10)) for n in range(3)]
    config = make_config(tmp_path, tars[0])
    sources = {
        "one": WebDatasetConfig(paths=(str(tars[0]), str(tars[1]))),
        "two": WebDatasetConfig(paths=(str(tars[2]),)),
    }
    account = run_job(replace(config, sources=sources))["account"]
    assert [(account[n]["read"], account[n]["packed"]) for n in ("one", "two")] == [(20, 20), (10, 10)]
    assert verify_dataset(Path(config.output))[1] == []


def test_the_config_saved_beside_the_output_loads_back_equal(finished: PreprocessConfig) -> None:
    assert load_config(PreprocessConfig, Path(finished.output) / "config.toml") == finished


def test_the_passes_one_by_one_give_the_same_as_the_whole_job(
    finished: PreprocessConfig, tmp_path: Path
) -> None:
    config = replace(finished, output=str(tmp_path / "out"))
    for step in ("scan", "plan", "pack", "finish"):
        job = Job(config)
        job.prepare(job.identity)
        arguments = [SerialExecutor(0)] if step != "finish" else []
        getattr(job, step)(*arguments)
    assert contents(state(config)) == contents(state(finished))


def test_a_negative_seed_is_refused_with_its_value(finished: PreprocessConfig) -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        replace(finished, seed=-1)


def test_a_stranger_s_temporary_file_in_the_output_directory_is_left_alone(config: PreprocessConfig) -> None:
    own = Path(config.output) / "notes.txt.tmp"
    own.write_text("mine")
    run_job(config)
    assert own.read_text() == "mine"


def test_a_job_that_rejects_everything_makes_no_data_set(finished: PreprocessConfig, tmp_path: Path) -> None:
    sources = {name: replace(source, max_reject_rate=1.0) for name, source in finished.sources.items()}
    limits = ImageLimits(max_pixels=9)
    config = replace(finished, output=str(tmp_path / "out"), sources=sources, limits=limits)
    with pytest.raises(
        UserError, match=r"no sample is left, all 60 were rejected in the scan \(image_too_many_pixels 60\)"
    ):
        run_job(config)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_two_jobs_never_work_in_one_directory(config: PreprocessConfig) -> None:
    with open_job(config), pytest.raises(UserError, match="another process is preprocessing there"):
        run_job(config)


def test_a_shard_that_was_cut_off_is_packed_again(config: PreprocessConfig) -> None:
    before = contents(state(config))
    shard = sorted((Path(config.output) / "shards").iterdir())[0]
    os.truncate(shard, 1000)
    run_job(config)
    assert contents(state(config)) == before


def test_a_shard_of_another_plan_is_packed_again(config: PreprocessConfig) -> None:
    # A worker of a killed job may end after its directory was taken over.
    before = contents(state(config))
    result = sorted((Path(config.output) / "plan").glob("*.result.json"))[0]
    write_json(result, {**read_json(result), "identity": "0" * 16})
    run_job(config)
    assert contents(state(config)) == before


def test_a_result_never_stands_beside_the_shard_of_an_earlier_plan(
    config: PreprocessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shard of another plan may have the size of the new one, and would pass for it.
    rename = os.replace

    def kill_at_shard(source: str | Path, destination: str | Path) -> None:
        if Path(destination).parent.name == "shards":
            raise KeyboardInterrupt
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill_at_shard)
        with pytest.raises(KeyboardInterrupt):
            run_job(replace(config, seed=1, on_change="rebuild"))
    assert not list((Path(config.output) / "plan").glob("*.result.json"))


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_a_rebuild_that_is_cut_short_leaves_nothing_that_is_taken_for_the_new_work(
    config: PreprocessConfig, removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = replace(
        config, plan=replace(config.plan, shard_bytes=1 << 20), limits=ImageLimits(max_pixels=1 << 20)
    )
    remove, calls = identity_module.remove_tree, itertools.count()

    def killed(directory: Path) -> None:
        if next(calls) == removed:
            raise KeyboardInterrupt
        remove(directory)

    with monkeypatch.context() as patch:
        patch.setattr(identity_module, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_job(replace(new, on_change="rebuild"))
    with pytest.raises(UserError, match="holds a run with other settings"):
        run_job(new)
    run_job(replace(new, on_change="rebuild"))
    fresh = replace(new, output=str(tmp_path / "fresh"))
    run_job(fresh)
    assert contents(state(config)) == contents(state(fresh))


def test_an_index_that_cannot_be_removed_is_not_taken_for_the_new_one(
    config: PreprocessConfig, tmp_path: Path
) -> None:
    index = Path(config.output) / "index"
    index.rename(tmp_path / "elsewhere")
    index.symlink_to(tmp_path / "elsewhere")
    source = replace(config.sources["web"], caption="json:text")
    with pytest.raises(UserError, match=rf"^{index}: cannot be removed"):
        run_job(replace(config, sources={"web": source}, on_change="rebuild"))
    assert read_json(index / "identity.json")["sources"]["web"]["caption"] == "txt"


def test_shards_whose_plan_is_gone_are_nobody_s(config: PreprocessConfig) -> None:
    shutil.rmtree(Path(config.output) / "plan")
    with pytest.raises(UserError, match=r"plan/identity.json is gone"):
        run_job(config)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "a b", "identity.json"])
def test_a_source_name_that_is_no_plain_word_is_refused(finished: PreprocessConfig, name: str) -> None:
    with pytest.raises(ValueError, match="use letters, digits, _ and -"):
        replace(finished, sources={name: finished.sources["web"]})


@pytest.mark.parametrize("damaged", ["index/identity.json", "index/web/000000.parquet", "plan/plan.json"])
def test_damaged_work_is_named_with_what_to_do(config: PreprocessConfig, damaged: str) -> None:
    path = Path(config.output) / damaged
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{damaged}: .* run again"):
        run_job(config)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("000000.tokens", flip, "damaged (another checksum)"),
        ("000000.tokens", lambda path: os.truncate(path, 8), "has 8 bytes, not "),
        ("000000.tokens", Path.unlink, "is gone"),
        ("000001.rejects.parquet", Path.unlink, "no such file"),
    ],
    ids=["flipped", "cut", "gone", "rejects"],
)
def test_what_stands_beside_an_index_is_checked_and_its_mend_is_true(
    tmp_path: Path, name: str, harm: Callable[[Path], None], said: str
) -> None:
    paths = [write_samples(tmp_path / f"{n}.tar", mixed_samples(30, n, prefix=f"{n}-")) for n in range(2)]
    broken = [member for n in range(2) for member in captioned(f"b{n}", b"<html>", "caption")]
    fine = [member for n in range(8) for member in captioned(f"f{n}", png(8, 8), "caption")]
    paths[1] = write_tar(tmp_path / "1.tar", broken + fine)
    config = make_config(tmp_path, *paths, source={"max_reject_rate": 0.2})
    run_job(config)
    before = contents(state(config))
    index = Path(config.output) / "index" / "web"
    harm(index / name)
    for shard in (Path(config.output) / "shards").iterdir():
        shard.unlink()
    number = name.partition(".")[0]
    with pytest.raises(UserError) as caught:
        run_job(config)
    assert str(caught.value).startswith(f"{index / name}: {said}")
    assert f"; delete {number}.parquet beside it and run again" in str(caught.value)
    (index / f"{number}.parquet").unlink()
    with open_job(config) as job:
        job.scan(SerialExecutor(0))
    after = contents(state(config))
    assert {n: c for n, c in after.items() if n.startswith("index/")} == {
        n: c for n, c in before.items() if n.startswith("index/")
    }


def test_a_scan_without_rejects_leaves_none_of_an_earlier_one(config: PreprocessConfig) -> None:
    index = Path(config.output) / "index" / "web"
    for name in ("000001.rejects.parquet", "000001.media"):
        (index / name).write_bytes(b"old")
    (index / "000001.parquet").unlink()
    run_job(config)
    assert sorted(path.name for path in index.glob("000001.*")) == ["000001.parquet", "000001.tokens"]


def test_a_budget_whose_packs_no_parquet_value_holds_is_refused(finished: PreprocessConfig) -> None:
    # P = 48 bytes per patch of 4 x 4 pixels: 2**31 / 48 = 44,739,242.7 patches.
    geometry = replace(finished.geometry, patch_size=4, temporal_patch_size=1)
    limits = replace(finished.limits, max_memory=1 << 40)
    budget = replace(finished.budget, N=1, L=44_739_240)
    fits = replace(finished, geometry=geometry, limits=limits, budget=budget)
    with pytest.raises(ValueError, match="a Parquet value holds less than 2147483648: lower N or L"):
        replace(fits, budget=replace(budget, L=44_739_244))


def test_a_budget_whose_packs_no_worker_holds_is_refused(finished: PreprocessConfig) -> None:
    # Three copies of a pack of 192 bytes per patch and 12 per token, and 350 MB: 200 * 1,000 patches and 64 tokens.
    geometry = replace(finished.geometry, patch_size=8, temporal_patch_size=1)
    budget = replace(finished.budget, N=200, L=1000)
    limits = replace(finished.limits, max_memory=465_202_304)
    fits = replace(finished, geometry=geometry, budget=budget, limits=limits)
    with pytest.raises(
        ValueError, match=r"38400000 bytes per pack.* holds 465202304, above limits.max_memory 465202303"
    ):
        replace(fits, limits=replace(limits, max_memory=465_202_303))


def test_a_shard_that_another_run_wrote_meanwhile_is_never_finished(config: PreprocessConfig) -> None:
    with open_job(config) as job:
        result = sorted((Path(config.output) / "plan").glob("*.result.json"))[0]
        write_json(result, {**read_json(result), "identity": "0" * 16})
        with pytest.raises(UserError, match="was written by another run meanwhile"):
            job.finish()


@pytest.mark.parametrize("name", ["max_pixels", "max_bytes"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got -5"):
        ImageLimits(**{name: -5})
