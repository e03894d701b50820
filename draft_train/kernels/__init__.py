"""Fused steps of the draft's forward and backward pass: Triton on a GPU, plain torch elsewhere.

Every function has a plain twin, `NAME_reference`, of the same signature; tests compare the two on a GPU, and the twins
with autograd on the CPU. Nothing here uses atomics: results are the same bits every time.
"""
