"""`doctor experts`: what it measures, what it concludes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.cli.main import main
from edge_runtime.errors import UsageError
from edge_runtime.experts.admission import MeasuredSpeed, in_memory_tps, prospects, trace_of, usable_from
from edge_runtime.experts.consistency import segment_cache_hit_rate, segment_routing
from edge_runtime.experts.replay import replay
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

Capture = pytest.CaptureFixture[str]


def routing_of(tokens: list[list[int]], layers: int = 1) -> np.ndarray:
    return np.array([[row] * layers for row in tokens], np.int32)


# ---------------------------------------------------------------- SRP and SCH


def test_tokens_that_always_choose_the_same_are_foretold_perfectly() -> None:
    always = routing_of([[1, 3]] * 40, layers=2)
    found = segment_routing(always, 8)
    assert (found.srp, found.set_size) == (pytest.approx(1.0), pytest.approx(1.0))
    assert segment_cache_hit_rate(always, 8, 1.0) == pytest.approx(39 / 40)


def test_tokens_that_take_turns_need_a_larger_set() -> None:
    turns = routing_of([[0, 1], [2, 3]] * 32)
    found = segment_routing(turns, 8)
    assert found.srp == pytest.approx(2 / 3)  # all four experts foretold, half of that chosen
    assert found.set_size == pytest.approx(2.0)
    assert segment_cache_hit_rate(turns, 8, 1.0) == 0.0
    assert segment_cache_hit_rate(turns, 8, 2.0) == pytest.approx(62 / 64)


def test_random_routing_is_less_consistent_than_routing_in_runs() -> None:
    rng = np.random.default_rng(0)
    random = np.argsort(rng.random((200, 3, 16)), axis=-1)[..., :2].astype(np.int32)
    runs = np.repeat(random[:20], 10, axis=0)
    assert segment_routing(random, 16).srp < segment_routing(runs, 16).srp
    rates = [segment_cache_hit_rate(random, 16, rho) for rho in (1.0, 2.0, 4.0, 8.0)]
    assert rates == sorted(rates)
    assert segment_cache_hit_rate(runs, 16, 1.0) > rates[0]


def test_a_text_shorter_than_a_segment_is_refused() -> None:
    with pytest.raises(UsageError, match="15 tokens are less than one segment"):
        segment_routing(routing_of([[0]] * 15), 4)


# ---------------------------------------------------------------- prospects


def test_prospects_follow_the_replay_and_the_limit() -> None:
    rng = np.random.default_rng(1)
    routing = np.argsort(rng.random((60, 2, 16)), axis=-1)[..., :2].astype(np.int32)
    speed = MeasuredSpeed(2e-3, 1e-3, 1e9)
    found = prospects(routing, 16, 1 << 20, speed)
    assert found[0].cycles >= 1.0
    assert [prospect.hit_rate for prospect in found] == sorted(prospect.hit_rate for prospect in found)
    assert all(prospect.hit_rate <= prospect.best_hit_rate + 0.02 for prospect in found)
    assert all(prospect.tokens_per_second < in_memory_tps(speed) for prospect in found)
    quarter = next(prospect for prospect in found if prospect.share == 0.25)
    assert quarter.hit_rate == replay(trace_of(routing, 16), 8, "lfru").hit_rate
    assert usable_from(found, 0.0) == found[0]
    assert usable_from(found, 1e9) is None
    faster = prospects(routing, 16, 1 << 20, MeasuredSpeed(2e-3, 1e-3, 1e10))
    assert faster[0].tokens_per_second > found[0].tokens_per_second


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With a tokenizer that knows a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<unk>": 0} | {f"w{number}": number for number in range(1, 50)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    model = TinyModel(layers=2, experts=8, format="int8")
    path = tmp_path_factory.mktemp("doctor") / "bundle"
    return build_tiny_bundle(path, model, tokenizer.to_str().encode())


def test_the_command_reports(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{1 + number * 7 % 49}" for number in range(80)))
    flags = ["--text", str(text), "--threads", "1"]
    assert main(["doctor", "experts", str(bundle.path), *flags, "--json", "--at-least", "0.001"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["layers"], report["experts"], report["top_k"], report["tokens"]) == (2, 8, 2, 80)
    assert 0 < report["srp"] <= 1
    assert report["flash"]["bytes_per_second"] > 0
    for guesses in (report["named_by_next_gate"], report["named_by_affinity"]):
        assert len(guesses) == 1  # of the second layer
        assert all(2 / 8 < share <= 1 for share in guesses)  # better than chance
    assert report["usable_from_bytes"] == report["caches"][0]["cache_bytes"]
    assert main(["doctor", "experts", str(bundle.path), *flags, "--at-least", "1e9"]) == 1
    printed = capsys.readouterr()
    assert "SRP(16)" in printed.out
    assert "guessed a layer ahead" in printed.out
    assert "not usable here" in printed.out
    assert main(["doctor", "experts", str(bundle.path), *flags, "--at-least", "0.001"]) == 0
    assert "edge-runtime agent --expert-cache 1MiB" in capsys.readouterr().out


@pytest.mark.parametrize(("format", "bits"), [("nested4", [2, 4]), ("nested8", [2, 4, 8])])
def test_the_command_names_planes(
    tmp_path: Path, bundle: Bundle, capsys: Capture, format: str, bits: list[int]
) -> None:
    model = TinyModel(layers=1, experts=4, format=format)
    nested = build_tiny_bundle(tmp_path / "nested", model, bundle.tokenizer_json())
    text = tmp_path / "text"
    text.write_text("w1 w2 w3 w4 " * 10)
    flags = ["--text", str(text), "--threads", "1", "--at-least", "0.001"]
    assert main(["doctor", "experts", str(nested.path), *flags, "--json"]) == 0
    tensor = next(tensor for tensor in nested.manifest.tensors.values() if tensor.is_experts)
    report = json.loads(capsys.readouterr().out)
    assert (report["plane_bytes"], report["plane_bits"]) == (list(tensor.plane_bytes), bits)
    assert list(report["early_quality"]) == [str(each) for each in bits[:-1]]
    assert main(["doctor", "experts", str(nested.path), *flags]) == 0
    printed = capsys.readouterr().out
    sizes = [r"2 bits \(\S+ \S+\)", r"2 bits \(\S+ \S+\)", r"4 bits \(\S+ \S+\)"][: len(bits)]
    assert re.search(f"planes of {' . '.join(sizes)}\n", printed)
    for each in bits[:-1]:
        assert (
            f"usable from {each} bits on with edge-runtime agent --expert-start-bits {each}; nobody"
            in printed
        )
    assert main(["doctor", "experts", str(bundle.path), *flags]) == 0
    assert "experts have one plane" in capsys.readouterr().out


def test_loads_that_the_command_counts_decide_where_experts_are(
    bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    text, loads, devices = (tmp_path / name for name in ("text", "loads.json", "devices.toml"))
    text.write_text(" ".join(f"w{1 + number * 7 % 49}" for number in range(80)))
    flags = ["--text", str(text), "--threads", "1", "--at-least", "0.001", "--loads", str(loads)]
    assert main(["doctor", "experts", str(bundle.path), *flags]) == 0
    assert "edge-runtime coordinator --expert-loads" in capsys.readouterr().err
    uses = json.loads(loads.read_text())["uses"]
    assert [sum(layer) for layer in uses] == [160, 160]
    total = sum(entry.size_bytes for entry in bundle.manifest.slices.values())
    room = f'memory = "{total // 2}"\nweight_bandwidth = "6GB/s"\n'
    devices.write_text(
        "".join(f'[[device]]\nname = "{name}"\n{room}rtt = "1ms"\nbandwidth = "1GB/s"\n' for name in "abc")
    )
    plan = ["plan", str(bundle.path), "--devices", str(devices), "--split", "experts", "--kv-tokens", "32"]
    shares = []
    for more in ([], ["--expert-loads", str(loads)]):
        assert main([*plan, *more, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["holders"]
        shares.append(int(re.search(r"; (\d+)% of their uses", told["reasons"][0])[1]))
    assert shares[1] > shares[0]


def test_the_command_refuses(bundle: Bundle, tmp_path: Path, capsys: Capture) -> None:
    dense = build_tiny_bundle(tmp_path / "dense", TinyModel(layers=1))
    assert main(["doctor", "experts", str(bundle.path), "--text", str(tmp_path / "none")]) == 2
    assert "can't be read" in capsys.readouterr().err
    assert main(["doctor", "experts", str(bundle.path), "--memory", "1KiB"]) == 30
    assert "of experts that one token" in capsys.readouterr().err
    assert main(["doctor", "experts", str(dense.path)]) == 10
    assert "has no experts" in capsys.readouterr().err
