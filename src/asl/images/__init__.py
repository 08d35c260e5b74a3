"""From files to batches: decode, squish, cache, augment, load."""
