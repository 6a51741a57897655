"""Hosts and addresses as text: brackets, spellings, and what is none."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem_prefill.config import PrefillConfig

from tandem import config
from tandem.config import ServiceConfig
from tandem.domain.network_address import bare_host, checked_host, is_any_host, join_address, split_address
from tandem.errors import ConfigError

HOSTS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.sampled_from(["localhost", "prefill-0", "worker_1.cluster.local", "fe80::1%eth0"]),
)
PORTS = st.integers(0, 65_535)


@given(HOSTS, PORTS)
def test_an_address_is_split_into_what_it_was_joined_of(host: str, port: int) -> None:
    address = join_address(host, port)
    assert split_address(address) == (host, port)
    assert address.startswith("[") is (":" in host)


@given(HOSTS, PORTS)
def test_brackets_change_nothing(host: str, port: int) -> None:
    in_brackets = f"[{host}]" if ":" in host else host
    assert join_address(in_brackets, port) == join_address(host, port)
    assert bare_host(in_brackets) == host
    assert checked_host(in_brackets) == checked_host(host) == host


@given(st.ip_addresses(v=6))
def test_each_spelling_of_an_address_is_the_shortest(address: ipaddress.IPv6Address) -> None:
    assert checked_host(address.exploded) == checked_host(f"[{address.exploded.upper()}]") == str(address)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0:0::0", ""])
def test_every_address_is_recognised(host: str) -> None:
    assert is_any_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "::ffff:10.0.0.1"])
def test_one_address_is_not_every_address(host: str) -> None:
    assert not is_any_host(host)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("127.0.0.1:50051", "must be a host without a port"),
        ("[::1]:50051", "must be a host without a port"),
        ("[127.0.0.1]", "must not have an IPv4 address in brackets"),
        ("[localhost]", "must be an IP address or a host name"),
        ("::1]", "must be an IP address or a host name"),
        ("a host", "must be an IP address or a host name"),
        ("http://h", "must be an IP address or a host name"),
        ("", "must be an IP address or a host name"),
    ],
)
def test_what_is_no_host_is_refused_with_the_reason(text: str, reason: str) -> None:
    for setting in ("host", "advertise_host"):
        flag = f"--{setting.replace('_', '-')}={text}"
        with pytest.raises(ConfigError, match=rf"^{setting}: {reason}"):
            config.load(ServiceConfig, "tandem-service", [flag], {})


def test_settings_take_ipv6_with_and_without_brackets() -> None:
    for text in ("fd00::7", "[fd00::7]", "[FD00:0::7]"):
        loaded = config.load(ServiceConfig, "tandem-service", [f"--host={text}", f"--advertise-host={text}"], {})
        assert (loaded.host, loaded.reachable_host) == ("fd00::7", "fd00::7")


def test_a_worker_that_no_caller_can_find_is_refused_at_once(tmp_path: Path) -> None:
    flags = ["--registry", "[::1]:1", "--model", str(tmp_path)]
    for given_hosts in (["--host", "0.0.0.0"], ["--host", "[::]"], ["--advertise-host", "::"]):
        with pytest.raises(ConfigError, match=r"^advertise_host: must be the address or name of this host"):
            config.load(PrefillConfig, "tandem-prefill", [*flags, *given_hosts], {})
    assert config.load(PrefillConfig, "p", [*flags, "--host", "::", "--advertise-host", "h"], {}).host == "::"
