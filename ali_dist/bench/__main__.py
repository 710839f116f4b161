"""`python -m ali_dist.bench WHAT`: speed beside what a user would otherwise run, all ways in one run."""

import tyro

from ali_dist import cli
from ali_dist.bench import data, faults, order, scale, start, step, toy

COMMANDS = {  # a dataclass of flags each, whose `run` does the work
    "step": step.Flags,
    "data": data.Flags,
    "order": order.Flags,
    "toy": toy.Flags,
    "start": start.Flags,
    "faults": faults.Flags,
    "scale": scale.Flags,
}


def main() -> None:
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m ali_dist.bench").run()


if __name__ == "__main__":
    cli.run(main)
