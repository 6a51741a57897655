"""The one sentence a child process leaves behind when it ends by itself: why.

SGLang logs a traceback and sends its parent SIGQUIT; neither tells a program, or an operator, what the matter was.
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
    """An exception on one line, without its traceback."""
    text = " ".join(str(problem).split())
    sentence = f"{type(problem).__name__}: {text}" if text else type(problem).__name__
    return sentence if len(sentence) <= SENTENCE_LENGTH_MAX else sentence[: SENTENCE_LENGTH_MAX - 3] + "..."


def leave(sentence: str) -> None:
    """Write it down; the first sentence of an engine is kept."""
    name = os.environ.get(REPORT_FILE)
    if name is None:
        return
    try:
        with Path(name).open("x", encoding="utf-8") as file:
            file.write(sentence)
    except OSError:
        # Somebody was first, or the parent is gone with its directory: nobody reads this one.
        return


def end(problem: BaseException) -> NoReturn:
    """Leave the sentence and end this process now, with status 1.

    Not by an exception: SGLang's prefill scheduler has a thread that is no daemon and never ends, for which the
    interpreter would wait for ever, with the parent none the wiser and every request waiting for its time-out.
    """
    leave(sentence_of(problem))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def read(file: Path) -> str | None:
    """The sentence, if a child left one."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
