"""The files of the page, read once, and the headers of every response.

Owns what a browser may do with the page: run its own scripts and call its own origin, nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text ever becomes markup: a page that tried would fail instead.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "tandem",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file of the page."""

    body: bytes
    content_type: str
    etag: str


def read_pages() -> dict[str, Page]:
    """All files, by path; "/" is the document."""
    found: dict[str, Page] = {}
    for file in resources.files("tandem_frontend.console").joinpath("static").iterdir():
        content_type = TYPES.get(file.name[file.name.rfind(".") :])
        if content_type is not None:
            body = file.read_bytes()
            page = Page(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:16]}"')
            found["/" if file.name == "index.html" else f"/{file.name}"] = page
    return found
