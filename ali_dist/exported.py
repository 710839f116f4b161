"""A model in the Hugging Face convention: a folder with config.json and model.safetensors, checked when it is read."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ali_dist.checkpoint import Damaged
from ali_dist.recipe import Recipe, UserError
from ali_dist.run import fingerprint, parse_json, write_json
from ali_dist.tables import NETWORKS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE, VERSION = "ali", 1
LONGEST_CONFIG = 2**20  # bytes


def is_exported(path: Path) -> bool:
    """Whether the folder looks like one. Files may be links: caches of downloaded models are made of them."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def write(
    folder: Path,
    recipe: Recipe,
    tensors: dict[str, torch.Tensor],
    weights: Literal["averaged", "raw"],
    num_images: int,
) -> None:
    """Puts both files into an existing folder."""
    nets = NETWORKS[recipe.networks]
    members = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    save_file(members, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "model_type": MODEL_TYPE,
        "version": VERSION,
        "networks": recipe.networks,
        "image": list(nets.image),
        "latent": nets.latent,
        "labels": nets.labels,
        "classes": nets.classes,
        "weights": weights,
        "num_images": num_images,
        "recipe": recipe.to_json(),
        "sha256": {WEIGHTS: fingerprint(folder / WEIGHTS)["sha256"]},
    }
    write_json(folder / CONFIG, config)


def read(folder: Path) -> tuple[Recipe, dict[str, Any], dict[str, torch.Tensor]]:
    """The recipe, config.json and the tensors; Damaged unless they are what config.json promises."""
    try:
        with open(folder / CONFIG, encoding="utf-8") as file:
            text = file.read(LONGEST_CONFIG + 1)
        if len(text) > LONGEST_CONFIG:
            raise ValueError("too long")
        config = parse_json(text)
        if config["model_type"] != MODEL_TYPE:
            raise ValueError(f"no model of ali_dist: its model_type is {json.dumps(config['model_type'])[:40]}")
        if config["version"] != VERSION:
            raise ValueError(f"version {json.dumps(config['version'])}, this one reads {VERSION}")
        recipe = Recipe.from_json(config["recipe"])
        if recipe.networks not in tuple(NETWORKS):
            raise ValueError(f"networks {recipe.networks!r}, which this version does not know")
        if config["weights"] not in ("averaged", "raw") or type(config["num_images"]) is not int:
            raise ValueError("weights or num_images")
        promised = config["sha256"][WEIGHTS]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise Damaged(f"{folder / CONFIG} is damaged or of another version ({error}): export the run again") from error
    try:
        if fingerprint(folder / WEIGHTS)["sha256"] != promised:
            raise Damaged(f"{folder / WEIGHTS} does not match the checksum in config.json: fetch or export it again")
        return recipe, config, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{folder / WEIGHTS} is damaged ({error}): fetch or export it again") from error
