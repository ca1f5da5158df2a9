"""Experts on flash against experts in memory: `python -m benchmarks.flash [--json] [--rounds N] [--only A,B]`.

Two models: the demo's (trained, 6 layers of 16 experts, its own routing), and a random one with the depth and the
number of experts of Qwen3-30B-A3B (48 layers of 128, narrower: 4.5 GB at int4, made in `.bench/` once) whose routing
follows a recorded trace of that model: one prompt of 28 tokens and 128 decoded ones, not looped. Arms, with the same
kernels, bytes and threads, each in a process of its own:

- memory: all experts in memory (the ceiling)
- naive: every expert read when it is needed, one by one, past the page cache, nothing kept (the floor)
- mapped 25 %: all experts mapped, the page cache does what it can under the memory limit
- product 50 %, 25 %: the expert cache under the memory limit, `cache + dense weights + 300 MiB`, page cache counted

- `flash_nested`: experts in two planes of bits, used from the first on

The limit is a memory cgroup; where cgroups can't be written, arms under one are left out and said so. Arms take turns;
of each, the fastest round counts, since others' work on a machine only ever adds time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from benchmarks.checkpoints import CACHE
from benchmarks.flash_arm import MAPPED, MEMORY, NAIVE, PRODUCT, Notes, Order
from benchmarks.flash_beside import spread
from benchmarks.flash_halves import ROUNDS, halves
from benchmarks.flash_limit import Stretch, limit_fraction, medians, table
from benchmarks.flash_two_agents import two_agents
from benchmarks.memory_cgroup import memory_cgroup
from benchmarks.other_work import Patience
from benchmarks.page_cache import forget
from benchmarks.random_moe import LARGE, TINY, random_moe
from benchmarks.report import Report, arguments, say
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.experts.flash_probe import measure_flash
from edge_runtime.experts.flash_store import expert_bytes, expert_layers
from edge_runtime.experts.replay import BELADY, replay
from edge_runtime.experts.trace import read_trace

TRACES = Path(__file__).parent / "traces"
QWEN, GPT_OSS = TRACES / "qwen3_30b_a3b.csv.gz", TRACES / "gpt_oss_120b.csv.gz"
DEMO_CHECKPOINT = Path(__file__).parents[1] / "examples" / "models" / "moe"
OVERHEAD_BYTES = 300 << 20
ARM_SECONDS = 300.0
DEMO_TOKENS = 96

PARTS = ("kernels", "policies", "demo", "large", "two_agents", "nested")

Figures = dict[str, object]


@dataclass(frozen=True)
class Arm:
    name: str
    order: Order
    limit_bytes: int = 0  # of memory; 0: none


@dataclass
class Result:
    """Of an arm's fastest round; `digests` of all."""

    notes: Notes
    tokens_per_second: float
    digests: set[str]
    oom_kills: int = 0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--small", action="store_true", help="a model of 3 MB instead of 4.5 GB: a smoke test"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--arms",
        default="",
        help="only these of the large model, by name (product 50 %%,naive), and nothing else; memory always runs",
    )
    parser.add_argument("--only", default="", help=f"only these parts: {', '.join(PARTS)} (default: all)")
    given = parser.parse_args()
    from benchmarks.flash_nested import PAIRS, nested  # which takes its turns with arms of this module

    chosen = _names(given.arms)
    parts = _names(given.only) or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)!r}: choose of {', '.join(PARTS)}")
    rounds = given.rounds or (1 if given.small else 2)
    report = Report("experts on flash", only_json=given.json, threads=given.threads, rounds=rounds)
    figures: Figures = {}
    if chosen:
        figures["identical"] = _large(figures, report, given.threads, rounds, chosen, small=given.small)
        report.end(figures)
        return
    same: list[bool] = []
    if "kernels" in parts:
        _kernels(figures, report)
    if "policies" in parts:
        _policies(figures, report)
    if "demo" in parts:
        same.append(_demo(report, given.threads))
    if "large" in parts:
        same.append(_large(figures, report, given.threads, rounds, small=given.small))
    if "two_agents" in parts:
        two = halves(1 if given.small else ROUNDS, given.threads, Patience(given.patience), small=given.small)
        figures["two_agents_ratio"] = two["two_agents_ratio"]
        report.line(f"two agents with half of the experts each: {two}")
        remote = two_agents(_two_agents_order(given.threads, small=given.small))
        figures["remote_experts_ratio"] = remote["remote_experts_ratio"]
        report.line(f"one process that asks another for half of the experts: {remote}")
        same += [bool(two["identical"]), bool(remote["identical"])]
    if "nested" in parts:
        figures |= nested(report, given.threads, 1 if given.small else PAIRS, small=given.small)
        same.append(bool(figures["nested_identical"]))
    if same:
        figures["identical"] = all(same)
    report.end(figures)


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


