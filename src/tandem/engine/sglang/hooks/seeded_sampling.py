"""Reproducible sampling for requests with a seed, inside SGLang's scheduler.

SGLang uses a request's seed only in deterministic inference, which excludes attention in PyTorch, is slower on a GPU,
and gives every request a seed. Here SGLang samples the whole batch as usual; rows with a seed are then sampled again,
with noise from a hash of the seed, the token's position and the token id. So a sample does not depend on the other
requests in the batch, the two legs of an attempt sample like one engine, and requests without a seed cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_BATCH = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
_SEEDS = "tandem_seeds"
"""Attribute of a SamplingBatchInfo: the seed of each row or None, in host memory; absent when no row has one."""

# SplitMix64, in the signed 64-bit numbers that PyTorch can multiply.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)
_NOISE_BITS = 52


def targets() -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks of the scheduler: dotted target -> (hook, kind)."""
    return {
        f"{_BATCH}.from_schedule_batch": (_note_seeds, "after"),
        f"{_BATCH}.filter_batch": (_filter_seeds, "after"),
        f"{_BATCH}.merge_batch": (_merge_seeds, "before"),
        f"{_BATCH}.copy_for_forward": (_copy_seeds, "after"),
        "sglang.srt.layers.sampler.Sampler._sample_from_probs": (_draw, "around"),
    }


# --- Seeds of a batch: kept in step while SGLang builds, filters, merges and copies it


def _note_seeds(info: Any, cls: type, batch: Any, *arguments: Any, **keywords: Any) -> Any:
    # A row with top_k 1 is greedy: nothing is sampled.
    params = [req.sampling_params for req in batch.reqs]
    _keep_seeds(info, [p.sampling_seed if p.top_k > 1 else None for p in params])
    return info


def _filter_seeds(result: None, info: Any, keep_indices: Sequence[int], *arguments: Any, **keywords: Any) -> None:
    seeds = getattr(info, _SEEDS, None)
    if seeds is not None:
        _keep_seeds(info, [seeds[index] for index in keep_indices])


def _merge_seeds(info: Any, other: Any) -> None:
    """Runs before SGLang merges, because len() of a batch changes with the merge."""
    _keep_seeds(info, _seeds_of(info) + _seeds_of(other))


def _copy_seeds(copy: Any, info: Any, *arguments: Any, **keywords: Any) -> Any:
    _keep_seeds(copy, _seeds_of(info))
    return copy


def _seeds_of(info: Any) -> list[int | None]:
    seeds: list[int | None] | None = getattr(info, _SEEDS, None)
    return [None] * len(info) if seeds is None else seeds


def _keep_seeds(info: Any, seeds: list[int | None]) -> None:
    setattr(info, _SEEDS, seeds if any(seed is not None for seed in seeds) else None)


# --- Sampling


def _draw(
    original: Callable[..., Any],
    sampler: Any,
    probs: Any,
    info: Any,
    positions: Any,
    simple_sampling_case: bool,
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """SGLang's samples for the batch, replaced by reproducible ones in the rows that have a seed."""
    seeds = getattr(info, _SEEDS, None)
    if seeds is None or info.sampling_seed is not None:
        return original(sampler, probs, info, positions, simple_sampling_case, *arguments, **keywords)
    import torch

    rows = torch.tensor([row for row, seed in enumerate(seeds) if seed is not None], device=probs.device)
    keys = torch.tensor([seed for seed in seeds if seed is not None], dtype=torch.int64, device=probs.device)
    # Before SGLang's own sampling, which may modify probs in place.
    filters = None if simple_sampling_case else (info.top_ks[rows], info.top_ps[rows], info.min_ps[rows])
    drawn = draw(probs[rows], keys, positions[rows], filters)
    token_ids, capture = original(sampler, probs, info, positions, simple_sampling_case, *arguments, **keywords)
    token_ids[rows] = drawn.to(token_ids.dtype)
    return token_ids, capture


def draw(probs: Any, seeds: Any, positions: Any, filters: tuple[Any, Any, Any] | None) -> Any:
    """Sample one token per row with the Gumbel-max trick.

    Args:
        probs: [rows, vocabulary], the model's probabilities.
        seeds: [rows], int64.
        positions: [rows], position in the sequence of the token to sample.
        filters: top_k, top_p and min_p, [rows] each; None: no filter.

    Returns:
        [rows], int64 token ids.
    """
    import torch

    token_ids = torch.arange(probs.shape[1], device=probs.device).expand(probs.shape)
    if filters is not None:
        probs, token_ids = _filtered(probs.float(), *filters)
    scores = probs.double().log() + _noise(seeds, positions.long(), token_ids)
    return token_ids.gather(1, scores.argmax(dim=1, keepdim=True)).view(-1)


def _filtered(probs: Any, top_ks: Any, top_ps: Any, min_ps: Any) -> tuple[Any, Any]:
    """Probabilities in descending order, filtered ones set to 0, and the token id of each; the first always stays."""
    import torch

    ordered, token_ids = probs.sort(dim=1, descending=True, stable=True)
    ranks = torch.arange(ordered.shape[1], device=probs.device)
    ordered = ordered.masked_fill(ranks >= top_ks.view(-1, 1), 0)
    dropped = ordered.cumsum(dim=1) - ordered > top_ps.view(-1, 1)
    dropped |= ordered < ordered[:, :1] * min_ps.view(-1, 1)
    dropped[:, 0] = False
    return ordered.masked_fill(dropped, 0), token_ids


def _noise(seeds: Any, positions: Any, token_ids: Any) -> Any:
    """Gumbel noise, [rows, vocabulary], a pure function of the three."""
    rows = _mixed(_mixed(seeds) ^ positions)
    bits = _shifted(_mixed(rows.view(-1, 1) ^ token_ids), 64 - _NOISE_BITS)
    # Offset by half a step: 0 or 1 would make a logarithm infinite.
    return -(-((bits.double() + 0.5) / 2**_NOISE_BITS).log()).log()


def _mixed(numbers: Any) -> Any:
    numbers = numbers + _STEP
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, _SHIFTS[-1])


def _shifted(numbers: Any, bits: int) -> Any:
    """Logical right shift: PyTorch's >> on signed integers is arithmetic."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)
