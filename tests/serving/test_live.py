"""A real llama-server behind `serve`, where APEX_STOCK_TOOLS names a folder with one (tools/build_stock_tools.py)."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from apex_quant import embedded_model
from apex_quant.errors import ResourceError
from apex_quant.serving.serve import Service, serve

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    program = Path(os.environ.get("APEX_STOCK_TOOLS", ""), "llama-server")
    if not program.is_file():
        pytest.skip("APEX_STOCK_TOOLS names no folder with llama-server (tools/build_stock_tools.py)")
    with serve(embedded_model(), server=program, port=0, threads=1, ctx=512, kv="q8_0") as found:
        yield found


def ask(service: Service, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


def test_chat_stream_and_tools(service: Service) -> None:
    client = openai.OpenAI(base_url=service.url, api_key="none", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list().data] == [service.plan.alias]
    common: dict[str, Any] = {"model": "m", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**common).choices[0].message.content
    streamed = client.chat.completions.create(**common, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == whole
    called = client.chat.completions.create(**common, tools=[TOOL])
    assert called.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_an_aborted_stream_leaves_it_healthy(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    body = json.dumps({"messages": HELLO, "max_tokens": 400, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline().startswith(b"data: {")
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert service.healthy


def test_who_and_what_it_answers(service: Service) -> None:
    foreign = ask(service, "OPTIONS", "/v1/models", Origin="https://evil.example", Access_Control_Request_Method="GET")
    assert foreign.getheader("Access-Control-Allow-Origin") is None
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/models/../../etc/passwd"):
        assert ask(service, "GET", path).status == 404
    assert ask(service, "GET", "/slots").status >= 400


def test_z_a_killed_one_is_reported(service: Service) -> None:
    """Last: the others need it."""
    guard = service.program._guard.pid
    (child,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    with pytest.raises(ResourceError, match="ended with status 137"):
        service.wait()
