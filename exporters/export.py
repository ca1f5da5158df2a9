"""From a checkpoint to a bundle: plan, check, then block by block read, measure, quantize, compile, write.

The bundle is written beside its destination and renamed into place when it is whole, so that neither an error nor
Ctrl-C leaves half of one. Knows: the order of the work. Does not know: families, formats, kernels.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edge_runtime.bundle.bundle import MANIFEST_FILE, Bundle
from edge_runtime.bundle.manifest import (
    TENSOR_FORMATS,
    Block,
    Manifest,
    ModelInfo,
    Segment,
    Slice,
    Tensor,
)
from edge_runtime.bundle.signing import BundleSigningKey
from edge_runtime.bundle.writer import BundleWriter, SliceWriter
from edge_runtime.core import Digest
from edge_runtime.errors import ExportError, UsageError
from edge_runtime.experts.start_bits import perplexity_name
from exporters.architectures import plan_model
from exporters.architectures.plan import BlockPlan, ExpertsPlan, ModelPlan
from exporters.calibrate import (
    DEFAULT_TOKENS,
    Sequences,
    bundle_scores,
    bundle_vectors,
    default_text,
    token_sequences,
)
from exporters.checkpoint import Checkpoint
from exporters.config import Settings
from exporters.encoder import read_pooling
from exporters.experts import write_experts
from exporters.graph import compile_segments
from exporters.quantize import WEIGHTS, experts_format_of, format_of, write_tensor
from exporters.reference_pass import Observations, ReferencePass
from exporters.sensitivity import DEFAULT_MAX_ERROR, ErrorMeter, experts_error, inputs_of
from exporters.sources import Sources
from exporters.tokenizer import TokenizerFiles, read_tokenizer

_TOKENIZER_SLICE = "tokenizer"
_GRAPH_ALIGNMENT_BYTES = 64

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export; everything has a default."""

    weights: str = "int8"
    name: str = ""  # "": the checkpoint directory's
    origin: str = ""  # "": the checkpoint directory's name
    calibration_text: str = ""  # "": the package's own
    calibration_tokens: int = DEFAULT_TOKENS
    max_error: float = 0.0  # a weight whose output is further off stays fp32; 0: the format's default
    search_scales: bool = True  # False: plain rounding, for weights whose values don't matter (benchmarks)
    signing_key: BundleSigningKey | None = None  # None: a new one, forgotten afterwards


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What came out."""

    path: Path
    digest: Digest
    family: str
    weights: str
    num_layers: int
    weight_bytes: int
    quality: Mapping[str, float]
    kept_fp32: Mapping[str, float]  # weights that stayed fp32 -> the relative error they would have had


def export_bundle(
    checkpoint_path: str | Path,
    bundle_path: str | Path,
    options: ExportOptions = ExportOptions(),
    progress: Progress = lambda what, done, total: None,
) -> ExportReport:
    """Raises ExportError (the checkpoint) or UsageError (the options, the destination); then nothing was written."""
    if options.weights not in WEIGHTS:
        raise UsageError(f"unknown weights {options.weights!r}", hint=f"choose one of {', '.join(WEIGHTS)}")
    target = Path(bundle_path).absolute()
    _check_target(target)
    checkpoint = Checkpoint.open(checkpoint_path)
    settings = Settings(checkpoint.config)
    plan = plan_model(settings, read_pooling(checkpoint))
    work = _Export(checkpoint, plan, read_tokenizer(checkpoint, settings), options, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.exporting-", dir=target.parent))
    try:
        report = work.write(temporary)
        temporary.chmod(0o755)  # mkdtemp's directories are private
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return replace(report, path=target)


def _check_target(target: Path) -> None:
    if target.is_dir() and ((target / MANIFEST_FILE).exists() or not any(target.iterdir())):
        return
    if target.exists():
        raise UsageError(
            f"{target} exists and is not a bundle", hint="choose another directory, or remove this one first"
        )


def _replace(temporary: Path, target: Path) -> None:
    """Put a finished bundle in place; an older one there goes only once the new one is whole."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / "bundle")
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


