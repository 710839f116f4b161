"""What an elastic job does, besides Ray Train, when nodes come and go."""

import math
import time
from contextlib import suppress
from typing import Any

from ali_dist.recipe import Job
from ali_dist.run import RunFolder, read_lines

SECONDS_BETWEEN_LOOKS = 5
SECONDS_OF_ROOM = 10.0  # a node that comes and goes is not worth a new start


class ClusterView:
    """Has the actor that tells Ray Train's elastic policy what room there is look at once when nodes come or go.

    By itself it looks every 20 s; until then Ray Train asks in vain for room on a node that is lost.
    """

    def __init__(self) -> None:
        self.alive: set[str] = set()

    def __call__(self) -> None:
        import ray

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if alive == self.alive:
            return
        self.alive = alive
        with suppress(ValueError):  # no elastic job has begun yet on this cluster: the actor looks when it is made
            coordinator().get_reserved_resources.remote("", recompute=True)


def coordinator() -> Any:
    """Ray's actor that shares the cluster out among jobs; ValueError when there is none yet."""
    import ray

    return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")


def release(requester: str) -> None:
    """Gives back what Ray Train holds for a job whose driver was killed: an elastic one would wait 180 s for it."""
    import ray

    with suppress(ValueError, ray.exceptions.RayError):
        ray.get(coordinator().cancel_request.remote(requester), timeout=10)


class Growth:
    """Has the workers of an elastic job save and start again as more of them, once there has been room for a while."""

    def __init__(self, run: RunFolder, job: Job, resources: dict[str, int]) -> None:
        self.run, self.job, self.resources = run, job, resources
        self.due = time.monotonic()
        self.since, self.patience = math.inf, SECONDS_OF_ROOM  # there is room since, and acted on after
        self.before, self.starts = 0, 0  # workers, and starts so far, at the last attempt

    def __call__(self) -> None:
        import ray

        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + SECONDS_BETWEEN_LOOKS
        free = ray.available_resources()
        more = min(int(free.get(kind, 0) // need) for kind, need in self.resources.items() if need)
        events = [line for line in read_lines(self.run.events) if line.get("event") in ("start", "end")]
        workers = events[-1].get("workers", 0) if events else 0  # none while they are started again
        starts = [line["workers"] for line in events if line["event"] == "start"]
        if max(starts[self.starts :], default=0) > self.before:  # it brought more: the next is another matter
            self.patience, self.before = SECONDS_OF_ROOM, 0
        self.since = min(self.since, now) if more and 0 < workers < self.job.num_workers else math.inf
        if now - self.since < self.patience:
            return
        print(f"there is room for {more} more than {workers} workers: they start again", flush=True)
        self.run.regroup.touch()
        # What is free in sum may be too scattered for a worker: then again, but less and less often
        self.patience = 2 * self.patience if workers == self.before else SECONDS_OF_ROOM
        self.since, self.before, self.starts = math.inf, workers, len(starts)
