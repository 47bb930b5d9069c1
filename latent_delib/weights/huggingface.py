"""Hugging Face folders: config.json and safetensors in one file, or in many with an index."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latent_delib.errors import UserError
from latent_delib.nn.sizes import TransformerConfig, differences
from latent_delib.weights import folder as folder_lib
from latent_delib.weights import names
from latent_delib.weights.source import Source
from latent_delib.weights.tensors import TensorFile

# model_type -> what a config.json that leaves a key out means by that (the defaults of `transformers`).
_GEMMA = dict(hidden_act="gelu_pytorch_tanh", head_dim=256, tie_word_embeddings=True, vocab_size=256_000)
_GEMMA2 = _GEMMA | dict(query_pre_attn_scalar=256, sliding_window=4096)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": dict(head_dim=128, rope_theta=1e6),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2 | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window_pattern=2),
    "gemma3_text": _GEMMA2
    | dict(
        vocab_size=262_208,
        num_attention_heads=8,
        num_key_value_heads=4,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        sliding_window_pattern=6,
    ),
}
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
# Our field -> the key of a config.json that says it.
KEYS = {
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "layer_pattern": "layer_types",
    "window": "sliding_window",
    "rope_base": "rope_theta",
    "local_rope_base": "rope_local_base_freq",
    "query_scale": "query_pre_attn_scalar",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "norm_eps": "rms_norm_eps",
}
# Our family -> theirs: model_type and class.
CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
# Parts of multimodal checkpoints that a text decoder does not have.
_IGNORED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def open_source(where: Path) -> Source:
    """A Hugging Face folder as a source.

    Raises:
      UserError: files missing, damaged or contradictory; an architecture that is not one of `DEFAULTS`.
    """
    config = architecture(folder_lib.read_json(where / "config.json"), str(where / "config.json"))
    stored = _files(where)
    shapes, dtypes, place = {}, {}, {}
    for name, file in stored.items():
        ours = _text_name(name)
        if ours is not None:
            shapes[ours], place[ours] = file.shapes[name], (file, name)
            dtypes[ours] = np.dtype(np.float32) if file.dtypes[name] == np.float16 else file.dtypes[name]

    def read(name: str) -> np.ndarray:
        file, stored_name = place[name]
        return file.read(stored_name).astype(dtypes[name], copy=False)

    if {
        "lm_head.weight",
        "model.embed_tokens.weight",
    } <= shapes.keys():  # a copy of the token table, which some exporters write
        if not np.array_equal(read("lm_head.weight"), read("model.embed_tokens.weight")):
            raise UserError(f"{where}: lm_head.weight differs from model.embed_tokens.weight, expected tied embeddings")
        del shapes["lm_head.weight"]
    return Source(str(where), "huggingface", config, shapes, dtypes, read, folder_lib.tokenizer_writer(where))


def _text_name(name: str) -> str | None:
    """The name that a tensor has in a text-only checkpoint; None for what a text decoder does not use."""
    if name.startswith(_IGNORED) or name.endswith("rotary_emb.inv_freq"):
        return None
    for prefix in ("language_model.model.", "model.language_model."):  # both have stood for Gemma 3's text part
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def _files(where: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file it lies in, by the index where there is one."""
    index = where / "model.safetensors.index.json"
    if not index.is_file():
        if not (where / "model.safetensors").is_file():
            raise UserError(f"{where}: has neither model.safetensors nor {index.name} (pickled weights are not read)")
        file = TensorFile(where / "model.safetensors")
        return dict.fromkeys(file.shapes, file)
    listed = folder_lib.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index}: weight_map is missing or no map of tensor names to file names")
    for file in set(listed.values()):
        if Path(file).name != file or "\\" in file or file in ("", ".", "..") or "\0" in file:
            raise UserError(f"{index}: names the file {file!r}, expected one of the same folder")
    opened = {file: TensorFile(where / file) for file in sorted(set(listed.values()))}
    if astray := [f"{name} in {file}" for name, file in listed.items() if name not in opened[file].shapes]:
        raise UserError(f"{index}: these tensors are not where it says: {', '.join(astray)}")
    if unlisted := [n for file in opened.values() for n in file.shapes if n not in listed]:
        raise UserError(f"{index}: does not list {', '.join(unlisted)}")
    return {name: opened[file] for name, file in listed.items()}


