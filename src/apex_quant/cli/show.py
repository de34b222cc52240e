"""What people see: tables and the heat map of a plan. Nothing here computes anything that is not shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apex_quant.cli import one_line, safe
from apex_quant.doctor import Diagnosis
from apex_quant.encode.diff import Difference
from apex_quant.encode.quantize import Quantized
from apex_quant.encode.verify import Verification
from apex_quant.model import Role
from apex_quant.model.inspect import ModelReport, Usage
from apex_quant.recipe.planned import Plan, PlannedTensor
from apex_quant.recipe.tiers import Tier

# Bits per weight to colour: few bits are warm, many are cool; readable on dark and light backgrounds alike
# because the digit itself is always shown.
_COLOURS = ((2.0, "red3"), (2.8, "dark_orange3"), (3.6, "gold3"), (4.6, "green4"), (5.6, "dark_cyan"), (7.0, "blue3"))
_TOP = "purple3"


def human(size: float) -> str:
    """Bytes in decimal units, as file sizes are published."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def table(title: str | None, *columns: str) -> Table:
    """A table whose columns are right-aligned when their heading starts with '>'."""
    whole = None if title is None else Text.from_markup(title, overflow="ignore")
    if whole is not None:
        whole.no_wrap = True  # a title may be wider than its table
    made = Table(title=whole, title_justify="left", header_style="bold", pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        made.add_column(column.lstrip(">"), justify=justify, overflow="fold")
    return made


def _colour(bpw: float) -> str:
    return next((colour for limit, colour in _COLOURS if bpw < limit), _TOP)


def heat_map(tensors: Iterable[PlannedTensor], width: int) -> Table:
    """Bits by part and layer: one digit a layer, whole bits per weight (6 for Q6_K); '·' where a layer has none."""
    rows: dict[tuple[str, str], dict[int, float]] = {}
    layers = 0
    for tensor in tensors:
        if tensor.role.layer is None or tensor.kept or tensor.role.role is Role.projector:
            continue
        layers = max(layers, tensor.role.layer + 1)
        rows.setdefault((str(tensor.role.role), tensor.role.part), {})[tensor.role.layer] = tensor.type.bpw
    made = table("bits per weight by layer (left to right)", "role", "part", "layers")
    step = max(10, width - 44)
    for (role, part), bits in sorted(rows.items(), key=lambda item: (list(Role).index(Role(item[0][0])), item[0][1])):
        line = Text()
        for layer in range(layers):
            if layer and layer % step == 0:
                line.append("\n")
            bpw = bits.get(layer)
            line.append(
                "·" if bpw is None else str(int(bpw)) if bpw < 10 else "F",
                style="dim" if bpw is None else f"bold white on {_colour(bpw)}",
            )
        made.add_row(role, safe(part), line)
    return made


def show_plan(console: Console, plan: Plan) -> None:
    """Roles and zones, what is kept, every fallback, the heat map, size and warnings."""
    console.print(f"[bold]{safe(plan.file_name)}[/]: tier {safe(plan.tier)} on base {plan.recipe.base}")
    if plan.zones is not None:
        console.print(f"[dim]{plan.zones}[/]")
    console.print(_by_role(plan))
    kept = _kept(plan)
    if kept.row_count:
        console.print(kept)
    fallen = [t for t in plan.tensors if t.fallback_from]
    if fallen:
        made = table("fallbacks", "tensor", ">row length", "wanted", "gets", ">size")
        for t in fallen[:40]:
            made.add_row(safe(t.name), str(t.shape[0]), t.fallback_from, t.type.name, human(t.nbytes))
        if len(fallen) > 40:
            made.add_row(f"... and {len(fallen) - 40} more (--json lists all)", "", "", "", "")
        console.print(made)
    console.print(heat_map(plan.tensors, console.width))
    size = f"{plan.total_bytes} bytes ({human(plan.total_bytes)}), {plan.bpw:.3f} bits per weight"
    shards = f" in {len(plan.layouts)} shards" if len(plan.layouts) > 1 else ""
    console.print(f"[bold]total {size}{shards}[/]")
    show_warnings(console, plan.warnings)


def _zone(plan: Plan, tensor: PlannedTensor) -> str:
    layer, zones = tensor.role.layer, plan.zones
    if layer is None or zones is None:
        return ""
    if tensor.role.role in (Role.attention, Role.ssm, Role.nextn):
        return zones.attention_zone(layer)
    return zones.expert_zone(layer)


def _by_role(plan: Plan) -> Table:
    groups: dict[tuple[int, str, str], list[PlannedTensor]] = {}
    order = list(Role)
    zones = ["", "edge", "near", "middle"]
    for tensor in plan.tensors:
        if not tensor.kept:
            zone = _zone(plan, tensor)
            groups.setdefault((order.index(tensor.role.role), str(zones.index(zone)), zone), []).append(tensor)
    made = table(None, "role", "zone", ">tensors", "types", ">size", ">bpw", ">share")
    total = max(1, plan.tensor_bytes)
    for (role, _, zone), members in sorted(groups.items()):
        size, weights = sum(t.nbytes for t in members), sum(t.weights for t in members)
        types = " ".join(dict.fromkeys(t.type.name for t in members))
        made.add_row(
            order[role].value, zone, str(len(members)), types, human(size), f"{size * 8 / weights:.2f}",
            f"{size / total:.1%}",
        )  # fmt: skip
    return made


def _kept(plan: Plan) -> Table:
    reasons: dict[tuple[str, str], list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.kept:
            reasons.setdefault((tensor.why.removeprefix("kept: "), tensor.type.name), []).append(tensor)
    made = table("kept as in the source", "why", "type", ">tensors", ">size")
    for (why, kind), members in sorted(reasons.items()):
        made.add_row(safe(why), kind, str(len(members)), human(sum(t.nbytes for t in members)))
    return made


def show_warnings(console: Console, warnings: Sequence[str]) -> None:
    """One line each."""
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {safe(warning)}")


def show_tiers(console: Console, tiers: Sequence[Tier]) -> None:
    """The published tiers as a table of cells."""
    made = table(None, "tier", "routed edge/near/middle", "shared", "attention", "base", "imatrix")
    for tier in tiers:
        routed, shared, attention = tier.routed, tier.shared, tier.attention
        made.add_row(
            "=".join((tier.name, *tier.aliases)),
            f"{routed.edge}/{routed.near}/{routed.middle}",
            shared.edge if shared.edge == shared.middle else f"{shared.edge}/{shared.middle}",
            attention.edge if attention.edge == attention.middle else f"{attention.edge}/{attention.middle}",
            tier.base,
            "needed" if tier.importance == "required" else "unused" if tier.importance == "none" else "optional",
        )
    console.print(made)
    console.print("[dim]Every llama-quantize mix (Q4_K_M, IQ4_XS, ...) and a .toml file of your own work too.[/]")


def show_fit(console: Console, plans: Sequence[Plan], limit: int) -> None:
    """Which plans fit into `limit` bytes; weights only."""
    made = table(f"weights within {human(limit)} (the KV cache and buffers come on top)", "tier", ">size", ">bpw", "")
    for plan in sorted(plans, key=lambda one: -one.total_bytes):
        fits = plan.total_bytes <= limit
        made.add_row(
            plan.tier, human(plan.total_bytes), f"{plan.bpw:.2f}", "[green]fits[/]" if fits else "[dim]too large[/]"
        )
    console.print(made)


def show_outputs(console: Console, result: Quantized) -> None:
    """The finished files and the counters of the pass."""
    made = table(None, "tier", ">size", ">bpw", ">time", "file")
    for output in result.outputs:
        made.add_row(
            output.tier,
            human(output.bytes),
            f"{output.bpw:.3f}",
            "unchanged" if output.unchanged else f"{output.seconds:.1f} s",
            safe(str(output.path)),
        )
    console.print(made)
    for output in result.outputs:
        show_warnings(console, [f"{output.tier}: {text}" for text in output.plan.warnings])
    if result.job is not None:
        console.print(
            f"[dim]{result.seconds:.1f} s, {human(result.job.bytes_read)} of source read, "
            f"{result.job.rows_encoded} rows encoded[/]"
        )


def show_inspection(console: Console, report: ModelReport) -> None:
    """A model at a glance."""
    name = report.name or report.path
    console.print(f"[bold]{safe(name)}[/]  {safe(report.architecture)}, GGUF v{report.gguf_version}")
    facts = [
        f"{report.parameters / 1e6:,.1f} M parameters, {report.active_parameters / 1e6:,.1f} M active",
        f"{report.layers} layers" + (f" + {report.nextn_layers} NextN" if report.nextn_layers else ""),
        f"embedding {report.embedding_length}",
    ]
    if report.experts:
        used = "/".join(map(str, report.experts_used))
        facts.append(f"{report.experts} experts, {used} used")
    if report.context_length:
        facts.append(f"context {report.context_length}")
    if report.vocabulary:
        facts.append(f"vocabulary {report.vocabulary}" + (" (tied)" if report.tied_embeddings else ""))
    console.print(safe("; ".join(facts)))
    console.print(f"{human(report.file_bytes)} in {report.files} file(s), {report.bpw:.3f} bits per weight")
    console.print(_usage("roles", report.roles))
    console.print(_usage("types", report.types))
    if report.tensors is not None:
        made = table("tensors", "name", "role", ">layer", "shape", "type", ">size")
        for t in report.tensors:
            layer = "" if t.layer is None else str(t.layer)
            made.add_row(safe(t.name), t.role.value, layer, " x ".join(map(str, t.shape)), t.type, human(t.bytes))
        console.print(made)
    if report.statistics is not None:
        made = table(
            "weights by role", "role", ">weights", ">std", ">kurtosis", ">per tensor", ">max |w|", ">not finite"
        )
        for row in report.statistics.roles:
            made.add_row(
                row.role.value, f"{row.n:,}", f"{row.std:.5f}", f"{row.kurtosis:.2f}", f"{row.tensor_kurtosis:.2f}",
                f"{row.max_abs:.4f}", str(row.nonfinite),
            )  # fmt: skip
        console.print(made)
        console.print("[dim]kurtosis 3 is Gaussian; 'per tensor' is the mean over single tensors[/]")
        for skipped in report.statistics.skipped:
            console.print(f"[dim]no statistics of {safe(skipped.name)}: {safe(skipped.reason)}[/]")
    made = table("metadata", "key", "value")
    for key, value in report.metadata.items():
        made.add_row(safe(key), safe(_short(str(value))))
    console.print(made)


def _short(text: str) -> str:
    flat = one_line(text)
    return flat if len(flat) <= 80 else flat[:77] + "..."


def _usage(title: str, rows: Sequence[Usage]) -> Table:
    made = table(title, "name", ">tensors", ">parameters", ">size", ">bpw", ">share")
    for row in rows:
        made.add_row(
            row.name, str(row.tensors), f"{row.parameters:,}", human(row.bytes), f"{row.bpw:.2f}", f"{row.share:.1%}"
        )
    return made


def show_verification(console: Console, result: Verification) -> None:
    """Each check with its verdict, then the tensors that differ."""
    marks = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[dim]not checked[/]"}
    made = table(safe(result.path), "check", "", "")
    for check in result.checks:
        made.add_row(check.name, marks[check.ok], safe(check.detail))
    console.print(made)
    if result.differences:
        made = table("tensors that differ", "tensor", "type", ">bytes different", ">of", ">first row")
        for row in result.differences[:40]:
            made.add_row(
                safe(row["tensor"]),
                row["type"],
                str(row["bytes_different"]),
                str(row["bytes"]),
                str(row["first_row"]),
            )
        console.print(made)


def show_difference(console: Console, found: Difference) -> None:
    """Metadata, then tensors."""
    console.print(f"a {safe(found.a)} {human(found.bytes_a)}\nb {safe(found.b)} {human(found.bytes_b)}")
    if found.metadata:
        made = table("metadata", "key", "a", "b")
        for key, a, b in found.metadata:
            made.add_row(safe(key), *(safe(_short(v)) if v is not None else "[dim]-[/]" for v in (a, b)))
        console.print(made)
    if found.tensors:
        made = table("tensors", "name", "a", "b", ">size a", ">size b", "data", ">error")
        for t in found.tensors:
            data = "" if t.same_data is None else "differs"
            made.add_row(
                safe(t.name), t.type_a or "-", t.type_b or "-", human(t.bytes_a), human(t.bytes_b),
                data if t.same_shape else "shape differs", "" if t.error is None else f"{t.error:.5f}",
            )  # fmt: skip
        console.print(made)
    console.print(f"{found.tensors_equal} tensors are equal, {len(found.tensors)} differ")


def show_diagnosis(console: Console, found: Diagnosis) -> None:
    """The doctor's findings: facts, then what is missing and how to get it."""
    made = table(None, "", "")
    made.show_header = False
    for key, value in found.facts():
        made.add_row(key, safe(value))
    console.print(made)
    for problem in found.problems:
        console.print(f"[yellow]missing:[/] {safe(problem.what)}\n  [dim]{safe(problem.cure)}[/]")
    if not found.problems:
        console.print("[green]everything is there[/]")
