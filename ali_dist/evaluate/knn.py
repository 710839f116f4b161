"""How near images of a class lie in the code."""

from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, check_unconditional, first
from ali_dist.model import Model, untrained

TRAIN, TEST, NEIGHBOURS = 20_000, 5_000, (1, 5)


def knn(model: Model, index: Index) -> dict[str, float]:
    """Accuracy on `valid` of the nearest 1 and 5 neighbours by standardised mu; the same for an untrained encoder."""
    check_classes(index)
    check_unconditional(model)
    train, test = first(index, "train", TRAIN), first(index, "valid", TEST)

    def accuracies(encoder: Model, suffix: str) -> dict[str, float]:
        x, x_test = encoder.encode(train.x).numpy(), encoder.encode(test.x).numpy()
        found = {}
        for k in NEIGHBOURS:
            classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(k)).fit(x, train.y.numpy())
            found[f"accuracy_{k}{suffix}"] = float(classifier.score(x_test, test.y.numpy()))
        return found

    counts = {"train_images": len(train.y), "test_images": len(test.y)}
    return accuracies(model, "") | accuracies(untrained(model.recipe, index.mean_image), "_untrained") | counts
