"""Agents that a coordinator refuses, or that refuse a coordinator, over real links."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edge_runtime.agent.daemon import Agent
from edge_runtime.bundle import Bundle
from edge_runtime.errors import ConfigError, TrustError, VersionError
from edge_runtime.protocol.messages import Refused
from tests.support.agents import cluster_of, make_config
from tests.support.mini_coordinator import MiniCoordinator


async def refused(bundle: Bundle, directory: Path, answer: Refused) -> None:
    async with MiniCoordinator(bundle).running() as coordinator:
        coordinator.refuse = lambda hello: answer
        await Agent(make_config(directory, "phone", coordinator.join_link())).run()


async def test_another_version_ends_the_agent(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await refused(bundle, tmp_path, Refused("protocol_version", "you are old", "update"))
    assert caught.group_contains(VersionError, match="you are old")


async def test_a_revoked_device_ends(bundle: Bundle, tmp_path: Path) -> None:
    async with MiniCoordinator(bundle).running() as coordinator:
        agent = Agent(make_config(tmp_path, "phone", coordinator.join_link()))
        task = asyncio.ensure_future(agent.run())
        await coordinator.wait_for("phone")
        (key,) = coordinator.keys.values()
        coordinator.admission.revoke(key)
        async with asyncio.timeout(20):
            with pytest.raises(TrustError, match="does not admit"):
                await task


async def test_a_used_token_is_refused_with_a_reason(bundle: Bundle, tmp_path: Path) -> None:
    async with MiniCoordinator(bundle).running() as coordinator:
        link = coordinator.join_link()
        coordinator.invitations.clear()
        with pytest.raises(TrustError, match="not known"):
            await Agent(make_config(tmp_path, "phone", link)).run()


async def test_an_agent_without_a_pairing_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not paired") as caught:
        await Agent(make_config(tmp_path, "phone", "")).run()
    assert "--join" in caught.value.hint


async def test_a_paired_device_does_not_move_to_another_coordinator(bundle: Bundle, tmp_path: Path) -> None:
    async with cluster_of(bundle, tmp_path) as cluster:
        await cluster.start("phone")
    async with MiniCoordinator(bundle).running() as other:
        with pytest.raises(TrustError, match="another coordinator"):
            await Agent(make_config(tmp_path, "phone", other.join_link())).run()
