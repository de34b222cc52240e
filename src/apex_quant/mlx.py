"""`convert_mlx`: a checkpoint for MLX, with a tier's bits in each layer, by mlx-lm's own conversion.

MLX's affine quantization stores `bits` per weight and a 16-bit scale and bias per group: bits + 32/group bits a
weight. A tier's ggml type becomes the pair whose size is nearest, so the files have about the tier's size. Which tier
cell a module gets is told from its path. The result of that is a predicate as mlx-lm takes it: a JSON table, and a
Python file around it that needs nothing of ours and that also runs the conversion.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from apex_quant import hub
from apex_quant.checkpoint import CONFIG, describe, read_json, text_config
from apex_quant.errors import InputError, NativeError, ResourceError, UsageError, did_you_mean
from apex_quant.gguf import write_file
from apex_quant.gguf.types import GGMLType, ggml_type
from apex_quant.hub_checkpoint import hub_checkpoint
from apex_quant.model import ModelFacts, Role, TensorRole, zone_rule
from apex_quant.other_python import code_command, file_command
from apex_quant.recipe.mixes import MIXES, mix_name
from apex_quant.recipe.tiers import Tier, find_tier, tier_names

SCHEMA: Final = "apex.mlx/1"
BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (64, 128, 32)  # of equally near ones the first: 64 is what kernels are tuned for
# module paths inside a layer -> role; first match wins
_ROLES: Final = (
    (r"\b(switch_mlp|experts|block_sparse_moe\.(w\d|input_linear|output_linear))\b", Role.routed_expert),
    (r"shared_(expert|experts|mlp)\.(?!gate$)", Role.shared_expert),
    (r"(mlp|block_sparse_moe|feed_forward|router)\.(gate|router)$|\brouter\b|shared_expert_gate$", Role.router),
    (r"(self_attn|attention|attn|cross_attn)\.", Role.attention),
    (r"(linear_attn|mamba|mixer|ssm|conv|short_conv|time_mix|attention\.rwkv)\b", Role.ssm),
    (r"(mlp|feed_forward|ffn|channel_mix)\.", Role.dense_ffn),
)
_LAYER: Final = r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\."
_ROUTER: Final = {"bits": 8, "group_size": 64}  # as mlx-lm's own models ask for
_LAST_LINES: Final = 20
_UNSUPPORTED: Final = re.compile(r"Model type .* not supported")
_PROBE: Final = "import importlib.util as u; sys.exit(any(u.find_spec(n) is None for n in ('mlx', 'mlx_lm')))"


class MlxBits(NamedTuple):
    """Parameters of MLX's affine mode."""

    bits: int
    group_size: int

    @property
    def bpw(self) -> float:
        """Bits per weight, scale and bias included."""
        return self.bits + 32 / self.group_size


@dataclass(frozen=True)
class MlxConversion:
    """`path` is the folder for the model; `bytes` is 0 when only the predicate was written."""

    path: Path
    predicate: Path
    table: Path
    tier: str
    bytes: int
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        where = {key: str(getattr(self, key)) for key in ("path", "predicate", "table")}
        return {**vars(self), **where, "warnings": list(self.warnings)}


def nearest(kind: GGMLType) -> MlxBits:
    """The MLX form whose bits per weight are nearest to a ggml type's."""
    return min((MlxBits(b, g) for b in BITS for g in GROUPS), key=lambda form: abs(form.bpw - kind.bpw))


def predicate(config: dict[str, Any], tier: str | Tier) -> dict[str, Any]:
    """The table for a model by its config.json: {"layers": [{role: {bits, group_size}}], "outside": {...}, ...}.

    UsageError for an unknown tier, InputError for a configuration without layers.
    """
    chosen = find_tier(tier) if isinstance(tier, str) else tier
    if chosen is None:
        raise UsageError(f"no tier {tier!r}." + did_you_mean(str(tier), tier_names()))
    text = text_config(config)
    layers = next((v for k in ("num_hidden_layers", "n_layer", "n_layers") if isinstance(v := text.get(k), int)), 0)
    if not 0 < layers < 4096:
        raise InputError("config.json names no num_hidden_layers")
    counts = (text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((n for n in counts if isinstance(n, int) and n > 1), 0)
    # the only fact that the cells depend on is whether there are experts
    facts = ModelFacts("", None, layers, layers, 0, 0, experts, (1,) * layers, 0, (), (), (), None, None)
    zones = zone_rule(layers)

    def cell(role: Role, layer: int) -> dict[str, int]:
        kind = chosen.type_of(TensorRole(role, layer, ""), facts, zones)
        assert kind is not None
        return nearest(kind)._asdict()

    inside = (Role.routed_expert, Role.shared_expert, Role.dense_ffn, Role.attention, Role.ssm)
    base = MIXES[mix_name(chosen.base)].default
    output = max(base, ggml_type("Q6_K"), key=lambda kind: kind.bpw)  # as llama.cpp's mixes have it
    return {
        "schema": SCHEMA,
        "tier": chosen.name,
        "zones": str(zones),
        "layer": _LAYER,
        "roles": [[pattern, str(role)] for pattern, role in _ROLES],
        "layers": [
            {**{str(role): cell(role, layer) for role in inside}, str(Role.router): _ROUTER} for layer in range(layers)
        ],
        "outside": {"embed": nearest(base)._asdict(), "head": nearest(output)._asdict()},
        "default": nearest(base)._asdict(),
    }


def choose(table: dict[str, Any], path: str) -> dict[str, int]:
    """What the predicate answers for a module path (the same lines as in the written file)."""
    space: dict[str, Any] = {}
    exec(_CHOOSE, space)
    found: dict[str, int] = space["choose"](table, path)
    return found


def convert_mlx(
    source: str | Path,
    out: str | Path,
    *,
    tier: str = "quality",
    revision: str | None = None,
    predicate_only: bool = False,
    python: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[hub.HubProgress], None] | None = None,
) -> MlxConversion:
    """Write OUT.mlx.json and OUT.mlx.py, and with mlx-lm the model into the folder `out`.

    `progress` is told of the download of a hub id, `say` gets mlx-lm's log. The predicate is written even where the
    conversion cannot run. Raises UsageError, InputError, ResourceError without mlx-lm, NativeError when it fails; then
    there is no folder.
    """
    start = time.monotonic()
    target = Path(out)
    if target.exists():
        raise UsageError(f"{target} exists already", hint="mlx-lm wants a new folder")
    directory = Path(source)
    if not directory.exists() and hub.HUB_ID.fullmatch(str(source)):
        directory = hub_checkpoint(str(source), revision, progress=progress).folder
    elif revision is not None:
        raise UsageError("--revision concerns a download, and the source is a directory")
    checkpoint = describe(directory)
    table = predicate(read_json(directory / CONFIG), tier)
    files = [target.with_name(target.name + suffix) for suffix in (".mlx.json", ".mlx.py")]
    target.parent.mkdir(parents=True, exist_ok=True)
    for file, text in zip(files, (json.dumps(table, indent=1) + "\n", program(table)), strict=True):
        write_file(file, text)
    warnings = list(checkpoint.warnings)
    low = find_tier(tier)
    if low is not None and any(ggml_type(t).bpw < 2 for t in vars(low.routed).values()):
        warnings.append("MLX has nothing below 2 bits: the model will be larger than the tier's GGUF")
    if not predicate_only:
        if checkpoint.missing:
            raise InputError(f"{directory}: {checkpoint.missing[0]}", hint="complete the download, then try again")
        _run(directory, target, files[1], python, say or (lambda line: None))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) if target.is_dir() else 0
    return MlxConversion(target, files[1], files[0], table["tier"], size, time.monotonic() - start, tuple(warnings))


