"""The study's table as Markdown, every row beside what was published."""

from typing import Any

from ali_dist.toy.data import STD
from ali_dist.toy.models import VAE_STD

PAPER = {"ali": "13.4 ± 5.8 (8-25)", "gan": "10.4 ± 9.2 (1-22)"}  # modes of 25, arXiv:1606.00704, section 4.6
PUBLISHED = {  # modes, share of high quality in %, reverse KL: 10 runs
    "GAN (VEEGAN's table)": ("3.3", "0.5", ""),
    "ALI (VEEGAN's table)": ("15.8", "1.6", ""),
    "Unrolled GAN (VEEGAN's table)": ("23.6", "16", ""),
    "VEEGAN": ("24.6", "40", ""),
    "GAN (PacGAN's table)": ("17.3 ± 0.8", "94.8 ± 0.7", "0.70 ± 0.07"),
    "ALI (PacGAN's table)": ("24.1 ± 0.4", "95.7 ± 0.6", "0.14 ± 0.03"),
    "PacGAN2": ("23.8 ± 0.7", "91.3 ± 0.8", "0.13 ± 0.04"),
    "PacGAN3": ("24.6 ± 0.4", "94.2 ± 0.4", "0.06 ± 0.02"),
    "PacGAN4": ("24.8 ± 0.2", "93.6 ± 0.6", "0.04 ± 0.01"),
}
INFERENCE = {"ali": "ALI", "inverse": "GAN + inverse mapping", "posthoc": "GAN + post-hoc inference", "vae": "VAE"}
Tree = dict[str, Any]


def number(node: Tree, digits: int = 2, scale: float = 1.0, error: str = "std") -> str:
    """'mean ± error' of a spread, or a dash."""
    if not node["count"]:
        return "-"
    text = f"{node['mean'] * scale:.{digits}f}"
    return text if node["count"] == 1 else f"{text} ± {node[error] * scale:.{digits}f}"


def extent(node: Tree) -> str:
    """Mean, standard deviation, least and greatest, as the paper gives its modes."""
    return f"{number(node, 1)} ({node['min']:.0f}-{node['max']:.0f})" if node["count"] else "-"


