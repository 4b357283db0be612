"""Parallelism, applied to a model from outside; the only place that knows meshes and process groups.

mesh         the processes of a run: rank, device, the axes of the mesh, and the few host-side reductions
check        whether a model, a data set and a layout go together
parallelize  the one order in which everything is applied
pipeline     consecutive layers on consecutive ranks
tensor       the decoder's products divided by heads, width and vocabulary
context      the positions of a pack divided, keys and values gathered; vision rows divided
recompute    what backward needs of a layer: kept, or computed again
fsdp         fully sharded data parallelism, replicas, mixed precision
"""
