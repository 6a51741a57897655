"""What the hooks of SGLang's scheduler do between its steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tandem.engine.sglang.hooks import scheduler_hooks

ON_IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scheduler_without_a_batch_publishes_kv_events_while_requests_wait(device: str) -> None:
    published: list[str] = []
    publisher = SimpleNamespace(publish_kv_events=lambda: published.append("events"))
    scheduler = SimpleNamespace(kv_events_publisher=publisher, idle_sleeper=None, is_fully_idle=lambda: False)
    hook, kind = scheduler_hooks.targets(device)[ON_IDLE]
    assert kind == "after"
    hook(None, scheduler)
    assert published == ["events"]
