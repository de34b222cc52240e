"""The certificate of an allocation: everything that is needed to repeat it, and to check it without the solver.

It names the model, the sensitivities, the importance matrix and the texts by hash, says what was asked and under which
constraints, and has for each group the bytes and cost of every option, the one that was taken, and a price of a byte.
From these alone `check` recomputes bytes and cost, and the Lagrangian bound: for any price p >= 0, no choice of at most
B bytes costs less than sum over groups of min (cost + p x bytes) - p x B (Everett 1963).

What is certified is the recipe that is delivered. Where validation chose another one than the solver's optimum, since
it measured lower, its gap says by how much it is dearer in the predicted costs.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from apex_quant.allocation.problem import Group, Option, lagrangian_bound
from apex_quant.allocation.sensitivity import Sensitivities
from apex_quant.allocation.space import Fitted, Predicted, Space
from apex_quant.errors import InputError
from apex_quant.evaluation.identity import sampled
from apex_quant.evaluation.pertoken import read_bounded
from apex_quant.gguf import TYPES
from apex_quant.gguf.atomic import write_file
from apex_quant.importance import Importance
from apex_quant.importance.fill import prior_of
from apex_quant.native import library_info
from apex_quant.text import builtin, render
from apex_quant.text.corpus import heldout as heldout_text
from apex_quant.text.corpus import probe, validation
from apex_quant.text.overlap import WORDS, overlap
from apex_quant.version import VERSION

SCHEMA: Final = "apex.allocation/1"
MAX_BYTES: Final = 256 << 20


SAME: Final = 1e-6
"""A gap of which a choice is called proved optimal: RELATIVE_GAP of the solver, and float sums."""


def proof(space: Space, optimum: Fitted, chosen: Predicted, target_bytes: int) -> dict[str, Any]:
    """What the predicted costs say of `chosen`, a recipe of `space`, whose optimum of at most `target_bytes` is
    `optimum`: its own bytes and cost against the bound of all recipes."""
    kinds = space.taken(chosen.types)
    assert kinds is not None  # it lies in the space
    taken = [space.option(group, kind) for group, kind in zip(space.groups, kinds, strict=True)]
    size, cost, solution = sum(o.bytes for o in taken), math.fsum(o.cost for o in taken), optimum.solution
    limit = max(target_bytes - (optimum.plan.total_bytes - solution.bytes), size)
    lagrangian = lagrangian_bound(space.groups, limit, solution.price)
    # headers differ by some bytes: what was proved for fewer bytes is no bound for more
    proved_for = target_bytes - (optimum.plan.total_bytes - solution.bytes)
    bound = min(cost, solution.bound if limit == proved_for else lagrangian)
    gap = (cost - bound) / cost if cost > 0 else 0.0
    return {
        "byte_limit": limit,
        "bytes": size,
        "cost": cost,
        "bound": bound,
        "gap": gap,
        "proved": gap <= SAME,
        "price_per_byte": solution.price,
        "lagrangian_bound": lagrangian,
        "fixed_cost": space.fixed_cost,
        "groups": [
            {
                "tensors": list(group.tensors),
                "taken": option.type.name,
                "options": [[o.type.name, o.bytes, o.cost] for o in _with(group.options, option)],
            }
            for group, option in zip(space.groups, taken, strict=True)
        ],
    }


def _with(options: Sequence[Option], taken: Option) -> list[Option]:
    """The options, and the taken one where it was left out because another one beats it: no bound changes by it."""
    return [*options, *([taken] if all(o.type != taken.type for o in options) else [])]


def certificate(
    space: Space,
    chosen: Predicted,
    proved: dict[str, Any],
    *,
    target: dict[str, Any],
    sensitivities: Sensitivities,
    validated: dict[str, Any] | None,
    heldout: str,
    candidates: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The document of one allocation. `proved`: its proof(). `validated`: by what candidates were measured. `heldout`:
    what was read of the held-out text, in words."""
    importance = space.importance
    return {
        "schema": SCHEMA,
        "apex": VERSION,
        "library": library_info().version,
        "model": {"name": space.model.path.name, "samples_sha256": sampled(space.model)},
        "imatrix_sha256": importance.sha256 if importance is not None else None,
        "fill": prior_of(importance, space.options.fill) if importance is not None else None,
        "sensitivity": _sensitivity(sensitivities),
        "validation": validated,
        "texts": _texts(importance, sensitivities, validated, heldout),
        "target": target,
        "constraints": space.constraints.to_json(),
        "recipe": chosen.plan.recipe.to_json(),
        "recipe_sha256": chosen.plan.recipe.sha256,
        "total_bytes": chosen.plan.total_bytes,
        "predicted_kld": chosen.predicted,
        "proof": proved,
        "candidates": list(candidates),
        "settings": settings,
        "notes": list(notes),
    }


