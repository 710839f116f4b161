"""The study's figure: what each way to an encoder and a decoder makes of x and z (arXiv:1606.00704, figure 6)."""

from pathlib import Path

import matplotlib
from torch import Tensor

from ali_dist.toy.data import MEANS, held_out_points
from ali_dist.toy.judge import reconstructions, samples
from ali_dist.toy.train import read_run

matplotlib.use("agg")  # no display is needed
from matplotlib import pyplot  # noqa: E402

COLUMNS = {
    "ali": "(a) ALI",
    "inverse": "(b) GAN + inverse mapping",
    "posthoc": "(c) GAN + post-hoc inference",
    "vae": "(d) VAE",
}
ROWS = ("x ~ q(x)", "z_hat ~ q(z|x)", "reconstructions", "z ~ p(z)", "x_tilde ~ p(x|z)")
LIMITS = {"x": 5.5, "z": 4.5}
COLOURS = pyplot.get_cmap("gist_rainbow")


def scatter(axis: pyplot.Axes, points: Tensor, space: str, colours: Tensor | None = None) -> None:
    """Points [N, 2] of the space x or z, coloured by component [N] where there are colours."""
    c = "black" if colours is None else COLOURS((colours * 7 % len(MEANS)).numpy() / (len(MEANS) - 1))
    axis.scatter(*points.T.numpy(), s=0.6, c=c, linewidths=0, rasterized=True)
    axis.set(xlim=(-LIMITS[space], LIMITS[space]), ylim=(-LIMITS[space], LIMITS[space]), xticks=[], yticks=[])
    axis.set_aspect("equal")


def draw_study(out: Path, runs: dict[str, str]) -> None:
    """`out`/figure.png from one run of each column, given by name: five rows, four columns."""
    figure, axes = pyplot.subplots(len(ROWS), len(COLUMNS), figsize=(2.4 * len(COLUMNS), 2.4 * len(ROWS)))
    x, component = held_out_points()
    for column, (model, title) in enumerate(COLUMNS.items()):
        _, nets = read_run(out, runs[model])
        z_hat, x_hat = reconstructions(nets, x)
        z, x_tilde = samples(nets)
        panels = [(x, "x", component), (z_hat, "z", component), (x_hat, "x", component), (z, "z", None)]
        for row, (points, space, colours) in enumerate([*panels, (x_tilde, "x", None)]):
            scatter(axes[row, column], points, space, colours)
        axes[0, column].set_title(title, fontsize=9)
    for row, label in enumerate(ROWS):
        axes[row, 0].set_ylabel(label, fontsize=9)
    save(figure, out / "figure.png")


def draw_samples(out: Path, run: str) -> None:
    """`out`/figure.png: data and samples of one run, side by side, and one mode of each from near."""
    x, component = held_out_points()
    x_tilde = samples(read_run(out, run)[1])[1]
    figure, axes = pyplot.subplots(1, 4, figsize=(9.6, 2.7))
    for axis, points, title in ((axes[0], x, "x ~ q(x)"), (axes[1], x_tilde, "x_tilde ~ p(x|z)")):
        scatter(axis, points, "x", component if points is x else None)
        axis.set_title(title, fontsize=9)
    for axis, points in ((axes[2], x), (axes[3], x_tilde)):
        scatter(axis, points, "x", component if points is x else None)
        axis.set(xlim=(-0.25, 0.25), ylim=(-0.25, 0.25))
        axis.set_title("the middle one, from near", fontsize=9)
    save(figure, out / "figure.png")


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
