"""What stands before the bindings' application, with another in its place."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="the bindings are not installed")

from apex_quant.serving.bindings_server import Front, Message, Receive, Send
from apex_quant.serving.openai_answer import counted
from apex_quant.serving.openai_request import ASKED, Asked, Model

SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}


def ask(app: Any, body: Any, *more: Message) -> list[Message]:
    """What is sent for a request with that body, behind which `more` is received and nothing else ever is."""
    sent: list[Message] = []
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    coming = iter([{"type": "http.request", "body": raw, "more_body": False}, *more])

    async def receive() -> Message:
        for message in coming:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    front = Front(app, (), Model("m", 100))
    asyncio.run(asyncio.wait_for(front(dict(SCOPE), receive, send), 60))
    return sent


def test_an_answer_nobody_waits_for_is_computed_no_further() -> None:
    told: list[Message] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        told.append(await receive())
        while not ASKED.get().gone:  # as the generator looks after each token
            await asyncio.sleep(0)
        told.append(await receive())

    ask(app, {"prompt": "a"}, {"type": "http.disconnect"})
    assert [message["type"] for message in told] == ["http.request", "http.disconnect"]


def test_one_that_is_waited_for() -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        request = json.loads((await receive())["body"])
        assert not ASKED.get().gone
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": request["prompt"].encode()})

    assert ask(app, {"prompt": "a"})[-1]["body"] == b"a"


def generated(tokens: list[int], asked: Asked, *, until: int) -> list[int]:
    """What comes of a prompt when the client goes away as the token `until` is computed."""

    def generate(tokens: list[int]) -> Iterator[int]:
        for token in itertools.count():
            asked.gone = token == until
            yield token

    ASKED.set(asked)
    return list(counted(SimpleNamespace(generate=generate), lambda token: False)(tokens))


def test_the_generator_ends_with_the_client() -> None:
    asked = Asked()
    assert contextvars.copy_context().run(generated, [7, 8], asked, until=3) == [0, 1, 2]
    assert (asked.prompt_tokens, asked.completion_tokens) == (2, 3)
    with pytest.raises(ValueError, match="the prompt is empty"):
        contextvars.copy_context().run(generated, [], Asked(), until=3)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number(number: str) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        raise AssertionError

    start, answer = ask(app, b'{"prompt": "a", "temperature": %s}' % number.encode())
    assert start["status"] == 400
    assert f"{number} is no number" in json.loads(answer["body"])["error"]["message"]
