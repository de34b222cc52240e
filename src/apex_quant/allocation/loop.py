"""The validation loop: near-optimal recipes are measured jointly and, when that disagrees, exchanges too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from apex_quant.allocation.exchange import exchanges, reweighted, variants
from apex_quant.allocation.space import Predicted, Space
from apex_quant.allocation.validate import Candidate, Validator, best_of, shown_lower
from apex_quant.errors import UsageError
from apex_quant.evaluation.compare import compare

STEPS: Final = 4
"""Exchange steps that are measured when prediction and truth disagree."""
DISAGREE: Final = 0.15
"""Prediction and truth disagree when their ratio is further from 1 than this, or when another candidate won."""


class Loop:
    """The validation loop: near-optimal recipes are measured jointly; when that disagrees, so are exchanges."""

    def __init__(self, space: Space, validator: Validator, limit: int, steps: int) -> None:
        self.space, self.validator, self.limit, self.steps = space, validator, limit, steps
        self.measured: list[Candidate] = []

    def run(self, first: Predicted) -> Candidate:
        recipes: dict[str, Predicted] = {"optimum": first}
        for label, space in variants(self.space).items():
            try:
                recipes[label] = self._of(space)
            except UsageError:  # nothing fits under that variant's constraints
                continue
        self._measure(recipes)
        best, _ = best_of(self.measured)
        if not self._disagree(best):
            return best
        taken: dict[str, float] = {}  # exchanges that were shown to help are kept in the next ones
        types = {name: kind.name for name, kind in best.file.types.items()}
        for label, factors in exchanges(self.space, types, self.steps):
            tried = {**taken, **{name: factor * taken.get(name, 1.0) for name, factor in factors.items()}}
            one = self._measure({label: self._of(reweighted(self.space, tried))})[0]
            if shown_lower(one, best):
                best, taken = one, tried
        return best

    def _of(self, space: Space) -> Predicted:
        """The optimum of other costs or constraints, with the prediction of the real ones."""
        return self.space.predicted(space.fit(self.limit).plan)

    def _measure(self, recipes: Mapping[str, Predicted]) -> list[Candidate]:
        found = self.validator.measure(recipes)
        self.measured += [one for one in found if all(one is not other for other in self.measured)]
        self.validator.drop([one for one in self.measured if one is not best_of(self.measured)[0]])
        return found

    def _disagree(self, best: Candidate) -> bool:
        first = self.measured[0]
        ratio = first.value / first.file.predicted if first.file.predicted > 0 else math.inf
        return best is not first or abs(math.log(max(ratio, 1e-9))) > math.log(1 + DISAGREE)

    def said(self, best: Candidate) -> list[str]:
        """How the others compare with the chosen one."""
        others = [one for one in self.measured if one is not best]
        return [f"{one.name}: {compare([best.results, one.results], ['kld'])[0].sentence}" for one in others]
