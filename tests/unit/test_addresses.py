"""Address formats of registries in settings, and the order in which they are called."""

from __future__ import annotations

import random

import pytest
from tandem_decode.config import DecodeConfig

from tandem.clock import ManualClock
from tandem.config import load
from tandem.discovery.address_book import DNS_RETRY_S, FRESH_S, AddressBook
from tandem.discovery.addresses import SrvName, parse_addresses, parse_srv
from tandem.errors import ConfigError, ServiceError

NAME = "srv://registry.tandem.service.consul"


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("a:1", ("a:1",)),
        (" a:1, [::1]:2 ", ("a:1", "[::1]:2")),
        (f"{NAME}@127.0.0.1:8600,a:1", (f"{NAME}@127.0.0.1:8600", "a:1")),
    ],
)
def test_addresses_are_one_or_several(text: str, addresses: tuple[str, ...]) -> None:
    assert parse_addresses(text) == addresses


@pytest.mark.parametrize(
    ("text", "srv"),
    [
        ("a:1", None),
        (NAME, SrvName("registry.tandem.service.consul", None)),
        ("srv://_grpc._tcp.registry.@dns", SrvName("_grpc._tcp.registry.", "dns", 53)),
        ("srv://r@127.0.0.1:8600", SrvName("r", "127.0.0.1", 8600)),
        ("srv://r@[::1]:8600", SrvName("r", "::1", 8600)),
        ("srv://r@[::1]", SrvName("r", "::1", 53)),
    ],
)
def test_a_name_says_what_to_ask_and_whom(text: str, srv: SrvName | None) -> None:
    assert parse_srv(text) == srv


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:1,",
        "http://a:1",
        "-:1",
        ".:1",
        "a b:1",
        "a..b:1",
        "::1:1",
        "[::1:1",
        "[a]:1",
        "srv://",
        "srv://@dns",
        "srv://a..b",
        "srv://a b",
        "srv://a@",
        "srv://a@:53",
        "srv://a@dns:0",
        "srv://a@dns:x",
        "srv://a/b@dns",
        "srv://a@b@dns",
        f"srv://{'a' * 64}",
    ],
)
def test_a_wrong_form_names_the_setting(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(DecodeConfig, "tandem-decode", [f"--registry={text}", "--model", "m"], {})
    assert refusal.value.key == "registry"


class Dns:
    """DNS as the test writes it."""

    def __init__(self, *answer: str) -> None:
        self.answer = answer
        self.asked = 0

    async def resolve(self, srv: SrvName, rng: random.Random) -> tuple[str, ...]:
        self.asked += 1
        if not self.answer:
            raise ServiceError("DNS is gone")
        return self.answer


def book(*forms: str, dns: Dns | None = None, clock: ManualClock | None = None) -> AddressBook:
    return AddressBook(forms, clock=clock or ManualClock(), rng=random.Random(1), resolve=(dns or Dns()).resolve)


async def taken(book: AddressBook, count: int) -> list[str]:
    """The next addresses, when each of them fails."""
    addresses = []
    for _ in range(count):
        addresses.append(await book.current())
        book.failed()
    return addresses


async def test_an_address_is_kept_until_it_fails_and_then_all_have_their_turn() -> None:
    several = book("a:1", "b:2", "c:3")
    assert [await several.current() for _ in range(2)] == ["a:1", "a:1"]
    assert await taken(several, 7) == ["a:1", "b:2", "c:3"] * 2 + ["a:1"]


async def test_dns_is_asked_again_after_a_failure_not_before() -> None:
    clock, dns = ManualClock(), Dns("a:1")
    named = book(NAME, dns=dns, clock=clock)
    assert await taken(named, 3) == ["a:1"] * 3
    assert dns.asked == 1, "a fresh answer is good for several tries"
    await named.current()
    dns.answer = ("b:2",)
    clock.advance(100 * FRESH_S)
    assert await named.current() == "a:1", "what works is kept"
    named.failed()
    assert await named.current() == "b:2"
    assert dns.asked == 2


async def test_a_failed_address_goes_to_the_end_of_a_new_answer() -> None:
    clock, dns = ManualClock(), Dns("a:1", "b:2")
    named = book(NAME, dns=dns, clock=clock)
    assert await taken(named, 1) == ["a:1"]
    clock.advance(FRESH_S)
    dns.answer = ("a:1", "c:3")
    assert await taken(named, 3) == ["c:3", "a:1", "c:3"]


async def test_the_last_answer_outlives_dns() -> None:
    clock, dns = ManualClock(), Dns("a:1", "b:2")
    named = book(NAME, dns=dns, clock=clock)
    assert await taken(named, 2) == ["a:1", "b:2"]
    dns.answer = ()
    clock.advance(FRESH_S)
    assert await taken(named, 2) == ["a:1", "b:2"]
    clock.advance(DNS_RETRY_S / 2)
    await taken(named, 2)
    assert dns.asked == 2, "a DNS server that failed is not asked again for a while"
    clock.advance(DNS_RETRY_S)
    dns.answer = ("c:3",)
    assert await taken(named, 1) == ["c:3"]


async def test_a_name_dns_never_answered_for_is_asked_for_each_time() -> None:
    dns = Dns()
    named = book(NAME, dns=dns)
    for _ in range(2):
        with pytest.raises(ServiceError, match=NAME):
            await named.current()
    dns.answer = ("a:1",)
    assert await named.current() == "a:1"


async def test_plain_addresses_beside_a_name_do_without_dns() -> None:
    assert await taken(book(NAME, "a:1"), 2) == ["a:1", "a:1"]
