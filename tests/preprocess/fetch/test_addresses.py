"""Which addresses may be connected to: a table by hand, and `ipaddress` as an independent witness."""

from __future__ import annotations

import ipaddress
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from preprocess.fetch.addresses import RefusedAddressError, guarded_sockets, is_permitted

REFUSED = {
    "0.0.0.0": "unspecified",
    "0.1.2.3": "this network",
    "10.0.0.1": "private",
    "10.255.255.255": "private",
    "100.64.0.1": "carrier-grade NAT",
    "100.100.100.200": "Alibaba metadata",
    "100.127.255.255": "carrier-grade NAT",
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "168.63.129.16": "Azure host agent",
    "169.254.0.23": "Tencent metadata",
    "169.254.169.254": "metadata of most clouds",
    "169.254.170.2": "AWS container credentials",
    "172.16.0.1": "private",
    "172.31.255.255": "private",
    "192.0.0.192": "Oracle metadata",
    "192.0.2.1": "documentation",
    "192.88.99.1": "6to4 relay",
    "192.168.0.1": "private",
    "198.18.0.1": "benchmarks",
    "198.19.255.255": "benchmarks",
    "198.51.100.7": "documentation",
    "203.0.113.7": "documentation",
    "224.0.0.1": "multicast",
    "239.255.255.255": "multicast",
    "240.0.0.1": "reserved",
    "255.255.255.255": "broadcast",
    "::": "unspecified",
    "::1": "loopback",
    "::127.0.0.1": "IPv4-compatible",
    "::ffff:127.0.0.1": "IPv4-mapped loopback",
    "::ffff:169.254.169.254": "IPv4-mapped metadata",
    "::ffff:8.8.8.8": "IPv4-mapped",
    "64:ff9b::8.8.8.8": "NAT64",
    "64:ff9b::10.0.0.1": "NAT64 to a private net",
    "64:ff9b:1::1": "local NAT64",
    "100::1": "discard",
    "2001::1": "Teredo",
    "2001:db8::1": "documentation",
    "2002:7f00:1::": "6to4 loopback",
    "2002:808:808::": "6to4",
    "3fff::1": "documentation",
    "5f00::1": "segment routing",
    "fc00::1": "unique local",
    "fd00:ec2::254": "AWS metadata",
    "fd20:ce::254": "Google metadata",
    "fe80::1": "link-local",
    "fe80::1%eth0": "link-local with a zone",
    "fec0::1": "site-local",
    "ff02::1": "multicast",
    # No numeric addresses at all.
    "": "nothing",
    "localhost": "a name",
    "127.1": "short for loopback",
    "0177.0.0.1": "octal",
    "0x7f.0.0.1": "hexadecimal",
    "2130706433": "one number",
    "1.2.3.4 ": "a space",
}
PERMITTED = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:4860:4860::8888",
    "2001:200::1",
    "2400:cb00::1",
    "2606:4700::1111",
    "2a00:1450:4001::1",
]


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_permitted(address), REFUSED[address]


@pytest.mark.parametrize("address", PERMITTED)
def test_a_public_address_is_permitted(address: str) -> None:
    assert is_permitted(address)


@given(st.ip_addresses(v=4))
@example(ipaddress.IPv4Address("192.0.0.9"))
def test_no_more_is_permitted_in_version_4_than_ipaddress_calls_global(
    address: ipaddress.IPv4Address,
) -> None:
    if is_permitted(str(address)):
        assert address.is_global and not address.is_multicast and not address.is_reserved
    # And little less: what is set apart beyond `is_global`.
    elif address.is_global and not address.is_multicast:
        ours = ("168.63.129.16/32", "192.0.0.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24")
        assert any(address in ip_network(network) for network in (*ours, "192.175.48.0/24"))


@given(st.ip_addresses(v=6) | st.integers(0x2000 << 112, (0x4000 << 112) - 1).map(ipaddress.IPv6Address))
def test_no_more_is_permitted_in_version_6_than_ipaddress_calls_global(
    address: ipaddress.IPv6Address,
) -> None:
    if is_permitted(str(address)):
        assert address.is_global and not address.is_multicast and not address.is_link_local
        assert address.ipv4_mapped is None and address.sixtofour is None and address.teredo is None


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_inside_an_ipv6_one_opens_nothing(inner: ipaddress.IPv4Address) -> None:
    for prefix in ("::ffff:0:0", "64:ff9b::", "::"):
        outer = ipaddress.IPv6Address(int(ip_address(prefix)) | int(inner))
        assert not is_permitted(str(outer))


@given(st.ip_addresses(v=4))
def test_an_allowed_nat64_gateway_leads_to_public_addresses_only(inner: ipaddress.IPv4Address) -> None:
    outer = ipaddress.IPv6Address(int(ip_address("64:ff9b::")) | int(inner))
    assert is_permitted(str(outer), [ip_network("64:ff9b::/96")]) == is_permitted(str(inner))


def test_an_allowed_network_is_permitted_and_its_neighbours_are_not() -> None:
    allowed = [ip_network("10.1.0.0/16"), ip_network("fd00:1::/32")]
    assert is_permitted("10.1.255.255", allowed) and is_permitted("fd00:1::1", allowed)
    assert not is_permitted("10.2.0.0", allowed) and not is_permitted("fd00:2::1", allowed)
    assert not is_permitted("::ffff:10.1.0.1", allowed)  # allow it as ::ffff:10.1.0.0/112 as well
    assert is_permitted("::ffff:10.1.0.1", [*allowed, ip_network("::ffff:10.1.0.0/112")])


def test_no_socket_is_made_for_a_refused_address() -> None:
    import socket

    make = guarded_sockets(["127.0.0.0/8"])
    with pytest.raises(RefusedAddressError) as refused:
        make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80)))
    assert refused.value.address == "10.0.0.1"
    make((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))).close()
