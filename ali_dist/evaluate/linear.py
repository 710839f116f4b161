"""How much a linear classifier can read from mu."""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, check_unconditional, codes
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Model, untrained

TRAIN, TEST = 20_000, 10_000


def linear(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """Accuracy on `valid` of logistic regression (C = 0.1) on standardised mu; the same for an untrained encoder."""
    check_classes(index)
    check_unconditional(model)
    counts = {}

    def accuracy(encoder: Model) -> float:
        x, y = codes(encoder, index, "train", TRAIN, work)
        x_test, y_test = codes(encoder, index, "valid", TEST, work)
        counts.update(train_images=len(y), split="valid", test_images=len(y_test))
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
        return float(classifier.score(x_test, y_test))

    return {
        "accuracy": accuracy(model),
        "accuracy_untrained": accuracy(untrained(model.recipe, index.mean_image)),
        **counts,
    }
