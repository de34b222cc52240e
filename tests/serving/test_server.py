"""The bindings' server as `apex serve` starts it, with the embedded model and the openai client."""

from __future__ import annotations

import http.client
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from apex_quant import embedded_model
from apex_quant.errors import ResourceError
from apex_quant.serving.serve import POLL_SECONDS, Service, serve

KEY = "a-key-of-mine"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def _no_llama_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/usr/bin:/bin")
        patch.delenv("LLAMA_CPP_DIR", raising=False)
        yield


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\nanother\n")
    keys.chmod(0o600)
    with serve(embedded_model(), port=0, threads=1, ctx=512, kv="q8_0", api_key_file=keys) as found:
        yield found


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=service.url, api_key=KEY, max_retries=0, timeout=60)


def post(service: Service, path: str, body: bytes, key: str | None = KEY) -> tuple[int, Any]:
    """Status and document of a raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    connection.request("POST" if body else "GET", path, body or None, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, json.loads(data) if data.startswith(b"{") else data


def test_chat(client: openai.OpenAI, service: Service) -> None:
    (model,) = client.models.list().data
    assert model.id == service.plan.alias == "apex-tiny-moe"
    said = client.chat.completions.create(
        model=model.id,
        messages=HELLO,
        max_tokens=8,
        temperature=0,
    )
    whole = said.choices[0].message.content
    assert whole
    assert "<|im" not in whole  # the template's marks are tokens, not text
    assert said.model == "apex-tiny-moe"
    assert said.usage is not None
    assert said.usage.prompt_tokens > 5  # the template was applied: more than the word
    streamed = client.chat.completions.create(
        model="anything",
        messages=HELLO,
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert len(pieces) > 2
    assert "".join(pieces) == whole
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    again = client.chat.completions.create(model="m", messages=parts, max_tokens=8, temperature=0)
    assert again.choices[0].message.content == whole


def test_tool_calls(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=60, temperature=0, tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "add"}},
    )  # fmt: skip
    (call,) = said.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["a"], int)
    assert isinstance(arguments["b"], bool)


def test_json_mode(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=80, temperature=0,
        response_format={"type": "json_object", "schema": TOOL["function"]["parameters"]},  # type: ignore
    )  # fmt: skip
    assert set(json.loads(said.choices[0].message.content or "")) == {"a", "b"}


def test_keys(service: Service) -> None:
    for key, status in ((None, 401), ("wrong", 401), (KEY[:-1], 401), ("", 401), (KEY, 200), ("another", 200)):
        got, document = post(service, "/v1/models", b"", key)
        assert got == status
        if status == 401:
            assert document["error"]["type"] == "authentication_error"
    assert post(service, "/health", b"", None)[0] == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service.url, api_key="no", max_retries=0).models.list()


def test_the_key_is_on_no_command_line(service: Service) -> None:
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert any(b"bindings_server" in line for line in lines)
    assert not any(KEY.encode() in line for line in lines)


BAD: list[tuple[str, Any]] = [
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b"[]"),
    ("/v1/chat/completions", b"[" * 100_000),
    ("/v1/chat/completions", b"\xff\xfe"),
    ("/v1/chat/completions", {}),
    ("/v1/chat/completions", {"messages": "x"}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": "many"}),
    ("/v1/chat/completions", {"messages": HELLO, "stream": True, "max_tokens": "many"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello " * 5000}]}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
    ),
    (
        "/v1/chat/completions",
        {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
    ),
    ("/v1/completions", {"prompt": "a", "grammar": "root ::= ("}),
    ("/v1/completions", {"prompt": ["a", "b"]}),
    ("/v1/completions", {"prompt": "\ud800"}),
    ("/v1/completions", {"prompt": "a", "logprobs": 10**9}),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_requests(case: int, service: Service) -> None:
    path, body = BAD[case]
    status, document = post(service, path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert status == 400
    assert document["error"]["type"] == "invalid_request_error"
    assert document["error"]["message"]
    assert "root:" not in json.dumps(document)
    assert service.program.status is None


def test_a_stream_that_fails_says_so(client: openai.OpenAI, service: Service) -> None:
    with pytest.raises(openai.APIError, match="grammar"):
        list(client.completions.create(model="m", prompt="a", stream=True, extra_body={"grammar": "root ::= ("}))
    assert service.healthy


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/../../etc/passwd", "/v1/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
     "/static/../../etc/passwd", "/docs", "/openapi.json", "/extras/tokenize", "/v1/embeddings", "/v1/models/x"],
)  # fmt: skip
def test_nothing_else_is_served(path: str, service: Service) -> None:
    for body in (b"", b'{"input": "x", "tokens": [99999999]}'):
        status, document = post(service, path, body)
        assert status == 404
        assert document["error"]["type"] == "not_found_error"


def test_a_killed_backend_is_noticed() -> None:
    """At the next look after it is gone, and looks are less than 2 s apart."""
    looks: list[float] = []

    with serve(embedded_model(), port=0, threads=1, ctx=256) as service:

        def kill(seconds: float) -> None:
            looks.append(seconds)
            os.kill(_backend(service), signal.SIGKILL)
            service.program._guard.wait(timeout=60)

        with pytest.raises(ResourceError, match="ended with status 137"):
            service.wait(pause=kill)
        assert looks == [POLL_SECONDS]
        assert POLL_SECONDS < 1
        assert not service.healthy


def _backend(service: Service) -> int:
    """The process id of the server itself, which a guard holds."""
    guard = service.program._guard.pid
    (child,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    return int(child)


@pytest.mark.slow
def test_many_requests_and_aborted_streams(client: openai.OpenAI, service: Service) -> None:
    def one(index: int) -> str | None:
        said = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": f"Say {index}"}], max_tokens=2, temperature=0
        )
        return str(said.choices[0].finish_reason)

    def abort(_: int) -> None:
        request = json.dumps({"messages": HELLO, "max_tokens": 200, "stream": True, "temperature": 1.0})
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=170)
        connection.request("POST", "/v1/chat/completions", request, {"Authorization": f"Bearer {KEY}"})
        connection.getresponse().read(10)
        connection.close()

    patient = client.with_options(timeout=170)
    client = patient
    with ThreadPoolExecutor(205) as pool:
        aborted = [pool.submit(abort, i) for i in range(5)]
        reasons = list(pool.map(one, range(200)))
        for future in aborted:
            future.result()
    assert all(reason in ("stop", "length") for reason in reasons)
    assert service.healthy
    assert one(7) is not None
