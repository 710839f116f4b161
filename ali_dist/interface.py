"""Ray Train's trainer as a job here wants it: gloo uses the network that Ray uses, and nothing is left of a job killed.

By itself gloo takes the address that its host's own name resolves to. On many hosts that is a loopback address, where
workers of other hosts find nobody.
"""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Any

import ray.util
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

SHUTDOWN_SECONDS = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"  # of workers that are killed right after
SIOCGIFADDR = 0x8915  # Linux' request for an interface's IPv4 address, netdevice(7)


def interface_of(address: str) -> str | None:
    """Name of this host's network interface with that IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def name_interface() -> None:
    """In a worker: to the environment that gloo reads, unless it is said there already."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class OverRaysNetwork(TorchConfig):
    """Ray Train's own, but workers learn their interface before they join the process group."""

    @property
    def backend_cls(self) -> type:
        class Backend(super().backend_cls):
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                # For on_shutdown in this process, Ray Train's controller. Given to the whole job as a runtime
                # environment it would keep all workers out of Ray's pool of started processes
                os.environ.setdefault(SHUTDOWN_SECONDS, "1")
                worker_group.execute(name_interface)
                super().on_start(worker_group, backend_config)

        return Backend


class Trainer(TorchTrainer):
    """Ray Train's own, without its process that frees the placement group of a killed controller.

    That one does not end after it (Ray 2.60 calls `exit_actor` outside the actor's main thread). The group is free once
    the job is over, and `ali_dist.lookout` frees that of a controller which it kills.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
