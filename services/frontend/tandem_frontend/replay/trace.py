"""The trace: requests with arrival times, lengths and the identities of their prompts' blocks.

Owns Mooncake's JSONL format, and the spread of arrival times that were recorded in steps of seconds. Knows no fleet.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tandem.errors import ConfigError

STEP_MIN_S = 0.5
"""Arrival times that are this far apart, several requests at each, were recorded in steps."""
TOKENS_MAX = 2**31


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace."""

    number: int
    """Its place in the trace, from 0."""
    arrival_s: float
    """Since the begin of the trace."""
    prompt_tokens: int
    answer_tokens: int
    block_ids: tuple[int, ...]
    """Identity of each block of the prompt, the last one perhaps partly filled. Equal blocks have equal ids."""


def read_trace(file: Path, block_tokens: int, source: str = "TRACE") -> list[TracedRequest]:
    """Read a trace, in the order of arrival.

    Args:
        file: one JSON object a line: timestamp (ms), input_length, output_length, hash_ids.
        block_tokens: tokens of one block.
        source: what errors call the file.

    Raises:
        ConfigError: the file cannot be read; or names the line and what is wrong in it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise ConfigError(source, f"{file} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(source, f"{file} is not UTF-8 (byte {problem.start})") from None
    requests = list(_requests(file, lines, block_tokens, source))
    if not requests:
        raise ConfigError(source, f"{file} has no requests")
    begin_s = min(request.arrival_s for request in requests)
    ordered = sorted(requests, key=lambda request: request.arrival_s)
    return [
        replace(request, number=number, arrival_s=request.arrival_s - begin_s) for number, request in enumerate(ordered)
    ]


def spread(requests: Iterable[TracedRequest], seed: int) -> list[TracedRequest]:
    """Spread requests that were recorded at one step evenly at random over it, in their order. Others stay as they are.

    Replayed as recorded, a trace in steps of 3 s would be a burst every 3 s that its users never made.
    """
    groups = [list(group) for _, group in groupby(requests, key=lambda request: request.arrival_s)]
    times = [group[0].arrival_s for group in groups]
    step_s = median(later - earlier for earlier, later in pairwise(times)) if times[1:] else 0.0
    if step_s < STEP_MIN_S or sum(map(len, groups)) < 2 * len(groups):
        return [request for group in groups for request in group]
    rng = random.Random(f"arrivals {seed}")  # noqa: S311 -- repeatable, no secret
    spread_out: list[TracedRequest] = []
    for group in groups:
        offsets = sorted(rng.random() * step_s for _ in group)
        spread_out += [replace(one, arrival_s=one.arrival_s + at_s) for one, at_s in zip(group, offsets, strict=True)]
    spread_out.sort(key=lambda request: request.arrival_s)
    return [replace(request, number=number) for number, request in enumerate(spread_out)]


def scaled(requests: Iterable[TracedRequest], load: float) -> list[TracedRequest]:
    """The same requests, `load` times as many a second."""
    return [replace(request, arrival_s=request.arrival_s / load) for request in requests]


class ChainHashes:
    """Hashes of prefixes, made of the ids of their blocks: a block's hash depends on all blocks before it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}
        """By the parent's hash and the block's id."""

    def of(self, block_ids: Iterable[int]) -> tuple[int, ...]:
        """The 64-bit hash of the prefix that each block ends."""
        parent, hashes = 0, []
        for block_id in block_ids:
            known = self._known.get((parent, block_id))
            if known is None:
                known = self._known[parent, block_id] = _chained(parent, block_id)
            hashes.append(known)
            parent = known
        return tuple(hashes)


def _chained(parent: int, block_id: int) -> int:
    content = parent.to_bytes(8, "little", signed=True) + block_id.to_bytes(16, "little", signed=True)
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


def _requests(file: Path, lines: list[str], block_tokens: int, source: str) -> Iterator[TracedRequest]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _request(json.loads(line), block_tokens)
            except json.JSONDecodeError as problem:
                raise ConfigError(source, f"{file}, line {number}: is not JSON: {problem.msg}") from None
            except ValueError as problem:
                raise ConfigError(source, f"{file}, line {number}: {problem}") from None


def _request(row: Any, block_tokens: int) -> TracedRequest:
    if not isinstance(row, dict):
        raise ValueError("must be an object")  # noqa: TRY004 -- a value of the file, not of the program
    timestamp_ms = row.get("timestamp")
    if not isinstance(timestamp_ms, int | float) or isinstance(timestamp_ms, bool) or not 0 <= timestamp_ms < 2**53:
        raise ValueError(f"timestamp must be a number of milliseconds, at least 0, not {_shown(timestamp_ms)}")
    prompt_tokens, answer_tokens = (_count(row, name) for name in ("input_length", "output_length"))
    ids = row.get("hash_ids")
    blocks_max = -(-prompt_tokens // block_tokens)
    if not isinstance(ids, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ValueError(f"hash_ids must be a list of whole numbers, not {_shown(ids)}")
    if len(ids) not in (blocks_max, prompt_tokens // block_tokens):
        needed = f"{blocks_max} blocks of {block_tokens} tokens for {prompt_tokens} tokens"
        raise ValueError(f"hash_ids must have {needed}, not {len(ids)}")
    if any(abs(one) >= 2**63 for one in ids):
        raise ValueError("hash_ids must be numbers of at most 63 bits")
    return TracedRequest(0, timestamp_ms / 1_000, prompt_tokens, answer_tokens, tuple(ids))


def _count(row: dict[str, Any], name: str) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= TOKENS_MAX:
        raise ValueError(f"{name} must be a whole number, 1 to {TOKENS_MAX}, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
