"""Keys that expire: each once, at its own time, however often and in whatever order they are renewed."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tandem.service.expiries import Expiries

STEPS = st.one_of(
    st.tuples(st.just("set"), st.sampled_from("abcd"), st.integers(0, 20)),
    st.tuples(st.just("discard"), st.sampled_from("abcd")),
    st.tuples(st.just("take"), st.integers(0, 8)),
)


@given(st.lists(STEPS, max_size=60))
def test_keys_expire_as_a_look_at_all_of_them_says(steps: list[Any]) -> None:
    table, model, now_s = Expiries[str](), dict[str, float](), 0.0
    for kind, *given_ in steps:
        if kind == "set":
            key, after_s = given_
            model[key] = now_s + after_s
            table.set(key, model[key])
        elif kind == "discard":
            model.pop(given_[0], None)
            table.discard(given_[0])
        else:
            now_s += given_[0]
            over = {key for key, until_s in model.items() if until_s <= now_s}
            taken = table.take(now_s)
            assert sorted(taken) == sorted(over)
            model = {key: until_s for key, until_s in model.items() if key not in over}
        assert len(table) == len(model)
        assert all(table.is_live(key, now_s) == (model.get(key, 0) > now_s) for key in "abcd")
        next_s = table.next_s()
        assert (next_s is None) == (not model)
        assert next_s is None or next_s <= min(model.values())


def test_a_key_that_is_renewed_often_is_looked_at_seldom() -> None:
    table = Expiries[str]()
    for now_s in range(10_000):
        table.set("a", now_s + 3.0)
        assert table.take(now_s) == []
    assert len(table._heap) == 1
