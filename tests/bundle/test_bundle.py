"""Bundles on disk: what was signed is what is read; anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import Bundle, BundleSigningKey, BundleStore, BundleWriter
from edge_runtime.bundle.json_codec import from_json, to_canonical_json
from edge_runtime.bundle.manifest import Block, Manifest, ModelInfo, Part, Slice, Tensor
from edge_runtime.bundle.operations import Operation
from edge_runtime.errors import BundleError, TamperedError, TrustError

KEY = BundleSigningKey(bytes(range(32)))
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_bundle(path: Path, change: Callable[[Manifest], Manifest] = lambda m: m) -> Bundle:
    """A bundle of one tensor, used by the embedding, one empty layer, and no head."""
    writer = BundleWriter(path)
    with writer.slice("embedding") as out:
        out.add(b"\x01")
        part = out.add(WEIGHTS)
    writer.add_file("tokenizer", b"{}")

    def build(slices: Mapping[str, Slice]) -> Manifest:
        embed = Operation("embedding", "/model/embed", (), ("hidden",), {"weight": "w"}, {"factor": 1.0})
        return change(
            Manifest(
                ModelInfo("tiny", "test", "generator", 3, 4, 16, 8, (0,), -1, "fp32"),
                Block("embedding", (embed,), (), ("embedding",), WEIGHTS.nbytes),
                (Block("layers.0", (), (), (), 0),),
                Block("head", (), (), (), 0),
                {"w": Tensor("fp32", (4, 3), {"data": part})},
                slices,
                {},
                "tokenizer",
                "",
                {},
            )
        )

    writer.finish(build, KEY)
    return Bundle.open(path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "bundle")


def test_parts_are_page_aligned_and_read_back(bundle: Bundle) -> None:
    part = bundle.manifest.tensors["w"].parts["data"]
    assert part.offset_bytes % 4096 == 0
    np.testing.assert_array_equal(bundle.part(part), WEIGHTS)
    assert not bundle.part(part).flags.writeable
    assert bundle.tokenizer_json() == b"{}"


def test_same_content_gives_the_same_digest(tmp_path: Path) -> None:
    assert write_bundle(tmp_path / "a").digest == write_bundle(tmp_path / "b").digest


def test_a_changed_slice_is_refused_by_name(bundle: Bundle) -> None:
    path = bundle.slice_path("embedding")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TamperedError, match="slice embedding does not match"):
        bundle.slice_bytes("embedding")


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
@settings(max_examples=60, deadline=None)
def test_any_changed_manifest_byte_is_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("bundle")
    write_bundle(path)
    data = bytearray((path / "manifest.json").read_bytes())
    data[position % len(data)] ^= flip
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(TamperedError, match=r"manifest\.sig"):
        Bundle.open(path)


def test_an_untrusted_signer_is_refused(bundle: Bundle) -> None:
    assert Bundle.open(bundle.path, trusted={KEY.public_bytes}).digest == bundle.digest
    with pytest.raises(TrustError, match="not trusted"):
        Bundle.open(bundle.path, trusted={b"x" * 32})


def test_a_directory_that_is_no_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle") as caught:
        Bundle.open(tmp_path)
    assert "edge-runtime export" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, format_version=2), "has format 2"),
        (lambda m: replace(m, layers=()), "no layers"),
        (lambda m: replace(m, tokenizer="gone"), "tokenizer's slice"),
        (lambda m: replace(m, tensors={}), "unknown tensor 'w'"),
        (
            lambda m: replace(
                m, tensors={"w": Tensor("fp32", (4, 3), {"data": Part("embedding", 8192, "float32", (4, 3))})}
            ),
            "beyond the end",
        ),
        (
            lambda m: replace(
                m, tensors={"w": Tensor("fp32", (4, 3), {"data": Part("embedding", 0, "object", (4, 3))})}
            ),
            "bad dtype",
        ),
        (lambda m: replace(m, tensors={"w": Tensor("int3", (4, 3), {})}), "unknown format 'int3'"),
        (lambda m: replace(m, slices={**m.slices, "../up": m.slices["embedding"]}), "not a slice name"),
    ],
)
def test_a_signed_manifest_is_still_checked(
    tmp_path: Path, change: Callable[[Manifest], Manifest], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path, change)


def test_json_refuses_unknown_keys_missing_keys_and_wrong_types(bundle: Bundle) -> None:
    plain = json.loads(to_canonical_json(bundle.manifest))
    assert from_json(Manifest, json.dumps(plain).encode(), what="m") == bundle.manifest
    for broken, message in (
        ({**plain, "extra": 1}, "unknown key 'extra'"),
        ({k: v for k, v in plain.items() if k != "model"}, "lacks 'model'"),
        ({**plain, "origin": 3}, r"m\.origin must be str"),
        ({**plain, "layers": [{"name": True}]}, r"m\.layers\[0\]"),
    ):
        with pytest.raises(BundleError, match=message):
            from_json(Manifest, json.dumps(broken).encode(), what="m")


def transfer(source: Bundle, store: BundleStore, chunk_bytes: int = 1000, stop_after: int = 10**9) -> int:
    """Copy every slice chunk by chunk, as a loader does; returns the chunks sent."""
    manifest, _ = source.read("manifest.json", 0, 1 << 30)
    signature, _ = source.read("manifest.sig", 0, 1 << 30)
    partial = store.begin(source.digest, manifest, signature)
    sent = 0
    for key in partial.missing(partial.manifest.slices):
        while partial.missing([key]):
            if sent == stop_after:
                return sent
            offset = partial.received_bytes(key)
            partial.write_chunk(key, offset, source.read(key, offset, chunk_bytes)[0])
            sent += 1
    return sent


def test_a_transfer_resumes_where_it_stopped(bundle: Bundle, tmp_path: Path) -> None:
    full = transfer(bundle, BundleStore(tmp_path / "other"))
    store = BundleStore(tmp_path / "store")
    assert transfer(bundle, store, stop_after=4) == 4
    assert transfer(bundle, BundleStore(tmp_path / "store")) == full - 4
    copy = store.open(bundle.digest)
    copy.verify()
    np.testing.assert_array_equal(copy.part(copy.manifest.tensors["w"].parts["data"]), WEIGHTS)


def test_a_tampered_arrival_is_refused_and_thrown_away(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.slice_path("embedding")
    path.write_bytes(bytes(path.stat().st_size))
    store = BundleStore(tmp_path / "store")
    with pytest.raises(TamperedError, match="slice embedding does not match"):
        transfer(bundle, store)
    assert store.partial(bundle.digest).received_bytes("embedding") == 0


def test_a_chunk_out_of_place_or_too_long_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    transfer(bundle, store, stop_after=1)
    partial = store.partial(bundle.digest)
    for offset, data in ((5000, b"x"), (partial.received_bytes("embedding"), bytes(1 << 16))):
        with pytest.raises(BundleError, match="slice embedding"):
            partial.write_chunk("embedding", offset, data)


def test_an_announced_digest_binds_the_manifest(bundle: Bundle, tmp_path: Path) -> None:
    manifest, _ = bundle.read("manifest.json", 0, 1 << 30)
    signature, _ = bundle.read("manifest.sig", 0, 1 << 30)
    with pytest.raises(TamperedError, match="digest"):
        BundleStore(tmp_path / "store").begin("sha256:" + "0" * 64, manifest, signature)


def test_a_signing_key_file_is_private_and_stable(tmp_path: Path) -> None:
    key = BundleSigningKey.load_or_create(tmp_path / "keys" / "signing.key")
    assert (tmp_path / "keys" / "signing.key").stat().st_mode & 0o077 == 0
    assert BundleSigningKey.load_or_create(tmp_path / "keys" / "signing.key") == key
