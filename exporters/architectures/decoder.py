"""The shape that all supported decoders share; a family file says where its own differs.

    hidden -> norm -> q, k, v -> attention -> o [-> norm] -> + hidden -> norm -> mlp or experts [-> norm] -> + -> hidden

Knows: that shape. Does not know: any family by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.errors import ExportError
from exporters.architectures.plan import (
    EMBEDDING,
    HEAD,
    LINEAR,
    ROUTER,
    SHARED_KEY_VALUE,
    VECTOR,
    BlockBuilder,
    BlockPlan,
    ExpertNames,
    ExpertsPlan,
    ModelPlan,
)
from exporters.config import Settings
from exporters.rope import max_context_tokens, rope_of

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EMBEDDING_TENSOR = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Experts:
    """A family's mixture-of-experts layers."""

    intermediate: str  # the config key of an expert's width
    names: ExpertNames  # below "model.layers.N."
    router: tuple[str, ...] = ("mlp.gate",)  # spellings
    top_k_default: int = 2
    always_normalize: bool = False  # otherwise `norm_topk_prob` decides
    softmax_after: bool = False


def no_windows(settings: Settings) -> tuple[int, ...]:
    return (0,) * settings.layers


def _never(settings: Settings) -> bool:
    return False


def _is_sparse(settings: Settings, layer: int) -> bool:
    return True


