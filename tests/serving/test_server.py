"""The bindings' server as `apex serve` starts it, with the embedded model and the openai client."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from apex_quant import embedded_model
from apex_quant.errors import ResourceError
from apex_quant.serving.serve import Service, serve
from tests.serving.test_grammar_masks import ATTACKS

KEY = "a-key-of-mine"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL: dict[str, Any] = {
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
SET_FOR_SOMETHING_ELSE = {
    "N_BATCH": "many", "CHAT_FORMAT": "llava-1-5", "LORA_PATH": "/nowhere", "HF_MODEL_REPO_ID": "no/where",
    "API_KEY": "another's", "CONFIG_FILE": "/nowhere", "ROPE_FREQ_BASE": "5", "HOST": "elsewhere", "PORT": "x",
}  # fmt: skip
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module", autouse=True)
def _no_llama_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/usr/bin:/bin")
        patch.delenv("LLAMA_CPP_DIR", raising=False)
        for name, value in SET_FOR_SOMETHING_ELSE.items():
            patch.setenv(name, value)
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


def test_a_named_tool(client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=80, temperature=0, tools=[TOOL, OTHER],
        tool_choice={"type": "function", "function": {"name": "add"}},
    )  # fmt: skip
    assert said.choices[0].finish_reason == "tool_calls"
    (call,) = said.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "add"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["a"], int)
    assert isinstance(arguments["b"], bool)


def test_a_conversation_with_tools(client: openai.OpenAI) -> None:
    """A call is made, its result sent back with the assistant's message as the client has it, and an answer comes."""
    messages: list[Any] = [{"role": "developer", "content": "Be brief."}, *HELLO]
    said = client.chat.completions.create(
        model="m", messages=messages, max_completion_tokens=80, temperature=0, tools=[TOOL, OTHER],
        tool_choice="required",
    )  # fmt: skip
    (call,) = said.choices[0].message.tool_calls or []
    assert said.choices[0].message.content is None
    assert call.type == "function"
    messages.append(said.choices[0].message)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "3"})
    for choice in ("none", "auto"):
        after = client.chat.completions.create(
            model="m", messages=messages, max_tokens=80, temperature=0, tools=[TOOL, OTHER], tool_choice=choice
        )  # fmt: skip
        message = after.choices[0].message
        assert message.content or message.tool_calls
        assert choice == "auto" or not message.tool_calls
    # this model was never taught tools: with auto either is right, and both have the form of one
    auto = client.chat.completions.create(model="m", messages=HELLO, max_tokens=200, temperature=0, tools=[TOOL])
    assert auto.choices[0].finish_reason in ("stop", "tool_calls", "length")


