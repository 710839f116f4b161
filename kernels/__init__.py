"""Fused Triton kernels for ALI's networks, each beside its reference in plain torch. Importing touches no device."""

from kernels.batch_norm import BatchNormLeakyReLU
from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout
from kernels.bn_leaky_relu import bn_leaky_relu

__all__ = ["BatchNormLeakyReLU", "bias_leaky_relu_dropout", "bn_leaky_relu"]
