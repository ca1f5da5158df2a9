"""A calibration text as token sequences, and what a finished bundle makes of it, with the kernels devices will use.

One layer is loaded at a time, so that memory does not grow with the model.
Knows: bundles and stages. Does not know: checkpoints; the reference's side is `reference_pass`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files

import numpy as np
from tokenizers import Tokenizer

from edge_runtime.bundle.bundle import SLICE_DIRECTORY, Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.onnx import MAX_OWN_POOL_THREADS
from edge_runtime.errors import ExportError
from edge_runtime.experts.cache import CacheOptions
from edge_runtime.experts.flash_store import expert_bytes
from edge_runtime.experts.start_bits import ALL_BITS
from exporters.checkpoint import Floats
from exporters.head_scores import head_logits
from exporters.reference_pass import next_tokens
from exporters.scores import ScoreBuilder, Scores

DEFAULT_TOKENS = 2048
_SEQUENCE_TOKENS = 512

Sequences = tuple[tuple[int, ...], ...]


def default_text() -> str:
    """The text shipped with the package: prose, code and data, written for this purpose."""
    return files("exporters").joinpath("calibration.txt").read_text(encoding="utf-8")


def token_sequences(
    tokenizer: Tokenizer, text: str, *, encoder: bool, vocab_size: int, max_context: int, max_tokens: int
) -> Sequences:
    """Up to `max_tokens` of the text: windows of a long text, or, for an encoder, its paragraphs.

    Raises ExportError where the text is too short, or the tokenizer is of another model.
    """
    longest = min(_SEQUENCE_TOKENS, max_context)
    if encoder:
        texts = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        sequences = [tokenizer.encode(paragraph).ids[:longest] for paragraph in texts]
    else:
        ids = tokenizer.encode(text).ids
        sequences = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    chosen: list[tuple[int, ...]] = []
    left = max_tokens
    for sequence in sequences:
        kept = tuple(sequence[:left])
        if len(kept) > 1:
            chosen.append(kept)
            left -= len(kept)
    if not chosen:
        raise ExportError("the calibration text is too short", hint="give a file with some pages of text")
    largest = max(max(sequence) for sequence in chosen)
    if largest >= vocab_size:
        raise ExportError(
            f"tokenizer.json gives token {largest}, but config.json has a vocabulary of {vocab_size}",
            hint="tokenizer.json and config.json are of different models; download both again",
        )
    return tuple(chosen)


def bundle_scores(
    bundle: Bundle,
    sequences: Sequences,
    advance: Callable[[], None] = lambda: None,
    *,
    start_bits: int = ALL_BITS,
) -> Scores:
    """What a generator's bundle says about each row. `advance` is called after each layer.

    `start_bits`: with only so many bits of bit-nested experts.
    """
    ids = [token for sequence in sequences for token in sequence]
    starts = np.cumsum([0, *(len(sequence) for sequence in sequences)]).tolist()
    hidden = _through_layers(
        _without_head(bundle), bundle.manifest.num_layers, sequences, advance, start_bits
    )
    builder = ScoreBuilder(next_tokens(ids, starts))
    for first_id, logits in head_logits(bundle, hidden, _threads()):
        builder.add(first_id, logits)
    return builder.scores()


def bundle_vectors(
    bundle: Bundle, sequences: Sequences, advance: Callable[[], None] = lambda: None
) -> Floats:
    """An encoder's vectors, one per sequence."""
    return _through_layers(bundle, bundle.manifest.num_layers, sequences, advance)


def _threads() -> int:
    """Few enough for pools of their own: a shared pool would stay with the process that exports."""
    return min(os.cpu_count() or 1, MAX_OWN_POOL_THREADS)


def _without_head(bundle: Bundle) -> Bundle:
    """The same bundle with its last layer twice: none of the real layers is the tail, so none loads the head."""
    manifest = bundle.manifest
    longer = replace(manifest, layers=(*manifest.layers, manifest.layers[-1]))
    return Bundle(bundle.path, b"", b"", longer, bundle.path / SLICE_DIRECTORY)


def _through_layers(
    bundle: Bundle,
    count: int,
    sequences: Sequences,
    advance: Callable[[], None],
    start_bits: int = ALL_BITS,
) -> Floats:
    """All rows after `count` layers, one of which is in memory at a time."""
    hidden: Floats | None = None
    for layer in range(count):
        with _Layer(bundle, layer, sequences, start_bits) as stage:
            hidden = _run_whole(stage, sequences, hidden, causal=bundle.manifest.model.kind == "generator")
        advance()
    assert hidden is not None, "a model has layers"
    return hidden


def _run_whole(stage: CpuStage, sequences: Sequences, hidden: Floats | None, *, causal: bool) -> Floats:
    outputs = []
    start = 0
    for index, sequence in enumerate(sequences):
        rows = None if hidden is None else hidden[start : start + len(sequence)]
        span = Span(SessionId(index + 1), 0, sequence, causal=causal)
        outputs.append(stage.run(Batch((span,), rows)))
        start += len(sequence)
    return np.concatenate(outputs)


class _Layer:
    """`with _Layer(...) as stage`: one layer, with a session open for each sequence."""

    def __init__(
        self, bundle: Bundle, layer: int, sequences: Sequence[Sequence[int]], start_bits: int
    ) -> None:
        pages = sum(-(-len(sequence) // 32) for sequence in sequences) + 1
        budget_bytes = 32 * pages * bundle.manifest.model.kv_bytes_per_token_per_layer
        early = None
        if start_bits != ALL_BITS:
            room_bytes = expert_bytes(bundle.manifest, layer, layer)
            early = CacheOptions(room_bytes, start_bits=start_bits, upgrades=False)
        self._stage = CpuStage.load(
            bundle,
            LayerRange(layer, layer),
            threads=_threads(),
            kv_budget_bytes=budget_bytes,
            experts=early,
        )
        for index, sequence in enumerate(sequences):
            self._stage.open(SessionId(index + 1), len(sequence))

    def __enter__(self) -> CpuStage:
        return self._stage

    def __exit__(self, *exc: object) -> None:
        self._stage.close()
