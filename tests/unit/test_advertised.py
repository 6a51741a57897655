"""Addresses that look wrong from this machine; bridges are tried in tests/integration/test_two_hosts.py."""

from __future__ import annotations

import pytest

from tandem.discovery.advertised import doubts

REMOTE = ("192.0.2.9:50050",)


@pytest.mark.parametrize("address", ["127.0.0.1:7500", "localhost:7500", "[::1]:7500"])
def test_a_loopback_address_is_doubted_if_the_registry_is_elsewhere(address: str) -> None:
    sentences = doubts(address, ("127.0.0.1:1", *REMOTE))
    assert sentences
    for sentence in sentences:
        assert "which only this machine can call" in sentence
        assert "192.0.2.9:50050" in sentence
        assert "set advertise_host" in sentence


@pytest.mark.parametrize(
    "registry", ["127.0.0.1:1", "[::1]:1", "registry:50050", "srv://registry.tandem.service.consul", "127.0.0.9:1"]
)
def test_a_loopback_address_is_right_for_a_registry_that_may_be_here(registry: str) -> None:
    assert doubts("127.0.0.1:7500", (registry,)) == []


@pytest.mark.parametrize("address", ["[fe80::7]:7500", "169.254.3.4:7500"])
def test_a_link_local_address_is_doubted(address: str) -> None:
    (sentence,) = doubts(address, REMOTE)
    assert "link-local" in sentence
    assert "advertise_host" in sentence


@pytest.mark.parametrize("address", ["192.0.2.7:7500", "[2001:db8::7]:7500", "no-such-host.invalid:7500"])
def test_nothing_is_said_of_other_addresses(address: str) -> None:
    assert doubts(address, REMOTE) == []
