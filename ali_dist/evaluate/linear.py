"""How much a linear classifier can read from mu."""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, check_unconditional, codes, unseen_split
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Model, untrained


def linear(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """Accuracy of logistic regression (C = 0.1) on standardised mu, on `unseen_split`; the same for an untrained net.

    It is fitted to all images of the split that the run was trained on.
    """
    check_classes(index)
    check_unconditional(model)
    train, test = model.recipe.train_split, unseen_split(model, index)
    counts = {}

    def accuracy(encoder: Model) -> float:
        x, y = codes(encoder, index, train, work)
        x_test, y_test = codes(encoder, index, test, work)
        counts.update(train_split=train, train_images=len(y), split=test, test_images=len(y_test))
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
        return float(classifier.score(x_test, y_test))

    return {
        "accuracy": accuracy(model),
        "accuracy_untrained": accuracy(untrained(model.recipe, index.mean_image)),
        **counts,
    }
