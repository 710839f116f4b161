"""How near images of a class lie in the code."""

from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ali_dist.data.index import Index
from ali_dist.evaluate.data import check_classes, check_unconditional, codes, unseen_split
from ali_dist.evaluate.work import ALONE, Work
from ali_dist.model import Model, untrained

NEIGHBOURS = (1, 5)


def knn(model: Model, index: Index, work: Work = ALONE) -> dict[str, float | str]:
    """Accuracy of the nearest 1 and 5 neighbours by standardised mu, on `unseen_split`; the same for an untrained net.

    The neighbours are all images of the split that the run was trained on.
    """
    check_classes(index)
    check_unconditional(model)
    train, test = model.recipe.train_split, unseen_split(model, index)
    found, counts = {}, {}
    for encoder, suffix in ((model, ""), (untrained(model.recipe, index.mean_image), "_untrained")):
        x, y = codes(encoder, index, train, work)
        x_test, y_test = codes(encoder, index, test, work)
        counts = {"train_split": train, "train_images": len(y), "split": test, "test_images": len(y_test)}
        for k in NEIGHBOURS:
            classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(k)).fit(x, y)
            found[f"accuracy_{k}{suffix}"] = float(classifier.score(x_test, y_test))
    return found | counts
