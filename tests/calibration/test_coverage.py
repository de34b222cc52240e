"""Which experts count as uncovered, and what --cover draws next."""

from __future__ import annotations

import numpy as np

from apex_quant.calibration.coverage import Cover, as_matrix, number_uncovered, uncovered

COUNTS = {0: np.array([100, 3, 64]), 2: np.array([64, 65, 0])}


def test_uncovered_by_layer() -> None:
    assert uncovered(COUNTS, 64) == [
        {"layer": 0, "experts": [1], "tokens": [3]},
        {"layer": 2, "experts": [2], "tokens": [0]},
    ]
    assert number_uncovered(COUNTS, 64) == 2
    assert number_uncovered(COUNTS, 1) == 1


def test_every_kind_is_tried_then_the_best_goes_on() -> None:
    cover = Cover(["chat/de", "code/en", "long"], 64)
    assert cover.next_kind(COUNTS) == "chat/de"
    cover.learn("chat/de", np.array([[50, 0, 50], [0, 0, 1]]))
    assert cover.next_kind(COUNTS) == "code/en"
    cover.learn("code/en", np.array([[0, 20, 0], [0, 0, 20]]))
    cover.exhausted("long")
    assert cover.next_kind(COUNTS) == "code/en"
    cover.exhausted("code/en")
    assert cover.next_kind(COUNTS) == "chat/de"


def test_stops_when_all_are_covered_or_nothing_helps() -> None:
    cover = Cover(["chat"], 3)
    assert cover.next_kind({0: np.array([3, 9])}) is None
    cover.learn("chat", np.array([[7, 0]]))
    assert cover.next_kind({0: np.array([9, 1])}) is None
    assert Cover([], 3).next_kind({0: np.array([1])}) is None


def test_layers_with_fewer_experts() -> None:
    matrix = as_matrix({0: np.array([1, 2, 3]), 1: np.array([4])})
    assert matrix.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert Cover(["a"], 2).next_kind({0: np.array([5, 5, 5]), 1: np.array([5])}) is None
