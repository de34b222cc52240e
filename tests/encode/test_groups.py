"""How a job is split over machines, and what the groups tell together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.encode.groups import encode_groups, split
from apex_quant.encode.tasks import Task, Write
from apex_quant.errors import ResourceError
from apex_quant.native import Finished, Job
from apex_quant.native.workers import OnEvent

SIZES = st.tuples(st.sampled_from([32, 256, 4096]), st.integers(1, 3000))


def make_tasks(sizes: Sequence[tuple[int, int]]) -> list[Task]:
    return [Task(f"t{n}", size, "BF16", [Write("Q4_K", False, [(0, n)])]) for n, size in enumerate(sizes)]


@settings(deadline=None)
@given(sizes=st.lists(SIZES, max_size=60), count=st.integers(1, 20))
def test_every_task_once_in_balanced_groups(sizes: list[tuple[int, int]], count: int) -> None:
    tasks = make_tasks(sizes)
    groups = split(tasks, count)
    assert len(groups) == min(count, len(tasks))
    assert all(groups)
    assert sorted(task.name for group in groups for task in group) == sorted(task.name for task in tasks)
    for group in groups:
        assert group == [task for task in tasks if task in group]  # the order of the executor
    if tasks:
        heaviest = max(sum(task.work for task in group) for group in groups)
        best = max(sum(task.work for task in tasks) / count, max(task.work for task in tasks))
        assert heaviest <= best * (2 - 1 / count) * 1.0001  # a bound that needs no search for the best split
        assert split(tasks, count) == groups


class Machines:
    """Two workers that do nothing but tell what an executor would; the first loses its first job halfway."""

    places = 2

    def __init__(self, commits: Sequence[str] = ("c",)) -> None:
        self.sent: list[dict[str, Any]] = []
        self.commits = commits

    def run(self, jobs: Sequence[Job], on_event: OnEvent | None = None) -> Iterator[Finished]:
        assert on_event is not None
        for number, job in enumerate(jobs):
            payload = job.payload()
            self.sent.append(payload)
            if number == 0:
                self.tell(number, payload["tasks"][:1], on_event)
                payload = job.payload()
                self.sent.append(payload)
            self.tell(number, payload["tasks"], on_event)
            commit = self.commits[number % len(self.commits)]
            answer = {"bytes_read": 10, "rows_encoded": 2, "ggml_version": "v", "ggml_commit": commit}
            yield Finished(number, answer, "a", 1.0)

    @staticmethod
    def tell(number: int, tasks: list[dict[str, Any]], on_event: OnEvent) -> None:
        work, size = 0.0, 0
        for one in tasks:
            task = Task.from_json(one)
            work, size = work + task.work, size + task.rows * task.row_length * 2
            on_event(number, {"event": "progress", "work": work, "bytes": size, "tensor": task.name})
            on_event(number, {"event": "done", "tensors": [{"name": task.name, "sha256": "", "seconds": [1.0]}]})


def run_groups(machines: Machines, tasks: list[Task]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    payload = {"source": "m.gguf", "imatrix": None, "names": ["out/a.gguf"], "threads": 2}
    return encode_groups(machines, tasks, payload, [Path("m.gguf")], events.append), events


def test_a_group_sent_again_leaves_out_what_was_finished() -> None:
    tasks = make_tasks([(256, 100)] * 18)
    machines = Machines()
    result, events = run_groups(machines, tasks)
    first, again = machines.sent[:2]
    assert [one["name"] for one in first["tasks"][1:]] == [one["name"] for one in again["tasks"]]
    assert all(Path(name).is_absolute() for name in (*first["names"], first["source"]))
    told = [one["name"] for event in events if event["event"] == "done" for one in event["tensors"]]
    assert sorted(told) == sorted(task.name for task in tasks)
    reached = [event["work"] for event in events if event["event"] == "progress"]
    assert reached == sorted(reached)
    assert reached[-1] == pytest.approx(sum(task.work for task in tasks))
    assert (result["bytes_read"], result["ggml_commit"]) == (60, "c")


def test_different_builds_are_refused() -> None:
    with pytest.raises(ResourceError, match="different builds of the library: v a, v b"):
        run_groups(Machines(("a", "b")), make_tasks([(256, 100)] * 18))