def test_streamed_tool_calls(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=80, temperature=0, tools=[TOOL, OTHER], tool_choice="required",
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert [call.index for call in calls] == [0]
    assert calls[0].function is not None
    assert json.loads(calls[0].function.arguments or "")
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5


def test_json_mode(client: openai.OpenAI) -> None:
    schema = TOOL["function"]["parameters"]
    formats: list[Any] = [
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
    ]
    for form in formats:
        said = client.chat.completions.create(
            model="m", messages=HELLO, max_tokens=80, temperature=0, response_format=form
        )
        assert set(json.loads(said.choices[0].message.content or "")) == {"a", "b"}


def test_a_recursive_schema(client: openai.OpenAI) -> None:
    node = {"type": "object", "properties": {"on": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {
        "name": "node", "schema": {"$ref": "#/$defs/node", "$defs": {"node": node}}}}  # fmt: skip
    said = client.chat.completions.create(
        model="m", messages=HELLO, max_tokens=80, temperature=0, response_format=form
    )  # fmt: skip
    assert (said.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("path", ["chat", "text"])
def test_streams_count_tokens_as_answers_do(path: str, client: openai.OpenAI) -> None:
    if path == "chat":
        common: dict[str, Any] = {"model": "m", "messages": HELLO, "max_tokens": 9, "temperature": 0}
        create: Any = client.chat.completions.create
    else:
        common, create = (
            {"model": "m", "prompt": "Once upon", "max_tokens": 9, "temperature": 0},
            client.completions.create,
        )
    whole = create(**common).usage
    last = list(create(**common, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.choices == []
    assert last.usage.model_dump() == whole.model_dump()


def test_one_model(client: openai.OpenAI) -> None:
    assert client.models.retrieve("apex-tiny-moe").id == "apex-tiny-moe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_keys(service: Service) -> None:
    for key, status in ((None, 401), ("wrong", 401), (KEY[:-1], 401), ("", 401), (KEY, 200), ("another", 200)):
        got, document = post(service, "/v1/models", b"", key)
        assert got == status
        if status == 401:
            assert document["error"]["type"] == "authentication_error"
    assert post(service, "/health", b"", None)[0] == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service.url, api_key="no", max_retries=0).models.list()


def test_pages_from_elsewhere(tmp_path: Path) -> None:
    """Without a key: neither a page of another site, nor one whose name was made to stand for this machine."""
    with serve(embedded_model(), host="127.0.0.2", port=0, threads=1, ctx=256) as open_to_all:

        def ask(method: str, path: str, **headers: str) -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.2", open_to_all.port, timeout=60)
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            response.read()
            connection.close()
            assert not any(name.lower().startswith("access-control-") for name in response.headers)
            return response.status, response

        for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://[::1"):
            assert ask("OPTIONS", "/v1/models", Origin=origin, Access_Control_Request_Method="GET")[0] == 403
            assert ask("GET", "/v1/models", Origin=origin)[0] == 403
            assert ask("GET", "/health", Origin=origin)[0] == 403
        assert ask("GET", "/v1/models", Host="evil.example")[0] == 403
        assert ask("GET", "/v1/models", Host=f"localhost:{open_to_all.port}")[0] == 200
        assert ask("GET", "/v1/models", Origin=f"http://localhost:{open_to_all.port}")[0] == 200


def test_the_key_is_on_no_command_line(service: Service) -> None:
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert any(b"bindings_server" in line for line in lines)
    assert not any(KEY.encode() in line for line in lines)


def test_the_process_for_grammars_gets_no_key(service: Service) -> None:
    body = {"prompt": "Say: ", "grammar": 'root ::= "yes"'}
    assert post(service, "/v1/completions", json.dumps(body).encode())[0] == 200
    server = _backend(service)
    children = [one for path in Path(f"/proc/{server}/task").glob("*/children") for one in path.read_text().split()]
    (child,) = [one for one in children if b"grammar_child" in Path(f"/proc/{one}/cmdline").read_bytes()]
    assert KEY.encode() not in Path(f"/proc/{child}/environ").read_bytes()


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
    ("/v1/completions", {"prompt": ""}),
    ("/v1/completions", {"prompt": "a", "temperature": float("nan")}),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 3_000_000}),
    ("/v1/completions", {"prompt": "a", "messages": HELLO}),
    ("/v1/chat/completions", {"messages": HELLO, "reasoning_effort": "high"}),
    ("/v1/chat/completions", {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * (5 << 20)}]}),
    ("/v1/completions", {"prompt": "\ud800"}),
    ("/v1/completions", {"prompt": "a", "logprobs": 10**9}),
    *(("/v1/completions", {"messages": wrong, "prompt": [1, 2]}) for wrong in ("x", None, 5, [1])),
    # each of these ended the process, or never ended
    ("/v1/completions", {"prompt": "a", "grammar": "root ::= " + "(" * 50_000}),
    ("/v1/completions", {"prompt": "a", "grammar": 'root ::= (("a"?){0,40}){0,40}'}),
    ("/v1/completions", {"prompt": "a", "grammar": 'root ::= "a"{5,2}'}),
    ("/v1/completions", {"prompt": "a", "grammar": "root ::= " + "(" * 50 + '"a"?' + ")+" * 50}),
    ("/v1/completions", {"prompt": "a", "grammar": 'root ::= "\n" (((("a"{0,20}){0,20}){0,20}){0,20}) "\n"'}),
    ("/v1/completions", {"prompt": "a", "grammar": "root ::= # \r" + "(" * 50_000}),
    ("/v1/completions", {"prompt": "a", "grammar": 'root ::= "a" [^\\x00-\\UFFFFFFFF]'}),
    *(
        ("/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "json_object", "schema": schema}})
        for schema in (
            {"type": "string", "minLength": 100_000, "maxLength": 200_000},
            {"type": "string", "pattern": "^(a{1,99999}){1,99999}$"},
            {"type": "string", "pattern": "^(((a{1,99}){1,99}){1,99}){1,99}$"},
            {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
            {"$ref": "#/nowhere"},
            {"$ref": "https://192.0.2.1/schema.json"},
            {"type": "surprise"},
            {"type": "string", "pattern": "^[^\\x00-\\UFFFFFFFF]$"},
        )
    ),
    ("/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "json_schema"}}),
    ("/v1/chat/completions", {"messages": HELLO, "response_format": "json"}),
    ("/v1/chat/completions", {"messages": HELLO, "n": 2}),
    ("/v1/completions", {"prompt": "a", "best_of": 2}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 0}),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"99999999": 1}}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"-1": 1}}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"1": 1e9}}),
    ("/v1/chat/completions", {"messages": HELLO, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": HELLO, "functions": [{"name": "x"}]}),
    ("/v1/chat/completions", {"messages": HELLO, "tool_choice": "required"}),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [TOOL], "tool_choice": "perhaps"}),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [{"type": "function", "function": {}}]}),
    ("/v1/chat/completions", {"messages": HELLO, "tools": [TOOL], "response_format": {"type": "json_object"}}),
    ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "x"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}),
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


