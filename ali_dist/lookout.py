"""What a job's driver sees of its workers from outside: that they hang before they train, or that there are none."""

import logging
import os
import signal
import time
from contextlib import suppress
from typing import Any

from ali_dist import patience
from ali_dist.run import RunFolder, read_lines

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_START = 2 * patience.SECONDS_OF_PATIENCE  # a checkpoint's storage may be waited for
SECONDS_ALONE = 10.0


def actors_of(kind: str) -> dict[str, dict[str, Any]]:
    """Id -> row of this job's actors of a class that live or are to."""
    import ray
    from ray._private.state import actors

    rows = actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))
    return {name: row for name, row in rows.items() if row["ActorClassName"] == kind and row["State"] != "DEAD"}


def kill_workers() -> None:
    """Kills Ray Train's controller, which runs on this host, and thereby the workers, and frees their room.

    Ray keeps the placement groups of a killed controller for as long as the job lives.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for row in actors_of("TrainController").values():
        with suppress(ProcessLookupError):
            os.kill(row["Pid"], signal.SIGKILL)
    job = ray.get_runtime_context().get_job_id()
    for name, row in placement_group_table().items():
        if name.endswith(job) and row["state"] != "REMOVED":  # an id ends with its job's
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


class Lookout:
    """To be called again and again. Ray Train waits without end for a worker that hangs while its group starts, and a
    job whose workers wait for a node has none to heed STOP."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.due, self.alone_since = run, 0.0, time.monotonic()
        self.group: set[str] = set()
        self.since, self.starts = 0.0, 0  # when the group was seen first, and the run's starts before
        self.ended = 0
        """Groups that were ended because they did not begin."""
        self.over = False
        """Whether no group is to be started any more."""

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + SECONDS_BETWEEN_LOOKS
        workers = actors_of("RayTrainWorker")
        if workers:
            self.alone_since = now
        starts = [line["time"] for line in read_lines(self.run.events) if line.get("event") == "start"]
        if not workers.keys() <= self.group:
            made = min(row["StartTime"] for row in workers.values()) / 1000  # 0 for one that is still to begin
            begun = bool(starts) and 0 < made < starts[-1]
            self.group, self.since, self.starts = set(workers), now, len(starts) - begun
        if workers and len(starts) == self.starts and now - self.since > SECONDS_TO_START:
            self.end_group()

    def end_group(self) -> None:
        log.warning(f"the workers did not begin to train within {SECONDS_TO_START:,.0f} s: they are started again")
        self.ended, self.since = self.ended + 1, time.monotonic()
        kill_workers()

    def end_job(self) -> None:
        self.over = True
        kill_workers()

    @property
    def alone(self) -> bool:
        """Whether there have been no workers for a while."""
        return time.monotonic() - self.alone_since > SECONDS_ALONE
