"""What a caller may say about a generation, and how it is sent.

Knows: names and their place in the API's body. Does not know: defaults; what is not given is the coordinator's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

from edge_runtime.errors import UsageError
from edge_runtime.sdk.http import Json

Message = Mapping[str, str]
"""{"role": "user", "content": "…"}"""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of generate, stream and chat."""

    max_tokens: int
    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    ignore_eos: bool
    offline: str  # "never" or "draft": may this device's draft model answer where the target can't be reached


def to_body(options: GenerateOptions) -> Json:
    """The API's fields. An unknown option is refused here, by name."""
    unknown = set(options) - set(GenerateOptions.__annotations__)
    if unknown:
        raise UsageError(
            f"there is no option {sorted(unknown)[0]!r}",
            hint=f"options are {', '.join(GenerateOptions.__annotations__)}",
        )
    body = {name: value for name, value in cast("Json", options).items() if value is not None}
    body.pop("offline", None)  # the device's business
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    if "stop" in body and not isinstance(body["stop"], str):
        body["stop"] = list(body["stop"])
    return body


def to_messages(messages: str | Sequence[Message]) -> list[dict[str, str]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]


def to_prompt(prompt: str | Sequence[int]) -> str | list[int]:
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]
