"""Memory and time of a tokenizer in a frontend: `python -m benchmarks.tokenizer_loading`.

Writes byte-level BPE tokenizers of several sizes, with random merges, and loads each in a process of its own as a
frontend does. Prints resident memory in MB, processor time in s, and of it the longest call of the library, during
which no other thread of the process runs: a frontend's streams pause for so long when a model appears.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (32_000, 128_000, 256_000)
COPIES = 3
TOKEN_CHARS_MAX = 12


def write_model(directory: Path, size: int) -> None:
    """A model directory whose tokenizer has so many tokens."""
    from tandem.testing.fake_model import write_fake_model

    write_fake_model(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    first = [token for token in tokenizer["model"]["vocab"] if len(token) == 1 or token.startswith("<")]
    vocabulary = {token: number for number, token in enumerate(first)}
    rng, parts, merges = random.Random(1), [token for token in first if len(token) == 1], []
    while len(vocabulary) < size:
        left, right = rng.choice(parts), rng.choice(parts)
        if left + right not in vocabulary and len(left + right) <= TOKEN_CHARS_MAX:
            vocabulary[left + right] = len(vocabulary)
            merges.append([left, right])
            parts.append(left + right)
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": size}))


def load(directory: Path) -> dict[str, float]:
    """Load it, in this process."""
    import psutil
    from tandem_frontend.preparation.encoding.texts import open_backend
    from tandem_frontend.preparation.tokenizer import Tokenizer

    # Imports and what is loaded once count for no model.
    Tokenizer.open(Path("models") / "tandem-demo")
    before_bytes, begin_s = psutil.Process().memory_info().rss, time.process_time()
    kept = [Tokenizer.open(directory) for _ in range(COPIES)]
    cpu_s, held_bytes = (time.process_time() - begin_s) / COPIES, psutil.Process().memory_info().rss - before_bytes
    content, begin_s = (directory / "tokenizer.json").read_bytes(), time.process_time()
    open_backend(content)
    return {
        "tokens": kept[0].vocabulary_size,
        "memory_mb": round(held_bytes / COPIES / 1e6, 1),
        "cpu_s": round(cpu_s, 2),
        "longest_call_s": round(time.process_time() - begin_s, 2),
    }


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(load(Path(sys.argv[1]))))
        return
    for size in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            write_model(Path(directory), size)
            subprocess.run([sys.executable, "-m", "benchmarks.tokenizer_loading", directory], check=True)


if __name__ == "__main__":
    main()
