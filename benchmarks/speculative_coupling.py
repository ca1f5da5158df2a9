"""How often two models draw the same id: `python -m benchmarks.speculative_coupling [--json] [--windows N]`.

The demo target and the demo draft, as bundles on the native executor, over held-out text. At every position: the
overlap 1 - TV of their distributions (no pair of samplers can agree more often), the chance that samplers with the same
Gumbel noise agree (exact, from both distributions), and how often the runtime's samplers did agree. Beside it a draft
with noise of its own and a draft that takes the likeliest id. Efficiency is agreement / overlap, each a mean over
positions.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
from edge_kernels import sampling
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks import report
from benchmarks.demo_pair import ROOT, TARGET, draft_bundle
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.speculative.drafters.favoured import favoured

F64 = NDArray[np.float64]

MODELS = ROOT / "examples" / "models"
WINDOW_TOKENS = 512
SKIPPED_TOKENS = 16  # of each window: what follows hardly any text says little
TEMPERATURES = (0.0, 0.7, 1.0)
SEED = 20_240_807
CHUNK_ROWS = 128


@dataclass
class Sums:
    """Over positions, or over positions and draws for what is drawn."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def mean(self, name: str) -> float:
        return float(np.mean(self.values[name]))


def same_noise_agreement(p: F64, q: F64) -> float:
    """Sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i), for distributions [V] (arXiv 2408.07978, theorem 1).

    Sorted by p_i / q_i, the inner maximum is p's term for all j from i on and q's for those before: V log V.
    """
    both = (p > 0) & (q > 0)  # an id that one of them never draws is never drawn by both
    order = np.argsort(p[both] / q[both])
    ps, qs = p[both][order], q[both][order]
    p_from = ps[::-1].cumsum()[::-1] + p[~both].sum()
    q_before = qs.cumsum() - qs + q[~both].sum()
    return float((1 / (p_from / ps + q_before / qs)).sum())


def softmax(logits: F64, temperature: float) -> F64:
    """At temperature 0 all of it on the likeliest id."""
    if temperature == 0.0:
        return np.asarray(np.arange(len(logits)) == logits.argmax(), np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    return np.asarray(weights / weights.sum())


def held_out_windows(bundle: Bundle, count: int) -> Iterator[tuple[int, ...]]:
    """Evenly spaced over the files that no demo model was trained on (this Python's; the models saw CPython 3.11's)."""
    tokenizer = Tokenizer.from_buffer(bundle.tokenizer_json())
    texts = [file.text for file in _text_module().standard_library() if file.is_held_out]
    ids = [token for encoded in tokenizer.encode_batch(texts) for token in encoded.ids]
    step = (len(ids) - WINDOW_TOKENS) // count
    for start in range(0, count * step, step):
        yield tuple(ids[start : start + WINDOW_TOKENS])


def all_logits(stage: CpuStage, ids: tuple[int, ...]) -> F64:
    """[len(ids), V]."""
    session = SessionId(1)
    stage.open(session, len(ids))
    rows = [
        stage.run(
            Batch((Span(session, at, ids[at : at + CHUNK_ROWS], len(ids[at : at + CHUNK_ROWS])),), None)
        )
        for at in range(0, len(ids), CHUNK_ROWS)
    ]
    stage.drop(session)
    return np.concatenate(rows).astype(np.float64)


def compare(target: F64, draft: F64, temperature: float, seeds: list[int], position: int, sums: Sums) -> None:
    """One position: logits [V] of both."""
    p, q = softmax(target, temperature), softmax(draft, temperature)
    sums.add("overlap", float(np.minimum(p, q).sum()))
    sums.add("exact", same_noise_agreement(p, q))
    sums.add("likeliest", float(p[draft.argmax()]))
    sums.add("own noise", float(p @ q))
    for seed in seeds:
        params = SamplingParams(temperature=temperature, seed=seed)
        drawn = sampling.sample(target, seed=seed, position=position, temperature=temperature)
        best = favoured(draft, params, position, 3)
        sums.add("drawn", float(drawn == best[0].token))
        sums.add("foreseen", best[0].probability)
        sums.add("among 3", float(drawn in [favourite.token for favourite in best]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the JSON object on stdout")
    parser.add_argument("--windows", type=int, default=24, metavar="N", help="of 512 held-out tokens")
    parser.add_argument("--draws", type=int, default=2, metavar="N", help="seeds for each position")
    arguments = parser.parse_args()
    target, draft = Bundle.open(TARGET), Bundle.open(draft_bundle())
    page = report.Report(
        "agreement of the demo pair under the same noise",
        only_json=arguments.json,
        target=f"{target.manifest.model.name} {target.manifest.model.weights}",
        draft=f"{draft.manifest.model.name} {draft.manifest.model.weights}",
        windows=arguments.windows,
        draws=arguments.draws,
    )
    page.end(measure(page, target, draft, arguments.windows, arguments.draws))


def measure(
    page: report.Report, target: Bundle, draft: Bundle, windows: int, draws: int
) -> dict[str, object]:
    stages = [_whole(bundle) for bundle in (target, draft)]
    sums = {temperature: Sums() for temperature in TEMPERATURES}
    for index, ids in enumerate(held_out_windows(target, windows)):
        logits = [all_logits(stage, ids) for stage in stages]
        seeds = [sampling.choice_seed(SEED + index, draw) for draw in range(draws)]
        for row in range(SKIPPED_TOKENS, len(ids)):
            for temperature in TEMPERATURES:
                compare(logits[0][row], logits[1][row], temperature, seeds, row + 1, sums[temperature])
        report.say(f"window {index + 1} of {windows}")
    figures: dict[str, object] = {"positions": windows * (WINDOW_TOKENS - SKIPPED_TOKENS), "draws": draws}
    for temperature, found in sums.items():
        name = f"t{temperature:g}".replace(".", "")
        overlap = found.mean("overlap")
        figures |= {
            f"coupling_efficiency_{name}": found.mean("drawn") / overlap,
            f"coupling_efficiency_exact_{name}": found.mean("exact") / overlap,
            f"overlap_{name}": overlap,
            f"acceptance_{name}": found.mean("drawn"),
            f"acceptance_among_3_{name}": found.mean("among 3"),
            f"acceptance_foreseen_{name}": found.mean("foreseen"),
        }
        page.line(
            f"T = {temperature:g}: same noise {found.mean('drawn'):.3f} drawn, {found.mean('exact'):.3f} exact, "
            f"of 1 - TV {overlap:.3f}: {found.mean('drawn') / overlap:.3f}; best of 3 {found.mean('among 3'):.3f}; "
            f"foreseen {found.mean('foreseen'):.3f}; noise of its own {found.mean('own noise'):.3f}, "
            f"likeliest id {found.mean('likeliest'):.3f}"
        )
    return figures


def _whole(bundle: Bundle) -> CpuStage:
    layers = LayerRange(0, bundle.manifest.num_layers - 1)
    return CpuStage.load(bundle, layers, threads=2, kv_budget_bytes=64 << 20)


def _text_module() -> ModuleType:
    """`examples/models/text.py`, which is no package: it says which files are held out."""
    spec = importlib.util.spec_from_file_location("demo_text", MODELS / "text.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
