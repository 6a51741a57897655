"""The filter of Envoy that checks API keys (`tandem.service.api_keys`).

Envoy forwards the client's id with its quota in one header, so that a frontend never has one without the other, also
while keys change.
"""

from __future__ import annotations

import json

from tandem.domain.quota import client_header
from tandem.service.api_keys import ApiKey

KEY_HEADERS = ("authorization", "x-api-key")
"""Headers that hold a key, the first that a request has: as OpenAI's SDKs and as Anthropic's send it."""
FILTER = "envoy.filters.http.api_key_auth"
"""Name of the filter in the template."""
EXTENSION = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
API_KEY_AUTH = "type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth"


def key_filter(keys: tuple[ApiKey, ...]) -> bytes:
    """The filter that accepts these keys, as a response of Envoy's extension discovery in JSON."""
    auth = {
        "@type": API_KEY_AUTH,
        "credentials": [{"client": client_header(key.client_id, key.quota), "key": key.key} for key in keys],
        "key_sources": [{"header": name} for name in KEY_HEADERS],
        "forwarding": {"header": "x-client-id", "hide_credentials": True},
    }
    return json.dumps({"resources": [{"@type": EXTENSION, "name": FILTER, "typed_config": auth}]}).encode()
