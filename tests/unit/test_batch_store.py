"""Files and batches in their directory: what a tenant sees, what expires, and what a description holds."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tandem_frontend.batches import store as store_module
from tandem_frontend.batches.directory import BatchDirectory, tenant_key
from tandem_frontend.batches.files import FileStore
from tandem_frontend.batches.records import ENDED, NEXT, Batch, RowError, Status

from tandem.domain.quota import Quota
from tandem.errors import ConfigError, InvalidRequest, ObjectNotFound, Overloaded
from tests.unit.support.batch_scene import RETENTION_S, Scene, rows


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "batches")


def test_a_tenant_finds_neither_files_nor_batches_of_another(scene: Scene) -> None:
    batch = scene.create(rows({"n": 1}), "alice")
    assert scene.files.get("alice", batch.input_file_id).bytes == len(rows({"n": 1}))
    for call in (
        lambda: scene.files.get("bob", batch.input_file_id),
        lambda: scene.files.path("bob", batch.input_file_id),
        lambda: scene.files.delete("bob", batch.input_file_id),
        lambda: scene.store.get("bob", batch.id),
        lambda: scene.store.cancel("bob", batch.id),
        lambda: scene.store.add(batch_of("bob", batch)),
    ):
        with pytest.raises(ObjectNotFound):
            call()
    assert scene.files.of_tenant("bob") == []
    assert scene.store.of_tenant("bob") == []


def batch_of(tenant: str, batch: Batch) -> Batch:
    return Batch.read({**batch.stored(), "tenant": tenant, "id": "batch_" + "0" * 32}, None)


@pytest.mark.parametrize("name", ["../x", "", "file-" + "0" * 31, "file-../../../etc/passwd", "file-" + "G" * 32])
def test_an_id_that_is_none_is_not_found(scene: Scene, name: str) -> None:
    with pytest.raises(ObjectNotFound):
        scene.files.path("", name)
    with pytest.raises(ObjectNotFound):
        scene.store.get("", name.replace("file-", "batch_"))


def test_an_id_that_is_a_path_to_another_tenant_is_not_found(scene: Scene) -> None:
    batch = scene.create(rows({"n": 1}), "alice")
    scene.create(rows({"n": 1}), "bob")
    for name in (f"../{tenant_key('alice')}/{batch.input_file_id}", f"../{tenant_key('alice')}/{batch.id}"):
        with pytest.raises(ObjectNotFound):
            scene.files.get("bob", name)
        with pytest.raises(ObjectNotFound):
            scene.store.get("bob", name)


def test_a_tenants_name_is_no_path(scene: Scene) -> None:
    scene.create(rows({"n": 1}), "../../x")
    assert {path.parent.name for path in (scene.root / "files").glob("*/*")} == {tenant_key("../../x")}


def test_only_the_owner_of_the_process_may_read_the_directory(scene: Scene) -> None:
    assert stat.S_IMODE((scene.root / "files").stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="batch_directory"):
        BatchDirectory(tmp_path / "file" / "below")


def test_one_process_has_the_lock_until_it_releases_it(scene: Scene) -> None:
    first = scene.directory.lock()
    assert first is not None
    assert BatchDirectory(scene.root).lock() is None
    first.release()
    second = scene.directory.lock()
    assert second is not None
    second.release()


def test_a_batch_keeps_its_rows_when_its_file_is_deleted(scene: Scene) -> None:
    batch = scene.create(rows({"n": 1}))
    scene.files.delete("", batch.input_file_id)
    with pytest.raises(ObjectNotFound):
        scene.files.get("", batch.input_file_id)
    assert (scene.store.folder(batch) / "input").read_bytes() == rows({"n": 1})


def test_a_description_comes_back_as_it_was_written(scene: Scene) -> None:
    errors = (RowError("code", "message", "param", 3), RowError("other", "text"))
    batch = scene.create(rows({"n": 1}), "alice", quota=Quota(requests_per_minute=3), metadata={"a": "é"})
    failed = batch.entering(Status.FAILED, 1.5, errors=errors)
    scene.store.write(failed)
    assert scene.now(batch) == failed
    assert failed.as_json()["failed_at"] == 1
    assert [error["line"] for error in failed.as_json()["errors"]["data"]] == [3, None]


def test_every_state_leads_to_an_end_and_none_beyond_it() -> None:
    assert ENDED.isdisjoint(NEXT)
    for state in set(Status) - ENDED - {Status.CANCELLING}:
        assert NEXT[state], state
    with pytest.raises(AssertionError):
        Batch(
            id="b", tenant="", endpoint="", input_file_id="", created_at=0, expires_at=0, status=Status.COMPLETED
        ).entering(Status.IN_PROGRESS, 0)


def test_a_cancelled_batch_is_cancelling_until_it_ends(scene: Scene) -> None:
    batch = scene.create(rows({"n": 1}))
    first = scene.store.cancel("", batch.id)
    scene.clock.advance(10)
    assert scene.store.cancel("", batch.id).as_json() == first.as_json()
    assert (first.as_json()["status"], first.as_json()["cancelling_at"]) == ("cancelling", int(scene.clock()) - 10)
    scene.store.write(batch.entering(Status.CANCELLED, scene.clock()))
    assert scene.now(batch).as_json()["status"] == "cancelled"
    with pytest.raises(InvalidRequest, match="is cancelled"):
        scene.store.cancel("", batch.id)


def test_a_tenant_has_a_limited_number_of_open_batches(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "UNFINISHED_MAX", 2)
    ended, _ = scene.create(rows({"n": 1})), scene.create(rows({"n": 1}))
    with pytest.raises(Overloaded):
        scene.create(rows({"n": 1}))
    scene.create(rows({"n": 1}), "bob")
    scene.store.write(ended.entering(Status.CANCELLED, 0))
    scene.create(rows({"n": 1}))


def test_a_tenant_keeps_a_limited_number_of_bytes(scene: Scene) -> None:
    files = FileStore(scene.directory, 100, RETENTION_S, scene.clock)
    kept = scene.upload(b"x" * 60)
    files.check_room("", 40)
    files.check_room("bob", 100)
    with pytest.raises(Overloaded) as refused:
        files.check_room("", 41)
    assert refused.value.metadata["limit"] == "batch_tenant_bytes_max"
    files.delete("", kept)
    files.check_room("", 100)


def test_files_and_batches_are_listed_newest_first(scene: Scene) -> None:
    batches = [scene.create(rows({"n": number})) for number in range(4)]
    assert [batch.id for batch in scene.store.of_tenant("")] == [batch.id for batch in reversed(batches)]
    assert [file.id for file in scene.files.of_tenant("")] == [batch.input_file_id for batch in reversed(batches)]


def test_what_has_expired_is_swept(scene: Scene) -> None:
    batch = scene.create(rows({"n": 1}))
    scene.store.write(batch.entering(Status.CANCELLED, scene.clock()))
    running = scene.create(rows({"n": 2}))
    scene.clock.advance(RETENTION_S + 1)
    fresh = scene.upload(b"x")
    assert [file.id for file in scene.files.of_tenant("")] == [fresh]
    scene.files.sweep()
    assert [path.stem for path in (scene.root / "files").glob("*/*.data")] == [fresh]
    scene.clock.advance(86_400)
    scene.store.sweep()
    assert [one.id for one in scene.store.of_tenant("")] == [running.id]


def test_a_file_expires_when_its_upload_said_so(scene: Scene) -> None:
    part = scene.directory.uploads / "part"
    part.write_bytes(b"x")
    file = scene.files.add("", part, "file-" + "0" * 32, "x", "batch", 3_600)
    assert file.expires_at == int(scene.clock()) + 3_600
    scene.clock.advance(3_600)
    with pytest.raises(ObjectNotFound):
        scene.files.get("", file.id)
