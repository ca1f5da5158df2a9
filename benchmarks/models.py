"""The models benchmarks run, in each program's own format; whatever is missing is made, once, in `.bench/`.

Knows: what a benchmark needs on disk and how to make it. Does not know: what is measured with it.
"""

from __future__ import annotations

import math
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import CACHE, LLAMA_1B, LLAMA_TINY, LlamaShape, checkpoint
from benchmarks.peers.environment import peers_python
from benchmarks.report import say

# Weights are random: there is nothing to calibrate, only files to write.
CALIBRATION_TOKENS = 8


@dataclass(frozen=True)
class Model:
    """A random Llama, with the sizes that a benchmark of it uses."""

    shape: LlamaShape
    rounds: int  # of interleaved runs
    decode_tokens: int
    decode_prompt_tokens: int
    prefill_tokens: int
    prefix_tokens: int
    prefix_new_tokens: int
    long_prompt_tokens: int
    load_session_tokens: int  # at most, of a session that decodes beside a long prefill
    load_alone_tokens: int  # of each session before that prefill begins
    load_closed_requests: int  # of the closed loop that says what the cluster can do
    load_requests: int  # of the open loop
    load_prompt_tokens: int
    load_new_tokens: int
    memory: str  # of a device that holds everything
    balanced: tuple[tuple[int, int], tuple[int, int]]  # layers of two equal devices: the head counts as two

    @property
    def name(self) -> str:
        return self.shape.name

    @property
    def parameters(self) -> int:
        total = self.shape.vocab_size * self.shape.hidden_size + self.shape.hidden_size
        for size in self.shape.layer_shapes().values():
            count = 1
            for length in size:
                count *= length
            total += self.shape.layers * count
        return total

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{self.name} (random, {self.parameters / 1e9:.3g} B parameters, {shape.layers} layers, "
            f"vocabulary {shape.vocab_size}, int4 block 32, embedding and head int8)"
        )

    def bundle(self) -> Path:
        """Ours: int4 in blocks of 32, head and embedding at 8 bits."""
        path = CACHE / f"{self.name}-int4"
        if (path / "manifest.sig").exists():
            return path
        source = self.checkpoint()
        say(f"exporting {path} (once)")
        from exporters.export import ExportOptions, export_bundle

        options = ExportOptions(
            weights="int4",
            name=self.name,
            calibration_tokens=CALIBRATION_TOKENS,
            max_error=math.inf,
            search_scales=False,
        )
        export_bundle(source, path, options, lambda what, done, total: say(f"{what} ({done}/{total})"))
        return path

    def gguf(self) -> Path:
        """llama.cpp's: Q4_0 with its 6-bit head."""
        path = CACHE / f"{self.name}-q4_0.gguf"
        if not path.exists():
            source = self.checkpoint()
            say(f"writing {path} (once)")
            writer = Path(__file__).parent / "peers" / "gguf_writer.py"
            subprocess.run(
                [str(peers_python()), str(writer), str(source), str(path)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        return path

    def checkpoint(self) -> Path:
        path = CACHE / self.name
        if not (path / "config.json").exists():
            say(f"writing the random checkpoint {path} (once)")
        return checkpoint(self.shape)


LARGE = Model(
    LLAMA_1B,
    rounds=4,
    decode_tokens=64,
    decode_prompt_tokens=16,
    prefill_tokens=512,
    prefix_tokens=1024,
    prefix_new_tokens=32,
    long_prompt_tokens=2048,
    load_session_tokens=2000,
    load_alone_tokens=100,
    load_closed_requests=28,
    load_requests=60,
    load_prompt_tokens=64,
    load_new_tokens=32,
    memory="3GiB",
    balanced=((0, 8), (9, 15)),
)
TINY = Model(
    LLAMA_TINY,
    rounds=1,
    decode_tokens=16,
    decode_prompt_tokens=8,
    prefill_tokens=96,
    prefix_tokens=128,
    prefix_new_tokens=32,
    long_prompt_tokens=256,
    load_session_tokens=4000,
    load_alone_tokens=20,
    load_closed_requests=24,
    load_requests=12,
    load_prompt_tokens=24,
    load_new_tokens=12,
    memory="512MiB",
    balanced=((0, 1), (2, 3)),
)
MODELS = {"llama-1b": LARGE, "tiny": TINY}
