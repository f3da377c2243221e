"""Whose call it is: nobody becomes another by a header, unless a proxy that is trusted says so."""

from __future__ import annotations

import string
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.client_address import client_address, household

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "header", "found"),
    [
        ("10.0.0.1", b"", "10.0.0.1"),
        ("10.0.0.1", b"203.0.113.7", "203.0.113.7"),
        ("203.0.113.9", b"198.51.100.1", "203.0.113.9"),  # no proxy of ours: its word is worth nothing
        ("10.0.0.1", b"198.51.100.1, 203.0.113.7", "203.0.113.7"),  # what the client had written itself
        ("10.0.0.1", b"203.0.113.7, 10.9.9.9", "203.0.113.7"),  # a proxy behind a proxy
        ("10.0.0.1", b"10.1.1.1,10.9.9.9", "10.1.1.1"),
        ("10.0.0.1", b"203.0.113.7:4711", "203.0.113.7"),
        ("10.0.0.1", b"[2001:db8::7]:4711", "2001:db8::7"),
        ("10.0.0.1", b"2001:DB8:0::7", "2001:db8::7"),
        ("fd00::1", b"::ffff:203.0.113.7", "203.0.113.7"),
        ("::ffff:10.0.0.1", b"203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", b"203.0.113.7, unknown", "10.0.0.1"),
        ("10.0.0.1", b"203.0.113.7,", "10.0.0.1"),
        ("10.0.0.1", b"\xff\x00", "10.0.0.1"),
        ("", b"203.0.113.7", ""),
    ],
)
def test_the_last_address_that_is_no_trusted_proxys_counts(peer: str, header: bytes, found: str) -> None:
    assert client_address(peer, header, PROXIES) == found


@given(st.binary(max_size=300), st.text(string.printable, max_size=20))
def test_no_header_makes_it_fail_nor_is_one_of_a_stranger_believed(header: bytes, peer: str) -> None:
    client_address(peer, header, PROXIES)
    client_address("10.0.0.1", header, PROXIES)
    assert client_address("203.0.113.9", header, PROXIES) == "203.0.113.9"


def test_a_long_chain_is_not_read_to_its_beginning() -> None:
    assert client_address("10.0.0.1", b"203.0.113.7," + b",".join([b"10.0.0.2"] * 6000), PROXIES) == "10.0.0.2"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_a_household_has_one_turn(address: str, found: str) -> None:
    assert household(address) == found
