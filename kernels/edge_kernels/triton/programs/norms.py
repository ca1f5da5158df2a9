"""Norms: one program per row (or head of a row), its sum one fixed tree."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, epsilon, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    inside = i < WIDTH
    value = tl.load(x + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(value * value) / WIDTH
    scaled = value / tl.sqrt(mean_square + epsilon) * tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + i, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm(
    x, weight, bias, out, epsilon, WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    inside = i < WIDTH
    value = tl.load(x + row * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value) / WIDTH, 0.0)
    variance = tl.sum(centred * centred) / WIDTH
    scaled = centred / tl.sqrt(variance + epsilon) * tl.load(weight + i, mask=inside, other=0.0)
    if HAS_BIAS:
        scaled += tl.load(bias + i, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + i, scaled.to(out.dtype.element_ty), mask=inside)
