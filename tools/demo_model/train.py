"""Trains the demo model from nothing: `python -m tools.demo_model.train --out models/tandem-demo`.

Owns the loop, the log and the files of the model. `--check` repeats the first steps and compares their loss with the
published log; `--nudge` shows how far rounding alone leads. The text is generated while training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import documents
from .muon import Muon
from .packing import Encoder, Row, pack
from .recipe import Recipe
from .tokenizer import BOS, CONTEXT_TOKENS, END, PAD, save_tokenizer, train_tokenizer

LOG_NAME = "training_log.json"
LOG_EVERY_STEPS = 25
# The same build on the same kind of device repeats the losses exactly; another one rounds differently, and the
# difference grows. Whole runs on a CPU, and one rounding step apart, differed by 0.0173 at most (the model's card).
CHECK_TOLERANCE = 0.05


@dataclass(frozen=True)
class LogLine:
    """The mean loss of the last `LOG_EVERY_STEPS` steps."""

    step: int
    tokens: int
    row_tokens: int
    loss: float
    elapsed_s: float


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the untrained model."""
    torch.manual_seed(recipe.seed)
    bos, end, pad = tokenizer.convert_tokens_to_ids([BOS, END, PAD])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layer_count,
        num_attention_heads=recipe.head_count,
        num_key_value_heads=recipe.kv_head_count,
        head_dim=recipe.head_size,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=pad, do_sample=False)
    return model


def build_optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [one for one in model.model.layers.parameters() if one.ndim == 2]
    others = [one for one in model.parameters() if all(one is not other for other in matrices)]
    return [
        Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.vector_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def nudge(model: LlamaForCausalLM, seed: int) -> None:
    """Moves every untrained weight by about one rounding step, as another machine's arithmetic would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))


def batches(recipe: Recipe, encoder: Encoder) -> Iterator[list[Row]]:
    """Yields the batch of every step, phase after phase."""
    for index, phase in enumerate(recipe.phases):
        rows = pack(documents(f"{recipe.seed}-{index}", phase.mix), encoder, phase.row_tokens)
        for _ in range(phase.step_count):
            yield [next(rows) for _ in range(phase.row_count)]


def weighted_loss(model: LlamaForCausalLM, rows: list[Row], device: str) -> torch.Tensor:
    """Returns the mean cross-entropy, each target token counted by its weight."""
    ids = torch.tensor([row.ids for row in rows], device=device)  # [row, token]
    weights = torch.tensor([row.weights for row in rows], device=device)[:, 1:]
    counted = weights > 0
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    losses = functional.cross_entropy(model.lm_head(hidden[counted]), ids[:, 1:][counted], reduction="none")
    return (losses * weights[counted]).sum() / weights.sum()


def train(
    model: LlamaForCausalLM, recipe: Recipe, encoder: Encoder, step_count: int, device: str, start_s: float
) -> Iterator[LogLine]:
    """Trains for `step_count` steps and yields a line of the log as it goes."""
    optimisers = build_optimisers(model, recipe)
    full_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    losses: list[torch.Tensor] = []
    token_count = 0
    for step, rows in zip(range(step_count), batches(recipe, encoder), strict=False):
        loss = weighted_loss(model, rows, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rate in zip(optimisers, full_rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * recipe.learning_rate_scale(step)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.detach())
        token_count += len(rows) * len(rows[0].ids)
        if (step + 1) % LOG_EVERY_STEPS == 0 or step + 1 == step_count:
            mean = round(torch.stack(losses).mean().item(), 4)
            yield LogLine(step + 1, token_count, len(rows[0].ids), mean, round(time.monotonic() - start_s, 1))
            losses.clear()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: list[LogLine], out: Path) -> None:
    """Writes the model's directory in Hugging Face format, with the log beside it."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    save_tokenizer(tokenizer, out)
    lines = [json.dumps(line.__dict__) for line in log]
    (out / LOG_NAME).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def check(log: list[LogLine], published: Path) -> bool:
    """Compares a run, or its beginning, with the published log; prints the largest difference of each phase."""
    known = {line["step"]: line["loss"] for line in json.loads(published.read_text(encoding="utf-8"))}
    worst_by_length: dict[int, float] = {}
    for line in log:
        if line.step in known:
            difference = abs(line.loss - known[line.step])
            worst_by_length[line.row_tokens] = max(difference, worst_by_length.get(line.row_tokens, 0.0))
    for row_tokens, worst in worst_by_length.items():
        print(f"largest difference to {published}, rows of {row_tokens}: {worst:.4f} (tolerance {CHECK_TOLERANCE})")
    return bool(worst_by_length) and max(worst_by_length.values()) <= CHECK_TOLERANCE


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory of the model; nothing is written without it")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--check", type=Path, metavar="LOG", help="compare the losses with this log; exit 1 if too far")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nudge", type=int, metavar="SEED", help="begin one rounding step away")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe")
    return parser.parse_args()


def main() -> int:
    """Runs the training."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe().replace(arguments.set)
    start_s = time.monotonic()
    tokenizer = train_tokenizer()
    model = build_model(recipe, tokenizer).to(arguments.device)
    if arguments.nudge is not None:
        nudge(model, arguments.nudge)
    print(f"{recipe}\n{sum(one.numel() for one in model.parameters())} parameters", flush=True)
    log: list[LogLine] = []
    steps = min(arguments.steps or recipe.step_count, recipe.step_count)
    for line in train(model, recipe, Encoder(tokenizer), steps, arguments.device, start_s):
        log.append(line)
        print(line, flush=True)
    if arguments.out:
        save(model.cpu(), tokenizer, log, arguments.out)
    return 0 if not arguments.check or check(log, arguments.check) else 1


if __name__ == "__main__":
    sys.exit(main())
