"""Hosts on this machine: network namespaces with an address each, joined by a bridge, and a Ray node on each.

Host name, cores and clock they share, and the filesystem (all see the run's storage), but for a folder that host 0 may
serve to the others. Links can be cut, and made slow and lossy by a token bucket filter (netem is in fewer kernels):
packets beyond its rate wait, or are dropped.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ali_dist.bench.nodes import JOINED, NODE, Nodes, wait_until

NETWORK = "10.213.77"
PORT = 6379
SFTP_PORT = 2022
SFTP_SERVER = Path("/usr/lib/openssh/sftp-server")
SERVE = f"""
import socket, subprocess
server = socket.create_server(("{NETWORK}.1", {SFTP_PORT}))
print("serves", flush=True)
while True:
    peer, _ = server.accept()
    subprocess.Popen(["{SFTP_SERVER}"], stdin=peer, stdout=peer)
    peer.close()
"""
# As NFS: what a path is may be known of before for some seconds, a folder or file that is opened is looked at anew
MOUNT = (
    f"sshfs -f -o directport={SFTP_PORT},attr_timeout=3,entry_timeout=3,negative_timeout=3,dcache_stat_timeout=3"
    f',dcache_dir_timeout=0,no_readahead {NETWORK}.1:"$0" "$0" & '
    'until mountpoint -q "$0"; do kill -0 $! || exit; sleep 0.1; done; exec "$@"'
)


def ip(*words: Any) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """What keeps this machine from having such hosts."""
    if not (shutil.which("ip") and shutil.which("tc")):
        return "needs ip and tc, of iproute2"
    name = f"ali{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "port", "type", "veth", "peer", "name", "eth0")
        ip("-n", name, "link", "add", "bridge", "type", "bridge")
        shape = ["tc", "-n", name, "qdisc", "add", "dev", "port", "root", "tbf", "rate", "1mbit", "burst", "16kb"]
        subprocess.run([*shape, "limit", "16kb"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"can't make network namespaces, virtual links, bridges and filters here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None


def why_not_serve() -> str | None:
    """What keeps such hosts from having a folder over the network."""
    if not (shutil.which("sshfs") and SFTP_SERVER.exists()):
        return "needs sshfs and openssh-sftp-server"
    return None if os.access("/dev/fuse", os.W_OK) else "needs /dev/fuse"


class Hosts(Nodes):
    """A head without CPUs and hosts of one CPU each, with the nodes that launch/node.sh starts, all by one token.

    `served` is a folder of the head's that the others see only over the network, at the same path, by SFTP.
    """

    def __init__(self, folder: Path, count: int, served: Path | None = None) -> None:
        self.folder, self.served = folder, served
        self.names = [f"ali{os.getpid()}-{n}" for n in range(count + 1)]
        self.on_head = self._on(0)
        self.ray = tempfile.mkdtemp(prefix="ali.", dir="/tmp")  # short: Ray puts sockets below it
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = clean | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "RAY_ADDRESS": f"{NETWORK}.1:{PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_worker_niceness": "0",  # Ray's 15 would starve the workers beside what else runs here
        }
        self.nodes: list[subprocess.Popen] = []
        self._drivers: list[subprocess.Popen] = []
        self._server: subprocess.Popen | None = None
        try:
            self._wire()
            if served:
                self._server = subprocess.Popen(
                    [*self.on_head, sys.executable, "-c", SERVE], stdout=subprocess.PIPE, start_new_session=True
                )
                assert self._server.stdout.readline() == b"serves\n"
            self._start(0, "head", f"--port={PORT}", "--num-cpus=0", f"--temp-dir={self.ray}")
            for n in range(1, count + 1):
                self._start(n, "worker", self.environment["RAY_ADDRESS"], "--num-cpus=1")
        except BaseException:
            self.close()
            raise

    def _on(self, host: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[host])

    def _wire(self) -> None:
        """Host 0 has the bridge, and on it port N, the other end of host N's eth0. Addresses end in N + 1."""
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.names[0], "link", "add", "eth0", "type", "bridge")
        for n, name in enumerate(self.names):
            if n:
                ip("link", "add", f"port{n}", "netns", self.names[0], "type", "veth", "peer", "eth0", "netns", name)
                ip("-n", self.names[0], "link", "set", f"port{n}", "master", "eth0", "up")
            ip("-n", name, "address", "add", f"{NETWORK}.{n + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def _start(self, host: int, *words: str) -> None:
        path = self.folder / f"host-{host}.log"
        mount = ["sh", "-c", MOUNT, self.served] if self.served and host else []  # seen by this node alone
        command = [*self._on(host), *mount, NODE, *words, f"--node-ip-address={NETWORK}.{host + 1}"]
        with open(path, "w") as log:
            node = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.nodes.append(node)
        wait_until(lambda: JOINED in path.read_text(), 60, lambda: node.poll() is None)

    def host(self, pid: int) -> int:
        """The host that a worker runs on."""
        return self.nodes.index(self.workers()[pid])

    def joined(self, host: int) -> int:
        """How often its node has joined the cluster."""
        return (self.folder / f"host-{host}.log").read_text().count(JOINED)

    def cut(self, host: int) -> None:
        ip("-n", self.names[0], "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        ip("-n", self.names[0], "link", "set", f"port{host}", "up")

    def shape(self, host: int, rate: str, queue: str) -> None:
        """At most `rate` leaves or reaches the host; of what is more, `queue` bytes wait, the rest is dropped."""
        for name, device in self._ends(host):
            words = ["tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "16kb"]
            subprocess.run([*words, "limit", queue], check=True, capture_output=True)

    def unshape(self, host: int) -> dict[str, int]:
        """Frees its link; the packets that were dropped, and those that had to wait."""
        counts = {"drops": 0, "overlimits": 0}
        for name, device in self._ends(host):
            shown = subprocess.run(
                ["tc", "-n", name, "-s", "-j", "qdisc", "show", "dev", device], check=True, capture_output=True
            )
            for qdisc in json.loads(shown.stdout):
                for key in counts:
                    counts[key] += qdisc.get(key, 0)
            subprocess.run(["tc", "-n", name, "qdisc", "delete", "dev", device, "root"], check=True)
        return counts

    def _ends(self, host: int) -> list[tuple[str, str]]:
        return [(self.names[0], f"port{host}"), (self.names[host], "eth0")]

    def serve(self, serves: bool) -> None:
        """False: who looks at the served folder waits, until True."""
        os.killpg(self._server.pid, signal.SIGCONT if serves else signal.SIGSTOP)

    def close(self) -> None:
        """Ends all processes, and with the namespaces their links and the bridge."""
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        for node in reversed(self.nodes.copy()):
            self.remove(node)
        if self._server:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        shutil.rmtree(self.ray, ignore_errors=True)
