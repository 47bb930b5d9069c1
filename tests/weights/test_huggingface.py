"""Hugging Face folders: published configs, there and back, and what is refused."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from checkpoints import FAMILIES, refused, stored
from safetensors.numpy import save_file

from latent_delib.convert import convert
from latent_delib.errors import UserError
from latent_delib.nn.sizes import SIZES, TransformerConfig, differences
from latent_delib.weights import folder, huggingface, locate, tokenizer_files

# What the makers' own config.json files say, of the keys that matter; what they leave out is left
# out here.
GEMMA = dict(
    model_type="gemma",
    head_dim=256,
    hidden_act="gelu",
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    vocab_size=256000,
)
GEMMA2 = dict(
    model_type="gemma2",
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
)
GEMMA3 = dict(
    model_type="gemma3_text",
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    num_attention_heads=4,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    vocab_size=262144,
)
LLAMA = dict(
    model_type="llama",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    attention_bias=False,
    tie_word_embeddings=True,
)
QWEN3 = dict(
    model_type="qwen3",
    attention_bias=False,
    head_dim=128,
    hidden_act="silu",
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    use_sliding_window=False,
    tie_word_embeddings=True,
    vocab_size=151936,
)


QWEN25 = dict(
    model_type="qwen2",
    attention_dropout=0.0,
    hidden_act="silu",
    max_window_layers=28,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=131072,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)


def numbers(layers, width, ffn, heads=None, kv_heads=None, **others):
    fields = dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=ffn)
    fields |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads) if heads else {}
    return fields | others


# Of the published folder; its tensors have no prefix, and masks are stored among them.
GPT2 = dict(
    model_type="gpt2",
    activation_function="gelu_new",
    attn_pdrop=0.1,
    bos_token_id=50256,
    eos_token_id=50256,
    layer_norm_epsilon=1e-05,
    n_ctx=1024,
    n_embd=768,
    n_head=12,
    n_layer=12,
    n_positions=1024,
    vocab_size=50257,
)
PUBLISHED = {
    "gpt2": GPT2,
    "gemma_2b": GEMMA | numbers(18, 2048, 16384, 8, 1),
    "gemma_7b": GEMMA | numbers(28, 3072, 24576, 16, 16),
    "gemma2_2b": GEMMA2 | numbers(26, 2304, 9216, 8, 4, head_dim=256, query_pre_attn_scalar=256),
    "gemma2_9b": GEMMA2 | numbers(42, 3584, 14336, 16, 8, head_dim=256, query_pre_attn_scalar=256),
    "gemma2_27b": GEMMA2
    | numbers(46, 4608, 36864, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    "gemma3_270m": GEMMA3
    | numbers(
        18,
        640,
        2048,
        layer_types=([*["sliding_attention"] * 5, "full_attention"] * 3),
        _sliding_window_pattern=6,
    ),
    "gemma3_1b": GEMMA3 | numbers(26, 1152, 6912, sliding_window_pattern=6),
    "gemma3_4b": dict(
        model_type="gemma3",
        text_config=dict(
            hidden_size=2560,
            intermediate_size=10240,
            model_type="gemma3_text",
            num_hidden_layers=34,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            sliding_window=1024,
        ),
    ),
    "gemma3_27b": dict(  # scalings in the form of transformers 5, the local base in that of 4
        model_type="gemma3",
        text_config=GEMMA3
        | numbers(
            62, 5376, 21504, 32, 16, head_dim=128, query_pre_attn_scalar=168, sliding_window=1024
        )
        | dict(
            rope_parameters={
                "full_attention": {"factor": 8.0, "rope_type": "linear"},
                "sliding_attention": {"rope_type": "default"},
            }
        ),
    ),
    "smollm2_135m": LLAMA
    | numbers(30, 576, 1536, 9, 3, rope_theta=100000, vocab_size=49152, rope_scaling=None),
    "smollm2_360m": LLAMA | numbers(32, 960, 2560, 15, 5, rope_theta=100000, vocab_size=49152),
    "smollm2_1.7b": LLAMA | numbers(24, 2048, 8192, 32, 32, rope_theta=130000, vocab_size=49152),
    "llama3.2_1b": LLAMA
    | numbers(
        16, 2048, 8192, 32, 8, head_dim=64, mlp_bias=False, rope_theta=500000.0, vocab_size=128256
    )
    | dict(
        rope_scaling=dict(
            factor=32.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        )
    ),
    "llama3_8b": LLAMA
    | numbers(32, 4096, 14336, 32, 8, rope_theta=500000.0, vocab_size=128256, rope_scaling=None)
    | dict(tie_word_embeddings=False),
    "qwen2.5_0.5b": QWEN25
    | numbers(24, 896, 4864, 14, 2, max_window_layers=24, sliding_window=32768),
    "qwen2.5_1.5b": QWEN25 | numbers(28, 1536, 8960, 12, 2),
    "qwen2.5_7b": QWEN25
    | numbers(28, 3584, 18944, 28, 4, tie_word_embeddings=False, vocab_size=152064),
    "qwen3_0.6b": QWEN3 | dict(hidden_size=1024, intermediate_size=3072),
    "qwen3_1.7b": QWEN3 | dict(hidden_size=2048, intermediate_size=6144),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_are_the_published_ones(size):
    found = huggingface.architecture(PUBLISHED[size], "config.json")
    assert differences(found, SIZES[size]) == []
    # and no two alike
    assert [name for name, other in SIZES.items() if not differences(found, other)] == [size]
    leaves = folder.by_name(folder.shapes(SIZES[size]))
    assert ("head" in leaves) == (not PUBLISHED[size].get("tie_word_embeddings", True))
    assert ("layers.attn.q_bias" in leaves) == size.startswith(("qwen2.5", "gpt2"))


def test_every_size_has_a_published_config():
    ours = {f"gemma2_{size}" for size in ("160k", "58k", "23k", "3m", "30m", "test")}
    assert set(SIZES) - set(PUBLISHED) == ours


def test_gpt2_has_124_million_parameters():
    leaves = folder.by_name(folder.shapes(SIZES["gpt2"]))
    assert sum(leaf.size for leaf in leaves.values()) == 124_439_808


@pytest.mark.parametrize("size", SIZES)
def test_config_json_there_and_back(size):
    fields = json.loads(
        json.dumps(huggingface.config_json(SIZES[size], "bfloat16", {"bos_token_id": 2}))
    )
    assert huggingface.architecture(fields, "x") == SIZES[size]


def test_a_pattern_may_be_spelled_in_several_ways():
    """config.json lists the kind of each layer, so the spelling of the pattern is lost."""
    gemma2 = TransformerConfig(4, 32, 4, 2, 48, 97, window=5, post_norms=True)
    for pattern in (("local", "global"), ("local", "global") * 2, ("local",) * 5 + ("global",)):
        one = dataclasses.replace(gemma2, layer_pattern=pattern)
        back = huggingface.architecture(huggingface.config_json(one, "float32", {}), "x")
        assert back.is_local == one.is_local
    unused = dict(activation="silu", scale_embeddings=False, norm_offset=0.0, post_norms=False)
    llama = dataclasses.replace(gemma2, **unused)
    assert huggingface.architecture(huggingface.config_json(llama, "float32", {}), "x").window == 0


def test_what_transformers_cannot_compute_is_not_exported():
    odd = TransformerConfig(
        2, 32, 4, 2, 48, 97, layer_pattern=("local", "global"), window=5, post_norms=True
    )
    huggingface.config_json(odd, "float32", {})
    for changes, words in (
        (dict(local_rope_base=5.0), "local_rope_base"),
        (dict(qk_norm=True, scale_embeddings=False), "no family"),
        (dict(post_norms=False), "layer_pattern"),
        (dict(activation="silu"), "activation"),
        (dict(norm_offset=0.0), "norm_offset"),
    ):
        with pytest.raises(UserError, match=words):
            huggingface.config_json(dataclasses.replace(odd, **changes), "float32", {})


@pytest.mark.parametrize("family", FAMILIES)
def test_import_export_import_is_the_identity(hf, tmp_path, family):
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        tensors = {name: x.astype(dtype) for name, x in stored(family)[1].items()}
        theirs, root = hf(family, tensors), tmp_path / f"{np.dtype(dtype).name}"
        root.mkdir()
        convert(str(theirs), str(root / "ours"))
        convert(str(root / "ours"), str(root / "back"), to="huggingface")
        convert(str(root / "back"), str(root / "again"))
        assert folder.fingerprint(root / "ours") == folder.fingerprint(root / "again")
        back = huggingface.open_source(root / "back")
        assert set(back.shapes) == set(tensors)
        for name, x in tensors.items():
            found, exact = back.read(name), np.float32 if dtype == np.float16 else dtype
            assert found.dtype == exact
            np.testing.assert_array_equal(found, x.astype(exact), err_msg=name)
        assert sorted(p.name for p in root.iterdir()) == ["again", "back", "ours"]


def test_qwen_with_local_layers_there_and_back():
    fields = QWEN3 | numbers(4, 64, 96)
    fields |= dict(use_sliding_window=True, sliding_window=7)
    fields["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = huggingface.architecture(fields, "x")
    assert config.layer_pattern == ("local", "global") and config.window == 7
    back = huggingface.config_json(config, "float32", {})
    assert back["use_sliding_window"] and back["layer_types"] == fields["layer_types"]
    assert huggingface.architecture(back, "x") == config


def test_keys_that_transformers_ignores_or_prefers():
    """Llama's class has no local layers, and rope_scaling replaces rope_parameters."""
    fields = LLAMA | numbers(2, 64, 96, 4, 2, vocab_size=97)
    plain = huggingface.architecture(fields, "x")
    windowed = fields | dict(sliding_window=5, layer_types=["sliding_attention"] * 2)
    assert huggingface.architecture(windowed, "x") == plain
    both = dict(
        rope_parameters={"rope_type": "default"}, rope_scaling={"rope_type": "linear", "factor": 4}
    )
    assert huggingface.architecture(fields | both, "x").rope_scaling[0] == 4


