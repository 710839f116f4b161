"""The data sets, one row each. A new one is a reader file and a row here."""

from ali_dist.data.celeba import open_celeba
from ali_dist.data.cifar10 import open_cifar10
from ali_dist.data.digits import open_digits
from ali_dist.data.folder import open_folder
from ali_dist.data.imagenet64 import open_imagenet64
from ali_dist.data.svhn import open_svhn
from ali_dist.data.tinyimagenet import open_tinyimagenet
from ali_dist.data.types import Archive, DatasetSpec

DATASETS: dict[str, DatasetSpec] = {
    "tinyimagenet": DatasetSpec(
        name="tinyimagenet",
        shape=(3, 64, 64),
        counts={"train": 100_000, "valid": 10_000},
        open=open_tinyimagenet,
        source="tiny-imagenet-200.zip (or its folder), from http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        archives=(Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
    ),
    "imagenet64": DatasetSpec(
        name="imagenet64",
        shape=(3, 64, 64),
        counts={"train": 1_281_167, "valid": 50_000},
        open=open_imagenet64,
        source="a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz (or "
        "train/ and val/ with a folder a class; or the batches of the 64x64 images), by hand from "
        "https://image-net.org/download, which gives them to registered users",
    ),
    "celeba": DatasetSpec(
        name="celeba",
        shape=(3, 64, 64),
        counts={"train": 162_770, "valid": 19_867, "test": 19_962},
        open=open_celeba,
        source="a folder with img_align_celeba.zip (or its folder), list_attr_celeba.txt and list_eval_partition.txt, "
        "by hand from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, whose terms ask for your consent",
    ),
    "svhn": DatasetSpec(
        name="svhn",
        shape=(3, 32, 32),
        counts={"train": 531_131, "valid": 73_257, "test": 26_032},
        open=open_svhn,
        source="a folder with train_32x32.mat, extra_32x32.mat and test_32x32.mat, "
        "from http://ufldl.stanford.edu/housenumbers/",
        archives=(
            Archive("http://ufldl.stanford.edu/housenumbers/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            Archive("http://ufldl.stanford.edu/housenumbers/extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7"),
            Archive("http://ufldl.stanford.edu/housenumbers/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
    "cifar10": DatasetSpec(
        name="cifar10",
        shape=(3, 32, 32),
        counts={"train": 45_000, "valid": 5_000, "test": 10_000},
        open=open_cifar10,
        source="cifar-10-python.tar.gz or cifar-10-binary.tar.gz (or its folder), "
        "from https://www.cs.toronto.edu/~kriz/cifar.html",
        archives=(
            Archive("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        ),
    ),
    "digits": DatasetSpec(
        name="digits",
        shape=(1, 32, 32),
        counts={"train": 1_437, "valid": 360},
        open=open_digits,
    ),
    "folder": DatasetSpec(
        name="folder",
        shape=(3, 64, 64),
        counts={},
        open=open_folder,
        source="a folder or zip of your own images, a folder a class, with or without train/ and valid/ around them",
        resizable=True,
    ),
}
