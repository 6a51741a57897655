"""The protocol between a frontend and its encoding process: one question, one answer, in turns.

    question   length of the text in bytes, whether special tokens are added; then the text in UTF-8
    answer     kind, length of the content; then the content: for IDS a TokenIds message

The first answer, READY or REFUSED, is sent without a question.
"""

from __future__ import annotations

import struct
from typing import Final

QUESTION: Final = struct.Struct("<Q?")
ANSWER: Final = struct.Struct("<BQ")

READY: Final = 0
REFUSED: Final = 1
"""It cannot start; the content is the reason."""
IDS: Final = 2
TOO_MANY: Final = 3
"""The text has more tokens than were allowed."""
