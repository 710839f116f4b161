"""The data sets, one row each. A new one is a reader file and a row here."""

from ali_dist.data.cifar10 import open_cifar10
from ali_dist.data.digits import open_digits
from ali_dist.data.tinyimagenet import open_tinyimagenet
from ali_dist.data.types import DatasetSpec

DATASETS: dict[str, DatasetSpec] = {
    "tinyimagenet": DatasetSpec(
        name="tinyimagenet",
        shape=(3, 64, 64),
        counts={"train": 100_000, "valid": 10_000},
        open=open_tinyimagenet,
        source="tiny-imagenet-200.zip (or its folder), from http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    "cifar10": DatasetSpec(
        name="cifar10",
        shape=(3, 32, 32),
        counts={"train": 45_000, "valid": 5_000, "test": 10_000},
        open=open_cifar10,
        source="cifar-10-python.tar.gz or cifar-10-binary.tar.gz (or its folder), "
        "from https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "digits": DatasetSpec(
        name="digits",
        shape=(1, 32, 32),
        counts={"train": 1_437, "valid": 360},
        open=open_digits,
    ),
}
