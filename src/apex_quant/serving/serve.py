"""`apex serve`: a model behind an OpenAI-compatible endpoint, with what fits this machine chosen and explained.

with serve("models/", api_key_file=None) as service:
    print(service.url, *service.plan.reasons, sep="\\n")
    service.wait()
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from apex_quant.doctor import main_memory
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.evaluation.kv_types import Pair, parse_pair, require_offered, server_types
from apex_quant.evaluation.programs import PAUSE, Log, Program, clean_environment, said
from apex_quant.evaluation.server import Found, find_server
from apex_quant.gguf import GGUFModel, open_model
from apex_quant.model.facts import facts
from apex_quant.recipe.tiers import find_tier, tier_names
from apex_quant.serving import backend
from apex_quant.serving.access import bindable, is_loopback, reachable, read_keys
from apex_quant.serving.fit import MIB, SAFE_PAIRS, Fit, Option, find_models, fit, shown_name
from apex_quant.sizes import parse_ctx

AUTO_CONTEXTS: Final = (32768, 16384, 8192, 4096, 2048, 1024)
"""Tried from the longest; more than the first must be asked for."""
START_SECONDS: Final = 900.0
_HOST_SHARE: Final = 0.9  # of the memory that is available now
_MOST_CACHED: Final = 8192 * MIB  # of earlier prompts; llama-server's own default
_MOST_CHECKPOINTS: Final = 8


@dataclass(frozen=True)
class ServePlan:
    """What will be served and why. `ctx`: tokens of each of `parallel` requests at a time; `prompt_cache` bytes of main
    memory for earlier prompts and `checkpoints` of each request's states, which llama-server keeps beside the model;
    `devices`: names of those that it was planned for."""

    model: Path
    alias: str
    backend: Found
    ctx: int
    parallel: int
    type_k: str
    type_v: str
    gpu_layers: int
    cpu_moe: int
    prompt_cache: int
    checkpoints: int
    sampling: dict[str, float]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    devices: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("model", "backend")},
            "model": str(self.model), "backend": self.backend.kind, "reasons": list(self.reasons),
            "warnings": list(self.warnings),
        }  # fmt: skip


def resolve(
    place: str | os.PathLike[str], folder: str | os.PathLike[str] = ".", unreadable: list[str] | None = None
) -> list[Path]:
    """The files that `place` stands for: a model, the models of a folder, or those of a tier in `folder`.

    A file's tier is what its metadata says, else the end of its name. Files in `folder` that cannot be read do not end
    the search for a tier: what is wrong with them is added to `unreadable`. Raises InputError, which for a tier that is
    not there names those that are.
    """
    wanted = None if Path(place).exists() else _tier(os.fspath(place))
    if wanted is None:
        return find_models([place])
    by_tier: dict[str, list[Path]] = {}
    broken: list[str] = [] if unreadable is None else unreadable
    for path in find_models([folder], broken):
        with open_model(path) as model:
            stated = model.get("apex.tier")
        name = shown_name(path).lower()
        ends = [one for one in tier_names() if name.endswith("-" + one.lower().replace(" ", "-"))]
        found = _tier(str(stated)) or (_tier(max(ends, key=len)) if ends else None)
        if found is not None:
            by_tier.setdefault(found, []).append(path)
    if wanted in by_tier:
        return by_tier[wanted]
    there = ", ".join(f"{tier} ({path.name})" for tier, paths in sorted(by_tier.items()) for path in paths)
    lost = f", and what cannot be read: {'; '.join(broken)}" if broken else ""
    raise InputError(
        f"{folder}: no file of tier {wanted}{lost}", hint=f"there is {there or 'none of another tier either'}"
    )


def _tier(name: str) -> str | None:
    """The name of a published tier that may be an alias; None for other names."""
    known = {one.lower(): one for one in tier_names()}
    tier = find_tier(known[name.lower()]) if name.lower() in known else None
    return None if tier is None else tier.name


def plan_service(
    place: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] = ".",
    ctx: int | str = "auto",
    kv: str = "auto",
    parallel: int | None = None,
    vram: int | None = None,
    ram: int | None = None,
    alias: str | None = None,
    server: str | os.PathLike[str] | None = None,
) -> ServePlan:
    """Choose file, context, cache types and placement. `place`: a file, a folder, or a tier of the files in `folder`;
    `kv`: auto, one type, or K/V; `vram`, `ram`: bytes, by default what is free on this machine's devices and in its
    main memory.

    Raises ResourceError when nothing fits or there is no server, InputError for files that are no models, UsageError.
    """
    unreadable: list[str] = []
    files = resolve(place, folder, unreadable)
    found = find_server(None if server is None else Path(server))
    reasons = [
        "llama-server at " + found.command[0]
        if found.kind == "llama-server"
        else "the bindings' server, since no llama-server is on PATH or in LLAMA_CPP_DIR; one request at a time"
    ]
    listed_gpus = backend.devices(found)
    gpus = backend.planned(listed_gpus)
    if vram is None:
        vram = sum(device.free for device in gpus)
        reasons.append(
            "; ".join(f"{device.name}: {device.words}, {device.free / 2**30:.1f} GiB free" for device in gpus)
            or "no GPU that this server can use"
        )
        if left := [device for device in listed_gpus if device not in gpus]:
            names = ", ".join(f"{device.name} ({device.words})" for device in left)
            reasons.append(f"not planned for, as {gpus[0].kind} may see the same card or it is integrated: {names}")
    available = main_memory()[1]
    host = ram if ram is not None else None if available is None else round(available * _HOST_SHARE)
    together = 1 if found.kind != "llama-server" else parallel or 1
    if parallel is not None and parallel < 1:
        raise UsageError("requests at a time: at least 1")
    pairs = _pairs(kv)
    listed = server_types(said([*found.command, "--help"])) if found.kind == "llama-server" else ()
    require_offered(pairs, listed)
    if listed and (foreign := [name for pair in pairs for name in pair if name not in listed]):
        raise UsageError(f"{found.command[0]} has no cache type {foreign[0]}", hint="it has " + ", ".join(listed))
    best, answer, why = _search(
        files, ctx, pairs, vram, host, together,
        devices=max(len(gpus), 1), moe=found.kind == "llama-server", offered=listed,
    )  # fmt: skip
    reasons += why
    cached, checkpoints = (0, 0) if found.kind != "llama-server" else _beside(best, host, together)
    if cached or checkpoints:
        reasons.append(
            f"main memory for earlier prompts: {cached / MIB:,.0f} MiB, and {checkpoints} checkpoints of states"
        )
    with open_model(best.path) as model:
        odd: list[str] = []
        trained, sampling = facts(model).context_length, sampling_defaults(model, odd)
    if sampling:
        reasons.append("sampling defaults of the model: " + ", ".join(f"{k} {v:g}" for k, v in sampling.items()))
    warnings = [*(f"passed over: {one}" for one in unreadable), *answer.warnings, *odd]
    if trained and answer.ctx > trained:
        warnings.append(f"{best.name} was trained on {trained} tokens")
    if parallel and together != parallel:
        warnings.append("the bindings' server answers one request at a time")
    if sampling and found.kind != "llama-server":
        warnings.append("the bindings' server has defaults of its own for sampling: clients must send the model's")
    return ServePlan(
        model=best.path, alias=alias or best.name, backend=found, ctx=answer.ctx, parallel=together,
        type_k=best.k, type_v=best.v, gpu_layers=best.placement.gpu_layers, cpu_moe=best.placement.cpu_moe,
        prompt_cache=cached, checkpoints=checkpoints, sampling=sampling,
        reasons=tuple(reasons), warnings=tuple(dict.fromkeys(warnings)), devices=tuple(one.name for one in gpus),
    )  # fmt: skip


def _pairs(kv: str) -> list[Pair]:
    return [Pair(*pair) for pair in SAFE_PAIRS] if kv == "auto" else [parse_pair(kv)]


def _search(
    files: Sequence[Path], ctx: int | str, pairs: Sequence[Pair], vram: int, ram: int | None, parallel: int,
    *, devices: int, moe: bool, offered: Sequence[str],
) -> tuple[Option, Fit, list[str]]:  # fmt: skip
    """The first context for which something is wholly on the device; without one, that fits at all."""
    with open_model(files[0]) as model:
        trained = facts(model).context_length or AUTO_CONTEXTS[0]
    if isinstance(ctx, str):
        if ctx != "auto":
            contexts = [parse_ctx(ctx)]
        else:
            contexts = [min(AUTO_CONTEXTS[0], trained), *(one for one in AUTO_CONTEXTS[1:] if one < trained)]
    else:
        contexts = [ctx]
    tried = []
    for one in contexts:
        answer = fit(
            files, vram=vram, ram=ram, devices=devices, ctx=one, parallel=parallel, pairs=pairs, offload_experts=moe,
            offered=offered,
        )  # fmt: skip
        tried.append(answer)
        if answer.choice is not None and (answer.choice.all_on_device or not vram):
            break
    good = next((one for one in reversed(tried) if one.choice is not None and one.choice.all_on_device), None)
    good = good or next((one for one in tried if one.choice is not None), None)
    if good is None or good.choice is None:
        raise ResourceError(f"{shown_name(files[0])}: {tried[-1].reason}", hint="`apex fit` shows every possibility")
    best = good.choice
    why = [
        f"{best.name}: {good.reason}",
        f"context of {good.ctx:,} tokens"
        + (f" for each of {parallel} requests" if parallel > 1 else "")
        + (" (asked for)" if ctx != "auto" else f", of {trained:,} that the model was trained on"),
        f"KV cache {best.k}/{best.v}: {(best.device.kv + best.host.kv) / 2**20:,.1f} MiB"
        + (f" and {(best.device.recurrent + best.host.recurrent) / 2**20:,.1f} MiB of states"
           if best.device.recurrent + best.host.recurrent else ""),
        f"{best.placement.words(best.layers)}: {best.device.total / 2**30:.2f} GiB on the device, "
        f"{best.host.total / 2**30:.2f} GiB in main memory; compute buffers are {good.compute.source}",
    ]  # fmt: skip
    return best, good, why


def _beside(best: Option, ram: int | None, parallel: int) -> tuple[int, int]:
    """Bytes for earlier prompts, and checkpoints of each request's windows and states, out of the main memory that the
    plan leaves; llama-server's own defaults do not look at what there is. Nothing where it is not known."""
    left = max((ram or 0) - best.host.total, 0)
    state = sum(layer.bytes for layer in best.cache if layer.kind in ("recurrent", "sliding"))  # of all requests
    checkpoints = min(_MOST_CHECKPOINTS, left // 4 // state) if state else 0
    return min(left // 2 // MIB * MIB, _MOST_CACHED), checkpoints


SAMPLING: Final = {
    "temp": ("temp", 0.0, 2.0), "top_k": ("top-k", 0.0, 1e6), "top_p": ("top-p", 0.0, 1.0),
    "min_p": ("min-p", 0.0, 1.0), "penalty_repeat": ("repeat-penalty", 0.0, 10.0),
}  # fmt: skip
"""general.sampling.* keys of a GGUF -> llama-server's options, as its own model loader reads them, with the least and
the most that makes sense."""


def sampling_defaults(model: GGUFModel, warnings: list[str] | None = None) -> dict[str, float]:
    """The model maker's own sampling defaults, by llama-server's option names; empty where the file has none. Values
    that make no sense are left out and named in `warnings`."""
    found = {}
    for key, (option, least, most) in SAMPLING.items():
        value = model.get(f"general.sampling.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            if warnings is not None:
                warnings.append(f"general.sampling.{key} of the file is left out: {str(value)[:40]!r} makes no sense")
            continue
        # metadata are float32: 0.6, not 0.6000000238418579
        found[option] = float(str(np.float32(value)))
    return found


class Service:
    """A server that answers; it ends with the block, and with this process."""

    def __init__(self, plan: ServePlan, program: Program, host: str, port: int, keys: tuple[str, ...]) -> None:
        self.plan, self.program, self.host, self.port = plan, program, host, port
        self._key = keys[0] if keys else None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}/v1"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: it finishes what it does at the moment, or is killed after some seconds."""
        self.program.stop()

    @property
    def authorization(self) -> dict[str, str]:
        """The header that lets a client in, empty without a key."""
        return {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

    @property
    def healthy(self) -> bool:
        """Whether it answers now."""
        return self.program.answers(reachable(self.host), self.port, "/health")

    def wait(self, pause: Callable[[float], None] = time.sleep) -> None:
        """Until the backend ends, which is a ResourceError that says how; looked for every PAUSE seconds."""
        while self.program.status is None:
            pause(PAUSE)
        status = self.program.wait()
        raise ResourceError(
            f"{self.plan.backend.kind} ended with status {status}: {self.program.last()}",
            hint="128 and more: a signal, such as 137 when the system ran out of memory",
        )


def serve(
    place: str | os.PathLike[str],
    *,
    ctx: int | str = "auto",
    kv: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key_file: str | os.PathLike[str] | None = None,
    parallel: int | None = None,
    vram: int | None = None,
    ram: int | None = None,
    alias: str | None = None,
    threads: int | None = None,
    server: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = ".",
    plan: ServePlan | None = None,
    planned: Callable[[ServePlan], None] | None = None,
    log: Log | None = None,
    deadline: float = START_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Service:
    """Start a server for the model or the best of a folder, and wait until it answers. `port` 0: any free one;
    `planned` is told what will run before it is started.

    Raises UsageError for an address that others can reach without `api_key_file`, ResourceError when nothing fits,
    the port is taken or the server does not come up, and what plan_service() raises.
    """
    host = host.strip("[]")  # of an IPv6 address in a URL
    keys = read_keys(api_key_file) if api_key_file is not None else ()
    if not keys and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached by others, and there is no key", hint="--api-key-file FILE, or --host 127.0.0.1"
        )
    port = bindable(host, port)
    chosen = plan or plan_service(
        place, folder=folder, ctx=ctx, kv=kv, parallel=parallel, vram=vram, ram=ram, alias=alias, server=server
    )
    launch = backend.Launch(
        model=chosen.model.absolute(), host=host, port=port, alias=chosen.alias, ctx=chosen.ctx,
        parallel=chosen.parallel, type_k=chosen.type_k, type_v=chosen.type_v, gpu_layers=chosen.gpu_layers,
        cpu_moe=chosen.cpu_moe, threads=threads, sampling=chosen.sampling, prompt_cache=chosen.prompt_cache,
        checkpoints=chosen.checkpoints, keyless=not keys,
        devices=chosen.devices,
    )  # fmt: skip
    known = None
    if chosen.backend.kind == "llama-server":
        known = backend.flags(said([*chosen.backend.command, "--help"])) or None
    command, skipped = backend.command(chosen.backend, launch, known)
    if skipped:
        chosen = replace(chosen, warnings=(*chosen.warnings, "this server has no: " + ", ".join(skipped)))
    if planned is not None:
        planned(chosen)
    # llama-server's options of the environment would change what was chosen
    env = clean_environment(prefixes=("LLAMA_ARG_",), **({backend.KEY_VARIABLE: ",".join(keys)} if keys else {}))
    if not keys:
        env.pop(backend.KEY_VARIABLE, None)
    env.setdefault("GGML_NO_BACKTRACE", "1")  # a debugger that looks at a dead server keeps it from being noticed
    if chosen.backend.kind != "llama-server":
        root = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
    program = Program(chosen.backend.kind, command, env=env, log=log)
    service = Service(chosen, program, host, port, keys)
    try:
        program.until(
            lambda: service.healthy, chosen.model.name, deadline, clock,
            hint="a smaller --ctx needs less memory; --verbose shows its log",
        )  # fmt: skip
    except BaseException:
        service.stop()
        raise
    return service


__all__ = ["ServePlan", "Service", "is_loopback", "plan_service", "read_keys", "resolve", "sampling_defaults", "serve"]
