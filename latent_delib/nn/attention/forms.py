"""The forms of the attention primitive: one rule that names them, one gradient for all of them.

"reference" is `attention.attend`. The others are a forward pass that also gives every row's log-sum-exp, and a
backward pass that starts from it: "xla" for every platform, "pallas_gpu" and "pallas_tpu" as kernels. A kernel named on
another platform than its own is interpreted: right, and very slow.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from latent_delib.nn.attention import gpu, primitive, tpu, xla
from latent_delib.nn.attention.primitive import Bounds, Keys

KERNELS = {"pallas_gpu": (gpu, "cuda"), "pallas_tpu": (tpu, "tpu")}
FORMS = ("reference", "xla", *KERNELS)
BY_PLATFORM = {"gpu": "pallas_gpu", "cuda": "pallas_gpu", "tpu": "pallas_tpu"}
FEW = 16  # queries per row, so few that their scores fit anywhere: decoding is a product with the cache in any form
SAVED = ("attention_out", "attention_lse")  # what a backward pass needs of attention beside q, k and v


class Call(NamedTuple):
    """What is static in a call of a form other than the reference."""

    form: str
    scale: float
    softcap: float
    shared_memory: int


def choose(form: str, device: Any) -> str:
    """The form that "auto" means on a device; any other stays what it is, but for a kernel that its GPU cannot run."""
    if form == "auto":
        form = BY_PLATFORM.get(device.platform, "xla")
    if form == "pallas_gpu" and not gpu.shared_memory_of(device):
        return _give_way(form, f"{device.device_kind} (it needs NVIDIA's compute capability 8.0)")
    return form


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
    shared_memory: int = gpu.LEAST,
) -> jax.Array:
    """`attention.attend` in one of FORMS; gradients reach every input that is differentiated.

    A kernel that does not serve these shapes, or not the gradient of a prefix, warns and gives way to "xla". Calls of
    at most `few` queries per row are computed by the reference. The GPU's kernels are cut to fit `shared_memory` bytes.
    """
    if form == "reference" or q_BMSNH.shape[1] * q_BMSNH.shape[2] <= few:
        return primitive.attend(q_BMSNH, k_BMSKH, v_BMSKH, prefix, bounds, scale=scale, softcap=softcap)
    if form in KERNELS:
        length = None if prefix is None else prefix[0].shape[1]
        if why := KERNELS[form][0].unsupported(q_BMSNH.shape, k_BMSKH.shape[3], length, q_BMSNH.dtype):
            form = _give_way(form, why)
    return _attend(q_BMSNH, (k_BMSKH, v_BMSKH), prefix, bounds, Call(form, scale, softcap, shared_memory))


def _give_way(form: str, why: str) -> str:
    warnings.warn(f"attention: {form} does not serve {why}; xla does instead", stacklevel=3)
    return "xla"


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BMSNH, own, prefix, bounds, call):
    return _forward(q_BMSNH, own, prefix, bounds, call)[0]


def _forward(q, own, prefix, bounds, call):
    """The output, and every row's log-sum-exp."""
    if call.form == "xla":
        return xla.forward(q, own, prefix, bounds, call.scale, call.softcap)
    return _kernel(call, "forward", q, *own, prefix, bounds)


def _kernel(call: Call, name: str, *operands: Any) -> Any:
    """A kernel's pass, compiled for its platform and interpreted on any other."""
    module, platform = KERNELS[call.form]
    function = partial(getattr(module, name), scale=call.scale, softcap=call.softcap)
    if call.form == "pallas_gpu":
        function = partial(function, shared_memory=call.shared_memory)
    forms = {platform: partial(function, interpret=False), "default": partial(function, interpret=True)}
    return jax.lax.platform_dependent(*operands, **forms)


def _save(q, own, prefix, bounds, call):
    """Whether the prefix is differentiated is seen here, and kept in the structure of what is saved."""
    into_prefix = any(x.perturbed for x in jax.tree.leaves(prefix))
    q, own, prefix, bounds = jax.tree.map(lambda x: x.value, (q, own, prefix, bounds))
    out, lse = _forward(q, own, prefix, bounds, call)
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), SAVED))
    return out, (q, own, prefix, bounds, out, lse, () if into_prefix else None)


def _backward(call, saved, dout):
    q, own, prefix, bounds, out, lse, into_prefix = saved
    if isinstance(dout, jax.custom_derivatives.SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    form, wanted = call.form, into_prefix is not None
    if form in KERNELS and wanted:
        form = _give_way(form, "the gradient of a prefix")
    if form == "xla":
        operands = q, own, prefix, bounds, out, lse, dout
        return *xla.backward(*operands, call.scale, call.softcap, wanted), None
    dq, dk, dv = _kernel(call, "backward", q, *own, prefix, bounds, out, lse, dout)
    return dq, (dk, dv), None, None


_attend.defvjp(_save, _backward, symbolic_zeros=True)