def check(document: dict[str, Any]) -> dict[str, Any]:
    """Recompute what a certificate claims: {"bytes", "cost", "lagrangian_bound", "gap"}. Raises InputError.

    The gap is that of the Lagrangian bound, which the solver's own may be better than.
    """
    try:
        proof = document["proof"]
        groups, picks = [], []
        for row in proof["groups"]:
            options = tuple(Option(TYPES[kind], int(size), float(cost)) for kind, size, cost in row["options"])
            groups.append(Group(tuple(row["tensors"]), options))
            picks.append(next(o for o in options if o.type.name == row["taken"]))
        size, cost = sum(o.bytes for o in picks), math.fsum(o.cost for o in picks)
        limit, price = int(proof["byte_limit"]), float(proof["price_per_byte"])
        claimed = (int(proof["bytes"]), float(proof["cost"]), float(proof["bound"]))
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise InputError(f"not a certificate of an allocation: {type(error).__name__}: {error}") from None
    if size != claimed[0] or size > limit:
        raise InputError(f"the choice takes {size} bytes; claimed {claimed[0]}, limit {limit}")
    if not math.isclose(cost, claimed[1], rel_tol=1e-9, abs_tol=1e-300):
        raise InputError(f"the choice costs {cost:.9g}, claimed {claimed[1]:.9g}")
    if price < 0 or claimed[2] > cost * (1 + 1e-9):
        raise InputError(f"a bound of {claimed[2]:.9g} and a price of {price:.9g} cannot be")
    bound = lagrangian_bound(groups, limit, price)
    return {"bytes": size, "cost": cost, "lagrangian_bound": bound, "gap": (cost - bound) / cost if cost else 0.0}


def save(document: dict[str, Any], path: Path) -> Path:
    """Write it, whole or not at all. Raises ResourceError."""
    return write_file(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Read a certificate. Raises InputError."""
    text = read_bounded(Path(path), MAX_BYTES, "a certificate")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a whole JSON document: {str(error)[:200]}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a certificate of an allocation: no schema {SCHEMA}")
    return document


def _sensitivity(measured: Sensitivities) -> dict[str, Any]:
    said = json.dumps(measured.to_json(), sort_keys=True).encode()
    return {
        "sha256": hashlib.sha256(said).hexdigest(),
        "text_sha256": measured.text.sha256,
        "tokens": measured.text.tokens,
        "imatrix": measured.imatrix,
        "groups": measured.kinds,
        "settings": measured.settings,
    }


@functools.cache
def shared_runs() -> dict[str, int]:
    """How many runs of 13 words the built-in texts share."""
    sets = {"probe": probe(), "validation": validation(), "calibration": builtin(), "heldout": heldout_text()}
    texts = {name: [render(document, None) for document in documents] for name, documents in sets.items()}
    return {f"{a}_in_{b}": overlap(texts[a], texts[b]).shared for a, b in itertools.combinations(texts, 2)}


def _texts(
    importance: Importance | None, measured: Sensitivities, validated: dict[str, Any] | None, evaluation: str
) -> dict[str, Any]:
    """Which text was for what, as far as files say, and how many runs of 13 words the built-in ones share: none."""
    if validated is None:
        judged = "none: nothing was measured"
    else:
        judged = validated["text"]["name"] if validated["text"] else f"that of {validated['reference']['name']}"
    return {
        "calibration": ", ".join(importance.datasets) or "not said by the matrix" if importance is not None else None,
        "sensitivity": measured.text.name,
        "validation": judged,
        "evaluation": evaluation,
        f"shared_runs_of_{WORDS}_words_of_built_in_texts": dict(shared_runs()),
    }
