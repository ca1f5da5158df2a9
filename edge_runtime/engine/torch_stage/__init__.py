"""The torch executor: stages on a CUDA device, or in plain torch on the CPU as a reference.

A block's operations are interpreted one by one; linear layers, norms, attention and experts are Triton programs on a
GPU (`edge_kernels.triton`). Only this package and those kernels import torch.
"""
