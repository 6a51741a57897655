"""The cache salt of a request: one per tenant, the same everywhere, and none that a client could name."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from tandem_frontend.preparation.cache_salt import CacheSharing, cache_salt

TENANT, ALL = CacheSharing.TENANT, CacheSharing.ALL
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def test_the_salt_of_a_tenant_is_the_same_at_every_frontend_of_every_release() -> None:
    """Fixed values: a release that derived others would lose every cache, and share none with its predecessor."""
    assert cache_salt(TENANT, "alice", None) == "7b13be93d5701f982185fe7865593179684a3f6390dc4e424c1c3aedd56a32d1"


def test_a_request_without_tenant_and_salt_shares_the_common_cache() -> None:
    for sharing in CacheSharing:
        assert cache_salt(sharing, "", None) is None
        assert cache_salt(sharing, "", "") is None


def test_with_sharing_all_tenants_have_one_cache_and_own_salts_divide_it() -> None:
    assert cache_salt(ALL, "alice", None) is None
    assert cache_salt(ALL, "alice", "s") == cache_salt(ALL, "bob", "s") == cache_salt(TENANT, "", "s") is not None


@given(NAMES, NAMES, NAMES, NAMES)
def test_no_other_tenant_and_salt_give_the_same(tenant: str, own: str, other_tenant: str, other_own: str) -> None:
    one, other = cache_salt(TENANT, tenant, own), cache_salt(TENANT, other_tenant, other_own)
    assert (one == other) == ((tenant, own) == (other_tenant, other_own))


@given(NAMES, NAMES)
def test_a_client_that_sends_the_salt_of_a_tenant_does_not_get_its_cache(tenant: str, other: str) -> None:
    stolen = cache_salt(TENANT, tenant, None)
    for sharing, name in ((TENANT, other), (TENANT, ""), (ALL, other)):
        if stolen is not None:
            assert cache_salt(sharing, name, stolen) != stolen


@given(NAMES.filter(bool))
def test_a_salt_shows_nothing_of_the_tenant_and_fits_the_contract(tenant: str) -> None:
    assert re.fullmatch("[0-9a-f]{64}", cache_salt(TENANT, tenant, None) or "")
