"""Triton's own compiler takes every program, for GPUs this machine need not have: cubins of sm_80 and sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: in this one, programs are interpreted.
SCRIPT = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edge_kernels.triton.programs import attention, experts, matmul, norms

POINTERS = {"data": "*u8", "buffer": "*u8"}
for name in ("positions", "sequence", "block_tables", "lengths", "tiles", "order", "ids"):
    POINTERS[name] = "*i32"
for name in ("scales", "bias", "parts", "weight", "cos", "sin", "q_norm", "k_norm", "sums", "stats", "floats", "gates"):
    POINTERS[name] = "*fp32"
WIDTHS = ("N", "K", "hidden", "intermediate", "stride_bytes", "page_stride", "layer_offset", "values_offset")
FLOATS = {"epsilon", "scale", "softcap"}
OPERANDS = {"bf16": tl.bfloat16, "fp32": tl.float32}


def compiled(program, rows, capability, constants):
    operand = OPERANDS["fp32" if constants.get("BITS") == 32 else rows]  # fp32 weights are multiplied in fp32
    constants = {k: operand if k in ("DOT", "OPERAND") else v for k, v in constants.items()}
    signature = {}
    for name in program.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in ("x", "q", "k", "v", "q_out", "pool", "out", "inner", "logits"):
            signature[name] = "*" + rows
        else:
            signature[name] = "i32"
    if constants.get("BITS") == 32 and "data" in signature:
        signature["data"] = "*fp32"
    indexed = {(program.arg_names.index(k),): v for k, v in constants.items()}
    # What a launch finds out by itself: tensors, widths and offsets are multiples of 16.
    even = [n for n in program.arg_names if signature[n].startswith("*") or n in WIDTHS or n.endswith("_at")]
    attributes = {(program.arg_names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(fn=program, signature=signature, constexprs=indexed, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = made.asm["ptx"]
    wanted = "OPERAND" in constants and operand == tl.bfloat16
    return {"cubin": len(made.asm["cubin"]), "tensor_core": "mma" in ptx, "ahead": "cp.async" in ptx, "wanted": wanted}


TILE = dict(TILE_M=16, TILE_N=64, DOT=None, OPERAND=None)
PREPARE = dict(HEADS=32, KV_HEADS=8, D=128, D_PADDED=128, HALF=64, HALF_PADDED=64, PAGE=32)
ATTEND = dict(
    KV_HEADS=8, GROUP=4, GROUP_PADDED=4, TILE_M=16, D=128, D_PADDED=128, PAGE=32, SPLIT_PAGES=16, DOT=None, OPERAND=None
)
CASES = [
    ("norms.rms_norm", dict(WIDTH=2048, PADDED=2048)),
    ("norms.layer_norm", dict(WIDTH=384, PADDED=512, HAS_BIAS=True)),
]
for bits in (4, 8, 32):
    CASES.append(("matmul.multiply", dict(BITS=bits, SPLIT_BLOCKS=8, HAS_BIAS=True, **TILE)))
    CASES.append(("experts.open_up", dict(BITS=bits, TOP_K=8, **TILE)))
    CASES.append(("experts.close_down", dict(BITS=bits, **TILE)))
CASES.append(("matmul.add_splits", dict(SPLITS=4, HAS_BIAS=True, TILE_N=512)))
CASES.append(("attention.prepare", dict(HAS_Q_NORM=True, HAS_K_NORM=True, **PREPARE)))
for causal in (True, False):
    CASES.append(("attention.attend", dict(CAUSAL=causal, HAS_SOFTCAP=causal, **ATTEND)))
    CASES.append(("attention.combine", dict(HEADS=32, D=128, D_PADDED=128, SPLIT_TOKENS=512, CAUSAL=causal)))
for chosen in (True, False):
    CASES.append(("experts.route", dict(EXPERTS=60, PADDED=64, TOP_K=4, OF_CHOSEN=chosen)))
CASES.append(("experts.mix", dict(TOP_K=4, TILE_N=512)))

rooms = {"attention": attention, "experts": experts, "matmul": matmul, "norms": norms}
for name, constants in CASES:
    room, program = name.split(".")
    for rows in ("bf16", "fp32"):
        found = compiled(getattr(rooms[room], program), rows, int(sys.argv[1]), constants)
        print(json.dumps({"program": name, "rows": rows, **found}))
"""


@pytest.mark.export  # slow: the real compiler, some twenty programs
@pytest.mark.parametrize("capability", [80, 90])
def test_every_program_compiles(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # never a cubin of another time
    command = [sys.executable, "-c", SCRIPT, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({one["program"] for one in made}) == 11
    for one in made:
        assert one["cubin"] > 0
        assert (one["tensor_core"] and one["ahead"]) or not one["wanted"], (
            one
        )  # weights and KV are fetched ahead
