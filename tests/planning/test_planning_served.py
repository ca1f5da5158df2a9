"""What devices took for a row puts their profiles right, and with them what is planned and said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import events as ev
from coordinator.cluster_status import plan_statuses
from coordinator.planning import place
from coordinator.planning.costs import Costs
from coordinator.planning.model import DeviceProfile, ModelProfile, Split
from coordinator.planning.served import MOST, Served, corrected, predicted_tokens_per_second
from coordinator.state import ClusterState
from edge_runtime.core import LayerRange
from tests.support.cluster_states import after, beat, measured, plan, ready, serving

MIB = 1 << 20
MODEL = ModelProfile((10 * MIB,) * 6, 4 * MIB, MIB, True, 4096, 1024, 0)
BUSY = DeviceProfile("id-busy", "busy", 1000 * MIB, 2e-3, 5e-4, 1e-3, "class")


@given(factor=st.floats(1 / MOST, MOST), first=st.integers(0, 5), count=st.integers(1, 6))
def test_a_corrected_profile_predicts_what_was_served(factor: float, first: int, count: int) -> None:
    layers = LayerRange(first, min(5, first + count - 1))
    row_seconds = factor * Costs([BUSY], {}, MODEL).compute_seconds(0, layers)
    found = corrected(BUSY, Served(layers, row_seconds), MODEL)
    assert Costs([found], {}, MODEL).compute_seconds(0, layers) == pytest.approx(row_seconds)
    assert found.layer_prefill_row_seconds == BUSY.layer_prefill_row_seconds


def test_a_correction_has_limits_and_nothing_served_corrects_nothing() -> None:
    whole = LayerRange(0, 5)
    assert corrected(BUSY, Served(whole, 100.0), MODEL).layer_decode_seconds == MOST * 2e-3
    assert corrected(BUSY, Served(whole, 1e-9), MODEL).layer_decode_seconds == 2e-3 / MOST
    assert corrected(BUSY, None, MODEL) == BUSY
    assert corrected(BUSY, Served(LayerRange(0, 6), 1.0), MODEL) == BUSY  # of another model


def test_a_device_that_was_measured_while_it_was_busy_is_chosen_once_its_rows_were_fast() -> None:
    other = replace(BUSY, device_id="id-other", name="other", layer_decode_seconds=1.5e-3)
    assert place([BUSY, other], {}, MODEL, Split("auto")).stages[0].name == "other"
    served = Served(LayerRange(0, 2), 3e-3)
    found = place([corrected(BUSY, served, MODEL), other], {}, MODEL, Split("auto"))
    assert found.stages[0].name == "busy"


def test_a_prediction_takes_served_stages_as_they_were_and_others_as_planned() -> None:
    planned = plan("a", "b")
    stages = [replace(stage, compute_seconds=0.02, hop_seconds=0.005) for stage in planned.stages]
    planned = replace(planned, stages=tuple(stages), predicted_tokens_per_second=20.0)
    assert predicted_tokens_per_second(planned, {}, 1) == pytest.approx(1 / 0.05)
    served = {"a": Served(LayerRange(0, 0), 0.03)}
    assert predicted_tokens_per_second(planned, served, 1) == pytest.approx(1 / 0.06)
    elsewhere = {"a": Served(LayerRange(0, 1), 0.03)}
    assert predicted_tokens_per_second(planned, elsewhere, 1) == pytest.approx(1 / 0.05)


def test_rows_that_came_round_say_what_a_token_takes_with_all_hops_under_that_lease_alone() -> None:
    planned = plan("a", "b")
    stages = [replace(stage, compute_seconds=0.02, hop_seconds=0.005) for stage in planned.stages]
    planned = replace(planned, stages=tuple(stages))
    served = {"a": Served(LayerRange(0, 0), 0.02, 0.08, 1), "b": Served(LayerRange(1, 1), 0.02, 0.5, 1)}
    assert predicted_tokens_per_second(planned, served, 1) == pytest.approx(1 / 0.08)
    assert predicted_tokens_per_second(planned, served, 2) == pytest.approx(1 / 0.05)  # other hops, then


def predictions(state: ClusterState) -> list[float]:
    return [each.predicted_tokens_per_second for each in plan_statuses(state, Split(), lambda _: 0.0)]


def test_heartbeats_of_a_ready_pipeline_say_how_long_rows_take() -> None:
    state = after(beat("a", 0.01), beat("b", 0.03), state=serving("a", "b"))
    assert state.devices["a"].served == Served(LayerRange(0, 0), 0.01, lease=1)
    assert state.devices["b"].served == Served(LayerRange(1, 1), 0.03, lease=1)
    assert predictions(state) == [pytest.approx(25.0)]
    idle = after(beat("a", 0.0), state=state)
    assert idle.devices["a"].served == Served(LayerRange(0, 0), 0.01, lease=1)


def test_a_heartbeat_before_the_new_stage_is_ready_is_of_the_old_one() -> None:
    loading = after(*measured("c"), state=serving("a"))
    loading = after(ev.PlanInstalled(2, plan("c"), 0.0), ev.LoadSent(2, 0.0), beat("c", 0.5), state=loading)
    assert loading.devices["c"].served is None
    assert after(ready("c", 2), beat("c", 0.5), state=loading).devices["c"].served is not None
