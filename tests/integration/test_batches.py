"""Files and batches as OpenAI's SDK uses them, through a real Envoy with keys, on a simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tandem.local_cluster.child_process import ClusterProcess
from tandem.local_cluster.cluster import LocalCluster
from tandem.testing.eventually import assert_eventually
from tests.integration.support.batch_calls import (
    CHAT,
    assert_each_row_once,
    chat_rows,
    created,
    ended,
    results,
    rows,
    sdk,
    spec,
    until,
)
from tests.integration.support.edge_host import client_of, error_of
from tests.integration.support.openai_calls import MODEL
from tests.integration.support.scraped import Wanted, values

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

KEYS = {name: f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "carol", "dora")}
UPLOAD_BYTES_MAX = 12 * 2**20
ORIGIN = "https://app.example"


@dataclass(frozen=True)
class World:
    client: httpx.AsyncClient
    address: str
    frontend: ClusterProcess

    def sdk(self, name: str) -> AsyncOpenAI:
        return sdk(self.address, KEYS[name])

    async def raw(self, method: str, path: str, name: str = "alice", **given: Any) -> httpx.Response:
        """A call that no SDK would make."""
        headers = {"authorization": f"Bearer {KEYS[name]}", **given.pop("headers", {})}
        return await self.client.request(method, path, headers=headers, **given)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("batches")
    keys = directory / "keys"
    keys.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    keys.chmod(0o600)
    limits = {"batch-file-bytes-max": str(UPLOAD_BYTES_MAX)}
    edge_flags = {"api-keys": str(keys), "cors-origins": ORIGIN}
    async with LocalCluster(spec(directory, frontend=limits, edge_flags=edge_flags, metrics=True)) as cluster:
        assert cluster.edge is not None
        async with client_of(cluster.edge) as client:
            yield World(client, cluster.edge.address, cluster.frontend)


async def test_the_sdk_runs_a_batch_from_the_upload_to_the_results(world: World) -> None:
    async with world.sdk("alice") as client:
        batch = await created(client, chat_rows(20), metadata={"run": "é"})
        assert (batch.status, batch.metadata, batch.object) == ("validating", {"run": "é"}, "batch")
        done = await ended(client, batch)
        await assert_each_row_once(client, done, 20)
        times = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
        assert times == sorted(times, key=lambda time: time or 0)
        (line, *_) = await results(client, done.output_file_id)
        response = openai.types.chat.ChatCompletion.model_validate(line["response"]["body"])
        assert response.usage is not None
        assert response.usage.completion_tokens == 4
        assert line["response"]["status_code"] == 200
        assert done.output_file_id is not None
        output = await client.files.retrieve(done.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4}),
        ("/v1/responses", {"model": MODEL, "input": "Once upon a time", "max_output_tokens": 4}),
    ],
)
async def test_rows_of_each_endpoint_run(world: World, endpoint: Any, body: dict[str, Any]) -> None:
    async with world.sdk("alice") as client:
        done = await ended(client, await created(client, rows(endpoint, body, {**body, "temperature": 9}), endpoint))
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
        (good,) = await results(client, done.output_file_id)
        (bad,) = await results(client, done.error_file_id)
        assert good["response"]["body"]["model"] == MODEL
        assert (bad["custom_id"], bad["response"]["status_code"]) == ("row-1", 400)
        assert bad["response"]["body"]["error"]["param"] == "temperature"


async def test_rows_of_another_model_fail_and_the_batch_completes(world: World) -> None:
    body = {"model": "other", "messages": [{"role": "user", "content": "x"}]}
    async with world.sdk("alice") as client:
        done = await ended(client, await created(client, rows(CHAT, body)))
        assert (done.status, done.output_file_id) == ("completed", None)
        (line,) = await results(client, done.error_file_id)
        assert line["response"]["body"]["error"]["code"] == "model_not_found"


async def test_an_input_with_bad_lines_fails_and_names_them(world: World) -> None:
    async with world.sdk("alice") as client:
        done = await ended(client, await created(client, chat_rows(1) + b"{\n" + rows("/v1/completions", {})))
        assert done.status == "failed"
        assert done.errors is not None
        assert done.errors.data is not None
        assert [(error.code, error.line) for error in done.errors.data] == [
            ("invalid_json_line", 2),
            ("duplicate_custom_id", 3),
        ]


async def test_a_cancelled_batch_ends_with_what_it_had(world: World) -> None:
    async with world.sdk("alice") as client:
        batch = await created(client, chat_rows(400, max_tokens=60))
        await until(client, batch, lambda batch: bool(batch.request_counts and batch.request_counts.completed))
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        done = await ended(client, batch)
        assert (done.status, done.cancelled_at is not None) == ("cancelled", True)
        output, errors = await results(client, done.output_file_id), await results(client, done.error_file_id)
        assert output
        assert errors
        assert {line["custom_id"] for line in output + errors} == {f"row-{number}" for number in range(400)}
        assert len(output + errors) == 400
        assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            await client.batches.cancel(batch.id)


async def test_live_requests_stop_rows_that_run_again(world: World) -> None:
    """Rows count neither as live requests, so that many run, nor as such that stay."""
    running = Wanted("tandem.batch.rows.running")
    stopped = Wanted("tandem.batch.rows", {"tandem.batch.outcome": "stopped"})
    async with world.sdk("alice") as client:
        batch = await created(client, chat_rows(60, max_tokens=400))
        await assert_eventually(lambda: values([world.frontend], running), lambda found: sum(found) >= 8)
        body: dict[str, Any] = {"model": MODEL, "prompt": "Once", "max_tokens": 100, "extra_body": {"ignore_eos": True}}
        answer = await client.completions.create(**body)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 100
        await assert_each_row_once(client, await ended(client, batch), 60)
    assert sum(await values([world.frontend], stopped)) > 0


async def test_a_tenant_sees_nothing_of_another(world: World) -> None:
    async with world.sdk("bob") as bob, world.sdk("carol") as carol:
        batch = await created(bob, chat_rows(2))
        await ended(bob, batch)
        for call in (
            carol.batches.retrieve(batch.id),
            carol.batches.cancel(batch.id),
            carol.files.retrieve(batch.input_file_id),
            carol.files.content(batch.input_file_id),
            carol.files.delete(batch.input_file_id),
            carol.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                await call
            assert refused.value.code == "object_not_found"
        assert [file async for file in carol.files.list()] == []
        assert [one async for one in carol.batches.list()] == []
        assert [one.id async for one in bob.batches.list()] == [batch.id]


async def test_the_sdk_pages_through_lists(world: World) -> None:
    async with world.sdk("dora") as client:
        batches = [await created(client, chat_rows(1)) for _ in range(3)]
        for batch in batches:
            await ended(client, batch)
        assert [one.id async for one in client.batches.list(limit=2)] == [one.id for one in reversed(batches)]
        inputs = [batch.input_file_id for batch in batches]
        assert [file.id async for file in client.files.list(purpose="batch", limit=1)] == inputs[::-1]
        oldest_first = await client.files.list(purpose="batch", order="asc")
        assert [file.id for file in oldest_first.data] == inputs
        # Parameters that mean nothing here are dropped, as on other foreign paths.
        page = (await world.raw("GET", "/v1/batches?limit=1&api-version=1", "dora")).json()
        assert (len(page["data"]), page["has_more"], page["first_id"]) == (1, True, batches[-1].id)
        for path, field in (
            ("/v1/files?limit=0", "limit"),
            ("/v1/batches?after=x", "after"),
            ("/v1/files?order=x", "order"),
        ):
            response = await world.raw("GET", path, "dora")
            assert (response.status_code, error_of(response)["param"]) == (400, field)


async def test_a_deleted_file_is_gone(world: World) -> None:
    async with world.sdk("alice") as client:
        file = await client.files.create(file=b"x\n", purpose="batch")
        assert (await client.files.content(file.id)).content == b"x\n"
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.content(file.id)


async def test_a_file_larger_than_a_request_comes_back_as_it_was(world: World) -> None:
    content = bytes(range(256)) * (10 * 2**20 // 256)
    async with world.sdk("alice") as client:
        file = await client.files.create(file=("large.jsonl", content), purpose="batch")
        assert file.bytes == len(content)
        assert (await client.files.content(file.id)).content == content
        with pytest.raises(openai.APIStatusError) as refused:
            await client.files.create(file=("larger.jsonl", b"x" * (UPLOAD_BYTES_MAX + 1)), purpose="batch")
        assert (refused.value.status_code, refused.value.param) == (413, "file")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_wrong_batch_names_the_field(world: World, given: dict[str, Any], field: str) -> None:
    body = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h", **given}
    response = await world.raw("POST", "/v1/batches", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith(field)


@pytest.mark.parametrize(
    ("method", "path", "given", "status"),
    [
        ("POST", "/v1/files", {"json": {}}, 415),
        ("POST", "/v1/files", {"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}}, 400),
        ("POST", "/v1/files", {"files": {"file": b"x"}, "headers": {"origin": "https://evil.example"}}, 403),
        ("POST", "/v1/batches", {"files": {"file": b"x"}}, 415),
        ("PUT", "/v1/files", {}, 405),
        ("DELETE", "/v1/batches/batch_1", {}, 405),
        ("GET", "/v1/files/file-1/other", {}, 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", {}, 404),
        ("GET", "/v1/files/file-1/content", {}, 404),
    ],
)
async def test_a_call_that_is_none_has_a_status_and_an_error(
    world: World, method: str, path: str, given: dict[str, Any], status: int
) -> None:
    response = await world.raw(method, path, **given)
    assert response.status_code == status, response.text
    error_of(response)


async def test_a_page_of_an_allowed_origin_may_upload(world: World) -> None:
    response = await world.raw(
        "POST", "/v1/files", files={"file": b"x"}, data={"purpose": "batch"}, headers={"origin": ORIGIN}
    )
    assert response.status_code == 200, response.text


async def test_a_frontend_without_a_directory_says_so(tmp_path: Path) -> None:
    plain = spec(tmp_path)
    del plain.role_flags["frontend"]["batch-directory"]
    async with LocalCluster(plain) as cluster:
        assert cluster.edge is not None
        async with client_of(cluster.edge) as client:
            for response in (
                await client.get("/v1/files"),
                await client.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"}),
                await client.post("/v1/batches", json={}),
            ):
                assert response.status_code == 501
                assert "batch_directory" in error_of(response)["message"]


async def test_processes_of_one_frontend_share_files_and_run_each_row_once(tmp_path: Path) -> None:
    """Each call may reach another process; one of them has the lock and runs all rows."""
    async with LocalCluster(spec(tmp_path, frontend_processes=2)) as cluster:
        assert cluster.edge is not None
        pids = {child.pid for child in psutil.Process(cluster.frontend.pid).children()}
        assert len(pids) >= 2
        # A connection stays with one process: several clients reach both.
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(sdk(cluster.edge.address)) for _ in range(4)]
            batches = await asyncio.gather(*(created(client, chat_rows(30)) for client in clients))
            for client, batch in zip(reversed(clients), batches, strict=True):
                await assert_each_row_once(client, await ended(client, batch), 30)
