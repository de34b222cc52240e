"""`python -m apex_quant.text`: statistics of the built-in corpus."""

from __future__ import annotations

from apex_quant.text.corpus import builtin, table

print(table(builtin()))
