"""The bindings' own OpenAI server, started as `python -m apex_quant.serving.bindings_server --model FILE ...`.

Around llama_cpp.server's application: keys from the environment compared in constant time, without one no pages from
elsewhere, requests made into what the bindings take (`openai_request`), errors in OpenAI's shape whatever goes wrong, a
/health that answers while a request computes, bounded bodies, grammars followed in a process of their own
(`grammar_masks`), no other endpoints. Sliding windows are kept short as llama-server does.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import json
import math
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

from apex_quant.gguf.types import TYPES
from apex_quant.native.bindings import bindings
from apex_quant.serving.grammar_masks import Masks, masked
from apex_quant.serving.long_texts import tokenizing
from apex_quant.serving.openai_answer import calling, counted, usage_event
from apex_quant.serving.openai_request import ASKED, Asked, BadRequest, Model, rewritten

MAX_BODY: Final = 64 << 20
_BATCH: Final = 512  # tokens, the library's own default
_BACKLOG: Final = 2048  # connections that wait, as many as uvicorn takes
_OPEN: Final = ("/health", "/v1/health")
_SERVED: Final = ("/v1/models", "/v1/completions", "/v1/chat/completions")
"""The bindings' others are not OpenAI's, or need a model of embeddings; detokenizing a wrong number ends them."""
_DONE: Final = b"data: [DONE]"
_NOT_READ: Final = "APEX_NOT_READ_"
"""Before the names under which the bindings' settings look into the environment: bare, a SEED or LORA_PATH that is
there for something else would change what is served."""
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "not_found_error",
                 413: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def error_body(status: int, message: str, kind: str | None = None) -> bytes:
    """An error as OpenAI's API words it."""
    kind = kind or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


class Front:
    """ASGI: what comes before the application and what becomes of its errors."""

    def __init__(self, app: App, keys: tuple[str, ...], model: Model, host: str = "localhost") -> None:
        """`host`: the name under which it listens."""
        self._app, self._keys, self._model = app, tuple(key.encode() for key in keys), model
        self._host = host.strip("[]").lower()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send, refusal[0], error_body(*refusal))
            return
        if scope["path"] in _OPEN:
            await _answer(send, 200, b'{"status": "ok"}')
            return
        if scope["path"] == f"/v1/models/{self._model.alias}" and scope["method"] == "GET":
            about = {"id": self._model.alias, "object": "model", "created": 0, "owned_by": "me"}
            await _answer(send, 200, json.dumps(about).encode())
            return
        ASKED.set(Asked())
        if scope["method"] == "POST":
            try:
                request, asked = rewritten(scope["path"], await _json(receive), self._model)
            except BadRequest as error:
                status = 413 if isinstance(error, TooLarge) else 400
                await _answer(send, status, error_body(status, str(error)))
                return
            ASKED.set(asked)
            gone = asyncio.Event()
            watch = asyncio.create_task(_watched(receive, asked, gone))
            try:
                await _told(self._app, scope, _replayed(json.dumps(request).encode(), gone), send)
            finally:
                watch.cancel()
            return
        await _told(self._app, scope, receive, send)

    def _refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        """Status and why, for a request that is not let in."""
        headers = dict(scope["headers"])
        if not self._keys and (foreign := _foreign(headers, self._host)):
            return 403, f"a server without a key answers this machine alone, not {foreign[:200]!r}"
        if scope["path"] in _OPEN:
            return None
        if scope["path"] not in (*_SERVED, f"/v1/models/{self._model.alias}"):
            return 404, "no such endpoint; there are " + ", ".join(_SERVED)
        if self._keys and not self._allowed(headers):
            return 401, "this server needs a valid API key"
        return None

    def _allowed(self, headers: dict[bytes, bytes]) -> bool:
        value = headers.get(b"authorization", b"")
        given = value[7:].strip() if value[:7].lower() == b"bearer " else b""
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0  # all of them, in equal time


def _foreign(headers: dict[bytes, bytes], own: str) -> str | None:
    """The Host or Origin of a request that is not this machine's: of a page from elsewhere, or one whose name was made
    to stand for this machine. Programs send no Origin."""
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
    for shown, address in ((host, f"//{host}"), (origin, origin)):
        try:
            name = urlsplit(address).hostname or ""
        except ValueError:
            return shown
        if shown and name not in ("localhost", own) and not _is_loopback_address(name):
            return shown
    return None


