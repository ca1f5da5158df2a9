"""What a body of the API asks for, read where no coordinator can: on the device that answers offline.

The names, defaults and seeds are the coordinator's (docs/http_api.md), so that the same body means the same once the
target can be asked. What a draft model can't answer as the target would (several choices, log-probabilities) is
refused.

Knows: fields and defaults. Does not know: tokenizers, models, who asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.core import SamplingParams
from edge_runtime.errors import CapacityError, UsageError

DEFAULT_MAX_TOKENS = 1024  # or what is left of the context, where that is less

_NUMBERS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_READ = frozenset(
    {*_NUMBERS, "max_tokens", "stop", "seed", "top_k", "logit_bias", "ignore_eos", "n", "logprobs"}
)
_OF_NO_EFFECT = frozenset(
    {"model", "stream", "stream_options", "return_token_ids", "prompt", "messages"}
    | {"user", "metadata", "safety_identifier", "prompt_cache_key"}
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_CHAT_LIMIT = "max_completion_tokens"


@dataclass(frozen=True, slots=True)
class LocalRequest:
    """`max_tokens` None: the default, which depends on the prompt's length (`limit`)."""

    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool


def read_request(body: Mapping[str, Any]) -> LocalRequest:
    """`body` names its seed. Raises UsageError for what can't be answered here."""
    given = {name: value for name, value in body.items() if value is not None}
    known = _READ | _OF_NO_EFFECT | ({_CHAT_LIMIT} if "messages" in body else set())
    unknown = sorted(given.keys() - known)
    if unknown:
        raise _not_here(f"`{unknown[0]}` means nothing to a draft model")
    if given.get("n", 1) != 1 or given.get("logprobs", False) is not False:
        raise _not_here("a draft model gives one choice, without log-probabilities")
    try:
        return LocalRequest(
            _sampling(given),
            _max_tokens(given),
            _stop(given.get("stop", ())),
            given.get("ignore_eos") is True,
        )
    except (TypeError, ValueError, KeyError) as problem:
        raise _not_here(str(problem)) from None


def limit(request: LocalRequest, prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens may follow the prompt. Raises CapacityError where it and they do not fit."""
    left = context_tokens - prompt_tokens
    wanted = min(left, DEFAULT_MAX_TOKENS) if request.max_tokens is None else request.max_tokens
    if left < 1 or wanted > left:
        raise CapacityError(
            f"the draft model's context is {context_tokens} tokens: too few for a prompt of {prompt_tokens}"
            + (f" and {wanted} more" if wanted > 0 else ""),
            hint="shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
        )
    return wanted


def plain_messages(value: object) -> list[dict[str, object]]:
    """A conversation as a template takes it: a role and a text each. Raises UsageError for anything else."""
    if not isinstance(value, list) or not value:
        raise _not_here("`messages` must be a list of messages")
    return [_message(each) for each in value]


def _message(value: object) -> dict[str, object]:
    role = value.get("role") if isinstance(value, dict) else None
    if not isinstance(value, dict) or role not in _ROLES:
        raise _not_here(f"a message's role is one of {', '.join(_ROLES)}")
    parts = value.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(parts, list) or not all(isinstance(each, dict) for each in parts):
        raise _not_here("a message's content is text")
    texts = [each.get("text") for each in parts if each.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(each, str) for each in texts):
        raise _not_here("a message's content is text")
    message: dict[str, object] = {"role": _ROLES[role], "content": "".join(texts)}
    return message | ({"name": value["name"]} if isinstance(value.get("name"), str) else {})


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    numbers: dict[str, Any] = {
        name: _number(given.get(name, default), name) for name, default in _NUMBERS.items()
    }
    bias = _bias(given.get("logit_bias", {}))
    return SamplingParams(
        **numbers,
        top_k=max(_integer(given.get("top_k", 0), "top_k"), 0),
        logit_bias=tuple(sorted(bias.items())),
        seed=_integer(given["seed"], "seed") % 2**64,
    )


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise TypeError("`logit_bias` must map token ids to numbers")
    return {int(token): _number(each, "logit_bias") for token, each in value.items()}


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    value = given.get(_CHAT_LIMIT, given.get("max_tokens"))
    if value is None:
        return None
    if _integer(value, "max_tokens") < 1:
        raise ValueError("`max_tokens` must be 1 or more")
    return int(value)


def _stop(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(each, str) and each for each in strings):
        raise ValueError("`stop` must be strings")
    return tuple(strings)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number")
    return float(value)


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer")
    return value


def _not_here(message: str) -> UsageError:
    return UsageError(
        f"this can't be answered offline: {message}", hint="ask again when the coordinator is back"
    )