# ---------------------------------------------------------------- without a model


def _kernels(figures: Figures, report: Report) -> None:
    """One row, one thread, int4, weights from memory; the same products by torch where it is installed."""
    from benchmarks.kernels import int4_row_gbps, torch_experts

    found: dict[str, float] = {}
    ours = int4_row_gbps(1.0)
    torch_experts(found, 1.0)
    theirs = found.get("torch_int4pack_rows1_threads1_gb_per_second")
    figures["kernel_gbps"] = ours
    figures["kernel_vs_torch"] = None if theirs is None else ours / theirs
    report.line(f"kernel: {ours:.1f} GB/s of weights, torch {theirs and round(theirs, 1)}")


def _policies(figures: Figures, report: Report) -> None:
    """Replays of both traces with a quarter of the experts in memory. The gap is the larger one."""
    gaps = []
    for path in (QWEN, GPT_OSS):
        trace = read_trace(path)
        rates = {
            name: 100 * replay(trace, trace.keys // 4, name).hit_rate for name in ("lru", "lfru", BELADY)
        }
        gaps.append(rates[BELADY] - rates["lfru"])
        report.line(
            f"replay of {path.name}, 25 %: "
            + ", ".join(f"{name} {rate:.1f} %" for name, rate in rates.items())
        )
    figures["belady_gap_25"] = max(gaps)


# ---------------------------------------------------------------- models


def _demo(report: Report, threads: int) -> bool:
    """The trained model with its own routing: so small that what is measured is overhead; the bits count."""
    bundle = Bundle.open(_demo_bundle())
    total = expert_bytes(bundle.manifest, 0, bundle.manifest.num_layers - 1)
    base = Order(MEMORY, str(bundle.path), prompt_tokens=32, decode_tokens=DEMO_TOKENS, threads=threads)
    arms = [
        Arm("memory", base),
        *(
            Arm(f"product {share} %", replace(base, arm=PRODUCT, cache_bytes=total * share // 100))
            for share in (50, 25)
        ),
        Arm(
            "product 25 %, lru, 1 lane",
            replace(base, arm=PRODUCT, cache_bytes=total // 4, policy="lru", lanes=1),
        ),
    ]
    results = {arm.name: run_arm(arm, bundle) for arm in arms}
    for name, result in results.items():
        report.line(f"demo, {name}: {result.tokens_per_second:.0f} tokens/s, {_hits(result)}")
    return len({result.notes.digest for result in results.values()}) == 1


def _large(
    figures: Figures,
    report: Report,
    threads: int,
    rounds: int,
    chosen: tuple[str, ...] = (),
    *,
    small: bool,
) -> bool:
    """`chosen`: names of arms; none: all."""
    trace = read_trace(QWEN)
    bundle = Bundle.open(random_moe(TINY if small else LARGE))
    layers = expert_layers(bundle, bundle.manifest.layers)
    total = sum(layer.total_bytes for layer in layers)
    dense = bundle.manifest.weight_bytes - total
    seed = time.time_ns()
    base = Order(MEMORY, str(bundle.path), trace=str(QWEN), threads=threads, exchange_seed=seed)
    speed = measure_flash(layers, budget_seconds=1.0, seed=seed)
    report.line(
        f"{bundle.manifest.model.name}: {total / 1e9:.2f} GB of experts of {layers[0].stride_bytes / 1024:.0f} KiB; "
        f"flash {speed.bytes_per_second / 1e9:.2f} GB/s with {speed.lanes} reads at a time"
        f"{'' if speed.direct else ', through the page cache'}; routing of {QWEN.name}, not looped"
    )
    arms = _chosen(_arms(base, total, dense, speed.lanes), chosen)
    results = _rounds(arms, bundle, rounds, report)
    for name, result in results.items():
        share = _limit(figures, name, result, trace.top_k, layers[0].stride_bytes)
        report.line(
            f"{name}: {result.tokens_per_second:.2f} tokens/s, prompt {result.notes.prefill_seconds:.2f} s, "
            f"{_hits(result)}, {result.notes.major_faults} major faults{share}"
        )
    _compare(figures, results)
    _check_replay(figures, report, results, total // 4 // layers[0].stride_bytes, small=small)
    return len({digest for result in results.values() for digest in result.digests}) == 1


def _limit(figures: Figures, name: str, result: Result, top_k: int, expert_bytes: int) -> str:
    """What the product reaches of the limit beside it, in words; its stretches go to the figures, too."""
    stretches = result.notes.stretches
    if not any(own.flash_bytes_per_second for own in stretches):
        return ""
    fraction = limit_fraction(stretches, top_k, expert_bytes)
    rows = table(stretches, top_k, expert_bytes)
    usual = medians(rows)
    if name in ("product 50 %", "product 25 %"):
        share = name.split()[1]
        figures[f"limit_fraction_{share}"] = fraction
        idle = [replace(own, flash_bytes_per_second=own.flash_alone_bytes_per_second) for own in stretches]
        figures[f"limit_fraction_idle_{share}"] = limit_fraction(idle, top_k, expert_bytes)
        figures[f"stretches_{share}"] = rows
        figures[f"stretch_{share}"] = usual
    beside = spread([own.flash_bytes_per_second for own in stretches if own.flash_bytes_per_second])
    return (
        f", {100 * fraction:.0f} % of the limit of {result.tokens_per_second / fraction:.2f} at {beside} GB/s and "
        f"{usual['memory']:.1f} ms a token in memory; medians of stretches: {usual}"
    )


def _two_agents_order(threads: int, *, small: bool) -> Order:
    return Order(MEMORY, str(random_moe(TINY if small else LARGE)), trace=str(QWEN), threads=threads)


def _arms(base: Order, total: int, dense: int, lanes: int) -> list[Arm]:
    quarter, half = total // 4, total // 2
    product = replace(base, arm=PRODUCT, lanes=lanes, beside=True)
    return [
        Arm("memory", base),
        Arm("product 50 %", replace(product, cache_bytes=half), half + dense + OVERHEAD_BYTES),
        Arm("product 25 %", replace(product, cache_bytes=quarter), quarter + dense + OVERHEAD_BYTES),
        Arm("product 25 % lru", replace(product, cache_bytes=quarter, policy="lru")),
        Arm("mapped 25 %", replace(base, arm=MAPPED), quarter + dense + OVERHEAD_BYTES),
        Arm("naive", replace(base, arm=NAIVE)),
    ]


def _chosen(arms: list[Arm], names: tuple[str, ...]) -> list[Arm]:
    """Memory, which the others are held against, and those named. Raises SystemExit for a name that is none."""
    known = {arm.name for arm in arms}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"there is no arm {unknown[0]!r}: choose of {', '.join(sorted(known))}")
    return [arm for arm in arms if not names or arm.name == MEMORY or arm.name in names]


def _rounds(arms: list[Arm], bundle: Bundle, rounds: int, report: Report) -> dict[str, Result]:
    """In turns, forth and back, products with flash beside them. An arm that can't run is left out and said so."""
    best: dict[str, Result] = {}
    skipped: set[str] = set()
    for turn in range(rounds):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            if arm.name in skipped:
                continue
            try:
                found = run_arm(arm, bundle)
            except OSError as problem:
                skipped.add(arm.name)
                report.line(f"{arm.name}: skipped, {problem}")
                continue
            say(f"{arm.name}: {found.tokens_per_second:.2f} tokens/s")
            known = best.get(arm.name)
            if known is not None:
                found.digests |= known.digests
                found.oom_kills += known.oom_kills
                if known.tokens_per_second > found.tokens_per_second:
                    found.notes, found.tokens_per_second = known.notes, known.tokens_per_second
            best[arm.name] = found
    return best


def run_arm(arm: Arm, bundle: Bundle) -> Result:
    """Raises OSError where there is no cgroup to be had, RuntimeError where the process failed otherwise."""
    with ExitStack() as stack:
        order, cgroup = arm.order, None
        if arm.limit_bytes:
            cgroup = stack.enter_context(memory_cgroup(arm.limit_bytes))
            order = replace(order, cgroup=str(cgroup.path), cgroup_version=cgroup.version)
        if order.arm != MEMORY:
            forget(bundle)
        command = [sys.executable, "-m", "benchmarks.flash_arm", json.dumps(asdict(order))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ARM_SECONDS)
        kills = cgroup.oom_kills if cgroup is not None else 0
        if done.returncode != 0 and kills:
            return Result(Notes(), 0.0, set(), kills)
        if done.returncode != 0:
            raise RuntimeError(f"{arm.name} failed:\n{done.stderr[-2000:]}")
    notes = Notes(**json.loads(done.stdout.splitlines()[-1]))
    notes.stretches = [Stretch(**own) for own in cast(list[dict[str, Any]], notes.stretches)]
    return Result(notes, order.decode_tokens / notes.decode_seconds, {notes.digest}, kills)


# ---------------------------------------------------------------- figures


def _compare(figures: Figures, results: dict[str, Result]) -> None:
    def tps(name: str) -> float | None:
        return results[name].tokens_per_second if name in results else None

    def ratio(name: str, other: str) -> float | None:
        mine, theirs = tps(name), tps(other)
        return None if mine is None or not theirs else mine / theirs

    figures |= {
        "inram_tps": tps("memory"),
        "naive_tps": tps("naive"),
        "mmap_tps": tps("mapped 25 %"),
        "product_tps_50": tps("product 50 %"),
        "product_tps_25": tps("product 25 %"),
        "ratio_50": ratio("product 50 %", "memory"),
        "ratio_25": ratio("product 25 %", "memory"),
        "vs_naive_25": ratio("product 25 %", "naive"),
        "vs_mmap_25": ratio("product 25 %", "mapped 25 %"),
    }
    limited = [results[name] for name in ("product 50 %", "product 25 %") if name in results]
    if limited:
        figures["oom_kills"] = sum(result.oom_kills for result in limited)
        tokens = [len(result.notes.missed) or 1 for result in limited]
        faults = [result.notes.major_faults for result in limited]
        figures["major_faults_per_token"] = max(f / t for f, t in zip(faults, tokens, strict=True))


def _check_replay(
    figures: Figures, report: Report, results: dict[str, Result], slots: int, *, small: bool
) -> None:
    """The replay must say what the live cache did, or its other rows say nothing."""
    if "product 25 %" in results:
        notes = results["product 25 %"].notes
        figures["hit_rate_25"] = 100 * notes.hits / max(1, notes.hits + notes.misses)
    live = results.get("product 25 % lru")
    if live is not None and not small:
        rate = 100 * live.notes.hits / max(1, live.notes.hits + live.notes.misses)
        replayed = 100 * replay(read_trace(QWEN), slots, "lru").hit_rate
        figures["replay_difference"] = abs(rate - replayed)
        report.line(f"lru live {rate:.2f} %, replayed {replayed:.2f} %")


def _hits(result: Result) -> str:
    notes = result.notes
    if not notes.hits + notes.misses:
        return "no cache"
    return f"hit rate {100 * notes.hits / (notes.hits + notes.misses):.1f} %"


def _demo_bundle() -> Path:
    """The one that ships, where its experts can stay on flash; exported anew otherwise."""
    from edge_runtime.experts.flash_store import can_stay_on_flash
    from edge_runtime.sdk.cluster import demo_bundle

    manifest = Bundle.open(demo_bundle()).manifest
    if can_stay_on_flash(manifest, 0, manifest.num_layers - 1):
        return demo_bundle()
    path = CACHE / "demo-int8"
    if not (path / "manifest.sig").exists():
        say(f"exporting {path} (once)")
        from exporters.export import ExportOptions, export_bundle

        export_bundle(
            DEMO_CHECKPOINT, path, ExportOptions(weights="int8", name="demo", calibration_tokens=512)
        )
    return path


if __name__ == "__main__":
    main()