def _inverse_sqrt_head_dim(settings: Settings) -> float:
    return float(settings.head_dim**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFamily:
    """What a decoder family adds to the common shape."""

    model_type: str
    norm_epsilon: float = 1e-6  # where config.json has none
    rope_theta: float = 1e4  # where config.json has none
    tied: bool = False  # where config.json does not say
    qkv_bias: Callable[[Settings], bool] = _never
    output_bias: Callable[[Settings], bool] = _never
    mlp_bias: Callable[[Settings], bool] = _never
    query_key_norm: str = ""  # "": none; "head": one weight per head entry; "row": over the whole projection
    fused_projections: bool = False  # checkpoints hold qkv_proj and gate_up_proj
    sandwich_norms: bool = False  # a norm after attention and after the mlp as well
    norm_offset: float = 0.0  # checkpoints hold w - offset
    embedding_factor: Callable[[Settings], float] = lambda settings: 1.0
    attention_scale: Callable[[Settings], float] = _inverse_sqrt_head_dim
    attention_softcap: str = ""  # config keys
    final_softcap: str = ""
    activation: str = "silu"  # where config.json has none
    windows: Callable[[Settings], tuple[int, ...]] = no_windows
    experts: Experts | None = None
    is_sparse: Callable[[Settings, int], bool] = _is_sparse
    unsupported: tuple[str, ...] = ()  # config keys that must be absent, null or false

    def plan(self, settings: Settings) -> ModelPlan:
        """Raises ExportError where config.json asks for something this family's declaration has no answer to."""
        _check(self, settings)
        windows = self.windows(settings)
        layers = tuple(
            _Layer(self, settings, index, windows[index]).build() for index in range(settings.layers)
        )
        return ModelPlan(
            family=self.model_type,
            kind="generator",
            hidden_size=settings.positive("hidden_size"),
            vocab_size=settings.positive("vocab_size"),
            max_context_tokens=max_context_tokens(settings),
            kv_width=settings.kv_heads * settings.head_dim,
            embedding=_embedding(self, settings),
            layers=layers,
            head=_head(self, settings),
            ropes={"main": rope_of(settings, self.rope_theta)},
        )


def activation_of(settings: Settings, default: str) -> str:
    name = settings.text("hidden_act", default)
    if name not in ACTIVATIONS:
        raise ExportError(
            f"config.json: the activation {name[:40]!r} is not supported",
            hint=f"supported: {', '.join(sorted(ACTIVATIONS))}",
        )
    return ACTIVATIONS[name]


def _check(family: DecoderFamily, settings: Settings) -> None:
    for key in family.unsupported:
        if settings.get(key):
            raise ExportError(
                f"config.json: {key} = {settings.get(key)} is not supported for {family.model_type}",
                hint="export another checkpoint of this family",
            )
    if settings.heads == 0 or settings.kv_heads == 0 or settings.heads % settings.kv_heads:
        raise ExportError(
            f"config.json: {settings.heads} attention heads do not divide among {settings.kv_heads} key-value heads",
            hint="download config.json again",
        )
    settings.positive("num_hidden_layers")


def _embedding(family: DecoderFamily, settings: Settings) -> BlockPlan:
    builder = BlockBuilder("embedding", "/model", "model.")
    shape = (settings.positive("vocab_size"), settings.positive("hidden_size"))
    weight = builder.tensor("embed_tokens.weight", EMBEDDING, shape)
    builder.add(
        "embedding",
        "embed_tokens",
        (),
        output="hidden",
        weights={"weight": weight},
        factor=family.embedding_factor(settings),
    )
    return builder.block()


def _head(family: DecoderFamily, settings: Settings) -> BlockPlan:
    builder = BlockBuilder("head", "", "")
    hidden, vocab = settings.positive("hidden_size"), settings.positive("vocab_size")
    norm = builder.tensor("model.norm.weight", VECTOR, (hidden,), offset=family.norm_offset)
    value = builder.add(
        "rms_norm",
        "model/norm",
        ("hidden",),
        weights={"weight": norm},
        epsilon=settings.number("rms_norm_eps", family.norm_epsilon),
    )
    tied = settings.flag("tie_word_embeddings", family.tied)
    cap = settings.number(family.final_softcap, 0.0) if family.final_softcap else 0.0
    output = "logits" if cap else "hidden"
    weight = _EMBEDDING_TENSOR if tied else builder.tensor("lm_head.weight", HEAD, (vocab, hidden))
    value = builder.add("linear", "lm_head", (value,), output=output, weights={"weight": weight})
    if cap:
        builder.add("softcap", "softcap", (value,), output="hidden", cap=cap)
    return builder.block(*(["embedding"] if tied else []))


class _Layer:
    """Builds one decoder layer."""

    def __init__(self, family: DecoderFamily, settings: Settings, index: int, window: int) -> None:
        self.family = family
        self.settings = settings
        self.index = index
        self.window = window
        self.hidden = settings.positive("hidden_size")
        self.epsilon = settings.number("rms_norm_eps", family.norm_epsilon)
        self.builder = BlockBuilder(f"layers.{index}", f"/model/layers.{index}", f"model.layers.{index}.")

    def build(self) -> BlockPlan:
        sandwich = self.family.sandwich_norms
        value = self._attention(self._norm("hidden", "input_layernorm"))
        if sandwich:
            value = self._norm(value, "post_attention_layernorm")
        residual = self.builder.add("add", "attention_residual", ("hidden", value))
        value = self._norm(residual, "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm")
        value = self._feed_forward(value)
        if sandwich:
            value = self._norm(value, "post_feedforward_layernorm")
        self.builder.add("add", "mlp_residual", (residual, value), output="hidden")
        return self.builder.block()

    def _norm(self, value: str, name: str) -> str:
        weight = self.builder.tensor(f"{name}.weight", VECTOR, (self.hidden,), offset=self.family.norm_offset)
        return self.builder.add("rms_norm", name, (value,), weights={"weight": weight}, epsilon=self.epsilon)

    def _attention(self, value: str) -> str:
        family, settings, builder = self.family, self.settings, self.builder
        heads, kv_heads, width = settings.heads, settings.kv_heads, settings.head_dim
        softcap = settings.number(family.attention_softcap, 0.0) if family.attention_softcap else 0.0
        attended = builder.add(
            "attention",
            "self_attn/attention",
            self._projections(value),
            weights=self._query_key_norms(),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width,
            scale=family.attention_scale(settings),
            rope="main",
            window=self.window,
            softcap=softcap,
            causal=True,
            norm_epsilon=self.epsilon,
        )
        return builder.linear(
            attended, "self_attn.o_proj", (self.hidden, heads * width), bias=family.output_bias(settings)
        )

    def _projections(self, value: str) -> tuple[str, ...]:
        settings, builder = self.settings, self.builder
        query, key = settings.heads * settings.head_dim, settings.kv_heads * settings.head_dim
        shared = SHARED_KEY_VALUE if settings.kv_heads < settings.heads else LINEAR
        if self.family.fused_projections:
            stored = (query + 2 * key, self.hidden)
            parts = (
                ("q_proj", 0, query, LINEAR),
                ("k_proj", query, key, shared),
                ("v_proj", query + key, key, shared),
            )
            return tuple(
                builder.part_of(value, f"self_attn.{name}", "self_attn.qkv_proj", stored, first, rows, role)
                for name, first, rows, role in parts
            )
        bias = self.family.qkv_bias(settings)
        return tuple(
            builder.linear(value, f"self_attn.{name}", (rows, self.hidden), bias=bias, role=role)
            for name, rows, role in (
                ("q_proj", query, LINEAR),
                ("k_proj", key, shared),
                ("v_proj", key, shared),
            )
        )

    def _query_key_norms(self) -> dict[str, str]:
        if not self.family.query_key_norm:
            return {}
        whole_row = self.family.query_key_norm == "row"
        counts = {
            "q_norm": self.settings.heads if whole_row else 1,
            "k_norm": self.settings.kv_heads if whole_row else 1,
        }
        return {
            slot: self.builder.tensor(f"self_attn.{slot}.weight", VECTOR, (count * self.settings.head_dim,))
            for slot, count in counts.items()
        }

    def _feed_forward(self, value: str) -> str:
        experts = self.family.experts
        if experts is not None and self.family.is_sparse(self.settings, self.index):
            return self._experts(value, experts)
        return self._mlp(value)

    def _mlp(self, value: str) -> str:
        builder, hidden = self.builder, self.hidden
        wide = self.settings.positive("intermediate_size")
        bias = self.family.mlp_bias(self.settings)
        if self.family.fused_projections:
            stored = (2 * wide, hidden)
            gate = builder.part_of(value, "mlp.gate_proj", "mlp.gate_up_proj", stored, 0, wide)
            up = builder.part_of(value, "mlp.up_proj", "mlp.gate_up_proj", stored, wide, wide)
        else:
            gate = builder.linear(value, "mlp.gate_proj", (wide, hidden), bias=bias)
            up = builder.linear(value, "mlp.up_proj", (wide, hidden), bias=bias)
        activated = builder.add(activation_of(self.settings, self.family.activation), "mlp/act", (gate,))
        product = builder.add("mul", "mlp/mul", (activated, up))
        return builder.linear(product, "mlp.down_proj", (hidden, wide), bias=bias)

    def _experts(self, value: str, experts: Experts) -> str:
        settings, builder = self.settings, self.builder
        count = settings.positive("num_experts")
        activation = activation_of(settings, self.family.activation)
        if activation != "silu":
            raise ExportError(f"experts with the activation {activation} are not supported")
        top_k = settings.positive("num_experts_per_tok", experts.top_k_default)
        if top_k > count:
            raise ExportError(
                f"config.json: {top_k} experts are used of {count}", hint="download config.json again"
            )
        logits = builder.linear(
            value, "mlp.gate", (count, self.hidden), role=ROUTER, spellings=experts.router
        )
        plan = ExpertsPlan(
            f"{builder.prefix}mlp.experts",
            _below(experts.names, builder.prefix),
            count,
            self.hidden,
            settings.positive(experts.intermediate),
        )
        return builder.add(
            "experts",
            "mlp/experts",
            (value, logits),
            weights={"experts": builder.experts(plan)},
            experts=count,
            top_k=top_k,
            normalize=experts.always_normalize or settings.flag("norm_topk_prob"),
            softmax_after=experts.softmax_after,
            activation=activation,
        )


def _below(names: ExpertNames, prefix: str) -> ExpertNames:
    return ExpertNames(
        prefix + names.gate,
        prefix + names.up,
        prefix + names.down,
        prefix + names.fused_gate_up,
        prefix + names.fused_down,
    )
