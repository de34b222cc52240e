"""How tensors are cut into items for threads."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.encode.tasks import LEAST_WEIGHTS, MOST_WEIGHTS, Task, Write, item_bytes, items

SHAPES = st.tuples(st.sampled_from([32, 256, 2048, 1 << 21]), st.integers(1, 3000), st.integers(1, 5))
KINDS = st.lists(st.sampled_from(["Q8_0", "Q4_K", "IQ2_XS", "BF16"]), unique=True)


@settings(deadline=None)
@given(shapes=st.lists(st.tuples(SHAPES, KINDS), min_size=1, max_size=6), threads=st.integers(1, 64))
def test_every_row_once_and_small_items_last(
    shapes: list[tuple[tuple[int, int, int], list[str]]], threads: int
) -> None:
    tasks = [
        Task(f"t{n}", shape, "BF16", [Write(kind, False, [(0, 0)]) for kind in kinds])
        for n, (shape, kinds) in enumerate(shapes)
    ]
    left = sum(task.work for task in tasks)
    ends = {task.name: 0 for task in tasks}
    order = []
    for task, first, rows in items(tasks, threads):
        assert first == ends[task.name]
        ends[task.name] += rows
        order.append(task.name)
        weights = rows * task.row_length
        assert rows == 1 or weights <= MOST_WEIGHTS
        assert weights * 2 <= item_bytes(tasks)
        work = task.work * rows / task.rows
        # no thread waits longer for another's last item than for its own share, but for items of the least size
        assert rows == 1 or weights <= LEAST_WEIGHTS or work <= left / threads * 1.01
        left -= work
    assert ends == {task.name: task.rows for task in tasks}
    assert order == sorted(order, key=lambda name: int(name[1:]))
