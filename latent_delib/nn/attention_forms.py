"""The forms of the attention primitive: one rule that names them, one gradient for all of them.

"reference" is `attention.attend`. The others are a forward pass that also gives every row's log-sum-exp, and a
backward pass that starts from it: "xla" for every platform, "pallas_gpu" and "pallas_tpu" as kernels. A kernel named on
another platform than its own is interpreted: right, and very slow.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from latent_delib.nn import attention, attention_gpu, attention_tpu, attention_xla
from latent_delib.nn.attention import Bounds, Keys

KERNELS = {"pallas_gpu": (attention_gpu, "cuda"), "pallas_tpu": (attention_tpu, "tpu")}
FORMS = ("reference", "xla", *KERNELS)
BY_PLATFORM = {"gpu": "pallas_gpu", "cuda": "pallas_gpu", "tpu": "pallas_tpu"}
FEW = 16  # queries per row, so few that their scores fit anywhere: decoding is a product with the cache in any form
SAVED = ("attention_out", "attention_lse")  # what a backward pass needs of attention beside q, k and v


def choose(form: str, platform: str) -> str:
    """The form that "auto" means on a platform; any other stays what it is."""
    return BY_PLATFORM.get(platform, "xla") if form == "auto" else form


def attend(
    q_BMSNH: jax.Array,
    k_BMSKH: jax.Array,
    v_BMSKH: jax.Array,
    prefix: Keys | None,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float,
    form: str,
    few: int = FEW,
) -> jax.Array:
    """`attention.attend` in one of FORMS; gradients reach every input that is differentiated.

    A kernel that does not serve these shapes, or not the gradient of a prefix, warns and gives way to "xla". Calls of
    at most `few` queries per row are computed by the reference.
    """
    if form == "reference" or q_BMSNH.shape[1] * q_BMSNH.shape[2] <= few:
        return attention.attend(q_BMSNH, k_BMSKH, v_BMSKH, prefix, bounds, scale=scale, softcap=softcap)
    if form in KERNELS:
        length = None if prefix is None else prefix[0].shape[1]
        if why := KERNELS[form][0].unsupported(q_BMSNH.shape, k_BMSKH.shape[3], length, q_BMSNH.dtype):
            form = _give_way(form, why)
    return _attend(q_BMSNH, (k_BMSKH, v_BMSKH), prefix, bounds, scale, softcap, form)


def _give_way(form: str, why: str) -> str:
    warnings.warn(f"attention: {form} does not serve {why}; xla does instead", stacklevel=3)
    return "xla"


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q_BMSNH, own, prefix, bounds, scale, softcap, form):
    return _forward(q_BMSNH, own, prefix, bounds, scale, softcap, form)[0]


def _forward(q, own, prefix, bounds, scale, softcap, form):
    """The output, and every row's log-sum-exp."""
    if form == "xla":
        return attention_xla.forward(q, own, prefix, bounds, scale, softcap)
    return _kernel(form, "forward", scale, softcap, q, *own, prefix, bounds)


def _kernel(form: str, name: str, scale: float, softcap: float, *operands: Any) -> Any:
    """A kernel's pass, compiled for its platform and interpreted on any other."""
    module, platform = KERNELS[form]
    function = partial(getattr(module, name), scale=scale, softcap=softcap)
    forms = {platform: partial(function, interpret=False), "default": partial(function, interpret=True)}
    return jax.lax.platform_dependent(*operands, **forms)


def _save(q, own, prefix, bounds, scale, softcap, form):
    """Whether the prefix is differentiated is seen here, and kept in the structure of what is saved."""
    into_prefix = any(x.perturbed for x in jax.tree.leaves(prefix))
    q, own, prefix, bounds = jax.tree.map(lambda x: x.value, (q, own, prefix, bounds))
    out, lse = _forward(q, own, prefix, bounds, scale, softcap, form)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED))
    return out, (q, own, prefix, bounds, out, lse, () if into_prefix else None)


def _backward(scale, softcap, form, saved, dout):
    q, own, prefix, bounds, out, lse, into_prefix = saved
    if isinstance(dout, jax.custom_derivatives.SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    if form in KERNELS and into_prefix is not None:
        form = _give_way(form, "the gradient of a prefix")
    if form == "xla":
        into_prefix = into_prefix is not None
        return *attention_xla.backward(q, own, prefix, bounds, out, lse, dout, scale, softcap, into_prefix), None
    dq, dk, dv = _kernel(form, "backward", scale, softcap, q, *own, prefix, bounds, out, lse, dout)
    return dq, (dk, dv), None, None


_attend.defvjp(_save, _backward, symbolic_zeros=True)
