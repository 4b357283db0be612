"""Where a connection may lead: public unicast addresses, and networks that the config allows by name.

Whoever writes a URL into a table, or answers with a redirect, or owns a DNS name, chooses an address for this
machine to connect to. The policy therefore looks at the address itself, in the one place where a socket is made,
after every look-up and for every redirect: no name is trusted because it was harmless a moment ago.

The tables are those of IANA (special-purpose address registries, RFC 6890), judged strictly: of IPv6 only
2000::/3, the part that is given out to the public, less what was set apart in it. A table of our own, because what
`ipaddress.is_global` says changes between patch releases of Python.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

_CLOSED_4 = [
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; 100.100.100.200 is Alibaba's metadata service
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host agent: a public number that only a guest of Azure reaches
        "169.254.0.0/16",  # link-local; 169.254.169.254 is the metadata service of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; 192.0.0.192 is Oracle's metadata service
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast tunnels
        "192.88.99.0/24",  # relays from 6to4
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
]
# Loopback, unspecified, IPv4-mapped, NAT64, unique local (AWS and Google keep metadata there), link-local and
# multicast all lie outside of it.
_OPEN_6 = IPv6Network("2000::/3")
_CLOSED_6 = [
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo in them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: leads to the IPv4 address inside
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]

Allowed = Sequence[IPv4Network | IPv6Network]


class RefusedAddressError(OSError):
    """The address is not one to connect to. One text for all, so that several of one name stay one reason."""

    def __init__(self, address: str) -> None:
        super().__init__("address is not public and not in policy.allow_addresses")
        self.address = address


def is_permitted(address: str, allowed: Allowed = ()) -> bool:
    """Whether a connection to this numeric address may be made; anything that is not one may not."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address):
        inner = _embedded(parsed)
        if inner is not None and not is_permitted(str(inner), allowed):
            return False
    if any(parsed in network for network in allowed if network.version == parsed.version):
        return True
    if isinstance(parsed, IPv4Address):
        return not any(parsed in network for network in _CLOSED_4)
    return parsed in _OPEN_6 and not any(parsed in network for network in _CLOSED_6)


_NAT64 = IPv6Network("64:ff9b::/96")


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped, 6to4 or NAT64 address leads to: an allowed gateway opens no private net."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def guarded_sockets(networks: Sequence[str]) -> Callable[[tuple[Any, ...]], socket.socket]:
    """A factory of sockets for aiohttp: it is given the address that comes next, and refuses before any packet."""
    allowed = [ip_network(network) for network in networks]

    def make_socket(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, place = info
        if not is_permitted(place[0], allowed):
            raise RefusedAddressError(place[0])
        return socket.socket(family=family, type=kind, proto=protocol)

    return make_socket