def test_nothing_is_rounded_unless_asked_for(hf, tmp_path):
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in stored("llama")[1].items()}
    one = "model.layers.1.mlp.up_proj.weight"
    tensors[one] = tensors[one].astype(np.float32) + np.float32(1e-6)
    theirs = hf("llama", tensors)
    convert(str(theirs), str(tmp_path / "exact"))
    file = folder.open_tensors(tmp_path / "exact", folder.read_config(tmp_path / "exact"))
    assert {n for n, dtype in file.dtypes.items() if dtype == np.float32} == {"layers.mlp.up"}
    np.testing.assert_array_equal(file.read("layers.mlp.up")[1], tensors[one].T)
    convert(str(theirs), str(tmp_path / "rounded"), dtype="bfloat16")
    file = folder.open_tensors(tmp_path / "rounded", folder.read_config(tmp_path / "rounded"))
    assert set(file.dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
    convert(str(tmp_path / "exact"), str(tmp_path / "rounded later"), dtype="bfloat16")
    assert folder.fingerprint(tmp_path / "rounded") == folder.fingerprint(
        tmp_path / "rounded later"
    )


def in_shards(where, tensors, index):
    """Replaces model.safetensors by two files and an index of `index`, name -> file."""
    (where / "model.safetensors").unlink()
    for file in ("a.safetensors", "b.safetensors"):
        save_file(
            {n: x for n, x in tensors.items() if (hash_of(n) == 0) == (file[0] == "a")},
            where / file,
        )
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def hash_of(name):
    return sum(name.encode()) % 2


def test_many_files_with_an_index(hf, tmp_path):
    tensors = stored("gemma2")[1]
    whole, sharded = hf("gemma2"), hf("gemma2")
    index = {name: f"{'ab'[hash_of(name)]}.safetensors" for name in tensors}
    in_shards(sharded, tensors, index)
    convert(str(whole), str(tmp_path / "one"))
    convert(str(sharded), str(tmp_path / "two"))
    assert folder.fingerprint(tmp_path / "one") == folder.fingerprint(tmp_path / "two")
    name = next(iter(index))
    for changed, words in (
        (index | {name: "c.safetensors"}, ["c.safetensors", "does not exist"]),
        (index | {name: ".."}, ["/..", "safetensors"]),
        (index | {name: 3}, ["weight_map"]),
        ({n: f for n, f in index.items() if n != name}, ["disagree", f"{name} in {index[name]}"]),
        (index | {"extra": "a.safetensors"}, ["disagree", "extra in a.safetensors"]),
        (["a.safetensors"], ["weight_map"]),
    ):
        (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))
        refused(sharded, tmp_path / "out", *words)
    shutil.copy(whole / "model.safetensors", sharded)  # the index is now of older files
    convert(str(sharded), str(tmp_path / "saved_over"))
    assert folder.fingerprint(tmp_path / "saved_over") == folder.fingerprint(tmp_path / "one")


