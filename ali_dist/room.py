"""Room on a Ray cluster for a job's workers, node by node, as each worker must fit on one node."""

import time

from ali_dist.recipe import Job, UserError

Resources = dict[str, float]  # "CPU", "GPU" and others -> how many


def workers_on(nodes: list[Resources], resources: dict[str, int]) -> int:
    """How many workers with these resources each fit on nodes with those."""
    return sum(min(int(node.get(kind, 0) // need) for kind, need in resources.items()) for node in nodes)


def worker_resources(job: Job, nodes: list[Resources]) -> dict[str, int]:
    """Resources of each worker: as many CPUs as leave room for all workers, with a GPU no more than are its share."""
    gpu = {"GPU": 1} if (job.gpu or (job.gpu is None and any(node.get("GPU", 0) >= 1 for node in nodes))) else {}
    if job.cpus_per_worker:
        return {"CPU": job.cpus_per_worker, **gpu}
    nodes = [node for node in nodes if workers_on([node], {"CPU": 1, **gpu})]
    most = min(job.num_workers, workers_on(nodes, {"CPU": 1, **gpu}))
    shares = [int(node["CPU"] // (int(node["GPU"]) if gpu else 1)) for node in nodes]
    for cpus in range(max(shares, default=1), 1, -1):
        if workers_on(nodes, {"CPU": cpus, **gpu}) >= most:
            return {"CPU": cpus, **gpu}
    return {"CPU": 1, **gpu}


def too_small(least: int, nodes: list[Resources], resources: dict[str, int]) -> str:
    """What is missing for the `least` workers that do not fit."""
    has = {kind: sum(node.get(kind, 0) for node in nodes) for kind in resources}
    short = [
        f"{least * need} {kind}s (it has {has[kind]:.0f})"
        for kind, need in resources.items()
        if least * need > has[kind]
    ]
    if not short:
        each = " and ".join(f"{need} {kind}{'s' if need > 1 else ''}" for kind, need in resources.items())
        short = [f"{each} each, which only {workers_on(nodes, resources)} find on a node (it has {len(nodes)} nodes)"]
    return f"the cluster is too small for {least} workers: they need {' and '.join(short)}"


def wait_for_room(job: Job) -> dict[str, int]:
    """Each worker's resources, once the cluster is large enough for as many as needed; UserError after --wait-seconds.

    An autoscaler, where there is one, is asked for what is missing. Room that other jobs hold is not waited for here,
    as Ray does that, but said.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    least = job.min_workers or job.num_workers
    deadline, told = time.monotonic() + job.wait_seconds, False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = worker_resources(job, nodes)
        if workers_on(nodes, resources) >= least:
            request_resources(bundles=[])  # or it would keep the nodes after the job
            tell_if_busy(least, resources)
            return resources
        request_resources(bundles=[resources] * job.num_workers)
        message = too_small(least, nodes, resources)
        if time.monotonic() >= deadline:
            request_resources(bundles=[])
            raise UserError(
                f"{message}: add nodes, ask for fewer with --num-workers or for less with --cpus-per-worker, or wait "
                "longer with --wait-seconds"
            )
        if not told:
            print(f"{message}; waiting up to {job.wait_seconds} s for nodes to join", flush=True)
            told = True
        time.sleep(1)


def tell_if_busy(least: int, resources: dict[str, int]) -> None:
    from ray._private.state import available_resources_per_node

    free = workers_on(list(available_resources_per_node().values()), resources)
    if free < least:
        print(
            f"the cluster is busy: now there is room for {free} of {least} workers with {resources} each; they start "
            "when other jobs have ended",
            flush=True,
        )
