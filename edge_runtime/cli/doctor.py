"""`edge-runtime doctor`: can this machine serve, and if not, why.

Every check ends in one line with a reason; what is wrong comes with the next step.
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_runtime import config
from edge_runtime.cli import doctor_experts, machine
from edge_runtime.cli.command import Command
from edge_runtime.cli.output import paint, result, result_json
from edge_runtime.cli.progress import Progress, format_amount
from edge_runtime.errors import EdgeRuntimeError

OLDEST_PYTHON = (3, 11)
SCARCE_BYTES = 1 << 30
PROBE_KV_BYTES = 64 << 20
PROBE_SECONDS = 2.0

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `level`: ok, warning (works, with a but), failed."""

    check: str
    level: str
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is examined."""

    settings: config.Config
    bundle: Path | None  # None: the demo's


_Check = Callable[[_Subject], Iterator[Finding]]


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="also examine this bundle (default: the demo's)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON array on stdout")
    parser.set_defaults(examine=None)
    topics = parser.add_subparsers(metavar="experts", title="more")
    experts = topics.add_parser("experts", help="could this machine use BUNDLE with most experts on flash?")
    doctor_experts.configure(experts)
    experts.set_defaults(examine=doctor_experts.run)


def _run(arguments: Namespace) -> int:
    if arguments.examine is not None:
        return int(arguments.examine(arguments))
    findings = examine(_Subject(config.load(), arguments.bundle), as_json=arguments.json)
    if arguments.json:
        result_json([asdict(finding) for finding in findings])
    return 1 if any(finding.level == "failed" for finding in findings) else 0


def examine(subject: _Subject, *, as_json: bool) -> list[Finding]:
    """All checks, each shown when it is done. One that breaks is a finding, too."""
    findings: list[Finding] = []
    for name, check in _CHECKS.items():
        try:
            found = list(check(subject))
        except EdgeRuntimeError as problem:
            found = [Finding(name, "failed", problem.message, problem.hint)]
        except Exception as problem:  # a broken installation breaks in ways nobody listed
            found = [
                Finding(name, "failed", f"{type(problem).__name__}: {problem}", "reinstall edge-runtime")
            ]
        if not as_json:
            for finding in found:
                _show(finding)
        findings += found
    return findings


def _show(finding: Finding) -> None:
    level = paint(f"{finding.level:<7}", _COLOURS[finding.level], sys.stdout)
    result(f"{level}  {finding.check:<15}  {finding.reason}")
    if finding.hint:
        result(f"{'':7}  {'':15}  hint: {finding.hint}")


def _python(subject: _Subject) -> Iterator[Finding]:
    text = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield Finding("python", "failed", text, "install Python 3.11 or newer")
    else:
        yield Finding("python", "ok", text)


def _kernels(subject: _Subject) -> Iterator[Finding]:
    try:
        import edge_kernels
    except ImportError as problem:
        yield Finding(
            "native kernels", "failed", str(problem), "reinstall: pip install --force-reinstall edge-runtime"
        )
        return
    available = ", ".join(edge_kernels.available_isas())
    yield Finding("native kernels", "ok", f"instruction set {edge_kernels.isa()} (of {available})")


def _onnxruntime(subject: _Subject) -> Iterator[Finding]:
    try:
        import onnxruntime
    except ImportError as problem:
        yield Finding("onnxruntime", "failed", str(problem), "pip install onnxruntime")
        return
    providers = ", ".join(onnxruntime.get_available_providers())
    yield Finding("onnxruntime", "ok", f"{onnxruntime.__version__} with {providers}")


def _memory(subject: _Subject) -> Iterator[Finding]:
    cores, free = machine.cores(), machine.free_memory_bytes()
    if free is None:
        yield Finding(
            "memory", "warning", f"{cores} cores; this system does not say what is free", "use --memory"
        )
        return
    text = f"{format_amount(free, 'B')} free, {cores} cores"
    if free < SCARCE_BYTES:
        yield Finding("memory", "warning", text, "end other programs, or give the agent a small --memory")
    else:
        yield Finding("memory", "ok", text)


def _ports(subject: _Subject) -> Iterator[Finding]:
    host, port = subject.settings.coordinator.host, subject.settings.coordinator.port
    try:
        with socket.create_server((host, port)):
            yield Finding("port", "ok", f"{host}:{port} is free for the HTTP API")
    except OSError as problem:
        yield Finding(
            "port",
            "warning",
            f"{host}:{port} can't be used: {problem.strerror}",
            "is a coordinator running? Otherwise choose another with --http-port",
        )


def _storage(subject: _Subject) -> Iterator[Finding]:
    directory = subject.settings.general.state_directory
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as problem:
        yield Finding(
            "state directory",
            "failed",
            f"{directory} can't be written: {problem.strerror}",
            "set EDGE_RUNTIME_GENERAL_STATE_DIRECTORY to a directory of yours",
        )
        return
    free = shutil.disk_usage(directory).free
    text = f"{directory}, {format_amount(free, 'B')} free"
    if free < SCARCE_BYTES:
        yield Finding("state directory", "warning", text, "fetched bundles go there: make room")
    else:
        yield Finding("state directory", "ok", text)


def _bundle(subject: _Subject) -> Iterator[Finding]:
    from edge_runtime.bundle import Bundle
    from edge_runtime.sdk.cluster import demo_bundle

    bundle = Bundle.open(subject.bundle or demo_bundle())
    manifest = bundle.manifest
    keys = list(manifest.slices)
    with Progress(
        "checking the bundle", total=sum(s.size_bytes for s in manifest.slices.values()), unit="B"
    ) as bar:
        for key in keys:
            bundle.verify([key])
            bar.advance(manifest.slices[key].size_bytes)
    yield Finding(
        "bundle",
        "ok",
        f"{manifest.model.name}: signature and all {len(keys)} slices"
        f" ({format_amount(manifest.weight_bytes, 'B')} of weights) are right",
    )


def _row_invariance(subject: _Subject) -> Iterator[Finding]:
    from edge_runtime.bundle import Bundle
    from edge_runtime.core import LayerRange
    from edge_runtime.engine.cpu import CpuStage
    from edge_runtime.engine.probe import probe
    from edge_runtime.sdk.cluster import demo_bundle

    bundle = Bundle.open(subject.bundle or demo_bundle())
    last = bundle.manifest.num_layers - 1
    stage = CpuStage.load(bundle, LayerRange(last, last), threads=1, kv_budget_bytes=PROBE_KV_BYTES)
    try:
        found = probe(stage, budget_seconds=PROBE_SECONDS)
    finally:
        stage.close()
    yield Finding("numeric class", "ok", found.numeric_class)
    if found.row_invariant:
        yield Finding(
            "row invariance", "ok", f"rows are the same bits alone and in batches of {found.checked_rows}"
        )
    else:
        yield Finding(
            "row invariance",
            "warning",
            found.why_not,
            "this device serves with fixed chunks and shares no batches; a newer onnxruntime may do better",
        )
    seconds = found.layer_decode_seconds
    yield Finding("speed", "ok", f"{seconds * 1e3:.2f} ms for one row through one layer, one thread")


_CHECKS: dict[str, _Check] = {
    "python": _python,
    "native kernels": _kernels,
    "onnxruntime": _onnxruntime,
    "memory": _memory,
    "port": _ports,
    "state directory": _storage,
    "bundle": _bundle,
    "row invariance": _row_invariance,
}

COMMAND = Command("doctor", "check that this machine can serve, and say why not", _configure, _run)
