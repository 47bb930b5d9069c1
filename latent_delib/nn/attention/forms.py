"""The forms of the attention primitive, and one gradient for all of them.

"reference" is `primitive.attend`. Every other form is a module with a forward pass, which also
returns each query's log-sum-exp, and a backward pass, which starts from the log-sum-exp:

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
from latent_delib.nn.attention.blocks import LEAST
from latent_delib.nn.attention.primitive import Bounds, Keys, Options


class Kernel(NamedTuple):
    """Describes a form that is made for one kind of chip.

    module: has the functions `forward` and `backward`.
    platform: the platform of the chips, as jax names it in `platform_dependent`.
    head_dims, dtypes: those that it supports.
    is_ours: it is interpreted on other platforms, and has no gradient of a prefix.
    """

    module: Any
    platform: str
    head_dims: tuple[int, ...]
    dtypes: tuple[Any, ...]
    is_ours: bool


FLOATS = (jnp.bfloat16, jnp.float32)
# "auto" takes the first kernel of a chip's platform that is proven on the chip.
KERNELS = {
    "pallas_gpu": Kernel(gpu, "cuda", gpu.HEAD_DIMS, FLOATS, is_ours=True),
    "pallas_tpu": Kernel(tpu, "tpu", tpu.HEAD_DIMS, FLOATS, is_ours=True),
    "tokamax_gpu": Kernel(
        tokamax_gpu, "cuda", tokamax_gpu.HEAD_DIMS, tokamax_gpu.DTYPES, is_ours=False
    ),
}
FORMS = ("reference", "xla", *KERNELS)
SAVED = ("attention_out", "attention_lse")  # what a backward pass needs besides q, k and v


def unsupported(name: str, head_dim: int, dtype: Any) -> str | None:
    """Returns why a kernel does not support a call, such as "head dim 80", or None."""
    kernel = KERNELS[name]
    if jnp.dtype(dtype) not in kernel.dtypes:
        return f"dtype {jnp.dtype(dtype)}"
    if head_dim not in kernel.head_dims:
        return f"head dim {head_dim}"
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
    shared_memory: int = LEAST,
) -> jax.Array:
    """Computes `primitive.attend` in one of FORMS.

    The result is differentiable in every input. Where a kernel does not support the head dim, the
    dtype, or the gradient of a prefix, "xla" replaces it, with a warning. "xla" also replaces a
    kernel, without a warning, where a group has keys before its queries: in methods that write
    keys, or that write latents one at a time.

    Args:
      q_BMSNH, k_BMUKH, v_BMUKH, prefix, bounds, scale, softcap: as for `primitive.attend`.
      form: one of FORMS.
      shared_memory: bytes of shared memory into which blocks of the GPU kernels must fit.
    """
    if form == "reference":
        return primitive.attend(
            q_BMSNH, k_BMUKH, v_BMUKH, prefix, bounds, scale=scale, softcap=softcap
        )
    if form in KERNELS:
        why = unsupported(form, q_BMSNH.shape[-1], q_BMSNH.dtype)
        if why:
            form = fall_back(form, why)
        elif q_BMSNH.shape[2] != k_BMUKH.shape[2]:
            form = "xla"  # a kernel needs one query per key of a group
    options = Options(scale, softcap, shared_memory)
    return _attend(q_BMSNH, (k_BMUKH, v_BMUKH), prefix, bounds, form, options)


def fall_back(form: str, why: str) -> str:
    """Warns that a form does not support something, and returns the form that does: "xla"."""
    warnings.warn(f"attention: {form} does not support {why}; using xla instead", stacklevel=3)
    return "xla"


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BMSNH, own, prefix, bounds, form, options):
    return _run(form, "forward", (q_BMSNH, own, prefix, bounds), options)[0]


def _run(form: str, name: str, operands: tuple, options: Options) -> Any:
    """Runs a pass of a form. Our kernels are interpreted on platforms other than their own."""
    if form == "xla":
        return getattr(xla, name)(*operands, options)
    kernel = KERNELS[form]
    function = getattr(kernel.module, name)
    if not kernel.is_ours:
        return function(*operands, options)
    interpreted = options._replace(interpret=True)
    by_platform = {
        kernel.platform: partial(function, options=options),
        "default": partial(function, options=interpreted),
    }
    return jax.lax.platform_dependent(*operands, **by_platform)


def _save(q, own, prefix, bounds, form, options):
    """Runs the forward pass of a call that is differentiated.

    The last saved value tells whether the prefix is differentiated too: () if so, else None. A bool
    would become an array; the structure of a tree stays static.
    """
    into_prefix = any(x.perturbed for x in jax.tree.leaves(prefix))
    operands = jax.tree.map(lambda x: x.value, (q, own, prefix, bounds))
    out, lse = _run(form, "forward", operands, options)
    out = checkpoint_name(out, SAVED[0])
    lse = checkpoint_name(lse, SAVED[1])
    return out, (operands, out, lse, () if into_prefix else None)


def _backward(form, options, saved, dout):
    operands, out, lse, into_prefix = saved
    if isinstance(dout, jax.custom_derivatives.SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    if into_prefix is not None:
        options = options._replace(into_prefix=True)
        if form in KERNELS and KERNELS[form].is_ours:
            form = fall_back(form, "the gradient of a prefix")
    dq, d_own, d_prefix = _run(form, "backward", (*operands, out, lse, dout), options)
    return dq, d_own, d_prefix, None


_attend.defvjp(_save, _backward, symbolic_zeros=True)
