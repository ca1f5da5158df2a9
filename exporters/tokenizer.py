"""Tokenizer, chat template and special ids of a checkpoint.

Knows: tokenizer.json, tokenizer_config.json, generation_config.json. Does not know: weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from edge_runtime.errors import ExportError
from exporters.checkpoint import Checkpoint
from exporters.config import Settings

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Everything text-like that goes into a bundle."""

    tokenizer_json: bytes
    chat_template: str
    special_tokens: dict[str, str]
    bos_id: int
    eos_ids: tuple[int, ...]
    add_bos: bool

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer_json.decode())


def read_tokenizer(checkpoint: Checkpoint, settings: Settings) -> TokenizerFiles:
    """Raises ExportError where there is no tokenizer.json: other formats are not converted here."""
    data = checkpoint.bytes("tokenizer.json")
    if data is None:
        raise ExportError(
            f"{checkpoint.path} has no tokenizer.json",
            hint="make one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(directory)",
        )
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception
        raise ExportError(
            f"{checkpoint.path / 'tokenizer.json'} can't be read: {str(error)[:200]}",
            hint="download it again",
        ) from None
    # Some tokenizers cut and pad every text to a fixed length, silently: lengths are the server's to decide.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = checkpoint.json("tokenizer_config.json") or {}
    generation = Settings(checkpoint.json("generation_config.json") or {})
    bos = settings.get("bos_token_id")
    bos_id = bos if type(bos) is int else -1
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=_chat_template(checkpoint, config),
        special_tokens={key: token for key in _SPECIAL_TOKENS if (token := _content(config.get(key)))},
        bos_id=bos_id,
        eos_ids=generation.integers("eos_token_id") or settings.integers("eos_token_id"),
        add_bos=bos_id >= 0 and first == [bos_id],
    )


def _content(value: Any) -> str:
    """A special token is a string, or an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _chat_template(checkpoint: Checkpoint, config: dict[str, Any]) -> str:
    file = checkpoint.bytes("chat_template.jinja")
    if file is not None:
        return file.decode("utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""
