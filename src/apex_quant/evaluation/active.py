"""How many bytes of weights one generated token makes the processor read: what bounds speed on most machines.

Everything that is always active, of the routed experts the used share, of tables that are looked up one row. Keys,
values and recurrent states are not weights and not counted: at the start of a text they are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from apex_quant.gguf import GGUFModel, TensorInfo
from apex_quant.model.facts import facts
from apex_quant.model.roles import Role, classify

LOOKED_UP: Final = frozenset({"token_embd", "position_embd", "token_types", "per_layer_token_embd", "ffn_gate_tid2eid"})
"""Tables of which a token takes one row: embeddings, and the experts that hash routing gives a token."""
_OUTPUT: Final = "output.weight"
_TIED: Final = "token_embd.weight"


@dataclass(frozen=True)
class ActiveBytes:
    """Bytes that one generated token reads. `idle` ones are in the file and not read: other experts, other rows,
    NextN blocks, encoders and projectors."""

    always: int
    experts: int
    rows: int
    idle: int

    @property
    def total(self) -> int:
        return self.always + self.experts + self.rows

    def to_json(self) -> dict[str, int]:
        return {"always": self.always, "experts": self.experts, "rows": self.rows, "idle": self.idle}


def active_bytes(model: GGUFModel) -> ActiveBytes:
    """Bytes of the tensors that one token of an open model reads. Raises InputError for metadata that is wrong."""
    known = facts(model)
    sums = {"always": 0, "experts": 0, "rows": 0}
    for name, info in model.tensors.items():
        role = classify(name, info.shape, known.architecture, trunk_layers=known.trunk_layers)
        if role.nextn or role.role is Role.projector or name.startswith("enc."):
            continue
        if role.role is Role.routed_expert and known.n_expert:
            sums["experts"] += info.nbytes * known.experts_used(role.layer) // known.n_expert
        elif role.part in LOOKED_UP and not (name == _TIED and _OUTPUT not in model.tensors):
            sums["rows"] += _row_bytes(info)
        else:
            sums["always"] += info.nbytes
    stored = sum(info.nbytes for info in model.tensors.values())
    return ActiveBytes(**sums, idle=stored - sum(sums.values()))


def _row_bytes(info: TensorInfo) -> int:
    return info.nbytes // max(1, math.prod(info.shape[1:]))
