"""How much a linear classifier can read from mu."""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, check_unconditional, first
from ali_dist.model import Model, untrained

TRAIN, TEST = 20_000, 10_000


def linear(model: Model, index: Index) -> dict[str, float]:
    """Accuracy on `valid` of logistic regression (C = 0.1) on standardised mu; the same for an untrained encoder."""
    check_classes(index)
    check_unconditional(model)
    train, test = first(index, "train", TRAIN), first(index, "valid", TEST)

    def accuracy(encoder: Model) -> float:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        classifier.fit(encoder.encode(train.x).numpy(), train.y.numpy())
        return float(classifier.score(encoder.encode(test.x).numpy(), test.y.numpy()))

    return {
        "accuracy": accuracy(model),
        "accuracy_untrained": accuracy(untrained(model.recipe, index.mean_image)),
        "train_images": len(train.y),
        "test_images": len(test.y),
    }
