"""llama.cpp timed through its C API. Runs inside the peers' environment and stays loaded; JSON lines in and out.

`python llamacpp.py MODEL.gguf --threads 2 [--rpc 2]` greets with one object; then each line `{"what": "decode",
"prompt": 16, "tokens": 64}` or `{"what": "prefill", "prompt": 512}` is answered with `{"seconds": …}`. With `--rpc
N`, N of llama.cpp's own RPC servers are started on loopback, each with `--threads` threads, and hold all layers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


def rpc_library() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARIES / "libggml-rpc.so"))


def serve_rpc(port: int, threads: int) -> None:
    """One RPC server on the CPU backend; never returns."""
    cpu = ctypes.CDLL(str(LIBRARIES / "libggml-cpu.so"))
    base = ctypes.CDLL(str(LIBRARIES / "libggml-base.so"))
    rpc = rpc_library()
    cpu.ggml_backend_cpu_reg.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    device = base.ggml_backend_reg_dev_get(cpu.ggml_backend_cpu_reg(), 0)
    devices = (ctypes.c_void_p * 1)(device)
    start = rpc.ggml_backend_rpc_start_server
    start.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_void_p),
    ]
    start(f"127.0.0.1:{port}".encode(), None, threads, 1, devices)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rpc_servers(count: int, threads: int) -> list[int]:
    context = multiprocessing.get_context("spawn")
    ports = [free_port() for _ in range(count)]
    for port in ports:
        context.Process(target=serve_rpc, args=(port, threads), daemon=True).start()
    deadline = time.monotonic() + 30
    for port in ports:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    return ports


def rpc_devices(ports: list[int]) -> ctypes.Array[Any]:
    """A NULL-terminated device list for the model's parameters."""
    rpc = rpc_library()
    base = ctypes.CDLL(str(LIBRARIES / "libggml-base.so"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found = []
    for port in ports:
        registry = rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())
        found.append(base.ggml_backend_reg_dev_get(registry, 0))
    return (ctypes.c_void_p * (len(found) + 1))(*found, None)


def load(path: str, ports: list[int]) -> Any:
    parameters = llama_cpp.llama_model_default_params()
    if ports:
        devices = rpc_devices(ports)  # must outlive the call
        parameters.devices = ctypes.cast(devices, ctypes.c_void_p)
        parameters.n_gpu_layers = 999
    else:
        parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        raise SystemExit("llama.cpp could not load the model")
    return model


class Timer:
    """One context, its KV cleared before each measurement."""

    def __init__(self, model: ctypes.c_void_p, threads: int, context_tokens: int) -> None:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = context_tokens, 2048, 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def run(self, ids: list[int]) -> int:
        """Decode a batch at the end of the sequence and return the greedy next id."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def prefill_seconds(self, ids: list[int]) -> float:
        self.clear()
        begin = time.perf_counter()
        self.run(ids)
        return time.perf_counter() - begin

    def decode_seconds(self, prompt: list[int], count: int) -> float:
        """Seconds that `count` tokens took after the prompt, chosen greedily."""
        self.clear()
        token = self.run(prompt)
        begin = time.perf_counter()
        for _ in range(count):
            token = self.run([token])
        return time.perf_counter() - begin


def answer(timer: Timer, question: dict[str, Any], rng: np.random.Generator) -> dict[str, float]:
    ids = [int(i) for i in rng.integers(3, timer.vocab_size, question["prompt"])]
    if question["what"] == "prefill":
        return {"seconds": timer.prefill_seconds(ids)}
    return {"seconds": timer.decode_seconds(ids, question["tokens"])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rpc", type=int, default=0)
    arguments = parser.parse_args()
    llama_cpp.llama_backend_init()
    ports = start_rpc_servers(arguments.rpc, arguments.threads)
    model = load(arguments.model, ports)
    timer = Timer(model, arguments.threads, arguments.context)
    rng = np.random.default_rng(1)
    timer.run(list(range(3, 11)))  # pages the weights in
    tell({"program": f"llama-cpp-python {llama_cpp.__version__}", "rpc_servers": arguments.rpc})
    for line in sys.stdin:
        tell(answer(timer, json.loads(line), rng))


def tell(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
