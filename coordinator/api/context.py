"""What handlers of one application share."""

from __future__ import annotations

from dataclasses import dataclass
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


API = web.AppKey("api", Api)
