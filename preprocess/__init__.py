"""Stage 1: raw data sets -> finished packs. Only `ray_job` imports ray; every step also runs in one process."""