def test_gemma_3_with_vision(hf, tmp_path):
    """The text part of a multimodal checkpoint, under both names it has had."""
    config, tensors = stored("gemma3")
    convert(str(hf("gemma3")), str(tmp_path / "plain"))
    vision = {
        "vision_tower.x.weight": np.ones((2, 3), np.float32),
        "multi_modal_projector.y": np.ones(3, np.float32),
    }
    for i, prefix in enumerate(("language_model.model.", "model.language_model.")):
        renamed = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
        where = hf("gemma3", renamed | vision)
        (where / "config.json").write_text(
            json.dumps({"model_type": "gemma3", "text_config": config})
        )
        convert(str(where), str(tmp_path / f"text{i}"))
        assert folder.fingerprint(tmp_path / f"text{i}") == folder.fingerprint(tmp_path / "plain")
    twice = {"language_model.model.norm.weight": tensors["model.norm.weight"]}
    words = ["language_model.model.norm.weight", "model.norm.weight are two names of one tensor"]
    refused(hf("gemma3", tensors | twice), tmp_path / "out", *words)


def test_a_copy_of_the_token_table(hf, tmp_path):
    tensors = stored("llama")[1]
    table = tensors["model.embed_tokens.weight"]
    convert(str(hf("llama")), str(tmp_path / "plain"))
    convert(str(hf("llama", tensors | {"lm_head.weight": table.copy()})), str(tmp_path / "copy"))
    assert folder.fingerprint(tmp_path / "plain") == folder.fingerprint(tmp_path / "copy")
    untied = hf("llama", tensors | {"lm_head.weight": table + np.float16(1)})
    refused(untied, tmp_path / "out", "lm_head.weight differs", "tie_word_embeddings=True")


