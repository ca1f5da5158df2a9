"""How a prompt is cut: read as soon as can be predicted, within what others can be asked to wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.costs import (
    MAX_CHUNK_BYTES,
    MAX_CHUNK_SECONDS,
    MAX_CHUNK_TOKENS,
    MIN_CHUNK_TOKENS,
    Costs,
    Placement,
)
from coordinator.planning.model import COORDINATOR, DeviceProfile, Link, ModelProfile
from edge_runtime.core import LayerRange

MIB = 1 << 20
LAYERS = 16


def costs(*speeds: tuple[float, float], rtt: float = 0.5e-3, row_invariant: bool = True) -> Costs:
    """Devices by (seconds of a row alone, of a row of a chunk), both through all layers."""
    devices = tuple(
        DeviceProfile(f"d{i}", f"d{i}", 1000 * MIB, one / LAYERS, row / LAYERS, 0.0, "class", row_invariant)
        for i, (one, row) in enumerate(speeds)
    )
    links = {(each.device_id, COORDINATOR): Link(rtt, 500e6) for each in devices}
    model = ModelProfile((10 * MIB,) * LAYERS, 4 * MIB, MIB, True, 8192, 1024, 0)
    return Costs(devices, links, model)


def placements(count: int) -> list[Placement]:
    per = LAYERS // count
    last = LAYERS - 1
    return [
        Placement(i, LayerRange(i * per, last if i == count - 1 else (i + 1) * per - 1)) for i in range(count)
    ]


def chunk(of: Costs) -> int:
    return of.chunk_tokens(placements(len(of.devices)))


def test_one_device_reads_its_weights_as_seldom_as_others_can_wait() -> None:
    assert chunk(costs((80e-3, 25e-3))) == 32  # a second is over soon
    assert chunk(costs((43e-3, 9e-3))) == 64
    assert chunk(costs((0.5e-3, 0.1e-3))) == MAX_CHUNK_TOKENS


def test_several_devices_get_smaller_chunks_so_that_all_are_busy() -> None:
    slow, fast = (80e-3, 25e-3), (2e-3, 0.5e-3)
    assert chunk(costs(slow, slow)) == 32
    assert chunk(costs(fast, fast)) < chunk(costs(fast))


def test_a_class_whose_rows_depend_on_each_other_keeps_one_grid() -> None:
    assert chunk(costs((0.5e-3, 0.1e-3), row_invariant=False)) == MIN_CHUNK_TOKENS


speeds = st.tuples(st.floats(1e-4, 0.5), st.floats(0.05, 1.0)).map(lambda pair: (pair[0], pair[0] * pair[1]))


@given(st.lists(speeds, min_size=1, max_size=4), st.floats(0.0, 0.1))
def test_no_other_chunk_is_predicted_to_be_faster(devices: list[tuple[float, float]], rtt: float) -> None:
    planned = costs(*devices, rtt=rtt)
    stages = placements(len(devices))
    chosen = planned.chunk_tokens(stages)
    assert chosen in (32, 64, 128, 256, 512)
    assert len(stages) == 1 or chosen * planned.model.hidden_bytes_per_row <= MAX_CHUNK_BYTES
    longest = max(planned._chunk_seconds(stage, chosen) for stage in stages)
    assert chosen == MIN_CHUNK_TOKENS or longest <= MAX_CHUNK_SECONDS
    rates = {
        size: planned.prefill_tokens_per_second(stages, size)
        for size in (32, 64, 128, 256, 512)
        if size <= chosen
    }
    assert rates[chosen] == max(rates.values())
