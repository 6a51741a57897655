"""`python -m tandem.engine.sglang.parsing`: the parser host process, started by `tandem.output_parsers`.

Owns its start: checks the parser names, imports SGLang, and writes one line, `ready` or `refused`. Then it parses
nothing itself: it forks a worker for each connection that it receives (`workers`). What libraries print is redirected
to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from tandem.engine.sglang.environment import DEVICE_SWITCH, PLATFORM_NAME, STANDINS
from tandem.engine.sglang.parsing.names import check_name, read_names
from tandem.engine.sglang.parsing.workers import serve_workers
from tandem.errors import ConfigError, StartError
from tandem.service.parent_death import follow_parent

VARIABLES = {
    # The parser host runs no model: it needs no device, no threads and no downloads.
    DEVICE_SWITCH: "cpu",
    "SGLANG_PLATFORM": PLATFORM_NAME,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TOKENIZER_PARSERS = frozenset({"beam", "hunyuan", "inkling", "response_template"})


def main() -> int:
    """Serve until standard input, a socket, is closed; returns the exit status."""
    follow_parent(os.environ)
    arguments = _arguments()
    responses = _take_stdout()
    logging.basicConfig(level="WARNING", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        host = _build(arguments)
    except StartError as problem:
        key = problem.key if isinstance(problem, ConfigError) else None
        sentence = problem.message.removeprefix(f"{key}: ")
        responses.write(json.dumps({"refused": sentence, "key": key}) + "\n")
        responses.flush()
        return problem.exit_status
    responses.write(json.dumps({"ready": time.process_time()}) + "\n")
    responses.flush()

    serve_workers(socket.socket(fileno=0), host)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tandem.engine.sglang.parsing", allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="model directory; some formats need its tokenizer")
    parser.add_argument("--tool-parser", help="name of SGLang's tool call parser")
    parser.add_argument("--reasoning-parser", help="name of SGLang's reasoning parser")
    return parser.parse_args()


def _take_stdout() -> TextIO:
    """Take over standard output for responses, and redirect descriptor 1 to standard error."""
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return responses


def _build(arguments: argparse.Namespace) -> Any:
    """Import SGLang and construct the host.

    Raises:
        StartError: SGLang is not installed, has no such parser, or fails to construct it.
    """
    given = {"tool_parser": arguments.tool_parser, "reasoning_parser": arguments.reasoning_parser}
    names = read_names()
    for setting, name in given.items():
        check_name(setting, name, names[setting])
    os.environ.update(VARIABLES)
    sys.path.append(str(STANDINS))
    warnings.filterwarnings("ignore")
    try:
        from tandem.engine.sglang.parsing.host import Host, wanted
        from tandem.engine.sglang.parsing.stream import Formats

        formats = Formats(**given, tokenizer=_tokenizer(arguments.model, set(given.values())))
        probe = {"type": "function", "function": {"name": "probe"}}
        host = Host(formats)
        formats.open(wanted({"tools": [probe], "tool_choice": "auto", **NOTHING}))
    except Exception as problem:  # detectors are plugins, which may raise anything
        raise StartError(f"SGLang's parsers {given} failed to load: {type(problem).__name__}: {problem}") from problem
    # SGLang's detectors log a warning for every malformed call that a model writes.
    logging.getLogger("sglang").setLevel("CRITICAL")
    return host


NOTHING: dict[str, Any] = {"prompt": "", "template_kwargs": {}, "previous_calls": 0, "parallel": True}


def _tokenizer(model: Path, names: set[str | None]) -> Any:
    """The model's tokenizer if one of the formats needs it (its markers depend on the vocabulary), else None."""
    if not names & TOKENIZER_PARSERS:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model), local_files_only=True)


if __name__ == "__main__":
    sys.exit(main())