def test_gpt2_as_it_was_published(hf, tmp_path):
    """Without the prefix of its names, with masks in types that hold no weights."""
    tensors = stored("gpt2")[1]
    convert(str(hf("gpt2")), str(tmp_path / "plain"))
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    masks = {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8)}
    masks |= {"h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    convert(str(hf("gpt2", bare | masks)), str(tmp_path / "bare"))
    prefixed = {f"transformer.{name}": x for name, x in masks.items()}
    table = {"lm_head.weight": tensors["transformer.wte.weight"].copy()}
    convert(str(hf("gpt2", tensors | prefixed | table)), str(tmp_path / "old"))
    wanted = folder.fingerprint(tmp_path / "plain")
    assert folder.fingerprint(tmp_path / "bare") == wanted == folder.fingerprint(tmp_path / "old")


def test_every_wrong_tensor_is_listed_by_both_names(hf, tmp_path):
    tensors = stored("gemma3")[1]
    del tensors["model.layers.3.self_attn.q_norm.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 2), np.float16)
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((3, 2), np.float16)
    refused(
        hf("gemma3", tensors),
        tmp_path / "out",
        "missing model.layers.3.self_attn.q_norm.weight (8,) (layers.attn.q_norm.scale of layer 3)",
        "missing model.norm.weight (24,) (final_norm.scale)",
        "model.layers.0.mlp.up_proj.weight is (3, 2), expected",
        "(layers.mlp.up of layer 0)",
        "unknown model.layers.9.mlp.up_proj.weight (3, 2)",
    )


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("llama", dict(model_type="mamba"), ["model_type='mamba'", "gemma2"]),
        ("llama", dict(model_type=["llama"]), ["model_type=['llama']"]),
        ("llama", dict(tie_word_embeddings=False), ["missing lm_head.weight (320, 36) (head)"]),
        ("llama", dict(tie_word_embeddings="no"), ["tie_word_embeddings='no'"]),
        (
            "qwen2",
            dict(model_type="llama", head_dim=8),
            ["unknown model.layers.0.self_attn.q_proj.bias (32,)"],
        ),
        ("llama", dict(attention_bias=True), ["attention_bias=True"]),
        ("llama", dict(hidden_act="gelu"), ["hidden_act='gelu'", "silu"]),
        ("gemma2", dict(hidden_activation="relu"), ["hidden_act='relu'"]),
        ("gemma2", dict(hidden_activation="gelu"), ["hidden_act='gelu'", "gelu_pytorch_tanh"]),
        (
            "gemma2",
            dict(rope_parameters={"rope_type": "linear", "factor": 4.0}),
            ["rotary scaling of sliding_attention"],
        ),
        (
            "gemma3",
            dict(
                rope_parameters={
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 4.0},
                }
            ),
            ["rotary scaling of sliding_attention"],
        ),
        (
            "llama",
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            ["yarn", "llama3"],
        ),
        (
            "llama",
            dict(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
            ["low_freq_factor=None", "float"],
        ),
        ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), ["partial_rotary_factor"]),
        ("llama", dict(rope_parameters=3), ["rope_parameters=3"]),
        ("gpt2", dict(activation_function="gelu"), ["activation_function='gelu'", "gelu_new"]),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), ["inverse_layer_idx=True", "False"]),
        ("gpt2", dict(n_embd="24"), ["n_embd='24'"]),
        ("gpt2", dict(n_positions=0), ["n_positions=0: expected at least 1"]),
        ("gpt2", dict(n_layer=None), ["n_layer is missing"]),
        ("gpt2", dict(n_head=5), ["n_embd=24 is not divisible by n_head=5"]),
        (
            "gpt2",
            dict(n_positions=128),
            ["transformer.wpe.weight is (64, 24), expected (128, 24) (positions)"],
        ),
        ("llama", dict(rope_parameters={}, rope_scaling="linear"), ["rope_scaling='linear'"]),
        ("llama", dict(rope_parameters={"rope_theta": "big"}), ["rope_theta='big'"]),
        ("llama", dict(num_hidden_layers=10**9), ["1000000000 layers", "29 tensors"]),
        ("llama", dict(num_hidden_layers="3"), ["num_hidden_layers='3'"]),
        ("llama", dict(hidden_size=True), ["hidden_size=True"]),
        ("llama", dict(hidden_size=None), ["hidden_size is missing"]),
        (
            "llama",
            dict(hidden_size=10**18),
            ["config.json: hidden_size=1000000000000000000, expected a number below"],
        ),
        (
            "llama",
            dict(num_hidden_layers=-1),
            ["config.json: num_hidden_layers=-1: expected at least 1"],
        ),
        (
            "llama",
            dict(num_attention_heads=0),
            ["config.json: num_attention_heads=0: expected at least 1"],
        ),
        ("llama", dict(rms_norm_eps=0), ["config.json: rms_norm_eps=0.0: expected more than 0"]),
        (
            "llama",
            dict(num_key_value_heads=2),
            ["config.json: num_attention_heads=9 is not divisible by num_key_value_heads=2"],
        ),
        ("llama", dict(rms_norm_eps="small"), ["rms_norm_eps='small'"]),
        ("gemma3", dict(layer_types=["full_attention"]), ["layer_types", "7"]),
        ("gemma3", dict(layer_types=[[]] * 7), ["layer_types"]),
        (
            "gemma3",
            dict(sliding_window=None, layer_types=["full_attention"] * 6 + ["x"]),
            ["layer_types"],
        ),
        ("gemma3", dict(use_bidirectional_attention=True), ["use_bidirectional_attention=True"]),
        ("llama", dict(vocab_size=300), ["(300, 36)", "(320, 36)"]),
    ],
)
def test_configs_that_are_refused(hf, tmp_path, family, changes, words):
    refused(hf(family, **changes), tmp_path / "out", *words)


