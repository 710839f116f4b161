"""Compiles what the ops launch, for a GPU that need not be here: python aot.py TARGET [--quick] -> JSON lines.

Run without TRITON_INTERPRET. Each op is called on CPU tensors of real layer shapes with a recorder that makes no
launch; every one with other settings or types is then compiled as Triton's JIT would for those arguments (16-byte
aligned pointers, integers divisible by 16). --quick: bfloat16 alone, and of each op's options those with dropout.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import chain

import torch
import triton
from kernel_checks import differentiable
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import bn_forward
from kernels.dispatch import record_launches
from kernels.ops import OPS, features

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def describe(value):
    """The type of a kernel argument as Triton writes it, and whether the JIT would take it as divisible by 16."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def source(launch):
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    constants = dict(launch.constexprs) | {name: value for name, value in values.items() if value is None}
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name], divisible = describe(values[name])
        if divisible and name not in launch.kernel.do_not_specialize:
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attrs)


def cuobjdump(compiled, what):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def resources(compiled, target):
    """Registers and spills (stores to local memory) of a thread; its 16-byte and its narrower global loads."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
        widths = [16 if kind == "dwordx4" else 0 for kind in re.findall(r"(?:global|buffer)_load_(\w+)", text)]
    else:
        usage = cuobjdump(compiled, "-res-usage")
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        # A stack may also serve a call; disassembly, which tells, is slow.
        spills = len(re.findall(r"\bSTL\b", cuobjdump(compiled, "-sass"))) if stack else 0
        loads = re.findall(r"ld\.global[.:\w]*?(?:\.v(\d))?\.[a-z](\d+)\b", compiled.asm["ptx"])
        widths = [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    wide = sum(width == 16 for width in widths)
    return {"registers": registers, "spills": spills, "wide_loads": wide, "narrow_loads": len(widths) - wide}


def launches(op, dtype, quick):
    for shape in op.shapes.values():
        for options in [op.options["dropout"]] if quick and "dropout" in op.options else op.options.values():
            with record_launches(run=False) as made:
                y = op.function(**op.inputs(shape, dtype), **options, impl="triton")
                for out in differentiable(y):
                    out.backward(torch.empty_like(out), retain_graph=True)
            yield from ((op, launch) for launch in made)


def synchronised_launches(dtype):
    """What batch norm launches on either side of its reduce hook."""
    x, running = features((128, 64, 28, 28), dtype), (torch.ones(64), torch.ones(64), torch.tensor(0))
    with record_launches(run=False) as made:
        bn_forward.finish(bn_forward.stats(x)[None], x, running, 0.1, 1e-5)
    yield from ((OPS["bn_leaky_relu"], launch) for launch in made)


def main(name, quick):
    torch.randn = torch.empty  # no value is looked at, and drawing them takes longer than compiling
    target, seen, dtypes = TARGETS[name], set(), (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32)
    made = [launches(op, dtype, quick) for op in OPS.values() for dtype in dtypes]
    for op, launch in chain(*made, *map(synchronised_launches, dtypes)):
        constexprs = {name: str(value) for name, value in launch.constexprs.items()}
        types = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg) for arg in launch.args]
        row = {"op": op.name, "kernel": launch.kernel.__name__, "dtype": str(launch.args[0].dtype)}
        if (key := f"{row} {constexprs} {types} {launch.num_warps}") in seen:
            continue
        seen.add(key)
        num_warps = launch.hip_warps if target.backend == "hip" else launch.num_warps
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        row |= resources(triton.compile(source(launch), target=target, options=options), target)
        print(json.dumps(row | {"constexprs": constexprs}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv)
