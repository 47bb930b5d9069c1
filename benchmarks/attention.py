"""Measures attention of one layer over all traces: time, useful TFLOP/s and memory of each form.

  python -m benchmarks.attention [--latents 16 64] [--batch 1] [--forms ...] [--json=FILE]

A trace holds N_L + N_A tokens: the decoder's call with placement overlay. Every form does the same
job, and the same useful FLOPs count for each (`common.attention_flops`); the dense mask also
computes the text's own attention and all the pairs that nobody sees. torch is the peer's
flex_attention, which also computes the cache's gradient; on a CPU, where that has no backward pass,
plain operations over the same pairs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, dense
from latent_delib.delib.traces import Traces
from latent_delib.nn.attention.forms import attend


def both_passes(attention: Callable) -> dict[str, Any]:
    """Returns "forward" and "both", forward and backward, jitted.

    Each is a function of (q, k, v), of a tuple of what else attention takes, and of the output's
    gradient. Only q, k and v are differentiated.
    """

    def forward_backward(operands: tuple, shown: tuple, dout: jax.Array):
        # Not of a sum: its gradient needs no output.
        out, pull = jax.vjp(lambda *x: attention(*x, *shown), *operands)
        return out, pull(dout)

    return {
        "forward": jax.jit(lambda operands, shown, dout: attention(*operands, *shown)),
        "both": jax.jit(forward_backward),
    }


def torch_passes(
    c: Any, traces: Traces, text: dense.Tokens, operands: tuple, prefix: tuple, dout: jax.Array
) -> dict:
    """Returns the peer's forms of the same two, to be measured."""
    import numpy as np
    import torch

    from benchmarks import peer_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def theirs(x: jax.Array) -> Any:
        """Returns x [B, tokens, heads, H] as torch has it: [B, heads, tokens, H]."""
        x32 = torch.from_numpy(np.asarray(x.astype(jnp.float32)))
        return x32.to(device, getattr(torch, x.dtype.name)).transpose(1, 2).contiguous()

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    integers = (
        traces.position,
        traces.bounds.prefix_start[..., 0],
        traces.bounds.prefix_stop[..., 0],
        text.position,
    )
    there = [torch.tensor(np.asarray(x), device=device) for x in integers]
    sees = peer_torch.trace_mask(*there, None)
    q, k, v = (theirs(flat(x)).requires_grad_() for x in operands)
    before, gradient = [theirs(x) for x in prefix], theirs(flat(dout))
    form = peer_torch.FORMS[device]
    mask = form.mask(sees, *traces.position.shape, before[0].shape[2], torch.device(device))

    @torch.compile(dynamic=False)
    def attention(q, k, v):
        return form.attend(q, (k, v), before, mask, c.query_scale, c.attn_softcap)

    def forward() -> None:
        with torch.no_grad():
            attention(q, k, v)

    def both() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), gradient)

    return {
        "forward": common.calls(forward, peer_torch.wait),
        "both": common.calls(both, peer_torch.wait),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    common.share_the_chip()
    forms = ["dense", *common.attention_forms(), *["torch"] * common.has_torch()]
    published, small = dict(latents=[16, 64], batch=[1]), dict(latents=[16], batch=[1])
    a = common.arguments(__doc__, argv, forms, common.PUBLISHED | published, common.SMALL | small)
    c, T, N, K, rows = a.config, a.seq_len, a.config.num_heads, a.config.num_kv_heads, []
    for B, L in ((B, L) for B in a.batch for L in a.latents):
        tokens_BT, segment_BT = common.text(a, B)
        aug = common.augmentation(c, L, "reference", placement="overlay")
        traces = aug.lay_out(
            tokens_BT, segment_BT, common.positions(a, tokens_BT, segment_BT), a.ahead
        )
        text, key = dense.of_text(segment_BT), jax.random.key(0)

        def heads(i: int, *shape: int, key=key, B=B) -> jax.Array:
            drawn = jax.random.normal(jax.random.fold_in(key, i), (B, *shape, c.head_dim))
            return drawn.astype(a.dtype)

        S = traces.position.shape[2]
        operands = heads(0, a.traces, S, N), heads(1, a.traces, S, K), heads(2, a.traces, S, K)
        prefix, dout = (heads(3, T, K), heads(4, T, K)), heads(5, a.traces, S, N)

        compiled, runs = {}, {}
        for form in a.forms:
            if form == "torch":
                passes = torch_passes(c, traces, text, operands, prefix, dout)
                runs |= {(form, name): run for name, run in passes.items()}
                continue
            if form == "dense":
                of_traces = dense.of_traces(traces.position, *traces.bounds[:2])
                whole, total = dense.both(text, of_traces), T + a.traces * S
                everything = heads(6, total, N), heads(7, total, K), heads(8, total, K)
                arguments = everything, (dense.visible(whole, whole),), heads(9, total, N)
                function = partial(dense.attend, scale=c.query_scale, softcap=c.attn_softcap)
            else:
                arguments = operands, (prefix, traces.bounds), dout
                partition = aug.decoder.partition
                function = partial(attend, scale=c.query_scale, softcap=c.attn_softcap, form=form)
                function = partial(function, shared_memory=partition.shared_memory)
            for name, one in both_passes(function).items():
                try:
                    compiled[form, name] = one.lower(*arguments).compile()
                except RuntimeError as error:  # a TPU's compiler refuses what does not fit
                    if not common.out_of_memory(error):
                        raise
                    continue
                runs[form, name] = common.calls(partial(compiled[form, name], *arguments))

        seconds = common.measure(runs, a.rounds, a.least)
        for (form, name), found in seconds.items():
            row = {"batch": B, "latents": L, "form": form, "pass": name, **common.spread(found)}
            row["tflops"] = row["vs_dense"] = None
            if row["ms"]:
                flops = common.attention_flops(c, traces.bounds, name == "both")
                row["tflops"] = flops / row["ms"] / 1e9
            if row["ms"] and seconds.get(("dense", name)):
                row["vs_dense"] = common.spread(seconds["dense", name])["ms"] / row["ms"]
            if (form, name) in compiled:
                row |= common.memory(compiled[form, name])
            rows.append(row)
    return common.report("attention", a, rows)


if __name__ == "__main__":
    main()
