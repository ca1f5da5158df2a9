"""Devices and links written down by hand, for planning without the devices.

    [defaults]                      # of every device that does not say otherwise
    rtt = "5ms"                     # between the device and the coordinator
    bandwidth = "100Mbit/s"

    [[device]]
    name = "phone"
    memory = "512MiB"               # room for weights and KV
    weight_bandwidth = "6GB/s"      # an estimate; or, measured:
    # layer_decode = "1.2ms"        #   one row through one layer of average weight
    # layer_prefill_row = "0.3ms"   #   per row of a full chunk
    # head = "0.8ms"                #   one row through final norm, head and sampler
    # flash = "1.2GB/s"             # what it gives of experts that stay there; without it all must be in memory
    # expert_cache = "64MiB"        # memory for those, or for experts of others; without it what is left
    # host = "10.0.0.7"             # its machine: devices that share one share its cores, and are no free replicas

    [[link]]                        # only where two devices reach each other faster than through the coordinator
    between = ["phone", "laptop"]
    rtt = "2ms"
    bandwidth = "40MB/s"

Knows: this file. Does not know: how to plan.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from coordinator.planning.model import COORDINATOR, DeviceProfile, Link
from edge_runtime.bundle.manifest import Block, Manifest
from edge_runtime.config import parse_duration, parse_size
from edge_runtime.errors import ConfigError

PREFILL_SPEEDUP = 4.0  # of a row in a full chunk over a row alone, where only a bandwidth is given

_DEVICE_KEYS = (
    "name",
    "memory",
    "weight_bandwidth",
    "layer_decode",
    "layer_prefill_row",
    "head",
    "rtt",
    "bandwidth",
    "numeric_class",
    "row_invariant",
    "host",
    "flash",
    "expert_cache",
)
_LINK_KEYS = ("between", "rtt", "bandwidth")
_DEFAULT_KEYS = tuple(key for key in _DEVICE_KEYS if key != "name")

Value = TypeVar("Value")
Table = Mapping[str, object]


def load_devices(path: Path, manifest: Manifest) -> tuple[list[DeviceProfile], dict[tuple[str, str], Link]]:
    """Profiles in the file's order, and links. Raises ConfigError that names the place."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"{path}: {problem}", hint="`edge-runtime plan --help` shows an example") from None
    _check_keys(document, ("defaults", "device", "link"), f"{path}")
    defaults = _table(document.get("defaults", {}), f"{path}: [defaults]")
    _check_keys(defaults, _DEFAULT_KEYS, f"{path}: [defaults]")
    devices: list[DeviceProfile] = []
    links: dict[tuple[str, str], Link] = {}
    for table in _tables(document, "device", path):
        where = f"{path}: device {table.get('name', len(devices) + 1)}"
        _check_keys(table, _DEVICE_KEYS, where)
        profile = _device({**defaults, **table}, manifest, where)
        if any(profile.name == other.name for other in devices):
            raise ConfigError(f"{where}: the name is there twice", hint="give each device its own name")
        devices.append(profile)
        links[profile.device_id, COORDINATOR] = _link({**defaults, **table}, where)
    if not devices:
        raise ConfigError(
            f"{path}: there is no [[device]]", hint="`edge-runtime plan --help` shows an example"
        )
    names = {device.name for device in devices}
    for table in _tables(document, "link", path):
        where = f"{path}: link {table.get('between', '')}"
        _check_keys(table, _LINK_KEYS, where)
        ends = table.get("between")
        if not (isinstance(ends, list) and len(ends) == 2 and set(ends) <= names and ends[0] != ends[1]):
            raise ConfigError(f"{where}: between needs the names of two devices of this file")
        links[str(ends[0]), str(ends[1])] = _link(table, where)
    return devices, links


def _device(table: Table, manifest: Manifest, where: str) -> DeviceProfile:
    name = _read(table, "name", _name, where)
    numeric_class, row_invariant = table.get("numeric_class", ""), table.get("row_invariant", True)
    if not isinstance(numeric_class, str) or not isinstance(row_invariant, bool):
        raise ConfigError(f"{where}: numeric_class is text and row_invariant is true or false")
    host = table.get("host", "")
    if not isinstance(host, str):
        raise ConfigError(f"{where}: host is text")
    if "weight_bandwidth" in table and "layer_decode" not in table:
        bandwidth = _read(table, "weight_bandwidth", parse_bandwidth, where)
        layers = manifest.layers
        decode = sum(bytes_read_per_token(manifest, layer) for layer in layers) / len(layers) / bandwidth
        head = bytes_read_per_token(manifest, manifest.head) / bandwidth
        prefill = decode / PREFILL_SPEEDUP
    else:
        decode = _read(table, "layer_decode", parse_duration, where)
        head = _read(table, "head", parse_duration, where)
        prefill = _read(table, "layer_prefill_row", parse_duration, where)
    return DeviceProfile(
        device_id=name,
        name=name,
        memory_free_bytes=_read(table, "memory", parse_size, where),
        layer_decode_seconds=decode,
        layer_prefill_row_seconds=prefill,
        head_seconds=head,
        numeric_class=numeric_class,
        row_invariant=row_invariant,
        host=host,
        flash_bytes_per_second=_read(table, "flash", parse_bandwidth, where) if "flash" in table else 0.0,
        expert_cache_bytes=_read(table, "expert_cache", parse_size, where) if "expert_cache" in table else 0,
    )


def bytes_read_per_token(manifest: Manifest, block: Block) -> float:
    """Of a block's weights, those one decoded row touches: of experts, the ones that are chosen."""
    total = float(sum(manifest.slices[key].size_bytes for key in block.slices))
    for operation in block.operations:
        if operation.kind == "experts":
            tensor = manifest.tensors[operation.weights["experts"]]
            skipped = 1 - int(operation.attributes["top_k"]) / int(operation.attributes["experts"])
            total -= tensor.expert_stride_bytes * tensor.shape[0] * skipped
    return max(total, 0.0)


def _link(table: Table, where: str) -> Link:
    return Link(_read(table, "rtt", parse_duration, where), _read(table, "bandwidth", parse_bandwidth, where))


def parse_bandwidth(value: object) -> float:
    """Bytes per second of "100Mbit/s", "12.5MB/s", 1000000. Raises ValueError."""
    text = str(value).strip()
    bits = re.fullmatch(r"(.*?)\s*([kKmMgGtT]?)(?:[bB]it(?:/s)?|bps)", text)
    try:
        rate = (
            parse_size(f"{bits[1]}{bits[2]}") / 8 if bits else float(parse_size(re.sub(r"/s$|ps$", "", text)))
        )
    except ValueError:
        rate = 0.0
    if rate <= 0:
        raise ValueError(f"{value!r} is not a bandwidth such as 100Mbit/s or 12.5MB/s")
    return rate


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a device needs a name")
    return value


def _read(table: Table, key: str, read: Callable[[object], Value], where: str) -> Value:
    if key not in table:
        raise ConfigError(f"{where}: {key} is missing", hint="`edge-runtime plan --help` shows an example")
    try:
        return read(table[key])
    except ValueError as problem:
        raise ConfigError(f"{where}: {key}: {problem}") from None


def _tables(document: Table, key: str, path: Path) -> list[Table]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise ConfigError(f"{path}: write [[{key}]], with two brackets, for each {key}")
    return [_table(item, f"{path}: [[{key}]]") for item in value]


def _table(value: object, where: str) -> Table:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a table")
    return value


def _check_keys(table: Table, known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{where}: {key} is not known", hint=hint)
