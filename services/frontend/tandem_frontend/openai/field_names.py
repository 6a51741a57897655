"""Renames the field of an error to what the client wrote, for a block of code that runs on translated requests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tandem.errors import InvalidRequest, NotSupported


@contextlib.contextmanager
def renaming(rename: Callable[[str], str]) -> Iterator[None]:
    """Rename the field of an error that leaves the block. `rename` gets the name that the error has."""
    try:
        yield
    except InvalidRequest as problem:
        raise problem.renamed(rename(problem.field)) from None
    # Not every NotSupported is about a field: an engine may lack a whole feature.
    except NotSupported as problem:
        if "field" in problem.metadata:
            problem.metadata["field"] = rename(problem.metadata["field"])
        raise
