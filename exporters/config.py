"""config.json, whichever dialect it is written in.

Two are in use: the classic one (`rope_theta` and `rope_scaling`, `num_experts`, `torch_dtype`) and the one
transformers 5 writes (`rope_parameters`, `num_local_experts`, `dtype`). `Settings` gives one view of both.
Knows: keys and types. Does not know: what an architecture does with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import ExportError

_ALIASES = {
    "num_experts": ("num_experts", "num_local_experts"),
    "hidden_act": ("hidden_act", "hidden_activation"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Typed reads from config.json; a missing or ill-typed key is an ExportError that names it."""

    raw: Mapping[str, Any]

    @property
    def family(self) -> str:
        return self.text("model_type")

    @property
    def heads(self) -> int:
        return self.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        return self.integer("num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        return self.integer("head_dim", self.integer("hidden_size") // max(self.heads, 1))

    @property
    def layers(self) -> int:
        return self.integer("num_hidden_layers")

    def get(self, key: str) -> Any:
        """The value under any of the key's names; null counts as absent."""
        values = (self.raw.get(name) for name in _ALIASES.get(key, (key,)))
        return next((value for value in values if value is not None), None)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 0:
            raise _bad(key, "a whole number", value)
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value == 0:
            raise _bad(key, "a whole number above 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _bad(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise _bad(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise _bad(key, "a string", value)
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A number or a list of numbers; () where absent."""
        value = self.get(key)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in values):
            raise _bad(key, "a whole number or a list of them", value)
        return tuple(values)

    def rope(self, default_theta: float = 1e4) -> dict[str, Any]:
        """The rotary parameters in the newer spelling, `rope_type` and `rope_theta` always among them."""
        parameters = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise _bad("rope_parameters", "an object", parameters)
        rope = dict(parameters)
        rope.setdefault("rope_type", rope.pop("type", "default"))
        for key, default in (("rope_theta", default_theta), ("partial_rotary_factor", 1.0)):
            if rope.get(key) is None:
                rope[key] = self.number(key, default)
        original = self.get("original_max_position_embeddings")
        if original is not None:
            rope["original_max_position_embeddings"] = original
        rope.setdefault("original_max_position_embeddings", self.positive("max_position_embeddings"))
        return rope

    def layer_types(self) -> tuple[str, ...]:
        """`layer_types` where given: "full_attention" or "sliding_attention" for each layer."""
        value = self.get("layer_types")
        if value is None:
            return ()
        known = {"full_attention", "sliding_attention"}
        if not isinstance(value, list) or len(value) != self.layers or not set(value) <= known:
            raise _bad("layer_types", f"{self.layers} of full_attention or sliding_attention", value)
        return tuple(value)


def _bad(key: str, wanted: str, value: object) -> ExportError:
    if value is None:
        return ExportError(f"config.json has no {key}", hint=f"add {key} ({wanted}), or download it again")
    return ExportError(
        f"config.json: {key} must be {wanted}, not {str(value)[:60]!r}", hint="download config.json again"
    )
