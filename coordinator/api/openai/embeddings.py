"""`/v1/embeddings`, for encoders.

Knows: the table and both encodings of a vector. Does not know: pooling, normalisation.
"""

from __future__ import annotations

import base64

import numpy as np
from aiohttp import web
from numpy.typing import NDArray

from coordinator.api.body import read_object
from coordinator.api.context import API
from coordinator.api.errors import ApiError
from coordinator.api.openai.parameters import Harmless, Parameter, Table, integer, is_label, text
from coordinator.api.openai.prompts import encode, need_kind, need_model, need_plan, read_prompts

MAX_INPUTS = 2048
MAX_DIMENSIONS = 1 << 20


def _format(value: object) -> str:
    if value not in ("float", "base64"):
        raise ValueError('must be "float" or "base64"')
    return str(value)


TABLE = Table(
    (
        Parameter("model", "the name in /v1/models", text, is_required=True),
        Parameter(
            "input",
            f"a string, token ids, or a list of up to {MAX_INPUTS} of those",
            lambda value: value,
            is_required=True,
        ),
        Parameter("encoding_format", '"float" or "base64" (float32, little-endian)', _format, "float"),
        Parameter("dimensions", "the model's own width only", integer(1, MAX_DIMENSIONS)),
    ),
    (Harmless("user", "a label", is_label),),
)


async def create_embeddings(request: web.Request) -> web.Response:
    """POST /v1/embeddings"""
    service = request.app[API].service
    model = service.model
    values = TABLE.read(await read_object(request))
    need_model(values["model"], model)
    need_kind(model, "encoder")
    if values["dimensions"] not in (None, model.hidden_size):
        raise ApiError(
            f"`dimensions` can only be this model's own width, {model.hidden_size}.",
            code="unsupported_parameter",
            param="dimensions",
        )
    prompts = read_prompts(values["input"], param="input", limit=MAX_INPUTS, vocab_size=model.vocab_size)
    need_plan(service)
    sequences = [await encode(service, prompt, param="input") for prompt in prompts]
    longest = max(len(ids) for ids in sequences)
    if longest > model.max_context_tokens:
        raise ApiError(
            f"This model's context is {model.max_context_tokens} tokens, but an input has {longest}.",
            code="context_length_exceeded",
            param="input",
        )
    vectors = await service.embed(sequences)
    tokens = sum(len(ids) for ids in sequences)
    return web.json_response(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _encode(vector, values["encoding_format"]),
                }
                for index, vector in enumerate(vectors)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _encode(vector: NDArray[np.float32], encoding: str) -> str | list[float]:
    little = vector.astype("<f4")
    if encoding == "base64":
        return base64.b64encode(little.tobytes()).decode("ascii")
    return [float(value) for value in little]
