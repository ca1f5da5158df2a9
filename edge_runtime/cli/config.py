"""`edge-runtime config show`: every setting, its value, and where the value comes from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from edge_runtime import config
from edge_runtime.cli.command import Command
from edge_runtime.cli.output import result, result_json


def _configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print every setting and its source")
    show.add_argument("--json", action="store_true", help="one JSON object on stdout")
    show.add_argument("--file", type=Path, default=None, help="read this TOML file instead of the usual one")


def _run(arguments: Namespace) -> int:
    settings = list(config.load(file=arguments.file).settings())
    if arguments.json:
        result_json(
            {s.name: {"value": _shown(s), "source": s.source, "help": s.help} for s in settings},
        )
        return 0
    name_width = max(len(s.name) for s in settings)
    value_width = max(len(str(_shown(s))) for s in settings)
    for setting in settings:
        value = str(_shown(setting))
        result(f"{setting.name:<{name_width}}  {value:<{value_width}}  {setting.source}")
    return 0


def _shown(setting: config.Setting) -> str | int | float | bool:
    if setting.secret and setting.value:
        return "(set, not shown)"
    return setting.value if isinstance(setting.value, str | int | float | bool) else str(setting.value)


COMMAND = Command("config", "show the settings and where each comes from", _configure, _run)
