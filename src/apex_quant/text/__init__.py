"""Text for calibration and evaluation: documents from many sources, chat templates, mixes, the built-in corpus."""

from __future__ import annotations

from apex_quant.text.corpus import builtin, heldout
from apex_quant.text.documents import KINDS, Document
from apex_quant.text.loaders import load
from apex_quant.text.mix import DEFAULT_MIX, mixed, parse_mix
from apex_quant.text.template import ChatTemplate, render, render_all

__all__ = [
    "DEFAULT_MIX",
    "KINDS",
    "ChatTemplate",
    "Document",
    "builtin",
    "heldout",
    "load",
    "mixed",
    "parse_mix",
    "render",
    "render_all",
]
