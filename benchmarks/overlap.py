"""Shows whether the decoder waits for the asynchronous coprocessor: on two devices, one for each.

  python -m benchmarks.overlap [--size=smollm2_135m] [--latents=16] [--seq_len=128] [--new=64]

On a CPU the two devices are simulated, a core each. "plain" is the decoder alone, "waits" the
decoder that waits for latents at the end of the prompt, "beside" the decoder that goes on until
they are ready. Of "beside" also: after how many tokens latents joined, how long the coprocessor
worked, and what a token took meanwhile.
"""

import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false "
    + os.environ.get("XLA_FLAGS", "")
)

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from latent_delib import mesh
from latent_delib.delib.coprocessor import Latents, Reading
from latent_delib.lm import compiled, decoding
from latent_delib.lm.inputs import GenerationOptions
from latent_delib.lm.sampling import Sampler
from latent_delib.nn.transformer import Params


class Timed:
    """Measures a call of the coprocessor: when it is asked, and when its answer is seen."""

    def __init__(self, write: Callable[[Reading, jax.Array], Latents]):
        self.write = write

    def ask(self, read: Reading, text_BX: jax.Array) -> Latents:
        """Starts writing latents; reading the prompt does not count."""
        jax.block_until_ready(read)
        self.asked = time.perf_counter()
        self.latents = self.write(read, text_BX)
        return self.latents

    def look(self, new_BN: np.ndarray) -> np.ndarray:
        """Sees the new tokens, one by one until latents are there; ends no row."""
        if not hasattr(self, "worked") and decoding.ready(self.latents):
            self.worked = time.perf_counter() - self.asked
            self.meanwhile = new_BN.shape[1]
        return np.zeros(len(new_BN), bool)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    preset = dict(size="gemma2_2b", dtype="bfloat16", latents=16, batch=1, seq_len=1024, new=64)
    small = preset | dict(size="smollm2_135m", dtype="float32", seq_len=128)
    a = common.arguments(__doc__, argv, ["plain", "waits", "beside"], preset, small)
    if len(jax.devices()) < 2:
        raise SystemExit("error: one device; expected two, for the decoder and the coprocessor")
    home, there = (mesh.make({}, [device]) for device in jax.devices()[:2])
    params = common.weights(a.config, a.latents, a.dtype)
    aug = common.augmentation(a.config, a.latents, common.attention_forms()[-1])

    def place(params: Params, where: Any) -> Params:
        return jax.device_put(params, mesh.replicated(where))

    decoder = place({"decoder": params["decoder"]}, home)
    coprocessor = {"coprocessor": params["coprocessor"]}
    here, beside = place(coprocessor, home), place(coprocessor, there)
    prompts = common.text(a, a.batch)[0], jnp.full((a.batch,), a.seq_len)
    prompt_BT, length_B = jax.device_put(prompts, mesh.rows(home))
    key_B = jax.device_put(jax.random.split(jax.random.key(0), a.batch), mesh.rows(home))
    timed: list[Timed] = []

    def form_of(form: str, new: int) -> Any:
        def call() -> Any:
            write, stopped = None, lambda tokens: np.zeros(a.batch, bool)
            if form == "waits":
                write = partial(compiled.write_after, here, aug=aug)
            if form == "beside":
                timed.append(Timed(partial(decoding.write_beside, beside, aug, there, home)))
                write, stopped = timed[-1].ask, timed[-1].look
            options = GenerationOptions(new, Sampler(), delay=None if form == "beside" else 0)
            return common.decode(
                decoder, prompt_BT, length_B, key_B, options,
                aug=aug, write=write, room=a.new, eos_id=-1, pad_id=0, stopped=stopped,
            )  # fmt: skip

        return call

    runs = {
        (form, new): common.calls(form_of(form, new), lambda _: None)
        for form in a.forms
        # A single token would leave the coprocessor at work, beside what is timed next.
        for new in ((a.new,) if form == "beside" else (1, a.new))
    }
    seconds = common.measure(runs, a.rounds, a.least)
    rows = []
    for form in a.forms:
        row = {"form": form, **common.spread(seconds[form, a.new])}
        if (form, 1) in seconds:
            row["first_ms"] = 1e3 * statistics.median(seconds[form, 1])
        if form == "beside":
            seen = [t for t in timed if hasattr(t, "worked")]
            if not seen:
                raise SystemExit(f"error: --new={a.new}: expected more, latents were never ready")
            row["joined_after"] = statistics.median(t.meanwhile for t in seen)
            row["coprocessor_ms"] = 1e3 * statistics.median(t.worked for t in seen)
            row["token_ms_meanwhile"] = 1e3 * statistics.median(
                t.worked / t.meanwhile for t in seen if t.meanwhile
            )
        else:
            row["token_ms"] = 1e3 * statistics.median(
                (x - y) / (a.new - 1) for x, y in zip(seconds[form, a.new], seconds[form, 1])
            )
        rows.append(row)
    return common.report("overlap", a, rows)


if __name__ == "__main__":
    main()
