"""A finished measurement: the journal's lines and the table of errors, put into the form of sensitivity.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apex_quant.allocation.estimate import estimated
from apex_quant.allocation.groups import GroupPlan
from apex_quant.allocation.journal import ROUNDING
from apex_quant.allocation.sensitivity import Group, Joint, Measured, ModelFacts, Probe, Sensitivities, TextFacts
from apex_quant.allocation.texts import ProbeTexts
from apex_quant.evaluation.identity import identity
from apex_quant.gguf import GGUFModel
from apex_quant.importance import Importance


class Assembly:
    """The journal's lines and the table of errors, put into the form of the file."""

    def __init__(
        self,
        model: GGUFModel,
        loaded: GGUFModel,
        matrix: Importance | None,
        groups: Sequence[GroupPlan],
        read: ProbeTexts,
        result: Mapping[str, Any],
        header: Mapping[str, Any],
        rows: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.model, self.loaded, self.matrix, self.groups, self.read = model, loaded, matrix, groups, read
        self.result, self.header, self.rows = result, header, rows

    def sensitivities(self, settings: dict[str, Any]) -> Sensitivities:
        reached = set(self.result["reached"])
        groups = [self._group(group, reached) for group in self.groups if reached & set(group.tensors)]
        unreached = [n for g in self.groups for n in g.tensors if n not in reached]
        warnings: list[str] = []
        if unreached:
            warnings.append(
                f"{len(unreached)} tensors are not read when the model decodes and have no sensitivity: "
                + ", ".join(unreached[:3]) + (", ..." if len(unreached) > 3 else "")
            )  # fmt: skip
        used, asked = self.header["chunks"] * settings["ctx"], settings["tokens"] // settings["ctx"] * settings["ctx"]
        if used < asked:
            warnings.append(f"each probe read {used} tokens, not {asked}: the text or the budget has no more")
        warnings += self.result["notes"]
        lacking = sum(not group.probes for group in groups)
        groups = estimated(groups, self.result["errors"])
        if not self.result["complete"]:
            guessed = sum(group.probes[0].kind == "guessed" for group in groups if group.probes)
            joints = f"{sum(bool(row['joint']) for row in self.rows.values())} of {settings['joint']} joint probes"
            warnings.append(
                f"the budget ended before all probes: {len(groups) - lacking} of {len(groups)} groups and {joints} "
                f"were measured; {lacking - guessed} groups are estimated from other layers and {guessed} from their "
                "error alone"
            )
        if settings["joint"] and not any(row["joint"] for row in self.rows.values()):
            warnings.append("no joint probe was measured: predictions are plain sums, which are too large")
        who = identity(self.model)
        scored = self.header["scored"]
        return Sensitivities(
            model=ModelFacts(
                name=self.model.path.name,
                sha256=who.sha256,
                architecture=self.model.architecture,
                loaded=self.loaded.path.name if self.loaded is not self.model else None,
            ),
            imatrix=None
            if self.matrix is None
            else {"name": self.matrix.file_name, "sha256": self.matrix.sha256, "prior": settings["fill"]},
            text=TextFacts(
                name=self.read.name,
                tokens=self.header["chunks"] * settings["ctx"],
                chunks=self.header["chunks"],
                scored=scored,
                sha256=self.header["tokens"],
            ),
            settings={**settings, "unreached": unreached},
            groups=groups,
            errors=self.result["errors"],
            joint=[
                Joint(name=row["group"], types=row["types"], **_measured(row))
                for row in sorted(self.rows.values(), key=lambda row: str(row["group"]))
                if row["joint"]
            ],
            floor=Measured(**_measured(self.header["floor"])),
            rounding=self._rounding(),
            tokens_spent=self.header["spent"] + sum(row["tokens"] for row in self.rows.values()),
            seconds=sum(row["seconds"] for row in self.rows.values()),
            warnings=warnings,
        )

    def _rounding(self) -> Joint | None:
        row = self.rows.get(ROUNDING)
        return Joint(name=row["group"], types=row["types"], **_measured(row)) if row is not None else None

    def _group(self, group: GroupPlan, reached: set[str]) -> Group:
        probes = [
            Probe(
                type=row["kind"],
                kind="noise" if row["noise"] else "real",
                weighted_error=row["weighted_error"],
                types=row["types"],
                **_measured(row),
            )  # type: ignore[call-arg]
            for row in self.rows.values()
            if not row["joint"] and row["group"] == group.name
        ]
        tensors = [name for name in group.tensors if name in reached]
        return Group(
            name=group.name, tensors=tensors, role=group.role, part=group.part, layer=group.layer, probes=probes
        )


def _measured(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("kld", "error", "n", "flips", "by_chunk")}
