"""Times whole updates of ALI, all ways in turn, after checking that they compute the same losses and gradients."""

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from ali_dist import cli
from ali_dist.bench.about import about, head
from ali_dist.bench.floors import floor, memory_floor
from ali_dist.bench.memory import Kept
from ali_dist.bench.plain import PlainALI
from ali_dist.bench.ways import Joint, Ours, Plain, Separate, ways, without_dropout
from ali_dist.data.stream import Batch
from ali_dist.layers import Layer
from ali_dist.losses import per_image_losses
from ali_dist.recipe import Recipe, UserError
from ali_dist.recipes import RECIPES
from ali_dist.state import TrainState
from ali_dist.tables import NETWORKS
from ali_dist.worker import keep_freed_memory

WARM_UP = {"cpu": 2, "cuda": 6}  # updates; a graph is captured before the fourth
HOST_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
A_TURN = {"cpu": 1, "cuda": 10}  # updates between looks at the clock, for which a GPU must have finished
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2}  # of the relative differences; batch norm amplifies rounding


def random_batch(nets_image: tuple[int, int, int], size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (size, *nets_image), dtype=torch.uint8, generator=generator)
    y = torch.zeros(size, dtype=torch.long)
    if torch.cuda.is_available():
        x, y = x.pin_memory(), y.pin_memory()
    return Batch(x, y, torch.arange(size), size)


def check(recipe: Recipe, device: torch.device, compiled: bool) -> dict[str, dict[str, float]]:
    """Name -> relative differences of the losses and of all gradients from ours, without dropout.

    In float64, on a GPU in float32. The initial weights leave gradients that are rounding alone, so these have the
    scale that keeps features alive. RuntimeError when a way computes something else.
    """
    nets = without_dropout(NETWORKS[recipe.networks])
    state = TrainState(replace(recipe, precision="fp32"), torch.full(nets.image, 0.5, dtype=torch.float64), device)
    for module in state.model.modules():
        if isinstance(module, Layer):
            nn.init.normal_(module.weight, std=(module.weight[0].numel()) ** -0.5)
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    state.model.nets = nets
    exact = torch.float32 if device.type == "cuda" else torch.float64
    state.model.to(exact)
    peers: dict[str, Plain] = {"joint": Joint(state, nets, bf16=False), "separate": Separate(state, nets, bf16=False)}
    if compiled:
        peers["joint compiled"] = Joint(state, nets, bf16=False, compiled="default")
    x, z, eps = (v.to(exact) for v in peers["joint"].draw(random_batch(nets.image, recipe.optim.batch_size)))
    for peer in peers.values():
        peer.model.to(exact)

    def gradients(loss_d: Tensor, loss_g: Tensor, model: nn.Module) -> Tensor:
        """Both losses' gradients, each divided by its own norm, in the order of the parameters' names in ALI."""
        named = sorted((name.replace(".conv.", "."), p) for name, p in model.named_parameters())
        vectors = []
        for loss, judge in ((loss_d, True), (loss_g, False)):
            wanted = [p for name, p in named if name.startswith("discriminator") == judge]
            vector = torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted, retain_graph=True)])
            vectors.append(vector / vector.norm())
        return torch.cat(vectors)

    out, judge = state.model(x, z, eps), state.model.discriminator
    z_hat = out.mu + out.log_sigma.exp() * eps
    logits = {
        "joint": (out.logits_q, out.logits_p),
        "separate": (judge(x, z_hat[:, :, None, None])[0], judge(out.x_tilde, z[:, :, None, None])[0]),
    }
    found = {}
    for name, peer in peers.items():
        mine = [loss.mean() for loss in per_image_losses(*logits[name.split()[0]])]
        theirs = peer.run(x, z, eps)
        found[name] = {
            "losses": max(abs(float((a / b).detach()) - 1) for a, b in zip(theirs, mine, strict=True)),
            "gradients": float((gradients(*theirs, peer.model) - gradients(*mine, state.model)).norm()),
        }
        worst = max(found[name].values())
        if not worst <= TOLERANCE[exact]:
            raise RuntimeError(f"{name} computes something else than ours: {found[name]}")
    return found


