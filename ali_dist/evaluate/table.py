"""METRICS: name -> function of (model, index) that returns named numbers."""

from ali_dist.evaluate.classes import classes
from ali_dist.evaluate.linear import linear

METRICS = {
    "linear": linear,
    "classes": classes,
}
