"""BERT-style encoders: norms after the residuals, learnt positions, attention both ways, one vector per text."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.errors import ExportError
from exporters.architectures.decoder import activation_of
from exporters.architectures.plan import EMBEDDING, TABLE, VECTOR, BlockBuilder, BlockPlan, ModelPlan
from exporters.config import Settings
from exporters.encoder import Pooling


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """The one shape of BERT; `model_type` names it."""

    model_type: str

    def plan(self, settings: Settings, pooling: Pooling | None = None) -> ModelPlan:
        """Raises ExportError for relative positions and decoders, which share BERT's config but not its shape."""
        if settings.text("position_embedding_type", "absolute") != "absolute" or settings.flag("is_decoder"):
            raise ExportError(
                "config.json: only BERT encoders with absolute positions are supported",
                hint="export another checkpoint of this family",
            )
        return ModelPlan(
            family=self.model_type,
            kind="encoder",
            hidden_size=settings.positive("hidden_size"),
            vocab_size=settings.positive("vocab_size"),
            max_context_tokens=settings.positive("max_position_embeddings"),
            kv_width=settings.heads * settings.head_dim,
            embedding=_embedding(settings),
            layers=tuple(_layer(settings, index) for index in range(settings.positive("num_hidden_layers"))),
            head=_head(pooling or Pooling()),
        )


BERT = EncoderFamily("bert")


def _spellings(full_name: str) -> tuple[str, ...]:
    """Bare or below a task model's "bert."; the parts of norms were once called gamma and beta."""
    old = full_name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return tuple(dict.fromkeys(prefix + name for name in (full_name, old) for prefix in ("", "bert.")))


class _Builder(BlockBuilder):
    """A block of BERT, with its kind of norm."""

    def __init__(self, name: str, path: str, prefix: str) -> None:
        super().__init__(name, path, prefix, _spellings)

    def norm(self, value: str, name: str, settings: Settings, output: str = "") -> str:
        shape = (settings.positive("hidden_size"),)
        return self.add(
            "layer_norm",
            name.replace(".", "/"),
            (value,),
            output=output,
            weights={
                "weight": self.tensor(f"{name}.weight", VECTOR, shape),
                "bias": self.tensor(f"{name}.bias", VECTOR, shape),
            },
            epsilon=settings.number("layer_norm_eps", 1e-12),
        )


def _embedding(settings: Settings) -> BlockPlan:
    builder = _Builder("embedding", "/embeddings", "embeddings.")
    hidden = settings.positive("hidden_size")
    tables = (
        ("weight", "word_embeddings", EMBEDDING, settings.positive("vocab_size")),
        ("position", "position_embeddings", TABLE, settings.positive("max_position_embeddings")),
        ("token_type", "token_type_embeddings", TABLE, settings.positive("type_vocab_size", 2)),
    )
    weights = {
        slot: builder.tensor(f"{name}.weight", role, (rows, hidden)) for slot, name, role, rows in tables
    }
    value = builder.add("embedding", "word_embeddings", (), weights=weights, factor=1.0)
    builder.norm(value, "LayerNorm", settings, output="hidden")
    return builder.block()


def _layer(settings: Settings, index: int) -> BlockPlan:
    builder = _Builder(f"layers.{index}", f"/encoder/layers.{index}", f"encoder.layer.{index}.")
    hidden, wide = settings.positive("hidden_size"), settings.positive("intermediate_size")
    projections = tuple(
        builder.linear("hidden", f"attention.self.{name}", (hidden, hidden), bias=True)
        for name in ("query", "key", "value")
    )
    attended = builder.add(
        "attention",
        "attention/self/attention",
        projections,
        heads=settings.heads,
        kv_heads=settings.heads,
        head_dim=settings.head_dim,
        scale=float(settings.head_dim**-0.5),
        rope="",
        window=0,
        softcap=0.0,
        causal=False,
        norm_epsilon=0.0,
    )
    value = builder.linear(attended, "attention.output.dense", (hidden, hidden), bias=True)
    value = builder.add("add", "attention/output/add", (value, "hidden"))
    residual = builder.norm(value, "attention.output.LayerNorm", settings)
    value = builder.linear(residual, "intermediate.dense", (wide, hidden), bias=True)
    value = builder.add(activation_of(settings, "gelu"), "intermediate/act", (value,))
    value = builder.linear(value, "output.dense", (hidden, wide), bias=True)
    value = builder.add("add", "output/add", (value, residual))
    builder.norm(value, "output.LayerNorm", settings, output="hidden")
    return builder.block()


def _head(pooling: Pooling) -> BlockPlan:
    builder = BlockBuilder("head", "", "")
    builder.add(
        "pool", "pooling", ("hidden",), output="hidden", mode=pooling.mode, normalize=pooling.normalize
    )
    return builder.block()
