"""How many files and connections this process may have open: each worker of a fleet is a connection.

Many systems give a process 1,024 unless it asks for more. Owns nothing else; the hard limit stays the operator's.
"""

from __future__ import annotations

import contextlib
import resource

WANTED = 65_536
"""Not all that some systems would give: there are programs that close every number up to the limit."""


def allow_many() -> None:
    """Raise the soft limit, as far as the hard one allows; never lower it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS calls its hard limit infinite and may refuse all the same.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
