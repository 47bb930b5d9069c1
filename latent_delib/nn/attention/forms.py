"""The forms of the attention primitive, and one gradient for all of them.

"reference" is `primitive.attend`. Every other form has a forward pass, which also returns each
query's log-sum-exp, and a backward pass, which starts from the log-sum-exp:

  xla: runs on every platform.
  pallas_gpu, pallas_tpu: our kernels. On other platforms they are interpreted: correct, very slow.
  tokamax_gpu: the kernels of a library, which refuse other platforms.
"""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from latent_delib.nn.attention import gpu, primitive, tokamax_gpu, tpu, xla
from latent_delib.nn.attention.cards import LEAST
from latent_delib.nn.attention.primitive import Bounds, Keys
from latent_delib.nn.products import einsum

# Our kernels: the module, and the platform.
KERNELS = {"pallas_gpu": (gpu, "cuda"), "pallas_tpu": (tpu, "tpu")}
FLOATS = (jnp.bfloat16, jnp.float32)
# The head dims and dtypes that the kernels serve.
SERVED = {
    "pallas_gpu": (gpu.HEAD_DIMS, FLOATS),
    "pallas_tpu": (tpu.HEAD_DIMS, FLOATS),
    "tokamax_gpu": (tokamax_gpu.HEAD_DIMS, tokamax_gpu.DTYPES),
}
FORMS = ("reference", "xla", *SERVED)
FEW = 16  # queries per row; scores of so few fit anywhere, and no form decodes faster
SAVED = ("attention_out", "attention_lse")  # what a backward pass needs beside q, k and v


class Call(NamedTuple):
    """Holds the static arguments of a form other than the reference."""

    form: str
    scale: float
    softcap: float
    shared_memory: int


def unsupported(
    kernel: str,
    q_shape: tuple[int, ...],
    prefix_length: int | None,
    dtype: Any,
) -> str | None:
    """Returns why a kernel cannot serve a call, such as "head dim 80", or None.

    prefix_length: T, or None without a prefix.
    """
    H = q_shape[-1]
    head_dims, dtypes = SERVED[kernel]
    if jnp.dtype(dtype) not in dtypes:
        return f"dtype {jnp.dtype(dtype)}"
    if H not in head_dims:
        return f"head dim {H}"
    if 0 in q_shape or prefix_length == 0:
        return "an empty axis"
    return None


def attend(
    q_BMSNH: jax.Array,
    k_BMUKH: jax.Array,
    v_BMUKH: jax.Array,
    prefix: Keys | None,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float,
    form: str,
    few: int = FEW,
    shared_memory: int = LEAST,
) -> jax.Array:
    """Computes `primitive.attend` in one of FORMS.

    Gradients reach every input that is differentiated. Where a kernel does not serve these shapes,
    or the gradient of a prefix, "xla" computes instead, with a warning.

    Args:
      q_BMSNH, k_BMUKH, v_BMUKH, prefix, bounds, scale, softcap: as for `primitive.attend`.
      form: one of FORMS.
      few: the reference computes calls of at most this many queries per row.
      shared_memory: bytes of shared memory into which blocks of the GPU kernels must fit.
    """
    if form == "reference" or q_BMSNH.shape[1] * q_BMSNH.shape[2] <= few:
        return primitive.attend(
            q_BMSNH, k_BMUKH, v_BMUKH, prefix, bounds, scale=scale, softcap=softcap
        )
    if form in SERVED:
        length = None if prefix is None else prefix[0].shape[1]
        why = unsupported(form, q_BMSNH.shape, length, q_BMSNH.dtype)
        if why:
            form = fall_back(form, why)
    S, U = q_BMSNH.shape[2], k_BMUKH.shape[2]
    if form in SERVED and U > 2 * S:
        form = "xla"  # needs no padding; a kernel would do more than twice the work
    call = Call(form, scale, softcap, shared_memory)
    if form == "xla":
        return _attend(q_BMSNH, (k_BMUKH, v_BMUKH), prefix, bounds, call)
    # A kernel needs one query per key of a group: queries are padded, and the padding's outputs
    # are cut off.
    before = [(0, 0), (0, 0), (U - S, 0)]
    q_BMUNH = jnp.pad(q_BMSNH, [*before, (0, 0), (0, 0)])
    # Padding sees the prefix as the first query does, so that no block is visited for it alone.
    bounds = Bounds(
        jnp.pad(bounds.prefix_start, before, mode="edge"),
        jnp.pad(bounds.prefix_stop, before, mode="edge"),
        jnp.pad(bounds.own_start, before),
    )
    out_BMUNH = _attend(q_BMUNH, (k_BMUKH, v_BMUKH), prefix, bounds, call)
    return out_BMUNH[:, :, -S:]


def fall_back(form: str, why: str) -> str:
    """Warns that a form does not serve something, and returns the form that does: "xla"."""
    warnings.warn(f"attention: {form} does not serve {why}; using xla instead", stacklevel=3)
    return "xla"


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BMSNH, own, prefix, bounds, call):
    return _forward(q_BMSNH, own, prefix, bounds, call)[0]


def _forward(q, own, prefix, bounds, call):
    if call.form == "xla":
        return xla.forward(q, own, prefix, bounds, call.scale, call.softcap)
    if call.form == "tokamax_gpu":
        return tokamax_gpu.forward(q, own, prefix, bounds, call.scale, call.softcap)
    return _kernel(call, "forward", q, *own, prefix, bounds)


def _kernel(call: Call, name: str, *operands: Any) -> Any:
    """Runs a kernel's pass, compiled for its platform and interpreted on any other."""
    module, platform = KERNELS[call.form]
    function = partial(getattr(module, name), scale=call.scale, softcap=call.softcap)
    if call.form == "pallas_gpu":
        function = partial(function, shared_memory=call.shared_memory)
    forms = {
        platform: partial(function, interpret=False),
        "default": partial(function, interpret=True),
    }
    return jax.lax.platform_dependent(*operands, **forms)


def _save(q, own, prefix, bounds, call):
    """Runs the forward pass of a call that is differentiated.

    The last saved value is () where the prefix is differentiated too, else None: static structure.
    """
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
        form = fall_back(form, "the gradient of a prefix")
    if form == "tokamax_gpu":
        operands = q, own, prefix, bounds, out, lse, dout
        dq, down, dprefix = tokamax_gpu.backward(*operands, call.scale, call.softcap)
        return dq, down, dprefix if wanted else None, None
    # The gradient of a score is its weight * (the gradient of the weight - delta).
    delta = einsum("...H,...H->...", out.astype(jnp.float32), dout.astype(jnp.float32))
    if form == "xla":
        operands = q, own, prefix, bounds, lse, delta, dout
        return *xla.backward(*operands, call.scale, call.softcap, wanted), None
    dq, dk, dv = _kernel(call, "backward", q, *own, prefix, bounds, lse, delta, dout)
    return dq, (dk, dv), None, None


_attend.defvjp(_save, _backward, symbolic_zeros=True)
