"""Every file of examples/, as it is: against one simulated cluster with an edge, or a model whose text is scripted."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import runpy
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tandem.local_cluster.cluster import LocalCluster
from tests.integration.conftest import REPOSITORY, SIMULATED, running
from tests.integration.support.edge_host import edge
from tests.integration.support.scripted_model import MODEL, scripted_model

EXAMPLES = REPOSITORY / "examples"
LINES_MAX = 60
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"
CALL = 'I look.</think>\n\n<tool_call>\n{"name": "look", "arguments": {"where": "barn"}}\n</tool_call>'
ANSWER = "It is in the barn."
SAYS = f"I know.</think>\n\n{ANSWER}"
TIMES_ANSWERED = {
    "ai_sdk_chat.mjs": 2,
    "anthropic_messages.mjs": 2,
    "anthropic_messages.py": 2,
    "curl.sh": 1,
    "grpc_curl.sh": 0,
    "grpc_generate.py": 1,
    "grpc_generate_async.py": 0,
    "langchain_chat.py": 2,
    "litellm_chat.py": 2,
    "openai_async.py": 1,
    "openai_chat.mjs": 2,
    "openai_chat.py": 2,
    "openai_responses.py": 1,
}
"""How often each file prints the whole answer of the simulated model to the question."""
SCRIPTED = {
    "openai_agent.py": ((CALL, SAYS), ["looks in the barn", ANSWER]),
    "openai_structured.py": (('{"found": true, "colour": "red"}',), ["Key(found=True, colour='red')"]),
    "openai_tools.py": ((CALL, SAYS), ['calls look({"where": "barn"})', ANSWER]),
}
"""Files that need a model which calls tools or obeys a grammar: what it writes, and the lines that they print."""
ELSEWHERE = {"instructor_extract.py", "pydantic_ai_agent.py", "openai_embeddings.py"}
"""Libraries of the first two ask for other versions than Tandem: tests/other_tools runs them. The third is run by
`test_embeddings.py`, whose cluster has a model that computes embeddings."""
ALSO_PRINTED = {
    "anthropic_messages.py": r"^max_tokens\n22 input tokens$",
    "curl.sh": r'"stop_reason":"max_tokens"(.|\n)*data: {"finish": (.|\n)*{"token_ids":\[0,631,628,265,539\]}',
    "grpc_curl.sh": r'"name": "tandem-demo"(.|\n)*"reason": "FINISH_REASON_LENGTH"',
    "grpc_generate.py": r"^[1-9]\d* bytes of KV moved$",
    "grpc_generate_async.py": r"^Once upon a time.+\nMia hid the red key.+\nThe old barn.+\ncancelled after: .+",
    "openai_chat.py": r"^22 prompt tokens, 40 completion tokens\nrefused: temperature \(invalid_request\)$",
    "openai_responses.py": r"^incomplete$",
}
IN_PROCESS = sorted(name for name in TIMES_ANSWERED if name.endswith(".py") and name != "litellm_chat.py")
"""Their libraries are imported once for all tests. LiteLLM keeps threads and warns while it is imported."""
OWN_PROCESS = sorted(name for name in TIMES_ANSWERED if name.endswith(".sh") or name == "litellm_chat.py")
JAVASCRIPT = sorted(name for name in TIMES_ANSWERED if name.endswith(".mjs"))

pytestmark = pytest.mark.timeout(240)
on_session_loop = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    logs = tmp_path_factory.mktemp("examples")
    async with running(logs, engine="simulated", edge=True, worker_flags=SIMULATED) as started:
        yield started


@pytest.fixture(scope="module")
def settings(cluster: LocalCluster) -> dict[str, str]:
    assert cluster.edge is not None
    return {"TANDEM_URL": f"http://{cluster.edge.address}", "TANDEM_GRPC": cluster.frontend.address}


@pytest.fixture(scope="module")
def answer(settings: dict[str, str]) -> str:
    """What the simulated model says to the question, and to nothing else."""
    chat = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40}
    said = httpx.post(f"{settings['TANDEM_URL']}/v1/chat/completions", json={"model": "tandem-demo"} | chat, timeout=60)
    text: str = said.json()["choices"][0]["message"]["content"]
    assert len(text) > 100
    return text


def check(name: str, printed: str, answer: str) -> None:
    # JSON of curl.sh escapes control characters, of which the simulated model writes some.
    expected = answer.replace("\x03", "\\u0003") if name == "curl.sh" else answer
    assert printed.count(expected) == TIMES_ANSWERED[name], printed
    assert re.search(ALSO_PRINTED.get(name, ""), printed, re.MULTILINE), printed


async def run(*command: str, settings: dict[str, str], folder: Path = EXAMPLES) -> str:
    """What a command prints. `buf`, which stands in for grpcurl, is in the environment of the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    child = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env={**os.environ, "PATH": path, **settings},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await child.communicate()
    assert child.returncode == 0, out.decode() + err.decode()
    return out.decode()


def test_every_example_is_run_and_short() -> None:
    files = {path.name: path for path in EXAMPLES.iterdir() if path.suffix in {".py", ".sh", ".mjs"}}
    assert set(files) == {*TIMES_ANSWERED, *SCRIPTED, *ELSEWHERE}
    page = (EXAMPLES / "README.md").read_text()
    for name, path in files.items():
        assert len(path.read_text().splitlines()) < LINES_MAX, name
        assert f"]({name})" in page, name


@pytest.mark.parametrize("name", IN_PROCESS)
def test_an_example_prints_the_answer(
    name: str,
    settings: dict[str, str],
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    check(name, capsys.readouterr().out, answer)


@on_session_loop
@pytest.mark.parametrize("name", OWN_PROCESS)
async def test_an_example_in_a_process_of_its_own_prints_the_answer(
    name: str, settings: dict[str, str], answer: str
) -> None:
    program = sys.executable if name.endswith(".py") else "sh"
    check(name, await run(program, name, settings=settings), answer)


@on_session_loop
async def test_the_javascript_examples_print_the_answer(settings: dict[str, str], answer: str, tmp_path: Path) -> None:
    for name in ("package.json", *JAVASCRIPT):
        shutil.copy(EXAMPLES / name, tmp_path)
    npm = ("npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error")
    await run(*npm, folder=tmp_path, settings={})
    for name in JAVASCRIPT:
        check(name, await run("node", name, folder=tmp_path, settings=settings), answer)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@on_session_loop
async def test_an_example_that_is_refused_ends_with_an_error(settings: dict[str, str]) -> None:
    for command in (("sh", "curl.sh"), (sys.executable, "openai_chat.py")):
        with pytest.raises(AssertionError, match="model"):
            await run(*command, settings={**settings, "TANDEM_MODEL": "another"})


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs requirements/cpu-engine.txt")
@on_session_loop
async def test_the_examples_with_tools_and_grammars_print_the_results(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("scripted")
    async with scripted_model(folder) as model, edge(folder, model.address) as process:
        for name, (answers, lines) in SCRIPTED.items():
            model.answers(*answers)
            settings = {"TANDEM_URL": f"http://{process.address}", "TANDEM_MODEL": MODEL}
            printed = await run(sys.executable, name, settings=settings)
            assert [line for line in printed.splitlines() if line] == lines, name
            assert not model.generation.answers, name
