"""API keys: a file with one line `client-id: key [quota]` per key, and the filter of Envoy that checks them.

Owns both formats. A key is never part of a message. Envoy forwards the client's id with its quota in one header, so
that a frontend never has one without the other, also while keys change.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tandem.domain.quota import NO_QUOTA, Quota, QuotaError, client_header, parse_quota
from tandem.errors import ConfigError

CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"[!-~]{16,512}")
KEY_HEADERS = ("authorization", "x-api-key")
"""Headers that hold a key, the first that a request has: as OpenAI's SDKs and as Anthropic's send it."""
FILTER = "envoy.filters.http.api_key_auth"
"""Name of the filter in the template."""
EXTENSION = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
API_KEY_AUTH = "type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The API key of one client."""

    client_id: str
    key: str
    quota: Quota = NO_QUOTA
    """Of the client: all of its keys have the same, and use it together."""

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
    quotas: dict[str, Quota] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _parsed(line, f"line {number} of {file}")
        if found.key in keys:
            raise ConfigError("api_keys", f"line {number} of {file} repeats the key of {keys[found.key].client_id}")
        if quotas.setdefault(found.client_id, found.quota) != found.quota:
            raise ConfigError(
                "api_keys", f"line {number} of {file} has another quota than an earlier key of {found.client_id}"
            )
        keys[found.key] = found
    if not keys:
        raise ConfigError("api_keys", f"{file} contains no keys")
    return tuple(keys.values())


def _parsed(line: str, where: str) -> ApiKey:
    """One line: `client-id: key`, and the fields of a quota after spaces."""
    client_id, colon, rest = (part.strip() for part in line.partition(":"))
    if not colon or not CLIENT_ID.fullmatch(client_id):
        raise ConfigError("api_keys", f"{where} does not begin with `client-id:`")
    key, *words = rest.split() or [""]
    if not KEY.fullmatch(key):
        raise ConfigError("api_keys", f"{where} has no key of 16 to 512 visible ASCII characters")
    try:
        return ApiKey(client_id, key, parse_quota(words))
    except QuotaError as problem:
        raise ConfigError("api_keys", f"{where}: {problem}") from None


def key_filter(keys: tuple[ApiKey, ...]) -> bytes:
    """The filter that accepts these keys, as a response of Envoy's extension discovery in JSON."""
    auth = {
        "@type": API_KEY_AUTH,
        "credentials": [{"client": client_header(key.client_id, key.quota), "key": key.key} for key in keys],
        "key_sources": [{"header": name} for name in KEY_HEADERS],
        "forwarding": {"header": "x-client-id", "hide_credentials": True},
    }
    return json.dumps({"resources": [{"@type": EXTENSION, "name": FILTER, "typed_config": auth}]}).encode()
