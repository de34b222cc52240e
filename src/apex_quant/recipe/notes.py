"""What a plan warns of: everything in it that its user did not ask for by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from apex_quant.gguf import TensorInfo
from apex_quant.importance import Entry, Importance
from apex_quant.importance.fill import NO_PRIOR, is_expert, parse_prior, prior_of
from apex_quant.model import Role
from apex_quant.recipe.planned import PlannedTensor


def type_notes(tensors: Sequence[PlannedTensor], missing: Sequence[str], *, allow_requantize: bool) -> list[str]:
    """Fallback types, types that need importance and have none (`missing`) or were spared, experts kept in FP4."""
    notes = []
    fallen = [t for t in tensors if t.fallback_from]
    if fallen:
        size = sum(t.nbytes for t in fallen)
        pairs = Counter(f"{t.fallback_from} -> {t.type.name}" for t in fallen)
        notes.append(
            f"{len(fallen)} tensors ({size / 1e6:.1f} MB) take a fallback type because their rows are not a "
            "multiple of the block: " + ", ".join(f"{pair} ({n})" for pair, n in pairs.most_common())
        )
    if missing:
        notes.append(f"{len(missing)} tensors need an importance matrix and have none: {listed(missing, 3)}")
    spared = [t for t in tensors if t.why.startswith("no importance")]
    if spared:
        changes = [f"{t.name} ({t.why.rpartition(' ')[2]} -> {t.type.name})" for t in spared]
        notes.append(
            f"{len(spared)} tensors that calibration did not reach take a type that needs no importance: "
            + listed(changes, 20)
        )
    fp4 = [t for t in tensors if t.source_type.kind == "fp4" and t.type is t.source_type and not t.kept]
    if fp4 and not allow_requantize:
        notes.append(
            f"{len(fp4)} tensors that the source has in {fp4[0].type} are kept as they are "
            "(--allow-requantize encodes them again)"
        )
    return notes


def tier_notes(tensors: Sequence[PlannedTensor], *, is_moe: bool, published: bool) -> list[str]:
    """Where a tier's columns do not say it all: towers, dense models, unknown tensors, holes of the old files."""
    if published:
        unnamed = [t.name for t in tensors if t.why == "mix" and t.role.layer is not None]
        no_line = f"{len(unnamed)} tensors have no line in the published files and follow the base mix: "
        return [no_line + listed(unnamed, 3)] if unnamed else []
    notes = []
    towers = [t for t in tensors if t.role.role is Role.projector and t.type is t.source_type and not t.kept]
    if towers:
        notes.append(f"{len(towers)} tensors of vision or audio towers are kept as they are")
    if not is_moe and any(t.role.role is Role.dense_ffn for t in tensors):
        notes.append("a dense model: its feed-forwards follow the routed-expert column")
    other = [t.name for t in tensors if t.role.role is Role.other and not t.kept]
    if other:
        notes.append(f"{len(other)} tensors of unknown role follow the base mix: {listed(other, 3)}")
    return notes


def importance_notes(
    tensors: Sequence[PlannedTensor], sources: Mapping[str, TensorInfo], importance: Importance, fill: str
) -> list[str]:
    """Tensors and experts the matrix has nothing for, or little; `fill` as in PlanOptions.

    Raises InputError where the matrix was made for other shapes.
    """
    without: list[str] = []
    served: list[tuple[PlannedTensor, str, Entry]] = []
    for t in tensors:
        if t.type is t.source_type or t.type.imatrix == "unused":
            continue
        source = sources[t.name]
        name = importance.find(source.name)
        # fits refuses sizes that do not, unless stock forgives them
        if name is None or not importance.fits(source):
            without.append(t.name)
        else:
            served.append((t, name, importance.entries[name]))
    notes = [f"{len(without)} quantized tensors have no importance: {listed(without, 4)}"] if without else []
    return notes + _expert_notes(served, importance, fill)


def _expert_notes(served: Sequence[tuple[PlannedTensor, str, Entry]], importance: Importance, fill: str) -> list[str]:
    """Experts without tokens, with few, and without counts of their own."""
    strength = parse_prior(prior_of(importance, fill)) if importance.prior is None else None
    unweighted: dict[str, list[int]] = {}
    filled: dict[str, list[int]] = {}
    uncounted: list[str] = []
    thin = 0
    for t, name, entry in served:
        shrunk = strength is not None and is_expert(name, entry)
        rows = [i for i, count in enumerate(entry.counts) if count == 0]
        if rows:
            (filled if shrunk and len(rows) < entry.n_mat else unweighted)[t.name] = rows
        if strength is not None and shrunk:
            thin += int(((entry.counts > 0) & (entry.counts < strength)).sum())
        if entry.n_mat == 1 and t.role.expert_axis is not None:
            uncounted.append(t.name)
    notes = []
    for found, what in ((unweighted, "are encoded unweighted"), (filled, "take their tensor's mean over experts")):
        if found:
            rows_of = [f"{name}: {rows}" for name, rows in found.items()]
            notes.append(
                f"{sum(map(len, found.values()))} expert matrices in {len(found)} tensors had no calibration "
                f"tokens and {what}: {listed(rows_of, 4, separator='; ')}"
            )
    if thin:
        notes.append(
            f"{thin} expert matrices had fewer than {strength:g} tokens: their importance is for the most part their "
            "tensor's mean over experts"
        )
    if uncounted and fill != NO_PRIOR and importance.prior is None:
        notes.append(
            f"{len(uncounted)} expert tensors have no token counts per expert in the matrix"
            f"{' (a .dat file never has)' if importance.legacy else ''}, so nothing is filled: {listed(uncounted, 2)}"
        )
    return notes


def listed(names: Sequence[str], most: int, *, separator: str = ", ") -> str:
    """The first names, and a mark that there are more."""
    return separator.join(names[:most]) + (f"{separator}..." if len(names) > most else "")
