"""Runs the test files in which a test of the last run failed once more, one after another in one process.

For CI: tests that hold real time limits on real engines can fail on a machine that is busy with the tests beside them.
Nothing is hidden: the failures of the first run are printed again, and a test that fails both times fails the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LAST_FAILED = Path(".pytest_cache/v/cache/lastfailed")
ENDED = Path(".pytest_cache/v/tandem/ended")
"""The exit status of the last run of pytest, which `tests/conftest.py` writes when all tests have run."""
SOME_FAILED = "1"
FILES_MAX = 4
"""With failures in more files something is broken, and a second run would only cost time."""


def failed_files(last_failed: dict[str, bool]) -> list[str]:
    """The files of pytest's record of failed tests, each once, in its order."""
    return list(dict.fromkeys(test.partition("::")[0] for test in last_failed))


def main() -> int:
    """Returns pytest's exit status; 1 where a second run makes no sense."""
    if not LAST_FAILED.exists() or not ENDED.exists() or ENDED.read_text() != SOME_FAILED:
        print("the first run did not end with failed tests: it was interrupted or broken", file=sys.stderr)
        return 1
    last_failed = json.loads(LAST_FAILED.read_text())
    files = failed_files(last_failed)
    print(f"\n{len(last_failed)} failed, in {len(files)} files:", *last_failed, sep="\n  ", flush=True)
    if not 0 < len(files) <= FILES_MAX:
        print(f"a second run is made of 1 to {FILES_MAX} files")
        return 1
    if not all(Path(file).is_file() for file in files):
        print("something failed that is no file of tests")
        return 1
    print("These files run once more, alone. Passing now does not mend a test: find what made it fail.", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", "-n", "0", *files], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
