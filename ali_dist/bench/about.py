"""The head of every result: when, with what and where."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import Any

import torch


def about(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "ali_dist.bench", *sys.argv[1:]]),
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def head(result: dict[str, Any]) -> str:
    return f"{result['date']}  {result['device']}, {result['threads']} threads  torch {result['versions']['torch']}"
