"""launch/slurm.sh under a real Slurm: a controller and two nodes on this machine, if Debian's packages are there."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ali_dist import checkpoint
from ali_dist.run import RunFolder, read_lines

ROOT = Path(__file__).parents[1]
MINUTES = 60.0
TOOLS = ("slurmctld", "slurmd", "sbatch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(12 * MINUTES),
    pytest.mark.xdist_group("nodes"),
    pytest.mark.skipif(
        not all(shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") for tool in TOOLS) or os.getuid() != 0,
        reason="needs root and Slurm: apt-get install slurmctld slurmd slurm-client",
    ),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def slurm(tmp_path):
    """The environment in which Slurm's commands reach a controller with two nodes."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=free_ports(3), folder=folder))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    env = {**clean, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "ALI_SCRATCH": str(tmp_path)}
    env["RAY_worker_niceness"] = "0"  # Ray's 15 would starve the workers beside other tests
    daemons = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"])
    ]
    try:
        wait_for(lambda: call(env, "sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "both nodes idle")
        yield env
    finally:
        for signal in ("--signal=KILL", "--full --signal=KILL", ""):
            call(env, "scancel", "--user=root", *signal.split())
        wait_for(lambda: not call(env, "squeue", "-h"), "no job left", seconds=MINUTES)
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(MINUTES)


def call(env, *words) -> str:
    return subprocess.run([*map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True).stdout.strip()


def wait_for(condition, what, seconds=5 * MINUTES):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.3)


def test_two_nodes_train_and_near_the_time_limit_the_job_saves_and_queues_again(slurm, data, tmp_path):
    flags = ["--dataset", "digits", "--data", data, "--storage", tmp_path, "--num-workers", 2, "--batch-size", 4]
    flags += [
        "--cpus-per-worker",
        1,
        "--tick-images",
        4,
        "--save-images",
        4,
        "--sample-images",
        10**6,
        "--validate-images",
        10**6,
    ]
    out, run = tmp_path / "job.out", RunFolder(tmp_path / "digits")
    job = call(slurm, "sbatch", "--parsable", "--gpus-per-node=0", "-o", out, "launch/slurm.sh", *flags)
    assert job.isdigit()
    wait_for(lambda: run.saved(), "a checkpoint")
    token = tmp_path / f".ali-{job}" / "token"
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o077 == 0
    assert token.read_text() not in out.read_text()
    call(slurm, "scancel", "--batch", "--signal=USR1", job)  # as Slurm itself does 3 minutes before the limit
    wait_for(lambda: call(slurm, "squeue", "-h", "-j", job, "-t", "pending", "-o", "%i") == job, "the job queued again")
    assert not token.exists()
    last = read_lines(run.events)[-1]
    assert last["event"] == "end" and run.saved()[-1].name == f"{last['num_images']:012d}"
    checkpoint.verify(run.saved()[-1])
    assert "run " in out.read_text() and "2 workers" in out.read_text() and "stopped" in out.read_text()


def test_without_slurm_the_script_says_how_it_is_used(tmp_path):
    done = subprocess.run(
        [ROOT / "launch" / "slurm.sh"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 2 and "sbatch" in done.stderr
