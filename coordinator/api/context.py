"""What handlers of one application share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from coordinator.service import Service

if TYPE_CHECKING:
    from coordinator.api.health import Readiness
    from coordinator.api.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Api:
    service: Service
    readiness: Readiness
    metrics: Metrics
    stopping: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # ends streams that have no end of their own


API = web.AppKey("api", Api)
