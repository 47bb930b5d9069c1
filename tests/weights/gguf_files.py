"""GGUF files of the golden models, written by the `gguf` library as llama.cpp's converter does."""

import dataclasses

import gguf
import numpy as np
import sentencepiece
from checkpoints import stored
from gguf import GGMLQuantizationType as Type

from latent_delib.nn import rotary
from latent_delib.weights import huggingface


def hyper_parameters(writer, config):
    """The keys that llama.cpp's converter writes."""
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if config.layer_norm:
        writer.add_context_length(config.learned_positions)
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_base)
    if config.window:
        writer.add_sliding_window(config.window)
    if config.attn_softcap:
        writer.add_attn_logit_softcapping(config.attn_softcap)
    if config.final_softcap:
        writer.add_final_logit_softcapping(config.final_softcap)
    if config.rope_scaling and not config.rope_scaling[3]:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling[0])


def vocabulary(writer, path):
    """The keys of a SentencePiece vocabulary."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
    ids = range(model.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types([next((kind for is_, kind in kinds if is_(i)), 1) for i in ids])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_pad_token_id(model.pad_id())
    writer.add_unk_token_id(model.unk_id())


def interleaved(w, heads):
    """Rows of q or k as llama.cpp's converter lays them for the Llama family."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write(path, family, tokenizer_path, quantise=None, changed=None, scaling=None):
    """A golden model as llama.cpp's converter writes it.

    quantise: maps a name to a type. changed: key -> another value, or None for a key that is left
    out. scaling: another scaling of rotary positions.
    """
    config, tensors = stored(family)
    architecture = huggingface.architecture(config, "x")
    if scaling:
        architecture = dataclasses.replace(architecture, rope_base=5e5, rope_scaling=scaling)
    writer = gguf.GGUFWriter(path, family)
    hyper_parameters(writer, architecture)
    vocabulary(writer, tokenizer_path)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, family.upper()), architecture.num_layers
    )
    for name, w in tensors.items():
        w = w.astype(np.float32)
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            w = interleaved(
                w, architecture.num_heads if "q_proj" in name else architecture.num_kv_heads
            )
        if family.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        if ".c_" in name:  # Conv1D's are transposed
            w = w.T
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if family == "gpt2" and theirs == "token_embd.weight":  # the converter writes it twice
            writer.add_tensor("output.weight", w)
        kind = quantise(theirs) if quantise else Type.F32
        if kind == Type.F32 or w.ndim == 1:
            writer.add_tensor(theirs, w)
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(w, kind), raw_dtype=kind)
    if architecture.rope_scaling and architecture.rope_scaling[3]:
        H, base = architecture.head_dim, architecture.rope_base
        divisors = rotary.frequencies(H, base) / rotary.frequencies(
            H, base, architecture.rope_scaling
        )
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for key, value in (changed or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    finish(writer)
    return path


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
