"""A run's folder: where each thing lies, and the rule that one name means one recipe."""

import errno
import hashlib
import itertools
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ali_dist.data.store import Bucket
from ali_dist.patience import patiently
from ali_dist.recipe import Recipe, UserError


class Superseded(Exception):
    """Another job of this name has begun to train the run: this one is to end and to write nothing more."""


Event = Literal["start", "save", "uploaded", "damaged", "rollback", "end"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """STORAGE/NAME/: recipe.json, labels.json, log.txt, ticks.jsonl, events.jsonl; tb/, checkpoints/, figures/.

    `str()` is where the run is for its user: this folder, or the address that it is this host's copy of.
    """

    root: Path
    bucket: Bucket | None = None
    """The address, where --storage is one: see `ali_dist.mirror`."""

    def __str__(self) -> str:
        return str(self.bucket or self.root)

    def shown(self, path: Path) -> str:
        """A path inside the run as its user finds it."""
        return f"{self}/{path.relative_to(self.root)}"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def ticks(self) -> Path:
        return self.root / "ticks.jsonl"

    @property
    def events(self) -> Path:
        """When the workers started, saved, fell back and ended; unlike the ticks, never taken back by a resume."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tb"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def labels(self) -> Path:
        """Which images a semi-supervised run knows the classes of."""
        return self.root / "labels.json"

    @property
    def stop(self) -> Path:
        """Exists while someone asks the run to save and end."""
        return self.root / "STOP"

    @property
    def regroup(self) -> Path:
        """Exists while the job asks its workers to save and end, to be started again as another number of workers."""
        return self.root / "REGROUP"

    @property
    def failed(self) -> Path:
        """Says why the run ended, when starting its workers again would be useless."""
        return self.root / "FAILED"

    @property
    def job(self) -> Path:
        """Holds the id of the job that has begun last: the one before it ends."""
        return self.root / "JOB"

    @property
    def ray(self) -> Path:
        """Ray Train's own files, of no use after the job."""
        return self.root / ".ray"

    def asked_to_stop(self) -> bool:
        """A storage that is out of reach asks for nothing."""
        try:
            return self.stop.exists() or self.regroup.exists()
        except OSError:
            return False

    def take_over(self) -> str:
        """Makes a new job the run's, and returns its id; UserError where it can't be written."""
        mine = uuid.uuid4().hex
        try:
            write_whole(self.job, mine)
        except OSError as error:
            raise UserError(f"can't write to {self.root} ({error.strerror}): make room, or bring it back") from error
        return mine

    def taken_from(self, mine: str) -> bool:
        """Whether another job has begun since that one. A storage that is out of reach says nothing."""
        try:
            return self.job.read_text() != mine
        except OSError:
            return False

    def saved(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path for path in self.checkpoints.iterdir() if path.name.isdigit())

    def record(self, event: Event, num_images: int, **details: float | str) -> None:
        """Appends a line to events.jsonl; on one rank only. UserError when it can't be written for long."""
        line = {"event": event, "num_images": num_images, "time": time.time(), **details}
        patiently(lambda: append_line(self.events, line), f"write to {self.events}")

    def read_recipe(self) -> Recipe:
        """UserError when the folder holds no run."""
        try:
            return Recipe.from_json(parse_json(self.recipe.read_text()))
        except FileNotFoundError:
            raise UserError(f"no run at {self}: it has no recipe.json") from None
        except ValueError as error:
            raise UserError(
                f"{self.shown(self.recipe)} is damaged ({error}): restore it, or choose another --name"
            ) from error

    def claim(self, recipe: Recipe, resume: str) -> bool:
        """Makes the folder, or checks that it is this recipe's; True when it was there.

        Raises UserError for a folder of another recipe (with the fields that differ), for an existing one under
        --resume never, and where the folder can't be written.
        """
        existed = self.recipe.exists()
        if existed and resume == "never":
            raise UserError(f"run {self} exists and --resume is never: choose another --name")
        try:
            self.make(recipe)
        except OSError as error:
            raise UserError(
                f"can't write to {self.root} ({error.strerror}): "
                + ("set XDG_CACHE_HOME to a writable folder" if self.bucket else "give --storage a writable folder")
            ) from error
        return existed

    def make(self, recipe: Recipe) -> None:
        """Writes the recipe into the folder; UserError where there is another, OSError where it can't be written."""
        differing = self.read_recipe().differences(recipe) if self.recipe.exists() else ()
        if differing:
            raise UserError(
                f"run {self} was started with another recipe ({'; '.join(differing)}): "
                "use its settings to continue it, or choose another --name"
            )
        for folder in (self.checkpoints, self.figures, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(self.recipe, recipe.to_json())


def parse_json(text: str) -> Any:
    """json.loads, but every text that is no JSON, also one nested without end, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_whole(path: Path, text: str) -> None:
    """Writes `path` whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any) -> None:
    """Writes `path` whole or not at all."""
    write_whole(path, json.dumps(tree, indent=2) + "\n")


def fingerprint(path: Path) -> dict[str, int | str]:
    """A file's bytes and SHA-256."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def append_line(path: Path, tree: Any) -> None:
    """Appends a line of JSON, whole or not at all, also after one that a crash has cut short."""
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        line = b"\n" * torn + json.dumps(tree).encode() + b"\n"
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a ticks.jsonl or events.jsonl; what a crash cut short is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and all(type(line.get(key)) in (int, float) for key in ("num_images", "time")):
            lines.append(line)
    return lines


def count_restarts(events: list[dict[str, Any]]) -> int:
    """How often the workers started though they had not ended: after a crash, a kill or a lost node."""
    marks = [line["event"] for line in events if line.get("event") in ("start", "rollback", "end")]
    return sum(pair == ("start", "start") for pair in itertools.pairwise(marks))


def skipped_batches(events: list[dict[str, Any]]) -> list[int]:
    """Images before each batch that rollbacks have left out."""
    return [line["skipped"] for line in events if line.get("event") == "rollback" and type(line.get("skipped")) is int]


def last_sign(run: RunFolder, lines: list[dict[str, Any]]) -> float:
    """Unix time of the last sign of life: the latest of these lines, or the command's own start."""
    return max([run.recipe.stat().st_mtime, *(line["time"] for line in lines)])


def find_run(words: str, storage: str) -> RunFolder:
    """The run that a command line names: its folder, one of its checkpoints, or its name below `storage`.

    Raises UserError when there is none.
    """
    given, named = Path(words).expanduser().absolute(), Path(storage).expanduser().absolute() / words
    above = [given.parent.parent] if given.parent.name == "checkpoints" else []
    for run in map(RunFolder, [given, *above, named]):
        if run.recipe.is_file():
            return run
    raise UserError(f"no run {words!r}: neither {given} nor {named} has a recipe.json; give its folder, or --storage")
