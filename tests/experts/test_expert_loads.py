"""Loads of experts: from routing to a file and to shares, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.experts.loads import counted, read_loads, write_loads

ROUTING = np.array([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[0, 1], [2, 0]]], np.int32)  # 3 tokens, 2 layers


def test_what_was_counted_is_read_again(tmp_path: Path) -> None:
    loads = counted("digest", ROUTING, layers=[0, 2], counts=[4, 4], num_layers=3)
    assert loads.uses == ((3, 2, 1, 0), (), (1, 1, 3, 1))
    path = tmp_path / "loads.json"
    write_loads(path, loads)
    assert read_loads(path, "digest", [4, 0, 4]) == loads


def test_shares_of_a_layer_sum_to_one_and_nobody_has_none() -> None:
    shares = counted("digest", ROUTING, layers=[0, 2], counts=[4, 4], num_layers=3).shares()
    assert [sum(layer) for layer in shares] == [pytest.approx(1), 0, pytest.approx(1)]
    assert min(shares[0]) > 0
    assert shares[0] == tuple(sorted(shares[0], reverse=True))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "no file of expert loads"),
        ("[]", "no file of expert loads"),
        (json.dumps({"bundle": "digest"}), "no file of expert loads"),
        (json.dumps({"bundle": "other", "uses": [[1, 2]]}), "another bundle"),
        (json.dumps({"bundle": "digest", "uses": [[1, 2, 3]]}), "does not fit"),
        (json.dumps({"bundle": "digest", "uses": [[1, -2]]}), "does not fit"),
        (json.dumps({"bundle": "digest", "uses": [[1, 0.5]]}), "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "loads.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem):
        read_loads(path, "digest", [2])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_loads(tmp_path / "nowhere.json", "digest", [2])
