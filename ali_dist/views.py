"""FIGURES: what a model shows, always from the same codes, noise and validation images of a run."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.data.stream import validation
from ali_dist.nets import ALI
from ali_dist.pictures import grid, to_uint8
from ali_dist.recipe import Recipe, UserError
from ali_dist.state import derived_seed

SIDE = 8  # rows and columns of the grids of samples and reconstructions
PAIRS, STEPS = 10, 11  # interpolated pairs of images, and decodings between each two
CLASSES = 12  # shown by the conditional figure at most

PEOPLE = {  # rows of the paper's conditional sequence on CelebA (section 4.2)
    "male, attractive, young": "Male Attractive Young",
    "male, attractive, older": "Male Attractive",
    "female, attractive, young": "Attractive Young",
    "female, attractive, older": "Attractive",
}
SEQUENCE = {  # its columns: what each adds to the row's attributes
    "these attributes alone": "",
    "black hair": "Black_Hair",
    "brown hair": "Brown_Hair",
    "blond hair": "Blond_Hair",
    "black, wavy hair": "Black_Hair Wavy_Hair",
    "blond hair, bangs": "Blond_Hair Bangs",
    "blond, receding hairline": "Blond_Hair Receding_Hairline",
    "blond, balding": "Blond_Hair Bald",
    "black hair, smiling": "Black_Hair Smiling",
    "black hair, smiling, mouth slightly open": "Black_Hair Smiling Mouth_Slightly_Open",
    "the same with eyeglasses": "Black_Hair Smiling Mouth_Slightly_Open Eyeglasses",
    "the same with eyeglasses and a hat": "Black_Hair Smiling Mouth_Slightly_Open Eyeglasses Wearing_Hat",
}


class Fixed(NamedTuple):
    """What a run's figures are drawn from, on the networks' device."""

    z: Tensor  # prior draws, float32 [64, latent]
    eps: Tensor  # the encoder's noise, float32 [64, latent]
    x: Tensor  # the first 64 validation images or fewer, uint8 [n, C, H, W]
    y: Tensor  # their labels, as in Batch
    classes: tuple[str, ...]
    attributes: tuple[str, ...]


def fixed(index: Index, recipe: Recipe, latent: int, device: torch.device) -> Fixed:
    """The inputs of all figures of a recipe's run."""
    count = SIDE * SIDE
    generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "grids"))
    z, eps = (torch.randn(count, latent, generator=generator).to(device) for _ in range(2))
    batch = next(validation(index, recipe.valid_split, count=count, batch_size=count))
    return Fixed(z, eps, batch.x.to(device), batch.y.to(device), index.classes, index.attributes)


@dataclass(frozen=True, slots=True)
class View:
    """Images in rows and columns, uint8 [R, C, c, h, w], and their labels."""

    cells: Tensor
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    legend: tuple[str, ...] = ()


def samples(net: ALI, given: Fixed) -> View:
    """G_x of prior draws; in conditional networks with the labels of validation images."""
    y = given.y[torch.arange(len(given.z), device=given.y.device) % len(given.y)]
    return View(grid(to_uint8(net.decode(given.z, y)), SIDE))


def reconstructions(net: ALI, given: Fixed) -> View:
    """Validation images in the odd columns, G_x of codes drawn for them in the even ones."""
    x, y = given.x[: SIDE * SIDE // 2], given.y[: SIDE * SIDE // 2]
    x_tilde = net.decode(drawn(net, x, given.eps[: len(x)], y), y)
    pairs = torch.stack([x.cpu(), to_uint8(x_tilde)], dim=1).flatten(0, 1)
    return View(grid(pairs, SIDE), columns=("x", "G(z)") * (SIDE // 2))


def interpolations(net: ALI, given: Fixed) -> View:
    """A pair of validation images a row, at its ends; between them the decodings of the line between their codes."""
    count = min(PAIRS, len(given.x) // 2)
    if not count:
        raise UserError("interpolations need two validation images")
    z = drawn(net, given.x, given.eps[: len(given.x)], given.y)
    (x1, x2), (z1, z2), (y1, y2) = ((v[: 2 * count : 2], v[1 : 2 * count : 2]) for v in (given.x, z, given.y))
    between = to_uint8(net.interpolate(z1, z2, y1, y2, STEPS))
    cells = torch.cat([x1.cpu()[:, None], between, x2.cpu()[:, None]], dim=1)
    return View(cells, columns=("x1", *(f"{t / (STEPS - 1):.1f}" for t in range(STEPS)), "x2"))


def conditional(net: ALI, given: Fixed) -> View:
    """One z a row and one class a column; or, of CelebA's attributes, the paper's sequence from a single z."""
    if net.embedding is None:
        raise UserError("the networks are unconditional: only a run trained with --conditional shows labels")
    rows, columns, y = people(given) if given.attributes else classes(given)
    z = given.z[:1].expand(len(rows), -1) if given.attributes else given.z[: len(rows)]
    z = z.repeat_interleave(len(columns), 0)
    cells = to_uint8(net.decode(z, y.to(z.device).flatten(0, 1))).unflatten(0, (len(rows), len(columns)))
    letters = tuple(string.ascii_lowercase[: len(columns)])
    return View(cells, rows, letters, tuple(f"{a}: {text}" for a, text in zip(letters, columns, strict=True)))


def classes(given: Fixed) -> tuple[tuple[str, ...], tuple[str, ...], Tensor]:
    """Rows, columns and y int64 [R, C]: the first classes."""
    names = given.classes[:CLASSES]
    return tuple(f"z{i}" for i in range(1, SIDE + 1)), names, torch.arange(len(names)).expand(SIDE, -1)


def people(given: Fixed) -> tuple[tuple[str, ...], tuple[str, ...], Tensor]:
    """Rows, columns and y uint8 [R, C, A] of the paper's sequence; UserError where an attribute of it is unknown."""
    y = torch.zeros(len(PEOPLE), len(SEQUENCE), len(given.attributes), dtype=torch.uint8)
    for i, constant in enumerate(PEOPLE.values()):
        for j, added in enumerate(SEQUENCE.values()):
            for name in (*constant.split(), *added.split()):
                if name not in given.attributes:
                    raise UserError(f"the conditional sequence is CelebA's: this data set has no attribute {name}")
                y[i, j, given.attributes.index(name)] = 1
    return tuple(PEOPLE), tuple(SEQUENCE), y


def drawn(net: ALI, x: Tensor, eps: Tensor, y: Tensor) -> Tensor:
    """z_hat ~ q(z|x), with this noise: float32 [N, latent] of uint8 images."""
    x = x.contiguous(memory_format=torch.channels_last).float() / 255
    mu, log_sigma = net.encode(x, y)
    return mu.float() + log_sigma.float().exp() * eps


FIGURES: dict[str, Callable[[ALI, Fixed], View]] = {
    "samples": samples,
    "reconstructions": reconstructions,
    "interpolations": interpolations,
    "conditional": conditional,
}


def shown(net: ALI, given: Fixed) -> list[str]:
    """The figures that this model and data set have."""
    named = {name for names in (*PEOPLE.values(), *SEQUENCE.values()) for name in names.split()}
    has = {
        "interpolations": len(given.x) >= 2,
        "conditional": net.embedding is not None and (bool(given.classes) or named <= set(given.attributes)),
    }
    return [name for name in FIGURES if has.get(name, True)]
