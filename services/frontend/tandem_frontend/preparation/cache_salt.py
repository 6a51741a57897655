"""The cache salt of a request: keeps the prefix caches of tenants apart, in both engines and in the index for routing.

Owns the derivation, which is the same at every frontend and after every start. The tenant's name goes into it, never a
key: a new key of a tenant finds its caches. It needs no secret: what a client sends as its own salt is hashed together
with its tenant, so that no client can name the salt of another one.
"""

from __future__ import annotations

from enum import Enum
from hashlib import sha256

TAG = b"tandem-tenant-salt-v1\0"


class CacheSharing(Enum):
    """Who shares a prefix cache."""

    TENANT = "tenant"
    """The requests of one tenant; those without a tenant share one too."""
    ALL = "all"


def cache_salt(sharing: CacheSharing, tenant: str, own: str | None) -> str | None:
    """The salt for the engines, 64 hex digits; None: the cache of those without a tenant and salt.

    `own` is what the client sent: it divides the tenant's cache further. An empty one is none.
    """
    divided = tenant if sharing is CacheSharing.TENANT else ""
    if not divided and not own:
        return None
    name = divided.encode()
    # With its length, so that no other pair of tenant and salt has the same bytes.
    return sha256(TAG + len(name).to_bytes(4, "big") + name + (own or "").encode()).hexdigest()
