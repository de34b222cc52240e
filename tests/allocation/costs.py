"""Sensitivities that were never measured: drawn from a seed, with the errors that types have on Gaussian weights."""

from __future__ import annotations

import random
from pathlib import Path

from apex_quant.allocation.groups import make_groups, quantizable
from apex_quant.allocation.sensitivity import (
    Distortion,
    Group,
    ModelFacts,
    Probe,
    Sensitivities,
    TextFacts,
)
from apex_quant.evaluation.identity import identity
from apex_quant.gguf import TYPES, GGUFModel, open_model

ERRORS = {
    "Q8_0": 2.9e-5, "Q6_K": 3e-4, "Q5_K": 1.25e-3, "Q5_1": 1.3e-3, "Q5_0": 1.5e-3, "Q4_K": 5e-3, "IQ4_NL": 5.6e-3,
    "IQ4_XS": 5.7e-3, "Q4_1": 6e-3, "Q4_0": 8e-3, "IQ3_S": 1.9e-2, "Q3_K": 2.1e-2, "IQ3_XXS": 3.3e-2, "IQ2_S": 6.2e-2,
    "Q2_K": 7.2e-2, "IQ2_XS": 9e-2, "IQ2_XXS": 0.118, "IQ1_M": 0.204, "IQ1_S": 0.236,
}  # fmt: skip


def drawn(model: Path | GGUFModel, seed: int = 0) -> Sensitivities:
    """One probe for every tensor; NextN blocks, which no decode reaches, are left out."""
    if not isinstance(model, GGUFModel):
        with open_model(model) as opened:
            return drawn(opened, seed)
    chance = random.Random(seed)
    names = {name: info for name, info in quantizable(model).items() if "nextn" not in name}
    errors = {
        name: {
            kind: Distortion(relative=error, weighted=error * chance.lognormvariate(0, 0.1))
            for kind, error in ERRORS.items()
            if info.shape[0] % TYPES[kind].block == 0
        }
        for name, info in names.items()
    }
    total = sum(info.n_elements for info in names.values())
    groups = []
    for group in make_groups(model, "tensor", list(names)):
        share = sum(names[name].n_elements for name in group.tensors) / total
        kind = "Q3_K" if "Q3_K" in errors[group.tensors[0]] else "Q4_0"
        error = errors[group.tensors[0]][kind].weighted
        kld = chance.lognormvariate(2, 0.7) * share * error
        groups.append(
            Group(
                name=group.name,
                tensors=list(group.tensors),
                role=group.role,
                part=group.part,
                layer=group.layer,
                probes=[Probe(kld=kld, error=kld / 10, n=8, type=kind, weighted_error=error)],
            )
        )
    return Sensitivities(
        model=ModelFacts(name=model.path.name, sha256=identity(model).sha256, architecture=model.architecture),
        text=TextFacts(name="none", tokens=0, chunks=0, scored=0, sha256="0" * 64),
        groups=groups,
        errors=errors,
    )
