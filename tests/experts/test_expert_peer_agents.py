"""Real agents that share the experts of a model over real links, against a scripted coordinator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_runtime.agent import expert_links
from edge_runtime.agent.status import Holding, Serving
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.hashing import digest_hex
from edge_runtime.core import SamplingParams
from edge_runtime.experts.flash_store import expert_layers
from edge_runtime.protocol.messages import SessionFailed, StageFailed, Tokens
from tests.support.agents import cluster_of, one_device_loop
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

LAYERS, EXPERTS = 3, 16
PROMPT = [5, 17, 42, 99, 3, 7, 150, 11, 60]
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=7)
HALVES = [[e % 2 for e in range(EXPERTS)]] * LAYERS
THIRDS = [[(e + layer) % 3 for e in range(EXPERTS)] for layer in range(LAYERS)]
NAMES = ["phone", "laptop", "box"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = TinyModel(layers=LAYERS, experts=EXPERTS, format="int8")
    return build_tiny_bundle(tmp_path_factory.mktemp("peers") / "bundle", model)


@pytest.mark.parametrize("places", [HALVES, THIRDS], ids=["two devices", "three devices"])
async def test_the_ids_are_those_of_one_device_and_each_holds_its_share(
    bundle: Bundle, tmp_path: Path, places: list[list[int]]
) -> None:
    names = NAMES[: 1 + max(map(max, places))]
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start(*names)
        lease = await coordinator.load_shared(names, places)
        ready = {name: await coordinator.links[name].ready(lease) for name in names}
        asked = {
            await coordinator.open(["phone"], lease, PROMPT, 30, sampling=s): s for s in (GREEDY, SAMPLED)
        }
        found = await coordinator.tokens("phone", *asked)
        for session, sampling in asked.items():
            wanted = one_device_loop(bundle, PROMPT, 30, sampling)
            assert [token.id for token in found[session]] == wanted
        assert isinstance(cluster.statuses["phone"][-1], Serving)
        stride_bytes = expert_layers(bundle, bundle.manifest.layers)[0].stride_bytes
        for number, name in enumerate(names[1:], 1):
            holding = cluster.statuses[name][-1]
            held = sum(of.count(number) for of in places)
            assert isinstance(holding, Holding)
            assert holding.held_bytes == ready[name].weight_bytes == held * stride_bytes
            assert "of experts of" in str(holding)
        all_bytes = bundle.manifest.stage_weight_bytes(0, LAYERS - 1)
        own = sum(of.count(0) for of in places)
        assert ready["phone"].weight_bytes == all_bytes - (LAYERS * EXPERTS - own) * stride_bytes


async def test_nobody_fetches_what_others_hold(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        await cluster.start("phone", "laptop")
        for _ in range(2):  # the second time from flash
            lease = await cluster.coordinator.load_shared(["phone", "laptop"], HALVES)
            for name in ("phone", "laptop"):
                await cluster.coordinator.links[name].ready(lease)
        for number, name in enumerate(("phone", "laptop")):
            for layer in expert_layers(bundle, bundle.manifest.layers):
                digest = digest_hex(bundle.manifest.slices[layer.slice].digest)
                slices = tmp_path / name / "slices"
                assert not (slices / digest).exists()
                some = (slices / f"{digest}.some").read_bytes()
                for expert in range(layer.experts):
                    piece = some[layer.offset(expert) : layer.offset(expert) + layer.stride_bytes]
                    assert any(piece) == (expert % 2 == number)


async def test_a_peer_that_dies_breaks_the_session_and_the_next_plan_goes_on(
    bundle: Bundle, tmp_path: Path
) -> None:
    wanted = one_device_loop(bundle, PROMPT, 200, GREEDY)
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone", "laptop")
        lease = await coordinator.load_shared(["phone", "laptop"], HALVES)
        for name in ("phone", "laptop"):
            await coordinator.links[name].ready(lease)
        session = await coordinator.open(["phone"], lease, PROMPT, 200)
        first = await coordinator.links["phone"].expect_tokens(session, 3)
        await cluster.stop("laptop")
        ids = [token.id for token in first]
        while True:
            message, _ = await coordinator.links["phone"].expect(Tokens, SessionFailed)
            if isinstance(message, SessionFailed):
                break
            assert isinstance(message, Tokens)
            ids += [token.id for token in message.tokens]
            assert not message.tokens[-1].finish, "it ended before the peer was gone"
        assert (message.session, message.code) == (session, "transport")
        assert "the experts that device" in message.reason
        assert ids == wanted[: len(ids)]
        alone = await coordinator.load(["phone"], [])
        await coordinator.links["phone"].ready(alone)
        again = await coordinator.open(["phone"], alone, [*PROMPT, *ids], 200, prompt_rows=len(PROMPT))
        rest = (await coordinator.tokens("phone", again))[again]
        assert ids + [token.id for token in rest] == wanted


async def test_what_does_not_fit_or_match_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone", "laptop")
        await coordinator.load_shared(["phone", "laptop"], HALVES, tamper=b"\xff\xff\xff")
        for name in ("phone", "laptop"):
            failed, _ = await coordinator.links[name].expect(StageFailed)
            assert "does not fit a layer of 16 experts" in failed.reason
        coordinator.tamper = lambda name, data: bytes(len(data)) if "experts" in name else data
        await coordinator.load_shared(["phone", "laptop"], HALVES)
        failed, _ = await coordinator.links["laptop"].expect(StageFailed)
        assert failed.code == "tampered"
        assert re.search(r"expert (1|3|5|7) of layer 0", failed.reason)


async def test_a_silent_peer_is_given_up(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_links, "ANSWER_SECONDS", 0.3)
    async with cluster_of(bundle, tmp_path) as cluster:
        coordinator = cluster.coordinator
        await cluster.start("phone", "laptop")
        lease = await coordinator.load_shared(["phone", "laptop"], HALVES)
        for name in ("phone", "laptop"):
            await coordinator.links[name].ready(lease)
        with monkeypatch.context() as patch:
            patch.setattr(expert_links.ExpertLinks, "_answer", lambda *_: None)
            session = await coordinator.open(["phone"], lease, PROMPT, 40)
            failed, _ = await coordinator.links["phone"].expect(SessionFailed)
            assert (failed.session, failed.code) == (session, "transport")
            assert "it did not answer for 0.3 s" in failed.reason
        wanted = one_device_loop(bundle, PROMPT, 40, GREEDY)
        while True:  # the link is dialled anew beside the steps
            session = await coordinator.open(["phone"], lease, PROMPT, 40)
            message, _ = await coordinator.links["phone"].expect(SessionFailed, Tokens)
            if isinstance(message, Tokens):
                break
        ids = [token.id for token in message.tokens]
        while len(ids) < len(wanted):
            message, _ = await coordinator.links["phone"].expect(Tokens)
            ids += [token.id for token in message.tokens]
        assert ids == wanted
