"""Budgets that choose themselves: the search, what is measured, memory, and the commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from preprocess.__main__ import main
from preprocess.budgets import BudgetConfig, BudgetLimits, MemoryConfig
from preprocess.config import CostConfig, PlanConfig, PreprocessConfig, VideoConfig
from preprocess.cost import linear_cost, pack_cost
from preprocess.index import IndexedUnit
from preprocess.job import run_job
from preprocess.packing.budgets import BudgetPoint, Search, best_of, search_budget
from preprocess.plan import choose_budget
from preprocess.plan.budget import as_samples, draw_samples, measure
from preprocess.plan.memory import fitting_tokens, pack_memory
from preprocess.samples import IMAGE, TEXT, VIDEO, IndexSegment, segments_column
from preprocess.sources.text import TextConfig
from preprocess.verify import verify_dataset
from shared.config import load_config, to_toml
from shared.dataset import open_dataset
from shared.errors import UserError
from shared.geometry import Budget, Geometry
from tests.preprocess.inputs import GEOMETRY, make_config, mixed_samples, write_samples
from tests.preprocess.planning import IDS, Segment, image, text, write_index

ANY = Search(
    S=100, N=None, L=None, rows_multiple=1, demand=1000.0, least_row=16, most=10**6, merge=2, least_vision=0.9
)


def point(N: int, L: int, waste: float, vision: float = 0.95) -> BudgetPoint:
    return BudgetPoint(
        Budget(S=100, N=N, L=L), tokens=0.9, vision=vision, waste=waste, bound=1.0, rejected=0.0, packs=9
    )


# The search


def test_the_least_waste_is_taken_of_the_points_whose_rows_are_full_enough() -> None:
    points = [point(1, 100, 0.05), point(2, 50, 0.03), point(1, 200, 0.01, vision=0.8)]
    assert best_of(points, 0.9) == points[1]


def test_where_no_point_fills_its_rows_the_least_waste_of_all_is_taken() -> None:
    points = [point(1, 100, 0.05, vision=0.7), point(2, 50, 0.03, vision=0.6)]
    assert best_of(points, 0.9) == points[1]


def test_a_draw_goes_to_fewer_rows_and_then_to_fewer_patches() -> None:
    points = [point(2, 50, 0.0300), point(1, 120, 0.0302), point(1, 100, 0.0303)]
    assert best_of(points, 0.9) == points[2]


def test_the_search_finds_a_narrow_best_between_its_first_steps() -> None:
    # Best at N = 2, L = 524, half a step of 2 % from the first points; other N waste 1 % more.
    def waste(budget: Budget, large: bool) -> BudgetPoint:
        return point(budget.N, budget.L, abs(budget.N * budget.L / 1048 - 1) + 0.01 * (budget.N != 2))

    best, curve = search_budget(ANY, waste)
    assert best.budget == Budget(S=100, N=2, L=524)
    assert len({each.budget for each in curve}) == len(curve)
    assert best in curve


def test_rows_are_multiples_and_hold_every_image() -> None:
    search = replace(ANY, rows_multiple=4, least_row=100)
    # 1.28 * 1000 patches hold 12 rows of 100 at most.
    assert search.rows() == [4, 8, 12]
    for rows in search.rows():
        lengths = [budget.L for budget in search.budgets(rows, (0.1, 1.0, 1.2))]
        assert min(lengths) == 100
        assert all(length % 4 == 0 for length in lengths)


def test_a_given_n_or_l_is_kept() -> None:
    assert {budget.N for budget in replace(ANY, N=3).budgets(3, (0.9, 1.0))} == {3}
    given = replace(ANY, L=300)
    # 1000 / 300 = 3.3 rows.
    assert {2, 3, 4, 5} <= set(given.rows())
    assert {budget.L for rows in given.rows() for budget in given.budgets(rows, (0.9, 1.0))} == {300}


def test_no_budget_is_tried_that_a_pack_may_not_hold() -> None:
    tried: list[Budget] = []

    def note(budget: Budget, large: bool) -> BudgetPoint:
        tried.append(budget)
        return point(budget.N, budget.L, 0.1)

    for search in (
        replace(ANY, most=640),
        replace(ANY, most=640, L=64),
        replace(ANY, most=640, rows_multiple=40),
    ):
        search_budget(search, note)
    assert tried and max(budget.N * budget.L for budget in tried) <= 640


# What is measured


def samples_of(documents: Sequence[Sequence[Segment]]) -> Any:
    rows = [
        [
            IndexSegment(IMAGE, "x.tar", 0, 1, h * w // 4 + 2, 8, 9, 1, h, w)
            if h
            else IndexSegment(TEXT, "", 0, 0, tokens)
            for tokens, h, w in document
        ]
        for document in documents
    ]
    return as_samples([(0, segments_column(rows))])


def free_config(directory: Path, **changes: Any) -> PreprocessConfig:
    settings: dict[str, Any] = {
        "output": str(directory),
        "tokenizer": "",
        "sources": {"web": TextConfig(paths=("x",), too_long="reject")},
        "budget": BudgetConfig(S=20, N="auto", L="auto"),
        "geometry": replace(GEOMETRY, max_patches_per_image=16),
    }
    return PreprocessConfig(**{**settings, **changes})


def test_fills_and_waste_are_those_counted_by_hand(tmp_path: Path) -> None:
    # Begin and end of text come on top: 2 + 4 + 2 + 6 = 14 and 2 + 16 = 18 tokens; 16 patches.
    samples = samples_of([[image(4, 4), text(6)], [text(16)]])
    config = free_config(tmp_path, cost=CostConfig(decoder_layers=0, encoder_layers=0))
    found = measure(samples, ["web"], Budget(S=20, N=2, L=16), config, IDS)
    assert found.packs == 2
    assert found.tokens == 32 / 40
    assert found.vision == 16 / 64
    assert found.bound == 2 / (32 / 20)
    # Without attention, padding costs what the same of anything else does.
    assert found.waste == pytest.approx(linear_cost(8, 48, config.cost) / linear_cost(32, 16, config.cost))


def test_frames_of_a_video_attend_to_themselves_alone(tmp_path: Path) -> None:
    # Two frames of 4 x 4: 2 * 16**2 pairs, and the stream of 2 + 2 * 4 + 2 = 12 tokens causal.
    video = IndexSegment(VIDEO, "x.tar", 0, 1, 10, 8, 9, 2, 4, 4)
    samples = as_samples([(0, segments_column([[video]]))])
    config = free_config(tmp_path)
    found = measure(samples, ["web"], Budget(S=20, N=1, L=32), config, IDS)
    useful = pack_cost([12], [16, 16], config.cost)
    assert found.waste == pytest.approx(linear_cost(8, 0, config.cost) / useful)


def test_a_rejected_sample_is_waste(tmp_path: Path) -> None:
    samples = samples_of([[text(18)], [text(19)]])
    config = free_config(tmp_path, cost=CostConfig(decoder_layers=0, encoder_layers=0))
    found = measure(samples, ["web"], Budget(S=20, N=1, L=16), config, IDS)
    assert (found.packs, found.rejected) == (1, 0.5)
    # 16 patches of padding, and the 21 tokens that were rejected.
    lost = linear_cost(21, 16, config.cost)
    assert found.waste == pytest.approx(lost / linear_cost(20, 0, config.cost))


def units_of(directory: Path, **sources: Sequence[Sequence[Segment]]) -> list[IndexedUnit]:
    units: list[IndexedUnit] = []
    for name, documents in sources.items():
        path = directory / "index" / name / "000000.parquet"
        write_index(path, {str(number): document for number, document in enumerate(documents)})
        units.append(IndexedUnit(name, f"{name}.jsonl", path))
    return units


def test_a_sample_has_the_shares_of_the_mixture(tmp_path: Path) -> None:
    units = units_of(tmp_path, a=[[text(3)]] * 30, b=[[text(8)]] * 10)
    sources = {"a": TextConfig(paths=("x",), repeat=0.5), "b": TextConfig(paths=("x",), repeat=2.5)}
    samples, names = draw_samples(units, free_config(tmp_path, sources=sources), IDS)
    counts = {name: int((samples.unit_n == number).sum()) for number, name in enumerate(names)}
    assert counts == {"a": 15, "b": 25}


def test_the_budget_that_fits_data_of_one_kind_is_found(tmp_path: Path) -> None:
    # 3 + 2 + 4 + 1 = 10 tokens and 16 patches each: 10 of them fill S = 100 and 160 patches.
    units = units_of(tmp_path, web=[[text(2), image(4, 4)]] * 600)
    config = free_config(tmp_path, budget=BudgetConfig(S=100, N="auto", L="auto"))
    choice = choose_budget(units, config, IDS)
    assert choice.budget == Budget(S=100, N=1, L=160)
    assert (choice.record["chosen"]["tokens"], choice.record["chosen"]["vision"]) == (1.0, 1.0)
    assert choice.record == choose_budget(units, config, IDS).record
    four = replace(config, budget=BudgetConfig(S=100, N="auto", L="auto", rows_multiple=5))
    assert choose_budget(units, four, IDS).budget == Budget(S=100, N=5, L=32)
    longer = replace(config, budget=BudgetConfig(S=100, N="auto", L=80))
    assert choose_budget(units, longer, IDS).budget == Budget(S=100, N=2, L=80)


def test_long_documents_need_no_more_samples_than_fill_packs_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.plan.budget.LARGE_PACKS", 10)
    units = units_of(tmp_path, web=[[text(8)]] * 50)
    # 10 tokens each, two to a pack of S = 20.
    assert choose_budget(units, free_config(tmp_path), IDS).record["samples"] == 21


def test_text_alone_gets_the_smallest_rows(tmp_path: Path) -> None:
    units = units_of(tmp_path, web=[[text(8)]] * 50)
    assert choose_budget(units, free_config(tmp_path), IDS).budget == Budget(S=20, N=1, L=16)


def test_an_empty_index_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the index holds no sample to choose a budget by"):
        choose_budget(units_of(tmp_path, web=[]), free_config(tmp_path), IDS)


# Memory


def test_the_memory_of_a_pack_is_that_counted_by_hand() -> None:
    cost = CostConfig(
        encoder_width=10, encoder_layers=2, encoder_parameters=800,
        decoder_width=100, decoder_layers=4, decoder_parameters=8000,
    )  # fmt: skip
    memory = MemoryConfig(shards=2, packs_per_microbatch=3)
    # 16 * 8800 / 2 bytes of states, two layers of 2000 parameters in 4 bytes, 500 MB of logits; and per pack 34 bytes
    # * 4 layers * 100 per token, 34 * 2 * 10 per patch.
    fixed = 70_400 + 16_000 + 500_000_000
    budget = Budget(S=64, N=2, L=32)
    assert pack_memory(budget, memory, cost) == fixed + 3 * (64 * 13_600 + 64 * 680)
    # Two bytes per layer and one layer whole.
    again = replace(memory, recompute="full")
    assert pack_memory(budget, again, cost) == fixed + 3 * (64 * 4_200 + 64 * 380)


def test_s_fills_the_gpu_and_leaves_room_for_its_patches() -> None:
    memory, cost = MemoryConfig(gpu_bytes=40_000_000_000, shards=8), CostConfig()
    tokens, patches = fitting_tokens(memory, cost, patches_per_token=2.0, least_patches=0)
    free = 40e9 * 0.85
    assert tokens % 256 == 0
    assert patches >= 2 * tokens
    assert pack_memory(Budget(S=tokens, N=1, L=patches), memory, cost) <= free
    assert pack_memory(Budget(S=tokens + 256, N=1, L=int(2.2 * (tokens + 256))), memory, cost) > free


def test_no_budget_is_tried_that_the_gpu_does_not_hold(tmp_path: Path) -> None:
    # Of 20 GB 256 tokens are little: N * L of 1.28 times the demand would not fit.
    units = units_of(tmp_path, web=[[text(2), image(4, 4)]] * 600)
    memory = MemoryConfig(gpu_bytes=20_000_000_000, shards=64, reserve=0.0)
    config = free_config(tmp_path, budget=BudgetConfig(S="auto", N="auto", L="auto"), memory=memory)
    curve = choose_budget(units, config, IDS).record["curve"]
    tried = [Budget(S=line["S"], N=line["N"], L=line["L"]) for line in curve]
    assert max(pack_memory(budget, memory, config.cost) for budget in tried) <= 20_000_000_000


def test_a_gpu_that_the_model_fills_is_told() -> None:
    with pytest.raises(UserError, match=r"weights and optimizer leave 0.0 GB.*raise memory.shards"):
        fitting_tokens(MemoryConfig(gpu_bytes=3_000_000_000, shards=1), CostConfig(), 2.0, 0)


def test_s_leaves_room_for_the_least_vision_rows_that_may_be_chosen() -> None:
    memory, cost = MemoryConfig(gpu_bytes=40_000_000_000, shards=8), CostConfig()
    tokens, patches = fitting_tokens(memory, cost, patches_per_token=0.1, least_patches=50_000)
    assert patches >= 50_000
    assert pack_memory(Budget(S=tokens, N=1, L=50_000), memory, cost) <= 40e9 * 0.85
    assert pack_memory(Budget(S=tokens + 256, N=1, L=50_000), memory, cost) > 40e9 * 0.85
    # 34 bytes * 12 layers * 768 of 100,000 patches are 31 GB, of the 28 GB that are left.
    with pytest.raises(UserError, match=r"not enough for 1 x 256 tokens and 100000 patches.*lower N or L"):
        fitting_tokens(memory, cost, patches_per_token=0.1, least_patches=100_000)


@pytest.mark.parametrize(("N", "L"), [("auto", 2048), (128, "auto")])
def test_a_given_n_or_l_stays_within_the_gpu_that_s_is_chosen_for(tmp_path: Path, N: Any, L: Any) -> None:
    units = units_of(tmp_path, web=[[text(200), image(4, 4)]] * 600)
    memory = MemoryConfig(gpu_bytes=3_000_000_000, shards=64, reserve=0.0)
    config = free_config(tmp_path, budget=BudgetConfig(S="auto", N=N, L=L), memory=memory)
    choice = choose_budget(units, config, IDS)
    assert choice.record["memory_bytes"] <= 3_000_000_000


def test_s_is_chosen_for_a_gpu(tmp_path: Path) -> None:
    units = units_of(tmp_path, web=[[text(2), image(4, 4)]] * 600)
    memory = MemoryConfig(gpu_bytes=4_000_000_000, shards=64, reserve=0.0)
    config = free_config(tmp_path, budget=BudgetConfig(S="auto", N="auto", L="auto"), memory=memory)
    choice = choose_budget(units, config, IDS)
    assert choice.budget.S % 256 == 0
    # 10 tokens come with 16 patches.
    assert 1.6 * choice.budget.S * 0.9 <= choice.budget.N * choice.budget.L
    assert choice.record["memory_bytes"] == pack_memory(choice.budget, memory, config.cost) <= 4_000_000_000


# Configs


def test_auto_is_read_from_files_and_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "budget.toml"
    path.write_text('S = 64\nN = "auto"\nL = 32\n')
    config = load_config(BudgetConfig, path, ["--L", "auto", "--rows-multiple", "2"])
    assert config == BudgetConfig(S=64, N="auto", L="auto", rows_multiple=2)
    path.write_text(to_toml(config))
    assert load_config(BudgetConfig, path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": BudgetConfig(S="auto", N=1, L="auto")},
            'budget.S is "auto" and memory.gpu_bytes is not set',
        ),
        ({"budget": BudgetConfig(S=20, N="auto", L=12)}, "max_patches_per_image 16 is above budget.L 12"),
        ({"budget": BudgetConfig(S=20, N="auto", L=18)}, "budget.L 18 is not a multiple of merge"),
        (
            {"budget": BudgetConfig(S=20, N=1, L="auto"), "video": VideoConfig(max_patches_per_video=2)},
            "max_patches_per_video 2 must lie between one cell of 4",
        ),
    ],
)
def test_what_no_choice_can_mend_is_refused_at_once(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free_config(tmp_path, **changes)


def test_rows_that_are_not_a_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match="N 3 is not a multiple of rows_multiple 2"):
        BudgetConfig(S=20, N=3, L=16, rows_multiple=2)


def test_s_is_not_chosen_where_n_and_l_are_given() -> None:
    with pytest.raises(ValueError, match='S is "auto" with N and L given: leave N or L'):
        BudgetConfig(S="auto", N=1, L=16)


def test_an_s_beyond_a_parquet_value_or_a_worker_is_refused(tmp_path: Path) -> None:
    assert BudgetConfig(S=2**29 - 1, N=1, L=16)
    with pytest.raises(ValueError, match="S 536870912 is too large: 4 bytes a token"):
        BudgetConfig(S=2**29, N=1, L=16)
    # 12 bytes a token, three times, beside 350 MB: 1.5 GB hold 31.9 million tokens.
    with pytest.raises(ValueError, match=r"budget.S tokens are 384000000 and .* 1502[0-9]{6}, above limits"):
        free_config(tmp_path, budget=BudgetConfig(S=32_000_000, N=1, L="auto"))


def test_an_s_that_no_sample_fits_is_told(tmp_path: Path) -> None:
    units = units_of(tmp_path, web=[[image(4, 4)]] * 3)
    config = free_config(tmp_path, budget=BudgetConfig(S=2, N="auto", L="auto"))
    with pytest.raises(UserError, match="no sample of 3 fits a pack of S = 2 tokens"):
        choose_budget(units, config, IDS)


def test_more_rows_than_a_pack_may_hold_are_told(tmp_path: Path) -> None:
    units = units_of(tmp_path, web=[[text(2), image(4, 4)]] * 3)
    limits = BudgetLimits(Geometry(), 0, 1_500_000_000)
    assert limits.max_patches() == (1_500_000_000 - 350_000_000) // 3 // 768
    rows = 10**7
    config = free_config(tmp_path, budget=BudgetConfig(S=100, N="auto", L="auto", rows_multiple=rows))
    with pytest.raises(UserError, match=r"10000000 vision rows of 16 patches.*lower budget.rows_multiple"):
        choose_budget(units, config, IDS)


# The commands


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    write_samples(tmp_path / "a.tar", mixed_samples(40))
    config = make_config(tmp_path, tmp_path / "a.tar")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    return path


def words(path: Path, command: str, *more: str) -> list[str]:
    return [command, str(path), *more]


def test_what_if_shows_the_table_and_writes_nothing(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(config_file, "scan")) == 0
    output = config_file.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    assert main(words(config_file, "plan", "--what-if")) == 0
    shown = capsys.readouterr().out
    assert "the config's N = 2, L = 32: tokens" in shown
    assert "<- chosen" in shown and "wasted FLOPs" in shown
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert main(words(config_file, "plan", "--what-if", "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["chosen"]["N"] * record["chosen"]["L"] > 0
    assert record["beside"]["N"] == 2 and len(record["curve"]) > 5


def test_what_if_asks_for_a_scan(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(config_file, "plan", "--what-if")) == 2
    assert "1 of 1 inputs are not scanned; run `scan` first" in capsys.readouterr().err
    assert not (config_file.parent / "out").exists()
    assert main(words(config_file, "scan")) == 0
    assert main(words(config_file, "plan", "--what-if", "--geometry.max_patches_per_image", "32")) == 2
    assert "geometry.max_patches_per_image" in capsys.readouterr().err


def test_explain_needs_something_to_explain(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(config_file, "scan")) == 0
    assert main(words(config_file, "plan", "--explain")) == 2
    assert "S, N and L are given, nothing was chosen" in capsys.readouterr().err
    assert [path.name for path in (config_file.parent / "out" / "plan").iterdir()] == ["identity.json"]


def test_a_chosen_budget_is_planned_packed_proven_and_kept(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(PreprocessConfig, config_file)
    # A scan with a given budget is no work that another budget would throw away.
    assert main(words(config_file, "scan")) == 0
    free = replace(config, budget=BudgetConfig(S=64, N="auto", L="auto"), plan=PlanConfig())
    run_job(free)
    output = Path(config.output)
    choice = json.loads((output / "plan" / "budget.json").read_text())
    assert asdict(open_dataset(output).budget) == choice["budget"]
    counts, faults = verify_dataset(output)
    assert not faults and counts["packs"]
    config_file.write_text(to_toml(free))
    capsys.readouterr()
    assert main(words(config_file, "plan", "--explain")) == 0
    assert f"S = 64, N = {choice['budget']['N']}, L = {choice['budget']['L']}" in capsys.readouterr().out
    assert main(words(config_file, "plan", "--explain", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["explain"] == choice
    edited = {**choice, "budget": {**choice["budget"], "N": choice["budget"]["N"] + 1}}
    (output / "plan" / "budget.json").write_text(json.dumps(edited))
    assert main(words(config_file, "run")) == 2
    assert "planned for {'S': 64, " in capsys.readouterr().err
    damaged = json.dumps({**choice, "budget": 3})
    (output / "plan" / "budget.json").write_text(damaged)
    assert main(words(config_file, "plan")) == 2
    assert "holds no budget of this config" in capsys.readouterr().err
    (output / "plan" / "budget.json").write_text(json.dumps(edited))
    # Interrupted after the choice: the budget that was chosen is taken again.
    (output / "plan" / "plan.json").unlink()
    for path in (output / "plan").glob("train-*"):
        path.unlink()
    assert main(words(config_file, "run")) == 0
    assert open_dataset(output).budget.N == choice["budget"]["N"] + 1