def program(table: dict[str, Any]) -> str:
    """The Python file: the table, `quant_predicate(path, module)`, and a main program that converts."""
    return _PROGRAM.replace("@TIER@", table["tier"]).replace("@CHOOSE@", _CHOOSE).replace("@TABLE@", repr(table))


def _run(directory: Path, target: Path, program: Path, python: str | Path | None, say: Callable[[str], None]) -> None:
    executable = os.fspath(python or os.environ.get("APEX_MLX_PYTHON") or sys.executable)
    try:
        there = subprocess.run(code_command(executable, _PROBE), stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise UsageError(f"{executable}: is not a working Python: {error.strerror}") from None
    if there.returncode:
        raise ResourceError(
            f"converting needs mlx-lm, which {executable} lacks; {program} is written and complete",
            hint="pip install mlx-lm (on Linux: 'mlx-lm[cpu]'), or on a Mac that has it: "
            f"python {program.name} HF_DIR {target.name}",
        )
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    last: deque[str] = deque(maxlen=_LAST_LINES)
    process = subprocess.Popen(
        file_command(executable, program.resolve(), str(directory.resolve()), str(partial.resolve())),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            for line in process.stdout:
                if line.strip():
                    last.append(line.rstrip())
                    say(line.rstrip())
        status = process.wait()
        if status:
            raise _explained(directory, last)
        partial.rename(target)
    except BaseException:
        process.kill()
        process.wait()
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _explained(directory: Path, last: Sequence[str]) -> InputError | NativeError:
    """mlx-lm's failure as an error: the checkpoint's fault where its last line says so."""
    said = last[-1] if last else "nothing said"
    if _UNSUPPORTED.search(said):
        return InputError(f"{directory}: mlx-lm: {said}", hint="a newer mlx-lm may know this architecture")
    return NativeError(f"mlx-lm failed: {said}", log_tail="\n".join(last))


_CHOOSE: Final = '''\
def choose(table, path):
    """{"bits", "group_size"} for a module path."""
    import re

    layer = re.search(table["layer"], path)
    if layer is None:
        if re.search(r"(^|\\.)(embed_tokens|wte|embedding|tok_embeddings)", path):
            return table["outside"]["embed"]
        if re.search(r"(^|\\.)(lm_head|output)$", path):
            return table["outside"]["head"]
        return table["default"]
    cells = table["layers"][min(int(layer[1]), len(table["layers"]) - 1)]
    for pattern, role in table["roles"]:
        if re.search(pattern, path[layer.end():]):
            return cells[role]
    return table["default"]
'''
_PROGRAM: Final = '''\
"""Mixed bits for mlx-lm, as APEX tier @TIER@ has them. Use as

    python THIS_FILE HF_DIR MLX_DIR
    mlx_lm.convert(HF_DIR, MLX_DIR, quantize=True, q_group_size=32, quant_predicate=THIS_MODULE.quant_predicate)

(q_group_size is what rows must divide by before mlx-lm asks the predicate.)
"""

TABLE = @TABLE@


@CHOOSE@

def quant_predicate(path, module, *_):
    """mlx-lm's predicate: parameters for to_quantized, or False for what stays as it is."""
    if not hasattr(module, "to_quantized"):
        return False
    wanted = choose(TABLE, path)
    width = module.weight.shape[-1]
    for group in (wanted["group_size"], 64, 32):
        if width % group == 0:
            return {"bits": wanted["bits"], "group_size": group, "mode": "affine"}
    return False


if __name__ == "__main__":
    import sys

    from mlx_lm import convert

    convert(sys.argv[1], sys.argv[2], quantize=True, q_group_size=32, q_bits=4, quant_predicate=quant_predicate)
'''
