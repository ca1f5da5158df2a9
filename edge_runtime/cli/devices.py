"""`edge-runtime devices`: who is paired, in what state and why; pairing links; revocation."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from edge_runtime.cli.command import Command
from edge_runtime.cli.connection import add_connection_arguments, open_client
from edge_runtime.cli.output import note, result, result_json
from edge_runtime.cli.progress import format_amount


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "link", "revoke"),
        default="list",
        help="list them (default), make a join link that pairs one, or revoke one for good",
    )
    parser.add_argument("device", nargs="?", default="", help="name or id of the one to revoke")
    parser.add_argument("--json", action="store_true", help="JSON on stdout")
    add_connection_arguments(parser)


def _run(arguments: Namespace) -> int:
    if (arguments.action == "revoke") != bool(arguments.device):
        from edge_runtime.errors import UsageError

        raise UsageError("revoke needs a device, the others none", hint="edge-runtime devices revoke NAME")
    with open_client(arguments) as client:
        if arguments.action == "link":
            link = client.create_join_link()
            if arguments.json:
                result_json({"link": link})
            else:
                result(link)
                note("it pairs one device within ten minutes: edge-runtime agent --join 'LINK'")
        elif arguments.action == "revoke":
            client.revoke(arguments.device)
            if arguments.json:
                result_json({"device": arguments.device, "revoked": True})
            else:
                note(f"{arguments.device} is revoked: it was cut off and can't come back under its key")
        else:
            _list(client.status(), as_json=arguments.json)
    return 0


def _list(status: dict[str, Any], *, as_json: bool) -> None:
    devices = status["devices"]
    if as_json:
        result_json(devices)
        return
    if not devices:
        note("no device is paired; `edge-runtime devices link` makes a join link")
        return
    rows = [("NAME", "STATE", "LAYERS", "WEIGHTS", "RTT", "PID", "ID")]
    for device in devices:
        layers = "-".join(map(str, device["layers"])) if device["layers"] else ""
        weights = format_amount(device["weight_bytes"], "B") if device["weight_bytes"] else ""
        rtt = f"{device['rtt_seconds'] * 1e3:.1f} ms" if device["rtt_seconds"] else ""
        pid = str(device["pid"]) if device["pid"] else ""
        rows.append((device["name"], device["state"], layers, weights, rtt, pid, device["id"]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    reasons = ["", *(device["reason"] for device in devices)]
    for row, reason in zip(rows, reasons, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        result(f"{line}  {reason}".rstrip())


COMMAND = Command("devices", "list devices, make join links, revoke", _configure, _run)
