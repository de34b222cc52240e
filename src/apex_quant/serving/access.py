"""Who may reach a server: addresses, ports and keys."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path
from typing import Final

from apex_quant.errors import InputError, ResourceError, UsageError

_MAX_KEYS: Final = 1 << 16  # bytes of a file of keys


def read_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Keys, one a line; lines that begin with # are comments. Raises InputError, also for a file that others may
    read."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_KEYS:
            raise InputError(f"{path}: not a small file of keys")
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read as keys: {error}") from None
    if status.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise InputError(f"{path}: others can read it", hint=f"chmod 600 {path}")
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path}: holds no key")
    if bad := next((key for key in keys if "," in key or any(c.isspace() for c in key)), None):
        raise InputError(f"{path}: a key of {len(bad)} characters holds a comma or a space")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address: every address that the name stands for."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        answers = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return bool(answers) and all(ipaddress.ip_address(row[4][0]).is_loopback for row in answers)


def reachable(host: str) -> str:
    """Where this machine reaches a server that listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))


def bindable(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ResourceError when it is taken."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} is outside 0 to 65535")
    name = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
            return int(one.getsockname()[1])
    except OSError as error:
        raise ResourceError(
            f"{host} port {port} cannot be used: {error.strerror}", hint="another --port, or 0 for any"
        ) from None