def rows(header: list[str], body: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def render(table: Tree) -> str:
    """The whole table; sections appear for what the study trained."""
    groups = table["groups"]
    lines = ["# 25 Gaussians", "", f"`{table['command']}`", "", about(table), ""]
    if "search_ranges" in table:
        lines += search(table)
    strict = {name: label for name, label in STRICT.items() if name in groups}
    if strict:
        lines += against_published(table, strict)
    if "inference" in table:
        lines += inference(table)
    return "\n".join(lines)


STRICT = {"fixed-0.2": "ALI, torch β1 = 0.2", "fixed-0.8": "ALI, torch β1 = 0.8", "best-ali": "ALI, `--recipe best`"}


def about(table: Tree) -> str:
    versions, plan = table["versions"], table["plan"]
    return (
        f"Python {versions['python']}, torch {versions['torch']}, {versions['device']}. Products between hidden layers "
        f"in {plan['precision']}, all else in float32. Training hours in all: {sum(table['hours'].values()):.2f}. "
        f"{plan['train_points']:,} training points; epochs: "
        + ", ".join(f"{name} {epochs}" for name, epochs in table["epochs"].items())
        + ". Numbers are mean ± standard deviation over runs unless said otherwise."
    )


def search(table: Tree) -> list[str]:
    drawn = table["search_ranges"].items()
    ranges = ", ".join(f"{name} in [{low:g}, {high:g}] ({scale})" for name, (low, high, scale) in drawn)
    body = []
    for model, label in (("ali", "ALI"), ("gan", "GAN")):
        node = table["groups"][f"search-{model}"]["samples_10000"]
        body.append(
            [
                label,
                str(node["modes"]["count"]),
                extent(node["modes"]),
                PAPER[model],
                extent(node["modes_hq"]),
                number(node["hq"], 1, 100),
                number(node["reverse_kl"]),
            ]
        )
    header = ["", "runs", "modes", "paper", "modes with a high-quality sample", "high quality, %", "reverse KL"]
    return [
        "## Random search",
        "",
        f"10,000 samples a run, a mode counts when it is the most responsible one of a sample. Drawn: {ranges}.",
        "",
        *rows(header, body),
    ]


def against_published(table: Tree, groups: dict[str, str]) -> list[str]:
    """The published comparison's protocol: 2,500 samples, standard errors; and how round the modes are."""
    body = [[label, "10", *figures, "", ""] for label, figures in PUBLISHED.items()]
    for name, label in groups.items():
        node, large = table["groups"][name]["samples_2500"], table["groups"][name]["samples_10000"]
        body.append(
            [
                f"**{label}**",
                str(node["modes"]["count"]),
                number(node["modes_hq"], 1, error="stderr"),
                number(node["hq"], 1, 100, error="stderr"),
                number(node["reverse_kl"], 3, error="stderr"),
                f"{large['std_min']['min']:.2f}-{large['std_max']['max']:.2f}" if large["std_min"]["count"] else "-",
                number(large["modes_std_ok"], 1),
            ]
        )
    floor, large = table["floors"]["samples_2500"], table["floors"]["samples_10000"]
    body.append(
        [
            "true samples",
            "1",
            str(floor["modes_hq"]),
            f"{floor['hq'] * 100:.1f}",
            f"{floor['reverse_kl']:.3f}",
            f"{large['std_min']:.2f}-{large['std_max']:.2f}",
            str(large["modes_std_ok"]),
        ]
    )
    header = ["", "runs", "modes", "high quality, %", "reverse KL", "std of a mode / true", "modes with 0.8-1.2"]
    return [
        "## A fixed setting over seeds",
        "",
        "2,500 samples; a mode counts when a sample lies within 3 σ of its centre, reverse KL is over such samples; "
        f"mean ± standard error. Standard deviations are in units of the true {STD}, over 10,000 samples, the extremes "
        "of all runs and modes.",
        "",
        *rows(header, body),
    ]


def inference(table: Tree) -> list[str]:
    body = []
    for model, label in INFERENCE.items():
        node = table["inference"][model]
        part = node["reconstructions"]
        body.append(
            [
                label,
                str(part["rmse"]["count"]),
                number(part["rmse"], 3),
                number(part["median_error"], 3),
                number(part["same_mode"], 1, 100),
                number(part["modes"], 1),
                number(node["codes"]["energy_distance"], 4),
                number(node["codes"]["holes"], 1, 100),
                number(node["samples_10000"]["modes"], 1),
                number(node["samples_10000"]["hq"], 1, 100),
            ]
        )
    header = [
        "",
        "runs",
        "reconstruction RMSE",
        "median error",
        "in the right mode, %",
        "modes of reconstructions",
        "energy distance of q(z) to p(z)",
        "holes in q(z), %",
        "modes of samples",
        "high quality of samples, %",
    ]
    floor = table["floors"]["codes"]["energy_distance"]
    lines = [
        "## Inference",
        "",
        f"10,000 held-out points. ALI: {table['best_covering']['ali']}; the GAN: {table['best_covering']['gan']}, the "
        "best-covering runs of the search. The energy distance of 10,000 prior draws to the prior is "
        f"{floor:.4f}. Holes: the share of the prior's mass, in 400 cells of equal mass, with under a tenth of the "
        f"codes due; prior draws leave none. The VAE's likelihood has σ = {VAE_STD}, its samples that noise.",
        "",
        *rows(header, body),
        "The paper's conclusions:",
        "",
    ]
    for row in table["conclusions"]:
        verdict = "borne out" if row["borne_out"] else "**not** borne out"
        numbers = "; ".join(told(name, value) for name, value in row["numbers"].items())
        lines.append(f"- {row['conclusion']}: {verdict}. {numbers}.")
    return [*lines, ""]


def told(name: str, value: float | dict[str, float | None] | None) -> str:
    if isinstance(value, dict):
        return f"{name}: " + ", ".join(told(INFERENCE.get(key, key), part) for key, part in value.items())
    return f"{name} {value:.3g}" if value is not None else f"{name} -"
