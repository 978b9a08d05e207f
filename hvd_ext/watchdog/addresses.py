"""Under which addresses other hosts may reach this one."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


def local_addresses() -> list[str]:
    """The IPv4 addresses of this host's interfaces, those of loopback left out, then its name.

    The name comes last: it may not resolve elsewhere, and on many systems means 127.0.1.1 here.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                packed = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(packed[20:24]))
    found = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    return [*dict.fromkeys(found), socket.gethostname()]
