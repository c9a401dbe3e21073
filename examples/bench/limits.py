"""How much speculation could give on this machine with this head, if nothing were ever guessed wrong.

    python examples/bench/limits.py --rows 1,4,16,64 --json examples/bench/results/limits.json

Before every token of plainly decoded texts the head drafts a wide tree, and how far the text follows it, and by which
ranks, is what trees of every shape would have been worth, each from the tokens at which its own steps begin. From that
and from the measured costs of passes follow, for every number of rows, as multiples of plain decoding:

    oracle    the best shape of drafts, in which rows are drafted only as deep, and nodes verified, as will be accepted
    copying   the same where what a row repeats of itself is looked up, and the head drafts only where it gets further
    perfect   the best depth of chains of a head that is always right
    needed    the share of right chains of one token at which drafting them for all rows breaks even
    drained   the job of drained.py, if its prompts are read as in plain decoding, some beside every step, and a step of
              so many rows is as much faster as the oracle's

What `tree: auto` reaches lies below `copying`, and without lookups below `oracle`; where `perfect` is low it is the
machine that has nothing to give away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from drained import LENGTHS
from results import write
from speculation import Machine

from batchgen.engines.torch.engine import TorchEngine
from batchgen.engines.torch.forest import Shape
from batchgen.engines.torch.measure import measure
from batchgen.engines.torch.width import Drafted, FixedTree
from batchgen.speculation.lookup import MOST, History
from batchgen.speculation.schedule import CHILDREN, PLAIN, SHAPES, Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from batchgen.engines.torch.forest import Candidates
    from batchgen.record import Completion, Request
    from batchgen.speculation.costs import Costs
    from batchgen.speculation.schedule import Ahead

WIDEST = Shape(6, 4, 31)
# Prompt tokens that the engine reads beside a step.
BESIDE = 256


class Watch(FixedTree):
    """Drafts a wide tree before every token and verifies nothing of it; keeps all that was drafted."""

    def __init__(self) -> None:
        super().__init__(WIDEST)
        self.drafts: list[Candidates] = []

    def keep(self, drafted: Drafted, caps: torch.Tensor, ahead: Ahead) -> torch.Tensor:
        """See `width.Width`."""
        self.drafts.append(drafted.candidates)
        return torch.zeros(drafted.candidates.token.shape, dtype=torch.bool)


def followed(draft: Candidates, text: Sequence[int]) -> list[int]:
    """The ranks of the nodes of a row's tree that `text`, what comes after its root, follows."""
    ranks, node = [], -1
    for token in text:
        [child] = np.nonzero(((draft.parent == node) & (draft.token == token) & draft.logp.isfinite())[0].numpy())
        if not len(child):
            break
        node = int(child[0])
        ranks.append(int(draft.rank[0, node]))
    return ranks


def copied(tokens: Sequence[int], num_read: int) -> list[int]:
    """For each of a row's own tokens, `num_read` on, how many after it are what is looked up there."""
    known, found = list(tokens[:num_read]), []
    history = History(known)
    for place in range(num_read, len(tokens)):
        known.append(tokens[place])
        _, looked_up = history.follow(MOST)
        right = (one == other for one, other in zip(looked_up, tokens[place + 1 :], strict=False))
        found.append(sum(itertools.takewhile(bool, right)))
    return found


def steps_of(
    texts: list[list[list[int]]],
    depth: int,
    width: int,
    children: int = CHILDREN,
    *,
    looked_up: list[list[int]] | None = None,
) -> NDArray[np.int64]:
    """Levels drafted and tokens accepted in every step of `texts`, by trees of `depth`, `width` nodes a level; [S, 2].

    Nothing is drafted where as much is `looked_up`, of each text before each token.
    """
    steps = []
    for number, ranks in enumerate(texts):
        place = 0
        while place < len(ranks):
            length = 0
            for rank in ranks[place][:depth]:
                if rank >= children:
                    break
                length += 1
                if rank >= width:  # a candidate, but not expanded
                    break
            found = looked_up[number][place] if looked_up else 0
            steps.append((0, found) if found >= length else (length, length))
            place += 1 + steps[-1][1]
    return np.array(steps)


def seconds(costs: Costs, rows: int, tokens: float, shape: Draft, context: int, going_on: Sequence[float]) -> float:
    """A step that verifies just the `tokens` that it gives; of its rows a share is `going_on` below each level."""
    if shape == PLAIN:
        return costs.verify(rows, context)
    drafting = costs.extend(tokens, context)
    for share in going_on:
        some = 1 - (1 - share) ** rows  # how likely a level is drafted at all
        drafting += some * costs.level(shape.width * rows * share / some, context) if some > 0 else 0.0
    return float(costs.verify(tokens, context)) + drafting


