"""A Ray cluster of several nodes on this machine, whose processes can be killed, stopped and counted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCAL, NODE = ROOT / "launch" / "local.sh", ROOT / "launch" / "node.sh"
# Workers are not to be nicer than what else runs here
HEAD_FLAGS = '--num-cpus=0 --system-config={"worker_niceness":0}'
JOINED = "Ray runtime started"


class Nodes:
    """A head without CPUs, by launch/local.sh, and nodes of one CPU each, every one a session of its own."""

    on_head: tuple[str, ...] = ()  # words before a command that is to run where the head does

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, told = folder, folder / "env.json"
        tell = f"import json, os; json.dump(dict(os.environ), open({str(told)!r} + '.partial', 'w'))"
        script = f'"{sys.executable}" -c "{tell}" && mv "{told}.partial" "{told}" && cat'
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._log = open(folder / "nodes.log", "w")
        self._head = subprocess.Popen(
            [LOCAL, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PATH": path, "RAY_HEAD_FLAGS": HEAD_FLAGS},
        )
        wait_until(told.exists, 120, lambda: self._head.poll() is None)
        self.environment: dict[str, str] = json.loads(told.read_text()) | {"PYTHONUNBUFFERED": "1"}
        self.nodes: list[subprocess.Popen] = []
        self._drivers: list[subprocess.Popen] = []
        self._started = 0
        for _ in range(count):
            self.add()

    def add(self) -> subprocess.Popen:
        """A node more, which has joined; it joins again when Ray ends it, as Ray may for a lost node's port."""
        self._started += 1
        path = self.folder / f"node-{self._started}.log"
        command = [NODE, "worker", self.environment["RAY_ADDRESS"], "--num-cpus=1", "--metrics-export-port=0"]
        with open(path, "w") as log:
            node = subprocess.Popen(
                [*command, "--node-ip-address=127.0.0.1"],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)
        wait_until(lambda: JOINED in path.read_text(), 180, lambda: node.poll() is None)
        return node

    def remove(self, node: subprocess.Popen) -> None:
        """Kills all processes of a node at once, as a power cut would."""
        while found := processes(node.pid):
            for pid in found:
                kill(pid, signal.SIGKILL)
            node.poll()
            time.sleep(0.02)
        node.wait()
        self.nodes.remove(node)

    def drain(self, node: subprocess.Popen, seconds: int) -> None:
        """Gives notice that the node will leave, as a provider does with a spot instance."""
        (raylet,) = [pid for pid, name in processes(node.pid).items() if name == "raylet"]
        words = Path(f"/proc/{raylet}/cmdline").read_text().replace("\0", " ")
        node_id = re.search(r"--node[-_]id=(\w+)", words).group(1)
        command = ["ray", "drain-node", f"--address={self.environment['RAY_ADDRESS']}", f"--node-id={node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def workers(self) -> dict[int, subprocess.Popen]:
        """Process id of each Ray Train worker -> its node."""
        return {pid: node for node in self.nodes for pid, name in processes(node.pid).items() if "TrainWorker" in name}

    def memory(self) -> int:
        """Resident bytes of the head's processes."""
        total = 0
        for pid in self._descendants(self._head.pid):
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            except OSError:
                pass
        return total

    def _descendants(self, pid: int) -> list[int]:
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
        return [pid, *(found for child in children for found in self._descendants(int(child)))]

    def watch(self, driver: subprocess.Popen) -> None:
        """A job's process, to be killed when the cluster ends before it."""
        self._drivers.append(driver)

    def close(self, keep: bool = False) -> None:
        """Ends all; `keep` leaves Ray's logs where launch/local.sh says."""
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        for node in list(self.nodes):
            self.remove(node)
        self._head.terminate() if keep else self._head.stdin.close()
        self._head.wait(120)
        self._log.close()


def processes(session: int) -> dict[int, str]:
    """Process id -> name of all processes of a session that live: Ray's workers are named after what they run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            before, _, after = (folder / "stat").read_text().rpartition(")")
            words = (folder / "cmdline").read_text().split("\0")[0]
        except OSError:
            continue
        state, _, _, its_session = after.split()[:4]
        if int(its_session) == session and state not in "ZX":
            found[int(folder.name)] = words.split()[0] if words.startswith("ray::") else before.partition("(")[2]
    return found


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait_until(condition: Callable[[], bool], seconds: float, alive: Callable[[], bool] = lambda: True) -> None:
    """TimeoutError when the condition does not come true in time, or what should bring it about is not `alive`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not alive():
            raise TimeoutError("what was waited for has ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {seconds:,.0f} s")
        time.sleep(0.05)
