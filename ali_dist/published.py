"""Published test errors of semi-supervised training, in percent: (data set, labels) -> what a table prints.

ALI, arXiv:1606.00704, tables 1 and 2. On CIFAR-10 the paper's error bars are three standard deviations.
"""

PUBLISHED = {
    ("svhn", 1_000): (
        "ALI 7.42 +- 0.65",
        "GAN with feature matching 8.11 +- 1.3",
        "SDGM 16.61",
        "SWWAE 23.56",
        "VAE (M1+M2) 36.02",
    ),
    ("cifar10", 1_000): ("ALI 19.98 +- 0.89", "GAN with feature matching 21.83 +- 2.01"),
    ("cifar10", 2_000): ("ALI 19.09 +- 0.44", "GAN with feature matching 19.61 +- 2.09"),
    ("cifar10", 4_000): (
        "ALI 17.99 +- 1.62",
        "GAN with feature matching 18.63 +- 2.32",
        "CatGAN 19.58",
        "ladder network 20.40",
    ),
    ("cifar10", 8_000): ("ALI 17.05 +- 1.49", "GAN with feature matching 17.72 +- 1.82"),
}
