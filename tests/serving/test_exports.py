"""Exports: what is in them, that it keeps to the documented fields, and that hostile names stay text."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import yaml

from apex_quant import embedded_model
from apex_quant.errors import ApexError, InputError, UsageError
from apex_quant.gguf import open_model
from apex_quant.gguf.tools import split
from apex_quant.serving.exports import export
from apex_quant.serving.exports_schema import check, problems, read_ini, read_modelfile, targets
from apex_quant.serving.exports_targets import WRITERS
from apex_quant.serving.exports_template import frame, stops
from tests.helpers.generic_models import generic_tensors, write_generic
from tests.helpers.random_models import write_random_gguf
from tests.serving.standin import standin

MODEL = embedded_model()
SHA = hashlib.sha256(MODEL.read_bytes()).hexdigest()
SAMPLING: dict[str, str | int | float | bool] = {
    "general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.top_p": 0.75,
    "general.sampling.min_p": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "small-Q8_0.gguf"
    return write_random_gguf(path, "qwen3moe", layers="MM", dtype="Q8_0", metadata=SAMPLING)


def documents(target: str, paths: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """(schema, document) of each file."""
    readers: dict[str, list[tuple[str, Any]]] = {
        "localai": [("localai-model", yaml.safe_load), ("localai-gallery", yaml.safe_load)],
        "ollama": [("ollama", read_modelfile)],
        "lmstudio": [("lmstudio", yaml.safe_load)],
        "llama-server": [
            ("llama-server-preset", lambda text: next(iter(read_ini(text).values()))),
            ("systemd", read_ini),
        ],
        "docker-compose": [("docker-compose", yaml.safe_load)],
    }
    return [(name, read(path.read_text())) for (name, read), path in zip(readers[target], paths, strict=True)]


@pytest.mark.parametrize("target", WRITERS)
def test_every_target(target: str, tmp_path: Path) -> None:
    made = export(target, MODEL, out=tmp_path, type_k="q8_0", type_v="q8_0")
    assert made.sha256 == {"apex-tiny-moe.gguf": SHA}
    assert {path.parent for path in made.paths} == {tmp_path}
    for name, document in documents(target, made.paths):
        assert problems(name, document) == []
    for path in made.paths:
        assert SHA in path.read_text()
    assert made.settings["ctx"] == 2048  # what it was trained on
    with pytest.raises(UsageError, match="exists already"):
        export(target, MODEL, out=tmp_path)
    again = export(target, MODEL, out=tmp_path, type_k="q8_0", type_v="q8_0", force=True)
    assert again.paths == made.paths
    assert json.dumps(again.to_json())


def test_values(small: Path, tmp_path: Path) -> None:
    uri = "https://huggingface.co/Me/Small-GGUF/resolve/main"
    options: dict[str, Any] = {
        "ctx": 256,
        "type_k": "q8_0",
        "type_v": "q5_1",
        "cpu_moe": 1,
        "uri": uri,
        "publisher": "Me",
    }
    found = {
        target: [
            document for _, document in documents(target, export(target, small, out=tmp_path / target, **options).paths)
        ]
        for target in WRITERS
    }
    model, (entry,) = found["localai"]
    assert model["parameters"] == {"model": "small-Q8_0.gguf", "temperature": 0.5, "top_k": 20, "top_p": 0.75}
    assert (model["context_size"], model["cache_type_k"], model["cache_type_v"]) == (256, "q8_0", "q5_1")
    assert model["flash_attention"] == "on"
    assert entry["files"] == model["download_files"]
    assert entry["files"][0]["uri"] == f"{uri}/small-Q8_0.gguf"
    assert entry["overrides"]["parameters"]["model"] == entry["files"][0]["filename"]
    (ollama,) = found["ollama"]
    assert ollama["FROM"] == str(small.absolute())
    assert ollama["PARAMETER"] == {"num_ctx": 256, "temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.25}
    (studio,) = found["lmstudio"]
    assert studio["model"] == "me/small-q8_0"
    assert studio["base"][0]["sources"] == [{"type": "huggingface", "user": "Me", "repo": "Small-GGUF"}]
    fields = {row["key"]: row["value"] for row in studio["config"]["operation"]["fields"]}
    assert fields["llm.prediction.temperature"] == 0.5
    assert fields["llm.prediction.topPSampling"] == {"checked": True, "value": 0.75}
    load = {row["key"]: row["value"] for row in studio["config"]["load"]["fields"]}
    assert load == {
        "llm.load.contextLength": 256, "llm.load.numCpuExpertLayersRatio": 0.5, "llm.load.llama.flashAttention": True,
        "llm.load.llama.kCacheQuantizationType": {"checked": True, "value": "q8_0"},
        "llm.load.llama.vCacheQuantizationType": {"checked": True, "value": "q5_1"},
    }  # fmt: skip
    preset, unit = found["llama-server"]
    assert preset["model"] == str(small.absolute())
    inside = "/run/llama-models/small-Q8_0/small-Q8_0.gguf"
    assert unit["Service"]["BindReadOnlyPaths"] == f"{small.resolve()}:{inside}"
    assert (preset["n-cpu-moe"], preset["n-gpu-layers"], preset["flash-attn"]) == (1, 3, "on")
    assert "--n-cpu-moe 1 " in unit["Service"]["ExecStart"] + " "
    (compose,) = found["docker-compose"]
    command = compose["services"]["llama-server"]["command"]
    assert command[command.index("--model") + 1] == "/models/small-Q8_0.gguf"
    assert command[command.index("--temp") + 1] == "0.5"


def test_ollama_takes_no_shards(small: Path, tmp_path: Path) -> None:
    shards = split(small, tmp_path / "s", 1 << 20)
    made = export("ollama", shards[0], out=tmp_path / "out", ctx=64)
    merged = tmp_path / "out" / "s.gguf"
    assert any("merged" in line for line in made.warnings)
    assert read_modelfile(made.paths[0].read_text())["FROM"] == str(merged)
    assert made.sha256 == {"s.gguf": hashlib.sha256(merged.read_bytes()).hexdigest()}
    with open_model(small) as one, open_model(merged) as other:
        assert one.tensors.keys() == other.tensors.keys()
    local = export("localai", shards[0], out=tmp_path / "out", ctx=64)
    assert len(local.sha256) == len(shards) > 1
    with pytest.raises(UsageError, match="exists already"):
        export("ollama", shards[0], out=tmp_path / "out")


def test_what_targets_cannot_say(small: Path, tmp_path: Path) -> None:
    warnings = export("ollama", small, out=tmp_path / "a", ctx=64, type_k="q8_0", type_v="q8_0").warnings
    assert any("OLLAMA_KV_CACHE_TYPE=q8_0" in line for line in warnings)
    assert any("no TEMPLATE" in line for line in warnings)
    warnings = export("ollama", small, out=tmp_path / "b", ctx=64, type_k="q8_0", type_v="q5_1").warnings
    assert any("has no KV cache q8_0/q5_1" in line for line in warnings)
    warnings = export("lmstudio", small, out=tmp_path / "c", ctx=4096, type_k="q8_0", type_v="q8_0").warnings
    assert any("placeholder" in line for line in warnings)
    assert not any("KV" in line for line in warnings)
    assert any("trained on 512" in line for line in warnings)
    with pytest.raises(UsageError, match="Did you mean ollama"):
        export("olama", small, out=tmp_path)


def test_placement_is_not_lost(small: Path, tmp_path: Path) -> None:
    """Where the target has a field it is there, elsewhere it is a warning."""
    ollama = export("ollama", small, out=tmp_path / "o", ctx=64, gpu_layers=1, cpu_moe=2)
    assert read_modelfile(ollama.paths[0].read_text())["PARAMETER"]["num_gpu"] == 1
    assert any("num_gpu takes whole layers" in line for line in ollama.warnings)
    studio = export("lmstudio", small, out=tmp_path / "s", ctx=64, gpu_layers=1, cpu_moe=1)
    fields = yaml.safe_load(studio.paths[0].read_text())["config"]["load"]["fields"]
    assert {"key": "llm.load.llama.acceleration.offloadRatio", "value": 0.3333} in fields
    assert {"key": "llm.load.numCpuExpertLayersRatio", "value": 0.5} in fields


def test_sampling_values_are_short_and_sane(tmp_path: Path) -> None:
    odd: dict[str, str | int | float | bool] = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_p": 5.0,
        "general.sampling.min_p": float("nan"),
    }
    path = write_random_gguf(tmp_path / "m.gguf", "llama", layers="D", sparse=True, metadata=odd)
    made = export("ollama", path, out=tmp_path / "o")
    assert "PARAMETER temperature 0.6\n" in made.paths[0].read_text()
    assert "temperature: 0.6\n" in export("localai", path, out=tmp_path / "l").paths[0].read_text()
    assert [line for line in made.warnings if "makes no sense" in line] == [
        "general.sampling.top_p of the file is left out: '5.0' makes no sense",
        "general.sampling.min_p of the file is left out: 'nan' makes no sense",
    ]


def test_what_is_refused(small: Path, tmp_path: Path) -> None:
    for uri in ("not a url", "file:///etc", "https://", "https://x/\ny"):
        with pytest.raises(UsageError, match="is no address"):
            export("localai", small, out=tmp_path, uri=uri)
    for target in ("ollama", "docker-compose", "localai", "lmstudio"):
        with pytest.raises(UsageError, match="turbo3 is not in stock"):
            export(target, small, out=tmp_path, type_v="turbo3")
    broken = tmp_path / "x\nPARAMETER stop a.gguf"
    broken.write_bytes(small.read_bytes())
    for target in WRITERS:
        with pytest.raises(InputError, match="line ends"):
            export(target, broken, out=tmp_path / "o")
    for name in ("a#b.gguf", "a;b.gguf"):
        (tmp_path / name).write_bytes(small.read_bytes())
        with pytest.raises(InputError, match="ends its values"):
            export("llama-server", tmp_path / name, out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_types_of_the_users_own_build(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(standin(tmp_path / "bin", more=", turbo2, turbo3, turbo4").parent))
    made = export("llama-server", small, out=tmp_path / "o", ctx=64, type_v="turbo3")
    assert "cache-type-v = turbo3" in made.paths[0].read_text()
    assert "flash-attn = on" in made.paths[0].read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    folder = tmp_path / "a b %h : $X"
    folder.mkdir()
    path = write_random_gguf(folder / "m of mine-Q8_0.gguf", "llama", layers="D", sparse=True)
    path.chmod(0o640)
    made = export("llama-server", path, out=tmp_path / "o", ctx=64)
    unit = made.paths[1]
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if unit.name in line] == []
    assert done.returncode == 0
    assert "/run/llama-models/m-of-mine-Q8_0/m of mine-Q8_0.gguf" in read_ini(unit.read_text())["Service"]["ExecStart"]
    assert any("chmod o+r" in line for line in made.warnings)


def test_the_unit_mounts_what_links_lead_to(tmp_path: Path) -> None:
    """As in the hub's cache, where a snapshot holds relative links to blobs: shards side by side under their names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    whole = write_random_gguf(tmp_path / "m-Q8_0.gguf", "qwen3moe", layers="MM", dtype="Q8_0")
    shards = split(whole, tmp_path / "m-Q8_0", whole.stat().st_size // 2)
    for number, shard in enumerate(shards):
        shard.rename(blobs / f"blob{number}")
        (snapshot / shard.name).symlink_to(f"../../blobs/blob{number}")
    made = export("llama-server", snapshot / shards[0].name, out=tmp_path / "o", ctx=64)
    service = read_ini(made.paths[1].read_text())["Service"]
    inside = "/run/llama-models/m-Q8_0"
    assert service["BindReadOnlyPaths"].split() == [
        f"{blobs / f'blob{number}'}:{inside}/{shard.name}" for number, shard in enumerate(shards)
    ]
    assert f"--model {inside}/{shards[0].name}" in service["ExecStart"]


def test_all_layers_are_those_that_the_library_counts(tmp_path: Path) -> None:
    """One that runs its layers three times counts each as three: fewer would leave some in main memory."""
    path = write_generic(tmp_path / "m.gguf", "nanbeige", generic_tensors(layers=2, width=512), layers=2, num_loops=3)
    made = export("ollama", path, out=tmp_path / "o", ctx=64)
    assert made.settings["gpu_layers"] == 7
    assert "num_gpu" not in made.paths[0].read_text()
    made = export("ollama", path, out=tmp_path / "p", ctx=64, gpu_layers=3)
    assert "PARAMETER num_gpu 3" in made.paths[0].read_text()


def with_template(path: Path, template: str, **keys: str) -> Path:
    """A file with a vocabulary of two tokens and a chat template."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "attention.head_count": 1,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.add_string("tokenizer.chat_template", template)
    for key, text in keys.items():
        writer.add_string(f"general.{key}", text)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '}}' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{' }}assistant{{ '}}' }}{% endif %}",
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_derived(name: str, tmp_path: Path) -> None:
    path = with_template(tmp_path / "t.gguf", TEMPLATES[name])
    with open_model(path) as model:
        found, why = frame(model)
    assert found is not None, why
    turns = [("system", "A"), ("user", "b c"), ("assistant", "d"), ("user", "é")]
    messages = [{"role": role, "content": text} for role, text in turns]
    # jinja2 itself is the oracle; Ollama adds BOS on its own
    theirs = jinja2.Template(TEMPLATES[name]).render(
        messages=messages, add_generation_prompt=True, bos_token="", eos_token="</s>"
    )
    assert found.render(turns) == theirs
    assert go(found.go(), turns) == theirs
    assert read_modelfile(f'TEMPLATE """{found.go()}"""\n')["TEMPLATE"] == found.go()
    if name == "chatml":
        assert stops(found) == ["<|im_end|>", "<|im_start|>user"]


def go(template: str, turns: list[tuple[str, str]]) -> str:
    """What text/template makes of the few actions that are used: a reader of its own."""
    import re

    tokens = re.findall(r"\{\{ .*? \}\}|.+?(?=\{\{ |$)", template, re.DOTALL)
    start, end = tokens.index("{{ range .Messages }}"), len(tokens) - 1 - tokens[::-1].index("{{ end }}")
    out = []

    def literal(token: str) -> str:
        return "{{" if token == '{{ "{{" }}' else token

    for role, text in turns:
        live = False
        for token in tokens[start + 1 : end]:
            if condition := re.fullmatch(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', token):
                live = condition[1] == role
            elif token == "{{ .Content }}":
                out.append(text if live else "")
            elif token != "{{ end }}" and live:
                out.append(literal(token))
    return "".join([*map(literal, tokens[:start]), *out, *map(literal, tokens[end + 1 :])])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages }}",
        "{% for m in messages %}",
        '{% for m in messages %}"""{{ m.role }}{{ m.content }}\n{% endfor %}',
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_templates_that_are_left_alone(template: str, tmp_path: Path) -> None:
    path = with_template(tmp_path / "t.gguf", template)
    made = export("ollama", path, out=tmp_path / "o")
    assert any("no TEMPLATE" in line for line in made.warnings)
    assert "TEMPLATE" not in read_modelfile(made.paths[0].read_text())


def test_hostile_metadata_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "a $HOME %h `x`"
    folder.mkdir()
    path = with_template(
        folder / "m;rm -rf.gguf", "{{ x", name="x\n[Service]\nExecStart=/bin/evil", license="mit\n- evil: 1",
        description="\x1b[31m\nFROM evil",
    )  # fmt: skip
    for target in WRITERS:
        if target == "llama-server":
            path = path.rename(folder / "m rm -rf.gguf")
        made = export(target, path, out=tmp_path / target)
        for name, document in documents(target, made.paths):
            assert problems(name, document) == []
            if name == "systemd":
                assert document["Service"]["ExecStart"].startswith("/usr/bin/env llama-server ")
                assert document["Service"]["BindReadOnlyPaths"].startswith(
                    f'"{tmp_path}/a $HOME %%h `x`/m rm -rf.gguf":"/run/'
                )
            if name == "localai-gallery":
                assert document[0]["license"] == "mit - evil: 1"
        assert "\x1b" not in "".join(one.read_text() for one in made.paths)
        assert all(one.parent == tmp_path / target for one in made.paths)


def test_the_checker() -> None:
    good = {"name": "m", "backend": "llama-cpp", "parameters": {"model": "m.gguf"}, "context_size": 5}
    assert problems("localai-model", good) == []
    for change, words in (
        ({"context_size": "5"}, "is str, not integer"), ({"context_size": True}, "is bool"),
        ({"context_size": 0}, "below 1"), ({"surprise": 1}, "not documented"), ({"name": "a b"}, "not of the form"),
        ({"cache_type_k": "turbo3"}, "not one of"), ({"parameters": {}}, "lacks model"),
        ({"parameters": {"model": "m", "top_p": 2}}, "above 1"),
    ):  # fmt: skip
        assert any(words in line for line in problems("localai-model", {**good, **change}))
    with pytest.raises(ApexError, match="does not keep to"):
        check("localai-model", {})
    for name, target in targets().items():
        assert name in ("about", "definitions") or target["source"]


def test_modelfiles_are_read_strictly() -> None:
    assert read_modelfile('# c\nFROM x\n\nPARAMETER stop "a\\nb"\nSYSTEM """a\nb"""\n') == {
        "FROM": "x", "PARAMETER": {"stop": ["a\nb"]}, "SYSTEM": "a\nb",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no instruction"):
        read_modelfile("from x\n")
