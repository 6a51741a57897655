"""Cost of detokenization per token: `python -m benchmarks.detokenizing [--tokenizer FILE]`.

Compares a stream that uses a token table (`tandem_frontend.response.token_table`), one that decodes a window of tokens,
and the library's own DecodeStream, on one tokenizer.json; then measures the search for stop strings. Microseconds per
token, best of several rounds, because the machine is shared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tandem_frontend.response.detokenizer import Detokenizer
from tandem_frontend.response.stop_matching import StopMatcher
from tandem_frontend.response.token_table import TokenTable
from tokenizers.decoders import DecodeStream

MODEL = Path("models") / "tandem-demo"
ENGLISH = "The quick brown fox jumps over the lazy dog, and then it writes code: def f(x): return x + 1\n" * 20
MIXED = "Größe 東京は今日も雨です ก็ไม่ไหว 👩‍👩‍👧 e\u0301 Быстрая лиса 안녕하세요 🙂🚀 " * 20
PROMPT = "You are a helpful assistant. Tell me a story."
USUAL_STOPS = ["\n\n", "User:", "###", "<|end|>"]
ROUNDS = 7


class Windowed:
    """The tokenizer without its table."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


class WithTable(Windowed):
    """The tokenizer with it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend)
        begin_s = time.perf_counter()
        self.token_table = TokenTable.read(backend, 1 + max(backend.get_vocab().values()))
        self.read_s = time.perf_counter() - begin_s


def best_us(work: Callable[[], int], rounds: int = ROUNDS) -> float:
    """Of a token; the work returns how many there were."""
    best_s = float("inf")
    for _ in range(rounds):
        begin_s = time.perf_counter()
        count = work()
        best_s = min(best_s, (time.perf_counter() - begin_s) / count)
    return best_s * 1e6


def detokenizing(decoder: Windowed, prompt: Sequence[int], ids: Sequence[int], size: int) -> Callable[[], int]:
    batches = [tuple(ids[begin : begin + size]) for begin in range(0, len(ids), size)]

    def work() -> int:
        push = Detokenizer(decoder, prompt).push
        for batch in batches:
            push(batch)
        return len(ids)

    return work


def streaming(backend: tokenizers.Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> Callable[[], int]:
    def work() -> int:
        stream = DecodeStream(ids=list(prompt[-6:]), skip_special_tokens=True)
        for token_id in ids:
            stream.step(backend, token_id)
        return len(ids)

    return work


def constructing(decoder: Windowed, prompt: Sequence[int]) -> Callable[[], int]:
    def work() -> int:
        for _ in range(1_000):
            Detokenizer(decoder, prompt)
        return 1_000

    return work


def searching(stops: list[str]) -> Callable[[], int]:
    pieces = [ENGLISH[begin : begin + 4] for begin in range(0, len(ENGLISH), 4)]

    def work() -> int:
        push = StopMatcher(stops).push
        for piece in pieces:
            push(piece)
        return len(pieces)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=MODEL / "tokenizer.json", help="a tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(parser.parse_args().tokenizer))
    windowed, tabled = Windowed(backend), WithTable(backend)
    table = tabled.token_table
    if table is None:
        sys.exit("this tokenizer has no table: its decoder is not joining")
    print(f"{len(table.whole):,} tokens, table read in {tabled.read_s:.2f} s")
    prompt = backend.encode(PROMPT).ids
    print(f"{'us for a token':<28}{'window':>9}{'stream':>9}{'table':>9}{'4 at once':>11}{'16 at once':>12}")
    for name, text in (("English", ENGLISH), ("mixed scripts", MIXED)):
        ids = backend.encode(text, add_special_tokens=False).ids
        by_size = [best_us(detokenizing(tabled, prompt, ids, size)) for size in (1, 4, 16)]
        window = best_us(detokenizing(windowed, prompt, ids, 1))
        print(f"{name:<28}{window:>9.2f}{best_us(streaming(backend, prompt, ids)):>9.2f}"
              f"{by_size[0]:>9.2f}{by_size[1]:>11.2f}{by_size[2]:>12.2f}")  # fmt: skip
    for byte in (b"\xff", b"\x80"):
        ids = [table.whole.index(byte)] * 3_000
        window = best_us(detokenizing(windowed, prompt, ids, 1), 1)
        print(f"{f'3,000 times byte {byte[0]:02X}':<28}{window:>9.2f}"
              f"{best_us(streaming(backend, prompt, ids), 1):>9.2f}"
              f"{best_us(detokenizing(tabled, prompt, ids, 1), 1):>9.2f}")  # fmt: skip
    print(f"{'us to begin a stream':<28}{best_us(constructing(windowed, prompt)):>9.2f}{'':>9}"
          f"{best_us(constructing(tabled, prompt)):>9.2f}")  # fmt: skip
    for name, stops in (("no stop strings", []), ("4 usual ones", USUAL_STOPS), ("one that begins often", [" xyz"])):
        print(f"{name:<28}{best_us(searching(stops)):>9.2f}")


if __name__ == "__main__":
    main()
