"""Follows the file of API keys, so that a key is added or revoked without a restart.

Polls, because files of secrets are replaced in different ways: in place, by rename, or by changing a symbolic link to
their directory. A file that cannot be used leaves the last valid keys in force, and says so.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections.abc import Callable
from pathlib import Path

from tandem.errors import ConfigError
from tandem.service.api_keys import ApiKey, Version, file_version, read_keys

log = logging.getLogger(__name__)

POLL_S = 0.5
Publish = Callable[[tuple[ApiKey, ...]], None]


class KeyWatch:
    """The keys in a file, and its changes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._version: Version | None = None
        """Of the file that was read last; None: it could not be."""
        self._keys: tuple[ApiKey, ...] = ()

    def first(self) -> tuple[ApiKey, ...]:
        """The keys at the start.

        Raises:
            ConfigError: the file cannot be used.
        """
        self._version = file_version(self._file)
        self._warn_of_readers()
        self._keys = read_keys(self._file)
        return self._keys

    async def follow(self, publish: Publish) -> None:
        """Call `publish` after each change, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            self.look(publish)

    def look(self, publish: Publish) -> None:
        """Publish the keys if the file has changed. What could not be published is tried again the next time."""
        version = file_version(self._file)
        if version == self._version:
            return
        try:
            keys = read_keys(self._file)
            if keys != self._keys:
                publish(keys)
                log.info("published %d API keys of %d clients", len(keys), len({key.client_id for key in keys}))
        except ConfigError as problem:
            log.error("%s; the previous API keys stay in force", problem)
        except OSError as problem:
            log.error("could not write the API keys for Envoy, retrying: %s", problem)
            return
        else:
            self._keys = keys
        self._version = version
        self._warn_of_readers()

    def _warn_of_readers(self) -> None:
        try:
            mode = self._file.stat().st_mode
        except OSError:
            return
        if mode & stat.S_IROTH:
            log.warning("every user of this machine can read the API keys in %s: chmod o-r", self._file)
