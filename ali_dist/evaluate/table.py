"""METRICS: name -> function of (model, index, work) that returns named numbers."""

from functools import partial

from ali_dist.evaluate.classes import classes
from ali_dist.evaluate.classification import classification
from ali_dist.evaluate.distances import DISTANCES
from ali_dist.evaluate.knn import knn
from ali_dist.evaluate.linear import linear
from ali_dist.evaluate.linear_layers import linear_layers
from ali_dist.evaluate.posterior import posterior
from ali_dist.evaluate.reconstruction import reconstruction
from ali_dist.evaluate.svm import svm

METRICS = {
    "linear": linear,
    "linear-layers": linear_layers,
    "knn": knn,
    "svm": svm,
    "svm-paper": partial(svm, kind="paper"),
    "reconstruction": reconstruction,
    "posterior": posterior,
    "classes": classes,
    "classification": classification,
    **DISTANCES,
}
