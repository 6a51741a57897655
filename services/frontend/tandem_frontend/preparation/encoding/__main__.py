"""`python -m tandem_frontend.preparation.encoding`: encodes the long texts of one frontend, one after the other.

Has a tokenizer and no other state, and ends with its frontend. Runs at a low priority: on a machine without a free core
a long prompt is delayed instead of the streams.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import socket
import sys
from pathlib import Path

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.service.parent_death import VARIABLE, follow
from tandem_frontend.preparation.encoding import frames
from tandem_frontend.preparation.encoding.texts import TextEncoder, TooManyTokens, open_backend, trim_memory

NICENESS = 10


def main() -> int:
    """Serve until the frontend closes the connection; returns the exit status."""
    # SIGKILL, because there is nothing to clean up, and it also ends a stopped process.
    if not follow(int(os.environ[VARIABLE]), signal.SIGKILL):
        return 1
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    arguments = _arguments()
    with socket.socket(fileno=arguments.descriptor) as connection:
        try:
            encoder = _open(arguments)
        except (OSError, ValueError) as problem:
            # Without the file's path: clients see this error.
            sentence = problem.strerror if isinstance(problem, OSError) else str(problem)
            _answer(connection, frames.REFUSED, f"its tokenizer.json: {sentence}".encode())
            return 1
        _answer(connection, frames.READY)
        trim_memory()
        # The frontend may end at any moment, also while it waits for a result.
        with contextlib.suppress(ConnectionError):
            _serve(connection, encoder)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tandem_frontend.preparation.encoding", allow_abbrev=False)
    parser.add_argument("--file", type=Path, required=True, help="the tokenizer.json")
    parser.add_argument("--digest", required=True, help="SHA-256 (hex) of the file that the frontend has loaded")
    parser.add_argument("--tokens-max", type=int, required=True, help="limit of tokens of one text")
    parser.add_argument("--descriptor", type=int, required=True, help="the socket to the frontend")
    return parser.parse_args()


def _open(arguments: argparse.Namespace) -> TextEncoder:
    content = arguments.file.read_bytes()
    if hashlib.sha256(content).hexdigest() != arguments.digest:
        raise ValueError("it has changed since the frontend started; restart the frontend")
    return TextEncoder(open_backend(content), arguments.tokens_max)


def _serve(connection: socket.socket, encoder: TextEncoder) -> None:
    with connection.makefile("rb") as questions:
        while len(head := questions.read(frames.QUESTION.size)) == frames.QUESTION.size:
            text_bytes, add_special_tokens = frames.QUESTION.unpack(head)
            text = questions.read(text_bytes)
            if len(text) < text_bytes:
                return
            try:
                ids = encoder.encode(text.decode(), add_special_tokens=add_special_tokens)
            except TooManyTokens:
                _answer(connection, frames.TOO_MANY)
            else:
                # As a protobuf message, so that the frontend never creates an object per id.
                _answer(connection, frames.IDS, pb.TokenIds(ids=ids).SerializeToString())
                del ids
            del text
            trim_memory()


def _answer(connection: socket.socket, kind: int, content: bytes = b"") -> None:
    connection.sendall(frames.ANSWER.pack(kind, len(content)) + content)


if __name__ == "__main__":
    sys.exit(main())
