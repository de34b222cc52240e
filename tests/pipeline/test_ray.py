"""`apex run --ray` on a cluster of two nodes on this machine: the same files, whoever dies on the way."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from apex_quant.errors import InputError, NativeError, ResourceError, UsageError
from apex_quant.evaluation.state import locked
from apex_quant.native import Job
from apex_quant.pipeline import cluster as cluster_module
from apex_quant.pipeline import cluster_round
from apex_quant.pipeline.cluster import RayWorkers, cluster
from apex_quant.pipeline.cluster_node import MARK, check
from apex_quant.pipeline.context import PhaseEvent
from tests.helpers.cli import PACKAGE_ROOT
from tests.pipeline.conftest import ran, small_run
from tests.pipeline.kills import numbers
from tests.pipeline.test_run import contents

JOBS = "tests.pipeline.ray_jobs"


# --- without a cluster ---


def test_without_ray_it_says_how_to_get_it(again: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match="ray is not installed, so no cluster can be used") as caught:
        small_run(again, ray="auto")
    assert caught.value.hint is not None
    assert "pip install 'apex-quant[ray]'" in caught.value.hint


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:0", "host:99999", "ray://host:10001", "a/b:1", ""])
def test_what_is_no_address(address: str, again: Path) -> None:
    with pytest.raises(UsageError, match="is not the address of a Ray cluster: HOST:PORT, auto or local"):
        small_run(again, ray=address)


def test_an_address_where_nothing_listens(again: Path) -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ResourceError, match=rf"{address}: no Ray cluster answers: ") as caught:
            small_run(again, ray=address)
    assert time.monotonic() - started < 10
    assert "ray start" in (caught.value.hint or "")


def test_a_dry_run_needs_no_cluster(again: Path) -> None:
    assert not ran(small_run(again, ray="127.0.0.1:1", dry_run=True))


def test_a_machine_looks_where_it_is(tmp_path: Path) -> None:
    from apex_quant.native import library_info

    file, mark = tmp_path / "file", tmp_path / f"{MARK}x"
    file.write_bytes(b"1234")
    status = file.stat()
    request: dict[str, Any] = {
        "library": library_info().version,
        "marks": [],
        "reads": [(str(file), 4, int(status.st_mtime))],
    }
    check(request)
    with pytest.raises(ResourceError, match="another file here, by its size or time"):
        check({**request, "reads": [(str(file), 5, int(status.st_mtime))]})
    with pytest.raises(ResourceError, match="cannot be opened here"):
        check({**request, "reads": [(str(tmp_path / "gone"), 5, 0)]})
    with pytest.raises(ResourceError, match="not the same folder here") as caught:
        check({**request, "marks": [str(mark)]})
    assert "shared disk" in (caught.value.hint or "")
    with pytest.raises(ResourceError, match=r"the library is .* here, not 0\.0"):
        check({**request, "library": "0.0"})


def test_a_machine_with_another_version_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from apex_quant.version import VERSION

    (message,) = cluster_round._task()({"version": "9.9"})
    assert message["message"] == f"apex-quant {VERSION} is installed there, and 9.9 here"
    monkeypatch.setitem(sys.modules, "apex_quant", None)
    (message,) = cluster_round._task()({"version": "9.9"})
    assert message["message"].startswith("apex-quant is not installed there")
    assert "9.9" in message["hint"]


# --- with one ---


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """Two nodes of one processor each."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(PACKAGE_ROOT), str(Path(__file__).parents[2])]))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        yield made
        made.shutdown()


def other_node(machines: Any) -> Any:
    """The node that this process is not connected through."""
    import ray

    here = ray._private.worker.global_worker.node._raylet_socket_name
    (found,) = [one for one in (machines.head_node, *machines.worker_nodes) if one._raylet_socket_name != here]
    return found


def job(name: str, payload: dict[str, Any], **more: Any) -> Job:
    return Job(f"{JOBS}:{name}", lambda: payload, f"step {name}", **more)


@pytest.fixture
def workers(machines: Any) -> Iterator[tuple[RayWorkers, list[str]]]:
    told: list[str] = []
    with cluster(machines.address, told.append) as found:
        yield found, told


