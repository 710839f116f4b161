"""`python -m ali_dist.toy`: the study of 25 Gaussians, from nothing to its table and figure, resumable."""

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ali_dist import cli
from ali_dist.cluster import Report, connected, run_trials
from ali_dist.recipe import UserError
from ali_dist.run import write_json
from ali_dist.toy.figure import draw_samples, draw_study
from ali_dist.toy.markdown import render
from ali_dist.toy.plan import Job, Plan, first_jobs, second_jobs
from ali_dist.toy.report import best_covering, summarize
from ali_dist.toy.train import finished, measure_again, train, without_nan
from ali_dist.worker import keep_freed_memory

QUICK = Plan(runs=2, seeds=1, epochs=2, train_points=10_000, stack=2)
COLUMNS = {"epoch": "epoch", "hours": "hours", "modes": "modes", "hq": "high quality", "loss_d": "L_D", "loss": "loss"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """ALI, GAN, inverse mapping, post-hoc inference and VAE on 25 Gaussians (arXiv:1606.00704, section 4.6)."""

    plan: Plan
    out: str = "runs/toy"
    """Folder of the results; a study that was interrupted continues there."""
    quick: bool = False
    """A first look at the whole pipeline in under two minutes: few runs, 2 epochs of 10,000 points."""
    parallel: int | None = None
    """Stacks trained at a time; default: as many as the Ray cluster has GPUs, or else CPU cores."""
    save_epochs: int = 5
    """Epochs between saved states, from which an interrupted study continues."""
    report: bool = False
    """Train nothing: measure again what is finished so far, and write its table."""
    dry_run: bool = False
    """Print the study's runs and stop."""


def parse(argv: list[str] | None = None) -> Settings:
    """Reads the flags, whose defaults --quick changes; UserError for wrong values."""
    argv = sys.argv[1:] if argv is None else argv
    settings = tyro.cli(
        Annotated[Settings, tyro.conf.OmitArgPrefixes],
        prog="python -m ali_dist.toy",
        args=argv,
        default=Settings(plan=QUICK if "--quick" in argv else Plan()),
    )
    for name in ("parallel", "save_epochs"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return settings


def claim(out: Path, plan: Plan) -> None:
    """Makes the study's folder, or checks that it is this study's; UserError where it is not, or can't be written."""
    path = out / "study.json"
    try:
        if path.exists():
            theirs, mine = json.loads(path.read_text()), asdict(plan)
            differing = [
                f"{name}: {theirs.get(name)} -> {mine[name]}" for name in mine if theirs.get(name) != mine[name]
            ]
            if differing:
                raise UserError(f"{out} holds another study ({', '.join(differing)}): choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(plan))
    except OSError as error:
        raise UserError(f"can't write to {out} ({error.strerror}): give --out a writable folder") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): choose another --out") from error


def train_piece(piece: dict[str, Any], report: Report) -> None:
    """One Ray Tune trial: one job on this process's GPU or CPU core."""
    keep_freed_memory()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(Job.from_json(piece["job"]), Path(piece["out"]), device, report, piece["save_epochs"])


def run_jobs(jobs: list[Job], out: Path, settings: Settings) -> None:
    """Trains all jobs that are not finished."""
    pieces = {
        job.name: {"job": job.to_json(), "out": str(out), "save_epochs": settings.save_epochs}
        for job in jobs
        if not all(finished(out, name) for name in job.runs)
    }
    if pieces:
        run_trials(train_piece, pieces, out, settings.parallel, COLUMNS)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "processor": platform.machine(),
    }


def study(settings: Settings, out: Path) -> list[Job]:
    """Trains what is not finished; all jobs."""
    plan = settings.plan
    jobs = first_jobs(plan)
    with connected():
        run_jobs(jobs, out, settings)
        if plan.recipe == "authors":
            jobs += second_jobs(plan, best_covering(out, jobs, "search-gan"))
            run_jobs(jobs, out, settings)
    return jobs


def finished_jobs(plan: Plan, out: Path) -> list[Job]:
    """The jobs with the runs that are finished so far, measured again; UserError when there are none."""
    jobs = first_jobs(plan)
    gans = [name for job in jobs if job.name.startswith("search-gan") for name in job.runs]
    if gans and all(finished(out, name) for name in gans):
        jobs += second_jobs(plan, best_covering(out, jobs, "search-gan"))
    done = [replace(job, runs={name: run for name, run in job.runs.items() if finished(out, name)}) for job in jobs]
    if not any(job.runs for job in done):
        raise UserError(f"no run of this study is finished in {out}")
    for name in (name for job in done for name in job.runs):
        measure_again(out, name)
    return [job for job in done if job.runs]


def write_table(settings: Settings, jobs: list[Job], out: Path) -> None:
    """table.json, table.md and figure.png of the jobs' runs."""
    words = [word for word in sys.argv[1:] if word != "--report"]
    command = shlex.join(["python", "-m", "ali_dist.toy", *words])
    plan = asdict(settings.plan)
    table = without_nan({"command": command, "versions": versions(), "plan": plan, **summarize(out, jobs)})
    write_json(out / "table.json", table)
    (out / "table.md").write_text(render(table))
    if "figure" in table:
        draw_study(out, table["figure"])
    else:
        draw_samples(out, next(iter(jobs[0].runs)))
    print(render(table))
    print(f"table   {out / 'table.md'} and .json\nfigure  {out / 'figure.png'}\nruns    {out / 'runs'}")


def main() -> None:
    settings = parse()
    out = Path(settings.out).expanduser().absolute()
    if settings.dry_run:
        for job in first_jobs(settings.plan):
            print(json.dumps(job.to_json(), indent=2))
        if settings.plan.recipe == "authors":
            print("then inverse mapping and post-hoc inference for the decoder of the best-covering GAN")
        return
    claim(out, settings.plan)
    jobs = finished_jobs(settings.plan, out) if settings.report else study(settings, out)
    write_table(settings, jobs, out)


if __name__ == "__main__":
    cli.run(main)