class _Export:
    """One export under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: ModelPlan,
        tokenizer: TokenizerFiles,
        options: ExportOptions,
        progress: Progress,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.tokenizer = tokenizer
        self.options = options
        self.sources = Sources(checkpoint, plan)
        self.sequences = self._sequences()
        self.reference = ReferencePass(plan, self.sources, self.sequences)
        self.tensors: dict[str, Tensor] = {}
        self.kept_fp32: dict[str, float] = {}
        self._progress = progress
        self._steps_done = 0
        experts = TENSOR_FORMATS[f"experts_{experts_format_of(options.weights)}"]
        measured = experts.planes  # whole experts, and with fewer planes
        self._steps = len(plan.blocks) + measured * len(plan.layers)

    def write(self, path: Path) -> ExportReport:
        writer = BundleWriter(path)
        blocks = [self._write_block(writer, block) for block in self.plan.blocks]
        writer.add_file(_TOKENIZER_SLICE, self.tokenizer.tokenizer_json)
        key = self.options.signing_key or BundleSigningKey.generate()
        # Signed once to be opened and measured as a device would, and again with what was measured.
        writer.finish(lambda slices: self._manifest(blocks, slices, {}), key)
        quality = self._measure(path)
        digest = writer.finish(lambda slices: self._manifest(blocks, slices, quality), key)
        manifest = self._manifest(blocks, writer.slices, quality)
        return ExportReport(
            path,
            digest,
            self.plan.family,
            self.options.weights,
            len(self.plan.layers),
            manifest.weight_bytes,
            quality,
            dict(self.kept_fp32),
        )

    def _sequences(self) -> Sequences:
        return token_sequences(
            self.tokenizer.tokenizer(),
            self.options.calibration_text or default_text(),
            encoder=self.plan.kind == "encoder",
            vocab_size=self.plan.vocab_size,
            max_context=self.plan.max_context_tokens,
            max_tokens=self.options.calibration_tokens,
        )

    def _advance(self, what: str) -> None:
        self._steps_done += 1
        self._progress(what, self._steps_done, self._steps)

    @property
    def _max_error(self) -> float:
        return self.options.max_error or DEFAULT_MAX_ERROR.get(self.options.weights, 0.0)

    def _write_block(self, writer: BundleWriter, block: BlockPlan) -> Block:
        observed = self.reference.run(block)
        for plan in block.tensors:
            if isinstance(plan, ExpertsPlan):
                with writer.slice(f"{block.name}.experts") as out:
                    self._write_experts(out, plan, observed)
        segments: tuple[Segment, ...] = ()
        if any(not isinstance(plan, ExpertsPlan) for plan in block.tensors):
            with writer.slice(block.name) as out:
                self._write_tensors(out, block, observed)
                segments = self._write_segments(out, block)
        used = {name for operation in block.operations for name in operation.weights.values()}
        parts = [part for name in sorted(used) for part in self.tensors[name].parts.values()]
        keys = sorted({part.slice for part in parts} | {segment.graph.slice for segment in segments})
        weight_bytes = sum(writer.slices[key].size_bytes for key in keys)
        self._advance(f"exporting {block.name}")
        return Block(block.name, block.operations, segments, tuple(keys), weight_bytes)

    def _write_experts(self, out: SliceWriter, plan: ExpertsPlan, observed: Observations) -> None:
        format = experts_format_of(self.options.weights)
        source = self.sources.experts[plan.name]
        if format != "fp32":
            error = experts_error(source, format, observed)
            if error > self._max_error:
                self.kept_fp32[plan.name] = error
                format = "fp32"
        self.tensors[plan.name] = write_experts(out, source, format, partial(inputs_of, observed, plan.name))

    def _write_tensors(self, out: SliceWriter, block: BlockPlan, observed: Observations) -> None:
        for plan in block.tensors:
            if isinstance(plan, ExpertsPlan):
                continue
            format = format_of(plan.role, self.options.weights)
            seen = observed.get(plan.name)
            written = write_tensor(
                out,
                self.sources.tensors[plan.name],
                format,
                inputs=seen,
                meter=None if seen is None else ErrorMeter(seen.judged),
                max_error=self._max_error,
                search=self.options.search_scales,
            )
            self.tensors[plan.name] = written.tensor
            if written.tensor.format != format:
                self.kept_fp32[plan.name] = written.relative_error

    def _write_segments(self, out: SliceWriter, block: BlockPlan) -> tuple[Segment, ...]:
        compiled = compile_segments(block.name, block.operations, self.tensors, self.plan.hidden_size)
        return tuple(
            Segment(
                out.add(segment.model, alignment_bytes=_GRAPH_ALIGNMENT_BYTES),
                segment.first_operation,
                segment.last_operation,
                segment.inputs,
                segment.outputs,
            )
            for segment in compiled
        )

    def _manifest(
        self, blocks: list[Block], slices: Mapping[str, Slice], quality: Mapping[str, float]
    ) -> Manifest:
        directory = self.checkpoint.path.resolve().name
        plan, tokenizer = self.plan, self.tokenizer
        info = ModelInfo(
            name=self.options.name or directory,
            family=plan.family,
            kind=plan.kind,
            hidden_size=plan.hidden_size,
            vocab_size=plan.vocab_size,
            max_context_tokens=plan.max_context_tokens,
            kv_bytes_per_token_per_layer=2 * 4 * plan.kv_width,  # keys and values, fp32
            eos_ids=tokenizer.eos_ids if plan.kind == "generator" else (),
            bos_id=tokenizer.bos_id,
            weights=self.options.weights,
            add_bos=tokenizer.add_bos,
        )
        return Manifest(
            model=info,
            embedding=blocks[0],
            layers=tuple(blocks[1:-1]),
            head=blocks[-1],
            tensors=self.tensors,
            slices=slices,
            ropes=plan.ropes,
            tokenizer=_TOKENIZER_SLICE,
            chat_template=tokenizer.chat_template,
            special_tokens=tokenizer.special_tokens,
            quality=quality,
            origin=self.options.origin or directory,
        )

    def _measure(self, path: Path) -> dict[str, float]:
        """The bundle against the checkpoint, on the calibration text."""
        bundle = Bundle.open(path)
        tokens = float(sum(len(sequence) for sequence in self.sequences))
        try:
            if self.plan.kind == "encoder":
                vectors = bundle_vectors(bundle, self.sequences, lambda: self._advance("measuring"))
                return _cosines(vectors, self.reference.pooled) | {"calibration_tokens": tokens}
            scores = bundle_scores(bundle, self.sequences, lambda: self._advance("measuring"))
            early = self._measure_early(bundle)
        finally:
            bundle.close()
        exact = self.reference.scores
        if exact is None:
            raise ExportError("the reference pass did not reach the head")
        return {
            "top1_agreement": scores.agreement(exact),
            "perplexity": scores.perplexity,
            "reference_perplexity": exact.perplexity,
            "perplexity_ratio": scores.perplexity / exact.perplexity,
            "calibration_tokens": tokens,
            **early,
        }

    def _measure_early(self, bundle: Bundle) -> dict[str, float]:
        """What is left of the model where only the first plane of every expert is used, the first two, …"""
        found = {}
        for bits in bundle.manifest.prefix_bits:
            advance = partial(self._advance, f"measuring {bits} bits")
            found[perplexity_name(bits)] = bundle_scores(
                bundle, self.sequences, advance, start_bits=bits
            ).perplexity
        return found


def _cosines(
    vectors: np.typing.NDArray[np.float32], exact: np.typing.NDArray[np.float32] | None
) -> dict[str, float]:
    if exact is None:
        raise ExportError("the reference pass did not reach the head")
    cosines = (vectors * exact).sum(axis=1) / (
        np.linalg.norm(vectors, axis=1) * np.linalg.norm(exact, axis=1)
    )
    return {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