@pytest.mark.slow
def test_jobs_go_to_both_machines(workers: tuple[RayWorkers, list[str]], tmp_path: Path) -> None:
    found, told = workers
    assert found.places == 2
    events: list[tuple[int, Any]] = []
    jobs = [job("echo", {"value": n}, writes=[tmp_path]) for n in range(6)]
    done = list(found.run(jobs, lambda number, event: events.append((number, event))))
    assert sorted((one.number, one.result["value"], one.result["threads"]) for one in done) == [
        (n, n, 1) for n in range(6)
    ]
    assert len({one.where for one in done}) == 2
    assert sorted(events, key=str) == sorted([(n, {"at": at}) for n in range(6) for at in (1, 2)], key=str)
    assert told == []
    assert list(tmp_path.iterdir()) == []  # no mark is left


@pytest.mark.slow
def test_a_killed_worker_process(workers: tuple[RayWorkers, list[str]], tmp_path: Path) -> None:
    found, told = workers
    jobs = [job("die_once", {"flag": str(tmp_path / f"flag{n}")}) for n in range(2)]
    jobs.append(job("busy_after_a_loss", {"tries": str(tmp_path / "tries")}))
    done = {one.number: one.result for one in found.run(jobs)}
    assert done == {0: {"ok": True}, 1: {"ok": True}, 2: {"tries": 3}}
    assert sum(line.startswith("step die_once: lost on machine ") for line in told) == 2
    assert sum(line.startswith("step busy_after_a_loss: lost on machine ") for line in told) == 2


