"""What both stages must agree on, and nothing else: geometry, tokens, schema, shards, manifest, config.

`shared` imports neither `preprocess` nor `trainer`, and neither torch nor ray.
"""
