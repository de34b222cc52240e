"""The one door to huggingface_hub: loaded when it is needed, its errors explained, its requests tried again.

The library tries each request again by itself: five times, 1 to 8 seconds apart or as long as Retry-After says.
`retried` is for what comes after that, and for the requests that the library sends once (the commit). Nothing here
imports from other rooms, so all of them may use it.
"""

from __future__ import annotations

import email.utils
import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from apex_quant.errors import ApexError, InputError, ResourceError, UsageError

TRIES: Final = 6
FIRST_WAIT: Final = 2.0  # seconds, doubled each time
LONGEST_WAIT: Final = 600.0  # seconds; the hub's own windows are 300. Who asks for more is told to come back

_LATER: Final = "try again later: what was transferred is kept"
_LOGIN: Final = "hf auth login stores a token; for a private or gated one it must be of an account that may see it"
_NETWORK: Final = "is there a network? without one, download the files elsewhere and name them or their folder"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
# by name: the library's HTTP client, and with it the base class of these, differs between its versions
_DROPPED: Final = {"TransportError", "ConnectionError", "Timeout", "TimeoutError", "ChunkedEncodingError"}
_MISSING: Final = ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError")

T = TypeVar("T")


def rest(seconds: float) -> None:
    """The default `sleep`."""
    time.sleep(seconds)


def library(what: str) -> Any:
    """huggingface_hub. ResourceError naming `what` needs it where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise ResourceError(
            f"{what}: loading from the hub needs huggingface_hub", hint="pip install 'apex-quant[hub]'"
        ) from None
    return huggingface_hub


def has_token() -> bool:
    """Whether huggingface_hub knows a token: HF_TOKEN, or what `hf auth login` stored. We keep none ourselves."""
    get_token = getattr(library("the hub"), "get_token", None)
    return get_token is not None and bool(get_token())


def page(repo: str) -> str:
    """A repository's address."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it downloads: HF_HUB_CACHE, HF_HOME or the user's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


@contextmanager
def explained(what: str, *, verb: str = "loaded", hint: str | None = None) -> Iterator[None]:
    """Turns whatever the library and the network below raise into an ApexError about `what`."""
    try:
        yield
    except Exception as error:
        raise explain(error, what, verb=verb, hint=hint) from None


def explain(error: BaseException, what: str, *, verb: str = "loaded", hint: str | None = None) -> ApexError:
    """The same as an error with a cure: InputError for names, UsageError for bad ones, ResourceError for the rest."""
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, ApexError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return ResourceError(
                f"{what}: the disk is full", hint="free some space: what is there is kept, the same command goes on"
            )
    for cause in causes:
        if (found := _by_class(cause, what) or _by_status(cause, what)) is not None:
            return found
    last = next((cause for cause in reversed(causes) if str(cause).strip()), error)
    return ResourceError(f"{what}: cannot be {verb}: {type(last).__name__}: {first_line(last)}", hint=hint or _NETWORK)


def _by_class(error: BaseException, what: str) -> ApexError | None:
    if _is(error, "GatedRepoError"):
        return InputError(
            f"{what}: gated: its owner gives access on request",
            hint="accept its conditions on its page of the hub, with the account of the stored token"
            + ("" if has_token() else "; there is none yet: hf auth login"),
        )
    if _is(error, "HFValidationError"):
        return UsageError(f"{what}: {first_line(error)}")
    if _is(error, *_MISSING) and not _is(error, "LocalEntryNotFoundError"):  # that one is a network's failure
        return InputError(f"{what}: {first_line(error)}", hint=f"check the name; {_LOGIN}")
    return None


def _by_status(error: BaseException, what: str) -> ApexError | None:
    status = _status(error)
    if status in (401, 403):
        if not has_token():
            return ResourceError(f"{what}: the hub wants a token ({status}), and none is stored", hint=_LOGIN)
        return ResourceError(
            f"{what}: the hub refuses this token: {first_line(error)}",
            hint="writing needs a token with write permission for this account or organization: hf auth login",
        )
    if status in (400, 409, 412, 413, 422):
        return InputError(f"{what}: the hub does not accept this ({status}): {first_line(error)}")
    if status == 429:
        return ResourceError(f"{what}: too many requests (429){_asked(error)}", hint=_LATER)
    if status is not None and status >= 500:
        return ResourceError(f"{what}: the hub is in trouble: {first_line(error)}", hint=_LATER)
    return None


def _asked(error: BaseException) -> str:
    asked = _retry_after(error)
    return "" if asked is None else f", the hub asks for {asked:.0f} s of rest"


def missing_repository(error: BaseException) -> bool:
    """Whether the hub says that there is none: it says the same of a private one without the right token."""
    return _is(error, "RepositoryNotFoundError") and not _is(error, "GatedRepoError")


def retried(
    call: Callable[[], T],
    *,
    sleep: Callable[[float], None] = rest,
    say: Callable[[str], None] = lambda _: None,
) -> T:
    """`call()`, tried again after a passing failure: 429, 408, 5xx, a dropped connection. At most TRIES times."""
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            wait = pause(error, attempt)
            if wait is None:
                raise
            say(f"{reason(error)}; again in {wait:.0f} s")
        sleep(wait)
    raise AssertionError  # the last attempt returns or raises


def pause(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait after failure number `attempt` (from 0), or None when trying again is of no use."""
    passing = next((cause for cause in _chain(error) if _passing(cause)), None)
    if passing is None or attempt + 1 >= TRIES:
        return None
    asked = _retry_after(passing)
    wait = FIRST_WAIT * 2**attempt if asked is None else asked
    return wait if wait <= LONGEST_WAIT else None


def reason(error: BaseException) -> str:
    """What passed, in a few words."""
    passing = next((cause for cause in _chain(error) if _passing(cause)), error)
    status = _status(passing)
    return f"the hub answered {status}" if status else f"{type(passing).__name__}: {first_line(passing)}"


def _passing(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if _is(error, "OfflineModeIsEnabled"):
        return False
    if any(kind.__name__ in _DROPPED for kind in type(error).__mro__):
        return True
    return isinstance(error, OSError) and str(error).startswith("Consistency check failed")  # a body cut short


def _status(error: BaseException) -> int | None:
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _retry_after(error: BaseException) -> float | None:
    """Of the answer's header: seconds, or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    text = str(headers.get("Retry-After") or "").strip() if headers is not None else ""
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        when = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # the latter for a year that no integer of C holds
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _is(error: BaseException, *names: str) -> bool:
    """Whether it is of one of these classes of huggingface_hub.errors, in versions that have them."""
    try:
        from huggingface_hub import errors
    except ImportError:
        return False
    kinds = [kind for name in names if (kind := getattr(errors, name, None)) is not None]
    return isinstance(error, tuple(kinds))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def first_line(error: BaseException) -> str:
    """The library's messages have several, and begin with empty ones."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
