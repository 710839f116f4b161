"""launch/tls.sh and launch/node.sh: certificates, tokens, and a cluster of two nodes that speak TLS alone."""

import os
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from ali_dist import checkpoint
from ali_dist.run import RunFolder

ROOT = Path(__file__).parents[1]
NODE, TLS = ROOT / "launch" / "node.sh", ROOT / "launch" / "tls.sh"
MINUTES = 60.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # gRPC's first words


def environment(printed: str) -> dict[str, str]:
    return dict(word.split("=", 1) for line in printed.splitlines() for word in shlex.split(line)[1:])


def clean() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}, "PATH": path}


def test_certificates_are_signed_named_and_private(tmp_path):
    folder = tmp_path / "my certificates"
    first = subprocess.run([TLS, folder, "10.0.0.7", "head.example"], capture_output=True, text=True, check=True).stdout
    env = environment(first)
    assert env == {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
    }
    authority = (folder / "ca.crt").read_bytes()
    subprocess.run([TLS, folder, "--node", "second", "::1"], capture_output=True, check=True)
    assert (folder / "ca.crt").read_bytes() == authority  # one signs all
    for name, words in (
        ("node", ["IP Address:10.0.0.7", "DNS:head.example", "IP Address:127.0.0.1"]),
        ("second", ["0:1"]),
    ):
        certificate = folder / f"{name}.crt"
        subprocess.run(
            ["openssl", "verify", "-CAfile", folder / "ca.crt", certificate], check=True, capture_output=True
        )
        shown = ["openssl", "x509", "-in", certificate, "-noout", "-ext", "subjectAltName"]
        text = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
        assert all(word in text for word in words), text
    for key in folder.glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(list(folder.glob("*.key"))) == 3


@pytest.mark.parametrize("words", [[TLS], [TLS, "folder"], [NODE], [NODE, "middle"], [NODE, "worker"]])
def test_scripts_say_how_they_are_used(words, tmp_path):
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**clean(), "HOME": str(tmp_path)})
    assert done.returncode == 2 and "usage" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_node_without_the_heads_token_is_refused(tmp_path):
    env = {**clean(), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    done = subprocess.run([NODE, "worker", "127.0.0.1:1"], capture_output=True, text=True, env=env)
    assert (
        done.returncode == 2 and done.stderr == f"error: no token in {tmp_path / 'token'}: copy the head's file there\n"
    )


def answer(port: int, context: ssl.SSLContext | None) -> bytes:
    """What a server says to gRPC's first words; nothing when it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain as connection:
                connection.sendall(PREFACE)
                return connection.recv(100)
        except (ssl.SSLError, ConnectionError):
            return b""


@pytest.mark.slow
@pytest.mark.timeout(10 * MINUTES)
@pytest.mark.xdist_group("nodes")
def test_two_nodes_train_over_tls_and_talk_to_nobody_without_a_certificate(data, tmp_path):
    short = tempfile.mkdtemp(prefix="ali.", dir="/tmp")  # Ray puts sockets below it, whose paths may have 107 bytes
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    printed = subprocess.run([TLS, tmp_path / "tls", *own], capture_output=True, text=True, check=True).stdout
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    gcs, dashboard, client = (s.getsockname()[1] for s in sockets)
    for s in sockets:
        s.close()
    token = tmp_path / "token"
    env = {**clean(), **environment(printed), "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # the head would wait for an actor that Ray Train leaves there
    env["RAY_worker_niceness"] = "0"  # Ray's 15 would starve the workers beside other tests
    at = ["--node-ip-address=127.0.0.1", "--num-cpus=1"]
    head = [
        NODE,
        "head",
        f"--temp-dir={short}",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        *at,
    ]
    nodes = []
    try:
        nodes.append(subprocess.Popen(head, env=env, stdout=subprocess.DEVNULL, start_new_session=True))
        wait_for_dashboard(dashboard, token, nodes[0])
        worker = [NODE, "worker", f"127.0.0.1:{gcs}", *at]
        nodes.append(subprocess.Popen(worker, env=env, stdout=subprocess.DEVNULL, start_new_session=True))
        assert stat.S_IMODE(token.stat().st_mode) == 0o600

        ours = ssl.create_default_context(cafile=tmp_path / "tls" / "ca.crt")
        ours.set_alpn_protocols(["h2"])
        assert answer(gcs, None) == b""  # plain text
        assert answer(gcs, ours) == b""  # TLS, but nothing to show
        ours.load_cert_chain(tmp_path / "tls" / "node.crt", tmp_path / "tls" / "node.key")
        assert answer(gcs, ours)[3] == 4  # a SETTINGS frame: gRPC answers

        command = [
            sys.executable,
            "-m",
            "ali_dist.launch",
            "--dataset",
            "digits",
            "--data",
            data,
            "--storage",
            tmp_path,
        ]
        command += ["--num-workers", 2, "--num-images", 8, "--batch-size", 4, "--tick-images", 4, "--validate-count", 8]
        job = {**env, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_AUTH_MODE": "token"}
        done = subprocess.run([*map(str, command), "--wait-seconds", "120"], env=job, capture_output=True, text=True)
        assert done.returncode == 0 and "8 / 8 images" in done.stdout, done.stdout + done.stderr
        checkpoint.verify(RunFolder(tmp_path / "digits").saved()[-1])
        assert token.read_text() not in done.stdout + done.stderr
        written = [item for item in (tmp_path / "digits").rglob("*") if item.is_file()]
        assert written and not [item for item in written if token.read_bytes() in item.read_bytes()]
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(MINUTES)
        shutil.rmtree(short, ignore_errors=True)


def wait_for_dashboard(port: int, token: Path, head: subprocess.Popen) -> None:
    deadline = time.monotonic() + 3 * MINUTES
    while time.monotonic() < deadline:
        assert head.poll() is None
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/")
            request.add_header("Authorization", f"Bearer {token.read_text()}")
            urllib.request.urlopen(request, timeout=5)
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError("no dashboard")
