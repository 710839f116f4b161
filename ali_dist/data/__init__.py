"""From official archives to verified shards, and from shards to batches."""
