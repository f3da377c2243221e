"""Whose calls are, by address: for as long as any is theirs, and no longer."""

from __future__ import annotations

import gc

from gateway.admission.owners import Owners


def test_neighbours_are_one_owner_and_others_are_not() -> None:
    owners = Owners(8)
    one = owners.of("192.0.2.1")
    assert one.max_in_flight == 8
    assert owners.of("".join(["192.0.2", ".1"])) is one
    assert owners.of("192.0.2.2") is not one
    assert owners.of("2001:db8::1") is owners.of("2001:db8::ffff")
    assert owners.of("2001:db8::1") is not owners.of("2001:db8:0:1::1")
    assert owners.of("") is owners.of("")  # as of a Unix socket


def test_an_owner_of_nothing_takes_no_memory() -> None:
    owners = Owners()
    kept = owners.of("192.0.2.1")
    kept.in_flight = 1
    for number in range(1000):
        owners.of(f"198.51.{number // 256}.{number % 256}")
    gc.collect()
    assert len(owners) == 1
    assert owners.of("192.0.2.1").in_flight == 1
