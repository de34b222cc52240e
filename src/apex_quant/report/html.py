"""`render`: everything gathered as one HTML page that opens offline, loads nothing and needs no scripts to be read."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any, Final

from markupsafe import Markup

from apex_quant.errors import ApexError
from apex_quant.evaluation.pertoken import read_bounded
from apex_quant.evaluation.results import MAX_BYTES
from apex_quant.report.choose import Memory
from apex_quant.report.entry import Entry
from apex_quant.report.experts import Coverage
from apex_quant.report.formats import (
    Cell,
    Sources,
    bpw_cell,
    bytes_unit,
    cell,
    cell_of,
    measured,
    missing_lines,
    one_line,
    size_cell,
)
from apex_quant.report.gather import Gathered
from apex_quant.report.page_charts import mark_of
from apex_quant.report.page_data import CACHES, CONTEXTS, chooser_data, precision_data
from apex_quant.report.page_figures import figures
from apex_quant.report.pairs import Pairs
from apex_quant.report.provenance import (
    Header,
    eval_commands,
    header,
    model_name,
    quantize_command,
    run_command,
    versions,
)
from apex_quant.report.quantities import QUANTITIES, Number
from apex_quant.report.sentences import Sentences
from apex_quant.report.tokens import BadToken
from apex_quant.version import VERSION

LIMIT_BYTES: Final = 5_000_000
MOST_WORST: Final = 24
_WORST_ROWS: Final = 10
_MOST_HEAT: Final = 6000
_KEY: Final = (
    ("b1", "1"), ("b2", "2"), ("b3", "3"), ("b4", "4"), ("b5", "5"), ("b6", "6"), ("b8", "7 to 9"),
    ("b16", "F: 16, 32"),
)  # fmt: skip
_CONTENTS: Final = (
    ("summary", "What was shown", None), ("which", "Which file?", "chooser"), ("files", "Files", None),
    ("plots", "Plots", "figures"), ("precision", "Precision map", "maps"), ("experts", "Experts", "coverage"),
    ("worst", "Worst tokens", "worst"), ("run", "Commands", None), ("missing", "Not measured", None),
    ("proof", "Hashes and versions", None),
)  # fmt: skip
_LIMITS: Final = (
    "Intervals are about the text and tasks that were scored; other languages, domains and longer contexts may order "
    "files differently.",
    "Quantized KV caches, other backends and other builds of llama.cpp change results; only what is listed under "
    "“Measured with” was run.",
    "No difference shown is not shown to be equal.",
)


def render(gathered: Gathered, found: Sentences, pairs: Pairs, *, pictures: Sequence[str] = ()) -> str:
    """The page. `found`: what may be said; `pairs`: comparisons made so far; `pictures`: names of plots beside it, of
    which those for a dark ground have no link of their own."""
    sources = Sources(gathered.entries)
    css, js = (_asset(name) for name in ("style.css", "script.js"))
    headers = {entry.label: header(entry.gguf) for entry in gathered.entries}
    precision = precision_data(gathered)
    memory = Memory(gathered.entries)
    chooser = chooser_data(gathered, sources, pairs, memory)
    view: dict[str, Any] = {
        "version": VERSION,
        "css": Markup(css),
        "js": Markup(js),
        "css_hash": _policy_hash(css),
        "js_hash": _policy_hash(js),
        "title": _title(gathered),
        "subtitle": _subtitle(gathered),
        "metric": QUANTITIES[found.key].title if found.key else "divergence",
        "claims": found.claims,
        "ties": found.ties,
        "refused": found.refused,
        "caution": found.caution,
        "no_claims": no_claims(found),
        "front": [_on_front(entry, number, str(found.key), sources) for entry, number in found.front],
        "chooser": chooser,
        "contexts": CONTEXTS,
        "trained": memory.trained,
        "caches": CACHES,
        **_table(gathered, sources),
        "figures": figures(gathered, sources),
        "families": gathered.families,
        "mark": mark_of,
        "pictures": [name for name in pictures if not re.search(r"-dark\.\w+$", name)],
        "maps": [one["label"] for one in precision["maps"]],
        "key": _KEY,
        "type_tables": [_types(entry) for entry in gathered.entries if entry.precision is not None],
        "coverage": [_coverage(one) for one in gathered.coverage],
        **_worst(gathered),
        "commands": [_commands(entry, headers[entry.label], memory.usual_ctx()) for entry in gathered.entries],
        "command_note": "Paths are file names; how a file was made stands in its header as hashes, and commands follow "
        "from what header and results state.",
        "not_measured": [(entry.label, ", ".join(entry.not_measured()) or "nothing") for entry in gathered.entries],
        "limits": _LIMITS,
        "sources": [
            _source(sources, entry, number) for entry in gathered.entries for number in range(len(entry.files))
        ],
        "proofs": [_proof(entry, headers[entry.label]) for entry in gathered.entries],
        "measured_with": _measured_with(gathered),
    }
    view["missing"] = missing_lines(gathered)  # after all that reads: it grows
    view["contents"] = [(place, heading) for place, heading, needs in _CONTENTS if needs is None or view[needs]]
    view["data"] = Markup(_json({**precision, "chooser": chooser}))
    page: str = _environment().from_string(_asset("report.html.j2")).render(view)
    return page


def no_claims(found: Sentences) -> str:
    """What to say instead of claims."""
    if found.key is None:
        return "Neither divergence nor perplexity was measured, so no file can be called better than another."
    if found.files < 2:
        return "Only one file was measured." if found.files else "No file but the reference was measured."
    if not found.asked:
        return (
            "Each file that is larger than another has the lower "
            f"{QUANTITIES[found.key].title}: none is better at no more bytes."
        )
    if not found.ties and found.refused:
        return "No two files could be compared on the same tokens, so none is called better than another."
    return f"No file has shown lower {QUANTITIES[found.key].title} than another one at no more bytes."


def _environment() -> Any:
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)


def _asset(name: str) -> str:
    return (resources.files("apex_quant.report") / "page" / name).read_text(encoding="utf-8")


def _policy_hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(document: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(document, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(gathered: Gathered) -> str:
    name = one_line(model_name(gathered), 80)
    return f"Quantized files of {name}" if name else "Quantized files"


def _subtitle(gathered: Gathered) -> str:
    count = len(gathered.entries)
    architectures = sorted({entry.results.model.architecture or "" for entry in gathered.entries} - {""})
    parts = [f"{count} file{'s' if count != 1 else ''}"]
    parts += [", ".join(one_line(name, 40) for name in architectures)] if architectures else []
    reference = gathered.about_reference or {}
    if reference.get("sha256") or reference.get("model_sha256"):
        parts.append(f"reference sha256 {str(reference.get('model_sha256') or reference.get('sha256'))[:16]}…")
    return "; ".join(parts)


def _table(gathered: Gathered, sources: Sources) -> dict[str, Any]:
    """Columns, rows and what must be known of them."""
    entries = gathered.entries
    keys = measured(entries)
    unit = bytes_unit(entry.bytes or 0 for entry in entries)
    columns = [
        {"title": "File", "kind": "text", "sorted": False},
        {"title": "Family", "kind": "text", "sorted": False},
        {"title": f"Size, {unit[1]}", "kind": "number", "sorted": True},
    ]
    bits = (
        [{"title": "bpw", "kind": "number", "sorted": False}] if any(entry.bpw is not None for entry in entries) else []
    )
    columns += bits
    columns += [{"title": _heading(key), "kind": "number", "sorted": False} for key in keys]
    rows, held = [], set()
    for entry in entries:
        cells = [size_cell(entry, unit, sources), *(bpw_cell(entry, sources) for _ in bits)]
        cells += [cell(entry, key, sources) for key in keys]
        held |= {one.held for one in cells if one.held}
        name = entry.label + (" (reference)" if entry.is_reference else "")
        rows.append({"label": name, "file_name": entry.file_name, "family": entry.family, "cells": cells})
    notes = [f"± is {text.removeprefix('± ')}." for text in sorted(held) if text.startswith("±")]
    tests = sorted(
        {f"{key}: {number.test}" for entry in entries for key in ("pp", "tg") if (number := entry.number(key))}
    )
    notes += ["Speed tests: " + ", ".join(tests) + "."] if tests else []
    return {"columns": columns, "rows": rows, "column_notes": notes}


def _heading(key: str) -> str:
    axis = QUANTITIES[key].axis
    return axis[0].upper() + axis[1:]


def _on_front(entry: Entry, number: Number, key: str, sources: Sources) -> tuple[str, str, Cell]:
    return entry.label, entry.family, cell_of(number, key, sources.name(entry.source_of(key)))


def _types(entry: Entry) -> dict[str, Any]:
    assert entry.precision is not None
    groups: dict[str, list[int]] = {}
    for one in entry.precision.tensors:
        groups.setdefault(one.type, []).append(one.bytes)
    total = sum(map(sum, groups.values())) or 1
    rows = [
        (name, len(sizes), f"{sum(sizes) / 1e6:.2f}", f"{100 * sum(sizes) / total:.1f}")
        for name, sizes in sorted(groups.items(), key=lambda row: -sum(row[1]))
    ]
    return {"label": entry.label, "rows": rows}


def _coverage(found: Coverage) -> dict[str, Any]:
    thin = sum(len(layer.uncovered) for layer in found.layers)
    every = sum(len(layer.tokens) for layer in found.layers)
    text = f"{every - thin:,} of {every:,} experts in {len(found.layers)} layers saw at least {found.floor} tokens" + (
        f"; {thin:,} did not and are named below." if thin else "."
    )
    text += " Rows are layers, cells are experts; each shade darker is ten times fewer tokens."
    if found.datasets:
        text += f" Calibrated on {', '.join(one_line(name, 60) for name in found.datasets[:5])}."
    rows = []
    for layer in found.layers:
        tokens = sorted(layer.tokens)
        named = ", ".join(map(str, layer.uncovered[:40])) + (" …" if len(layer.uncovered) > 40 else "")
        rows.append((layer.layer, len(tokens), tokens[0], tokens[len(tokens) // 2], tokens[-1], named or "none"))
    heat = _heat(found) if every <= _MOST_HEAT else None
    return {"source": found.source, "text": text, "rows": rows, "floor": found.floor, "heat": heat}


def _heat(found: Coverage) -> Markup:
    """Tokens of each expert: rows are layers, one cell for an expert; darker for fewer, by decades."""
    width = max(len(layer.tokens) for layer in found.layers)
    side = max(3, min(14, 900 // max(width, 1)))
    parts = []
    for y, layer in enumerate(found.layers):
        for x, tokens in enumerate(layer.tokens):
            kind = (1, 2, 3, 4, 5, 6, 8, 16)[min(7, int(math.log10(tokens)) + 1) if tokens > 0 else 0]
            box = Markup('<rect class="h{}" x="{}" y="{}" width="{}" height="{}"/>')
            parts.append(box.format(kind, x * side, y * side, side - 1, side - 1))
    says = f"{len(found.layers)} layers by {width} experts; the table below has the numbers"
    head = Markup('<svg class="heat" role="img" aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">')
    sizes = (width * side, len(found.layers) * side)
    return head.format(says, *sizes, *sizes) + Markup("").join(parts) + Markup("</svg>")


def _worst(gathered: Gathered) -> dict[str, Any]:
    entries = [entry for entry in gathered.entries if entry.number("kld") is not None and not entry.is_reference]
    rows = []
    for entry in entries[:MOST_WORST]:
        if entry.worst:
            first = entry.worst[0]
            summary = f"largest KLD {first.kld:.3g}" + ("" if first.text is not None else " (no vocabulary at hand)")
            tokens = [_bad(token) for token in entry.worst[:_WORST_ROWS]]
            rows.append({"label": entry.label, "summary": summary, "rows": tokens})
            continue
        largest = entry.source_of("kld").metrics.get("kld", {}).get("max")
        if isinstance(largest, dict) and isinstance(largest.get("value"), int | float) and "context" in largest:
            one = {
                "kld": f"{largest['value']:.3g}", "reference": "–", "own": "–",
                "domain": str(largest.get("domain") or ""),
                "place": f"chunk {largest.get('chunk')}, position {largest.get('position')}",
                "context": str(largest["context"])[-300:], "text": str(largest.get("token"))[:80],
            }  # fmt: skip
            rows.append({"label": entry.label, "summary": f"largest KLD {largest['value']:.3g}", "rows": [one]})
    left = len(entries) - MOST_WORST
    return {
        "worst": rows,
        "worst_left": f"{left} more files are left out here; their results files have the tokens." if left > 0 else "",
    }


def _bad(token: BadToken) -> dict[str, str]:
    def probability(nll: float | None) -> str:
        return "–" if nll is None or not nll > -1e-3 else f"{math.exp(-nll):.2g}"

    return {
        "kld": f"{token.kld:.3g}",
        "reference": probability(token.ref_nll),
        "own": probability(token.nll),
        "domain": token.domain or "",
        "place": f"chunk {token.chunk}, position {token.position}",
        "context": token.context or "",
        "text": token.text if token.text is not None else f"token {token.token}",
    }


def _commands(entry: Entry, found: Header | None, ctx: int) -> dict[str, Any]:
    blocks: list[tuple[str, list[str]]] = []
    if entry.file_name.endswith(".gguf"):
        blocks.append(("Run", [run_command(entry.file_name, ctx)]))
    made = quantize_command(entry, found)
    blocks += [("Make", [made])] if made else []
    evaluated = eval_commands(entry)
    blocks += [("Measure", evaluated)] if evaluated else []
    if entry.imported is not None:
        said = entry.imported
        blocks.append(("Measured by others", [one_line(f"{key}: {said[key]}") for key in said]))
    return {"label": entry.label, "file_name": entry.file_name, "blocks": blocks or [("", ["nothing is known"])]}


def _source(sources: Sources, entry: Entry, number: int) -> dict[str, str]:
    source, file = entry.sources[number], entry.files[number]
    digest = "not a file"
    if source.path is not None:
        try:
            digest = hashlib.sha256(read_bounded(source.path, MAX_BYTES, "results")).hexdigest()
        except ApexError:
            digest = "cannot be read any more"
    return {"name": sources.name(source), "file": file, "model": entry.label, "sha256": digest}


def _proof(entry: Entry, found: Header | None) -> dict[str, Any]:
    facts = list(found.facts.items()) if found is not None else []
    recipe = entry.results.model.recipe_sha256
    if not facts:
        facts = [("recipe, sha256", recipe)] if recipe else []
        facts.append(("header", "not at hand"))
    return {"file_name": entry.file_name, "sha256": entry.sha256 or "not stated", "facts": facts}


def _measured_with(gathered: Gathered) -> list[str]:
    """Each environment once, with the files it is of."""
    groups: dict[str, list[str]] = {}
    for entry in gathered.entries:
        known = versions(entry)
        text = "; ".join(f"{name}: {_plain(value)}" for name, value in known.items()) or "versions not stated"
        groups.setdefault(text, []).append(entry.label)
    return [f"{one_line(text)} ({_names(labels)})" for text, labels in groups.items()]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(labels: Iterable[str]) -> str:
    every = list(labels)
    return ", ".join(every[:12]) + (f" and {len(every) - 12} more" if len(every) > 12 else "")


__all__ = ["LIMIT_BYTES", "no_claims", "render"]
