"""Importance matrices: how much each input channel of each weight matters, measured on activations."""

from __future__ import annotations

from apex_quant.importance.imatrix import Entry, Importance
from apex_quant.importance.mapping import prune, same_input

__all__ = ["Entry", "Importance", "prune", "same_input"]
