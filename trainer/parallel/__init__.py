"""Parallelism, applied to a model from outside; the only place that knows meshes and process groups.

mesh         the processes of a run: rank, device, mesh, and the few host-side reductions
parallelize  the one order in which everything is applied
fsdp         fully sharded data parallelism and mixed precision
"""