def _is_loopback_address(name: str) -> bool:
    """Of an address alone: what a name stands for can be changed by whoever owns it."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class TooLarge(BadRequest):
    """A request body over MAX_BODY."""


async def _json(receive: Receive) -> Any:
    """The body of a request. Raises BadRequest."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client went away")
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY:
            raise TooLarge(f"request bodies are at most {MAX_BODY >> 20} MiB")
        parts.append(part)
        if not message.get("more_body"):
            break
    try:
        return json.loads(b"".join(parts), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the request body is not JSON: {error}") from None


def _no_number(word: str) -> float:
    """For NaN and Infinity, which Python's reader takes and JSON does not have."""
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits[:20])


async def _watched(receive: Receive, asked: Asked, gone: asyncio.Event) -> None:
    """Until the client goes away. The bindings look for that between the pieces of a stream alone, and would compute
    other answers to their end."""
    while (await receive())["type"] != "http.disconnect":
        pass
    asked.gone = True
    gone.set()


def _replayed(body: bytes, gone: asyncio.Event) -> Receive:
    """The body again, then that the client has gone, once it has."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            await gone.wait()
            return {"type": "http.disconnect"}
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _told(app: App, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Run the application; a failure after a stream has begun becomes its last event, instead of silence."""
    started = False
    first = b""
    last: Message | None = None  # the end of a stream is kept back until it is known that it was its proper end

    async def noted(message: Message) -> None:
        nonlocal started, first, last
        if message["type"] == "http.response.start":
            started = True
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            first = first or body
            if ASKED.get().usage and body.startswith(_DONE):
                await send({**message, "body": usage_event(first), "more_body": True})
            if not message.get("more_body", False):
                last = message
                return
        await send(message)

    try:
        await app(scope, receive, _shaped(noted))
    except Exception as failure:
        error: BaseException = failure
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        status = 400 if isinstance(error, ValueError | TypeError | AssertionError) else 500
        body = error_body(status, str(error) or type(error).__name__)
        if not started:
            await _answer(send, status, body)
            return
        if last is None or not last.get("body"):
            last = {"type": "http.response.body", "body": b"data: " + body + b"\n\n", "more_body": False}
    if last is not None:
        await send(last)


