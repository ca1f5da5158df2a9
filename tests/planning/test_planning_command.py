"""`edge-runtime plan`: a devices file and a real bundle, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.placement import model_profile
from coordinator.planning.devices_toml import bytes_read_per_token, load_devices, parse_bandwidth
from edge_runtime.bundle import Bundle
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

DEVICES = """
[defaults]
rtt = "2ms"
bandwidth = "100Mbit/s"
[[device]]
name = "phone"
memory = "3MiB"
weight_bandwidth = "1GB/s"
[[device]]
name = "laptop"
memory = "4MiB"
layer_decode = "0.2ms"
layer_prefill_row = "50us"
head = "0.1ms"
rtt = "1ms"
[[link]]
between = ["phone", "laptop"]
rtt = "300us"
bandwidth = "40MB/s"
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(
        tmp_path_factory.mktemp("plan") / "bundle", TinyModel(layers=6, experts=8, format="int8")
    )


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    path = tmp_path / "devices.toml"
    path.write_text(DEVICES)
    return path


def test_the_model_is_weighed_from_its_manifest(bundle: Bundle) -> None:
    profile = model_profile(bundle.manifest, 64)
    assert profile.num_layers == 6
    whole = bundle.manifest.stage_weight_bytes(0, 5)
    assert sum(profile.layer_weight_bytes) + profile.embedding_bytes + profile.head_bytes == whole
    tail = bundle.manifest.stage_weight_bytes(3, 5)
    shared = profile.embedding_bytes if profile.tied else 0
    assert sum(profile.layer_weight_bytes[3:]) + profile.head_bytes + shared == tail


def test_only_chosen_experts_are_read(bundle: Bundle) -> None:
    layer = bundle.manifest.layers[0]
    assert (
        0
        < bytes_read_per_token(bundle.manifest, layer)
        < sum(bundle.manifest.slices[key].size_bytes for key in layer.slices)
    )


def test_a_plan_is_printed_with_its_reasons(
    bundle: Bundle, devices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", str(bundle.path), "--devices", str(devices), "--split", "even", "--kv-tokens", "32"])
        == 0
    )
    printed = capsys.readouterr()
    assert printed.out.startswith("laptop [0-2] -> phone [3-5]\npredicted: ")
    assert "why:" in printed.out
    assert printed.err == ""


def test_a_plan_as_json(bundle: Bundle, devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        [
            "plan",
            str(bundle.path),
            "--devices",
            str(devices),
            "--json",
            "--split",
            "0-1,2-5",
            "--kv-tokens",
            "9",
        ]
    )
    assert code == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["layers"] for stage in plan["stages"]] == [[0, 1], [2, 5]]
    assert plan["predicted_tokens_per_second"] > 0
    assert plan["reasons"]
    assert plan["excluded"] == {}


def test_what_does_not_fit_ends_with_a_hint_and_a_code_of_its_own(
    bundle: Bundle, devices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices.write_text(DEVICES.replace("3MiB", "90KiB").replace("4MiB", "90KiB"))
    assert main(["plan", str(bundle.path), "--devices", str(devices)]) == 31
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "bytes short" in printed.err
    assert printed.err.splitlines()[-1].startswith("hint: ")


def test_the_documented_example_is_a_devices_file(bundle: Bundle) -> None:
    example = Path(__file__).parents[2] / "examples" / "devices.toml"
    profiles, links = load_devices(example, bundle.manifest)
    assert [profile.name for profile in profiles] == ["phone", "laptop", "mini-pc"]
    assert links["laptop", "mini-pc"].rtt_seconds == pytest.approx(3e-4)
    assert links["phone", ""].bytes_per_second == pytest.approx(37.5e6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('memory = "3MiB"', 'memory = "lots"'), "device phone: memory: 'lots' is not a size"),
        (('memory = "3MiB"', ""), "device phone: memory is missing"),
        (("weight_bandwidth", "weight_bandwith"), "weight_bandwith is not known"),
        (('name = "laptop"', 'name = "phone"'), "the name is there twice"),
        (('["phone", "laptop"]', '["phone", "fridge"]'), "names of two devices"),
        (("[[device]]", "[device]"), "two brackets|TOML|Cannot"),
        (('rtt = "1ms"', 'rtt = "soon"'), "device laptop: rtt: 'soon' is not a duration"),
    ],
)
def test_mistakes_in_the_file_are_named(
    bundle: Bundle, devices: Path, change: tuple[str, str], message: str
) -> None:
    devices.write_text(DEVICES.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_devices(devices, bundle.manifest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100Mbit/s", 12.5e6),
        ("1Gbps", 125e6),
        ("3 MBps", 3e6),
        ("fast", None),
        ("0", None),
        ("12.5MB/s", 12.5e6),
        ("1MiB/s", 1 << 20),
        (5, 5.0),
    ],
)
def test_bandwidths(text: object, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="bandwidth"):
            parse_bandwidth(text)
    else:
        assert parse_bandwidth(text) == expected
