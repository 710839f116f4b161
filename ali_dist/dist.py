"""Rank, world and the few collectives the job needs; all are no-ops in a process without a process group."""

import os

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
    flat = tensor.contiguous().reshape(1, -1)
    out = flat.new_empty(world_size(), flat.shape[1])
    dist.all_gather_into_tensor(out, flat)
    return out.reshape(world_size(), *tensor.shape)


def from_rank0(value: float, device: torch.device) -> float:
    """Rank 0's number, on every rank."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(box, src=0)
    return box.item()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def device_for_this_rank(gpu: bool) -> torch.device:
    """CUDA device LOCAL_RANK, made current, or the CPU."""
    if not gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
    torch.cuda.set_device(device)
    return device


def join_torchrun(gpu: bool) -> None:
    """Joins the group that torchrun's environment describes, if there is one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not active():
        dist.init_process_group("nccl" if gpu else "gloo")


def leave() -> None:
    if active():
        dist.destroy_process_group()
