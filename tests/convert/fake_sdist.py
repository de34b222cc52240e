"""A source distribution with a stand-in for llama.cpp's converter: it needs no PyTorch and does as it is told."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

SCRIPT = """
import argparse, os, pathlib, shutil, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
for name in ("outfile", "outtype", "model-name"):
    parser.add_argument("--" + name)
for name in ("mmproj", "no-nextn"):
    parser.add_argument("--" + name, action="store_true")
given = parser.parse_args()
if given.no_nextn:
    sys.exit("ERROR:hf-to-gguf:--mtp / --no-nextn are not supported for TinyForCausalLM")
out = given.outfile.format(ftype="bf16")
print("INFO:hf-to-gguf:blk.0.attn_q.weight,  torch.bfloat16 --> BF16, shape = {8, 8}", file=sys.stderr)
print("WARNING:hf-to-gguf:something odd", file=sys.stderr)
try:
    from conversion import get_model_class
except ImportError:
    pass
else:
    print("no_mtp=" + str(getattr(get_model_class("Tiny", mmproj=given.mmproj), "no_mtp", False)), file=sys.stderr)
todo = (given.model / "do").read_text() if (given.model / "do").exists() else "copy"
if todo == "hang":
    pathlib.Path(out).write_bytes(b"GGUF")
    print("hanging", os.getpid(), flush=True)
    while True:
        time.sleep(60)
if todo == "die":
    os.kill(os.getpid(), 9)
if todo.startswith("say "):
    sys.exit(todo[4:])
sys.stderr.write("\\rWriting:   0%|  | 0.00/49.6M\\rWriting:  50%|# | 24M/49.6M [00:00, 1MB/s]\\n")
if todo == "junk":
    pathlib.Path(out).write_bytes(b"junk")
else:
    shutil.copyfile(given.model / "result.gguf", out)
"""
TABLE = """
TEXT_MODEL_MAP: dict[str, str] = {"Qwen3_5MoeForCausalLM": "qwen"}
MMPROJ_MODEL_MAP: dict[str, str] = {"Qwen3VLForConditionalGeneration": "qwen3vl"}


def get_model_class(name: str, mmproj: bool = False) -> type:
    return type(name, (), {"supports_mtp_export": not mmproj})
"""
FILES = {
    "convert_hf_to_gguf.py": SCRIPT,
    "conversion/__init__.py": TABLE,
    "gguf-py/gguf/__init__.py": "",
    "LICENSE": "MIT",
    "src/llama.cpp": "not wanted",
}
Entry = tuple[str, bytes | tarfile.TarInfo]


def write_sdist(path: Path, extra: dict[str, bytes | tarfile.TarInfo] | None = None, leave: str = "") -> str:
    """Write it and return its sha256; `extra` adds members, `leave` leaves one of FILES out."""
    root = "llama_cpp_python-9/vendor/llama.cpp/"
    with tarfile.open(path, "w:gz") as archive:
        members: dict[str, bytes | tarfile.TarInfo] = {
            root + name: text.encode() for name, text in FILES.items() if name != leave
        }
        for name, data in (members | (extra or {})).items():
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpacked(folder: Path) -> Path:
    """The same as a checkout, for LLAMA_CPP_DIR."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder
