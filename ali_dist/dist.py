"""Rank, world and the few collectives the job needs; all are no-ops in a process without a process group."""

import json
from collections.abc import Callable

import torch
import torch.distributed as dist


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Every rank's `tensor` (same shape and dtype on all), stacked in rank order: [W, *shape]."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    out = tensor.new_empty(world_size(), *tensor.shape)
    dist.all_gather(list(out.unbind()), tensor.contiguous())
    return out


def start_sum(tensor: torch.Tensor, bf16: bool = False) -> Callable[[], object]:
    """Begins to add up every rank's `tensor` in place, sent in bfloat16 if so; call what it returns before reading."""
    if world_size() == 1:
        return lambda: None
    if not bf16:
        return dist.all_reduce(tensor, async_op=True).wait
    sent = tensor.bfloat16()
    work = dist.all_reduce(sent, async_op=True)

    def finish() -> None:
        work.wait()
        tensor.copy_(sent)

    return finish


def send_in_bf16(parallel: torch.nn.Module) -> None:
    """Has a DistributedDataParallel exchange gradients in bfloat16."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    # By another name: PyTorch refuses its own hook for gloo, which has learnt bfloat16 since
    parallel.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))


def from_rank0(value: float, device: torch.device) -> float:
    """Rank 0's number, on every rank."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(box, src=0)
    return box.item()


def tensors_from_rank0(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Rank 0's tensors by name, on every rank's device; the others' are not looked at."""
    if world_size() == 1:
        return tensors
    about = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]
    words = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    head = torch.empty(int(from_rank0(len(words), device)), dtype=torch.uint8, device=device)
    if rank() == 0:
        head.copy_(words)
    dist.broadcast(head, src=0)
    out = {}
    for name, dtype, shape in json.loads(bytes(head.tolist())):
        out[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if rank() == 0:
            out[name].copy_(tensors[name])
        dist.broadcast(out[name], src=0)
    return out


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def leave() -> None:
    if active():
        dist.destroy_process_group()
