"""How fast the kernels are here: `python -m benchmarks.kernels [--json] [--seconds 1]`.

Experts of the Qwen3-30B shape (hidden 2048, intermediate 768; 64 experts, so that weights come from memory, not cache),
dense products and attention of the Llama-3.2-1B shape, the sampler with a vocabulary of 151,936. Times
are the best of several runs of CPU time for one thread, wall time for more; torch's `_weight_int4pack_mm_for_cpu` runs
the same expert sizes where torch is installed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable

import edge_kernels
import numpy as np
from edge_kernels.attention import RaggedRows, paged_attention
from edge_kernels.experts import PARTS, ExpertWeights, run_experts
from edge_kernels.linear import linear, pack, pack_fp32
from edge_kernels.sampling import sample
from numpy.typing import NDArray

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 64, 2048, 768, 8
Results = dict[str, float]


def best_seconds(call: Callable[[], object], budget_seconds: float, *, threads: int = 1) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    call()
    best, end = float("inf"), time.perf_counter() + budget_seconds
    while time.perf_counter() < end:
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def random_experts(format: str) -> ExpertWeights:
    """Random bytes in an expert's layout; only scales must be ordinary floats, the rest does not change speed."""
    rng = np.random.default_rng(0)
    item = {"fp32": 128, "int8": 32, "int4": 16}[format]  # bytes of 32 weights
    offsets: dict[str, int] = {}
    stride = 0
    for part in PARTS:
        offsets[part] = stride
        stride += HIDDEN * INTERMEDIATE // 32 * item
    if format != "fp32":
        for part in PARTS:
            offsets[f"{part}_scales"] = stride
            stride += HIDDEN * INTERMEDIATE // 32 * 4
    stride = -(-stride // 4096) * 4096
    buffer = rng.integers(0, 256, EXPERTS * stride, np.uint8)
    weights = ExpertWeights(buffer, format, EXPERTS, HIDDEN, INTERMEDIATE, stride, offsets)
    for expert in range(EXPERTS):
        for part in PARTS:
            name = part if format == "fp32" else f"{part}_scales"
            weights.part(expert, name)[...] = 0.01
    return weights


def experts(results: Results, seconds: float, threads: int) -> None:
    rng = np.random.default_rng(1)
    for format in ("int4", "int8", "fp32"):
        weights = random_experts(format)
        expert_bytes = sum(weights.part_bytes(part) for part in weights.offsets)
        for rows, used in ((1, 1), (1, threads), (64, 1)):
            x = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
            gates = np.full((rows, TOP_K), 1 / TOP_K, np.float32)
            first = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(rows)])
            turn = 0

            def run() -> None:
                nonlocal turn
                turn += TOP_K
                ids = ((first + turn) % EXPERTS).astype(np.int32)  # noqa: B023
                run_experts(x, ids, gates, weights, activation="silu", threads=used)  # noqa: B023

            taken = best_seconds(run, seconds, threads=used)
            name = f"experts_{format}_rows{rows}_threads{used}"
            if rows == 1:
                results[f"{name}_gb_per_second"] = TOP_K * expert_bytes / taken / 1e9
            results[f"{name}_rows_per_second"] = rows / taken


def int4_row_gbps(seconds: float) -> float:
    """GB/s of int4 weights that one row streams from memory on one thread."""
    weights = random_experts("int4")
    expert_bytes = sum(weights.part_bytes(part) for part in weights.offsets)
    x = np.random.default_rng(1).normal(size=(1, HIDDEN)).astype(np.float32)
    gates = np.full((1, TOP_K), 1 / TOP_K, np.float32)
    turn = 0

    def run() -> None:
        nonlocal turn
        turn += TOP_K
        ids = ((np.arange(TOP_K)[None] + turn) % EXPERTS).astype(np.int32)
        run_experts(x, ids, gates, weights, activation="silu")

    return TOP_K * expert_bytes / best_seconds(run, seconds) / 1e9


