"""Branches of work that a GPU may do side by side; without a stream, as on a CPU, one after the other."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def branch(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """Its body's work goes to `stream`, after all that has been launched so far."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)


def join(stream: torch.cuda.Stream | None, *made: Tensor) -> None:
    """What follows comes after the branch and may read what it `made`."""
    if stream is None:
        return
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    for tensor in made:
        tensor.record_stream(current)
