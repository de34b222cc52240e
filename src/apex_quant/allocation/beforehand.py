"""What can be refused before hours of measuring: options that go nowhere, constraints that no tensor has, targets that
no file reaches, texts and references that are not there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from apex_quant.allocation.choices import make_space
from apex_quant.allocation.constraints import Constraints
from apex_quant.allocation.groups import quantizable
from apex_quant.allocation.targets import target_of
from apex_quant.errors import UsageError
from apex_quant.evaluation.reference import describe
from apex_quant.evaluation.texts import read_texts
from apex_quant.gguf import TYPES, GGUFModel
from apex_quant.importance import Importance
from apex_quant.recipe.planned import PlanOptions

BESIDE: Final = {"fill", "allow_requantize", "override_kv", "prune_layers", "split_max_size", "keep_split"}
"""Options of a plan that do not say which type a tensor gets."""


@dataclass(frozen=True)
class Free:
    """Costs before anything is known: every tensor can have every type, for nothing."""

    model: GGUFModel

    @cached_property
    def tensors(self) -> Sequence[str]:
        return list(quantizable(self.model))

    def types(self, tensor: str) -> Sequence[str]:
        return list(TYPES)

    def cost(self, tensor: str, kind: str) -> float:
        return 0.0

    def corrected(self, total: float) -> float:
        return total


def refuse_options(options: PlanOptions, allowed: Collection[str], whom: str) -> None:
    """Raises UsageError for an option that `whom` would not go by."""
    for one in fields(PlanOptions):
        if one.name not in allowed and getattr(options, one.name):
            raise UsageError(
                f"{whom} does not go with --{one.name.replace('_', '-')}",
                hint="apex optimize -o recipe.txt, then apex quantize --recipe recipe.txt with what else is wanted; "
                "--fix decides types beforehand",
            )


def check_choices(
    model: GGUFModel,
    importance: Importance | None,
    constraints: Constraints,
    options: PlanOptions,
    target: Mapping[str, Any] | None = None,
) -> None:
    """Raises UsageError for constraints that leave a tensor without a type or match none, and for a `target` (the
    arguments of target_of) that is none or that no file reaches; InputError for a file of it that cannot be read."""
    space = make_space(model, Free(model), importance=importance, constraints=constraints, options=options)
    if target is None:
        space.fit_bounds()
    elif (size := target_of(space, **target).bytes) is not None:
        space.fit(size)


def check_judge(
    model: GGUFModel, reference: Path | None, text: Sequence[str | Path] | None, chunks: int | None
) -> None:
    """Raises UsageError for a text beside a reference that has its own, InputError for either that cannot be read."""
    if text:
        read_texts(model, text)
    stored = describe(reference, model.path, model)[1] if reference is not None else None
    if reference is None or stored is None:
        return
    stored.close()
    given = "--text" if text else "--chunks" if chunks is not None else None
    if given is not None:
        raise UsageError(
            f"{reference.name} has a text of its own: {given} does not go with it",
            hint="give the full-precision model as --reference, which any text can be run through",
        )


def refuse_unmeasured(**given: object) -> None:
    """Without validation nothing is measured: raises UsageError for what says how."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--no-validate measures nothing: --{name} does not go with it")
