"""The kernels of a torch stage: linear layers, norms, paged attention and experts on a GPU, in Triton.

`kernels` and `reference` offer the same functions. `kernels` launches Triton programs, on a CUDA device or in Triton's
interpreter; `reference` is plain torch in float32, one row at a time, and says what they compute.

In the programs every tile has a fixed shape and every sum a fixed order, chosen by the weight's shape or by absolute
position and never by how many rows there are: a row's bits do not depend on its neighbours.

Knows: tensors and arithmetic. Does not know: bundles, stages, sessions. Needs torch; imported by nobody else here.
"""
