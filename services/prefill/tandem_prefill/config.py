"""Settings of the prefill worker: those of every worker, and no other."""

from __future__ import annotations

from tandem.worker.config import WorkerConfig


class PrefillConfig(WorkerConfig):
    """Computes the KV of prompts and transfers it to decode workers: one SGLang engine in the prefill role."""
