"""`edge-runtime export CHECKPOINT BUNDLE`: a checkpoint becomes a bundle.

Knows: arguments and what is printed. Does not know: how the export works.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.command import Command

if TYPE_CHECKING:
    from exporters.export import ExportReport


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a Hugging Face directory, or a hub name")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="the directory to write")
    parser.add_argument(
        "--weights",
        choices=("fp32", "int8", "int4", "nested4", "nested8"),
        default="int8",
        help="format of the matrices (default int8; int4 keeps embedding and head at int8; nested4 is int4 with "
        "experts in two planes of 2 bits, the first of which is usable alone; nested8 is int8 with experts in those "
        "two and one of 4 bits)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="UTF-8 text to measure quality on, and to quantize by (default: a short mixed text)",
    )
    parser.add_argument(
        "--calibration-tokens",
        metavar="N",
        type=_positive,
        default=2048,
        help="how much of it (default 2048)",
    )
    parser.add_argument(
        "--max-error",
        metavar="E",
        type=_fraction,
        default=0.0,
        help="keep a matrix at fp32 where its output would be off by more, relatively (default int8 and nested8 0.05, "
        "others 0.25)",
    )
    parser.add_argument("--name", default="", help="the model's name (default: the checkpoint's)")
    parser.add_argument("--revision", help="of a hub model: branch, tag or commit")
    parser.add_argument(
        "--signing-key",
        metavar="FILE",
        type=Path,
        help="key to sign with, made if missing (default: a new key)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 2")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _run(arguments: Namespace) -> int:
    from edge_runtime.bundle.signing import BundleSigningKey
    from edge_runtime.cli.progress import Progress
    from exporters.export import ExportOptions, export_bundle
    from exporters.huggingface import locate

    text = _calibration_text(arguments.calibration)
    key_file = arguments.signing_key
    with Progress("fetching", unit="B") as bar:
        source = locate(
            arguments.checkpoint,
            revision=arguments.revision,
            progress=lambda what, done, total: bar.update(done, total=total, label=f"fetching {what}"),
        )
    options = ExportOptions(
        weights=arguments.weights,
        name=arguments.name or source.name,
        origin=source.origin,
        calibration_text=text,
        calibration_tokens=arguments.calibration_tokens,
        max_error=arguments.max_error,
        signing_key=BundleSigningKey.load_or_create(key_file) if key_file is not None else None,
    )
    with Progress("exporting", unit="steps") as bar:
        report = export_bundle(
            source.path,
            arguments.bundle,
            options,
            lambda what, done, total: bar.update(done, total=total, label=what),
        )
    _print(report, as_json=arguments.json)
    return 0


def _calibration_text(path: Path | None) -> str:
    from edge_runtime.errors import UsageError

    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the calibration text {path} can't be read: {error}", hint="give a file of UTF-8 text"
        ) from None
    if not text.strip():
        raise UsageError(f"the calibration text {path} is empty", hint="give a file with some pages of text")
    return text


def _print(report: ExportReport, *, as_json: bool) -> None:
    from edge_runtime.cli.output import note, result, result_json
    from edge_runtime.cli.progress import format_amount

    if as_json:
        result_json(
            {
                "bundle": str(report.path),
                "digest": report.digest,
                "family": report.family,
                "weights": report.weights,
                "layers": report.num_layers,
                "weight_bytes": report.weight_bytes,
                "quality": dict(report.quality),
                "kept_fp32": dict(report.kept_fp32),
            }
        )
        return
    result(f"{report.path}")
    note(f"{report.family}, {report.num_layers} layers, {format_amount(report.weight_bytes, 'B')}")
    for name, value in report.quality.items():
        note(f"  {name.replace('_', ' ')} {value:.6g}")
    for name, error in report.kept_fp32.items():
        note(f"  {name} stays fp32: {report.weights} would be off by {error:.1%}")


COMMAND = Command("export", "make a bundle from a checkpoint", _configure, _run)
