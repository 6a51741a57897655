"""Makes traces for `tandem replay`: single-turn load without any shared prefix, or conversations.

python -m benchmarks.replay.made_traces single-turn /tmp/single.jsonl --requests 5000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512
Row = dict[str, Any]


def single_turn(requests: int, seed: int, *, rate_per_s: float = 4.0, mean_tokens: int = 4000) -> list[Row]:
    """Prompts that share nothing, of exponentially distributed lengths, at exponentially distributed intervals."""
    rng, ids = random.Random(seed), itertools.count()
    rows, at_s = [], 0.0
    for _ in range(requests):
        at_s += rng.expovariate(rate_per_s)
        tokens = 1 + min(64 * mean_tokens, round(rng.expovariate(1 / mean_tokens)))
        rows.append(_row(at_s, tokens, rng.randint(1, 400), list(itertools.islice(ids, -(-tokens // BLOCK_TOKENS)))))
    return rows


def conversations(count: int, seed: int, *, turns_max: int = 8, rate_per_s: float = 0.5) -> list[Row]:
    """Conversations whose prompts each extend the last one; all begin with one system prompt of a block."""
    rng, ids = random.Random(seed), itertools.count(1)
    rows = [row for begin_s in _times(rng, count, rate_per_s) for row in _turns(rng, ids, begin_s, turns_max)]
    return sorted(rows, key=lambda row: int(row["timestamp"]))


def write(rows: list[Row], file: Path) -> Path:
    """Write a trace; returns its file."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def _turns(rng: random.Random, ids: Iterator[int], at_s: float, turns_max: int) -> Iterator[Row]:
    blocks, tokens = [0], BLOCK_TOKENS
    for _ in range(rng.randint(1, turns_max)):
        tokens += rng.randint(50, 3000)
        full = tokens // BLOCK_TOKENS
        blocks += itertools.islice(ids, full - len(blocks))
        # The last block is partly filled, and another one once the conversation has gone on.
        rows_blocks = [*blocks, next(ids)] if tokens % BLOCK_TOKENS else [*blocks]
        answer = rng.randint(1, 300)
        yield _row(at_s, tokens, answer, rows_blocks)
        tokens += answer
        at_s += 5 + rng.expovariate(0.1)


def _times(rng: random.Random, count: int, rate_per_s: float) -> Iterator[float]:
    return itertools.accumulate(rng.expovariate(rate_per_s) for _ in range(count))


def _row(at_s: float, prompt_tokens: int, answer_tokens: int, blocks: list[int]) -> Row:
    return {
        "timestamp": round(at_s * 1_000),
        "input_length": prompt_tokens,
        "output_length": answer_tokens,
        "hash_ids": blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("single-turn", "conversations"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--requests", type=int, default=5000, help="requests, or conversations")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    make = single_turn if asked.kind == "single-turn" else conversations
    write(make(asked.requests, asked.seed), asked.file)


if __name__ == "__main__":
    main()
