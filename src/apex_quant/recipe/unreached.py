"""Tensors that calibration cannot reach: NextN blocks, which the library skips, embedding and output matrix.

A type that must not be encoded without importance gives way there to the nearest larger one that may, when the
tier or the mix chose it. What the user asked for by name is refused instead (`missing_importance` of the plan).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from apex_quant.gguf.types import TYPES
from apex_quant.recipe.mixes import Choice, requires_imatrix

WITHOUT_IMPORTANCE: Final = {
    "IQ1_S": "Q2_K",
    "IQ1_M": "Q2_K",
    "IQ2_XXS": "Q2_K",
    "IQ2_XS": "Q2_K",
    "IQ2_S": "Q2_K",
    "Q2_K": "Q3_K",  # in a Q2_K_S mix, where llama-quantize wants importance for it
    "IQ3_XXS": "Q3_K",
}


def spare(choices: Sequence[Choice], base: str, unreached: Callable[[str], bool]) -> list[Choice]:
    """The choices, with types that need importance replaced for the tensors that `unreached` says have none.

    Only those that tier or mix decided may be asked about.
    """
    spared = []
    for choice in choices:
        kind = choice.type.name
        if requires_imatrix(choice.name, choice.type, base) and kind in WITHOUT_IMPORTANCE and unreached(choice.name):
            kind = WITHOUT_IMPORTANCE[kind]
            if requires_imatrix(choice.name, TYPES[kind], base):
                kind = WITHOUT_IMPORTANCE[kind]
            choice = replace(choice, type=TYPES[kind], wanted=TYPES[kind], why="no importance", detail=choice.type.name)
        spared.append(choice)
    return spared
