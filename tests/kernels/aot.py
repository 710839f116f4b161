"""Compiles what the ops launch, for a GPU that need not be here: python aot.py TARGET [DTYPE ...] -> JSON lines.

Run without TRITON_INTERPRET. Each op is called on CPU tensors of real layer shapes with a recorder that makes no
launch; every distinct one is then compiled as Triton's JIT would for those arguments (16-byte aligned pointers,
integers divisible by 16).
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from kernel_checks import differentiable
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.dispatch import record_launches
from kernels.ops import OPS

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


def resources(compiled, target):
    """Registers and spills (stores to local memory) of a thread; its 16-byte and its narrower global loads."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
        widths = [16 if kind == "dwordx4" else 0 for kind in re.findall(r"(?:global|buffer)_load_(\w+)", text)]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
            text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        registers, spills = int(re.search(r"REG:(\d+)", text)[1]), len(re.findall(r"\bSTL\b", text))
        loads = re.findall(r"ld\.global[.:\w]*?(?:\.v(\d))?\.[a-z](\d+)\b", compiled.asm["ptx"])
        widths = [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    wide = sum(width == 16 for width in widths)
    return {"registers": registers, "spills": spills, "wide_loads": wide, "narrow_loads": len(widths) - wide}


def launches(op, dtype):
    for shape in op.shapes.values():
        for options in op.options.values():
            with record_launches(run=False) as made:
                y = op.function(**op.inputs(shape, dtype), **options, impl="triton")
                for out in differentiable(y):
                    out.backward(torch.empty_like(out), retain_graph=True)
            yield from made


def main(name, dtypes):
    torch.randn = torch.empty  # no value is looked at, and drawing them takes longer than compiling
    target, seen = TARGETS[name], set()
    for op in OPS.values():
        for launch in (made for dtype in dtypes for made in launches(op, dtype)):
            src = source(launch)
            if (key := src.hash()) in seen:
                continue
            seen.add(key)
            options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
            row = {"op": op.name, "kernel": launch.kernel.__name__, "dtype": str(launch.args[0].dtype)}
            row |= resources(triton.compile(src, target=target, options=options), target)
            print(json.dumps(row | {"constexprs": {k: str(v) for k, v in launch.constexprs.items()}}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [getattr(torch, name) for name in sys.argv[2:]] or [torch.bfloat16, torch.float32])
