"""The families that can be exported, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.errors import ExportError
from exporters.architectures.bert import BERT, EncoderFamily
from exporters.architectures.decoder import DecoderFamily
from exporters.architectures.gemma2 import GEMMA2
from exporters.architectures.llama import LLAMA
from exporters.architectures.mistral import MISTRAL
from exporters.architectures.mixtral import MIXTRAL
from exporters.architectures.olmoe import OLMOE
from exporters.architectures.phi3 import PHI3
from exporters.architectures.plan import ModelPlan
from exporters.architectures.qwen2 import QWEN2
from exporters.architectures.qwen3 import QWEN3
from exporters.architectures.qwen3_moe import QWEN3_MOE
from exporters.config import Settings
from exporters.encoder import Pooling

FAMILIES: Mapping[str, DecoderFamily | EncoderFamily] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, OLMOE, PHI3, GEMMA2, BERT)
}


def plan_model(settings: Settings, pooling: Pooling | None = None) -> ModelPlan:
    """Raises ExportError for an unknown family or a config that does not fit its family."""
    family = FAMILIES.get(settings.family)
    if family is None:
        raise ExportError(
            f"config.json: the architecture {settings.family[:60]!r} is not supported",
            hint=f"supported: {', '.join(sorted(FAMILIES))}",
        )
    if isinstance(family, EncoderFamily):
        return family.plan(settings, pooling)
    return family.plan(settings)
