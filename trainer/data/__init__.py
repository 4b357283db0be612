"""From mapped shards to batches on the device: order, dealing, assembly, and a thread that stays ahead."""
