"""Numbers from checkpoints: each metric is one row of METRICS, each result one line of a run's metrics.jsonl."""
