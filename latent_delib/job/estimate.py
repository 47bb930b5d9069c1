"""Estimates what a step needs of a device without compiling it: memory, traffic and time.

docs/scaling.md derives the formulas, and compares them with compiled programs.
"""

import jax
import jax.numpy as jnp

from latent_delib import mesh as mesh_lib
from latent_delib.delib import cost, flops
from latent_delib.delib.loss import tokens_at_a_time
from latent_delib.delib.methods import METHODS
from latent_delib.job import parameters
from latent_delib.job.experiment import Experiment
from latent_delib.machine.chips import Chip
from latent_delib.nn.layers import INPUT_AXES
from latent_delib.nn.sizes import TransformerConfig

# A step reaches half of the peak: an assumption, not measured on any chip.
PEAK_SHARE = 0.5
# A collective uses half of the links: rings leave some unused, and small slices do not wrap around.
LINK_SHARE = 0.5


def step_seconds(computed: float, received: float, trainable: float, chip: Chip) -> float:
    """Returns the seconds of a step.

    Computation and traffic count as if they overlapped, so only the longer of the two counts.
    Sums of gradients do not overlap in compiled programs, which adds up to 8 %.

    Args:
      computed: FLOPs of a device per step, including repeated ones.
      received: bytes that a device receives per step.
      trainable: bytes of master weights on a device.
      chip: a chip whose figures are all known.
    """
    compute = computed / (PEAK_SHARE * chip.peak)
    links = received / (LINK_SHARE * chip.links)
    # Reads gradients, master weights and both moments; writes the last three.
    update = 7 * trainable / chip.bandwidth
    return max(compute, links) + update


def device_flops(exp: Experiment) -> dict[str, float]:
    """Returns the FLOPs of a device per step: useful ones, and recomputed ones."""
    c = exp.config
    rows = c.train.batch_size
    length = c.data.seq_len
    useful, recomputed = cost.step_flops(
        exp.aug, rows, length, c.method.num_traces, c.method.num_ahead
    )
    for name, reader in exp.aug.readers.items():
        outputs = name == "decoder" and exp.aug.needs_outputs
        text = flops.text(reader.config, rows * length, length, outputs)
        recomputed += (mesh_lib.shards(exp.mesh, "traces") - 1) * text
    return {"useful": useful / exp.mesh.size, "recomputed": recomputed / exp.mesh.size}


def received(exp: Experiment) -> float:
    """Returns the bytes that a device receives per step: weights, and the sums of gradients.

    Weights are gathered for each use in each part of a batch, the token tables once per step. A
    coprocessor counts as one forward and one backward use. A coprocessor that reads the text by
    itself, or writes latents one by one, receives more than this. So does a job that trains token
    tables: for each part of a batch it gathers them, and sums their gradients once per use.
    """
    architecture = exp.aug.decoder.config
    method = METHODS[exp.aug.method]
    tensor = mesh_lib.shards(exp.mesh, "heads")
    split = mesh_lib.shards(exp.mesh, "embed", mesh_lib.WEIGHTS)
    copies = exp.mesh.size // (split * tensor)
    itemsize = jnp.dtype(exp.dtype).itemsize / tensor

    decoder_uses = coprocessor_uses = 2
    if exp.aug.writes_latents:
        decoder_uses += 1 + method.trains_decoder  # the text, and then the traces
    if not (exp.aug.writes_latents and method.has_matrices):
        coprocessor_uses = 0
    uses = decoder_uses * _matrices(architecture)
    if not exp.aug.needs_outputs:
        uses -= flops.per_token_beyond_cache(architecture) // 2
    uses += coprocessor_uses * _matrices(exp.aug.models.coprocessor.config)
    tables = (1 + architecture.untied_head) * architecture.vocab_size * architecture.embed_dim
    if method.has_assistant:
        assistant = exp.aug.models.coprocessor.config
        uses += _matrices(assistant) - flops.per_token_beyond_cache(assistant) // 2
        tables += assistant.vocab_size * assistant.embed_dim
    parts = exp.config.train.accumulation
    gathered = (split - 1) / split * (uses * parts + tables)
    scattered = (split - 1) / split * trained(exp) * parts
    summed = 2 * (copies - 1) / copies * trained(exp) / split * parts
    return itemsize * (gathered + scattered + summed)


def trained(exp: Experiment) -> int:
    """Returns the number of trained weights in the matrices of layers; adapters do not count."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters.trainable_on_mesh(exp))
    return sum(leaf.size for path, leaf in leaves if path[-1].key in INPUT_AXES)


def _matrices(c: TransformerConfig) -> int:
    """Returns the number of weights in the matrices of all layers: two FLOPs each per token."""
    return flops.per_token(c) // 2


def activations(exp: Experiment) -> float:
    """Returns the least memory that a backward pass needs on a device, bytes.

    It holds the values that `remat` keeps of each layer for the tokens of one part of a batch. It
    also holds one copy of the logits that exist at a time, and of the teacher's logits. A compiler
    that is short of memory comes close to this, and takes more where memory is free.
    """
    c = exp.config
    shards = mesh_lib.shards(exp.mesh, "batch")
    sequences = c.train.batch_size // c.train.accumulation
    rows = sequences / shards
    traces = rows * c.method.num_traces / mesh_lib.shards(exp.mesh, "traces")
    method = METHODS[exp.aug.method]
    read = 0.0
    written = 0.0
    predicted = rows * c.data.seq_len
    if exp.aug.writes_latents:
        read = traces * cost.decoded_tokens(exp.aug, c.method.num_ahead)
        predicted = traces * c.method.num_ahead
    if method.trains_decoder:
        read += rows * c.data.seq_len
    if exp.aug.writes_latents and method.has_matrices:
        written = traces * c.method.num_latents
    kept = read * _kept(exp, exp.aug.decoder.config)
    kept += written * _kept(exp, exp.aug.models.coprocessor.config)
    at_a_time = rows * tokens_at_a_time(c.compute.loss_chunk, sequences, shards)
    vocabulary = exp.aug.decoder.config.vocab_size / mesh_lib.shards(exp.mesh, "heads")
    if exp.aug.distill:
        vocabulary *= 2
    return kept + min(at_a_time, predicted) * vocabulary * jnp.dtype(jnp.float32).itemsize


def _kept(exp: Experiment, c: TransformerConfig) -> float:
    """Returns the bytes that all layers keep for one token under `remat`."""
    split = mesh_lib.shards(exp.mesh, "heads")
    heads = c.num_heads * c.head_dim / split
    keys_and_values = 2 * c.num_kv_heads * c.head_dim / split
    kept = float(c.embed_dim)  # the input
    if exp.aug.decoder.remat != "full":
        kept += heads  # the result of attention
    if exp.aug.decoder.remat in ("none", "dots"):
        features = (1 if c.plain_mlp else 2) * c.ffn_dim / split
        kept += heads + keys_and_values + features + 2 * c.embed_dim
    return c.num_layers * kept * jnp.dtype(exp.dtype).itemsize
