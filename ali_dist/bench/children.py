"""The benchmark's processes: environments for the peers, and tasks run in them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DO_NOT_TRACK": "1"}
OURS = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK"}  # not for the peers


class Failed(Exception):
    """A peer that can't be had or doesn't work; the text says why, in one line."""


def environment(packages: tuple[str, ...], cache: Path, install: bool, say: Callable[[str], None]) -> Path:
    """The Python that has these packages, from a virtual environment in `cache`; ours for none.

    Failed when it is not there yet and must not be made, or can't.
    """
    if not packages:
        return Path(sys.executable)
    name = hashlib.sha256(" ".join([sys.version, *packages]).encode()).hexdigest()[:12]
    folder = cache / f"environment-{name}"
    python, done = folder / "bin" / "python", folder / "done"
    if done.exists():
        return python
    if not install:
        raise Failed(f"not installed ({' '.join(packages)}), and --no-install was given")
    say(f"making an environment in {folder}: {' '.join(packages)}")
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
    ):
        made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if made.returncode:
            raise Failed(f"its environment can't be made: {last_line(made.stderr)}")
    done.touch()
    return python


def run(python: Path, limit: float, **task: Any) -> dict[str, Any]:
    """Has `ali_dist.bench.reader` do a task in a new process and gives its result.

    Failed when it fails, or takes longer than `limit` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="ali_dist-bench-") as folder:
        # The package alone: its neighbours in site-packages would hide the environment's own
        path = Path(folder, "path")
        path.mkdir()
        (path / "ali_dist").symlink_to(PACKAGE)
        given, result = Path(folder, "task.json"), Path(folder, "result.json")
        given.write_text(json.dumps({**task, "result": str(result)}))
        variables = {name: value for name, value in os.environ.items() if name not in OURS}
        with open(Path(folder, "log"), "w+") as log:
            child = subprocess.Popen(
                [python, "-m", "ali_dist.bench.reader", given],
                env={**variables, **OFFLINE, "PYTHONPATH": str(path)},
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )
            try:
                child.wait(limit)
            except subprocess.TimeoutExpired:
                raise Failed(f"it took longer than {limit:,.0f} s") from None
            finally:
                _end(child)
            log.seek(0)
            if child.returncode or not result.exists():
                raise Failed(last_line(log.read()) or f"it ended with exit code {child.returncode}")
        return json.loads(result.read_text())


def _end(child: subprocess.Popen) -> None:
    """The child, if it still runs, and whatever it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
