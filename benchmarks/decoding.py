"""Measures decoding: tokens per second, with and without latents, and the share of bandwidth.

  python -m benchmarks.decoding [--batch 1 8] [--seq_len 128] [--new 128] [--forms ...]
      [--json=FILE]

Prompts hold `seq_len` tokens. A token's time is that of `common.decode` for `new` tokens less that
for one, which also reads the prompt and writes latents, over new - 1. A token reads all weights of
the decoder, the token table as the output layer among them, and the entries of the cache that it
sees; at the bandwidth of a copy, measured here, that has a least time: its share of the time is the
figure to raise.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from latent_delib.lm import compiled
from latent_delib.lm.inputs import GenerationOptions
from latent_delib.lm.sampling import Sampler
from latent_delib.nn.sizes import TransformerConfig

PUBLISHED = dict(
    size="gemma2_2b", dtype="bfloat16", latents=[16], batch=[1, 8], seq_len=128, new=128
)


def bandwidth(rounds: int, least: float) -> float:
    """Returns the bytes per second that a copy reads and writes, the best of `rounds`."""
    x = jnp.zeros(2**26 if jax.default_backend() == "cpu" else 2**28, jnp.float32)
    # In place: new pages cost a CPU more than a copy.
    size, step = x.nbytes, jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> jax.Array:
        nonlocal x
        x = step(x)
        return x

    return 2 * size / min(common.measure({"copy": common.calls(copy)}, rounds, least)["copy"])


def bytes_read(
    c: TransformerConfig, params: Any, itemsize: int, batch: int, entries: float
) -> float:
    """Returns the bytes of one token per row: the weights, and `entries` of each row's cache."""
    weights = sum(x.nbytes for x in jax.tree.leaves(params["decoder"]))
    seen = sum(min(entries, c.window) if local else entries for local in c.is_local)
    return weights + batch * seen * 2 * c.num_kv_heads * c.head_dim * itemsize


def measure(a: argparse.Namespace, speed: float) -> list[dict[str, Any]]:
    """Returns a row for each form, batch and number of latents; speed: bytes/s of a copy."""
    dtype, rows = jnp.dtype(a.dtype), []
    for L, B in ((L, B) for L in a.latents for B in a.batch):
        params = common.weights(a.config, L, a.dtype)
        prompt_BT, length_B = common.text(a, B)[0], jnp.full((B,), a.seq_len)

        aug = common.augmentation(a.config, L, common.attention_forms()[-1])
        key_B = jax.random.split(jax.random.key(0), B)

        def form_of(
            name: str, new: int, B=B, aug=aug, params=params, prompt=(prompt_BT, length_B, key_B)
        ):
            return partial(
                common.decode,
                params,
                *prompt,
                GenerationOptions(new, Sampler()),
                aug=aug,
                write=partial(compiled.write_after, params, aug=aug) if name == "latents" else None,
                room=a.new,
                eos_id=-1,  # no row ends early
                pad_id=0,
                stopped=lambda new: np.zeros(B, bool),
            )

        runs = {
            (name, new): common.calls(form_of(name, new)) for name in a.forms for new in (1, a.new)
        }
        seconds = common.measure(runs, a.rounds, a.least)
        for name in a.forms:
            first, all_new = seconds[name, 1], seconds[name, a.new]
            token = [(x - y) / (a.new - 1) for x, y in zip(all_new, first)]  # of the same round
            row = {"latents": L, "batch": B, "form": name, **common.spread(token)}
            rows.append(row)
            if not token:  # it does not fit
                continue
            row["tokens_per_second"] = B / statistics.median(token)
            row["first_ms"] = 1e3 * statistics.median(first)
            entries = a.seq_len + a.new / 2 + L * (name == "latents")
            read = bytes_read(a.config, params, dtype.itemsize, B, entries)
            row["gb_token"] = read / 1e9
            row["bandwidth_share"] = read / speed / statistics.median(token)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    small = PUBLISHED | dict(size="smollm2_135m", dtype="float32", seq_len=32, new=16)
    a = common.arguments(__doc__, argv, ["plain", "latents"], PUBLISHED, small)
    speed = bandwidth(a.rounds, a.least)
    return common.report("decoding", a, measure(a, speed), copy_gb_per_second=speed / 1e9)


if __name__ == "__main__":
    main()
