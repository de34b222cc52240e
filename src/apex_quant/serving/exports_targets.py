"""The files of each export target, each checked against what the target documents."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path
from typing import Any, Final

import yaml

from apex_quant.errors import InputError
from apex_quant.serving.exports import Subject, Writer
from apex_quant.serving.exports_schema import check, read_ini, read_modelfile
from apex_quant.serving.exports_template import stops

_IMAGE: Final = "ghcr.io/ggml-org/llama.cpp:server"
_PORT: Final = 8080
_MOUNTED: Final = "/run/llama-models"

LOCALAI: Final = {"temp": "temperature", "top-p": "top_p", "top-k": "top_k", "repeat-penalty": "repeat_penalty"}
OLLAMA: Final = {**LOCALAI, "min-p": "min_p"}
LM_STUDIO: Final = {
    "temp": "llm.prediction.temperature", "top-k": "llm.prediction.topKSampling",
    "top-p": "llm.prediction.topPSampling", "min-p": "llm.prediction.minPSampling",
    "repeat-penalty": "llm.prediction.repeatPenalty",
}  # fmt: skip
"""llama-server's option -> the target's name for it."""
_SWITCHED: Final = frozenset({"top-p", "min-p", "repeat-penalty"})  # LM Studio: value and whether it is used
_STUDIO_CACHES: Final = ("f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_WHOLE: Final = frozenset({"top-k"})


def _sampling(subject: Subject, names: dict[str, str], warnings: list[str]) -> dict[str, Any]:
    left = [option for option in subject.sampling if option not in names]
    if left:
        warnings.append(f"sampling defaults that the target has no field for: {', '.join(left)}")
    return {
        names[option]: int(value) if option in _WHOLE else value
        for option, value in subject.sampling.items()
        if option in names
    }


def localai(subject: Subject, folder: Path, warnings: list[str]) -> dict[str, str]:
    """Model YAML for LocalAI's models folder, and an entry for a gallery."""
    model: dict[str, Any] = {
        "name": subject.name,
        "backend": "llama-cpp",
        "description": subject.description,
        "parameters": {"model": subject.file_name, **_sampling(subject, LOCALAI, warnings)},
        "context_size": subject.ctx,
        "f16": True,
        "mmap": True,
        "gpu_layers": subject.gpu_layers,
        "known_usecases": ["chat", "completion"],
    }
    if subject.type_k != "f16":
        model["cache_type_k"] = subject.type_k
    if subject.type_v != "f16":
        model["cache_type_v"] = subject.type_v
    if subject.quantized_v:
        model["flash_attention"] = "on"
    if subject.has_template:
        # llama.cpp's own template and tool calls, not LocalAI's imitations of them
        model["template"] = {"use_tokenizer_template": True}
        model["function"] = {"grammar": {"disable": True}}
    model["options"] = ["use_jinja:true"] if subject.has_template else []
    if subject.cpu_moe:
        model["options"].append(f"--n-cpu-moe:{subject.cpu_moe}")
        warnings.append("options that begin with -- are passed on to llama.cpp by recent versions of LocalAI only")
    if not model["options"]:
        del model["options"]
    rows = {"download_files": subject.files_rows()} if subject.uri else {}
    check("localai-model", {**model, **rows})
    hashes = "".join(f"# sha256 of {file}: {digest}\n" for file, digest in subject.sha256.items())
    entry: dict[str, Any] = {
        "name": subject.name,
        "url": "github:mudler/LocalAI/gallery/virtual.yaml@master",
        "description": subject.description,
        "tags": ["llm", "gguf"],
        "overrides": {key: value for key, value in model.items() if key not in ("name", "description")},
        "files": subject.files_rows(),
    }
    if subject.license:
        entry["license"] = subject.license
    check("localai-gallery", [entry])
    if not subject.uri:
        warnings.append(
            "without --uri the gallery entry refers to the files where they lie, and LocalAI takes none from outside "
            f"its models folder: copy {', '.join(path.name for path in subject.files)} there, for {subject.name}.yaml"
        )
    return {
        f"{subject.name}.yaml": hashes + _yaml({**model, **rows}),
        f"{subject.name}-gallery.yaml": _yaml([entry]),
    }


