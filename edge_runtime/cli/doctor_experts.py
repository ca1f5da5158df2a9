"""`edge-runtime doctor experts BUNDLE`: could this machine use a model with most of its experts on flash?

Runs a text through the model once, times one token and the flash, and says what caches of several sizes would give.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli import machine
from edge_runtime.cli.output import note, paint, result, result_json
from edge_runtime.cli.progress import Progress, format_amount
from edge_runtime.errors import BundleError, UsageError

if TYPE_CHECKING:
    from edge_runtime.bundle import Bundle
    from edge_runtime.experts.admission import Prospect
    from edge_runtime.experts.examination import Examined
    from edge_runtime.experts.flash_store import ExpertLayer

DEFAULT_TOKENS = 512
RHOS = (1.0, 2.0, 3.0)
HALF = 0.5
_FREE_MEMORY_SHARE = 0.25


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text to route (default: a page of our own)"
    )
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, metavar="N", help="of the text, at most (default: 512)"
    )
    parser.add_argument(
        "--at-least",
        type=float,
        metavar="TOKENS/S",
        help="speed at which the model counts as usable (default: half of what it does in memory)",
    )
    parser.add_argument(
        "--memory",
        type=machine.size,
        metavar="SIZE",
        help="for experts during this test (default: a quarter of what is free)",
    )
    parser.add_argument(
        "--loads", type=Path, metavar="FILE", help="write how often each expert was used, for --split experts"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: one per core)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(arguments: Namespace) -> int:
    from edge_runtime.bundle import Bundle
    from edge_runtime.experts.admission import in_memory_tps, prospects, usable_from

    bundle = Bundle.open(arguments.path)
    _check_has_experts(bundle)
    ids = _tokens(bundle, arguments.text, arguments.tokens)
    examined = _examine(bundle, ids, arguments)
    if arguments.loads is not None:
        _write_loads(arguments.loads, bundle, examined)
    layer = examined.layers[0]
    found = prospects(examined.routing, layer.experts, layer.stride_bytes, examined.speed)
    wanted_tps = arguments.at_least or HALF * in_memory_tps(examined.speed)
    usable = usable_from(found, wanted_tps)
    if arguments.json:
        result_json(_report(bundle, examined, found, usable, wanted_tps))
    else:
        _show(bundle, examined, found, usable, wanted_tps)
    return 0 if usable is not None else 1


def _write_loads(path: Path, bundle: Bundle, examined: Examined) -> None:
    from edge_runtime.experts.loads import counted, write_loads

    layers = [own.layer for own in examined.layers]
    counts = [own.experts for own in examined.layers]
    loads = counted(str(bundle.digest), examined.routing, layers, counts, bundle.manifest.num_layers)
    try:
        write_loads(path, loads)
    except OSError as problem:
        raise UsageError(f"{path} can't be written: {problem}") from None
    note(f"how often each expert was used: {path}, for edge-runtime coordinator --expert-loads")


def _check_has_experts(bundle: Bundle) -> None:
    from edge_runtime.experts.flash_store import expert_bytes

    manifest = bundle.manifest
    if manifest.model.kind != "generator" or not expert_bytes(manifest, 0, manifest.num_layers - 1):
        raise BundleError(
            f"{manifest.model.name} has no experts", hint="this is about mixture-of-experts models"
        )


def _tokens(bundle: Bundle, text: Path | None, limit: int) -> list[int]:
    from tokenizers import Tokenizer

    try:
        words = (
            files("edge_runtime.experts").joinpath("routing_text.txt").read_text(encoding="utf-8")
            if text is None
            else text.read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{text} can't be read: {problem}") from None
    ids = list(Tokenizer.from_str(bundle.tokenizer_json().decode()).encode(words).ids)
    return ids[: max(1, min(limit, bundle.manifest.model.max_context_tokens))]


def _examine(bundle: Bundle, ids: list[int], arguments: Namespace) -> Examined:
    from edge_runtime.experts.examination import examine
    from edge_runtime.experts.flash_store import expert_bytes, token_cycle_bytes

    last = bundle.manifest.num_layers - 1
    total_bytes = expert_bytes(bundle.manifest, 0, last)
    least_bytes = token_cycle_bytes(bundle.manifest, 0, last)
    free_bytes = machine.share_of_free_memory(_FREE_MEMORY_SHARE)
    cache_bytes = arguments.memory or min(total_bytes, max(2 * least_bytes, free_bytes))
    threads = arguments.threads or machine.cores()
    with Progress("routing the text", total=len(ids), unit="tokens") as bar:
        try:
            return examine(bundle, ids, threads=threads, cache_bytes=cache_bytes, advance=bar.advance)
        except OSError as problem:
            raise BundleError(f"experts can't be read from flash: {problem}") from None


def _report(
    bundle: Bundle, examined: Examined, found: list[Prospect], usable: Prospect | None, wanted_tps: float
) -> dict[str, object]:
    from edge_runtime.experts.admission import in_memory_tps
    from edge_runtime.experts.consistency import SEGMENT_TOKENS, segment_cache_hit_rate, segment_routing
    from edge_runtime.experts.start_bits import early_quality

    layer = examined.layers[0]
    routing = segment_routing(examined.routing, layer.experts)
    return {
        "model": bundle.manifest.model.name,
        "layers": len(examined.layers),
        "experts": layer.experts,
        "top_k": layer.top_k,
        "expert_bytes": layer.stride_bytes,
        "plane_bytes": list(layer.plane_bytes),
        "plane_bits": list(layer.plane_bits),
        "early_quality": {
            str(bits): early_quality(bundle.manifest.quality, bits) for bits in layer.plane_bits[:-1]
        },
        "total_expert_bytes": sum(own.total_bytes for own in examined.layers),
        "token_bytes": sum(own.token_bytes for own in examined.layers),
        "tokens": len(examined.routing),
        "segment_tokens": SEGMENT_TOKENS,
        "srp": routing.srp,
        "srp_set_size": routing.set_size,
        "sch": {f"{rho:g}": segment_cache_hit_rate(examined.routing, layer.experts, rho) for rho in RHOS},
        "named_by_next_gate": list(examined.named.by_gate),
        "named_by_affinity": list(examined.named.by_affinity),
        "flash": asdict(examined.flash),
        "speed": asdict(examined.speed),
        "in_memory_tokens_per_second": in_memory_tps(examined.speed),
        "wanted_tokens_per_second": wanted_tps,
        "caches": [asdict(prospect) for prospect in found],
        "usable_from_bytes": None if usable is None else usable.cache_bytes,
    }


def _show(
    bundle: Bundle, examined: Examined, found: list[Prospect], usable: Prospect | None, wanted_tps: float
) -> None:
    facts = _report(bundle, examined, found, usable, wanted_tps)
    layer, speed, flash = examined.layers[0], examined.speed, examined.flash
    total = format_amount(sum(own.total_bytes for own in examined.layers), "B")
    token = format_amount(sum(own.token_bytes for own in examined.layers), "B")
    result(
        f"{facts['model']}: {facts['layers']} layers of {layer.experts} experts, {layer.top_k} used; "
        f"{format_amount(layer.stride_bytes, 'B')} each, {total} in all, {token} a token"
    )
    for line in _planes(layer, _dict(facts["early_quality"])):
        result(line)
    sch = ", ".join(f"{rate:.0%} with {rho} x top_k" for rho, rate in _dict(facts["sch"]).items())
    result(
        f"routing of {facts['tokens']} tokens: SRP({facts['segment_tokens']}) {facts['srp']:.0%} with "
        f"{facts['srp_set_size']:.1f} x top_k experts, SCH({facts['segment_tokens']}) {sch}"
    )
    if examined.named.by_gate:
        result(
            f"guessed a layer ahead, top_k: its gate names {_spread(examined.named.by_gate)} of a layer's experts, "
            f"counts of what follows what {_spread(examined.named.by_affinity)}"
        )
    how = "past the page cache" if flash.direct else "through the page cache"
    result(
        f"flash here: {flash.bytes_per_second / 1e9:.2f} GB/s, {flash.lanes} reads at a time, {how}; computing: "
        f"{speed.dense_seconds * 1e3:.2f} ms + {speed.experts_seconds * 1e3:.2f} ms of experts a token"
    )
    result("per layer at least: dense + max(hits, missed bytes / flash) + the last miss; with that:")
    result(f"{'cache':>12}  {'share':>6}  {'tokens held':>11}  {'hits':>6}  {'best':>6}  {'tokens/s':>9}")
    for prospect in found:
        line = (
            f"{format_amount(prospect.cache_bytes, 'B'):>12}  {prospect.share:6.0%}  {prospect.cycles:11.1f}  "
            f"{prospect.hit_rate:6.1%}  {prospect.best_hit_rate:6.1%}  {prospect.tokens_per_second:9.1f}"
        )
        result(paint(line, "green", sys.stdout) if prospect == usable else line)
    if usable is None:
        result(f"not usable here: nothing gives {wanted_tps:.1f} tokens/s")
    else:
        result(
            f"usable here ({wanted_tps:.1f} tokens/s) from a cache of {format_amount(usable.cache_bytes, 'B')} on: "
            f"edge-runtime agent --expert-cache {-(-usable.cache_bytes >> 20)}MiB"
        )
    note("one short text flatters caches above half of the experts; long mixed use hits 10 to 30 points less")


def _planes(layer: ExpertLayer, quality: Mapping[str, object]) -> list[str]:
    if layer.planes == 1:
        return [
            "experts have one plane: they are used when all of their bits are here (edge-runtime export --weights "
            "nested4 writes two, nested8 three)"
        ]
    before = (0, *layer.plane_bits)
    planes = " + ".join(
        f"{bits - less} bits ({format_amount(size, 'B')})"
        for bits, less, size in zip(layer.plane_bits, before, layer.plane_bytes, strict=False)
    )
    return [f"experts have planes of {planes}"] + [
        f"usable from {bits} bits on with edge-runtime agent --expert-start-bits {bits}; {said}"
        for bits, said in quality.items()
    ]


def _spread(shares: Sequence[float]) -> str:
    return f"{sum(shares) / len(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def _dict(value: object) -> dict[str, float]:
    assert isinstance(value, dict)
    return value
