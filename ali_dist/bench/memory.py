"""What autograd keeps between a forward pass and its backward pass."""

import torch
from torch import Tensor


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Inside it, collects the memory of all tensors that are saved for backward, on any device."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []  # kept, so that no address is given out twice
        super().__init__(self._keep, lambda tensor: tensor)

    def __enter__(self) -> "Kept":
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def storages(self, at_least: int = 0) -> dict[int, int]:
        """Address -> bytes of each piece of memory, however many tensors are views of it."""
        found = {address(t): t.untyped_storage().nbytes() for t in self.tensors}
        return {place: size for place, size in found.items() if size >= at_least}

    def bytes_beside(self, parameters: list[Tensor]) -> int:
        """All of it but the parameters themselves."""
        own = {address(parameter) for parameter in parameters}
        return sum(size for place, size in self.storages().items() if place not in own)


def address(tensor: Tensor) -> int:
    """Where the memory begins that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()