def ollama(subject: Subject, folder: Path, warnings: list[str]) -> dict[str, str]:
    """A Modelfile. Ollama takes the type of its KV cache from the environment of its server alone."""
    lines = [
        f"# sha256 of {subject.file_name}: {subject.sha256[subject.file_name]}",
        f"FROM {subject.path.absolute()}",
        f"PARAMETER num_ctx {subject.ctx}",
        *([f"PARAMETER num_gpu {subject.gpu_layers}"] if subject.partly_on_device else []),
        *(f"PARAMETER {key} {value:g}" for key, value in _sampling(subject, OLLAMA, warnings).items()),
    ]
    if subject.frame is not None:
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops(subject.frame)]
        lines.append(f'TEMPLATE """{subject.frame.go()}"""')
    if subject.cpu_moe:
        warnings.append("Ollama cannot leave experts alone in main memory: num_gpu takes whole layers")
    if subject.type_k != "f16" or subject.type_v != "f16":
        kinds = ("f16", "q8_0", "q4_0")
        if subject.type_k == subject.type_v and subject.type_k in kinds:
            warnings.append(
                f"start Ollama's server with OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={subject.type_k}: a "
                "Modelfile cannot say it, and it holds for all models"
            )
        else:
            warnings.append(f"Ollama has no KV cache {subject.type_k}/{subject.type_v}: it has {', '.join(kinds)}")
    text = "\n".join(lines) + "\n"
    check("ollama", read_modelfile(text))
    return {"Modelfile": text}


def lmstudio(subject: Subject, folder: Path, warnings: list[str]) -> dict[str, str]:
    """model.yaml. Its sources can only be repositories of the hub."""
    name = subject.name.lower()
    parts = (subject.uri or "").removeprefix("https://huggingface.co/").split("/")
    hub = len(parts) >= 2 and (subject.uri or "").startswith("https://huggingface.co/")
    if not hub:
        warnings.append(
            "without --uri https://huggingface.co/USER/REPO/resolve/main the source is a placeholder; `lms import "
            f"{subject.file_name}` takes the file itself"
        )
    user, repo = (parts[0], parts[1]) if hub else (subject.publisher, subject.name)
    fields = [
        {"key": key, "value": {"checked": True, "value": value} if option in _SWITCHED else value}
        for option, key in LM_STUDIO.items()
        for value in [_sampling(subject, LM_STUDIO, []).get(key)]
        if value is not None
    ]
    load: list[dict[str, Any]] = [{"key": "llm.load.contextLength", "value": subject.ctx}]
    if subject.partly_on_device:
        share = round(subject.gpu_layers / (subject.layers + 1), 4)
        load.append({"key": "llm.load.llama.acceleration.offloadRatio", "value": share})
    if subject.cpu_moe:
        share = round(min(subject.cpu_moe / max(subject.layers, 1), 1.0), 4)
        load.append({"key": "llm.load.numCpuExpertLayersRatio", "value": share})
    for letter, kind in (("k", subject.type_k), ("v", subject.type_v)):
        if kind in _STUDIO_CACHES:
            key = f"llm.load.llama.{letter}CacheQuantizationType"
            load.append({"key": key, "value": {"checked": True, "value": kind}})
        elif kind != "f16":
            warnings.append(f"LM Studio has no KV cache {kind}: it has f16, {', '.join(_STUDIO_CACHES)}")
    if subject.quantized_v:
        load.append({"key": "llm.load.llama.flashAttention", "value": True})
    document: dict[str, Any] = {
        "model": f"{subject.publisher}/{name}",
        "base": [{"key": f"{user}/{repo}", "sources": [{"type": "huggingface", "user": user, "repo": repo}]}],
        "metadataOverrides": {
            "domain": "llm",
            "architectures": [subject.architecture],
            "compatibilityTypes": ["gguf"],
            "minMemoryUsageBytes": subject.bytes + subject.kv_bytes,
            "contextLengths": [subject.trained or subject.ctx],
        },
        "config": {
            **({"operation": {"fields": fields}} if fields else {}),
            "load": {"fields": load},
        },
    }
    check("lmstudio", document)
    hashes = "".join(f"# sha256 of {file}: {digest}\n" for file, digest in subject.sha256.items())
    return {"model.yaml": hashes + _yaml(document)}


def _options(subject: Subject, path: str) -> dict[str, Any]:
    """llama-server's options without dashes."""
    found: dict[str, Any] = {"model": path, "ctx-size": subject.ctx, "n-gpu-layers": subject.gpu_layers}
    if subject.cpu_moe:
        found["n-cpu-moe"] = subject.cpu_moe
    if subject.type_k != "f16":
        found["cache-type-k"] = subject.type_k
    if subject.type_v != "f16":
        found["cache-type-v"] = subject.type_v
    if subject.quantized_v:
        found["flash-attn"] = "on"
    if subject.has_template:
        found["jinja"] = True
    found |= {option: int(value) if option in _WHOLE else value for option, value in subject.sampling.items()}
    check("llama-server-preset", found)
    return found


def _words(options: dict[str, Any]) -> list[str]:
    return [
        word
        for key, value in options.items()
        for word in ([f"--{key}"] if value is True else [f"--{key}", f"{value:g}" if isinstance(value, float) else
                     str(value)])
    ]  # fmt: skip


