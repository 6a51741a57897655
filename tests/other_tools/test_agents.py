"""Coding agents and agent libraries, unmodified, before a model whose text is scripted: each calls its tool once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tandem.local_cluster.child_process import ClusterProcess
from tandem.testing.eventually import assert_eventually
from tests.integration.conftest import REPOSITORY
from tests.integration.support.edge_host import edge
from tests.integration.support.scripted_model import MODEL, ScriptedModel, scripted_model
from tests.other_tools.conftest import guide_blocks, guide_command, run

pytestmark = [pytest.mark.other_tools, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(1200)]

CONTEXT_TOKENS = 65_536
"""The agents' own prompts are ten times as long as the demo model's context."""
ANSWER = "Mia hid it in the barn."
SAYS = f"I know now.</think>\n\n{ANSWER}"
SHELL = "echo barn-$((6 * 7))"
"""Its output is not in the call, so that only a command that ran can have put it into the next prompt."""


def calling(name: str, **arguments: str) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"I look.</think>\n\n<tool_call>\n{call}\n</tool_call>"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def model(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedModel]:
    folder = tmp_path_factory.mktemp("model")
    async with scripted_model(folder, context_tokens=CONTEXT_TOKENS) as served:
        yield served


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def process(model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterProcess]:
    async with edge(tmp_path_factory.mktemp("edge"), model.address) as started:
        yield started


def statuses(process: ClusterProcess, path: str) -> list[int]:
    """Of the requests of a path that the edge has logged so far."""
    lines = (json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{"))
    return [line["status"] for line in lines if line.get("path") == path]


async def logged(process: ClusterProcess, path: str, count: int) -> list[int]:
    """The statuses, once there are so many: Envoy writes its log a little behind a response."""
    return await assert_eventually(lambda: statuses(process, path), lambda found: len(found) >= count, within_s=20)


async def test_codex_runs_a_command_and_answers(
    agents: Path, model: ScriptedModel, process: ClusterProcess, folder: Path
) -> None:
    model.answers(calling("exec_command", cmd=SHELL), SAYS)
    [config] = guide_blocks("toml")
    (folder / "home" / ".codex").mkdir(parents=True)
    (folder / "home" / ".codex" / "config.toml").write_text(config.replace("127.0.0.1:8080", process.address))
    command = guide_command("TANDEM_KEY=none codex").replace("tandem-demo", MODEL)
    # Its sandbox needs rights that a container may lack; what it runs here is the echo above.
    command = command.replace("codex exec", "codex exec --json --dangerously-bypass-approvals-and-sandbox")
    printed = await run(command, folder, agents)
    events = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert events[-1]["type"] == "turn.completed", printed
    said = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
    assert said == [ANSWER]
    assert not model.generation.answers
    assert ["barn-42" in prompt for prompt in model.prompts] == [False, True]
    assert await logged(process, "/v1/responses", 2) == [200, 200], "no request was sent again"


async def test_claude_code_runs_a_command_and_answers(
    agents: Path, model: ScriptedModel, process: ClusterProcess, folder: Path
) -> None:
    model.answers(calling("Bash", command=SHELL, description="look"), SAYS)
    command = guide_command("ANTHROPIC_BASE_URL").replace("tandem-demo", MODEL)
    command = command.replace("127.0.0.1:8080", process.address)
    command = command.replace("claude -p", "claude --output-format json --allowedTools=Bash -p")
    printed = await run(command, folder, agents)
    [ended] = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert (ended["is_error"], ended["num_turns"], ended["result"]) == (False, 2, ANSWER), printed
    assert not model.generation.answers
    assert ["barn-42" in prompt for prompt in model.prompts] == [False, True]
    assert await logged(process, "/v1/messages", 2) == [200, 200], "no request was sent again"


@pytest.mark.parametrize(
    ("name", "answers", "lines"),
    [
        ("pydantic_ai_agent.py", (calling("look", where="barn"), SAYS), ["looks in the barn", ANSWER]),
        ("instructor_extract.py", ('{"found": true, "colour": "red"}',), ["Key(found=True, colour='red')"]),
    ],
)
async def test_an_example_prints_what_the_model_says(
    name: str,
    answers: tuple[str, ...],
    lines: list[str],
    tools: Path,
    model: ScriptedModel,
    process: ClusterProcess,
    folder: Path,
) -> None:
    model.answers(*answers)
    settings = {"TANDEM_URL": f"http://{process.address}", "TANDEM_MODEL": MODEL}
    printed = await run(f"python {REPOSITORY}/examples/{name}", folder, tools, **settings)
    assert [line for line in printed.splitlines() if line] == lines, printed
    assert not model.generation.answers
