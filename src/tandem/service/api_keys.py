"""A file of API keys: one line `client-id: key [quota]` per key.

Owns the format, which the edge's clients and the console's users share. A key is never part of a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tandem.domain.quota import NO_QUOTA, Quota, QuotaError, parse_quota
from tandem.errors import ConfigError

CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"[!-~]{16,512}")
Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The API key of one client."""

    client_id: str
    key: str
    quota: Quota = NO_QUOTA
    """Of the client: all of its keys have the same, and use it together."""

    def __repr__(self) -> str:
        return f"ApiKey({self.client_id!r})"


def read_keys(file: Path, setting: str = "api_keys") -> tuple[ApiKey, ...]:
    """The keys in a file, in its order. Empty lines and lines that begin with # are ignored. Errors name `setting`.

    Raises:
        ConfigError: names the line number, never the key.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(setting, f"{file} cannot be read: {type(problem).__name__}") from None
    keys: dict[str, ApiKey] = {}
    quotas: dict[str, Quota] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _parsed(line, f"line {number} of {file}", setting)
        if found.key in keys:
            raise ConfigError(setting, f"line {number} of {file} repeats the key of {keys[found.key].client_id}")
        if quotas.setdefault(found.client_id, found.quota) != found.quota:
            raise ConfigError(
                setting, f"line {number} of {file} has another quota than an earlier key of {found.client_id}"
            )
        keys[found.key] = found
    if not keys:
        raise ConfigError(setting, f"{file} contains no keys")
    return tuple(keys.values())


def _parsed(line: str, where: str, setting: str) -> ApiKey:
    """One line: `client-id: key`, and the fields of a quota after spaces."""
    client_id, colon, rest = (part.strip() for part in line.partition(":"))
    if not colon or not CLIENT_ID.fullmatch(client_id):
        raise ConfigError(setting, f"{where} does not begin with `client-id:`")
    key, *words = rest.split() or [""]
    if not KEY.fullmatch(key):
        raise ConfigError(setting, f"{where} has no key of 16 to 512 visible ASCII characters")
    try:
        return ApiKey(client_id, key, parse_quota(words))
    except QuotaError as problem:
        raise ConfigError(setting, f"{where}: {problem}") from None


def file_version(file: Path) -> Version | None:
    """Changes whenever the file is written or replaced; None: it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
