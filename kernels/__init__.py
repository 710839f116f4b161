"""Fused Triton kernels for ALI's networks, each beside its reference in plain torch. Importing touches no device."""

from kernels.batch_norm import BatchNormLeakyReLU
from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout
from kernels.bn_leaky_relu import bn_leaky_relu
from kernels.joint_input import joint_input

__all__ = ["BatchNormLeakyReLU", "bias_leaky_relu_dropout", "bn_leaky_relu", "joint_input"]
