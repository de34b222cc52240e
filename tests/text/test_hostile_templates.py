"""Templates that attack: each ends as an error that names the template, soon and within bounded memory.

The renderings run below a process whose address space is limited by the kernel too, so that a limit which does not
hold in the template's own process would be seen here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from apex_quant.text import sandbox

CHILD = """
import json, resource, sys
from apex_quant.errors import InputError
from apex_quant.text import ChatTemplate, Document, renderer
renderer.CPU_SECONDS = 0.4
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 600_000_000
resource.setrlimit(resource.RLIMIT_AS, (room, room))
answers = {}
for name, source in json.load(sys.stdin).items():
    with ChatTemplate(source, name="the template of m.gguf") as template:
        try:
            text = template.render(Document("chat", messages=({"role": "user", "content": "secret word"},)))
            answers[name] = ["text", text]
        except InputError as error:
            answers[name] = ["error", error.message]
answers["peak"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
print(json.dumps(answers))
"""

DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
TIME = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{{ (10 ** (10 ** 9)) % 7 }}",
    "endless append": "{% set l = [1] %}{% for x in l %}{% set _ = l.append(1) %}{% endfor %}",
}
LIMIT = {
    "huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "string product": "{{ ('x' * 10 ** 10) | length }}",
    "list product": "{{ ([0] * 10 ** 10) | length }}",
    "doubling": DOUBLING,
    "format width": "{{ '%10000000000d' | format(1) }}",
    "str.format width": "{{ '{:>10000000000}'.format(1) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "replace": "{{ ('x' * 10 ** 5).replace('x', 'y' * 10 ** 5) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
}
FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "message": "{{ messages.__class__.__base__ }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "attr": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace": "{{ namespace(__class__=1) }}",
    "generator": "{{ (messages | map('upper')).gi_frame }}",
    "self": "{{ self.__init__.__globals__ }}",
    "code": "{{ strftime_now.__code__ }}",
}
HARMLESS = {
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "chance": "{{ lipsum() }}",
}


def outcomes(templates: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(templates),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space limits are Linux's")
@pytest.mark.parametrize(
    ("templates", "says"),
    [(TIME, "took too much processor time"), (LIMIT, "passes a limit"), (FORBIDDEN, "does what is not allowed")],
    ids=["time", "limit", "forbidden"],
)
def test_attacks_are_errors(templates: dict[str, str], says: str) -> None:
    answers = outcomes(templates)
    assert answers.pop("peak") < (sandbox.MEMORY >> 20) + 60
    assert set(answers) == set(templates)
    for name, (kind, message) in answers.items():
        assert kind == "error", (name, message[:100])
        assert message.startswith(f"the template of m.gguf {says}"), (name, message)


def test_what_a_template_cannot_reach_is_a_plain_transcript() -> None:
    answers = outcomes(HARMLESS)
    answers.pop("peak")
    assert answers == {name: ["text", "user: secret word\n"] for name in HARMLESS}


def test_the_process_has_no_secrets_and_writes_no_files(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets out of the sandbox finds an empty environment and a kernel that lets no file grow."""
    probe = (
        "import os, sys; sys.argv[0] = ''; import apex_quant.text.sandbox as s; s.limit_memory()\n"
        f"f = open({str(tmp_path / 'f')!r}, 'wb', 0)\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: f.write(b'x')\n"
        "except OSError as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSError"
    from apex_quant.text import renderer

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen: dict[str, Any] = {}
    real = subprocess.Popen

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs["env"])
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", spy)
    with renderer.Renderer("x", {}, "t") as made:
        assert made.render({"messages": [], "tools": None}) == "x"
    assert seen
    assert "HF_TOKEN" not in seen
