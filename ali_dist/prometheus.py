"""A run's numbers for Prometheus, on the metrics endpoint that Ray opens on every node (there they begin with `ray_`).

The job's driver exports them from the run's folder, so that they outlive workers that hang or die, and end with the
job. launch/alerts.yaml and launch/grafana.json read them.
"""

import time
from typing import Any

from ali_dist.run import RunFolder, count_restarts, last_sign, read_lines

GAUGES = {
    "ali_images": "Images seen by the whole job",
    "ali_images_per_second": "Images a second of the whole job over the last tick",
    "ali_data_wait_ratio": "Share of rank 0's time over the last tick that it waited for data",
    "ali_loss_d": "Discriminator's loss, mean over the last tick",
    "ali_loss_g": "Loss of encoder and decoder, mean over the last tick",
    "ali_job_timestamp_seconds": "Unix time at which the job began to follow the run",
    "ali_end_timestamp_seconds": "Unix time at which the run finished or had been asked to stop and did; 0 until then",
    "ali_sign_of_life_timestamp_seconds": "Unix time of the last tick, start, save or end",
    "ali_restarts": "Times that the run's workers started without having ended",
    "ali_checkpoint_seconds": "Seconds that the last checkpoint took to be saved",
    "ali_checkpoint_timestamp_seconds": "Unix time of the last checkpoint",
}
TICK = {  # gauge -> its name in a tick
    "ali_images": "num_images",
    "ali_images_per_second": "speed/images_per_s",
    "ali_data_wait_ratio": "speed/data_wait_share",
    "ali_loss_d": "loss/d",
    "ali_loss_g": "loss/g",
}
SAVE = {"ali_checkpoint_seconds": "seconds", "ali_checkpoint_timestamp_seconds": "time"}  # likewise in a save's event
SECONDS_BETWEEN_READINGS = 5.0  # Ray exports every 10


def values(run: RunFolder) -> dict[str, float]:
    """Gauge -> value, for all that the run's folder has one for."""
    events, ticks = read_lines(run.events), read_lines(run.ticks)
    training = [tick for tick in ticks if "speed/images_per_s" in tick]
    saves = [line for line in events if line.get("event") == "save"]
    out = {
        "ali_end_timestamp_seconds": end_of(run, events),
        "ali_sign_of_life_timestamp_seconds": last_sign(run, events + ticks),
        "ali_restarts": count_restarts(events),
    }
    for lines, names in ((training, TICK), (saves, SAVE)):
        if lines:
            out |= {gauge: lines[-1].get(name) for gauge, name in names.items()}
    return {gauge: value for gauge, value in out.items() if value is not None}


def end_of(run: RunFolder, events: list[dict[str, Any]]) -> float:
    """Unix time of the run's end, if it is one after which nothing is to be done; else 0, as when workers regroup."""
    marks = [line for line in events if line.get("event") in ("start", "rollback", "end")]
    if not marks or marks[-1]["event"] != "end":
        return 0.0
    done = marks[-1]["num_images"] >= run.read_recipe().schedule.num_images
    return marks[-1]["time"] if done or run.stop.exists() else 0.0


class Exporter:
    """Sets the gauges, each labelled `run`, when called in a driver connected to Ray; most calls do nothing.

    Events are seen at once, so that a call after the workers' end exports that: Ray sends the last values of a driver
    that ends by itself, and shows them for 20 s more. One that is killed leaves no end.
    """

    def __init__(self, run: RunFolder) -> None:
        from ray.util.metrics import Gauge

        self.run, self.due, self.events, self.begin = run, 0.0, None, time.time()
        self.gauges = {name: Gauge(name, description, tag_keys=("run",)) for name, description in GAUGES.items()}

    def __call__(self) -> None:
        events = self.run.events.stat().st_mtime_ns if self.run.events.exists() else None
        if time.monotonic() < self.due and events == self.events:
            return
        self.due, self.events = time.monotonic() + SECONDS_BETWEEN_READINGS, events
        for name, value in (values(self.run) | {"ali_job_timestamp_seconds": self.begin}).items():
            self.gauges[name].set(value, tags={"run": self.run.root.name})