def dense(results: Results, seconds: float, threads: int) -> None:
    """Eight different matrices in turn, so that one row reads its weights from memory."""
    rng = np.random.default_rng(4)
    outputs, columns = 8192, 2048
    blocks = columns // 32
    for format, bits in (("int4", 4), ("int8", 8), ("fp32", 32)):
        scales = np.full((outputs, blocks), 0.01, np.float32)
        matrices = [
            pack_fp32(rng.standard_normal((outputs, columns), np.float32))
            if bits == 32
            else pack(rng.integers(0, 256, (outputs, blocks, 4 * bits), np.uint8), scales, columns)
            for _ in range(8)
        ]
        for rows, used in ((1, 1), (1, threads), (4, 1), (8, 1), (128, 1), (128, threads)):
            x = rng.standard_normal((rows, columns), np.float32)
            turn = 0

            def run() -> None:
                nonlocal turn
                turn += 1
                linear(x, matrices[turn % 8], threads=used)  # noqa: B023

            taken = best_seconds(run, seconds, threads=used)
            name = f"linear_{format}_rows{rows}_threads{used}"
            results[f"{name}_gb_per_second"] = matrices[0].bytes / taken / 1e9
            results[f"{name}_gmac_per_second"] = outputs * columns * rows / taken / 1e9


def torch_experts(results: Results, seconds: float) -> None:
    """The same products (gate, up, down; no activation between) by torch's own int4 kernel, bf16, groups of 32."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    packed = []
    for _ in range(EXPERTS):
        mats = []
        for n, k in ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            scales = torch.full((k // 32, n, 2), 0.01, dtype=torch.bfloat16)
            mats.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales))
        packed.append(mats)
    rows = [torch.randn(1, k, dtype=torch.bfloat16) for k in (HIDDEN, HIDDEN, INTERMEDIATE)]
    turn = 0

    def run() -> None:
        nonlocal turn
        turn += TOP_K
        for expert in range(TOP_K):
            for x, (weight, scales) in zip(rows, packed[(turn + expert) % EXPERTS], strict=True):
                torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 32, scales)

    with torch.inference_mode():
        taken = best_seconds(run, seconds)
    moved = sum(w.numel() * w.element_size() + s.numel() * s.element_size() for w, s in packed[0])
    results["torch_int4pack_rows1_threads1_gb_per_second"] = TOP_K * moved / taken / 1e9
    results["torch_int4pack_rows1_threads1_rows_per_second"] = 1 / taken


def attention(results: Results, seconds: float, threads: int) -> None:
    heads, kv_heads, head_dim = 32, 8, 64
    rng = np.random.default_rng(2)
    for length, rows in ((1024, 1), (8192, 1), (1024, 512)):
        pages = length // 32
        pool = rng.normal(size=(pages, 1, 2, 32, kv_heads, head_dim)).astype(np.float32)
        ragged = RaggedRows(
            np.arange(length - rows, length, dtype=np.int32),
            np.zeros(rows, np.int32),
            np.arange(pages, dtype=np.int32)[None],
            np.array([length], np.int32),
        )
        q = rng.normal(size=(rows, heads * head_dim)).astype(np.float32)
        for used in (1, threads):

            def run(used: int = used) -> NDArray[np.float32]:
                return paged_attention(
                    q,  # noqa: B023
                    pool,  # noqa: B023
                    0,
                    ragged,  # noqa: B023
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    scale=head_dim**-0.5,
                    window=0,
                    softcap=0.0,
                    causal=True,
                    threads=used,
                )

            taken = best_seconds(run, seconds, threads=used)
            results[f"attention_context{length}_rows{rows}_threads{used}_layer_tokens_per_second"] = (
                rows / taken
            )


def sampling(results: Results, seconds: float) -> None:
    logits = np.random.default_rng(3).normal(size=151_936) * 3
    for name, options in (("greedy", (0.0, 1.0)), ("all", (1.0, 1.0)), ("top_p", (1.0, 0.95))):
        temperature, top_p = options
        position = 0

        def run() -> None:
            nonlocal position
            position += 1
            sample(logits, seed=1, position=position, temperature=temperature, top_p=top_p)  # noqa: B023

        results[f"sample_151936_{name}_milliseconds"] = best_seconds(run, seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the last line (JSON) alone")
    parser.add_argument("--seconds", type=float, default=1.0, help="time given to each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    results: Results = {}
    dense(results, arguments.seconds, arguments.threads)
    experts(results, arguments.seconds, arguments.threads)
    torch_experts(results, arguments.seconds)
    attention(results, arguments.seconds, arguments.threads)
    sampling(results, arguments.seconds)
    report = {
        "benchmark": "kernels",
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "isa": edge_kernels.isa(),
        "experts": {"count": EXPERTS, "hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K},
        "results": {name: float(f"{value:.4g}") for name, value in results.items()},
    }
    if not arguments.json:
        print(f"{report['machine']}, {report['cpus']} CPUs, {report['isa']}; experts {report['experts']}")
        for name, value in results.items():
            print(f"{value:12.4g}  {name}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
