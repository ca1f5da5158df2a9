"""The parameters that chat and completions share, and what they become.

Knows: the common table, limits, seeds, how a request fits into the context. Does not know: prompts, responses, HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.api.errors import ApiError
from coordinator.api.openai.parameters import (
    Harmless,
    Parameter,
    boolean,
    integer,
    is_label,
    is_number,
    number,
    one_of,
    text,
)
from edge_runtime.core import SamplingParams

MAX_N = 16
MAX_CHOICES = 64  # prompts times n
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
DEFAULT_MAX_TOKENS = 1024  # or what is left of the context, where that is less


def _stop(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"must be at most {MAX_STOP_STRINGS} strings")
    if not all(0 < len(each) <= MAX_STOP_CHARACTERS for each in strings):
        raise ValueError(f"must be strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(strings)


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    said = "must map token ids to numbers from -100 to 100"
    if not isinstance(value, dict):
        raise ValueError(said)
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"must have at most {MAX_LOGIT_BIASES} entries")
    bias = number(-100, 100)
    for key in value:
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise ValueError(said)
    entries = {int(key): bias(each) for key, each in value.items()}
    if len(entries) != len(value):
        raise ValueError("must not name a token twice")
    return tuple(sorted(entries.items()))


def _stream_options(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise ValueError("must be an object with `include_usage`")
    if value.get("include_obfuscation"):
        raise ValueError("does not support `include_obfuscation`")
    return boolean(value.get("include_usage", False))


COMMON: tuple[Parameter, ...] = (
    Parameter("model", "the name in /v1/models", text, is_required=True),
    Parameter("stream", "true or false", boolean, False),
    Parameter("stream_options", '`{"include_usage": true}`, with `stream` only', _stream_options),
    Parameter("max_tokens", "1 or more", integer(1, MAX_TOKENS)),
    Parameter("n", f"1 to {MAX_N}", integer(1, MAX_N), 1),
    Parameter("stop", f"a string, or up to {MAX_STOP_STRINGS}", _stop, ()),
    Parameter("seed", "any 64-bit integer", integer(-(2**63), 2**64 - 1)),
    Parameter("temperature", "0 to 2; 0 is greedy", number(0, 2), 1.0),
    Parameter("top_p", "above 0, at most 1", number(0, 1, above=True), 1.0),
    Parameter("top_k", "0 or -1 (all), or 1 and more", integer(-1, MAX_TOKENS), 0),
    Parameter("min_p", "0 to 1", number(0, 1), 0.0),
    Parameter("presence_penalty", "-2 to 2", number(-2, 2), 0.0),
    Parameter("frequency_penalty", "-2 to 2", number(-2, 2), 0.0),
    Parameter("repetition_penalty", "above 0, at most 100", number(0, 100, above=True), 1.0),
    Parameter("logit_bias", f"token id to -100 … 100, up to {MAX_LOGIT_BIASES}", _logit_bias, ()),
    Parameter("ignore_eos", "true or false: go on past an end token", boolean, False),
    Parameter("return_token_ids", "true or false: also answer with ids", boolean, False),
)

HARMLESS: tuple[Harmless, ...] = (
    Harmless("user", "a label", is_label),
    Harmless("metadata", "labels", is_label),
    Harmless("safety_identifier", "a label", is_label),
    Harmless("prompt_cache_key", "a label", is_label),
    Harmless("store", "false", one_of(False)),
    Harmless("service_tier", '"auto" or "default"', one_of("auto", "default")),
    Harmless("stop_token_ids", "[]", one_of([])),
    Harmless("min_tokens", "0", one_of(0)),
    Harmless("length_penalty", "1", is_number(1)),
    Harmless("use_beam_search", "false", one_of(False)),
    Harmless("skip_special_tokens", "true", one_of(True)),
    Harmless("spaces_between_special_tokens", "true", one_of(True)),
    Harmless("include_stop_str_in_output", "false", one_of(False)),
    Harmless("priority", "0", one_of(0)),
)


@dataclass(frozen=True, slots=True)
class Options:
    """How to generate and how to answer, without the prompt."""

    sampling: SamplingParams
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool


def read_options(
    values: Mapping[str, Any], *, top_logprobs: int, random_seed: int, vocab_size: int
) -> Options:
    """`values` went through a table. `random_seed` is used where the caller gave none."""
    if values["stream_options"] is not None and not values["stream"]:
        raise ApiError(
            "`stream_options` needs `stream` to be true.", code="invalid_value", param="stream_options"
        )
    if any(token >= vocab_size for token, _ in values["logit_bias"]):
        raise ApiError(
            f"`logit_bias` names a token outside the vocabulary of {vocab_size}.",
            code="invalid_value",
            param="logit_bias",
        )
    seed = values["seed"]
    sampling = SamplingParams(
        temperature=values["temperature"],
        top_k=max(values["top_k"], 0),
        top_p=values["top_p"],
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
        presence_penalty=values["presence_penalty"],
        frequency_penalty=values["frequency_penalty"],
        logit_bias=values["logit_bias"],
        seed=random_seed if seed is None else seed % 2**64,
        top_logprobs=top_logprobs,
    )
    return Options(
        sampling,
        values["n"],
        values["max_tokens"],
        values["stop"],
        values["ignore_eos"],
        values["stream"],
        bool(values["stream_options"]),
        values["return_token_ids"],
    )


def fit(prompt_tokens: int, max_tokens: int | None, context_tokens: int, *, param: str) -> int:
    """How many tokens may be generated. What does not fit is refused with both numbers, never cut."""
    left = context_tokens - prompt_tokens
    if left < 1:
        raise ApiError(
            f"This model's context is {context_tokens} tokens, but the prompt has {prompt_tokens}: "
            "it must leave room for at least one more.",
            code="context_length_exceeded",
            param=param,
        )
    if max_tokens is not None and max_tokens > left:
        raise ApiError(
            f"This model's context is {context_tokens} tokens, but the prompt has {prompt_tokens} and "
            f"{max_tokens} were asked for: {prompt_tokens + max_tokens} in all.",
            code="context_length_exceeded",
            param=param,
        )
    return max_tokens if max_tokens is not None else min(left, DEFAULT_MAX_TOKENS)
