"""Full-state checkpoints: `checkpoints/<num_images>/` with tensors as safetensors, a state.json and a manifest.

A checkpoint counts only when its folder has its final name, which it gets by one rename after everything is on disk;
what is read is checked against the manifest first. Nothing is ever unpickled.
"""

import errno
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ali_dist.recipe import Recipe, UserError
from ali_dist.run import RunFolder, fingerprint, parse_json, write_json
from ali_dist.state import TrainState
from ali_dist.tables import NETWORKS

GROUPS = ("model", "averaged", "adam")  # one file each, so that a user of the weights need not read the optimizer's

HOURS_BETWEEN_FAILURES = 50_000  # of one worker: 419 failures in 54 days of 16,384 GPUs (arXiv:2407.21783, table 5)
LONGEST_INTERVAL = 3600.0  # seconds of work that nobody likes to lose, however rare that is

UNREACHABLE = {  # errors of a storage that is away, which say nothing about the checkpoint
    getattr(errno, name)
    for name in "ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH EACCES EPERM EMFILE".split()
}


class Damaged(UserError):
    """A checkpoint that is not what its manifest promises."""


def save(run: RunFolder, state: TrainState) -> Path:
    """Writes the state (called on one rank only) and deletes all but the newest `keep` checkpoints.

    OSError when that fails, as on a full disk: then the older ones are untouched, and it may be called again. The
    run's folder must exist: one that is out of reach is not made anew.
    """
    run.checkpoints.mkdir(exist_ok=True)
    final = run.checkpoints / f"{state.num_images:012d}"
    partial = _hidden(final)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, state)
        if final.exists():  # the same images again, after a fall back to an older checkpoint
            _delete(final)
        os.rename(partial, final)
        _sync_folder(run.checkpoints)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # its room may be what is missing
        raise
    for old in run.saved()[: -state.recipe.schedule.keep]:
        _delete(old)
    return final


def _hidden(path: Path) -> Path:
    """The name of a checkpoint that is not yet, or no longer, whole."""
    return path.with_name(f".{path.name}.partial")


def _delete(path: Path) -> None:
    """By a rename first, so that it is never seen half deleted."""
    dead = _hidden(path.with_name(f"{path.name}.old"))
    os.rename(path, dead)
    shutil.rmtree(dead, ignore_errors=True)


def _write(folder: Path, state: TrainState) -> None:
    """All files of a checkpoint, on the disk when this returns."""
    folder.mkdir()
    tensors = state.tensors()
    for group in GROUPS:
        members = {
            name.removeprefix(f"{group}."): t.detach().contiguous().cpu()
            for name, t in tensors.items()
            if name.startswith(f"{group}.")
        }
        try:
            save_file(members, folder / f"{group}.safetensors")
        except SafetensorError as error:  # its way to say OSError
            raise OSError(f"{folder / group}.safetensors: {error}") from error
    write_json(
        folder / "state.json",
        {"num_images": state.num_images, "recipe": state.recipe.to_json(), "torch": torch.__version__},
    )
    manifest = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        manifest[path.name] = fingerprint(path)
    write_json(folder / "manifest.json", manifest)
    _sync_folder(folder)


def verify(path: Path) -> None:
    """Damaged unless every file is as long and has the checksum that the manifest says.

    OSError when that can't be told now, since the storage does not answer.
    """
    try:
        manifest = parse_json((path / "manifest.json").read_text())
        missing = {"state.json", *(f"{group}.safetensors" for group in GROUPS)} - manifest.keys()
        if missing:
            raise Damaged(f"checkpoint {path} is damaged: its manifest lacks {', '.join(sorted(missing))}")
        for name, expected in manifest.items():
            # Else a stranger's manifest could have any file read, or a device that never ends
            if Path(name).name != name or (path / name).is_symlink() or not (path / name).is_file():
                raise Damaged(f"checkpoint {path} is damaged: {name!r} is no file of its own")
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"checkpoint {path} is damaged: {name} has {size} bytes, not {expected['bytes']}")
            if fingerprint(path / name)["sha256"] != expected["sha256"]:
                raise Damaged(f"checkpoint {path} is damaged: {name} does not match its checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        raise Damaged(f"checkpoint {path} is damaged: {error}") from error


def newest_whole(run: RunFolder) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not.

    A damaged one is renamed `<num_images>.damaged`, so that it never again counts among the kept; those that an earlier
    call set aside go then, or they would fill the disk. For one rank only. OSError when the storage does not answer.
    """
    for leftover in run.checkpoints.glob(".*.partial"):  # of a process killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    before, complaints = list(run.checkpoints.glob("*.damaged")), []
    for path in reversed(run.saved()):
        try:
            verify(path)
            return path, complaints
        except Damaged as error:
            aside = path.with_name(f"{path.name}.damaged")
            for old in before:
                shutil.rmtree(old, ignore_errors=True)
            os.rename(path, aside)
            complaints.append(f"{error}; set aside as {aside.name}")
    return None, complaints


def read_recipe(path: Path) -> Recipe:
    """The recipe stored in a checkpoint."""
    try:
        recipe = Recipe.from_json(parse_json((path / "state.json").read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise Damaged(f"checkpoint {path} is damaged: {error}") from error
    if recipe.networks not in tuple(NETWORKS):
        raise Damaged(f"checkpoint {path} has networks {recipe.networks!r}, which this version does not know")
    return recipe


def read_tensors(path: Path, group: str) -> dict[str, torch.Tensor]:
    """The tensors of one of GROUPS."""
    try:
        return load_file(path / f"{group}.safetensors")
    except (OSError, SafetensorError) as error:
        raise Damaged(f"checkpoint {path} is damaged: {group}.safetensors: {error}") from error


def load(path: Path, state: TrainState) -> None:
    """Puts a verified checkpoint into `state`; UserError when it belongs to another recipe."""
    differing = read_recipe(path).differences(state.recipe)
    if differing:
        raise UserError(f"checkpoint {path} is of another recipe ({'; '.join(differing)})")
    num_images = parse_json((path / "state.json").read_text()).get("num_images")
    if type(num_images) is not int or num_images < 0:
        raise Damaged(f"checkpoint {path} is damaged: its num_images is {num_images!r}")
    tensors = {f"{group}.{name}": t for group in GROUPS for name, t in read_tensors(path, group).items()}
    try:
        state.load_tensors(tensors)
    except RuntimeError as error:
        raise Damaged(f"checkpoint {path} does not fit its recipe: {error}") from error
    state.num_images = num_images


def best_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of work between saves that lose least to saving and to failures (Daly, FGCS 22, 2006, equation 37)."""
    if save_seconds >= 2 * seconds_between_failures:
        return seconds_between_failures
    ratio = math.sqrt(save_seconds / (2 * seconds_between_failures))
    young = math.sqrt(2 * save_seconds * seconds_between_failures)
    return young * (1 + ratio / 3 + ratio**2 / 9) - save_seconds


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
