"""The plan of one output: the type of every tensor and why, every fallback, and the size to the byte.

A plan needs the source's header and nothing else: no tensor data, no library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import (
    GGMLType,
    GGUFModel,
    Layout,
    TensorInfo,
    TensorSpec,
    Value,
    ggml_type,
    layout,
    open_model,
    shard_groups,
    shard_layouts,
    stock_order,
)
from apex_quant.importance import Importance
from apex_quant.importance.fill import NO_PRIOR, RULES, prior_of
from apex_quant.model import Role, ZoneRule, classify, facts_of, zone_rule
from apex_quant.recipe.label import and_more, base_of_types
from apex_quant.recipe.metadata import PRUNED_LAYERS, display_name, output_metadata, parse_kv_override
from apex_quant.recipe.mixes import (
    MIXES,
    Choice,
    Override,
    allows_quantization,
    mix_name,
    requires_imatrix,
    stock_types,
)
from apex_quant.recipe.notes import importance_notes, listed, tier_notes, type_notes
from apex_quant.recipe.planned import Plan, PlannedTensor, PlanOptions
from apex_quant.recipe.pruning import pruned_metadata, pruned_names
from apex_quant.recipe.recipe import (
    Recipe,
    first_matches,
    match_overrides,
    parse_override,
    read_recipe,
    recipe_of,
)
from apex_quant.recipe.stock_rules import category
from apex_quant.recipe.tiers import Tier, find_tier, published_lines, with_cells
from apex_quant.recipe.unreached import spare

_DEFAULTS = PlanOptions()


def plan(
    model: str | Path | GGUFModel,
    tier: str | Tier | None = None,
    *,
    imatrix: str | Path | Importance | None = None,
    options: PlanOptions = _DEFAULTS,
) -> Plan:
    """Decide one output of `model` (a path or an open model).

    `tier` is a published tier, a .toml file, a `Tier`, or a llama-quantize mix such as Q4_K_M; None takes the
    types from options.recipe or options.like alone. `imatrix` matters for the size of the header, for mixes that
    differ with one, and for what is reported as missing.

    Raises UsageError for options that contradict each other, InputError for files that do not fit.
    """
    if not isinstance(model, GGUFModel):
        with open_model(model) as opened:
            return plan(opened, tier, imatrix=imatrix, options=options)
    if imatrix is not None and not isinstance(imatrix, Importance):
        with Importance.read(imatrix) as read:
            return plan(model, tier, imatrix=read, options=options)
    return _Planner(model, tier, imatrix, options).plan()


class _Planner:
    """One call of `plan`: the steps share the model's facts and the source under its new names."""

    def __init__(
        self, model: GGUFModel, tier: str | Tier | None, imatrix: Importance | None, options: PlanOptions
    ) -> None:
        self.model, self.options = model, options
        self.metadata = dict(model.metadata) | dict(parse_kv_override(text) for text in options.override_kv)
        self.stock_facts = facts_of(self.metadata, model.architecture, model.tensors, str(model.path))
        self.sources = self._renamed()
        self.facts = self.stock_facts
        if options.prune_layers:
            self.metadata = pruned_metadata(self.metadata, self.stock_facts, options.prune_layers)
            self.facts = facts_of(self.metadata, model.architecture, self.sources, str(model.path))
        self.tier = find_tier(tier) if isinstance(tier, str) else tier
        if self.tier is None and (options.cell or options.published):
            flag = "--cell" if options.cell else "--published"
            raise UsageError(f"{flag} concerns a tier's table: give --tier with it")
        # the alias the user typed, so that i-mini makes an I-Mini file
        alias = tier.lower() if isinstance(tier, str) and self.tier and tier.lower() in self.tier.aliases else None
        if self.tier is not None:
            self.tier = with_cells(self.tier, options.cell)
        mix = self.tier.base if self.tier else tier
        self.base = mix_name(mix) if isinstance(mix, str) else None
        # never as it was typed: it goes into the metadata, which equal plans must have equal
        self.label: str | None = self.base
        if self.tier is not None:
            self.label = self.tier.name if options.cell else alias or self.tier.name
        wants = self.tier.importance if self.tier else "optional"
        self.importance = None if wants == "none" else imatrix
        if options.fill not in RULES:
            raise UsageError(f"--fill {options.fill!r}: choose {' or '.join(RULES)}")
        self.prior = NO_PRIOR if self.importance is None else prior_of(self.importance, options.fill)
        self.warnings: list[str] = []
        if wants == "none" and imatrix is not None and self.tier is not None:
            self.warnings.append(f"tier {self.tier.name} is encoded without importance: the matrix is not used")
        trunk = self.facts.trunk_layers
        self.zones = None
        if self.tier is not None:
            self.zones = ZoneRule("published", trunk, 5, 5, 3) if options.published else zone_rule(trunk)
        self.roles = {
            name: classify(name, info.shape, model.architecture, trunk_layers=trunk)
            for name, info in self.sources.items()
        }

    def _renamed(self) -> dict[str, TensorInfo]:
        """New name -> source tensor, in the order of writing, with pruned layers gone and the rest renumbered."""
        tensors, gone = self.model.tensors, self.options.prune_layers
        if self.options.keep_split:
            if gone:
                raise UsageError("--prune-layers cannot be combined with --keep-split")
            order = sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].offset))
            return {name: tensors[name] for name in order}
        order = stock_order(tensors)
        names = pruned_names(order, gone) if gone else {name: name for name in order}
        return {new: tensors[name] for name, new in names.items()}

    # --- types ---

    def _tier_types(self) -> dict[str, GGMLType]:
        """The types that the tier's columns give."""
        options, names = self.options, list(self.sources)
        manual: dict[str, GGMLType] = {}
        if self.tier is not None and options.published:
            manual = match_overrides(published_lines(self.tier, self.facts.trunk_layers), names)
        elif self.tier is not None and self.zones is not None:
            for name, role in self.roles.items():
                kind = self.tier.type_of(role, self.facts, self.zones)
                if role.role is Role.projector:
                    kind = self.sources[name].type  # towers are kept as they are
                if kind is not None:
                    manual[name] = kind
        if not options.allow_requantize:
            # experts that the model was trained with in MXFP4 or NVFP4 stay as they are unless asked
            manual |= {name: info.type for name, info in self.sources.items() if info.type.kind == "fp4"}
        return manual

    def _asked_types(self) -> dict[str, GGMLType]:
        """The types that the user named: overrides, then recipe, then --like."""
        options, names = self.options, list(self.sources)
        asked: dict[str, GGMLType] = {}
        if options.like is not None:
            with open_model(options.like) as other:
                asked |= self._like(other, names)
        if options.recipe is not None:
            asked |= self._matched(read_recipe(options.recipe), names, str(options.recipe))
        own: list[Override] = [parse_override(text, lower=False) for text in options.override]
        return asked | self._matched(own, names, "--override")

    def _matched(self, overrides: Sequence[Override], names: list[str], where: str) -> dict[str, GGMLType]:
        places = first_matches(overrides, names)
        used = set(places.values())
        unused = [pattern for place, (pattern, _) in enumerate(overrides) if place not in used]
        if unused:
            self.warnings.append(
                f"{where}: {len(unused)} of {len(overrides)} patterns decide no tensor, having no match of their own: "
                + listed(unused, 3)
            )
        return {name: overrides[place][1] for name, place in places.items()}

    def _like(self, other: GGUFModel, names: list[str]) -> dict[str, GGMLType]:
        def fits(name: str) -> bool:
            return name in other.tensors and other.tensors[name].shape == self.sources[name].shape

        wrong = [name for name in names if not fits(name)]
        if wrong:
            raise InputError(
                f"{self.options.like} has no {wrong[0]} of this shape" + and_more(wrong),
                hint="--like wants a file of the same model",
            )
        types = recipe_of(other)
        return {name: types[name] for name in names}

    def _choices(self, manual: Mapping[str, GGMLType], base: str) -> list[Choice]:
        options = self.options
        specs = [TensorSpec(name, info.shape, info.type) for name, info in self.sources.items()]
        return stock_types(
            self.stock_facts,
            specs,
            base,
            manual=manual,
            keep_order=True,
            has_imatrix=self.importance is not None,
            pure=options.pure,
            output_type=_asked_type(options.output_tensor_type),
            embedding_type=_asked_type(options.token_embedding_type),
            leave_output=options.leave_output_tensor,
        )

    def _base_or_error(self, manual: Mapping[str, GGMLType]) -> str:
        options = self.options
        if self.base is not None:
            if (options.recipe or options.like or options.override) and not MIXES[self.base].default.is_quantized:
                raise UsageError(f"llama-quantize takes no types for single tensors with the mix {self.base}")
            return self.base
        if not (options.recipe or options.like or options.override):
            raise UsageError("nothing says which types to use", hint="give --tier, --recipe or --like")
        return base_of_types(self.sources, manual, self.model.architecture, options)

    # --- the plan ---

    def plan(self) -> Plan:
        asked = self._asked_types()
        manual = self._tier_types() | asked  # the rest is the base mix's to decide
        base = self._base_or_error(manual)
        choices = spare(self._choices(manual, base), base, lambda name: name not in asked and self._unreached(name))
        tensors = tuple(self._planned(choice) for choice in choices)
        # also what was left on request: a recipe says the type of all that could be quantized, and verify checks that
        arch = self.model.architecture
        quantized = {t.name: t.type for t in tensors if allows_quantization(t.name, t.shape, arch)}
        recipe = Recipe(base, quantized)
        file_type = MIXES[base].ftype
        encodes = any(t.type is not t.source_type for t in tensors)
        if not encodes:  # COPY, projector files
            file_type = self.stock_facts.file_type or file_type
        label = self.label or ("like" if self.options.like else "custom")
        importance = self.importance
        wants = self.tier.importance if self.tier else "optional"
        metadata = output_metadata(
            self.model,
            self.metadata,
            recipe,
            file_type=file_type,
            tier=label,
            zones=str(self.zones) if self.zones else "none",
            types=[t.type for t in tensors],
            importance=importance,
            prior=self.prior,
        )
        if self.options.prune_layers:
            layers = sorted(set(self.options.prune_layers))
            metadata[PRUNED_LAYERS] = Value.string(",".join(map(str, layers)))
        specs = [TensorSpec(t.name, t.shape, t.type) for t in tensors]
        groups, layouts = self._layouts(metadata, specs)
        missing = self._missing_importance(tensors, base)
        requantized = tuple(t.name for t in tensors if t.type is not t.source_type and t.source_type.is_quantized)
        return Plan(
            model=display_name(self.model),
            title=self._title(),
            tier=label,
            file_type=file_type,
            zones=self.zones,
            recipe=recipe,
            tensors=tensors,
            layouts=tuple(layouts),
            groups=tuple(groups),
            importance=importance is not None,
            prior=self.prior,
            needs_importance=encodes and importance is None and wants == "required",
            missing_importance=missing,
            requantized=requantized,
            warnings=(*self.warnings, *self._notes(tensors, missing)),
        )

    def _title(self) -> str:
        options = self.options
        custom = bool(options.override or options.recipe or options.like)
        if self.tier is not None:
            return f"APEX-{self.tier.title(self.label)}" + "-Custom" * (custom and not options.cell)
        return "APEX-Custom" if custom or self.base is None else self.base

    def _planned(self, choice: Choice) -> PlannedTensor:
        info = self.sources[choice.name]
        if info.shape[0] % choice.type.block:  # asked for by name: llama-quantize has no fallback for these
            raise UsageError(
                f"{choice.name} cannot be {choice.type}: its rows of {info.shape[0]} weights are no multiple of "
                f"{choice.type.block}",
                hint="choose a type with blocks of 32, such as Q8_0",
            )
        spec = TensorSpec(choice.name, info.shape, choice.type)
        return PlannedTensor(
            name=choice.name,
            source=info.name,
            role=self.roles[choice.name],
            shape=info.shape,
            source_type=info.type,
            type=choice.type,
            wanted=choice.wanted,
            nbytes=spec.nbytes,
            why=f"{choice.why}: {choice.detail}" if choice.detail else choice.why,
        )

    def _notes(self, tensors: Sequence[PlannedTensor], missing: Sequence[str]) -> list[str]:
        notes = type_notes(tensors, missing, allow_requantize=self.options.allow_requantize)
        if self.tier is not None:
            notes += tier_notes(tensors, is_moe=self.facts.is_moe, published=self.options.published)
        if self.importance is not None:
            notes += importance_notes(tensors, self.sources, self.importance, self.options.fill)
        return notes

    def _layouts(self, metadata: dict[str, Value], specs: list[TensorSpec]) -> tuple[list[int], list[Layout]]:
        options = self.options
        if options.keep_split and options.split_max_size:
            raise UsageError("--keep-split and --split-max-size exclude each other")
        if options.split_max_size:
            groups = shard_groups(specs, options.split_max_size)
            if max(groups, default=0) > 0:
                return groups, shard_layouts(metadata, specs, groups=groups)
        elif options.keep_split and len(self.model.files) > 1:
            groups = [self.sources[spec.name].file for spec in specs]
            return groups, shard_layouts(metadata, specs, groups=groups)
        return [0] * len(specs), [layout(metadata, specs)]

    def _missing_importance(self, tensors: Sequence[PlannedTensor], base: str) -> tuple[str, ...]:
        """Tensors whose type must not be encoded without importance and for which there is none."""
        missing = []
        for t in tensors:
            if t.type is t.source_type or not requires_imatrix(t.name, t.type, base):
                continue
            if self.importance is None or not self.importance.fits(self.sources[t.name]):
                missing.append(t.name)
        return tuple(missing)

    def _unreached(self, name: str) -> bool:
        """Whether the given matrix lacks a tensor of those that calibration cannot always reach."""
        if self.importance is None or not (self.roles[name].nextn or category(name) in ("output", "embedding")):
            return False
        asked = {"output": self.options.output_tensor_type, "embedding": self.options.token_embedding_type}
        return not asked.get(category(name)) and not self.importance.fits(self.sources[name])


def _asked_type(name: str | None) -> GGMLType | None:
    kind = ggml_type(name) if name else None
    if kind is not None and not kind.encodable:
        raise UsageError(f"{kind} cannot be encoded")
    return kind
