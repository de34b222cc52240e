"""The validation loop: near-optimal recipes are measured jointly and, when that disagrees, exchanges too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from apex_quant.allocation.exchange import exchanges, parted, reweighted, smoothed
from apex_quant.allocation.space import Fitted, Predicted, Space
from apex_quant.allocation.validate import Candidate, Validator, best_of, shown_lower
from apex_quant.evaluation.compare import compare

STEPS: Final = 4
"""Exchange steps that are measured when prediction and truth disagree."""
TOO_LOW: Final = 0.35
TOO_HIGH: Final = 0.15
"""Prediction and truth disagree when the measured interval is further above or below the prediction than this, or when
another candidate won. Of many noisy costs the solver takes those that came out too low: the truth of optima was 1.10 to
1.24 times the prediction (docs/method.md), and up to 1.33 times in the tables of benchmarks/RESULTS.md from before
rounding was predicted, but for the least divergences; which says nothing against a recipe."""


class Loop:
    """The validation loop of one size.

    `first` is the solver's optimum in `space`, `limit` the bytes of the whole file. `part`: a recipe with siblings
    apart may be chosen too, where it is shown to be lower. `problems`: the spaces in which candidates lie, each with
    its optimum.
    """

    def __init__(
        self, space: Space, first: Fitted, validator: Validator, limit: int, *, steps: int = STEPS, part: bool = False
    ) -> None:
        self.space, self.validator, self.limit, self.steps = space, validator, limit, steps
        self.problems: list[tuple[Space, Fitted]] = [(space, first)]
        self.measured: list[Candidate] = []
        self._part = part and bool(space.constraints.equal)

    def run(self) -> Candidate:
        """The best candidate. The file of no other one is left."""
        optimum = self.problems[0][1]
        recipes: dict[str, Predicted] = {"optimum": optimum, "smoothed": self._of(smoothed(self.space))}
        if self._part:
            apart = parted(self.space)
            self.problems.append((apart, apart.fit(self.limit)))
            recipes["siblings apart"] = self.problems[-1][1]
        found = self._measure(recipes)
        best = best_of(found[:2])
        for other in found[2:]:  # siblings apart compute slower: not for what may be chance
            best = other if shown_lower(other, best) else best
        self._drop_all_but(best)
        if not self._disagree(best):
            return best
        taken: dict[str, float] = {}  # exchanges that were shown to help are kept in the next ones
        types = {name: kind.name for name, kind in best.file.types.items()}
        base = self.problem_of(best.file)[0]  # siblings that were parted stay parted
        left = self.steps
        for label, factors in exchanges(base, types):
            if left == 0:
                break
            if factors.keys() & taken.keys():
                continue  # the way back from what was shown to help
            left -= 1
            tried = {**taken, **factors}
            one = self._measure({label: self._of(reweighted(base, tried))})[0]
            if shown_lower(one, best):
                best, taken = one, tried
            self._drop_all_but(best)
        return best

    def problem_of(self, chosen: Predicted) -> tuple[Space, Fitted]:
        """The narrowest space that a candidate lies in, and its optimum: what the candidate is to be held against."""
        return next(row for row in self.problems if row[0].taken(chosen.types) is not None)

    def _of(self, space: Space) -> Predicted:
        """The optimum of other costs, with the prediction of the real ones."""
        return self.space.predicted(space.fit(self.limit).plan)

    def _measure(self, recipes: Mapping[str, Predicted]) -> list[Candidate]:
        found = self.validator.measure(recipes)
        self.measured += [one for one in found if all(one is not other for other in self.measured)]
        return found

    def _drop_all_but(self, best: Candidate) -> None:
        self.validator.drop([one for one in self.measured if one is not best])

    def _disagree(self, best: Candidate) -> bool:
        first = self.measured[0]
        if best is not first:
            return True
        low, high = (first.kld[end] or first.value for end in ("low", "high"))
        least, most = first.file.predicted / (1 + TOO_HIGH), first.file.predicted * (1 + TOO_LOW)
        return bool(high < least or low > most)

    def said(self, best: Candidate) -> list[str]:
        """How the others compare with the chosen one."""
        others = [one for one in self.measured if one is not best]
        return [f"{one.name}: {compare([best.results, one.results], ['kld'])[0].sentence}" for one in others]


def ratio(measured: list[Candidate]) -> float:
    """How many times larger the measured KLD is than the predicted one: the geometric mean over candidates."""
    logs = [math.log(one.value / one.file.predicted) for one in measured if one.value > 0 and one.file.predicted > 0]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0
