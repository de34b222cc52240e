"""Every key of the configuration reaches somebody: one that is checked, documented and then forgotten is a lie."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import apex_quant
from apex_quant.evaluation.harness import HarnessPlan
from apex_quant.pipeline.config import RunConfig, make_config, sections
from apex_quant.pipeline.context import Context
from apex_quant.pipeline.keys import Harness, Section
from apex_quant.pipeline.measuring import Target, request
from apex_quant.pipeline.state import State
from apex_quant.recipe.planned import PlanOptions
from tests.cli.conftest import Call, call  # noqa: F401 -- a fixture

ROOT = Path(apex_quant.__file__).parent
# sections that are handed on as a whole, to what takes keywords: the fields of those
WHOLE: dict[str, set[str]] = {
    "quantize": {field.name for field in fields(PlanOptions)},
    "evaluate.harness": {field.name for field in fields(HarnessPlan)},
}


def keys() -> Iterator[tuple[str, str]]:
    """(section, key); '' for the whole."""
    for name, model in sections():
        for key, field in model.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                yield name, key


def read(tree: ast.AST) -> set[tuple[str, str]]:
    """(section, key) of `config.evaluate.tasks`, and of `given.tasks` in a function with `given = config.evaluate`."""
    names = {name.rpartition(".")[2]: name for name, _ in sections()} | {"config": "", "self": ""}
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        bound: dict[str, str] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target, value in pairs(node.targets[0], node.value):
                    last = value.attr if isinstance(value, ast.Attribute) else ""
                    if isinstance(target, ast.Name) and last in names:
                        bound[target.id] = names[last]
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute):
                owner = node.value
                last = owner.attr if isinstance(owner, ast.Attribute) else ""
                name = bound.get(owner.id, names.get(owner.id)) if isinstance(owner, ast.Name) else names.get(last)
                if name is not None:
                    found.add((name, node.attr))
    return found


def pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        yield from zip(target.elts, value.elts, strict=False)  # a starred value is none of ours
    else:
        yield target, value


def test_every_key_is_read() -> None:
    files = [*(ROOT / "pipeline").glob("*.py"), ROOT / "cli" / "pipeline.py"]
    seen = {one for path in files for one in read(ast.parse(path.read_text()))}
    seen |= {(name, key) for name, taken in WHOLE.items() for key in taken}
    # by property or under another name
    seen |= {("phases", key) for key in ("phase", "from_", "only", "skip")} | {("quantize", "split")}
    assert [f"{name}.{key}" for name, key in keys() if (name, key) not in seen] == []


def test_the_harness_gets_what_it_is_told(tmp_path: Path) -> None:
    assert {field.name for field in fields(HarnessPlan)} == set(Harness.model_fields)
    given: dict[str, Any] = {"tasks": ["gsm8k"], "limit": 3, "chat": True, "ctx": 4096, "parallel": 2}
    (tmp_path / "m.gguf").touch()
    config = make_config({"source": str(tmp_path / "m.gguf"), "evaluate": {"suite": "harness", "harness": given}})
    context = Context(config, tmp_path, State(tmp_path), pending={("source", "")})
    payload = request(context, Target([tmp_path / "q.gguf"], tmp_path / "q.json"))
    assert payload["harness"] == {**given, "allow_code": False}


@pytest.mark.parametrize(("words", "layers"), [((), -1), (("--gpu-layers", "0"), 0), (("--gpu-layers", "7"), 7)])
def test_zero_is_a_value(
    call: Call,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    layers: int,
) -> None:
    """What the command line says wins over the file, 0 included."""
    (tmp_path / "run.yaml").write_text("source: m.gguf\ngpu: {layers: -1}\n")
    seen: list[RunConfig] = []

    def stop(config: RunConfig, **_: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("apex_quant.pipeline.engine.run", stop)
    call("run", tmp_path / "run.yaml", *words)
    assert [config.gpu.layers for config in seen] == [layers]
