"""What a frontend and its encoding process write to each other: one question, one answer, and so on.

    question   length of the text in bytes, whether special tokens are added; the text in UTF-8
    answer     kind, length of what follows; for IDS a TokenIds message

The first answer, READY or REFUSED, comes unasked.
"""

from __future__ import annotations

import struct
from typing import Final

QUESTION: Final = struct.Struct("<Q?")
ANSWER: Final = struct.Struct("<BQ")

READY: Final = 0
REFUSED: Final = 1
"""It cannot start; what follows says why."""
IDS: Final = 2
TOO_MANY: Final = 3
"""The text has more tokens than were allowed."""
