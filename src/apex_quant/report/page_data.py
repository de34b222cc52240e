"""What the page's script works on: types of all tensors for the precision map, and memory for the chooser."""

from __future__ import annotations

from typing import Any, Final

from apex_quant.errors import ApexError
from apex_quant.gguf import ggml_type
from apex_quant.report.choose import Memory, ranked, tied
from apex_quant.report.formats import Sources, cell_of
from apex_quant.report.gather import Gathered
from apex_quant.report.pairs import Pairs
from apex_quant.report.precision import ROLES
from apex_quant.report.quantities import QUANTITIES
from apex_quant.report.sentences import ranked_by

CONTEXTS: Final = (4096, 8192, 16384, 32768, 65536, 131072, 262144)
CACHES: Final = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))
FEW: Final = 40
"""Up to so many files each is compared with its next in rank, so that the chooser knows ties; beyond it says that
it does not."""
_FIRST: Final = 48  # "0": types are written as letters from here on, one for each tensor


def precision_data(gathered: Gathered) -> dict[str, Any]:
    """`maps`: label, layout and types of each file with a header or plan; `layouts`: tensors of files that have the
    same ones; `types`: name, weights and bytes of a block."""
    types: dict[str, int] = {}
    layouts: dict[tuple[Any, ...], int] = {}
    maps = []
    for entry in gathered.entries:
        if entry.precision is None:
            continue
        names = tuple((one.name, one.role, one.layer, one.shape) for one in entry.precision.tensors)
        layout = layouts.setdefault(names, len(layouts))
        letters = "".join(chr(_FIRST + types.setdefault(one.type, len(types))) for one in entry.precision.tensors)
        maps.append({"label": entry.label, "layout": layout, "types": letters, "source": entry.precision.source})
    rows = [(name, ggml_type(name)) for name in types]
    return {
        "maps": maps,
        "layouts": [[[name, role, layer, list(shape)] for name, role, layer, shape in names] for names in layouts],
        "types": [[name, kind.block, kind.bytes] for name, kind in rows],
        "roles": list(ROLES),
    }


def chooser_data(gathered: Gathered, sources: Sources, pairs: Pairs, memory: Memory) -> dict[str, Any] | None:
    """Files best first, each with what it takes for every context and cache type; None when none can be ranked."""
    key = ranked_by(gathered)
    rows = ranked(gathered, key) if key is not None else []
    if key is None or not rows:
        return None
    entries = [entry for entry, _ in rows]
    places = {entry.label: place for place, entry in enumerate(entries)}
    files = []
    for place, (entry, value) in enumerate(rows):
        ties = tied(entry, entries[place + 1 :], key, pairs)[0] if len(entries) <= FEW else []
        found = cell_of(value, key, sources.name(entry.source_of(key)))
        files.append(
            {
                "label": entry.label,
                "bytes": entry.bytes,
                "kv": _kv(memory, gathered, entry.label),
                "compute": [memory.compute_bytes(entry, ctx) for ctx in CONTEXTS],
                "shown": f"{QUANTITIES[key].title} {found.text}",
                "trace": found.main.trace if found.main is not None else "",
                "ties": [places[label] for label in ties],
            }
        )
    return {"files": files, "lowest": f"lowest {QUANTITIES[key].title}", "tested": len(entries) <= FEW}


def _kv(memory: Memory, gathered: Gathered, label: str) -> list[list[int | None]] | None:
    """Bytes by cache type and context; None where no header is at hand. A type that cannot be has no bytes."""
    entry = gathered.by_label[label]
    table: list[list[int | None]] = []
    for type_k, type_v in CACHES:
        try:
            table.append([memory.kv_bytes(entry, ctx, type_k, type_v) for ctx in CONTEXTS])
        except ApexError:
            table.append([None] * len(CONTEXTS))
    return None if table[0][0] is None else table
