"""`convert`: a Hugging Face checkpoint becomes a GGUF file, by llama.cpp's own converter of the library's release.

The converter runs as a process in a Python that has what it needs. What can be known before is checked before: its
needs, the architecture, missing or truncated weights, free disk. The result appears complete or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from apex_quant import hub
from apex_quant.checkpoint import OUTTYPES, READ_METHODS, Checkpoint, architectures, describe
from apex_quant.converter_python import ConverterPython, find_python, foreign_environment
from apex_quant.converter_source import Converter, find_converter
from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError, did_you_mean
from apex_quant.gguf import AtomicFile, open_model
from apex_quant.hub_checkpoint import hub_checkpoint

__all__ = ["Checkpoint", "Conversion", "ConvertProgress", "convert", "describe"]

_CHILD: Final = Path(__file__).with_name("converter_child.py")
_PRE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LAST_LINES: Final = 40
_MAX_LINE: Final = 64 << 10
_SPARE: Final = 64 << 20  # bytes of disk beyond the estimate
_PATIENCE: Final = 10.0  # seconds that an interrupted converter has to end by itself
_WRITING: Final = re.compile(r"Writing:\s+(\d+)%")
_TENSOR: Final = re.compile(r"(?:INFO:\S+?:)?([\w.]+),\s+torch\.\w+ --> ")
_WARNING: Final = re.compile(r"^(?:WARNING:[\w.-]+:|APEX: )(.*\w.*)$")


@dataclass(frozen=True)
class ConvertProgress:
    """One step of the converter: `phase` is reading, writing; `share` of that phase is between 0 and 1."""

    phase: str
    share: float
    detail: str


@dataclass(frozen=True)
class Conversion:
    """A written GGUF file."""

    path: Path
    bytes: int
    architecture: str
    outtype: str
    tensors: int
    mmproj: bool
    converter: str
    seconds: float
    checkpoint: Checkpoint
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **vars(self),
            "path": str(self.path),
            "checkpoint": self.checkpoint.to_json(),
            "warnings": list(self.warnings),
        }


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    outtype: str = "auto",
    mmproj: bool = False,
    nextn: bool = True,
    revision: str | None = None,
    name: str | None = None,
    pre: str | None = None,
    trust_remote_code: bool = False,
    python: str | Path | None = None,
    force: bool = False,
    progress: Callable[[ConvertProgress | hub.HubProgress], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Conversion:
    """Convert a checkpoint directory, or a hub id that is downloaded first, to one GGUF file.

    `outtype` is bf16, f16, f32, or auto for the 16-bit type of the weights; `mmproj` writes the vision or audio
    projector instead of the language model; `nextn` False leaves NextN/MTP blocks out where the converter can (else a
    warning says that they are kept). `name` becomes general.name.
    `pre` names llama.cpp's splitting rule for a vocabulary that the converter does not recognize. `python` is the
    interpreter that runs it (converter_python.py). `say` gets each line of its log.

    Raises UsageError, InputError for a checkpoint that cannot be converted, ResourceError for what is missing (needs,
    disk, network), NativeError when the converter breaks. Interrupted or failed, it leaves no file.
    """
    say = say or (lambda line: None)
    if outtype not in OUTTYPES:
        raise UsageError(f"--outtype {outtype!r}: choose {', '.join(OUTTYPES)}" + did_you_mean(outtype, list(OUTTYPES)))
    if pre is not None and not _PRE.fullmatch(pre):
        raise UsageError(f"--pre {pre!r} is no name of a splitting rule such as qwen35 or llama-bpe")
    if out is not None:
        _check_target(Path(out), force)
    is_local = Path(source).exists() or not hub.HUB_ID.fullmatch(str(source))
    if is_local and revision is not None:
        raise UsageError("--revision concerns a download, and the source is a directory")
    found = describe(source) if is_local else None  # a wrong directory is said before needs are
    interpreter = find_python(python)
    converter = find_converter(say=say)
    if found is None:
        found = _downloaded(str(source), revision, converter, progress, mmproj=mmproj)
        name = name or str(source).rpartition("/")[2].replace("-", " ")
    check(found, converter, mmproj=mmproj)
    target = Path(out) if out is not None else _default_name(found, source, outtype, mmproj)
    _check_target(target, force)
    _check_disk(target, found.estimate(outtype, mmproj=mmproj))
    arguments = [os.fspath(found.path.resolve()), "--outtype", outtype]
    arguments += ["--mmproj"] if mmproj else []
    arguments += ["--model-name", name] if name else []
    start = time.monotonic()
    without_nextn = not nextn or found.without_nextn
    if not (nextn or mmproj or converter.has_classes):
        arguments.append("--no-nextn")  # the child process cannot set it on the model's class
    run = _Run(interpreter, converter, found, pre, trust_remote_code, without_nextn, progress, say)
    partial = AtomicFile(target)
    try:
        # the script fills {ftype} and the like in names, so braces are doubled
        outfile = partial.partial.resolve()
        escaped = outfile.name.replace("{", "{{").replace("}", "}}")
        run([*arguments, "--outfile", str(outfile.with_name(escaped))])
        with open_model(partial.partial) as model:
            architecture, tensors = model.architecture, len(model.tensors)
            told = list(_odd(model.metadata, mmproj, nextn))
        partial.commit()
    finally:
        if partial.is_open:
            partial.abandon()
    return Conversion(
        path=target,
        bytes=target.stat().st_size,
        architecture=architecture,
        outtype=found.outtype(outtype),
        tensors=tensors,
        mmproj=mmproj,
        converter=converter.origin,
        seconds=time.monotonic() - start,
        checkpoint=found,
        warnings=(*found.warnings, *told, *run.warnings),
    )


def check(checkpoint: Checkpoint, converter: Converter, *, mmproj: bool = False) -> None:
    """Refuse what cannot be converted, before anything starts. InputError."""
    where = checkpoint.path
    if checkpoint.missing:
        more = f" and {len(checkpoint.missing) - 1} more" if len(checkpoint.missing) > 1 else ""
        raise InputError(f"{where}: {checkpoint.missing[0]}{more}", hint="complete the download, then try again")
    if mmproj and not (checkpoint.vision or checkpoint.audio):
        raise InputError(f"{where}: --mmproj, but its configuration has no vision or audio tower")
    method = checkpoint.quantization
    if converter.pinned and method is not None and method not in READ_METHODS:
        raise InputError(
            f"{where}: is quantized with {method}, which the converter does not read",
            hint="convert the original, unquantized checkpoint",
        )
    check_architecture(where, (checkpoint.architecture, checkpoint.text_architecture), converter, mmproj=mmproj)


def check_architecture(
    where: str | Path, architectures: Sequence[str], converter: Converter, *, mmproj: bool = False
) -> None:
    """Refuse a model that the converter's table does not have, by what its config.json calls it. InputError."""
    known = converter.architectures(mmproj=mmproj)
    # which of the two names counts depends on the architecture
    names = [name for name in architectures if name]
    if known and names and not known.intersection(names):
        what = "has no projector converter for" if mmproj else "does not convert"
        raise InputError(
            f"{where}: {converter.origin}'s converter {what} {names[0]}." + did_you_mean(names[0], sorted(known)),
            hint="LLAMA_CPP_DIR names a newer llama.cpp to convert with; the installed library must know it as well",
        )


