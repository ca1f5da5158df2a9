#include "lanes_neon.hpp"
// (order matters: the lanes, then what is written in terms of them)
#include "lanes_math.hpp"

#include "attention_kernel.hpp"
#include "experts_kernel.hpp"
#include "nested_lanes.hpp"
// (after experts_kernel.hpp and its lanes)
#include "nested_kernel.hpp"
#include "linear_lanes_neon.hpp"
// (after its lanes)
#include "linear_kernel.hpp"
#include "row_kernel.hpp"
#include "sampling_kernel.hpp"
#include "blake3_kernel.hpp"

const edge::KernelTable edge::kNeonDotKernels = {
    "neon_dot",        attend,         quantize_int8, quantize_int4, multiply<Int8>,
    multiply<Int4>, multiply_fp32, silu_multiply, accumulate,
    linear<PartInt8>, linear<PartInt4>, linear_fp32, quantize_row, row_operation,
    exp_all,        uniform_all,
    quantize_nested<HighPlane>, quantize_nested<BothPlanes>, multiply_nested<HighPlane>, multiply_nested<BothPlanes>,
    quantize_nested<AllPlanes>, multiply_nested<AllPlanes>,
    blake3_chunks,  blake3_parents,
};
