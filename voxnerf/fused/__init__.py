"""The fused ray march: Warp kernels, how they are launched, and what they save in memory and in the optimizer.

`march` is the entry, and computes what `voxnerf/reference.py` computes. `kernels` holds the kernels, `launch` runs
them on threads or on a GPU, `flags` finds empty space, `memory` recycles memory, and `adam` is an optimizer for sparse
fields.
"""
