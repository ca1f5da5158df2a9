"""An accepted request: its id, its choices with their seeds, and where their events come from.

Knows: ids, seeds, the service's requests. Does not know: how requests are read or answered.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from edge_kernels.sampling import choice_seed

from coordinator.api.context import Api
from coordinator.api.openai.answer import Answer
from coordinator.api.openai.chat import ChatDialect
from coordinator.api.openai.choices import Choice, Source
from coordinator.api.openai.completions import CompletionDialect
from coordinator.api.openai.generation import Options
from coordinator.api.openai.logprobs import TokenText
from coordinator.api.openai.ticket import RANDOM_BYTES, Ticket, choice_id
from coordinator.service import GenerateRequest, Service


def make_answer(service: Service, request_id: str, ticket: Ticket, choices: list[Choice]) -> Answer:
    kind = ChatDialect if ticket.is_chat else CompletionDialect
    dialect = kind(TokenText(service.decode), ticket.logprobs, ticket.return_token_ids)
    return Answer(request_id, ticket, service.model.name, bundle_fingerprint(service), dialect, choices)


def bundle_fingerprint(service: Service) -> str:
    return "fp_" + service.status().bundle.rpartition(":")[2][:16]


def accept(
    api: Api,
    tenant: str,
    options: Options,
    prompts: Sequence[tuple[int, ...]],
    limits: Sequence[int],
    *,
    is_chat: bool,
) -> tuple[Answer, list[Source]]:
    """Name the request, seed its choices, and set them off (they start when they are first read)."""
    ticket = Ticket(
        is_chat,
        int(time.time()),
        len(prompts) * options.n,
        sum(len(ids) for ids in prompts),
        options.sampling.seed,
        secrets.token_bytes(RANDOM_BYTES),
        options.include_usage,
        options.return_token_ids,
        options.sampling.top_logprobs >= 0,
    )
    request_id = ticket.id(tenant)
    choices, sources = [], []
    for index in range(ticket.choices):
        which, copy = divmod(index, options.n)
        ids = prompts[which]
        wanted = GenerateRequest(
            choice_id(request_id, index),
            tenant,
            ids,
            replace(options.sampling, seed=choice_seed(options.sampling.seed, copy)),
            limits[which],
            options.stop,
            options.ignore_eos,
        )
        choices.append(Choice(index, ids[-1], ids, copy=copy))
        sources.append(Source(api.service.generate(wanted), api.metrics.generation(len(ids))))
    return make_answer(api.service, request_id, ticket, choices), sources
