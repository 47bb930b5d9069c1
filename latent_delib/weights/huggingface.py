"""Hugging Face folders: config.json, and safetensors in one file or in several with an index."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine import files
from latent_delib.nn.sizes import FAMILIES, TransformerConfig, checked, differences, family
from latent_delib.weights import names, tokenizer_files
from latent_delib.weights.source import Source
from latent_delib.weights.tensors import TensorFile, read_dtype

Fields = Mapping[str, Any]

# Our family -> theirs: model_type and class.
CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
}
WINDOWED = ("qwen2", "qwen3", "gemma2", "gemma3")  # those whose layers may be local
# For each of our families, the defaults of `transformers` for keys that a config.json leaves out.
_COMMON = dict(
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    use_bidirectional_attention=False,
)
_GEMMA = _COMMON | dict(
    hidden_act="gelu_pytorch_tanh", head_dim=256, tie_word_embeddings=True, vocab_size=256_000
)
_GEMMA2 = _GEMMA | dict(
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, sliding_window=4096
)
_GEMMA3_ALONE = dict(
    vocab_size=262_208,
    num_attention_heads=8,
    num_key_value_heads=4,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    sliding_window_pattern=6,
)
_GPT2_FIXED = dict(
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON,
    "qwen3": _COMMON | dict(head_dim=128, rope_theta=1e6),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2
    | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window_pattern=2),
    "gemma3": _GEMMA2 | _GEMMA3_ALONE,
    "gpt2": _GPT2_FIXED
    | dict(
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        n_positions=1024,
        tie_word_embeddings=True,
    ),
}
# Our field -> the key of a config.json that holds the same number.
NUMBERS = {
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
}
SOFTCAPS = {"attn_softcap": "attn_logit_softcapping", "final_softcap": "final_logit_softcapping"}
LOCAL = {"window": "sliding_window", "local_rope_base": "rope_local_base_freq"}  # for local layers
KEYS = NUMBERS | SOFTCAPS | LOCAL
GPT2_NUMBERS = {
    "num_layers": "n_layer",
    "embed_dim": "n_embd",
    "num_heads": "n_head",
    "num_kv_heads": "n_head",
    "ffn_dim": "n_inner",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "learned_positions": "n_positions",
}
# Their kind of layer -> ours.
LAYERS = {"full_attention": "global", "sliding_attention": "local"}
# Their kind of rotary scaling -> the keys that it needs.
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Parts of multimodal checkpoints that a text decoder does not have.
_IGNORED = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
# GPT-2's tensor names begin with these where its body was saved alone, as in published checkpoints.
_GPT2_BODY = ("h.", "wte.", "wpe.", "ln_f.")
_GPT2_MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # older releases
HEAD = "lm_head.weight"


def open_source(where: Path) -> Source:
    """Opens a Hugging Face folder as a source.

    Raises:
      UserError: files are missing, damaged or contradictory; the architecture is none of FAMILIES.
    """
    path = where / "config.json"
    config = architecture(files.read_json(path), str(path))
    places: dict[str, tuple[TensorFile, str]] = {}
    for stored, file in _files(where).items():
        name = _text_name(stored)
        if name in places:
            raise UserError(f"{where}: {stored} and {places[name][1]} are two names of one tensor")
        places[name] = file, stored
    shapes = {name: file.shapes[stored] for name, (file, stored) in places.items()}
    dtypes = {name: read_dtype(file.dtypes[stored]) for name, (file, stored) in places.items()}

    def read_tensor(name: str) -> np.ndarray:
        file, stored = places[name]
        return file.read(stored).astype(dtypes[name], copy=False)

    embedding = names.rows(config)["embedding"].huggingface.partition(" ")[0]
    if not config.untied_head and {HEAD, embedding} <= shapes.keys():  # written twice
        if not np.array_equal(read_tensor(HEAD), read_tensor(embedding)):
            raise UserError(
                f"{where}: {HEAD} differs from {embedding}, "
                "but config.json says tie_word_embeddings=True"
            )
        del shapes[HEAD]
    writer = tokenizer_files.tokenizer_writer(where)
    return Source(str(where), "huggingface", config, shapes, dtypes, read_tensor, writer)


def _is_ignored(name: str) -> bool:
    """Tells whether a tensor is not a parameter of a text decoder."""
    is_buffer = name.endswith("rotary_emb.inv_freq") or _GPT2_MASK.fullmatch(name)
    return bool(is_buffer) or name.startswith(_IGNORED)


def _text_name(name: str) -> str:
    """Returns a tensor's name in a text-only checkpoint."""
    if name.startswith(_GPT2_BODY):
        return f"transformer.{name}"
    for prefix in ("language_model.model.", "model.language_model."):  # Gemma 3's text part
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def _files(where: Path) -> dict[str, TensorFile]:
    """Returns the file of each tensor of a text decoder.

    It is model.safetensors, or else what the index says, as in `transformers`.
    """
    whole = where / "model.safetensors"
    if whole.is_file():
        file = TensorFile(whole, _is_ignored)
        return dict.fromkeys(file.shapes, file)
    index = where / "model.safetensors.index.json"
    if not index.is_file():
        raise UserError(
            f"{where}: has neither {whole.name} nor {index.name} (pickled weights are not read)"
        )
    listed = files.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: weight_map is missing or no map of tensor names to file names")
    opened = {file: TensorFile(where / file, _is_ignored) for file in sorted(set(listed.values()))}
    listed = {name: file for name, file in listed.items() if not _is_ignored(name)}
    there = {(name, file) for file, tensors in opened.items() for name in tensors.shapes}
    differing = sorted(listed.items() ^ there)
    if differing:
        places = ", ".join(f"{name} in {file}" for name, file in differing)
        raise UserError(f"{index}: index and files disagree on {places}")
    return {name: opened[file] for name, file in listed.items()}


