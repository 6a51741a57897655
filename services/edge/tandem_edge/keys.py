"""API keys: a file with one line `client-id: key` per client.

Owns the file format. A key is never part of a message.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import ConfigError

CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"[!-~]{16,512}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The API key of one client."""

    client_id: str
    key: str

    def __repr__(self) -> str:
        return f"ApiKey({self.client_id!r})"


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """The keys in a file, in its order. Empty lines and lines that begin with # are ignored.

    Raises:
        ConfigError: names the line number, never the key.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError("api_keys", f"{file} cannot be read: {type(problem).__name__}") from None
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        client_id, colon, key = (part.strip() for part in line.partition(":"))
        if not colon or not CLIENT_ID.fullmatch(client_id):
            raise ConfigError("api_keys", f"line {number} of {file} does not begin with `client-id:`")
        if not KEY.fullmatch(key):
            raise ConfigError("api_keys", f"line {number} of {file} has no key of 16 to 512 visible ASCII characters")
        if key in keys:
            raise ConfigError("api_keys", f"line {number} of {file} repeats the key of {keys[key].client_id}")
        keys[key] = ApiKey(client_id, key)
    if not keys:
        raise ConfigError("api_keys", f"{file} contains no keys")
    return tuple(keys.values())
