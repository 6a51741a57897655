"""`python -m tandem_frontend.openai.body_check`: validates the long bodies of one frontend, one after the other.

Ends with its frontend. Runs at a low priority: on a machine without a free core a long body is delayed instead of the
streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

from pydantic_core import from_json

from tandem.errors import InvalidRequest
from tandem.service.parent_death import VARIABLE, follow
from tandem_frontend.openai.body_check.checker import ANSWER, NICENESS, QUESTION, SCHEMAS
from tandem_frontend.openai.body_check.limits import check_values
from tandem_frontend.openai.request_body import parse
from tandem_frontend.preparation.encoding.texts import trim_memory


def main() -> int:
    """Serve until the frontend closes the connection; returns the exit status."""
    # SIGKILL, because there is nothing to clean up, and it also ends a stopped process.
    if not follow(int(os.environ[VARIABLE]), signal.SIGKILL):
        return 1
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    descriptor, prompt_ids_max = int(sys.argv[1]), int(sys.argv[2])
    # The frontend may end at any moment, also while it waits for a result.
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(ConnectionError):
        _serve(connection, prompt_ids_max)
    return 0


def _serve(connection: socket.socket, prompt_ids_max: int) -> None:
    with connection.makefile("rb") as questions:
        while len(head := questions.read(QUESTION.size)) == QUESTION.size:
            schema, size = QUESTION.unpack(head)
            data = questions.read(size)
            if len(data) < size:
                return
            answer = _checked(schema, data, prompt_ids_max)
            connection.sendall(ANSWER.pack(len(answer)) + answer)
            del data
            trim_memory()


def _checked(schema: int, data: bytes, prompt_ids_max: int) -> bytes:
    """Nothing for a valid body; else the error's field and sentence as JSON."""
    try:
        # Counted first: of a million values the schema would make as many objects.
        with contextlib.suppress(ValueError):
            check_values(from_json(data), prompt_ids_max)
        parse(SCHEMAS[schema], data)
    except InvalidRequest as problem:
        return json.dumps([problem.field, problem.message.removeprefix(f"{problem.field}: ")]).encode()
    return b""


if __name__ == "__main__":
    sys.exit(main())