def measure(
    recipe: Recipe,
    device: torch.device,
    seconds: float,
    makers: dict[str, Callable],
    say: Callable[[str], None],
    between: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Times some and then more updates of every way in turn until each has had `seconds`; `between` has turns too.

    Rows: name, seconds an update (quartiles), images/s; of the paper's step on a CPU the bytes an image that its
    forward pass keeps for backward; on a GPU kernels and launches an update and megabytes at the peak; "failed" where
    one cannot run.
    """
    batch, gpu = random_batch(NETWORKS[recipe.networks].image, recipe.optim.batch_size), device.type == "cuda"

    def turn(way: Any, updates: int) -> float:
        start = time.perf_counter()
        for _ in range(updates):
            way.step(batch)
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / updates

    made: dict[str, Any] = {}
    rows = {name: {"name": name} for name in makers}
    times: dict[str, list[float]] = {name: [] for name in makers}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # whatever a compiler or device may raise; the others are still worth timing
            rows[name]["failed"] = f"{type(error).__name__}: {error}".split("\n")[0]
            say(f"failed: {name}: {rows[name]['failed']}")
            made.pop(name, None)

    def begin(name: str) -> None:
        say(f"warming up: {name}")
        held = _peak_reset() if gpu else 0
        made[name] = makers[name]()
        turn(made[name], WARM_UP[device.type])
        if gpu:
            rows[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
            with suppress(Exception):  # a profiler that cannot run here is no reason not to time
                rows[name] |= launches(lambda: turn(made[name], 1))
        if isinstance(made[name], Ours):
            rows[name]["loss_d"] = made[name].loss()
        if getattr(made[name], "failure", ""):
            rows[name]["without_graph"] = made[name].failure

    for name in makers:
        attempt(name, lambda name=name: begin(name))
    while any(sum(times[name]) * A_TURN[device.type] < seconds or len(times[name]) < 3 for name in made):
        for name in list(made):
            attempt(name, lambda name=name: times[name].append(turn(made[name], A_TURN[device.type])))
        between()
    for name in made:
        low, middle, high = quantiles(times[name], n=4)
        rows[name] |= {"updates": len(times[name]) * A_TURN[device.type], "low": low, "median": middle, "high": high}
        rows[name]["images_per_s"] = recipe.optim.batch_size / middle
        if not gpu and isinstance(made[name], (Joint, Ours)) and "compiled" not in name:
            with Kept() as kept:
                turn(made[name], 1)
            model = made[name].state.model if isinstance(made[name], Ours) else made[name].model
            rows[name]["kept_bytes_per_image"] = kept.bytes_beside(list(model.parameters())) / recipe.optim.batch_size
    return list(rows.values())


def _peak_reset() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def launches(call: Callable[[], object]) -> dict[str, int]:
    """Kernels that a GPU runs in a call, and how often the host launches one or a graph of them."""
    with torch.profiler.profile(acc_events=True) as profile:
        call()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    host = [event for event in profile.events() if event.name in HOST_LAUNCHES]
    return {"kernels": len(events), "launches": len(host)}


def bench_step(recipe: Recipe, device: torch.device, flags: "Flags", say: Callable[[str], None]) -> dict[str, object]:
    """Differences, times, ratios and the arithmetic's floor, all of this process."""
    levers = flags.levers or device.type == "cuda"
    makers, parts = ways(recipe, device, flags.compile, levers), flags.only.split(",")
    makers = {name: make for name, make in makers.items() if name == "ours" or any(part in name for part in parts)}
    # Two backward passes share one graph, so that compiled code may not give its buffers away in the first.
    torch._functorch.config.donated_buffer = False
    gpu = device.type == "cuda"
    try:
        torch.backends.cudnn.allow_tf32 = False  # of float32's products; bfloat16's know nothing of it
        differences = check(recipe, device, any("compiled" in name for name in makers))
    except RuntimeError as error:
        if not gpu:
            raise
        differences = {}  # a borrowed GPU's minutes are not thrown away, but the result says what it is
        say(f"NOT CHECKED that all compute the same: {error}")
    torch.backends.cudnn.allow_tf32 = True
    for name, found in differences.items():
        say(f"{name} against ours: losses differ by {found['losses']:.1e}, gradients by {found['gradients']:.1e}")
    say("timing each product of the step alone")
    nets, alone = NETWORKS[recipe.networks], []
    floors = floor(nets, recipe.optim.batch_size, device)
    between = (lambda: None) if gpu else (lambda: alone.append(floors.again()))  # as a CPU's speed swings
    rows = measure(recipe, device, flags.seconds, makers, say, between)
    seconds, ours = median(alone) if alone else floors.seconds, rows[-1].get("median", math.nan)
    for row in rows:
        if "median" in row:
            row["ratio"] = row["median"] / ours
            say(_line(row))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in PlainALI(nets).parameters())
    memory = memory_floor(nets, recipe.optim.batch_size, parameters, device)
    for row in rows:
        if "median" in row:
            row["flops_per_s"] = floors.flops / row["median"]
            row["share_of_floor"] = seconds / row["median"]
            row["share_of_memory_floor"] = memory["seconds"] / row["median"]
    found = {"flops": floors.flops, "seconds": seconds, "flops_per_s": floors.flops / seconds, "layers": floors.rows}
    return {"differences": differences, "ways": rows, "floor": found, "memory_floor": memory}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Whole updates on random images, all ways in one process, in turn; ratios are theirs / ours."""

    dataset: str = "cifar10"
    """Data set whose networks to train."""
    batch_size: int = 0
    """Images an update; default: the recipe's."""
    seconds: float = 10.0
    """How long to time each way."""
    compile: bool = True
    """Also time what torch.compile makes of the step, which takes minutes, and a C++ compiler on a CPU."""
    levers: bool = False
    """Also time ours without, with each and with all of its levers, as is done on a GPU anyway."""
    only: str = ""
    """Time the ways alone whose names contain one of these words, parted by commas, and ours."""
    json: bool = False
    """Print JSON, and the lines on stderr."""

    def run(self) -> None:
        if self.dataset not in RECIPES:
            raise cli.did_you_mean("data set", self.dataset, RECIPES)
        if self.batch_size < 0 or self.batch_size == 1 or self.seconds <= 0:
            raise UserError("--batch-size must be at least 2 and --seconds positive")
        keep_freed_memory()
        recipe, device = RECIPES[self.dataset], torch.device("cuda" if torch.cuda.is_available() else "cpu")
        optim = replace(recipe.optim, batch_size=self.batch_size or recipe.optim.batch_size)
        result = about(device) | {"dataset": self.dataset, "batch_size": optim.batch_size}
        say = partial(print, file=sys.stderr if self.json else sys.stdout, flush=True)
        say(head(result))
        result |= bench_step(replace(recipe, optim=optim), device, self, say)
        for row in result["ways"]:
            say(_line(row))
        floor = result["floor"]
        say(
            f"{floor['flops'] / 1e9:,.0f} GFLOP an update; each product alone in its best form: "
            f"{1e3 * floor['seconds']:.1f} ms, {floor['flops_per_s'] / 1e12:.3f} TFLOP/s"
        )
        memory = result["memory_floor"]
        say(
            f"{memory['bytes'] / 1e9:,.2f} GB an update, moved once: {1e3 * memory['seconds']:.1f} ms at the "
            f"{memory['bytes_per_s'] / 1e9:,.0f} GB/s of a copy"
        )
        if self.json:
            print(json.dumps(result, indent=1))


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['name']:<28} failed: {row['failed']}"
    return (
        f"{row['name']:<28} {1e3 * row['median']:>9.1f} ms [{1e3 * row['low']:.1f}, {1e3 * row['high']:.1f}]"
        f" {row['images_per_s']:>8.1f} images/s {row['ratio']:>6.2f}x ours"
        + (f" {row['flops_per_s'] / 1e12:>7.3f} TFLOP/s" if "flops_per_s" in row else "")
        + (f" {row['share_of_floor']:>5.0%} of the floor" if "share_of_floor" in row else "")
        + (f" {row['kept_bytes_per_image'] / 1e6:.2f} MB kept an image" if "kept_bytes_per_image" in row else "")
        + (f" {row['peak_mb']:,.0f} MB" if "peak_mb" in row else "")
        + (f" {row['kernels']} kernels {row['launches']} launches" if "kernels" in row else "")
        + (f" L_D {row['loss_d']:.4f}" if "loss_d" in row else "")
        + (f" without a graph: {row['without_graph']}" if "without_graph" in row else "")
    )
