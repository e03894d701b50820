"""Fused element-wise steps of a forward without gradients: Triton on a GPU, plain torch elsewhere.

Every function has a plain twin, `NAME_reference`, of the same signature; tests compare the two on a GPU. The libraries'
matrix products, attention and scan run between the kernels. On a CPU `state_space` has the scan, too.
"""
