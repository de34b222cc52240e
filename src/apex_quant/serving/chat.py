"""`apex chat`: talk to a file for a first impression, or to two side by side and see where they first part.

    with chat("A.gguf", vs="B.gguf") as conversation:
        reply = conversation.ask("Why is the sky blue?")
        print(reply.divergence)

Answers are greedy by default, so that two files differ only by what they are. Both get the same history: the first
file's answers. A first impression proves nothing; `apex eval` and `apex compare` do.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from apex_quant.errors import ResourceError
from apex_quant.evaluation.programs import Log
from apex_quant.serving.access import reachable
from apex_quant.serving.serve import ServePlan, Service, serve

MAX_TOKENS: Final = 512
_CONTEXT_SHOWN: Final = 60  # characters of the common text, for the message

OnText = Callable[[int, str], None]
"""Called with the side (0 or 1) and a piece of its answer."""


@dataclass(frozen=True)
class Divergence:
    """Where two greedy answers first differ. `characters`, `pieces`: of what they have in common (a piece is a token,
    or several that make a character); `a`, `b`: what follows, "" where an answer ends there."""

    characters: int
    pieces: int
    common: str
    a: str
    b: str

    @property
    def sentence(self) -> str:
        """For people."""
        shown = ("..." if len(self.common) > _CONTEXT_SHOWN else "") + self.common[-_CONTEXT_SHOWN:]
        sides = [f"{side!r}" if side else "its end" for side in (self.a, self.b)]
        return f"equal for {self.pieces} tokens, then {sides[0]} and {sides[1]} after {shown!r}"


@dataclass(frozen=True)
class Reply:
    """Answers by side. `divergence` is None for one side, and for equal answers."""

    texts: tuple[str, ...]
    finished: tuple[str | None, ...]
    """Why each ended: stop, or length."""
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        return {"texts": list(self.texts), "finished": list(self.finished),
                "divergence": None if self.divergence is None else
                {**asdict(self.divergence), "sentence": self.divergence.sentence}}  # fmt: skip


@dataclass
class _Side:
    pieces: list[str] = field(default_factory=list)
    finished: str | None = None
    error: BaseException | None = None


class Conversation:
    """One or two servers and what was said."""

    def __init__(self, services: list[Service], resources: ExitStack, *, system: str | None = None) -> None:
        self.services = services
        self._resources = resources
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the servers."""
        self._resources.close()

    def forget(self) -> None:
        """Begin anew."""
        self.messages = list(self._system)

    def ask(
        self, text: str, *, max_tokens: int = MAX_TOKENS, temperature: float = 0.0, seed: int = 0,
        on_text: OnText | None = None,
    ) -> Reply:  # fmt: skip
        """What each side answers. Raises ResourceError when a server fails; the question is then not remembered."""
        messages = [*self.messages, {"role": "user", "content": text}]
        request = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
                   "stream": True, **({"top_k": 1, "repeat_penalty": 1.0} if temperature == 0 else {})}  # fmt: skip
        sides = [_Side() for _ in self.services]
        pieces: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()

        def run(index: int) -> None:
            try:
                for piece, why in stream(self.services[index], request):
                    sides[index].finished = why or sides[index].finished
                    if piece:
                        sides[index].pieces.append(piece)
                        pieces.put((index, piece))
            except BaseException as error:  # told by the caller's thread
                sides[index].error = error
            finally:
                pieces.put(None)

        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(sides))]
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            item = pieces.get()
            if item is None:
                left -= 1
            elif on_text is not None:
                on_text(*item)
        if broken := next((side.error for side in sides if side.error is not None), None):
            raise broken
        texts = tuple("".join(side.pieces) for side in sides)
        self.messages = [*messages, {"role": "assistant", "content": texts[0]}]
        divergence = diverge(sides[0].pieces, sides[1].pieces) if len(sides) == 2 else None
        return Reply(texts, tuple(side.finished for side in sides), divergence)


def diverge(a: list[str], b: list[str]) -> Divergence | None:
    """Where two streams of pieces first differ as text; None where they are equal."""
    first, second = "".join(a), "".join(b)
    if first == second:
        return None
    end = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), min(len(first), len(second)))
    common = first[:end]
    return Divergence(len(common), _whole_pieces(a, len(common)), common, _next(a, len(common)), _next(b, len(common)))


def _whole_pieces(pieces: list[str], characters: int) -> int:
    count = length = 0
    for piece in pieces:
        length += len(piece)
        if length > characters:
            break
        count += 1
    return count


def _next(pieces: list[str], characters: int) -> str:
    """The rest of the piece in which the common part ends, and the one after it."""
    text = "".join(pieces)
    end = 0
    for piece in pieces:
        end += len(piece)
        if end > characters:
            return text[characters:end]
    return ""


def stream(service: Service, request: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Pieces of a streamed chat completion, and why it ended with the last. Raises ResourceError."""
    name = service.plan.model.name
    connection = http.client.HTTPConnection(reachable(service.host), service.port, timeout=600)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(request),
            {"Content-Type": "application/json", **service.authorization},
        )  # fmt: skip
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ResourceError(f"{name}: {_message(response.read(1 << 16))}")
        for line in response:
            data = line.decode("utf-8", "replace").strip().removeprefix("data:").strip()
            if not data or data.startswith(":") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ResourceError(f"{name}: {_message(data.encode())}")
            choice = (event.get("choices") or [{}])[0]
            yield (choice.get("delta") or {}).get("content") or "", choice.get("finish_reason")
    except (OSError, http.client.HTTPException, ValueError) as error:
        last = "" if service.program.status is None else f"; it ended with {service.program.wait()}"
        raise ResourceError(f"{name}: the server stopped answering: {error}{last}") from None
    finally:
        connection.close()


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:200]


def chat(
    model: str | os.PathLike[str],
    *,
    vs: str | os.PathLike[str] | None = None,
    ctx: int | str = "auto",
    kv: str = "auto",
    system: str | None = None,
    threads: int | None = None,
    server: str | os.PathLike[str] | None = None,
    planned: Callable[[ServePlan], None] | None = None,
    log: Log | None = None,
) -> Conversation:
    """Start what answers: one server for each file, on this machine only. `planned` as for serve(): told of each file
    before it is loaded. Raises what serve() raises."""
    resources = ExitStack()
    services = []
    try:
        for place in (model, *([] if vs is None else [vs])):
            one = serve(place, ctx=ctx, kv=kv, port=0, threads=threads, server=server, planned=planned, log=log)
            services.append(resources.enter_context(one))
    except BaseException:
        resources.close()
        raise
    return Conversation(services, resources, system=system)
