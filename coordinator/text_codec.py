"""Text to token ids and back, as one bundle does it.

Knows: the bundle's tokenizer and chat template. Does not know: requests, streams (`edge_runtime.text` decodes those).
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from edge_runtime.bundle import Bundle
from edge_runtime.bundle.hashing import sha256_digest
from edge_runtime.chat_template import ChatTemplate
from edge_runtime.errors import UsageError


class TextCodec:
    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.json = bundle.tokenizer_json()
        self.digest = sha256_digest(self.json)
        self.tokenizer = Tokenizer.from_str(self.json.decode())
        self._model_name = manifest.model.name
        self._template = (
            ChatTemplate(manifest.chat_template, manifest.special_tokens) if manifest.chat_template else None
        )

    def encode(self, text: str) -> list[int]:
        """With whatever the tokenizer itself adds."""
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[dict[str, object]]) -> list[int]:
        """The template writes special tokens itself: none are added again. Raises UsageError."""
        if self._template is None:
            raise UsageError(
                f"{self._model_name} has no chat template", hint="use /v1/completions", code="model_cannot"
            )
        text = self._template.render(messages)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