def architecture(config: Fields, where: str) -> TransformerConfig:
    """Returns the TransformerConfig that the fields of a config.json at `where` describe.

    Raises:
      UserError: a key is missing, wrong, or of a feature that is not supported.
    """
    multimodal = config.get("model_type") == "gemma3" and "text_config" in config
    text = config
    if multimodal:
        text = checked("text_config", config["text_config"], dict, where)
    model_type = text.get("model_type", "gemma3_text" if multimodal else None)
    families = {theirs: ours for ours, (theirs, _) in CLASSES.items()}
    if not isinstance(model_type, str) or model_type not in families:
        raise UserError(
            f"{where}: model_type={model_type!r}, expected one of {', '.join(families)} or gemma3"
        )
    ours = families[model_type]
    if ours == "gpt2":
        return _gpt2(text, where)
    c = _in_one_form(ours, text, where)
    activations = ("gelu_pytorch_tanh",) if ours.startswith("gemma") else ("silu",)
    if ours == "gemma":  # its files say gelu and mean the tanh form, as `transformers` reads them
        activations += ("gelu",)
    known = {
        "attention_bias": (False,),  # True would give the output projection a bias too
        "mlp_bias": (False,),
        "use_bidirectional_attention": (False,),
        "tie_word_embeddings": (True, False),
        "hidden_act": activations,
    }
    _check_known(c, known, where)
    pattern = _pattern(c, where) if ours in WINDOWED else ("global",)
    if "local" in pattern and _scaling(c["local_rope_scaling"], where):
        raise UserError(f"{where}: rotary scaling of sliding_attention layers is not supported")
    keys = KEYS if "local" in pattern else NUMBERS | SOFTCAPS
    fields = dict(FAMILIES[ours])
    for name, key in keys.items():
        if c.get(key) is not None:
            fields[name] = c[key]
    fields["layer_pattern"] = pattern
    fields["rope_scaling"] = _scaling(c["rope_scaling"], where)
    fields["untied_head"] = not c["tie_word_embeddings"]
    if "query_pre_attn_scalar" in c:
        scalar = checked("query_pre_attn_scalar", c["query_pre_attn_scalar"], float, where)
        fields["query_scale"] = scalar**-0.5 if scalar > 0 else 0.0
    return TransformerConfig.from_dict(fields, where, KEYS)


