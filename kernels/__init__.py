"""Fused Triton kernels for ALI's networks, each beside its reference in plain torch. Importing touches no device."""

from kernels.bias_leaky_relu_dropout import bias_leaky_relu_dropout

__all__ = ["bias_leaky_relu_dropout"]
