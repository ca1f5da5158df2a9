"""Configs in, plans out: both dialects, rotary schemes, and refusals that name what is not supported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import ExportError
from exporters.architectures import FAMILIES, plan_model
from exporters.config import Settings
from exporters.rope import max_context_tokens, rope_of

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def attentions(config: dict[str, Any]) -> list[Any]:
    plan = plan_model(Settings(config))
    return [op for layer in plan.layers for op in layer.operations if op.kind == "attention"]


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ExportError, match="'gpt_oss' is not supported") as caught:
        plan_model(Settings({"model_type": "gpt_oss"}))
    assert all(family in caught.value.hint for family in FAMILIES)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "64", 0, -1, 2.5])
def test_a_bad_value_in_the_config_is_named(key: str, value: object) -> None:
    with pytest.raises(ExportError, match=key.replace("num_attention_heads", "attention")):
        plan_model(Settings(LLAMA | {key: value}))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ExportError, match="4 attention heads do not divide among 3"):
        plan_model(Settings(LLAMA | {"num_key_value_heads": 3}))


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 7}, [7, 7, 7, 7]),
        ({"model_type": "mistral", "sliding_window": None}, [0, 0, 0, 0]),
        ({"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 3}, [0, 0, 0, 0]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
            [0, 0, 0, 7],
        ),
        ({"model_type": "gemma2", "sliding_window": 7}, [7, 0, 7, 0]),
        (
            {
                "model_type": "gemma2",
                "sliding_window": 7,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            [0, 0, 0, 7],
        ),
    ],
)
def test_windows_are_where_the_family_has_them(config: dict[str, Any], windows: list[int]) -> None:
    assert [op.attributes["window"] for op in attentions(LLAMA | config)] == windows


def test_a_rope_in_either_dialect_is_the_same() -> None:
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    classic = {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **scaling}}
    newer = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **scaling}}
    assert rope_of(Settings(LLAMA | classic)) == rope_of(Settings(LLAMA | newer))


def test_an_unknown_rope_type_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="rope_type 'dynamic' is not supported") as caught:
        plan_model(Settings(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    assert "llama3" in caught.value.hint
    with pytest.raises(ExportError, match="need a number factor"):
        plan_model(Settings(LLAMA | {"rope_scaling": {"type": "linear"}}))


def test_longrope_stops_at_the_original_context() -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = LLAMA | {"rope_scaling": rope, "original_max_position_embeddings": 32}
    assert max_context_tokens(Settings(config)) == 32
    assert rope_of(Settings(config)).scale > 1
    with pytest.raises(ExportError, match="short_factor list of 8"):
        rope_of(Settings(config | {"rope_scaling": rope | {"short_factor": [1.0]}}))


def test_what_a_family_can_not_do_is_refused() -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ExportError, match="clip_qkv"):
        plan_model(Settings(LLAMA | moe | {"model_type": "olmoe", "clip_qkv": 8.0}))
    with pytest.raises(ExportError, match="5 experts are used of 4"):
        plan_model(Settings(LLAMA | moe | {"model_type": "olmoe", "num_experts_per_tok": 5}))
    with pytest.raises(ExportError, match="activation 'relu2'"):
        plan_model(Settings(LLAMA | {"hidden_act": "relu2"}))
    with pytest.raises(ExportError, match="absolute positions"):
        plan_model(Settings(LLAMA | {"model_type": "bert", "position_embedding_type": "relative_key"}))


def test_operations_are_named_by_layer_and_part() -> None:
    plan = plan_model(Settings(LLAMA))
    names = [op.name for block in plan.blocks for op in block.operations]
    assert "/model/layers.2/self_attn/q_proj" in names
    assert "/model/layers.0/mlp/act" in names
    assert len(set(names)) == len(names)


@pytest.mark.export
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "mscale": 1.2, "mscale_all_dim": 0.7},
        {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8, "factor": 4.0},
    ],
)
def test_rotary_tables_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 5000.0, **scaling}
    config = {key: value for key, value in LLAMA.items() if key != "model_type"}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config, rope_parameters=dict(parameters)))
    ours = rope_of(Settings(LLAMA | {"rope_parameters": parameters}))
    np.testing.assert_allclose(ours.inverse_frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert ours.scale == pytest.approx(theirs.attention_scaling)
