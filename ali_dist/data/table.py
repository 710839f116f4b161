"""The data sets, one row each. A new one is a reader file and a row here."""

from ali_dist.data.celeba import open_celeba
from ali_dist.data.cifar10 import open_cifar10
from ali_dist.data.digits import open_digits
from ali_dist.data.folder import open_folder
from ali_dist.data.imagenet64 import open_imagenet64
from ali_dist.data.svhn import open_svhn
from ali_dist.data.tinyimagenet import open_tinyimagenet
from ali_dist.data.types import DatasetSpec

DATASETS: dict[str, DatasetSpec] = {
    "tinyimagenet": DatasetSpec(
        name="tinyimagenet",
        shape=(3, 64, 64),
        counts={"train": 100_000, "valid": 10_000, "unlabelled": 10_000},
        open=open_tinyimagenet,
        source="tiny-imagenet-200.zip (or its folder), from http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        archives=("tiny-imagenet-200.zip",),
        address="http://cs231n.stanford.edu",
        md5={"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
    ),
    "imagenet64": DatasetSpec(
        name="imagenet64",
        shape=(3, 64, 64),
        counts={"train": 1_281_167, "valid": 50_000},
        open=open_imagenet64,
        source="ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz in one folder (or "
        "train/ and val/ with a folder a class; or the batches of the 64x64 images), by hand from "
        "https://image-net.org/download, which gives them to registered users",
        archives=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"),
        md5={
            "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
            "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
            "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
        },
    ),
    "celeba": DatasetSpec(
        name="celeba",
        shape=(3, 64, 64),
        counts={"train": 162_770, "valid": 19_867, "test": 19_962},
        open=open_celeba,
        source="img_align_celeba.zip (or its folder), list_attr_celeba.txt and list_eval_partition.txt in one folder, "
        "by hand from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, whose terms ask for your consent",
        archives=("img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"),
        md5={
            "img_align_celeba.zip": "00d2c5bc6d35e252742224ab0c1e8fcb",
            "list_attr_celeba.txt": "75e246fa4810816ffd6ee81facbd244c",
            "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
        },
    ),
    "svhn": DatasetSpec(
        name="svhn",
        shape=(3, 32, 32),
        counts={"train": 531_131, "valid": 73_257, "test": 26_032},
        open=open_svhn,
        source="train_32x32.mat, extra_32x32.mat and test_32x32.mat in one folder, "
        "from http://ufldl.stanford.edu/housenumbers/",
        archives=("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat"),
        address="http://ufldl.stanford.edu/housenumbers",
        md5={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    "cifar10": DatasetSpec(
        name="cifar10",
        shape=(3, 32, 32),
        counts={"train": 45_000, "valid": 5_000, "test": 10_000},
        open=open_cifar10,
        source="cifar-10-python.tar.gz or cifar-10-binary.tar.gz (or its folder), "
        "from https://www.cs.toronto.edu/~kriz/cifar.html",
        archives=("cifar-10-python.tar.gz",),
        address="https://www.cs.toronto.edu/~kriz",
        md5={
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        },
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
