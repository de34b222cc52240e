"""How much work each phase has: bytes it writes, memory it wants, seconds of each of its items, and what with.

A row of WORK is a function of the configuration, of what is known of the source, and of the processors; it gives
None where the phase has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from apex_quant.calibration.calibrate import COVER_LIMIT
from apex_quant.evaluation.schema import TASKS
from apex_quant.pipeline.config import RunConfig
from apex_quant.pipeline.source_facts import TYPICAL, SourceFacts

PROJECTOR: Final = "mmproj"  # the item of `convert` beside the model
# --- rates ---
# measured on one processor of the machine named at the top of benchmarks/RESULTS.md
MULTIPLIED: Final = 17e9  # weights times tokens a second: benchmarks/rates.py, BF16, 512 tokens at a time
HASHED: Final = 1.3e9  # bytes a second: benchmarks/rates.py
OBSERVING: Final = 1.05  # calibration against a plain pass: benchmarks/RESULTS.md, Calibration
# not measured: they belong to the network, the disk and the converter, hence the wide ranges
DOWNLOADED: Final = 30e6  # bytes a second
UPLOADED: Final = 15e6
CONVERTED: Final = 150e6
STREAMED: Final = 10e9  # bytes of memory a second while one token at a time is generated

_START: Final = 2.0  # seconds: a process, its library and a model
_OVERHEAD: Final = 1 << 30  # bytes of memory of a session: buffers, keys and values
_ENCODER: Final = 100 << 20  # peak of a worker: benchmarks/RESULTS.md, Memory
_ENCODER_THREAD: Final = 32 << 20
_CHARACTERS: Final = 4  # bytes of text in a token
_FEWEST_CHARACTERS: Final = 3  # where a small vocabulary needs more tokens, for what must not be too little
_HELDOUT: Final = 320_000  # bytes of the built-in held-out text
_QUESTION: Final = 400  # tokens of a question with its answers
_SPEED_TOKENS: Final = (6 * 512, 6 * 128)  # read and generated: five repetitions and a warm-up
_GREEDY: Final = 3  # prompts
_SAMPLE_SHARE: Final = 0.1  # of the tensors that verify encodes again
# questions in the test sets of the harness's tasks, tokens of an answer, subjects that a limit counts for
_HARNESS: Final = {"gsm8k": (1319, 250, 1), "mmlu_pro": (12032, 400, 14), "ifeval": (541, 400, 1),
                   "humaneval": (164, 300, 1), "mbpp": (500, 200, 1)}  # fmt: skip
_EXAMPLES: Final = 1000  # tokens of a question with its solved examples
_ALL_QUESTIONS: Final = 10_000
_PROBE_TOKENS: Final = 4096  # read with each disturbed model
_PROBES: Final = 15  # of each layer: benchmarks/RESULTS.md, 14.1 and 15.1 on two models
_PROBES_ENCODED: Final = 14  # times the whole model is encoded for them: joint probes, and each tensor in its types
_CANDIDATES: Final = 3  # recipes of a size that are encoded and measured before one is chosen
_DOMAINS: Final = 5  # texts of the held-out text
_PLANNING: Final = 0.5  # seconds for a plan
_REPORT_BYTES: Final = 20 << 20


Kind = Literal["encode", "tokens", "network", "disk", "little"]


@dataclass(frozen=True)
class Work:
    """What a phase has to do. `disk`: bytes written in WORK by item, `cached`: bytes that come to the hub's cache,
    `scratch`: bytes of files that are gone when the item is done; `seconds` by item, of all processors together,
    None where nothing tells; `kind`: what those are spent with; `temporary`: a later phase deletes what was
    written."""

    disk: Mapping[str, int | None]
    memory: int
    seconds: Mapping[str, float | None]
    kind: Kind
    basis: str
    temporary: bool = False
    cached: Mapping[str, int | None] = field(default_factory=dict)
    scratch: Mapping[str, int] = field(default_factory=dict)


# --- phases ---


def _source(config: RunConfig, facts: SourceFacts, cores: int) -> Work:
    if facts.kind in ("gguf", "checkpoint"):
        return Work({}, 64 << 20, {"": (facts.model or 0) / HASHED}, "disk", "hashing what is here")
    seconds = None if facts.download is None else facts.download / DOWNLOADED
    told = f"download at {DOWNLOADED / 1e6:.0f} MB/s"
    return Work({}, 256 << 20, {"": seconds}, "network", told, cached={"": facts.download})


def _convert(config: RunConfig, facts: SourceFacts, cores: int) -> Work | None:
    if config.is_gguf:
        return None
    size = facts.model
    disk = {"": size}
    if config.convert.mmproj is True or (config.convert.mmproj == "auto" and facts.projector):
        disk[PROJECTOR] = facts.projector
    memory = max(2 << 30, (size or 0) // 40)  # the converter holds one fused tensor of experts in 32 bits
    seconds = None if size is None else size / CONVERTED
    told = f"{facts.basis}; {CONVERTED / 1e6:.0f} MB/s"
    return Work(disk, memory, {"": seconds}, "disk", told, temporary=True)


def _reference(config: RunConfig, facts: SourceFacts, cores: int) -> Work | None:
    if config.evaluate.suite in ("none", "harness"):
        return None
    tokens = text_tokens(config)
    states = config.reference.form == "auto"
    each = 2 * (facts.embedding if states else facts.vocabulary) + facts.routing
    scored = 7 / 8 if config.reference.every_token else 1 / 2  # the share of each chunk
    size = int(text_tokens(config, _FEWEST_CHARACTERS) * scored) * each
    size += facts.embedding * facts.vocabulary * 2 if states and config.copies_output else 0
    return _forward(config, facts, {"": size}, {"": _reading(tokens, facts, cores)}, tokens, facts.model)


def _calibrate(config: RunConfig, facts: SourceFacts, cores: int) -> Work | None:
    if config.calibrate.imatrix is not None:
        return None
    tokens = config.calibrate.tokens * (1 + COVER_LIMIT if config.calibrate.cover else 1)
    seconds = _reading(tokens, facts, cores)
    times = {"": None if seconds is None else seconds * OBSERVING}
    # the sums lie beside the matrix until it is finished
    return _forward(config, facts, {"": 3 * facts.imatrix}, times, tokens, facts.model)


def _recipes(config: RunConfig, facts: SourceFacts, cores: int) -> Work:
    if not config.sizes:
        return Work({}, 256 << 20, dict.fromkeys(facts.outputs, _PLANNING), "little", "plans from the header")
    text, whole = config.optimize.tokens or _PROBE_TOKENS, (facts.weights or 0) / 1e6 * TYPICAL / cores
    tokens = text * _PROBES * facts.layers
    times: dict[str, float | None] = dict.fromkeys(facts.outputs, _PLANNING)
    measured = config.optimize.sensitivity != "measure"
    sizes = [name for name in facts.outputs if name not in config.wanted_tiers]
    for name in sizes:
        read, candidate = _reading(0 if measured else tokens, facts, cores), _reading(text_tokens(config), facts, cores)
        encoded = whole * (_CANDIDATES + (0 if measured else _PROBES_ENCODED))
        times[name] = None if read is None or candidate is None else read + _CANDIDATES * candidate + encoded
        measured = True  # once for all sizes
    # the Q8_0 file that tells what rounding of activations costs, then the candidates; both go
    uniform = _uniform(facts) if config.optimize.sensitivity == "measure" else 0
    scratch = {name: max(uniform, _CANDIDATES * (facts.outputs[name] or 0)) for name in sizes}
    return replace(_forward(config, facts, {}, times, tokens, facts.model), scratch=scratch)


def _quantize(config: RunConfig, facts: SourceFacts, cores: int) -> Work:
    threads = config.quantize.threads or cores
    seconds = {
        name: None if (s := facts.encode.get(name)) is None else s / threads + (size or 0) / HASHED + _START
        for name, size in facts.outputs.items()
    }
    told = "plans, to the byte" if facts.exact else f"{facts.basis}: sizes within 10 %"
    return Work(facts.outputs, _ENCODER + threads * _ENCODER_THREAD, seconds, "encode", told)


def _verify(config: RunConfig, facts: SourceFacts, cores: int) -> Work:
    share = {"none": 0.0, "sample": _SAMPLE_SHARE, "all": 1.0}[config.verify.rebuild]
    seconds: dict[str, float | None] = {}
    for name, size in facts.outputs.items():
        encode = facts.encode.get(name) if share else 0.0
        each = None if size is None else _generating(size, facts)
        if size is None or encode is None or each is None:
            seconds[name] = None
            continue
        greedy = _GREEDY * config.verify.generate * each
        seconds[name] = 2 * size / HASHED + share * encode / cores + greedy + 2 * _START
    return Work({}, _session(_largest(facts.outputs), facts), seconds, "disk", "hashes, tensors encoded again, text")


def _evaluate(config: RunConfig, facts: SourceFacts, cores: int) -> Work | None:
    if config.evaluate.suite == "none":
        return None
    seconds = {name: _evaluation(config, size, facts, cores) for name, size in facts.outputs.items()}
    disk = dict.fromkeys(facts.outputs, _results(config))
    # a uniform Q8_0 of the whole model is made for the floor, and deleted
    scratch = dict.fromkeys(facts.outputs, _uniform(facts)) if config.evaluate.floor else {}
    made = _forward(config, facts, disk, seconds, text_tokens(config), _largest(facts.outputs))
    return replace(made, scratch=scratch)


def _baselines(config: RunConfig, facts: SourceFacts, cores: int) -> Work | None:
    if not facts.baselines:
        return None
    seconds: dict[str, float | None] = {}
    for spec, size in facts.baselines.items():
        evaluation = _evaluation(config, size, facts, cores) if config.evaluate.suite != "none" else 0.0
        seconds[spec] = None if size is None or evaluation is None else size / DOWNLOADED + evaluation
    disk = dict.fromkeys(facts.baselines, _results(config))
    memory = _session(_largest(facts.baselines), facts)
    return Work(disk, memory, seconds, "network", "downloads and evaluation", cached=facts.baselines)


def _report(config: RunConfig, facts: SourceFacts, cores: int) -> Work:
    return Work({"": _REPORT_BYTES}, 512 << 20, {"": 20.0}, "little", "plots and tables")


def _publish(config: RunConfig, facts: SourceFacts, cores: int) -> Work | None:
    if config.publish.repo is None:
        return None
    sizes = list(facts.outputs.values())
    whole = None if None in sizes else sum(size or 0 for size in sizes)
    rate = HASHED if config.publish.dry_run else UPLOADED
    split = sum(size for size in sizes if size and size > config.publish.shards)
    told = "compared and hashed" if config.publish.dry_run else f"upload at {UPLOADED / 1e6:.0f} MB/s"
    return Work({"": split}, 256 << 20, {"": None if whole is None else whole / rate}, "network", told)


WORK: Final[dict[str, Callable[[RunConfig, SourceFacts, int], Work | None]]] = {
    "source": _source, "convert": _convert, "reference": _reference, "calibrate": _calibrate, "recipes": _recipes,
    "quantize": _quantize, "verify": _verify, "evaluate": _evaluate, "baselines": _baselines, "report": _report,
    "publish": _publish,
}  # fmt: skip


# --- pieces of work ---


def _forward(
    config: RunConfig,
    facts: SourceFacts,
    disk: Mapping[str, int | None],
    seconds: Mapping[str, float | None],
    tokens: int,
    size: int | None,
) -> Work:
    """A phase that runs a model of `size` bytes over text."""
    seconds = {name: None if s is None else s + _START for name, s in seconds.items()}
    told = f"{facts.basis}; {tokens} tokens" + ("; layers on a GPU not counted" if config.gpu.layers else "")
    return Work(disk, _session(size, facts), seconds, "tokens", told)


def text_tokens(config: RunConfig, characters: int = _CHARACTERS) -> int:
    """Tokens of the evaluation text, by its size: `characters` bytes each."""
    given = config.reference
    size = sum(Path(file).stat().st_size for file in given.text if Path(file).is_file()) if given.text else _HELDOUT
    tokens = max(given.ctx, size // characters)
    texts = len(given.text) or _DOMAINS
    return min(tokens, given.chunks * given.ctx * texts) if given.chunks else tokens


def _reading(tokens: int, facts: SourceFacts, cores: int) -> float | None:
    """Seconds for reading text with the model, many tokens at a time."""
    return None if facts.active is None else tokens * facts.active / (MULTIPLIED * cores)


def _generating(size: int, facts: SourceFacts) -> float | None:
    """Seconds for one token more, which reads the active weights of a file of `size` bytes from memory."""
    return None if not facts.weights or facts.active is None else size * facts.active / facts.weights / STREAMED


def _evaluation(config: RunConfig, size: int | None, facts: SourceFacts, cores: int) -> float | None:
    """Seconds for all that is measured of one file."""
    each = None if size is None else _generating(size, facts)
    one = _reading(1, facts, cores)
    if each is None or one is None:
        return None
    given, seconds = config.evaluate, 0.0
    if given.suite in ("native", "all"):
        tokens = text_tokens(config)
        benchmarks = len([name for name in (given.only or given.task_files) if name in TASKS])
        read, generated = _SPEED_TOKENS if not given.only or "speed" in given.only else (0, 0)
        seconds += (tokens + benchmarks * (given.tasks or _ALL_QUESTIONS) * _QUESTION + read) * one + generated * each
        # the reference's output matrix is multiplied again for every scored token
        seconds += tokens / 2 * facts.embedding * facts.vocabulary / (MULTIPLIED * cores)
    if given.suite in ("harness", "all"):
        for task in given.harness.tasks:
            count, answer, subjects = _HARNESS[task]
            asked = min(count, (given.harness.limit or count) * subjects)
            seconds += asked * (answer * each + _EXAMPLES * one)
    return seconds


def _results(config: RunConfig) -> int:
    """Bytes of results.json and the numbers per token."""
    return 200_000 + 40 * text_tokens(config) // 2


def _uniform(facts: SourceFacts) -> int:
    """Bytes of a uniform Q8_0 file of a model of 16 bits."""
    return (facts.model or 0) * 17 // 32


def _largest(sizes: Mapping[str, int | None]) -> int:
    return max((size or 0 for size in sizes.values()), default=0)


def _session(size: int | None, facts: SourceFacts) -> int:
    """Memory of a loaded model: its file mapped, and logits of 2048 tokens."""
    return (size or 0) + _OVERHEAD + 2048 * facts.vocabulary * 4
