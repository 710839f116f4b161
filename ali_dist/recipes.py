"""RECIPES: data set name -> the recipe that reproduces the paper on it. Variants derive with `dataclasses.replace`."""

from dataclasses import replace

from ali_dist.cli import did_you_mean
from ali_dist.recipe import Optim, Recipe, Schedule, UserError

DIGITS = Recipe(  # not the paper's: a first look that 2 cores train in minutes
    dataset="digits",
    networks="digits",
    optim=Optim(batch_size=64, lr=5e-4, ema_half_life=5_000),
    schedule=Schedule(
        num_images=100_000,
        tick_images=5_000,
        save_images=25_000,
        sample_images=25_000,
        validate_images=25_000,
    ),
    precision="bf16",
)

CIFAR10 = Recipe(
    dataset="cifar10",
    networks="cifar10",
    optim=Optim(batch_size=100),
    schedule=Schedule(num_images=6475 * 45_000),
)

SVHN = Recipe(
    dataset="svhn",
    networks="svhn",
    optim=Optim(batch_size=100),
    schedule=Schedule(num_images=100 * 531_131),
)

CELEBA = Recipe(
    dataset="celeba",
    networks="celeba",
    optim=Optim(batch_size=100),
    schedule=Schedule(num_images=123 * 162_770),
)

TINYIMAGENET = Recipe(
    dataset="tinyimagenet",
    networks="tinyimagenet",
    optim=Optim(batch_size=128),
    schedule=Schedule(num_images=125 * 100_000),
)

IMAGENET64 = Recipe(
    dataset="imagenet64",
    networks="tinyimagenet",
    optim=Optim(batch_size=128),
    schedule=Schedule(num_images=125 * 1_281_167),
)

FOLDER = Recipe(  # not the paper's: one's own images, with the paper's networks for their size
    dataset="folder",
    networks="tinyimagenet",
    optim=Optim(batch_size=128),
    schedule=Schedule(num_images=125 * 100_000),
)

RECIPES = {recipe.dataset: recipe for recipe in (DIGITS, CIFAR10, SVHN, CELEBA, TINYIMAGENET, IMAGENET64, FOLDER)}

CONDITIONAL = {  # data set name -> conditional ALI on it; of the paper's there is CelebA's
    "celeba": replace(CELEBA, networks="celeba-conditional", optim=Optim(batch_size=128)),
    **{
        recipe.dataset: replace(recipe, networks=f"{recipe.dataset}-conditional")
        for recipe in (DIGITS, CIFAR10, SVHN, TINYIMAGENET, IMAGENET64)
    },
}


def find(dataset: str, conditional: bool = False) -> Recipe:
    """The recipe of a data set; UserError when there is none."""
    if dataset not in RECIPES:
        raise did_you_mean("data set", dataset, RECIPES)
    table = CONDITIONAL if conditional else RECIPES
    if dataset not in table:
        raise UserError(f"--conditional is for {', '.join(sorted(table))}: {dataset} has no networks that take labels")
    return table[dataset]
