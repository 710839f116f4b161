"""A run's folder: where each thing lies, and the rule that one name means one recipe."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ali_dist.recipe import Recipe, UserError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`<storage>/<name>/` with recipe.json, labels.json, log.txt, ticks.jsonl, tb/, checkpoints/ and figures/."""

    root: Path

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
    def failed(self) -> Path:
        """Says why the run ended, when starting its workers again would be useless."""
        return self.root / "FAILED"

    @property
    def ray(self) -> Path:
        """Ray Train's own files, of no use after the job."""
        return self.root / ".ray"

    def saved(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path for path in self.checkpoints.iterdir() if path.name.isdigit())

    def read_recipe(self) -> Recipe:
        """UserError when the folder holds no run."""
        try:
            return Recipe.from_json(json.loads(self.recipe.read_text()))
        except FileNotFoundError:
            raise UserError(f"no run at {self.root}: it has no recipe.json") from None
        except ValueError as error:
            raise UserError(f"{self.recipe} is damaged ({error}): restore it, or choose another --name") from error

    def claim(self, recipe: Recipe, resume: str) -> bool:
        """Makes the folder, or checks that it is this recipe's; True when it was there.

        Raises UserError for a folder of another recipe (with the fields that differ), for an existing one under
        --resume never, and where the folder can't be written.
        """
        existed = self.recipe.exists()
        if existed:
            if resume == "never":
                raise UserError(f"run {self.root} exists and --resume is never: choose another --name")
            differing = self.read_recipe().differences(recipe)
            if differing:
                raise UserError(
                    f"run {self.root} was started with another recipe ({'; '.join(differing)}): "
                    "use its settings to continue it, or choose another --name"
                )
        try:
            for folder in (self.checkpoints, self.figures, self.tensorboard):
                folder.mkdir(parents=True, exist_ok=True)
            write_json(self.recipe, recipe.to_json())
        except OSError as error:
            raise UserError(
                f"can't write to {self.root} ({error.strerror}): give --storage a writable folder"
            ) from error
        return existed


def write_json(path: Path, tree: Any) -> None:
    """Writes `path` whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(tree, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
