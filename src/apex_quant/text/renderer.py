"""The process around one chat template, as its caller sees it: texts, or an error that names the template."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from apex_quant.errors import InputError, ResourceError

Json = dict[str, Any]

CPU_SECONDS = 5.0  # for one conversation; real templates take milliseconds
WALL_SECONDS = 60.0  # comes first only where the machine stands still
_MAX_ANSWER: Final = 64 << 20
MAX_TEMPLATE: Final = 1 << 20  # characters; the largest in use have 20,000
_SCRIPT: Final = Path(__file__).with_name("sandbox.py")
# what an interpreter may need to start; nothing else of the environment is the template's business
_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "TMPDIR")
_HINT: Final = "this template is not safe to use; without it texts are rendered as plain transcripts"
_ENDS: Final = {
    -signal.SIGPROF: "took too much processor time",
    -signal.SIGKILL: "took too long",
}


class TemplateRaised(Exception):
    """The template refused this conversation, or cannot handle it. Another form of it may do."""


class Renderer:
    """One template in its own process, started on first use. `name` says whose it is, for errors."""

    def __init__(self, template: str, variables: Json, name: str) -> None:
        if len(template) > MAX_TEMPLATE:
            raise InputError(f"{name}: {len(template)} characters, at most {MAX_TEMPLATE} are taken", hint=_HINT)
        self.name = name
        self._start = {"template": template, "variables": variables, "seconds": CPU_SECONDS}
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: Json) -> str:
        """The text of {"messages", "tools", ...}. TemplateRaised, or InputError for a template that is no good."""
        if self._process is None:
            self._process = self._launch()
            self._ask(self._start)
        return self._ask(request)

    def close(self) -> None:
        """End the process; it starts again when needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()

    def _launch(self) -> subprocess.Popen[bytes]:
        env = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
        env["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        assert process.stdout is not None
        if not process.stdout.readline(100):
            errors = process.communicate()[1].decode("utf-8", "replace").strip().splitlines()
            raise ResourceError(f"the process for chat templates did not start: {errors[-1] if errors else 'no word'}")
        return process

    def _ask(self, request: Json) -> str:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(WALL_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(_MAX_ANSWER)
        except BrokenPipeError:
            line = b""
        except BaseException:  # half an exchange: the next one would get this one's answer
            self.close()
            raise
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            raise self._ended(too_long=bool(line))
        answer: dict[str, str] = json.loads(line)
        if "text" in answer:
            return answer["text"]
        what, why = answer["error"], answer["message"]
        if what == "raised":
            raise TemplateRaised(why)
        self.close()
        if what == "syntax":
            raise InputError(f"{self.name} is not a valid jinja2 template: {why}", hint=_HINT)
        verb = "does what is not allowed" if what == "security" else "passes a limit"
        raise InputError(f"{self.name} {verb}: {why}", hint=_HINT)

    def _ended(self, too_long: bool) -> InputError:
        process, self._process = self._process, None
        assert process is not None
        if too_long:
            process.kill()
        status = process.wait()
        process.communicate()
        how = f"ended its process with {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"
        how = "gave more output than is taken" if too_long else _ENDS.get(status, how)
        return InputError(f"{self.name} {how}", hint=_HINT)