def _shaped(send: Send) -> Send:
    """Turns answers of status 400 and more that are not in OpenAI's shape into it."""
    start: Message | None = None
    parts: list[bytes] = []

    async def shaped(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start" and message["status"] >= 400:
            start = message
            return
        if start is None or message["type"] != "http.response.body":
            await send(message)
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            status, body = _reworded(start["status"], b"".join(parts))
            await _answer(send, status, body)

    return shaped


def _reworded(status: int, body: bytes) -> tuple[int, bytes]:
    try:
        found = json.loads(body)
    except ValueError:
        return status, error_body(status, body.decode("utf-8", "replace")[:500] or "failed")
    error = found.get("error") if isinstance(found, dict) else None
    if isinstance(error, dict) and "message" in error:
        return status, body
    detail = found.get("detail", found) if isinstance(found, dict) else found
    return status, error_body(status, detail if isinstance(detail, str) else json.dumps(detail))


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def application(words: argparse.Namespace, keys: tuple[str, ...]) -> App:
    """The bindings' application with a loaded model, behind Front."""
    lib = bindings()
    from llama_cpp.llama_chat_format import get_chat_completion_handler
    from llama_cpp.server import app as module
    from llama_cpp.server.errors import RouteErrorHandler
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest

    original = RouteErrorHandler.error_message_wrapper

    def worded(self: Any, error: Exception, body: Any = None) -> Any:
        if not (isinstance(error, ValueError | TypeError | AssertionError) or hasattr(error, "errors")):
            return original(self, error, body)
        # what the request is to blame for is no failure of the server
        for pattern, answer in self.pattern_and_formatters.items() if body is not None else ():
            if match := pattern.search(str(error)):
                return answer(body, match)
        errors = getattr(error, "errors", None)
        text = json.dumps(errors(), default=str)[:2000] if callable(errors) else str(error)
        return 400, {"message": text or "invalid request", "type": "invalid_request_error", "param": None,
                     "code": None}  # fmt: skip

    RouteErrorHandler.error_message_wrapper = worded
    # the bindings' settings have no field for it, and the library's own default keeps the whole context
    defaults = lib.llama_context_default_params

    def short_windows() -> Any:
        params = defaults()
        params.swa_full = False
        return params

    lib.llama_context_default_params = short_windows
    # what the bindings call disabled is left to the library, as llama-server does: without flash attention the scores
    # of a batch against the whole context would have to be held
    lib.LLAMA_FLASH_ATTN_TYPE_DISABLED = lib.LLAMA_FLASH_ATTN_TYPE_AUTO
    settings = ModelSettings(
        model=words.model, model_alias=words.alias, n_ctx=words.ctx, n_gpu_layers=words.gpu_layers,
        type_k=TYPES[words.type_k.upper()].id, type_v=TYPES[words.type_v.upper()].id,
        n_batch=max(_BATCH, words.ubatch), n_ubatch=words.ubatch, use_mmap=not words.no_mmap,
        tensor_split=words.tensor_split and [float(part) for part in words.tensor_split.split(",")],
        flash_attn=words.flash_attn or TYPES[words.type_v.upper()].is_quantized, logits_all=False, verbose=False,
        **({} if words.threads is None else {"n_threads": words.threads, "n_threads_batch": words.threads}),
        _env_prefix=_NOT_READ,
    )  # fmt: skip
    server = ServerSettings(
        host=words.host, port=words.port, api_key=None, interrupt_requests=False, _env_prefix=_NOT_READ
    )
    made = module.create_app(server_settings=server, model_settings=[settings])
    # it lets pages from everywhere read answers; added by name, so that nothing else goes with it
    made.user_middleware = [one for one in made.user_middleware if one.cls.__name__ != "CORSMiddleware"]
    alias = words.alias or "model"
    assert module._llama_proxy is not None
    llama = module._llama_proxy(alias)
    vocabulary = llama._model.vocab
    llama.tokenize = tokenizing(llama.tokenize)
    llama.generate = masked(llama.generate, Masks(words.model, llama.n_vocab()))
    llama.generate = counted(llama, lambda token: bool(lib.llama_vocab_is_eog(vocabulary, token)))
    # as create_chat_completion() chooses it
    chat = llama.chat_handler or llama._chat_handlers.get(llama.chat_format)
    llama.chat_handler = calling(chat or get_chat_completion_handler(llama.chat_format))
    template = str(llama.metadata.get("tokenizer.chat_template", ""))
    kinds = {"/v1/completions": CreateCompletionRequest, "/v1/chat/completions": CreateChatCompletionRequest}
    fields = {path: frozenset(kind.model_fields) for path, kind in kinds.items()}
    return Front(made, keys, Model(alias, llama.n_vocab(), template, fields), words.host)


def list_devices() -> None:
    """The library's devices, in the words of llama-server --list-devices."""
    import ctypes

    lib = bindings()
    base = ctypes.CDLL(str(lib._lib._name))
    base.ggml_backend_dev_count.restype = ctypes.c_size_t
    base.ggml_backend_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(base, name).restype, getattr(base, name).argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_backend_dev_type.restype, base.ggml_backend_dev_type.argtypes = ctypes.c_int, [ctypes.c_void_p]
    size = ctypes.POINTER(ctypes.c_size_t)
    base.ggml_backend_dev_memory.restype = None
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    lib.llama_backend_init()
    print("Available devices:")
    for index in range(base.ggml_backend_dev_count()):
        device = base.ggml_backend_dev_get(index)
        if base.ggml_backend_dev_type(device) not in (1, 2):  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, words = (base.ggml_backend_dev_name(device), base.ggml_backend_dev_description(device))
        print(f"  {name.decode()}: {words.decode()} ({total.value >> 20} MiB, {free.value >> 20} MiB free)")


def main(arguments: list[str]) -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="bindings_server")
    parser.add_argument("--list-devices", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--alias")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--type-k", default="f16")
    parser.add_argument("--type-v", default="f16")
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--tensor-split", help="shares of the devices, separated by commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ubatch", type=int, default=_BATCH)
    parser.add_argument("--no-mmap", action="store_true")
    parser.add_argument("--flash-attn", action="store_true")
    words = parser.parse_args(arguments)
    if words.list_devices:
        list_devices()
        return
    # before the model is loaded: who comes later learns at once that the port is taken, and nobody else can take it
    with listening(words.host, words.port) as one:
        import uvicorn

        keys = tuple(key for key in os.environ.pop("LLAMA_API_KEY", "").split(",") if key)
        os.environ.pop("CONFIG_FILE", None)  # create_app() would take its settings for ours
        config = uvicorn.Config(application(words, keys), log_level="warning", timeout_keep_alive=30)
        uvicorn.Server(config).run(sockets=[one])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; connections wait until somebody accepts them. Ends the program when the port is
    taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SystemExit(f"{host} port {port} cannot be used: {error.strerror}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
