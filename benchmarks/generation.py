"""Seconds a token of text generation, by the number of tokens before it: cached, uncached, and in transformers.

    python benchmarks/generation.py [--preset gpt2-small] [--cached 50 500] [--tokens N] [--rows B] [--repeats R]

Weights and prompts are random, tokens the likeliest, and no row ends early. For a prompt of `cached` tokens:

- `generate`, `sample` and `transformers`: N + 1 new tokens less 1, over N, so that the prompt's pass drops out;
- `step`: one pass over one token, in a cache that has room for the longest of these texts whatever is in it;
- `uncached`: one pass over all tokens, which is what each would cost without a cache.

They take turns, and the best of `--repeats` of each counts. Prints milliseconds a step of all rows as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxptm.generation import Sampling, generate
from jaxptm.models import PRESETS
from jaxptm.models.params import initialise
from jaxptm.nn.core import Execution
from jaxptm.nn.text import empty_caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small")
    parser.add_argument("--cached", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows, tokens = arguments.rows, arguments.tokens
    family, config = PRESETS[arguments.preset]
    module = family.module(config, "causal-lm", Execution())
    params = initialise(module, jax.random.key(0))
    sizes = {**family.to_hf(config), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    sampling = Sampling(temperature=0.7, top_k=50, top_p=0.95)

    def logits(params: Any, ids: Any, **inputs: Any) -> dict[str, Any]:
        return module.apply({"params": params}, ids, mlm_positions=jnp.full((rows, 1), ids.shape[1] - 1), **inputs)

    def step(caches: Any, params: Any, ids: Any, start: Any) -> Any:
        caches = tuple(cache._replace(start=start) for cache in caches)
        out = logits(params, ids, position_ids=jnp.full((rows, 1), start), caches=caches)
        return out["caches"], out["logits"]

    whole, one = jax.jit(logits), jax.jit(step, donate_argnums=0)  # donated: written in place, as in a loop
    caches = jax.jit(lambda: empty_caches(config, module.execution, rows, max(arguments.cached) + tokens + 1))

    def steps(ids: np.ndarray, count: int) -> None:
        held = caches()
        for _ in range(count):
            held, out = one(held, params, ids[:, :1], jnp.int32(ids.shape[1]))
            out.block_until_ready()

    def torch_generate(ids: np.ndarray, count: int) -> None:
        mask = torch.ones(ids.shape, dtype=torch.long)
        theirs.generate(torch.tensor(ids), attention_mask=mask, max_new_tokens=count, do_sample=False)

    sides: dict[str, Callable[[np.ndarray, int], object]] = {
        "generate": lambda ids, count: generate(module, params, ids, max_new_tokens=count),
        "sample": lambda ids, count: generate(module, params, ids, max_new_tokens=count, sampling=sampling),
        "transformers": torch_generate,
        "step": steps,
        "uncached": lambda ids, _: whole(params, ids)["logits"].block_until_ready(),
    }
    rng = np.random.default_rng(0)
    prompts = {cached: rng.integers(0, config.vocab_size, (rows, cached)) for cached in arguments.cached}
    runs = [(side, cached, count) for side in sides for cached in prompts for count in (1, tokens + 1)]
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(arguments.repeats + 1):
        for side, cached, count in runs:
            began = time.perf_counter()
            sides[side](prompts[cached], count)
            if repeat:  # the first compiles
                best[side, cached, count] = min(best[side, cached, count], time.perf_counter() - began)

    def a_token(side: str, cached: int) -> float:
        if side == "uncached":
            return best[side, cached, 1]
        return (best[side, cached, tokens + 1] - best[side, cached, 1]) / tokens

    milliseconds = {side: {cached: round(1000 * a_token(side, cached), 2) for cached in prompts} for side in sides}
    print(json.dumps({"preset": arguments.preset, "rows": rows, "milliseconds": milliseconds}, indent=1))


if __name__ == "__main__":
    main()
