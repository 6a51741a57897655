"""Judges over a recorded history: each raises an AssertionError that shows the requests it is about.

Owns what counts as right. A history that is too small to show anything is void, which is a failure of its own: a judge
that has seen nothing has found nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.faults.support.history import Asked, History

Oracle = Callable[[Sequence[int], int], list[int]]
"""The tokens that must come after a prompt, so many of them."""


def is_large_enough(history: History, least: int, what: str = "the history") -> None:
    """Fewer requests than that prove nothing."""
    assert len(history) >= least, f"void: {what} has {len(history)} requests, at least {least} are needed"


def none_failed(history: History, but: Callable[[Asked], bool] = lambda asked: False) -> None:
    """Every request ended, and well; `but` names those that may have failed."""
    failed = history.failed().where(lambda asked: not but(asked))
    assert not len(failed), f"{len(failed)} of {len(history)} requests failed:\n{failed.lines()}"
    endless = history.where(lambda asked: asked.end_s is None)
    assert not len(endless), f"{len(endless)} requests never ended:\n{endless.lines()}"


def tokens_are_exact(history: History, oracle: Oracle) -> None:
    """Every answer is the whole right one; a failed request's tokens are the beginning of it."""
    for asked in history.asked:
        right = oracle(asked.prompt, asked.max_tokens)
        if asked.failure is not None or asked.end_s is None:
            right = right[: len(asked.tokens)]
        assert asked.tokens == right, f"wrong tokens:\n{asked.summary()}\n{asked.tokens}\n{right}"


def ran_through(history: History, time_s: float, least: int) -> None:
    """At least so many streams were running at that moment, and each of them finished."""
    running = history.running_at(time_s)
    is_large_enough(running, least, "what ran at the moment of the fault")
    none_failed(running)


def none_went_to(history: History, worker_id: str, from_s: float) -> None:
    """From that moment on, no request was served by that worker, and none was sent to one that did not answer."""
    later = history.begun(from_s)
    served = later.served_by(worker_id)
    assert not len(served), f"{len(served)} requests were served by {worker_id}:\n{served.lines()}"
    astray = later.led_astray()
    assert not len(astray), f"{len(astray)} requests were sent to a worker that did not take them:\n{astray.lines()}"


def went_to(history: History, worker_id: str, from_s: float) -> None:
    """From that moment on, that worker served a request."""
    assert len(history.begun(from_s).served_by(worker_id)), f"no request was served by {worker_id} again"


def held_by(worker_id: str, killed_s: float) -> Callable[[Asked], bool]:
    """Whether a request was in that worker's hands when it was killed: no worker can finish it then.

    A request that it had not taken is not among them: another worker takes it.
    """

    def held(asked: Asked) -> bool:
        problem = asked.failure
        return (
            problem is not None
            and asked.start_s < killed_s
            and problem.metadata.get("worker") == worker_id
            and problem.metadata.get("phase") != "dispatched"
        )

    return held
