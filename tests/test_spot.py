"""launch/spot.sh against servers that answer as the providers' do; tests/test_nodes.py has it drain a real node."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from metadata import Metadata

SPOT = Path(__file__).parents[1] / "launch" / "spot.sh"


@pytest.mark.parametrize("provider, seconds", [("ec2", 120), ("gce", 30)])
def test_a_notice_drains_the_node_within_the_time_that_the_provider_gives(provider, seconds, tmp_path):
    ray, raylet = tmp_path / "ray", tmp_path / "raylet"
    ray.write_text('#!/bin/sh\necho "$@" >"${0%/*}/asked"\n')
    raylet.write_text("#!/bin/sh\nread line\n")
    ray.chmod(0o755), raylet.chmod(0o755)
    node = subprocess.Popen([raylet, "--gcs-address=10.0.0.1:6379", "--node_id=abc123"], stdin=subprocess.PIPE)
    metadata = Metadata()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "METADATA_ADDRESS": metadata.address}
    spot = subprocess.Popen([SPOT, provider, str(node.pid)], env=env)
    try:
        deadline = time.monotonic() + 30
        while not metadata.asked:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert spot.poll() is None and not (tmp_path / "asked").exists()
        metadata.notice.set()
        assert spot.wait(30) == 0
    finally:
        spot.kill()
        node.communicate()
        metadata.close()
    words = dict(word.split("=", 1) for word in (tmp_path / "asked").read_text().split() if "=" in word)
    assert words["--address"] == "10.0.0.1:6379" and words["--node-id"] == "abc123"
    assert words["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 0 < int(words["--deadline-remaining-seconds"]) < seconds


def test_a_provider_must_be_named():
    done = subprocess.run([SPOT, "azure"], capture_output=True, text=True)
    assert done.returncode == 2 and "ec2|gce" in done.stderr