@pytest.mark.parametrize("victim", ["backend", "guard"])
def test_a_killed_backend_is_noticed(victim: str) -> None:
    """While nobody waits for its end but the looks themselves: fewer of them than fit into 2 s."""
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        time.sleep(seconds)

    with serve(embedded_model(), port=0, threads=1, ctx=256) as service:
        backend = _backend(service)
        os.kill(backend if victim == "backend" else service.program._guard.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="ended with status 137"):
            service.wait(pause=look)
        assert sum(looks) < 2
        assert not service.healthy
        with pytest.raises(OSError):  # nothing is left behind
            http.client.HTTPConnection("127.0.0.1", service.port, timeout=10).connect()


def _backend(service: Service) -> int:
    """The process id of the server itself, which a guard holds."""
    guard = service.program._guard.pid
    (child,) = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
    return int(child)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_grammars_that_cost_without_end(name: str, service: Service) -> None:
    """Each until the server's own bounds end it; the next request is answered."""
    body = {"prompt": "Say: ", "max_tokens": 200, "temperature": 0, "grammar": ATTACKS[name],
            "logit_bias": {"a": 50, "[": 50}, "logit_bias_type": "tokens"}  # fmt: skip
    status, document = post(service, "/v1/completions", json.dumps(body).encode())
    assert status == 400
    assert "grammar" in document["error"]["message"]
    body = {"prompt": "Say: ", "grammar": 'root ::= "yes"'}
    status, document = post(service, "/v1/completions", json.dumps(body).encode())
    assert (status, document["choices"][0]["text"]) == (200, "yes")


@pytest.mark.slow
def test_many_requests_and_aborted_streams(client: openai.OpenAI, service: Service) -> None:
    def one(index: int) -> str | None:
        said = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": f"Say {index}"}], max_tokens=2, temperature=0
        )
        return str(said.choices[0].finish_reason)

    def abort(_: int) -> None:
        """Break off a stream that has begun."""
        request = json.dumps({"messages": HELLO, "max_tokens": 200, "stream": True, "temperature": 1.0})
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=170)
        connection.request("POST", "/v1/chat/completions", request, headers)
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()

    client = client.with_options(timeout=170)
    with ThreadPoolExecutor(205) as pool:
        aborted = [pool.submit(abort, i) for i in range(5)]
        reasons = list(pool.map(one, range(200)))
        for future in aborted:
            future.result()
    assert all(reason in ("stop", "length") for reason in reasons)
    assert service.healthy
    assert one(7) is not None