def architecture(config: Mapping[str, Any], where: str) -> TransformerConfig:
    """TransformerConfig of a config.json; `where` is named when something in it is wrong or not known here."""
    text = config.get("text_config", config) if config.get("model_type") == "gemma3" else config
    if not isinstance(text, dict):
        raise UserError(f"{where}: text_config={text!r}, expected an object")
    model_type = text.get("model_type", "gemma3_text" if text is not config else None)
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise UserError(f"{where}: model_type={model_type!r}, expected one of {', '.join(DEFAULTS)} or gemma3")
    given = {k: v for k, v in text.items() if v is not None or k.endswith("softcapping")}
    c = _COMMON | DEFAULTS[model_type] | given

    def need(key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in c:
            raise UserError(f"{where}: {key} is missing")
        if not isinstance(c[key], kind) or isinstance(c[key], bool):
            raise UserError(f"{where}: {key}={c[key]!r}, expected a number")
        return c[key]

    gemma = model_type.startswith("gemma")
    c["hidden_act"] = c.get("hidden_activation", c["hidden_act"])
    for key, allowed in {
        "tie_word_embeddings": (True,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bidirectional_attention": (False,),
        # Gemma 1's files say gelu and mean its tanh approximation, as `transformers` reads them.
        "hidden_act": ("gelu", "gelu_pytorch_tanh") if gemma else ("silu",),
    }.items():
        if c[key] not in allowed:
            raise UserError(f"{where}: {key}={c[key]!r}, only {' or '.join(map(repr, allowed))} is known here")
    pattern = _pattern(c, need("num_hidden_layers", int), where)
    scalar = need("query_pre_attn_scalar", (int, float)) if "query_pre_attn_scalar" in c else 0
    base, scaling, local_base = _rope(c, where)
    fields = dict(
        num_layers=need(KEYS["num_layers"], int),
        embed_dim=need(KEYS["embed_dim"], int),
        num_heads=need(KEYS["num_heads"], int),
        num_kv_heads=need(KEYS["num_kv_heads"] if KEYS["num_kv_heads"] in c else KEYS["num_heads"], int),
        ffn_dim=need(KEYS["ffn_dim"], int),
        vocab_size=need("vocab_size", int),
        head_dim=need("head_dim", int) if "head_dim" in c else 0,
        activation="gelu" if gemma else "silu",
        layer_pattern=pattern,
        window=need("sliding_window", int) if "local" in pattern else 0,
        rope_base=base,
        rope_scaling=scaling,
        local_rope_base=local_base if "local" in pattern else TransformerConfig.local_rope_base,
        query_scale=float(scalar) ** -0.5 if scalar > 0 else 0.0,
        attn_softcap=c["attn_logit_softcapping"] or 0.0,
        final_softcap=c["final_logit_softcapping"] or 0.0,
        post_norms=model_type in ("gemma2", "gemma3_text"),
        qk_norm=model_type in ("qwen3", "gemma3_text"),
        scale_embeddings=gemma,
        norm_eps=need("rms_norm_eps", (int, float)),
        norm_offset=1.0 if gemma else 0.0,
    )
    try:
        return TransformerConfig.from_dict(fields, where)
    except UserError as error:
        wrong = str(error).removeprefix(f"{where}: ")
        wrong = re.sub(r"\w+(?==)", lambda found: KEYS.get(found[0], found[0]), wrong)
        raise UserError(f"{where}: {wrong}") from None


def _pattern(c: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives every layer its kind."""
    known = {"full_attention": "global", "sliding_attention": "local"}
    if "layer_types" in c:
        kinds = c["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(k in list(known) for k in kinds):
            raise UserError(f"{where}: layer_types: expected {num_layers} of {' and '.join(known)}")
        ours = [known[kind] for kind in kinds]
    elif "sliding_window_pattern" in c:
        period = c["sliding_window_pattern"]
        if not isinstance(period, int) or not 1 <= period <= 1000:
            raise UserError(f"{where}: sliding_window_pattern={period!r}, expected a number of layers")
        ours = ["local"] * (period - 1) + ["global"]
    elif c.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window=True, only with layer_types is it known here")
    else:
        ours = ["global"]
    for period in range(1, len(ours) + 1):
        if all(kind == ours[i % period] for i, kind in enumerate(ours)):
            return tuple(ours[:period])
    raise UserError(f"{where}: layer_types is empty")


def _rope(c: Mapping[str, Any], where: str) -> tuple[float, tuple[float, ...], float]:
    """Rotary base and scaling of global layers, and the base of local ones."""
    rope = c.get("rope_parameters", {})
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters={rope!r}, expected an object")
    if "full_attention" in rope or "sliding_attention" in rope:
        kinds = [rope.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
    else:
        if not isinstance(scaling := c.get("rope_scaling") or {}, dict):
            raise UserError(f"{where}: rope_scaling={scaling!r}, expected an object")
        rope = rope or {"rope_theta": c["rope_theta"]} | scaling
        kinds = [rope, {} if "rope_local_base_freq" in c else rope]
    bases = []
    for kind, default in zip(kinds, (c["rope_theta"], c.get("rope_local_base_freq", c["rope_theta"]))):
        base = kind.get("rope_theta", default) if isinstance(kind, dict) else kind
        if not isinstance(base, int | float) or not base > 0:
            raise UserError(f"{where}: rope_theta={base!r}, expected a positive number")
        bases.append(float(base))
    return bases[0], _scaling(kinds[0], where), bases[1]


def _scaling(rope: Mapping[str, Any], where: str) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in keys or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: rotary positions {dict(rope)}, expected the type to be one of {', '.join(keys)}")
    values = [rope.get(key) for key in keys[kind]]
    if not all(isinstance(value, int | float) for value in values):
        raise UserError(f"{where}: rotary scaling {kind!r} needs the numbers {', '.join(keys[kind])}, found {values}")
    return (float(values[0]), 1.0, 4.0, 0.0) if kind == "linear" else tuple(map(float, values))


def config_json(c: TransformerConfig, dtype: str, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """The config.json of an architecture.

    Raises:
      UserError: `transformers` has no class that computes it.
    """
    family = names.family(c)
    model_type, class_name = CLASSES[family]
    fields: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.embed_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "intermediate_size": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": True,
        "dtype": dtype,
        **token_ids,
    }
    if c.rope_scaling:
        factor, low, high, context = c.rope_scaling
        scaling: dict[str, Any] = {"rope_type": "linear", "factor": factor}
        if context:
            scaling |= {"rope_type": "llama3", "low_freq_factor": low, "high_freq_factor": high}
            scaling["original_max_position_embeddings"] = int(context)
    else:
        scaling = {"rope_type": "default"}
    rope = {"rope_theta": c.rope_base, **scaling}
    if family == "gemma3":
        local = {"rope_type": "default", "rope_theta": c.local_rope_base}
        fields["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    else:
        fields["rope_parameters"] = rope
    # What releases before 5 read instead of rope_parameters.
    fields["rope_theta"] = c.rope_base
    fields["rope_scaling"] = scaling if c.rope_scaling else None
    fields["hidden_act"] = "silu"
    if family.startswith("gemma"):
        fields["hidden_act"] = fields["hidden_activation"] = "gelu_pytorch_tanh"
    if family in ("gemma2", "gemma3"):
        scalar = round(c.query_scale**-2, 6)
        kinds = {True: "sliding_attention", False: "full_attention"}
        fields |= {
            "layer_types": [kinds[local] for local in c.is_local],
            "sliding_window": c.window or 4096,
            "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,  # transformers 5 insists
            "attn_logit_softcapping": c.attn_softcap or None,
            "final_logit_softcapping": c.final_softcap or None,
        }
    if family == "gemma3":
        fields["rope_local_base_freq"] = c.local_rope_base
    back = architecture(fields, "config.json")
    if math.isclose(back.query_scale, c.query_scale, rel_tol=1e-6):  # stored as a power of it
        back = dataclasses.replace(back, query_scale=c.query_scale)
    if differing := differences(back, c):
        raise UserError(f"not to be expressed as {class_name}: {'; '.join(differing)}")
    return fields


def tokenizer_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json that makes `transformers` read a SentencePiece model as it is."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = SentencePieceProcessor(model_file=str(path))
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    ids |= {"unk_token": model.unk_id(), "pad_token": model.pad_id()}
    # The classes differ in whether a text begins with a blank of its own.
    class_name = "LlamaTokenizer" if proto.normalizer_spec.add_dummy_prefix else "GemmaTokenizer"
    pieces = {key: model.id_to_piece(i) for key, i in ids.items() if i >= 0}
    return {"tokenizer_class": class_name, "add_bos_token": True, **pieces}