def _check_known(c: Fields, known: Mapping[str, tuple], where: str) -> None:
    """Raises UserError for the first key whose value is none of the known ones."""
    for key, values in known.items():
        if c[key] not in values:
            expected = " or ".join(map(repr, values))
            raise UserError(f"{where}: {key}={c[key]!r}, only {expected} is supported")


def _gpt2(text: Fields, where: str) -> TransformerConfig:
    """Returns the TransformerConfig of GPT-2's fields, which have names of their own."""
    c = DEFAULTS["gpt2"] | {key: value for key, value in text.items() if value is not None}
    known: dict[str, tuple] = {key: (value,) for key, value in _GPT2_FIXED.items()}
    known["activation_function"] = ("gelu_new", "gelu_pytorch_tanh")
    known["tie_word_embeddings"] = (True, False)
    _check_known(c, known, where)
    c.setdefault("n_inner", 4 * checked("n_embd", c.get("n_embd"), int, where))
    if checked("n_positions", c["n_positions"], int, where) < 1:
        raise UserError(f"{where}: n_positions={c['n_positions']}: expected at least 1")
    numbers = {name: c[key] for name, key in GPT2_NUMBERS.items() if key in c}
    fields = FAMILIES["gpt2"] | numbers
    fields["untied_head"] = not c["tie_word_embeddings"]
    return TransformerConfig.from_dict(fields, where, GPT2_NUMBERS)


def _in_one_form(ours: str, text: Fields, where: str) -> dict[str, Any]:
    """Returns the fields of a text decoder, defaults included, as `transformers` 4 wrote them.

    Release 5 writes rope_parameters, for all layers or for each kind of layer. They become
    rope_theta, rope_scaling and rope_local_base_freq.
    """
    c = dict(DEFAULTS[ours])
    for key, value in text.items():
        if value is not None or key.endswith("softcapping"):
            c[key] = value
    c["hidden_act"] = c.get("hidden_activation", c["hidden_act"])
    c.setdefault("num_key_value_heads", c.get("num_attention_heads"))
    rope = _object(c, "rope_scaling", where) or _object(c, "rope_parameters", where)
    of_global = _object(rope, "full_attention", where) or rope
    of_local = _object(rope, "sliding_attention", where)
    c["rope_scaling"] = of_global
    # Gemma 3 has rotary positions of its own for local layers; elsewhere all layers share them.
    c["local_rope_scaling"] = of_local if ours == "gemma3" else of_global
    c["rope_theta"] = of_global.get("rope_theta", c["rope_theta"])
    local_base = c.get("rope_local_base_freq", c["rope_theta"])
    c["rope_local_base_freq"] = of_local.get("rope_theta", local_base)
    return c


def _object(c: Fields, key: str, where: str) -> Fields:
    """Returns the object that a key holds; an empty one where there is none."""
    return checked(key, c.get(key) or {}, dict, where)


def _pattern(c: Fields, where: str) -> tuple[str, ...]:
    """Returns the shortest pattern that, repeated, gives every layer its kind."""
    if "layer_types" not in c:
        if c.get("use_sliding_window"):
            raise UserError(f"{where}: use_sliding_window=True needs layer_types")
        period = checked("sliding_window_pattern", c.get("sliding_window_pattern", 1), int, where)
        if not 1 <= period <= 1000:
            raise UserError(f"{where}: sliding_window_pattern={period}, expected 1 to 1000")
        return ("local",) * (period - 1) + ("global",)
    kinds = c["layer_types"]
    num_layers = c.get("num_hidden_layers")
    has_one_each = isinstance(kinds, list) and len(kinds) == num_layers
    if not has_one_each or not all(kind in list(LAYERS) for kind in kinds):
        raise UserError(f"{where}: layer_types: expected {num_layers} of {' and '.join(LAYERS)}")
    ours = [LAYERS[kind] for kind in kinds]
    for period in range(1, len(ours)):
        if ours[period:] == ours[:-period]:
            return tuple(ours[:period])
    return tuple(ours)


