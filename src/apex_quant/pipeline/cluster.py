"""`apex run --ray ADDRESS`: the jobs of native/workers.py on the machines of a Ray cluster.

with cluster("auto", tell) as workers:
    for done in workers.run(jobs): print(done.where, done.result)

Each machine does one job at a time with all its processors, as this one would. Which job goes where is decided here
and not by Ray: a job of a lost machine is sent again without what it had finished, and machines may join. The package
must be installed on each, in the same version, and the disk shared.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from apex_quant.errors import ResourceError, UsageError
from apex_quant.native import Finished, Job
from apex_quant.native.workers import OnEvent
from apex_quant.pipeline.cluster_node import MARK
from apex_quant.pipeline.cluster_round import Round, nodes

Tell = Callable[[str], None]

_ANSWER: Final = 5.0  # seconds in which a cluster must take a connection
_SETTINGS: Final = b"\4"
_HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5
"""What an HTTP/2 client, which Ray's are, says first; a server answers with its own settings."""
_INSTALL: Final = "pip install 'apex-quant[ray]', on every machine of the cluster"
_START: Final = "ray start --head on one machine, ray start --address HOST:6379 on the others and on this one"
_LOCAL: Final[dict[str, Any]] = {"include_dashboard": False, "object_store_memory": 100 << 20}


@contextmanager
def cluster(address: str, tell: Tell) -> Iterator[RayWorkers]:
    """The machines of the cluster at `address` ('HOST:PORT', 'auto' for the one that this machine is part of, 'local'
    to start one here) as workers. `tell` gets a line when a job was lost.

    A cluster that this process is connected to already is taken as it is, and left connected. Raises UsageError for
    what is no address, ResourceError when Ray is not installed, nothing answers, or no machine has a processor.
    """
    host = _host(address)
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        if address == "auto":
            host = _host(_known(ray))
        if host is not None:
            _reach(*host)
        _connect(ray, address)
    try:
        if not nodes(ray):
            raise ResourceError(f"{address}: no machine of the Ray cluster has a processor to work with", hint=_START)
        yield RayWorkers(ray, tell)
    finally:
        if ours:
            ray.shutdown()


class RayWorkers:
    """The machines of a connected cluster."""

    def __init__(self, ray: Any, tell: Tell) -> None:
        self._ray, self._tell = ray, tell

    @property
    def places(self) -> int:
        return max(1, len(nodes(self._ray)))

    def run(self, jobs: Sequence[Job], on_event: OnEvent | None = None) -> Iterator[Finished]:
        """As Workers.run. Raises also ResourceError when no machine is left, NativeError for a job lost too often."""
        with _marked(jobs) as marks:
            yield from Round(self._ray, jobs, marks, on_event, self._tell).run()


@contextmanager
def _marked(jobs: Sequence[Job]) -> Iterator[dict[Path, Path]]:
    """An empty file in each folder that jobs write to, for as long as they run."""
    name = f"{MARK}{token_hex(8)}"
    marks = {folder: folder.absolute() / name for job in jobs for folder in job.writes}
    try:
        for folder, mark in marks.items():
            try:
                mark.touch()
            except OSError as error:
                raise ResourceError(f"{folder}: cannot be written: {error.strerror}") from None
        yield marks
    finally:
        for mark in marks.values():
            mark.unlink(missing_ok=True)


# --- connecting ---


def _host(address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for a word. Raises UsageError."""
    if address in ("auto", "local"):
        return None
    found = re.fullmatch(r"\[?([^/\s\[\]]+?)\]?:(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        hint = "start the run on a machine of the cluster, with --ray auto" if "://" in address else None
        raise UsageError(f"{address!r} is not the address of a Ray cluster: HOST:PORT, auto or local", hint=hint)
    return found[1], int(found[2])


def _ray() -> Any:
    """The module, told to send nothing home and to print nothing. Raises ResourceError without it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")  # it prints to stdout, where --json has its document
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or every start warns of it
    try:
        import ray
    except ImportError:
        raise ResourceError("ray is not installed, so no cluster can be used", hint=_INSTALL) from None
    return ray


def _known(ray: Any) -> str:
    """The address of the cluster that this machine is part of; 'auto' where this Ray has another way to find it."""
    try:
        known = str(ray._private.services.get_ray_address_from_environment("auto", None))
    except (AttributeError, TypeError):
        return "auto"
    except ConnectionError:
        raise ResourceError("auto: this machine is not part of a Ray cluster", hint=_START) from None
    return known if re.fullmatch(r"\S+:\d+", known) else "auto"


def _reach(host: str, port: int) -> None:
    """ResourceError, after seconds, where no such server is: Ray itself would try for minutes, or for ever."""
    reason = "something else listens there"
    try:
        with socket.create_connection((host, port), _ANSWER) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                connection.sendall(_HELLO)
                if connection.recv(9)[3:4] != _SETTINGS:
                    raise OSError(reason)
    except OSError as error:
        reason = error.strerror or str(error) or reason
        raise ResourceError(f"{host}:{port}: no Ray cluster answers: {reason}", hint=_START) from None


def _connect(ray: Any, address: str) -> None:
    given = _LOCAL if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **given)
    except (OSError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        with suppress(Exception):
            ray.shutdown()
        reason = " ".join(str(error).split())[:300]
        raise ResourceError(f"{address}: no Ray cluster can be used there: {reason}", hint=_START) from None