class _Run:
    """One run of the converter's process: its log is followed, its progress told, its failure explained."""

    def __init__(
        self,
        interpreter: ConverterPython,
        converter: Converter,
        checkpoint: Checkpoint,
        pre: str | None,
        trust: bool,
        without_nextn: bool,
        progress: Callable[[ConvertProgress], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self.python, self.script = interpreter.path, converter.script
        self.checkpoint, self.pre, self.trust, self.without_nextn = checkpoint, pre, trust, without_nextn
        self.progress, self.say = progress or (lambda event: None), say
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self.warnings: list[str] = []
        self._seen = 0

    def __call__(self, arguments: list[str]) -> None:
        options = {
            "script": str(self.script),
            "parent": os.getpid(),
            "pre": self.pre,
            "trust": self.trust,
            "without_nextn": self.without_nextn,
        }
        env = dict(foreign_environment(), PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8", HF_HUB_OFFLINE="1")
        process = subprocess.Popen(
            [str(self.python), str(_CHILD), json.dumps(options), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # a Ctrl-C reaches us alone, and we end it
        )
        assert process.stdout is not None
        try:
            with process.stdout:
                for line in _lines(process.stdout):
                    self._follow(line)
            status = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        if status:
            raise self._explained(status)

    def _follow(self, line: str) -> None:
        if found := _WRITING.search(line):
            self.progress(ConvertProgress("writing", int(found[1]) / 100, ""))
            return
        self.last.append(line)
        self.say(line)
        if found := _TENSOR.search(line):
            self._seen += 1
            share = min(1.0, self._seen / max(self.checkpoint.tensors, 1))
            self.progress(ConvertProgress("reading", share, found[1]))
        elif (found := _WARNING.match(line)) and len(self.warnings) < 20 and "**" not in line:
            self.warnings.append(found[1].strip())

    def _explained(self, status: int) -> ApexError:
        """The converter's death as an error: what it said, whose fault that is, and what to do."""
        where = self.checkpoint.path
        text = "\n".join(self.last)
        said = next((line.strip() for line in reversed(self.last) if line.strip()), "nothing")[:400]
        if status < 0:
            hint = "the system may have run out of memory" if status == -signal.SIGKILL else None
            how = f"ended with signal {signal.Signals(-status).name}"
            return NativeError(f"{where}: the converter {how}; its last line: {said}", log_tail=text, hint=hint)
        for pattern, kind, hint in _EXPLAINED:
            if re.search(pattern, text):
                return kind(f"{where}: {said}", hint=hint)
        return NativeError(
            f"{where}: the converter failed: {said}", log_tail=text, hint="--debug shows its last lines, --log all"
        )


# what the converter's last lines say -> the error, the cure; first match wins
_EXPLAINED: Final[tuple[tuple[str, type[ApexError], str], ...]] = (
    (
        r"No space left on device|Errno 28",
        ResourceError,
        "free some space; what was written is removed",
    ),
    (
        r"APEX: the checkpoint wants to run Python code",
        InputError,
        "--trust-remote-code runs it, with all your rights: read it first",
    ),
    (
        r"BPE pre-tokenizer was not recognized",
        InputError,
        "for a fine-tune whose vocabulary was changed, name the rule of its base model: --pre qwen35",
    ),
    (
        r"ModuleNotFoundError|ImportError",
        ResourceError,
        "install it where the converter runs (--python), or apex convert --setup",
    ),
    (r"MemoryError|DefaultCPUAllocator: can't allocate", ResourceError, "the converter ran out of memory"),
    (
        r"(is|are) not (yet )?supported|NotImplementedError|Missing or incomplete model files|"
        r"Mismatch between weight map|Can not map tensor|Failed to detect model architecture",
        InputError,
        "the converter does not know this form; LLAMA_CPP_DIR names a newer one",
    ),
)


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines of a log in which a progress bar rewrites its own line; overlong ones are cut."""
    rest = b""
    fd = stream.fileno()
    while chunk := os.read(fd, 1 << 16):
        *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
        rest = rest[-_MAX_LINE:]
        for line in whole:
            if line.strip():
                yield line.decode("utf-8", "replace").rstrip()
    if rest.strip():
        yield rest.decode("utf-8", "replace").rstrip()


def _downloaded(
    repo: str,
    revision: str | None,
    converter: Converter,
    progress: Callable[[hub.HubProgress], None] | None,
    *,
    mmproj: bool,
) -> Checkpoint:
    """A repository's checkpoint. InputError, before the weights, for an architecture that is not converted."""

    def check(config: Mapping[str, Any]) -> None:
        check_architecture(repo, architectures(config), converter, mmproj=mmproj)

    return describe(hub_checkpoint(repo, revision, check=check, progress=progress).folder)


def _default_name(checkpoint: Checkpoint, source: str | Path, outtype: str, mmproj: bool) -> Path:
    """NAME-BF16.gguf in the working directory, mmproj-NAME-BF16.gguf for projectors."""
    base = Path(source).resolve().name if Path(source).exists() else str(source).rpartition("/")[2]
    return Path(f"{'mmproj-' if mmproj else ''}{base or 'model'}-{checkpoint.outtype(outtype).upper()}.gguf")


def _check_target(path: Path, force: bool) -> None:
    if path.suffix != ".gguf":
        raise UsageError(f"{path}: a GGUF file ends in .gguf")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such directory")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", hint="choose another name or use --force")


def _check_disk(target: Path, estimate: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < estimate + _SPARE:
        raise ResourceError(
            f"{target}: about {estimate / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free there",
            hint="free some space, or write it elsewhere with -o",
        )


def _odd(metadata: Any, mmproj: bool, nextn: bool) -> Iterator[str]:
    """What users stumble over later."""
    if not nextn and metadata.get(f"{metadata.get('general.architecture')}.nextn_predict_layers"):
        yield "the NextN blocks are kept: the converter cannot leave them out of this architecture"
    if not mmproj and "tokenizer.chat_template" not in metadata:
        yield "the checkpoint has no chat template: servers will guess one"
