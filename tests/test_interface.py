"""The network interface that gloo is told to use."""

import os
import socket

import pytest
import ray.util

from ali_dist.interface import interface_of, name_interface


@pytest.fixture
def unnamed(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what a test sets is taken back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    return monkeypatch


def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo" and socket.if_nametoindex("lo")
    assert interface_of("203.0.113.9") is None  # of the addresses for examples


def test_gloo_gets_the_interface_of_rays_address_unless_told_otherwise(unnamed):
    unnamed.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    name_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    unnamed.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
