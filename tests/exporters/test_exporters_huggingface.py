"""Hub names: only the files an export needs, from any endpoint, resumed where a download stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ExportError, UsageError
from exporters.huggingface import locate
from tests.support.stub_hub import COMMIT, StubHub

NAME = "some-org/tiny-model"
WEIGHTS = np.random.default_rng(0).bytes(3 << 20)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"\x80\x04 a pickle",
    "modeling_tiny.py": b"print('code')",
    "consolidated.safetensors": b"a second copy",
    "1_Pooling/config.json": b"{}",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with StubHub(NAME, dict(FILES)) as hub:
        yield hub


def test_only_the_needed_files_are_fetched(cache: Path, hub: StubHub) -> None:
    found = locate(NAME, endpoint=hub.url)
    fetched = {str(file.relative_to(found.path)) for file in found.path.rglob("*") if file.is_file()}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"}
    assert found.name == "tiny-model"
    assert found.origin == f"{NAME}@{COMMIT}"
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS


def test_the_endpoint_of_the_environment_is_used(
    cache: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.files["model.safetensors"] = b"small"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from HF_ENDPOINT when the client is imported
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    assert locate(NAME).path.is_relative_to(cache)


def test_an_interrupted_download_goes_on_where_it_stopped(cache: Path, hub: StubHub) -> None:
    hub.cut_after_bytes = 1_000_000
    with pytest.raises(ExportError, match=f"the download of {NAME} stopped") as caught:
        locate(NAME, endpoint=hub.url)
    assert "goes on where it stopped" in caught.value.hint
    hub.mend()
    hub.ranges.clear()
    seen: list[int] = []
    found = locate(NAME, endpoint=hub.url, progress=lambda what, done, total: seen.append(done))
    assert [first for path, first in hub.ranges if path == "model.safetensors"] == [1_000_000]
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert seen == sorted(seen)  # a bar that never goes back
    assert not list(found.path.rglob("*.part"))


def test_bytes_that_are_not_those_promised_are_thrown_away(cache: Path, hub: StubHub) -> None:
    hub.lfs["model.safetensors"] = "0" * 64
    with pytest.raises(ExportError, match=r"model\.safetensors came with"):
        locate(NAME, endpoint=hub.url)
    assert not list(cache.rglob("model.safetensors*"))


def test_what_was_downloaded_is_not_fetched_again(cache: Path, hub: StubHub) -> None:
    locate(NAME, endpoint=hub.url)
    hub.ranges.clear()
    locate(NAME, endpoint=hub.url)
    assert hub.ranges == []


def test_an_unknown_model_is_named(cache: Path, hub: StubHub) -> None:
    with pytest.raises(ExportError, match="the hub has no model some-org/other"):
        locate("some-org/other", endpoint=hub.url)


@pytest.mark.parametrize("name", ["no-such-directory", "../up/there", "a/b/c", "", "org/model name"])
def test_what_is_neither_a_directory_nor_a_name_is_refused(name: str) -> None:
    if name:
        with pytest.raises(UsageError, match="neither a directory nor a hub name"):
            locate(name)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert locate(str(tmp_path / "my-model")).name == "my-model"
