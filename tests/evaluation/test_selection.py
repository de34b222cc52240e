"""Which tasks are drawn: values recorded from C++ (libstdc++ 12), and its own algorithms where a compiler is there."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from apex_quant.errors import UsageError
from apex_quant.evaluation.selection import mt19937, select, uniform_int

# What follows was printed by CPP below, compiled with g++ 12: [n, k, mode, seed] and the first numbers of its line
RECORDED = {
    (10042, 400, 0, 1): [4187, 10013, 7233, 9363, 1, 1286, 3036, 10032, 1474, 2371, 927, 3984],
    (40, 12, 0, 7): [3, 9, 31, 13, 18, 39, 28, 19, 38, 11, 22, 8],
    (1267, 400, 1, 1): [528, 1262, 911, 1178, 0, 161, 381, 1258, 184, 296, 116, 498],
    (299, 100, 1, 5): [66, 16, 258, 246, 60, 106, 269, 285],
    (5, 4, 2, 1): [1791095845, 4282876139, 3093770124, 4005303368],
    # 5 of the first 17 numbers are rejected for this range
    (3_000_000_000, 12, 3, 1): [
        1251065995, 2991554424, 2160973467, 2797672083, 384373343, 440267677,
        708266928, 277015786, 1189742178, 558780633, 1163732220, 1190302405,
    ],
}  # fmt: skip

CPP = r"""
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
int main(int, char ** args) {
    size_t n = atol(args[1]), k = atol(args[2]);
    int mode = atoi(args[3]);
    std::mt19937 numbers(atoi(args[4]));
    std::vector<int> left;
    for (size_t i = 0; mode < 2 && i < n; i++) left.push_back(i);
    const float scale = 1 / (1.f + (float) numbers.max());
    for (size_t i = 0; i < k; i++) {
        if (mode == 0) {
            std::uniform_int_distribution<size_t> any(0, left.size() - 1);
            const size_t j = any(numbers);
            printf("%d ", left[j]);
            left.erase(left.begin() + j);
        } else if (mode == 1) {
            const int j = int(scale * numbers() * left.size());
            printf("%d ", left[j]);
            left[j] = left.back();
            left.pop_back();
        } else if (mode == 2) {
            printf("%lu ", (unsigned long) numbers());
        } else {
            std::uniform_int_distribution<size_t> any(0, n - 1);
            printf("%zu ", any(numbers));
        }
    }
}
"""


def ours(n: int, k: int, mode: int, seed: int) -> list[int]:
    if mode < 2:
        return select("text" if mode == 0 else "csv", n, k, seed)
    numbers = mt19937(seed)
    return [next(numbers) if mode == 2 else uniform_int(numbers, n) for _ in range(k)]


@pytest.mark.parametrize("run", RECORDED)
def test_recorded_from_cpp(run: tuple[int, int, int, int]) -> None:
    assert ours(*run)[: len(RECORDED[run])] == RECORDED[run]


def test_cpp_itself(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here")
    source, program = tmp_path / "draw.cpp", tmp_path / "draw"
    source.write_text(CPP)
    subprocess.run([compiler, "-O1", str(source), "-o", str(program)], check=True)
    runs = [*RECORDED, (10042, 10042, 0, 1), (1, 1, 0, 1), (14042, 14041, 1, 3), (3_000_000_000, 5000, 3, 9)]
    for run in runs:
        printed = subprocess.run([str(program), *map(str, run)], check=True, capture_output=True, text=True).stdout
        assert ours(*run) == [int(word) for word in printed.split()], run


def test_all_tasks() -> None:
    """HellaSwag's are shuffled even then, the others' are not; 0 and too many mean all."""
    for form, wanted in itertools.product(("csv", "bin"), (0, 9, 100)):
        assert select(form, 9, wanted) == list(range(9))
    assert sorted(select("text", 9, 0)) == list(range(9))
    assert select("text", 9, 0) == select("text", 9, 9) == select("text", 9, 100) != list(range(9))


def test_few_of_one_seed_begin_as_many_do() -> None:
    assert select("text", 1000, 7) == select("text", 1000, 400)[:7]
    assert select("bin", 1000, 7) == select("bin", 1000, 400)[:7]


@pytest.mark.parametrize(("tasks", "seed"), [(-1, 1), (4, -1), (4, 1 << 32)])
def test_numbers_that_make_no_sense(tasks: int, seed: int) -> None:
    with pytest.raises(UsageError, match="neither may be negative"):
        select("bin", 9, tasks, seed)