def limits(
    costs: Costs, texts: list[list[list[int]]], looked_up: list[list[int]], rows: int, context: int
) -> dict[str, float]:
    """See the top of this file."""
    plain = seconds(costs, rows, rows, PLAIN, context, [])

    def ratio(accepted: float, shape: Draft, going_on: Sequence[float]) -> float:
        tokens = rows * (1 + accepted)
        return tokens / rows * plain / seconds(costs, rows, tokens, shape, context, going_on)

    def best(shape: Draft, looked_up: list[list[int]] | None = None) -> float:
        levels, kept = steps_of(texts, shape.depth, shape.width, looked_up=looked_up).T
        # A level is drafted of whom it will be accepted.
        going_on = [float((levels >= level).mean()) for level in range(2, shape.depth + 1)]
        return ratio(float(kept.mean()), shape, going_on)

    shapes = [shape for shape in SHAPES if shape != PLAIN]
    oracle = max(shapes, key=best)
    one = float(costs.verify(2 * rows, context)) + costs.extend(2 * rows, context)
    return {
        "oracle": round(best(oracle), 3),
        "oracle_depth": oracle.depth,
        "oracle_width": oracle.width,
        "copying": round(max(best(shape, looked_up) for shape in shapes), 3),
        "perfect": round(max(ratio(depth, Draft(depth, 1), [1.0] * (depth - 1)) for depth in range(1, 7)), 3),
        "needed": round(one / plain - 1, 3),
    }


def drained(costs: Costs, oracle: dict[int, float], requests: Sequence[Request], context: int) -> float:
    """How much faster all `requests` are, of which up to `max(oracle)` run at once, than by plain decoding."""
    known = [math.log2(rows) for rows in oracle]
    running: list[int] = []
    waiting = deque(requests)
    plain = faster = 0.0
    while waiting or running:
        read = 0
        while waiting and len(running) < max(oracle):
            read += len(waiting[0].prompt_token_ids)
            running.append(waiting.popleft().sampling.max_tokens - 1)  # reading a prompt gives a token
        rows = len(running)
        step, mixed = (float(costs.verify(tokens, rows * context)) for tokens in (rows, rows + BESIDE))
        reading = read / BESIDE * (mixed - step)
        plain += reading + step
        faster += reading + step / float(np.interp(math.log2(rows), known, [*oracle.values()]))
        running = [left - 1 for left in running if left > 1]
    return plain / faster


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--rows", default="1,2,4,8,16,32,64", help="numbers of running rows, rising")
    options.add_argument("--prompts", type=int, default=24, help="rows by which the head is judged")
    options.add_argument("--max-tokens", type=int, default=64)
    options.add_argument("--context", type=int, default=256, help="tokens before each root")
    options.add_argument("--json", type=Path)
    args = options.parse_args()

    machine = Machine(args.dtype, args.device)
    watch = Watch()
    # One row at a time, so that a step's tree is of the row that runs.
    engine = TorchEngine(machine.target, machine.draft, decode=machine.tokenizer.decode, batch_size=1, width=watch)
    texts, looked_up = [], []
    for request in machine.requests(args.prompts, [args.max_tokens]):
        engine.submit(request)
        done: list[Completion] = []
        while not done:
            done = engine.step()
        # The first token comes with the prompt, and the last one has nothing to be drafted for.
        token_ids = done[0].token_ids
        texts.append([followed(draft, token_ids[i:]) for i, draft in enumerate(watch.drafts, 1)])
        watch.drafts.clear()
        looked_up.append(copied([*request.prompt_token_ids, *token_ids], len(request.prompt_token_ids)))
    chains = {depth: steps_of(texts, depth, 1, 1)[:, 1] for depth in range(1, WIDEST.depth + 1)}
    reached = [(chains[WIDEST.depth] >= depth).mean() for depth in range(WIDEST.depth + 1)]
    by_depth = [round(float(after / before), 3) for before, after in itertools.pairwise(reached) if before > 0]
    results: list[dict[str, object]] = [
        {
            "acceptance_by_depth": by_depth,
            "acceptance_length_of_chains": [round(1 + float(c.mean()), 3) for c in chains.values()],
        }
    ]
    reach: dict[str, dict[int, float]] = {"oracle": {}, "copying": {}}
    for rows in map(int, args.rows.split(",")):
        costs, _ = measure(machine.target, machine.draft, rows)
        found = limits(costs, texts, looked_up, rows, rows * args.context)
        for name, by_rows in reach.items():
            by_rows[rows] = float(found[name])
        results.append({"rows": rows} | found)
    job = machine.requests(256, LENGTHS)
    whole = {name: round(drained(costs, by_rows, job, args.context), 3) for name, by_rows in reach.items()}
    results.append({"rows": len(job), "drained": whole})
    for fact in results:
        print(json.dumps(fact), flush=True)
    write(args.json, results, args, args.device)


if __name__ == "__main__":
    main()
