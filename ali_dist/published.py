"""Published figures, in percent, as a table prints them beside ours.

ALI, arXiv:1606.00704, tables 1 and 2. On CIFAR-10 the paper's error bars are three standard deviations.
"""

PUBLISHED = {  # test errors of semi-supervised training: (data set, labels)
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

SVM = {  # test errors of L2-SVMs on features, 1,000 labels: arXiv:1606.00704, table 1
    "svhn": ("ALI, L2-SVM 19.14 +- 0.50", "DCGAN, L2-SVM 22.18"),
}

LAYERS = {  # test accuracies of classifiers on a BiGAN encoder's convolutional layers: arXiv:1808.06670
    "cifar10": ("BiGAN, linear SVM 56.40 +- 1.12", "BiGAN, one hidden layer 62.57"),
    "tinyimagenet": ("BiGAN, one hidden layer 24.38",),
}
