"""RECIPES: data set name -> the recipe that reproduces the paper on it. Variants derive with `dataclasses.replace`."""

from dataclasses import replace

from ali_dist.cli import did_you_mean
from ali_dist.recipe import Optim, Recipe, Schedule, Semi, UserError

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

CONDITIONAL = {  # data set name -> conditional ALI on it; the paper has CelebA's
    "celeba": replace(CELEBA, networks="celeba-conditional", optim=Optim(batch_size=128)),
    **{
        # A single class would hardly be seen beside z through weights of 0.01, which nine or so attributes add up
        recipe.dataset: replace(recipe, networks=f"{recipe.dataset}-conditional", embedding_std=1.0)
        for recipe in (DIGITS, CIFAR10, SVHN, TINYIMAGENET, IMAGENET64)
    },
}

SEMI_SUPERVISED = {  # data set name -> semi-supervised ALI; the authors gave neither networks nor schedule for it
    "svhn": replace(  # from the official training images, which others' results are of too, without the extra ones
        SVHN,
        networks="svhn-classes",
        train_split="valid",
        schedule=replace(SVHN.schedule, num_images=600 * 73_257),
        semi=Semi(labels=1_000),
    ),
    "cifar10": replace(
        CIFAR10,
        networks="cifar10-classes",
        schedule=replace(CIFAR10.schedule, num_images=1_200 * 45_000),
        semi=Semi(labels=1_000),
    ),
    "digits": replace(DIGITS, networks="digits-classes", semi=Semi(labels=100, labelled_batch=32)),
}


def find(dataset: str, conditional: bool = False, labels: bool = False) -> Recipe:
    """The recipe of a data set, for conditional or semi-supervised training too; UserError when there is none."""
    if dataset not in RECIPES:
        raise did_you_mean("data set", dataset, RECIPES)
    if conditional and labels:
        raise UserError("--conditional and --labels exclude each other")
    flag, table = ("--conditional", CONDITIONAL) if conditional else ("--labels", SEMI_SUPERVISED)
    table = table if conditional or labels else RECIPES
    if dataset not in table:
        raise UserError(f"{flag} is for {', '.join(sorted(table))}: there are no such networks for {dataset}")
    return table[dataset]
