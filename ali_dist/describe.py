"""The networks of a data set as tables: layer, output shape, parameters, FLOPs; totals per network."""

import json
from dataclasses import dataclass
from typing import Any

import tyro

from ali_dist import cli
from ali_dist.recipes import find
from ali_dist.tables import NETWORKS, Networks, Row, plane_shapes


@dataclass(frozen=True, kw_only=True)
class Flags:
    dataset: str
    """Data set whose networks to print."""
    conditional: bool = False
    """The networks that are given the class or the attributes."""
    labels: bool = False
    """The networks of semi-supervised training, whose D tells classes apart."""
    json: bool = False
    """Print JSON instead of tables."""


def layers(shape: tuple[int, int, int], rows: tuple[Row, ...]) -> list[dict[str, Any]]:
    """One dict per row: what it is, output [C, H, W], parameters, and FLOPs of its convolution an image (2 a MAC)."""
    described = []
    for row, out in zip(rows, plane_shapes(shape, rows), strict=True):
        weights = row.kernel**2 * (shape[0] + row.embedding) * row.maps
        bias = {"none": 0, "channel": row.maps, "pixel": out[0] * out[1] * out[2]}[row.bias]
        # A convolution applies its weights at each output pixel, a transposed one at each input pixel.
        pixels = shape[1] * shape[2] if row.transposed else out[1] * out[2]
        described.append(
            {
                "layer": ("T" if row.transposed else "") + f"{row.kernel}/{row.stride}/{row.maps}",
                "embedding": row.embedding,
                "shape": list(out),
                "batch_norm": row.bn,
                "bias": row.bias,
                "dropout": row.dropout,
                "activation": row.act,
                "parameters": weights + bias + (2 * row.maps if row.bn else 0),
                "flops": 2 * weights * pixels,
            }
        )
        shape = out
    return described


def describe(nets: Networks) -> dict[str, Any]:
    """{"networks": {name: {"input", "layers", "parameters", "flops"}}, "parameters", "flops"}."""
    networks = {}
    for name, (shape, rows) in nets.parts().items():
        rows_described = layers(shape, rows)
        networks[name] = {
            "input": list(shape),
            "layers": rows_described,
            **{key: sum(layer[key] for layer in rows_described) for key in ("parameters", "flops")},
        }
    totals = {key: sum(network[key] for network in networks.values()) for key in ("parameters", "flops")}
    return {"image": list(nets.image), "latent": nets.latent, "slope": nets.slope, "networks": networks, **totals}


def as_text(description: dict[str, Any]) -> str:
    columns = "{:<12} {:>5} {:>14} {:>4} {:>8} {:>8} {:>10} {:>12} {:>14}"
    lines = []
    for name, network in description["networks"].items():
        lines += [
            f"{name}  input {'x'.join(map(str, network['input']))}",
            columns.format(
                "layer", "given", "output", "BN", "bias", "dropout", "activation", "parameters", "FLOP/image"
            ),
        ]
        for layer in network["layers"]:
            lines.append(
                columns.format(
                    layer["layer"],
                    f"+{layer['embedding']}" if layer["embedding"] else "",
                    "x".join(map(str, layer["shape"])),
                    "yes" if layer["batch_norm"] else "no",
                    layer["bias"],
                    layer["dropout"],
                    layer["activation"],
                    f"{layer['parameters']:,}",
                    f"{layer['flops']:,}",
                )
            )
        lines += [columns.format("total", *[""] * 6, f"{network['parameters']:,}", f"{network['flops']:,}"), ""]
    if "embedding" in description["networks"]:
        lines.append("given: maps of the embedding of y beside the input; it is fixed, unless --train-embedding\n")
    lines.append(
        f"all networks: {description['parameters']:,} parameters, {description['flops']:,} FLOP for each network's "
        f"single pass; leaky ReLU slope {description['slope']}"
    )
    return "\n".join(lines)


def main() -> None:
    flags = tyro.cli(Flags, prog="python -m ali_dist.describe")
    description = describe(NETWORKS[find(flags.dataset, flags.conditional, flags.labels).networks])
    print(json.dumps(description, indent=2) if flags.json else as_text(description))


if __name__ == "__main__":
    cli.run(main)
