"""How near images of a class lie in the code."""

from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, check_unconditional, codes
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Model, untrained

TRAIN, TEST, NEIGHBOURS = 20_000, 5_000, (1, 5)


def knn(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """Accuracy on `valid` of the nearest 1 and 5 neighbours by standardised mu; the same for an untrained encoder."""
    check_classes(index)
    check_unconditional(model)
    found, counts = {}, {}
    for encoder, suffix in ((model, ""), (untrained(model.recipe, index.mean_image), "_untrained")):
        x, y = codes(encoder, index, "train", TRAIN, work)
        x_test, y_test = codes(encoder, index, "valid", TEST, work)
        counts = {"train_images": len(y), "split": "valid", "test_images": len(y_test)}
        for k in NEIGHBOURS:
            classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(k)).fit(x, y)
            found[f"accuracy_{k}{suffix}"] = float(classifier.score(x_test, y_test))
    return found | counts
