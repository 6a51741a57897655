"""Who may use the console: the keys of a file, and pages of the console's own origin.

Owns the check of each call. A key travels in a header that no other site can make a browser send, so there is no cookie
to forge calls with.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tandem.errors import ConfigError
from tandem.service.api_keys import ApiKey, Version, file_version, read_keys

log = logging.getLogger(__name__)

SETTING = "console_keys"
SCHEME = "Bearer "
OWN_SITE = frozenset({"same-origin", "none"})
"""`Sec-Fetch-Site` of calls by the console's own page, and by the user."""


class ConsoleKeys:
    """The keys of a file, read again when it changes. A file that cannot be used leaves the previous keys in force."""

    def __init__(self, file: Path) -> None:
        """Reads the file.

        Raises:
            ConfigError: it cannot be used.
        """
        self._file = file
        self._version: Version | None = file_version(file)
        self._keys = _by_digest(read_keys(file, SETTING))

    def find(self, authorization: str) -> ApiKey | None:
        """The key in the value of an `Authorization` header; None: there is none, or a wrong one."""
        self._read_again()
        if not authorization.startswith(SCHEME):
            return None
        # By digest: how long the look-up takes says nothing of the key.
        return self._keys.get(_digest(authorization.removeprefix(SCHEME).strip()))

    def _read_again(self) -> None:
        version = file_version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _by_digest(read_keys(self._file, SETTING))
        except ConfigError as problem:
            log.error("%s; the previous keys of the console stay in force", problem)


def is_own_page(headers: Mapping[str, str], host: str) -> bool:
    """Whether a call comes from the console's own page, or from no page at all.

    Args:
        headers: of the call.
        host: its Host header.
    """
    if headers.get("Sec-Fetch-Site", "none") not in OWN_SITE:
        return False
    origin = headers.get("Origin")
    try:
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:
        # No address at all, such as "http://[".
        return False


def _by_digest(keys: tuple[ApiKey, ...]) -> dict[bytes, ApiKey]:
    return {_digest(key.key): key for key in keys}


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
