"""Fused Triton kernels for ALI's networks, each beside its reference in plain torch. Importing touches no device."""

from kernels.batch_norm import BatchNormLeakyReLU
from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout
from kernels.bn_leaky_relu import bn_leaky_relu
from kernels.decoder_head import decoder_head
from kernels.flat_adam import FlatAdam
from kernels.image_pair import image_pair
from kernels.joint_input import joint_input
from kernels.latent_pair import latent_pair
from kernels.maxout import maxout

__all__ = [
    "BatchNormLeakyReLU",
    "FlatAdam",
    "bias_leaky_relu_dropout",
    "bn_leaky_relu",
    "decoder_head",
    "image_pair",
    "joint_input",
    "latent_pair",
    "maxout",
]
