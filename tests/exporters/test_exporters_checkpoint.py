"""Checkpoints are checked before any byte of them is used, and every refusal names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ExportError
from exporters import safetensors_header
from exporters.checkpoint import Checkpoint
from exporters.safetensors_header import MAX_HEADER_BYTES, read_header


def write_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{" * 9, "not JSON"),
    "a list": ([], "not an object"),
    "twice": (b'{"a":{},"a":{}}', "twice"),
    "overlap": ({"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}, "overlaps"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}, "hole"),
    "short": ({"a": entry(0, 8, [2])}, "end at byte"),
    "beyond": ({"a": entry(0, 400, [100])}, "end at byte"),
    "size": ({"a": entry(0, 16, [5])}, "needs 20 bytes"),
    "dtype": ({"a": entry(0, 16, [4], "PICKLE")}, "unknown dtype"),
    "negative": ({"a": entry(0, 16, [-4])}, "bad shape"),
    "floats": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}}, "bad shape"),
    "no entry": ({"a": 3}, "not an object"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_damaged_header_is_refused(tmp_path: Path, name: str) -> None:
    header, reason = BAD_HEADERS[name]
    path = write_file(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(ExportError, match=reason) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_an_oversized_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 4096)  # sparse
    with pytest.raises(ExportError, match="over the limit"):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_never_do_anything_but_an_export_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("random") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ExportError):
        read_header(path)


def checkpoint(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {}))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def test_rows_of_every_float_type_are_read_as_float32(tmp_path: Path) -> None:
    exact = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    halves = {"f32": exact, "f16": exact.astype(np.float16)}
    opened = Checkpoint.open(checkpoint(tmp_path, halves))
    np.testing.assert_array_equal(opened.read("f32"), exact)
    np.testing.assert_array_equal(opened.read("f16", 2, 3), halves["f16"][2:5].astype(np.float32))
    upper = (exact.view(np.uint32) >> 16).astype(np.uint16)
    write_file(tmp_path / "model.safetensors", {"bf16": entry(0, 70, [7, 5], "BF16")}, upper.tobytes())
    opened = Checkpoint.open(tmp_path)
    expected = (upper.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(opened.read("bf16"), expected)


def test_chunks_cover_a_tensor_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.checkpoint.CHUNK_BYTES", 3 * 5 * 4)
    exact = np.arange(50, dtype=np.float32).reshape(10, 5)
    opened = Checkpoint.open(checkpoint(tmp_path, {"a": exact}))
    pieces = list(opened.chunks("a", 2, 7))
    assert [first for first, _ in pieces] == [0, 3, 6]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in pieces]), exact[2:9])


def test_integers_are_refused_by_name(tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint(tmp_path, {"codes": np.zeros((2, 2), np.int8)}))
    with pytest.raises(ExportError, match=r"tensor codes in model.safetensors is I8"):
        opened.read("codes")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ExportError, match="pickle") as caught:
        Checkpoint.open(tmp_path)
    assert name in caught.value.message
    assert "save_pretrained" in caught.value.hint


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin"])
def test_shards_outside_the_directory_are_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ExportError, match="not a safetensors file beside it"):
        Checkpoint.open(tmp_path)


def test_a_sharded_checkpoint_is_read_across_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, shard in weight_map.items():
        safetensors.numpy.save_file({name: np.full((2,), ord(name), np.float32)}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    opened = Checkpoint.open(tmp_path)
    assert opened.read("b").tolist() == [98.0, 98.0]
    index.write_text(json.dumps({"weight_map": weight_map | {"c": "model-1.safetensors"}}))
    with pytest.raises(ExportError, match=r"tensor c is in model-1\.safetensors, but"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ExportError, match="missing"):
        Checkpoint.open(tmp_path)


def test_what_is_not_a_checkpoint_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match="not a JSON object"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)


def test_every_dtype_of_the_format_has_a_size() -> None:
    assert {"F32", "F16", "BF16", "I64", "U8", "BOOL"} <= safetensors_header.DTYPE_BYTES.keys()
