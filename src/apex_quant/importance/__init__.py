"""Importance matrices: how much each input channel of each weight matters, measured on activations."""

from __future__ import annotations

from apex_quant.importance.compare import Comparison, compare
from apex_quant.importance.files import convert, save
from apex_quant.importance.fill import fill
from apex_quant.importance.imatrix import Entry, Extra, Importance
from apex_quant.importance.mapping import prune, same_input
from apex_quant.importance.merge import merge
from apex_quant.importance.report import ImportanceReport, report

__all__ = [
    "Comparison",
    "Entry",
    "Extra",
    "Importance",
    "ImportanceReport",
    "compare",
    "convert",
    "fill",
    "merge",
    "prune",
    "report",
    "same_input",
    "save",
]
