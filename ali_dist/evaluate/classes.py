"""Which classes samples show, in the eyes of a classifier trained on real images."""

import numpy as np
import torch
from sklearn.svm import SVC

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, first, given
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Model

TRAIN, TEST, SAMPLES = 5_000, 5_000, 1_000


def classes(model: Model, index: Index, work: Work = ALONE) -> dict[str, float]:
    """Share of each class among 1,000 samples by an RBF-kernel SVM on pixels, and that SVM's accuracy on `valid`.

    A conditional model is asked for every class equally often: also the share of samples that show what was asked for.
    """
    check_classes(index)
    train, test = first(index, "train", TRAIN), first(index, "valid", TEST)
    classifier = SVC().fit(train.x.flatten(1).numpy() / 255, train.y.numpy())
    asked = torch.arange(SAMPLES) % len(index.classes)
    predicted = classifier.predict(model.sample(SAMPLES, given(model, asked), seed=0).flatten(1).numpy())
    shares = np.bincount(predicted, minlength=len(index.classes)) / SAMPLES
    return {
        "classifier_accuracy": float(classifier.score(test.x.flatten(1).numpy() / 255, test.y.numpy())),
        **({"as_asked": float((predicted == asked.numpy()).mean())} if model.labels else {}),
        "classes_shown": int((shares > 0).sum()),
        "largest_share": float(shares.max()),
        **{f"share/{name}": float(share) for name, share in zip(index.classes, shares, strict=True)},
    }
