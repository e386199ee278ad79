"""From text to batches: sources, shards, packing, loader."""