def _scaling(rope: Fields, where: str) -> tuple[float, ...]:
    """Returns the rotary scaling of TransformerConfig."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    is_known = isinstance(kind, str) and kind in SCALINGS
    if not is_known or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{where}: rotary positions {dict(rope)}, "
            f"expected the type {', '.join(SCALINGS)}, and no partial_rotary_factor"
        )
    values = [checked(key, rope.get(key), float, where) for key in SCALINGS[kind]]
    return (*values, 1.0, 4.0, 0.0) if kind == "linear" else tuple(values)


def config_json(c: TransformerConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of an architecture, in keys that `transformers` 4 and 5 read.

    Args:
      c: the architecture.
      dtype: dtype of the weights, "float32" or "bfloat16".
      token_ids: "bos_token_id", "eos_token_id" (a list), "pad_token_id".

    Raises:
      UserError: the class of the family in `transformers` does not compute this architecture: read
        back, the fields give another.
    """
    ours = family(c)
    model_type, class_name = CLASSES[ours]
    fields = {
        "architectures": [class_name],
        "model_type": model_type,
        "tie_word_embeddings": not c.untied_head,
        "dtype": dtype,
        **token_ids,
    }
    numbers = GPT2_NUMBERS if ours == "gpt2" else NUMBERS
    fields |= {key: getattr(c, name) for name, key in numbers.items()}
    if ours == "gpt2":
        fields["activation_function"] = "gelu_new"
    else:
        fields |= {"hidden_act": "silu", "rope_scaling": _rope_scaling(c)}
    if ours.startswith("gemma"):
        # For Gemma 1, releases 4 and 5 read different ones of these keys.
        fields["hidden_act"] = fields["hidden_activation"] = "gelu_pytorch_tanh"
    if ours in WINDOWED:
        kinds = {True: "sliding_attention", False: "full_attention"}
        fields["layer_types"] = [kinds[local] for local in c.is_local]
        fields["sliding_window"] = c.window or 4096
    if ours.startswith("qwen"):
        fields["use_sliding_window"] = True in c.is_local
    if ours in ("gemma2", "gemma3"):
        scalar = round(c.query_scale**-2, 6)
        # Release 5 wants an integer where the number is whole.
        fields["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
        fields |= {key: getattr(c, name) or None for name, key in SOFTCAPS.items()}
    if ours == "gemma3":
        fields["rope_local_base_freq"] = c.local_rope_base
    back = architecture(fields, "config.json")
    if math.isclose(back.query_scale, c.query_scale, rel_tol=1e-6):  # stored as a power of it
        back = dataclasses.replace(back, query_scale=c.query_scale)
    # These are the same whatever the spelling of the pattern, and unused where no layer is local.
    if back.is_local == c.is_local:
        back = dataclasses.replace(back, layer_pattern=c.layer_pattern)
    if not any(c.is_local):
        back = dataclasses.replace(back, window=c.window, local_rope_base=c.local_rope_base)
    differing = differences(back, c)
    if differing:
        raise UserError(
            f"--to=huggingface: {class_name} does not compute this architecture: "
            f"{'; '.join(differing)}"
        )
    return fields


def _rope_scaling(c: TransformerConfig) -> dict[str, Any] | None:
    if not c.rope_scaling:
        return None
    *factors, context = c.rope_scaling
    kind = "llama3" if context else "linear"
    values = zip(SCALINGS[kind], [*factors, int(context)])  # "linear" takes the first alone
    return {"rope_type": kind, **dict(values)}
