"""The report of a child process that ends because of an error: one sentence with the reason, in a file.

SGLang logs a traceback and sends its parent SIGQUIT; from neither can the worker report a reason to its operator.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from tandem.engine.sglang.environment import REPORT_FILE

SENTENCE_LENGTH_MAX = 400


def sentence_of(problem: BaseException) -> str:
    """An exception as one line of at most SENTENCE_LENGTH_MAX characters, without its traceback."""
    text = " ".join(str(problem).split())
    sentence = f"{type(problem).__name__}: {text}" if text else type(problem).__name__
    return sentence if len(sentence) <= SENTENCE_LENGTH_MAX else sentence[: SENTENCE_LENGTH_MAX - 3] + "..."


def leave(sentence: str) -> None:
    """Write the report; only the first report of an engine is kept."""
    name = os.environ.get(REPORT_FILE)
    if name is None:
        return
    try:
        with Path(name).open("x", encoding="utf-8") as file:
            file.write(sentence)
    except OSError:
        # Another child has reported first, or the parent has removed the directory: this report would not be read.
        return


def end(problem: BaseException) -> NoReturn:
    """Write the report and exit at once, with status 1.

    Not by an exception: SGLang's prefill scheduler has a non-daemon thread that never ends. The interpreter would wait
    for it forever, the parent would not notice the failure, and every request would run into its timeout.
    """
    leave(sentence_of(problem))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def read(file: Path) -> str | None:
    """The report, or None if no child has written one."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