@pytest.mark.slow
def test_errors_come_back(workers: tuple[RayWorkers, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = workers
    with pytest.raises(InputError, match=r"machine .*: bad bytes") as caught:
        list(found.run([job("fail", {"kind": "input"})]))
    assert caught.value.hint == "look"
    with pytest.raises(ResourceError, match="held"):  # nothing was lost before: somebody else has it
        list(found.run([job("fail", {"kind": "busy"})]))
    with pytest.raises(NativeError, match="ValueError: boom"):
        list(found.run([job("fail", {"kind": "bug"})]))
    monkeypatch.setattr(cluster_round, "_MOST_LOSSES", 1)
    monkeypatch.setattr(cluster_round, "_REST", 0.1)
    with pytest.raises(NativeError, match="step always_dies: lost 2 times, the last on machine "):
        list(found.run([job("always_dies", {})]))
    monkeypatch.setattr(cluster_round, "VERSION", "9.9")
    with pytest.raises(ResourceError, match=r"machine .*: apex-quant .* is installed there, and 9\.9 here"):
        list(found.run([job("echo", {"value": 1})]))


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs(workers: tuple[RayWorkers, list[str]], tmp_path: Path) -> None:
    found, _ = workers
    alive = tmp_path / "alive"

    def interrupt(number: int, event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(found.run([job("linger", {"alive": str(alive)})], interrupt))
    time.sleep(2)
    alive.unlink()
    time.sleep(1)
    assert not alive.exists()


def test_something_that_is_not_ray(again: Path) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ResourceError, match=f"{address}: no Ray cluster answers: timed out"):
            small_run(again, ray=address)
    assert time.monotonic() - started < 10


def fresh(finished: Path, folder: Path) -> Path:
    for name in ("Small-BF16.gguf", "corpus.txt"):
        shutil.copy2(finished / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_same_files_as_on_one_machine(machines: Any, finished: Path, tmp_path: Path) -> None:
    fresh(finished, tmp_path)
    notes: list[str] = []

    def listen(event: Any) -> None:
        if isinstance(event, PhaseEvent) and event.kind == "note":
            notes.append(f"{event.phase}: {event.text}")

    small_run(tmp_path, ray=machines.address, progress=listen)
    assert contents(tmp_path / "work") == contents(finished / "work")
    assert numbers(tmp_path / "work") == numbers(finished / "work")
    assert "ray: machines: 2" in notes
    assert sum(" s on machine " in note for note in notes) == 4  # two files verified, two evaluated
    assert ran(small_run(tmp_path)) == {}  # a run on one machine finds nothing to do
    assert not list((tmp_path / "work").rglob(f"{MARK}*"))


@pytest.mark.slow
def test_one_file_is_measured_by_two_machines(machines: Any, finished: Path, tmp_path: Path) -> None:
    """Fewer files than machines: speed is measured apart from what is measured on text, and the results are one."""
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    small_run(folder, ray=machines.address, tiers=["quality"], evaluate={"only": ["ppl", "kld", "speed"]})
    metrics = numbers(folder / "work")["Small-APEX-Quality.json"]
    before = numbers(finished / "work")["Small-APEX-Quality.json"]
    assert set(metrics) == {"ppl", "kld", "speed"}
    assert {name: metrics[name] for name in before} == before
    assert (folder / "work/release/results/Small-APEX-Quality.npz").is_file()
    assert not (folder / "work/parts").exists()


def when(condition: Callable[[Any], bool], act: Callable[[], None]) -> Callable[[Any], None]:
    """A listener that acts once."""
    acted: list[bool] = []

    def listen(event: Any) -> None:
        if not acted and condition(event):
            acted.append(True)
            act()

    return listen


@pytest.mark.slow
def test_a_lost_machine(machines: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One goes while it encodes, its successor while it evaluates: the files are the same."""
    fresh(finished, tmp_path)
    notes: list[str] = []
    held = ExitStack()  # the results of both files, which no machine can write meanwhile
    sent: list[str] = []
    send = cluster_round.Round._sent

    def lose() -> None:
        machines.remove_node(other_node(machines), allow_graceful=False)

    def hold() -> None:
        for tier in ("Quality", "I-Compact"):
            held.enter_context(locked(tmp_path / f"work/release/results/Small-APEX-{tier}.json"))

    def send_and_lose(self: cluster_round.Round, job: Job, node: cluster_round.Node) -> Any:
        if not job.step.startswith("evaluating "):
            return send(self, job, node)
        if not sent:
            hold()
        sent.append(job.step)
        stream = send(self, job, node)
        if len(sent) == 2:
            deadline = time.monotonic() + 20
            while len(at_work("ray::evaluating ")) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            lose()
        return stream

    monkeypatch.setattr(cluster_round.Round, "_sent", send_and_lose)
    listeners = [
        when(lambda event: type(event).__name__ == "JobProgress" and event.phase == "encode" and event.work > 0, lose),
        when(lambda event: starts(event, "verify"), lambda: machines.add_node(num_cpus=1)),
        when(lambda event: tells(event, "evaluating "), held.close),
    ]

    def listen(event: Any) -> None:
        for heard in listeners:
            heard(event)
        if isinstance(event, PhaseEvent) and event.kind == "note":
            notes.append(f"{event.phase}: {event.text}")

    try:
        small_run(tmp_path, ray=machines.address, progress=listen)
    finally:
        held.close()
        while len(machines.worker_nodes) < 1:
            machines.add_node(num_cpus=1)
    assert contents(tmp_path / "work") == contents(finished / "work")
    assert numbers(tmp_path / "work") == numbers(finished / "work")
    lost = [note for note in notes if ": lost on machine " in note]
    assert any(note.startswith("ray: encoding ") for note in lost), notes
    assert any(note.startswith("ray: evaluating ") for note in lost), notes
    assert len(sent) == 3, sent
    assert not list((tmp_path / "work").rglob("*.partial"))


def at_work(title: str) -> list[int]:
    """The processes that call themselves so, as Ray's do by what they run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if file.read_bytes().startswith(title.encode()):
                found.append(int(file.parent.name))
    return found


def tells(event: Any, job: str) -> bool:
    """Whether a job of that name was lost."""
    if not isinstance(event, PhaseEvent) or event.kind != "note":
        return False
    return re.match(f"{job}.*: lost on machine ", event.text) is not None


def starts(event: Any, phase: str) -> bool:
    return isinstance(event, PhaseEvent) and (event.kind, event.phase) == ("run", phase)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_alone(machines: Any, finished: Path, tmp_path: Path) -> None:
    """Ctrl-C while machines encode; then without them, and with other options for one file."""
    fresh(finished, tmp_path)

    def stop(event: Any) -> None:
        if type(event).__name__ == "JobProgress" and event.phase == "encode" and event.work > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path, ray=machines.address, progress=stop)
    assert not list((tmp_path / "work").rglob(f"{MARK}*"))
    small_run(tmp_path)
    assert contents(tmp_path / "work") == contents(finished / "work")


def test_the_module_needs_no_ray() -> None:
    assert "ray" not in vars(cluster_module)
