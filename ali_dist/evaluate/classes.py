"""Which classes samples show, in the eyes of a classifier of real images."""

from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, first, given, read
from ali_dist.evaluate.work import ALONE, Chunk, Work
from ali_dist.model import Model
from ali_dist.recipe import UserError

TRAIN, TEST, SAMPLES = 5_000, 5_000, 1_000


def check_classifier(model: Model, classifier: Model) -> None:
    """UserError for a run that can't judge the model's samples."""
    name, nets = classifier.place, classifier.net.nets
    if classifier.checkpoint.parent.parent.resolve() == model.run.root.resolve():
        raise UserError(f"--classifier {name} is the run that is evaluated: give another one")
    if not nets.classes:
        raise UserError(f"--classifier {name} tells no classes apart: give a run trained with --labels")
    if nets.image != model.shape:
        raise UserError(f"--classifier {name} takes images of shape {nets.image}, the samples have {model.shape}")
    if classifier.recipe.dataset != model.recipe.dataset:
        raise UserError(
            f"--classifier {name} knows the classes of {classifier.recipe.dataset}, not of {model.recipe.dataset}: "
            "give a run of the same data set"
        )


def check_same_classes(classifier: Model, index: Index) -> None:
    """UserError for a classifier of other classes than the data set has."""
    if classifier.net.nets.classes != len(index.classes):
        raise UserError(
            f"--classifier {classifier.place} tells {classifier.net.nets.classes} classes apart, "
            f"data set {index.name} has {len(index.classes)}"
        )


class PixelSvm:
    """An RBF-kernel SVM on the pixels of the first training images: for simple sets such as the digits."""

    def __init__(self, index: Index, split: str) -> None:
        train = first(index, split, TRAIN)
        if len(train.y.unique()) < 2:
            raise UserError(f"split {split!r} of data set {index.name} shows one class, a classifier needs two")
        self.svm, self.images = SVC().fit(train.x.flatten(1).numpy() / 255, train.y.numpy()), len(train.y)

    def __call__(self, x: Tensor, generator: torch.Generator) -> np.ndarray:
        """Classes int64 [n] of images x, uint8 or in [0, 1]."""
        return self.svm.predict(x.flatten(1).numpy() / (255 if x.dtype == torch.uint8 else 1))


class Judge:
    """A run's D as a classifier; z_hat drawn once an image."""

    def __init__(self, model: Model) -> None:
        self.model, self.net = model, model.net  # `net`, as Work moves it to the GPU

    def __call__(self, x: Tensor, generator: torch.Generator) -> np.ndarray:
        """Classes int64 [n] of images x, uint8 or in [0, 1]."""
        return self.model.classify(x, generator=generator).argmax(1).numpy()


def classes(model: Model, index: Index, work: Work = ALONE) -> dict[str, Any]:
    """Share of each class among 1,000 samples by `work.classifier`, else by an SVM, and its error on real images.

    Those are validation images of its own run, which it was not trained on. A conditional model is asked for every
    class equally often: also the share of samples that show what was asked for.
    """
    check_classes(index)
    recipe = work.classifier.recipe if work.classifier else model.recipe
    if work.classifier:
        check_same_classes(work.classifier, index)
        judge, about = Judge(work.classifier), {"classifier": work.classifier.place}
    else:
        judge = PixelSvm(index, recipe.train_split)
        about = {"classifier": "SVM on pixels", "train_split": recipe.train_split, "train_images": judge.images}
    split = recipe.valid_split
    tested = min(TEST, index.images(split))
    error = sum(work.each(_wrong, tested, judge, index, split)) / tested
    predicted = np.concatenate(list(work.each(_shown, SAMPLES, model, judge, len(index.classes), unit="samples")))
    shares = np.bincount(predicted, minlength=len(index.classes)) / SAMPLES
    as_asked = float((predicted == np.arange(SAMPLES) % len(index.classes)).mean())
    return {
        **about,
        "classifier_accuracy": 1 - error,
        "classifier_error": error,
        "split": split,
        "test_images": tested,
        "samples": SAMPLES,
        "seed": 0,
        **({"as_asked": as_asked} if model.labels else {}),
        "classes_shown": int((shares > 0).sum()),
        "largest_share": float(shares.max()),
        **{f"share/{name}": float(share) for name, share in zip(index.classes, shares, strict=True)},
    }


def _wrong(judge: PixelSvm | Judge, index: Index, split: str, chunk: Chunk) -> int:
    images = read(index, split, chunk)
    return int((judge(images.x, chunk.generator()) != images.y.numpy()).sum())


def _shown(model: Model, judge: PixelSvm | Judge, classes: int, chunk: Chunk) -> np.ndarray:
    generator = chunk.generator()
    z = torch.randn(len(chunk), model.latent, generator=generator)
    asked = torch.arange(chunk.start, chunk.stop) % classes
    return judge(model.decode(z, given(model, asked)), generator)
