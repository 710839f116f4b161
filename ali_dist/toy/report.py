"""The study's table: what was measured beside what was published, and the paper's five conclusions."""

import statistics
from pathlib import Path
from typing import Any

from ali_dist.toy.judge import floors
from ali_dist.toy.plan import BETAS, SEARCH, Job
from ali_dist.toy.train import read_json

LEARNED = ("inverse", "posthoc", "vae")  # beside ALI, in the comparison of inference
GROUPS = ("search-ali", "search-gan", *(f"fixed-{beta1}" for beta1 in BETAS), *LEARNED, "best-ali")
Tree = dict[str, Any]


def runs_of(out: Path, jobs: list[Job], prefix: str) -> dict[str, Tree]:
    """The metrics of all finished runs of the jobs whose names start so."""
    names = [name for job in jobs if job.name.startswith(prefix) for name in job.runs]
    return {name: read_json(out / "runs" / name / "metrics.json") for name in names}


def best_covering(out: Path, jobs: list[Job], prefix: str) -> str:
    """The run with most modes among 10,000 samples; of equals the one with most samples of high quality."""
    metrics = {name: tree["samples_10000"] for name, tree in runs_of(out, jobs, prefix).items()}
    return max(metrics, key=lambda name: (metrics[name]["modes"], metrics[name]["hq"]))


def spread(values: list[float | None]) -> Tree:
    """Mean, standard deviation, standard error, least and greatest of the numbers that exist, and how many do."""
    known = [value for value in values if value is not None]
    if not known:
        return {"count": 0}
    std = statistics.stdev(known) if len(known) > 1 else 0.0
    return {
        "count": len(known),
        "mean": statistics.mean(known),
        "std": std,
        "stderr": std / len(known) ** 0.5,
        "min": min(known),
        "max": max(known),
    }


def over_runs(metrics: list[Tree]) -> Tree:
    """The same tree with a `spread` over the runs at each number."""
    first = metrics[0]
    if isinstance(first, dict):
        return {key: over_runs([m[key] for m in metrics]) for key in first if key != "cost"}
    if isinstance(first, list):
        return [over_runs([m[i] for m in metrics]) for i in range(len(first))]
    return spread(metrics)


def epochs(job: Job) -> int:
    return next(iter(job.runs.values())).epochs


def summarize(out: Path, jobs: list[Job]) -> Tree:
    """All that the table shows, from the runs' files."""
    groups = {name: runs_of(out, jobs, name) for name in GROUPS if any(job.name.startswith(name) for job in jobs)}
    tree: Tree = {
        "epochs": {name: epochs(next(job for job in jobs if job.name.startswith(name))) for name in groups},
        "hours": {name: sum(run["cost"]["hours"] for run in runs.values()) for name, runs in groups.items()},
        "floors": floors(),
        "groups": {name: over_runs(list(runs.values())) for name, runs in groups.items()},
        "runs": {
            run: {"recipe": read_json(out / "runs" / run / "recipe.json"), **metrics}
            for runs in groups.values()
            for run, metrics in runs.items()
        },
    }
    if {"search-ali", "search-gan"} <= groups.keys():
        tree["search_ranges"] = {name: list(row) for name, row in SEARCH.items()}
        tree["best_covering"] = {model: best_covering(out, jobs, f"search-{model}") for model in ("ali", "gan")}
    if {"search-ali", "search-gan", *LEARNED} <= groups.keys():
        best = tree["best_covering"]["ali"]
        tree["figure"] = {"ali": best} | {name: next(iter(groups[name])) for name in LEARNED}
        tree["inference"] = {"ali": over_runs([groups["search-ali"][best]])} | {
            name: tree["groups"][name] for name in LEARNED
        }
        tree["conclusions"] = conclusions(tree)
    return tree


def conclusions(tree: Tree) -> list[Tree]:
    """The paper's five, each with the numbers (means) that decide whether this study bears it out."""
    inference = tree["inference"]

    def mean(model: str, *path: str) -> float:
        node = inference[model]
        for key in path:
            node = node[key]
        return node.get("mean", float("nan"))

    distance = {model: mean(model, "codes", "energy_distance") for model in inference}
    rmse = {model: mean(model, "reconstructions", "rmse") for model in inference}
    empty = {model: mean(model, "codes", "holes") for model in inference}
    hq = {model: mean(model, "samples_10000", "hq") for model in inference}
    kept = {model: mean(model, "reconstructions", "same_mode") for model in inference}
    modes = {model: tree["groups"][f"search-{model}"]["samples_10000"]["modes"] for model in ("ali", "gan")}
    others = [distance[model] for model in ("inverse", "posthoc")]
    vae_modes = mean("vae", "reconstructions", "modes")
    rows = [
        (
            "ALI's q(z) matches p(z) well, and its codes keep the components apart",
            distance["ali"] < min(others) and kept["ali"] > 0.5,
            {"energy distance q(z), p(z)": distance, "reconstructions in the right mode": kept},
        ),
        (
            "the GAN reaches fewer modes even after the search",
            modes["gan"]["mean"] < modes["ali"]["mean"] and modes["gan"]["max"] <= modes["ali"]["max"],
            {f"modes, {model}": {key: value[key] for key in ("mean", "max")} for model, value in modes.items()},
        ),
        (
            "the inverse mapping covers the prior worst",
            distance["inverse"] == max(distance.values()),
            {"energy distance q(z), p(z)": distance},
        ),
        (
            "post-hoc inference is better than that, but worse than joint training",
            distance["ali"] < distance["posthoc"] < distance["inverse"],
            {"energy distance q(z), p(z)": distance},
        ),
        (
            "the VAE covers all modes and reconstructs best, but smears its density and leaves holes in q(z)",
            vae_modes == 25
            and rmse["vae"] == min(rmse.values())
            and hq["vae"] < hq["ali"]
            and empty["vae"] > empty["ali"],
            {
                "modes of the VAE's reconstructions": vae_modes,
                "reconstruction error": rmse,
                "high quality": hq,
                "holes": empty,
            },
        ),
    ]
    return [{"conclusion": text, "borne_out": bool(holds), "numbers": numbers} for text, holds, numbers in rows]
