"""Fused operations of a draft's forward and backward pass: Triton kernels on a GPU, plain torch elsewhere.

Every function has a plain twin, `NAME_reference`, of the same signature. Tests compare the two on a GPU, and the twins
with autograd on the CPU. No kernel uses atomics, so results are the same bits every time.
"""
