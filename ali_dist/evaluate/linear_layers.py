"""How much a linear classifier can read from the encoder's layers."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ali_dist.data.index import Index
from ali_dist.data.progress import Progress
from ali_dist.evaluate.data import check_classes, check_unconditional, layers, unseen_split
from ali_dist.evaluate.logistic import ITERATIONS, Rows, fit, standardise
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Model, untrained
from ali_dist.published import LAYERS

HELD_OUT = 10_000
DECAYS = tuple(10.0 ** (-step / 2) for step in range(9))  # of weights, on the mean loss; from strong to weak
ROUGH = 1e-5  # gain at which a fit ends that only chooses the decay


def linear_layers(model: Model, index: Index, work: Work = ALONE) -> dict[str, Any]:
    """Accuracy of logistic regression on standardised layers, on `unseen_split`; the same for an untrained encoder.

    The layers are those that `svm` takes (`Model.features`). It is fitted to all images of the split that the run was
    trained on, with the weight decay that errs least on the last 10,000 of them, a fifth at most, when it is fitted to
    the others: tried from strong to weak until one errs more than the one before.
    """
    check_classes(index)
    check_unconditional(model)
    return {
        **_probed(model, index, work),
        "accuracy_untrained": _probed(untrained(model.recipe, index.mean_image), index, work)["accuracy"],
        "published_accuracy_percent": list(LAYERS.get(index.name, ())),
    }


def _probed(model: Model, index: Index, work: Work) -> dict[str, Any]:
    train, test = model.recipe.train_split, unseen_split(model, index)
    classes, progress = len(index.classes), Progress("iterations at most")
    total = (len(DECAYS) + 1) * ITERATIONS

    def fitted(number: int, *what: Any, **until: float) -> Any:
        found = fit(*what, **until, progress=lambda done: progress(number * ITERATIONS + done, total))
        progress((number + 1) * ITERATIONS, total)
        return found

    with tempfile.TemporaryDirectory() as folder:
        x, y = layers(model, index, train, "script", Path(folder), work)
        test_x, test_y = layers(model, index, test, "script", Path(folder), work)
        standardise(x, test_x)
        held_out = min(HELD_OUT, len(y) // 5)
        rest, held = Rows(x[:-held_out], y[:-held_out]), Rows(x[-held_out:], y[-held_out:])
        weights, errors = None, []
        for number, decay in enumerate(DECAYS):
            weights = (found := fitted(number, rest, classes, decay, weights, gain=ROUGH)).weights
            errors.append(found.error(held))
            if errors[-1] > min(errors):
                break
        decay = DECAYS[int(np.argmin(errors))]
        del rest, held  # what a GPU holds
        found = fitted(len(DECAYS), Rows(x, y), classes, decay, weights)
        error = found.error(Rows(test_x, test_y))
    return {
        "accuracy": 1 - error,
        "features": "script",
        "feature_count": x.shape[1],
        "train_split": train,
        "train_images": len(y),
        "held_out_images": held_out,
        "held_out_error": min(errors),
        "weight_decay": decay,
        "iterations": found.iterations,
        "converged": found.converged,
        "split": test,
        "test_images": len(test_y),
    }
