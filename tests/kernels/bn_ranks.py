"""One rank of the synchronised batch norm test: python bn_ranks.py RANK RANKS FOLDER.

Every rank draws the same inputs, takes its own images of each case, and leaves outputs and gradients in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from kernel_checks import run

from kernels.bn_leaky_relu import bn_leaky_relu
from kernels.ops import OPS

# Images of each rank; the third rank has no part in the first case.
CASES = {"two ranks": (5, 2), "three ranks": (1, 4, 3), "a rank without images": (4, 0, 3)}
SHAPE = (24, 5, 3)
OPTIONS = {"slope": 0.1, "momentum": 0.05, "eps": 1e-4}


def draw(case):
    """Inputs of all ranks together, with a large mean, and the gradient from above."""
    torch.manual_seed(len(case))
    inputs = OPS["bn_leaky_relu"].inputs((sum(CASES[case]), *SHAPE), torch.float32)
    inputs["x"] = (inputs["x"].detach() + 100).requires_grad_()
    inputs["num_batches_tracked"] = torch.tensor(3)
    return inputs, torch.randn_like(inputs["x"])


def main(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for case, images in CASES.items():
        group = dist.new_group(list(range(len(images))))
        if rank >= len(images):
            continue

        def gather(tensor, group=group, images=images):
            rows = [torch.empty_like(tensor) for _ in images]
            dist.all_gather(rows, tensor, group=group)
            return torch.stack(rows)

        for impl in ("ref", "triton"):
            inputs, seed = draw(case)
            mine = slice(sum(images[:rank]), sum(images[: rank + 1]))
            inputs["x"] = inputs["x"].detach()[mine].requires_grad_()
            out = run(bn_leaky_relu, inputs, [seed[mine]], **OPTIONS, reduce=gather, impl=impl)
            buffers = {name: value for name, value in inputs.items() if name.startswith(("running", "num"))}
            torch.save(out | buffers, folder / f"{case} {impl} {rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
