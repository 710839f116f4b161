"""Batch norm + leaky ReLU whose statistics are taken over all workers' batches together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GlobalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, gather):
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        x32 = x.float()
        count = x32.new_full((1,), x.numel() // x.shape[1])
        var, mean = torch.var_mean(x32, dims, correction=0)
        rows = gather(torch.cat([count, mean, var * count]))
        counts, means, m2s = rows.split([1, len(mean), len(mean)], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (m2s.sum(0) + (counts * (means - mean) ** 2).sum(0)) / total
        invstd = torch.rsqrt(var + eps)
        x_hat = (x32 - mean.view(shape)) * invstd.view(shape)
        ctx.save_for_backward(x_hat, weight, invstd, total)
        ctx.gather, ctx.dtype = gather, x.dtype
        ctx.mark_non_differentiable(mean, var, total)
        return (x_hat * weight.view(shape) + bias.view(shape)).to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx, dy, *_):
        x_hat, weight, invstd, total = ctx.saved_tensors
        dims = [0, *range(2, dy.dim())]
        shape = [1, -1, *[1] * (dy.dim() - 2)]
        dy = dy.float()
        dbias, dweight = dy.sum(dims), (dy * x_hat).sum(dims)
        sum_dy, sum_dy_x_hat = ctx.gather(torch.stack([dbias, dweight])).sum(0)
        dx = dy - (sum_dy.view(shape) + x_hat * sum_dy_x_hat.view(shape)) / total
        return (dx * (weight * invstd).view(shape)).to(ctx.dtype), dweight, dbias, None, None


class BatchNormLeakyReLU(nn.Module):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, slope=0.01, gather=None):
        super().__init__()
        self.eps, self.momentum, self.slope, self.gather = eps, momentum, slope, gather
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features))
        self.register_buffer("running_var", torch.empty(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.gather is None:
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
        else:
            y, mean, var, total = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps, self.gather)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (total / (total - 1)), self.momentum)
        if self.training:
            self.num_batches_tracked += 1
        return F.leaky_relu(y, self.slope)
