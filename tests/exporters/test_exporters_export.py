"""Exporting the demo model and small files: quality, atomicity, bounded memory, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.signing import BundleSigningKey
from edge_runtime.errors import ExportError, UsageError
from exporters.export import ExportOptions, export_bundle
from exporters.sensitivity import round_activations
from tests.support.tiny_checkpoints import byte_tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "models" / "moe"
QUICK = ExportOptions(weights="int8", calibration_tokens=64)


def tiny_llama(directory: Path, **changes: Any) -> Path:
    """A Llama of two layers, written by hand."""
    config = {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 257,
        "eos_token_id": [258, 256],
        "tie_word_embeddings": True,
    } | changes
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (260, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (64,),
            prefix + "post_attention_layernorm.weight": (64,),
        }
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (64, 64) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (32, 64) for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (96, 64) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (64, 96)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    byte_tokenizer(bos=True).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny-llama")


def rewrite(checkpoint: Path, change: Any) -> None:
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, checkpoint / "model.safetensors")


def test_a_bundle_says_what_it_is(checkpoint: Path, tmp_path: Path) -> None:
    key = BundleSigningKey.generate()
    report = export_bundle(checkpoint, tmp_path / "b", ExportOptions("int8", signing_key=key))
    bundle = Bundle.open(report.path, trusted={key.public_bytes})
    bundle.verify()
    model = bundle.manifest.model
    assert (model.name, model.family, model.weights) == ("tiny-llama", "llama", "int8")
    assert (model.eos_ids, model.bos_id, model.add_bos) == ((258, 256), 257, True)
    assert model.kv_bytes_per_token_per_layer == 2 * 4 * 32
    assert bundle.digest == report.digest
    assert bundle.manifest.quality == report.quality
    assert bundle.manifest.head.slices == ("embedding", "head")  # tied
    assert {layer.slices for layer in bundle.manifest.layers} == {("layers.0",), ("layers.1",)}
    formats = {name: tensor.format for name, tensor in bundle.manifest.tensors.items()}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int8"
    assert formats["model.layers.0.input_layernorm.weight"] == "fp32"


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    reports = [export_bundle(checkpoint, tmp_path / name, QUICK) for name in ("one", "two")]
    assert reports[0].digest == reports[1].digest


def test_int4_keeps_what_decides_at_8_bits(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions("int4", calibration_tokens=64, max_error=0.9)
    manifest = Bundle.open(export_bundle(checkpoint, tmp_path / "b", options).path).manifest
    formats = {name.removeprefix("model."): tensor.format for name, tensor in manifest.tensors.items()}
    assert formats["embed_tokens.weight"] == "int8"
    assert formats["layers.0.self_attn.k_proj.weight"] == "int8"
    assert formats["layers.0.self_attn.q_proj.weight"] == "int4"


def test_a_matrix_that_rounding_hurts_stays_exact(checkpoint: Path, tmp_path: Path) -> None:
    def add_outlier(tensors: dict[str, np.ndarray]) -> None:
        # One input channel a thousand times the others of its block: int8 activations lose the others.
        tensors["model.layers.1.input_layernorm.weight"][5] *= 1000
        tensors["model.layers.1.self_attn.q_proj.weight"][:, 5] = 0

    rewrite(checkpoint, add_outlier)
    report = export_bundle(checkpoint, tmp_path / "b", ExportOptions("int8", calibration_tokens=256))
    assert "model.layers.1.self_attn.q_proj.weight" in report.kept_fp32
    assert "model.layers.0.self_attn.q_proj.weight" not in report.kept_fp32
    tensors = Bundle.open(report.path).manifest.tensors
    assert tensors["model.layers.1.self_attn.q_proj.weight"].format == "fp32"


def test_an_interrupt_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "bundle"

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint, target, QUICK, interrupt)
    assert list(target.parent.iterdir()) == []


def test_an_older_bundle_is_replaced_only_by_a_whole_one(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    first = export_bundle(checkpoint, target, QUICK)
    rewrite(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ExportError, match=r"tensor model\.norm\.weight of shape \[64\] is missing"):
        export_bundle(checkpoint, target, QUICK)
    assert Bundle.open(target).digest == first.digest
    second = export_bundle(tiny_llama(tmp_path / "other", rope_theta=99.0), target, QUICK)
    assert Bundle.open(target).digest == second.digest != first.digest
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-llama", "other", "bundle"}


def test_a_directory_of_something_else_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        export_bundle(checkpoint, tmp_path / "photos", QUICK)
    with pytest.raises(UsageError, match="unknown weights 'int2'"):
        export_bundle(checkpoint, tmp_path / "b", ExportOptions("int2"))


def test_a_wrong_shape_names_tensor_file_and_both_shapes(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.zeros((96, 63), np.float32)}))
    with pytest.raises(ExportError) as caught:
        export_bundle(checkpoint, tmp_path / "b", QUICK)
    message = caught.value.message
    assert all(part in message for part in (name, "model.safetensors", "[96, 63]", "[96, 64]"))
    assert caught.value.hint


def test_undefined_values_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = np.nan

    rewrite(checkpoint, damage)
    with pytest.raises(ExportError, match="infinite or undefined"):
        export_bundle(checkpoint, tmp_path / "b", QUICK)


def test_a_tokenizer_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(DEMO / "tokenizer.json", checkpoint / "tokenizer.json")
    with pytest.raises(ExportError, match=r"but config\.json has a vocabulary of 260"):
        export_bundle(checkpoint, tmp_path / "b", QUICK)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"has no tokenizer\.json"):
        export_bundle(checkpoint, tmp_path / "b", QUICK)


def test_int8_activations_are_rounded_by_block() -> None:
    x = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    x[:, 40] = 1000.0
    rounded = round_activations(x)
    assert np.abs(rounded - x)[:, :32].max() < 0.02
    assert np.abs(rounded - x)[:, 32:64].max() > 0.5
    assert rounded.shape == x.shape


@pytest.mark.export
@pytest.mark.parametrize(
    ("weights", "agreement"), [("int8", 0.97), ("int4", 0.87), ("nested4", 0.87), ("nested8", 0.96)]
)
def test_the_demo_model_exports_from_the_command_line(tmp_path: Path, weights: str, agreement: float) -> None:
    command = [sys.executable, "-m", "edge_runtime.cli", "export", str(DEMO), str(tmp_path / "b")]
    done = subprocess.run(
        [*command, "--weights", weights, "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["quality"]["top1_agreement"] >= agreement
    assert report["quality"]["perplexity_ratio"] <= 1.01
    assert "100%" in done.stderr
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.model.name == "moe"
    assert manifest.prefix_bits == {"nested4": (2,), "nested8": (2, 4)}.get(weights, ())
    if manifest.prefix_bits:  # worse with the first plane alone, and still a model
        assert 1.01 < report["quality"]["perplexity_2_bits"] / report["quality"]["perplexity"] < 1.3
    if weights == "nested8":
        assert report["quality"]["perplexity_4_bits"] / report["quality"]["perplexity"] < 1.01


PEAK = """
import sys
from pathlib import Path
import edge_runtime.engine.onnx, exporters.export as export
export.export_bundle(sys.argv[1], sys.argv[2], export.ExportOptions(sys.argv[3], calibration_tokens=64))
# Not ru_maxrss: a child's starts at what its parent held when it forked.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.export
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_memory_stays_below_twice_the_largest_tensor_and_512_mib(tmp_path: Path, weights: str) -> None:
    """A bfloat16 checkpoint of half a GiB with a 256 MiB embedding: nothing may hold all of it as float32 twice."""
    directory = tmp_path / "large"
    largest_bytes = large_llama(directory)
    command = [sys.executable, "-c", PEAK, str(directory), str(tmp_path / "b"), weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak_bytes = int(done.stdout.splitlines()[-1]) << 10
    assert peak_bytes <= 2 * largest_bytes + (512 << 20)


def large_llama(directory: Path, layers: int = 3) -> int:
    """Bytes of its largest tensor. Values repeat: only their number matters here."""
    hidden, vocab, wide = 2048, 65536, 5632
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": [512, hidden] for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": [wide, hidden] for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": [hidden, wide]}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.02
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer(bos=False).save(str(directory / "tokenizer.json"))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            file.write(block[: min(offset, len(block))])
            offset -= len(block)
    return 2 * vocab * hidden
