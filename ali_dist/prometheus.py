"""A run's numbers for Prometheus, on the metrics endpoint that Ray opens on every node (there they begin with `ray_`).

launch/alerts.yaml and launch/grafana.json read them.
"""

import math
import time

from ali_dist.run import RunFolder, count_restarts, read_lines

GAUGES = {
    "ali_images": "Images seen by the whole job",
    "ali_images_per_second": "Images a second of the whole job since the last tick",
    "ali_data_wait_ratio": "Share of rank 0's time since the last tick that it waited for data",
    "ali_loss_d": "Discriminator's loss, mean since the last tick",
    "ali_loss_g": "Loss of encoder and decoder, mean since the last tick",
    "ali_tick_timestamp_seconds": "Unix time of the last tick",
    "ali_restarts": "Times that the run's workers started without having ended",
    "ali_checkpoint_seconds": "Seconds that the last checkpoint took to be saved",
    "ali_checkpoint_timestamp_seconds": "Unix time of the last checkpoint",
}
TICK = {  # gauge -> its name in a tick
    "ali_images_per_second": "speed/images_per_s",
    "ali_data_wait_ratio": "speed/data_wait_share",
    "ali_loss_d": "loss/d",
    "ali_loss_g": "loss/g",
}


def values(run: RunFolder, num_images: int, scalars: dict[str, float], now: float) -> dict[str, float]:
    """Gauge -> value, for all that has one yet; `now` is the Unix time of the tick."""
    events = read_lines(run.events)
    out = {
        "ali_images": num_images,
        "ali_tick_timestamp_seconds": now,
        "ali_restarts": count_restarts(events),
        **{gauge: scalars[name] for gauge, name in TICK.items()},
    }
    saves = [line for line in events if line.get("event") == "save"]
    if saves:
        out["ali_checkpoint_seconds"] = saves[-1]["seconds"]
        out["ali_checkpoint_timestamp_seconds"] = saves[-1]["time"]
    return {gauge: value for gauge, value in out.items() if math.isfinite(value)}


class Exporter:
    """An `on_tick` for rank 0 inside a Ray worker; every gauge has the run's name as its label `run`."""

    def __init__(self, run: RunFolder) -> None:
        from ray.util.metrics import Gauge

        self.run = run
        self.gauges = {name: Gauge(name, description, tag_keys=("run",)) for name, description in GAUGES.items()}

    def __call__(self, num_images: int, scalars: dict[str, float]) -> None:
        for name, value in values(self.run, num_images, scalars, time.time()).items():
            self.gauges[name].set(value, tags={"run": self.run.root.name})
