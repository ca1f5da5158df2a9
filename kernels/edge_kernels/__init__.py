"""Numbers in, numbers out: the kernels that run between compiled segments, each with a NumPy reference.

Knows: array layouts and arithmetic. Does not know: bundles, stages, sessions, files or threads of others.
"""

from edge_kernels._native import available_isas, isa, set_isa

__all__ = ["available_isas", "isa", "set_isa"]
