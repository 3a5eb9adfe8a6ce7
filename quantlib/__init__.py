"""Numerics, formats, checkpoints, planning and the steps of a block; runs without Ray and Prefect."""
