"""The name of a device's arithmetic: two stages of the same class compute the same bits.

Knows: what decides bits (executor, instruction set, formats, kernels). Does not know: whether rows are in fact
invariant; `probe.py` measures that.
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import edge_kernels

from edge_runtime.engine.base import DEFAULT_FORMATS, StageFormats

# Features by which the executor's kernels choose their paths; two processors with the same ones take the same paths.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "fphp", "sve", "sve2", "sme"),
)
_EARLY = "/experts:early"


def onnx_class(onnxruntime_version: str, weights: str, formats: StageFormats = DEFAULT_FORMATS) -> str:
    """`onnx-version/machine+features/isa of our kernels/w:weights/kv:fp32/wire:fp32/k:kernel version`."""
    processor = "+".join((platform.machine().lower(), *processor_features()))
    return _class(f"onnx-{onnxruntime_version}", processor, edge_kernels.isa(), weights, formats)


def native_class(weights: str, formats: StageFormats = DEFAULT_FORMATS) -> str:
    """`native/any/any/w:weights/…/k:kernel version`: our kernels compute the same bits on every processor."""
    return _class("native", "any", "any", weights, formats)


def _class(executor: str, processor: str, isa: str, weights: str, formats: StageFormats) -> str:
    kernels = f"k:{version('edge-runtime')}"  # they ship with the package
    parts = (executor, processor, isa, f"w:{weights}", f"kv:{formats.kv}", f"wire:{formats.wire}", kernels)
    return "/".join(parts).replace(" ", "")


def plain_class(numeric_class: str) -> str:
    """The class with fp32 for links, keys and values, and whole experts: rows are invariant in both or in neither."""
    return re.sub(r"/(kv|wire):[^/]*", r"/\1:fp32", numeric_class).removesuffix(_EARLY)


def early_class(numeric_class: str) -> str:
    """Of stages that may use experts before all of their bits are here, so that no exact stage takes over from them, or
    they from it. Two of these need not compute the same bits either: that was given up for an earlier first token."""
    return numeric_class + _EARLY


def is_early_class(numeric_class: str) -> bool:
    return numeric_class.endswith(_EARLY)


def processor_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of the list this processor has; empty where the system does not say."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return ()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    found = set(line.group(1).split()) if line else set()
    return tuple(feature for feature in _FEATURES if feature in found)
