"""Two network namespaces joined by a cable: two machines, as far as the network can tell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """How two nodes reach each other.

    Attributes:
        addresses: of the two nodes.
        names: of their namespaces; none over the loopback device.
    """

    addresses: tuple[str, str] = ("127.0.0.1", "127.0.0.1")
    names: tuple[str, ...] = ()

    def inside(self, node: int) -> list[str]:
        """What starts a command on the node."""
        return ["ip", "netns", "exec", self.names[node]] if self.names else []

    def environment(self) -> dict[str, str]:
        """What the node's processes need to know; gloo else asks for the host name's address."""
        return {"GLOO_SOCKET_IFNAME": "cable"} if self.names else {}

    def cable(self, state: str) -> None:
        """Pull the second node's cable (``down``) or put it back (``up``)."""
        if self.names:
            _ip("-n", self.names[1], "link", "set", "cable", state)


@contextmanager
def two_namespaces() -> Iterator[Network]:
    """Make the two, and remove them at the end.

    Raises:
        PermissionError: they cannot be made here.
    """
    if shutil.which("ip") is None:
        raise PermissionError("there is no ip command (package iproute2)")
    names = tuple(f"megalard-{os.getpid()}-{node}" for node in (0, 1))
    addresses = ("10.0.0.1", "10.0.0.2")
    try:
        for name in names:
            _ip("netns", "add", name)
        peer = ["peer", "name", "cable", "netns", names[1]]
        _ip("-n", names[0], "link", "add", "cable", "type", "veth", *peer)
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/30", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield Network(addresses, names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"it takes root: {done.stderr.strip()}")
