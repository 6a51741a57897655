"""The one sentence a child process leaves behind when it ends by itself: why.

SGLang logs a traceback and sends its parent SIGQUIT; neither tells a program, or an operator, what the matter was.
"""

from __future__ import annotations

import os
from pathlib import Path

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


def read(file: Path) -> str | None:
    """The sentence, if a child left one."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
