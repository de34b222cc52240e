"""A stand-in for llama-server: its --help and --list-devices, /health, and one answer, over the real port."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

_SOURCE = f"""#!{sys.executable}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
folder = Path(__file__).parent
if "--help" in sys.argv:
    print((folder / "help.txt").read_text())
    sys.exit()
if "--list-devices" in sys.argv:
    print((folder / "devices.txt").read_text())
    sys.exit()
def option(flag):
    return sys.argv[sys.argv.index(flag) + 1]
(folder / "seen.json").write_text(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ)}}))
(folder / "pid").write_text(str(os.getpid()))
if (folder / "never").exists():
    import signal
    signal.pause()
if (folder / "fails").exists():
    print("error: out of memory")
    sys.exit(3)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{{}}")
    def log_message(self, *words):
        pass
HTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
"""
HELP = """
-m,    --model FNAME                    model path
-c,    --ctx-size N                     size of the prompt context
-np,   --parallel N                     number of slots
-ngl,  --gpu-layers, --n-gpu-layers N   layers in VRAM
-ncmoe, --n-cpu-moe N                   experts of the first N layers in the CPU
-fa,   --flash-attn [on|off|auto]       flash attention
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1{more}
                                        (default: f16)
-ctv,  --cache-type-v TYPE              KV cache data type for V
-dev,  --device <dev1,dev2,..>          devices
--host HOST                             address
--port PORT                             port
-a,    --alias STRING                   name
-t,    --threads N                      threads
--jinja, --no-jinja                     chat templates
-fit,  --fit [on|off]                   fit to memory
--temp N                                temperature
-cram, --cache-ram N                    earlier prompts
-ctxcp, --ctx-checkpoints N             states
--cors-origins ORIGINS                  pages
"""
GPU = "Available devices:\n  CUDA0: NVIDIA Thing (24210 MiB, {free} MiB free)\n"


def standin(folder: Path, *, more: str = "", free: int | None = None, help_text: str = HELP, devices: str = "") -> Path:
    """Write it; `more`: further cache types in its help; `free`: MiB of its GPU; `devices`: lines of further ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "help.txt").write_text(help_text.replace("{more}", more))
    (folder / "devices.txt").write_text(("Available devices:\n" if free is None else GPU.format(free=free)) + devices)
    path = folder / "llama-server"
    path.write_text(_SOURCE)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def seen(folder: Path) -> Any:
    """Its command line and environment."""
    return json.loads((folder / "seen.json").read_text())