def llama_server(subject: Subject, folder: Path, warnings: list[str]) -> dict[str, str]:
    """A preset for --models-preset, and a systemd unit whose key is in a file that its owner writes."""
    first = subject.files[0].absolute()
    options = _options(subject, str(first))
    rows = [
        f"{key} = {'true' if value is True else f'{value:g}' if isinstance(value, float) else value}"
        for key, value in options.items()
    ]
    hashes = [f"; sha256 of {file}: {digest}" for file, digest in subject.sha256.items()]
    preset = "\n".join(["version = 1", "", *hashes, f"[{subject.name}]", *rows]) + "\n"
    check("llama-server-preset", read_ini(preset)[subject.name])
    if any(mark in str(first) for mark in "#;") or str(first) != str(first).strip():
        raise InputError(
            f"{first}: a preset ends its values at # and ;", hint="give the file another name, or put it elsewhere"
        )
    inside = f"{_MOUNTED}/{subject.name}"
    served = {**options, "model": f"{inside}/{subject.file_name}"}
    command = ["/usr/bin/env", "llama-server", "--host", "127.0.0.1", "--port", str(_PORT), "--alias", subject.name]
    closed = [path.name for path in subject.files if not path.stat().st_mode & stat.S_IROTH]
    if closed:
        warnings.append(f"the unit runs as a user of its own, who cannot read {', '.join(closed)}: chmod o+r")
    unit = "\n".join([
        *(f"# sha256 of {file}: {digest}" for file, digest in subject.sha256.items()),
        "[Unit]",
        f"Description=llama-server with {subject.name}",
        "After=network.target",
        "",
        "[Service]",
        "Type=exec",
        "# systemd expands % and $ in command lines",
        "ExecStart=" + " ".join(_quoted(word) for word in [*command, *_words(served)]),
        "# LLAMA_API_KEY=..., for addresses other than 127.0.0.1; readable by root alone",
        f"EnvironmentFile=-/etc/llama-server/{subject.name}.env",
        "DynamicUser=yes",
        "# for GPUs, those of these groups that there are",
        "#SupplementaryGroups=render video",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "# the models wherever they lie, in a home or in /tmp too",
        "BindReadOnlyPaths=" + " ".join(
            # the file itself: a link of the hub's cache leads out of its folder
            f"{_mounted(path.resolve())}:{_mounted(Path(inside, path.name))}" for path in subject.files
        ),
        "Restart=on-failure",
        "RestartSec=5",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]) + "\n"  # fmt: skip
    check("systemd", read_ini(unit))
    return {f"{subject.name}.ini": preset, f"llama-server-{subject.name}.service": unit}


def _mounted(path: Path) -> str:
    """A path in a list of mounts: no variables there, but % and colons, and quotes around what holds spaces."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace(":", "\\:").replace("%", "%%")
    return text if text == shlex.quote(text) else f'"{text}"'


def _quoted(word: str) -> str:
    """A word of ExecStart: systemd's own quoting, in which % and $ are doubled."""
    word = word.replace("%", "%%").replace("$", "$$")
    return word if word == shlex.quote(word) else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def docker_compose(subject: Subject, folder: Path, warnings: list[str]) -> dict[str, str]:
    """compose.yaml: the model's folder read-only, reachable from this machine alone."""
    options = _options(subject, f"/models/{subject.file_name}")
    service: dict[str, Any] = {
        "image": _IMAGE,
        "command": ["--host", "0.0.0.0", "--port", str(_PORT), "--alias", subject.name,
                    *(word.replace("$", "$$") for word in _words(options))],
        "volumes": [f"{str(path.absolute()).replace('$', '$$')}:/models/{path.name.replace('$', '$$')}:ro"
                    for path in subject.files],
        "ports": [f"127.0.0.1:{_PORT}:{_PORT}"],
        "environment": ["LLAMA_API_KEY"],
        "restart": "unless-stopped",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {"test": ["CMD", "curl", "-f", f"http://localhost:{_PORT}/health"], "interval": "30s",
                        "timeout": "5s", "retries": 3, "start_period": "10m"},
    }  # fmt: skip
    document = {"services": {"llama-server": service}}
    check("docker-compose", document)
    if any(":" in str(path.absolute()) for path in subject.files):
        warnings.append("a colon in the model's path: compose's short volumes cannot name it")
    warnings.append(f"the image {_IMAGE} computes on the processor; {_IMAGE}-cuda and others on GPUs")
    hashes = "".join(f"# sha256 of {file}: {digest}\n" for file, digest in subject.sha256.items())
    return {"compose.yaml": hashes + _yaml(document)}


def _yaml(document: Any) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    return text


WRITERS: Final[dict[str, Writer]] = {
    "localai": localai, "ollama": ollama, "lmstudio": lmstudio, "llama-server": llama_server,
    "docker-compose": docker_compose,
}  # fmt: skip
