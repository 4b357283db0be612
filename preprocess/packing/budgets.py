"""Which N and L go with S: what is tried, and what is best of it. Pure: what a budget is worth is measured outside.

    demand     patches that come along with S tokens when both are spread evenly: N * L lies near it
    first      for each N, N * L from 0.92 to 1.28 times the demand, on a small sample
    then       around the best of the three best N, in steps of half a per cent, on a large one

A curve of fill over N * L has several tops where most images are of one size: a row that takes ten of them is
better than one that takes nine and a half. So no step trusts the slope of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.geometry import Budget

# Rows that a pack may be cut into, in multiples of what it must be.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COARSE = tuple(0.92 + 0.02 * step for step in range(19))
FINE = tuple(-0.02 + 0.005 * step for step in range(9))
REFINED_ROWS = 3
# L is a multiple of a power of two up to this where that moves it by no more than a two-hundredth.
MAX_ALIGNMENT = 128
STEPS = 200
# Nearer than this is a draw, which fewer rows win: the sample tells no smaller difference.
DRAW = 0.0005


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """A budget and what it does to a sample of the data.

    tokens, vision: share of S * packs and of N * L * packs that is filled.
    waste: modelled FLOPs spent on padding or on rejected samples, per FLOP spent on the rest.
    bound: packs / max(tokens / S, patches / (N * L)).
    rejected: share of the samples that cannot be packed.
    """

    budget: Budget
    tokens: float
    vision: float
    waste: float
    bound: float
    rejected: float
    packs: int


Measure = Callable[[Budget, bool], BudgetPoint]


@dataclass(frozen=True, slots=True)
class Search:
    """What may be chosen. `N`, `L`: given, or None. `demand`: patches that come along with S tokens.

    A row holds `least_row` patches at least; a pack of `rows_multiple` such rows holds no more than `most`. Rows should
    be filled to `least_vision`: FLOPs alone would buy the last tokens with rows that are a quarter empty.
    """

    S: int
    N: int | None
    L: int | None
    rows_multiple: int
    demand: float
    least_row: int
    most: int
    merge: int
    least_vision: float

    def rows(self) -> list[int]:
        """N to try: those whose rows hold every image without leaving the demand far behind."""
        if self.N is not None:
            return [self.N]
        step = self.rows_multiple
        if self.L is None:
            most = min(COARSE[-1] * self.demand, self.most) / self.least_row
            return [step * k for k in ROWS if step * k <= most] or [step]
        near = {round(self.demand * share / self.L / step) * step for share in (0.9, 1.0, 1.1, 1.2, 1.3)}
        numbers = {number + more for number in near for more in (-step, 0, step)}
        return sorted(number for number in numbers if step <= number <= self.most // self.L) or [step]

    def budgets(self, N: int, shares: Sequence[float], around: float | None = None) -> list[Budget]:
        """Budgets of N rows with N * L near the shares of `around`, by default the demand."""
        if self.L is not None:
            return [Budget(S=self.S, N=N, L=self.L)]
        aim = self.demand if around is None else around
        lengths = {self._row_length(aim * share / N, self.most // N) for share in shares}
        return [Budget(S=self.S, N=N, L=L) for L in sorted(lengths)]

    def _row_length(self, patches: float, most: int) -> int:
        unit = self.merge * self.merge
        step = unit
        while step * 2 <= MAX_ALIGNMENT and step * 2 * STEPS <= patches:
            step *= 2
        least, most = -(-self.least_row // unit) * unit, most // unit * unit
        return max(least, min(round(patches / step) * step, most))


def search_budget(search: Search, measure: Measure) -> tuple[BudgetPoint, list[BudgetPoint]]:
    """The best budget, and all points that were looked at, by N and L; `measure(budget, large)` packs a sample.

    `large` asks for the large sample. Points of the curve are of the small one but for those near the best.
    """
    points: dict[Budget, BudgetPoint] = {}
    leaders: list[BudgetPoint] = []
    for rows in search.rows():
        own = [measure(budget, False) for budget in search.budgets(rows, COARSE)]
        points |= {point.budget: point for point in own}
        leaders.append(best_of(own, search.least_vision))
    leaders.sort(key=lambda point: (point.vision < search.least_vision, point.waste))
    finals: list[BudgetPoint] = []
    for leader in leaders[:REFINED_ROWS]:
        rows, length = leader.budget.N, leader.budget.L
        near = {leader.budget, *search.budgets(rows, [1 + step for step in FINE], rows * length)}
        finals += [measure(budget, True) for budget in sorted(near, key=_rows_then_length)]
    points |= {point.budget: point for point in finals}
    return best_of(finals, search.least_vision), [
        points[budget] for budget in sorted(points, key=_rows_then_length)
    ]


def best_of(points: Sequence[BudgetPoint], least_vision: float) -> BudgetPoint:
    """The point that wastes least of those whose rows are full enough, of all where none is.

    Of those that waste about as little, the one of fewest rows, then patches.
    """
    full = [point for point in points if point.vision >= least_vision] or points
    least = min(point.waste for point in full)
    near = [point for point in full if point.waste <= least + DRAW]
    return min(near, key=lambda point: (point.budget.N, point.budget.N * point.budget.L))


def _rows_then_length(budget: Budget) -> tuple[int, int]:
    return budget.N, budget.L