def test_files_that_are_refused(hf, tmp_path):
    where = hf("llama")
    out = tmp_path / "out"
    data = (where / "model.safetensors").read_bytes()
    for damaged in (data[:-1], data[:100], b"", b"\xff" * 8 + data[8:], data[:8] + b"[" + data[9:]):
        (where / "model.safetensors").write_bytes(damaged)
        refused(where, out, where / "model.safetensors", "not a whole safetensors file")
    save_file({"x": np.zeros(3, np.int64)}, where / "model.safetensors")
    refused(where, out, "x is of type I64, expected F32, F16, BF16")
    (where / "model.safetensors").unlink()
    refused(where, out, "neither model.safetensors nor", "pickled")
    (where / "config.json").write_text("[" * 100_000)
    refused(where, out, "config.json", "not JSON")
    refused(tmp_path / "nothing", out, "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, "without a known decoder", "or hf:OWNER/NAME")
    for far in ("gs://bucket/x", "https://huggingface.co/x"):
        refused(far, out, f"{far!r}: expected a local path; download it")
    with pytest.raises(UserError, match="gs://bucket/x: expected a local folder"):
        convert(str(where), "gs://bucket/x")


def test_a_checkpoint_is_inside_a_workdir(tmp_path):
    where = tmp_path / "run" / "checkpoints" / "4"
    where.mkdir(parents=True)
    refused(
        where,
        tmp_path / "out",
        f"{where}: is inside the workdir {tmp_path / 'run'}; name that",
    )


def test_the_packaged_decoder_is_a_source(tmp_path):
    convert("packaged", str(tmp_path / "out"))
    theirs, ours = (
        folder.open_tensors(f, folder.read_config(f)) for f in (locate.PACKAGED, tmp_path / "out")
    )
    assert theirs.shapes == ours.shapes
    refused(locate.PACKAGED / "coprocessor", tmp_path / "again", "exported coprocessor already")


def test_arguments_that_are_refused(hf, tmp_path):
    where, out = hf("gemma2"), tmp_path / "out"
    refused(where, out, "--size='gemma2_2c'", "gemma2_2b", size="gemma2_2c")
    refused(where, out, "--dtype='int8'", "bfloat16", dtype="int8")
    refused(where, out, "--to='onnx'", "huggingface", to="onnx")
    refused(where, out, "unlike --size", "embed_dim=24, expected 2304", size="gemma2_2b")
    refused(where, out, "no decoder folder of ours", to="huggingface")
    refused(where, out, "tokenizer nowhere.model", "does not exist", tokenizer="nowhere.model")
    (where / "tokenizer.model").unlink()
    refused(where, out, "has no tokenizer", "--tokenizer")
    out.mkdir()
    (out / "mine").write_text("kept")
    for source in (str(where), "hf:"):  # before the Hub is asked
        with pytest.raises(UserError, match="not empty"):
            convert(source, str(out))
    assert (out / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "tokenizer.model"),
        ({"eos_token": {"content": "<|im_end|>"}}, "tokenizer.json"),
        ({"bos_token": "<|begin|>"}, "tokenizer.json"),
        ({"added_tokens_decoder": {"320": {"content": "<|im_end|>"}}}, "tokenizer.json"),
        ({"added_tokens_decoder": {"320": {"content": "<image>"}}}, "tokenizer.model"),
        ({"added_tokens": [{"id": 320, "content": "<|im_end|>"}]}, "tokenizer.json"),
        ({"added_tokens": [{"id": 320, "content": "<image>"}]}, "tokenizer.model"),
        ({"added_tokens_decoder": {"1": {"content": "<s>"}}}, "tokenizer.model"),
    ],
)
def test_tokens_that_a_model_was_given_later(hf, changes, name):
    """Of two tokenizers the one is used that has the tokens which the files beside it use."""
    where = hf("llama")
    listed = {"added_tokens": changes.get("added_tokens", [])}  # as `transformers` 5 writes them
    (where / "tokenizer.json").write_text(json.dumps(listed))
    assert tokenizer_files.tokenizer_path(where).name == "tokenizer.model"
    about = tokenizer_files.sentencepiece_config(where / "tokenizer.model") | changes
    about["chat_template"] = "{{ bos_token }}<s>{{ messages }}<|im_end|>"
    (where / "tokenizer_config.json").write_text(json.dumps(about))
    assert tokenizer_files.tokenizer_path(where).name == name


def test_a_tokenizer_that_was_not_downloaded(hf):
    """Git LFS leaves a line of text in its place."""
    where = hf("llama")
    (where / "tokenizer_config.json").write_text("{}")
    (where / "tokenizer.json").write_text("{}")
    (where / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model"):
        tokenizer_files.tokenizer_path(where)


def test_a_tokenizer_larger_than_the_token_table(hf, tmp_path):
    config, tensors = stored("llama")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300]
    refused(
        hf("llama", tensors, vocab_size=300),
        tmp_path / "out",
        "tokenizer has 320 pieces",
        "300 rows",
    )
