"""Kernels for GPUs, written in Triton; whoever calls one has a way in torch that gives the same."""
