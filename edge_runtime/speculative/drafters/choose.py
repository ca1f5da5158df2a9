"""Which drafter a name stands for: what the SDK, an agent and the command line call.

Knows: the drafters' names and what each needs. Does not know: requests, links, or where a bundle comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.engine.executors import AUTO as AUTO_EXECUTOR
from edge_runtime.errors import UsageError
from edge_runtime.speculative.drafters.base import Drafter
from edge_runtime.speculative.drafters.calibrated import Calibrated
from edge_runtime.speculative.drafters.chooser import Chooser
from edge_runtime.speculative.drafters.model import ModelDrafter
from edge_runtime.speculative.drafters.none import NoDrafter
from edge_runtime.speculative.drafters.suffix import SuffixDrafter
from edge_runtime.speculative.drafters.suffix_memory import SuffixMemory

AUTO, MODEL, SUFFIX, NONE = "auto", "model", "suffix", "none"
CHOICES = (AUTO, MODEL, SUFFIX, NONE)
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """What a drafter may hold. The user's memory of past outputs has a budget of its own (`SuffixMemory`)."""

    kv_bytes: int = 16 * MIB  # of the model; contexts that need more are drafted from a window
    request_index_bytes: int = 4 * MIB  # of the suffix drafter, for the request at hand

    def __post_init__(self) -> None:
        if self.kv_bytes < 1 or self.request_index_bytes < 1:
            raise UsageError("a drafter's budgets must be above 0 bytes", hint='draft without: draft="none"')


DEFAULT_BUDGET = DraftBudget()


def make_drafter(
    spec: str,
    *,
    bundle: Bundle | str | Path | None = None,
    target_tokenizer: str | None = None,
    memory: SuffixMemory | None = None,
    budget: DraftBudget = DEFAULT_BUDGET,
    executor: str = AUTO_EXECUTOR,
    threads: int = 1,
) -> Drafter:
    """A drafter for one request after another; `close` it when done.

    `spec`: "model" (a small model, needs `bundle`), "suffix" (what the request and its user's past outputs repeat),
    "auto" (whichever of the two expects more at each step; without a `bundle` the suffix drafter), or "none".
    `target_tokenizer`: digest of the target's tokenizer (`tokenizer_digest`); a draft model with another is refused.
    `memory`: the one user's past outputs; None keeps nothing from request to request.

    Raises UsageError (unknown name, no bundle, another tokenizer), BundleError, CapacityError or EngineError.
    """
    if spec not in CHOICES:
        raise UsageError(f"unknown drafter {spec!r}", hint=f"choose one of {', '.join(CHOICES)}")
    if spec == NONE:
        return NoDrafter()
    if spec == SUFFIX or (spec == AUTO and bundle is None):
        return Calibrated(SuffixDrafter(memory, request_index_bytes=budget.request_index_bytes))
    if bundle is None:
        raise UsageError(
            "drafting with a model needs the model", hint='name its bundle, or use draft="suffix"'
        )
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if target_tokenizer not in (None, tokenizer_digest(opened)):
        raise UsageError(
            f"{opened.manifest.model.name} has another tokenizer than the target: its ids mean other text",
            hint='draft with a model of the same family and tokenizer, or use draft="suffix"',
        )
    model = ModelDrafter(opened, kv_bytes=budget.kv_bytes, executor=executor, threads=threads)
    if spec == MODEL:
        return model
    suffix = SuffixDrafter(memory, request_index_bytes=budget.request_index_bytes)
    return Chooser(model, Calibrated(suffix))


def tokenizer_digest(bundle: Bundle) -> str:
    """Two models with the same digest read the same ids as the same text."""
    return str(bundle.manifest.slices[bundle.manifest.tokenizer].digest)
