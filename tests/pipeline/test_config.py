"""The configuration of a run: what is taken, what is refused and how it is said; hostile files; published files."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from apex_quant.cli.pipeline import setting
from apex_quant.cli.run_init import write_config
from apex_quant.errors import InputError, UsageError
from apex_quant.pipeline import describe, migration
from apex_quant.pipeline.config import PHASES, RunConfig, load_config, make_config, sections
from apex_quant.pipeline.keys import HARNESS_TASKS, METRICS, Section
from apex_quant.pipeline.yaml_text import MAX_BYTES, parse_yaml
from apex_quant.publishable import MOST_BYTES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load(folder: Path, text: str, **overrides: Any) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refused(folder: Path, text: str | bytes) -> str:
    """What an InputError says, without the name of the file."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        load_config(path)
    return caught.value.message.removeprefix(str(path)).lstrip(":, ")


# --- what is taken ---


def test_what_people_write(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
source: Qwen/Qwen3.5-35B-A3B
tiers: i-quality, i-compact
sizes: 12GB
calibrate: {tokens: 100k, corpus: [builtin, more.txt]}
evaluate:
  suite: all
  harness:
    tasks: [ifeval]
  task_files: {mmlu: hub:USER/DATA/mmlu.bin}
baselines:
  - unsloth/X-GGUF:*UD-Q4*:unsloth
  - {repo: me/Y, revision: main, pattern: "*.gguf"}
publish:
""",
    )
    assert config.wanted_tiers == ("i-quality", "i-compact")
    assert config.sizes == (12_000_000_000,)
    assert config.calibrate.tokens == 100_000
    assert config.baselines == ("unsloth/X-GGUF:*UD-Q4*:unsloth", "me/Y@main:*.gguf")
    assert config.publish.repo is None
    assert config.publish.shards == MOST_BYTES
    assert config.evaluate.harness.tasks == ("ifeval",)


def test_everything_comes_back() -> None:
    config = make_config({"source": "a/b", "tiers": ["all"], "phases": {"from": "calibrate", "skip": ["report"]}})
    assert make_config(config.to_json()) == config


def test_which_tiers() -> None:
    assert make_config({"source": "a/b"}).wanted_tiers == ("i-quality", "i-balanced", "i-compact", "i-mini")
    assert make_config({"source": "a/b", "sizes": ["12GB"]}).wanted_tiers == ()
    assert len(make_config({"source": "a/b", "tiers": "all,quality"}).wanted_tiers) == 9


@pytest.mark.parametrize(
    ("phases", "selected"),
    [
        ({}, PHASES),
        ({"phase": "quantize"}, ("quantize",)),
        ({"from": "evaluate"}, ("evaluate", "baselines", "report", "publish")),
        ({"from": "evaluate", "skip": ["publish"]}, ("evaluate", "baselines", "report")),
        ({"only": "report,verify"}, ("verify", "report")),
        ({"skip": ["evaluate"]}, tuple(name for name in PHASES if name != "evaluate")),
    ],
)
def test_selected_phases(phases: dict[str, Any], selected: tuple[str, ...]) -> None:
    assert make_config({"source": "a/b", "phases": phases}).phases.selected() == selected


def test_the_command_line_wins(tmp_path: Path) -> None:
    text = "source: a/b\nevaluate: {suite: native, tasks: 100}\nthreads: 3\n"
    config = load(tmp_path, text, **{"evaluate.suite": "none", "threads": 5, "publish": {"repo": "me/x"}})
    assert (config.evaluate.suite, config.evaluate.tasks, config.threads) == ("none", 100, 5)
    assert config.publish.repo == "me/x"
    # a nested section changes what it names and leaves the rest
    assert load(tmp_path, text, evaluate={"suite": "none"}).evaluate.tasks == 100


def test_phases_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    text = "source: a/b\nphases: {from: quantize, skip: [report]}\n"
    assert load(tmp_path, text, **{"phases.phase": "verify"}).phases.selected() == ("verify",)
    with pytest.raises(UsageError, match="give one of phase, from and only"):
        load_config(None, {"source": "a/b", "phases.phase": "verify", "phases.only": "report"})


def test_paths_may_be_path_objects(tmp_path: Path) -> None:
    config = load_config(None, {"source": tmp_path / "m.gguf", "reference": {"text": [tmp_path / "t.txt"]}})
    assert config.source == str(tmp_path / "m.gguf")
    assert config.reference.text == (str(tmp_path / "t.txt"),)


def test_files_are_relative_to_the_file(tmp_path: Path) -> None:
    text = """
source: models/m.gguf
work: out
tiers: i-quality,mine.toml
calibrate: {corpus: [builtin, t.txt, "hub:a/b"], imatrix: /abs/i.gguf}
evaluate: {task_files: {arc: arc.bin, mmlu: "hub:U/D/F"}}
convert: {mmproj: "a/b:mm.gguf", python: python3}
"""
    config = load(tmp_path, text)
    assert config.source == str(tmp_path / "models/m.gguf")
    assert config.work == str(tmp_path / "out")
    assert config.tiers == ("i-quality", str(tmp_path / "mine.toml"))
    assert config.calibrate.corpus == ("builtin", str(tmp_path / "t.txt"), "hub:a/b")
    assert config.calibrate.imatrix == "/abs/i.gguf"
    assert config.evaluate.task_files == {"arc": str(tmp_path / "arc.bin"), "mmlu": "hub:U/D/F"}
    assert (config.convert.mmproj, config.convert.python) == ("a/b:mm.gguf", "python3")
    assert not config.is_hub
    assert not make_config({"source": "models/m.gguf"}).is_hub
    # ORG/NAME is a hub id unless there is such a folder
    assert load(tmp_path, "source: models/m").source == "models/m"
    (tmp_path / "models/m").mkdir(parents=True)
    assert load(tmp_path, "source: models/m").source == str(tmp_path / "models/m")


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/Big-Model", "Big-Model"), ("x/m-BF16.gguf", "m-BF16"), ("x/m-00001-of-00003.gguf", "m"), ("dir/", "dir")],
)
def test_the_name_of_a_model(source: str, name: str) -> None:
    assert make_config({"source": source}).model_name == name
    assert str(make_config({"source": source}).work_folder) == f"{name}-apex"


def test_how_models_are_loaded() -> None:
    config = make_config({"source": "a/b", "threads": 3, "gpu": {"layers": -1, "tensor_split": [3, 1]}})
    options = config.session_options(ctx=64)
    assert (options.threads, options.gpu_layers, options.tensor_split, options.ctx) == (3, -1, (3.0, 1.0), 64)


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: a/b\nevaluate:\n  suit: all\n", "line 3: evaluate.suit: is not known. Did you mean suite?"),
        ("source: a/b\nteirs: all\n", "line 2: teirs: is not known. Did you mean tiers?"),
        ("source: a/b\nimatrix: x\n", "line 2: imatrix: is not known. There is calibrate.imatrix."),
        ("tiers: all\n", "source: is needed"),
        ("source: 12\n", "line 1: source: must be text, is 12: put it in quotes"),
        ("source: a/b\nname: yes\n", "line 2: name: must be text, is true: put it in quotes"),
        ("source: a/b\nkeep: 1\n", "line 2: keep: must be true or false, is 1"),
        ("source: a/b\nthreads: '4'\n", "line 2: threads: must be a whole number, is '4'"),
        ("source: a/b\nthreads: 0\n", "line 2: threads: must be greater than or equal to 1, is 0"),
        ("source: a/b\ngpu: 3\n", "line 2: gpu: must be a section with keys of its own, is 3"),
        (
            "source: a/b\nconvert: {outtype: bf61}\n",
            "line 2: convert.outtype: must be 'auto', 'bf16', 'f16' or 'f32', is 'bf61'. Did you mean bf16?",
        ),
        ("source: a/b\nsizes: [1GB, 12gx]\n", "line 2: sizes.1: '12gx' is not a size; write 16GiB, 48G or 500M"),
        (
            "source: a/b\ntiers:\n - i-quality\n - i-compat\n",
            "line 4: tiers.1: no tier or llama.cpp mix is called 'i-compat'. Did you mean i-compact? "
            "(`apex tiers` lists them; a tier of your own is a .toml file)",
        ),
        (
            "source: a/b\nevaluate: {harness: {tasks: [humaneval]}}\n",
            "line 2: evaluate.harness: humaneval run programs that the model writes: allow_code: true permits it",
        ),
        (
            "source: a/b\nphases: {phase: quantize, only: [verify]}\n",
            "line 2: phases: give one of phase, from and only",
        ),
        (
            "source: a/b\nphases: {only: [plots]}\n",
            "line 2: phases.only.0: 'plots' is no phase: it is called report here",
        ),
        ("source: a/b\nphases: {phase: verify, skip: [verify]}\n", "line 2: phases: no phase is left"),
        ("source: a/b\npublish: {repo: me}\n", "line 2: publish.repo: 'me' is not of the form ORG/NAME"),
        ("source: a/b\nbaselines: [a/b]\n", "line 2: baselines.0: 'a/b' is not REPO[@REVISION]:PATTERN[:LABEL]"),
        ("source: a/b\ncalibrate: {mix: chat=300}\n", "line 2: calibrate.mix: the share of chat must be"),
        ("source: a/b\ngpu: {tensor_split: [.inf]}\n", "line 2: gpu.tensor_split.0: must be a finite number, is inf"),
    ],
)
def test_it_is_said_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    assert refused(tmp_path, text).startswith(said)


def test_all_at_once_and_in_order(tmp_path: Path) -> None:
    said = refused(tmp_path, "source: 1\nkeep: 2\nthreads: x\n")
    assert re.findall(r"line (\d): (\w+)", said) == [("1", "source"), ("3", "threads"), ("2", "keep")]
    many = "source: a/b\n" + "".join(f"bad{n}: 1\n" for n in range(9))
    assert refused(tmp_path, many).endswith("; and 4 more")


def test_whose_fault_it_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^evaluate.suite: must be .*Did you mean all\?$"):
        load(tmp_path, "source: a/b\n", **{"evaluate.suite": "al"})
    with pytest.raises(UsageError, match=r"^source: is needed$"):
        load_config(None, {"tiers": ["all"]})
    with pytest.raises(InputError, match="line 2: gpu: must be a section"):  # an option cannot go into what is none
        load(tmp_path, "source: a/b\ngpu: 3\n", **{"gpu.layers": 3})


def _strings(model: type[BaseModel], prefix: str = "") -> list[str]:
    return [f"{prefix}.{row.name}".lstrip(".") for row in describe.rows(model)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([key for name, model in sections() for key in _strings(model, name)]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters), inner, max_size=2),
        max_leaves=5,
    ),
)
def test_any_value_is_taken_or_refused(key: str, value: Any) -> None:
    try:
        made = make_config({"source": "a/b"}, {key: value})
    except UsageError as error:
        said = error.message
    else:
        said = key
        assert make_config(made.to_json()) == made
    assert said.startswith((key, key.rpartition(".")[0] or key))


# --- hostile files ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"source: \xff\xfe\n", "line 1: not UTF-8 text"),
        (b"source: a\x00b\n", "line 1: the character 0x0 is not allowed"),
        (b"- a\n- b\n", "line 1: must be lines of KEY: VALUE"),
        (b"just text", "line 1: must be lines of KEY: VALUE"),
        (b"source: [a\n", "line 2: not YAML: expected ',' or ']'"),
        (b"a: b: c\n", "line 1: not YAML: mapping values are not allowed here"),
        (b"source: a/b\n---\nsource: c/d\n", "line 2: not YAML: but found another document"),
        (b"source: *nothing\n", "line 1: not YAML: found undefined alias"),
        (b"source: a/b\nsource: c/d\n", "line 2: 'source' is given twice; first in line 1"),
        (b"source: 2020-01-01\n", "line 1: '2020-01-01' is a timestamp to YAML"),
        (b"source: !!python/object/apply:os.system ['true']\n", "line 1: "),
        (b"source: !!set {a, b}\n", "line 1: "),
        (b"source: !!int x\n", "line 1: 'x' is not what its tag says"),
        (b"1: a\n", "line 1: '1' as a key is not text"),
        (b"? [a]\n: b\n", "line 1: a list or mapping as a key is not text"),
        (b"<<: {source: a/b}\n", "line 1: "),
        (b"threads: " + b"9" * 4000, "line 1: a number of 4000 characters"),
        (b"source: " + b"9" * 5000, "line 1: a text of 5000 characters"),
        (b"a: " + b"[" * 200_000, "line 1: nested more than 16 levels deep"),
        (b"a: " + b"{a: " * 1000, "line 1: nested more than 16 levels deep"),
        (b"".join(b"%*s- \n" % (n, b"") for n in range(400)), "line 17: nested more than 16 levels deep"),
        (b"a: [" + b"1," * 60_000 + b"]", "line 1: more than 2000 values, aliases included"),
        (b"a: &a [*a]\n", "line 1: more than 2000 values, aliases included"),
        (b"#" * (MAX_BYTES + 1), "longer than 256 KiB, not a configuration"),
    ],
)
def test_hostile_files(tmp_path: Path, text: bytes, said: str) -> None:
    assert refused(tmp_path, text).startswith(said)


def test_billion_laughs(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "more than 2000 values, aliases included" in refused(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("name=2024-13-45", "'2024-13-45' is a timestamp to YAML"),
        ("threads=!!int x", "'x' is not what its tag says"),
        ("calibrate.seed=0b_", "'0b_' is not what its tag says"),
        ("threads=" + "9" * 5000, "a text of 5000 characters"),
        ("tiers=" + "[" * 5000, "nested more than 16 levels deep"),
        ("tiers={a: 1, a: 2}", "'a' is given twice"),
        ("name=\udc80", "the character 0xdc80 is not allowed"),
        ("tiers=[a", "not YAML"),
        ("=3", "is not KEY=VALUE"),
    ],
)
def test_values_of_the_command_line_are_read_as_those_of_files(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        setting(word)
    assert len(caught.value.message) < 300


def test_values_of_the_command_line() -> None:
    for word, value in (("", None), ("100k", "100k"), ("3", 3), ("[a, b]", ["a", "b"]), ("{a: 1}", {"a": 1})):
        assert setting(f"key={word}") == ("key", value)
    assert setting("key=a: b") == ("key", {"a": "b"})


def test_aliases_may_be_used(tmp_path: Path) -> None:
    config = load(tmp_path, "source: a/b\ncalibrate: {corpus: &mine [hub:x/y]}\nreference: {text: *mine}\n")
    assert config.calibrate.corpus == ("hub:x/y",)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=string.ascii_letters[:6] + "{}[]:,-#&*!|>'\"%@ \n\t01.?~<", max_size=60))
def test_any_text_is_a_mapping_or_refused(text: str) -> None:
    try:
        found = parse_yaml(text, "x")
    except InputError:
        return
    # what is taken is what PyYAML's own loader makes of it
    assert found.values == (yaml.safe_load(text) or {})


# --- the example and the documents ---


def test_the_example_is_the_defaults(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", source="a/b")
    assert load_config(path) == make_config({"source": "a/b"})
    text = path.read_text()
    path.write_text(re.sub(r"^# ", "", text, flags=re.MULTILINE))
    assert load_config(path) == make_config({"source": "a/b"})
    with pytest.raises(UsageError, match="exists already"):
        write_config(path)
    write_config(path, force=True)
    assert path.read_text() == describe.template()
    assert [one.name for one in tmp_path.iterdir()] == ["run.yaml"]
    with pytest.raises(UsageError, match="is a folder"):
        write_config(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        write_config(tmp_path / "no" / "run.yaml")


def test_every_key_is_described() -> None:
    for name, model in sections():
        assert model.__doc__, name
        for row in describe.rows(model):
            assert row.text, f"{name}.{row.name}"
            assert "|" not in row.text
    assert describe.markdown() in (DOCS / "config.md").read_text()


def test_lists_are_those_of_the_functions() -> None:
    from apex_quant.evaluation.evaluate import METRICS as OF_EVALUATE
    from apex_quant.evaluation.harness import TASKS

    assert set(METRICS) == {*OF_EVALUATE, "speed"}
    assert set(HARNESS_TASKS) == set(TASKS)


def test_defaults_are_those_of_the_functions() -> None:
    """A key and the parameter of the same name agree, unless the pipeline has a reason to differ."""
    import inspect

    from apex_quant.calibration.calibrate import calibrate
    from apex_quant.convert import convert
    from apex_quant.evaluation.evaluate import evaluate
    from apex_quant.evaluation.make_reference import make_reference
    from apex_quant.recipe.planned import PlanOptions

    config = make_config({"source": "a/b"})
    pairs: list[tuple[Section, Any]] = [
        (config.calibrate, calibrate), (config.convert, convert), (config.evaluate, evaluate),
        (config.reference, make_reference), (config.quantize, PlanOptions),
    ]  # fmt: skip
    apart = {"text", "task_files", "only", "mmproj", "harness"}  # None there; nothing, 'auto' or a section here
    for section, function in pairs:
        parameters = inspect.signature(function).parameters
        for name in set(type(section).model_fields) & set(parameters) - apart:
            ours, theirs = getattr(section, name), parameters[name].default
            assert ours == theirs, f"{type(section).__name__}.{name}"


# --- published files ---

PUBLISHED = """\
name: Qwen3.5-35B-A3B
model_id: Qwen/Qwen3.5-35B-A3B
layers: 40
hf_repo: me/Qwen3.5-35B-A3B-APEX-GGUF
source_format: safetensors
config_prefix: qwen35_35b
tokenizer: Qwen/Qwen3.5-35B-A3B
mmproj: unsloth/X-GGUF:mmproj-F16.gguf
calibration: calibration.txt
ngl: 99
eval_suite: native
harness_tasks: humaneval_instruct,ifeval,gsm8k_cot_zeroshot,minerva_math,arc_challenge
native_evals: "ppl,kl,hellaswag,speed"
baselines:
  - unsloth/X-GGUF:*Q8_0*:unsloth-q8
"""


def test_a_published_file(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(PUBLISHED)
    notes: list[str] = []
    config = load_config(path, say=notes.append)
    assert config == make_config(
        {
            "source": "Qwen/Qwen3.5-35B-A3B",
            "name": "Qwen3.5-35B-A3B",
            "work": str(tmp_path / "qwen35_35b"),
            "tiers": ["quality", "balanced", "compact", "i-quality", "i-balanced", "i-compact", "mini", "nano",
                      "micro"],
            "convert": {"mmproj": "unsloth/X-GGUF:mmproj-F16.gguf"},
            "calibrate": {"corpus": [str(tmp_path / "calibration.txt")]},
            "evaluate": {
                "suite": "native", "only": ["ppl", "kld", "hellaswag", "speed"],
                "harness": {"tasks": ["ifeval", "gsm8k"]},
            },
            "baselines": ["unsloth/X-GGUF:*Q8_0*:unsloth-q8"],
            "publish": {"repo": "me/Qwen3.5-35B-A3B-APEX-GGUF"},
            "gpu": {"layers": -1},
        }
    )  # fmt: skip
    for key in yaml.safe_load(PUBLISHED):
        assert any(note.startswith(f"{key}") for note in notes), key
    assert "layers: not needed: read from the model's header" in notes
    assert any("humaneval_instruct left out" in note and "allow_code" in note for note in notes)
    assert any("minerva_math left out" in note for note in notes)
    assert any("arc_challenge is measured without the harness" in note for note in notes)


def test_published_gguf_source_and_skipped_tiers() -> None:
    values, notes = migration.migrate({"source_gguf": "a/X-GGUF", "model_id": "b/X", "SKIP_TIERS": "micro,i-quality"})
    assert (values["source"], values["source_files"]) == ("a/X-GGUF", "*BF16*")
    assert "model_id: not needed: source_gguf is the source" in notes
    assert values["tiers"] == ["quality", "balanced", "compact", "i-balanced", "i-compact", "mini", "nano"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: X\nmodel_id: a/b\nlayer: 40\n",
            "layer is no key of the published per-model files. Did you mean lay",
        ),
        (
            "model_id: a/b\ntiers: all\n",
            "model_id is a key of the published per-model files and tiers one of apex",
        ),
        ("name: X\nmodel_id: a/b\nhf_repo: me\n", "line 3: publish.repo: 'me' is not of the form ORG/NAME"),
        ("model_id: a/b\nnative_evals: ppl,klx\n", "native_evals: 'klx' is none of"),
        ("model_id: a/b\nngl: many\n", "ngl must be a number of layers, is 'many'"),
        ("model_id: a/b\neval_suite: some\n", "line 2: evaluate.suite: must be"),
        ("model_id: [a]\n", "model_id must be text"),
        ("model_id: a/b\nSKIP_TIERS: huge\n", "SKIP_TIERS: no tier huge"),
    ],
)
def test_published_files_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    assert refused(tmp_path, text).startswith(said)


def test_every_published_key_has_a_place() -> None:
    """The keys that the published project documents, and the phases of its pipeline."""
    keys = {"name", "model_id", "layers", "hf_repo", "source_format", "source_gguf", "config_prefix", "tokenizer",
            "mmproj", "calibration", "ngl", "harness_tasks", "native_evals", "baselines", "SKIP_TIERS"}  # fmt: skip
    phases = {"config", "download", "convert", "baseline", "quantize", "imatrix", "ivariants", "eval", "eval_baselines",
              "plots", "publish", "mlx"}  # fmt: skip
    assert keys <= set(migration.BY_KEY)
    assert phases == set(migration.PHASES_THERE)
    known = {f"{name}.{row.name}".lstrip(".") for name, model in sections() for row in describe.rows(model)}
    assert {key for row in migration.ROWS for key in row.becomes} <= known
    assert set(migration.PHASES_THERE.values()) <= {*PHASES, "apex convert-mlx"}
    assert migration.tables() in (DOCS / "migration.md").read_text()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(
    st.sampled_from([*migration.BY_KEY]),
    st.none() | st.booleans() | st.integers() | st.text(string.printable, max_size=12)
    | st.lists(st.text(string.ascii_letters, max_size=6), max_size=3),
    min_size=1,
))  # fmt: skip
def test_any_published_file_is_migrated_or_refused(published: dict[str, Any]) -> None:
    try:
        values, notes = migration.migrate(published)
        make_config(values, where="x")
    except InputError:
        return
    given = {key for key, value in published.items() if value is not None and value != ""}
    assert all(any(note.startswith(key) for note in notes) for key in given)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["{0}: 1", "source: *{0}", "source: !{0} x", "source: a\n{0}: 1\n{0}: 2", "tiers: {0}",
                        "name: '{0}'", "evaluate: {{suite: {0}}}", "evaluate: {{only: [{0}]}}", "hf_repo: {0}",
                        "{0}: 1\nhf_repo: a/b", "hf_repo: a/b\nnative_evals: {0}", "source: !!int {0}"]))  # fmt: skip
def test_messages_stay_short(form: str) -> None:
    try:
        found = parse_yaml(form.format("x" * 4096), "f")
        published = migration.is_published(found.values, "f", RunConfig.model_fields)
        values = migration.migrate(found.values)[0] if published else found.values
        make_config(values, where="f")
        said = ""
    except InputError as error:
        said = error.message
    assert len(said) < 5000
