"""GGUF files that the `gguf` library wrote, against the same models as Hugging Face folders."""

import dataclasses
import struct
import sys

import gguf
import numpy as np
import pytest
import sentencepiece
from checkpoints import FAMILIES, refused, stored
from gguf import GGMLQuantizationType as Type
from gguf_files import finish, write

import latent_delib as ld
from latent_delib.convert import convert
from latent_delib.nn.sizes import SIZES, differences
from latent_delib.weights import folder, huggingface
from latent_delib.weights import gguf as ours


@pytest.fixture
def sized(monkeypatch):
    """Gives golden models known sizes: GGUF leaves out query scale and Llama 3's scaling."""
    for family in FAMILIES:
        monkeypatch.setitem(
            SIZES, f"golden_{family}", huggingface.architecture(stored(family)[0], "x")
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_hugging_face_folder(hf, tokenizer_path, tmp_path, sized, family):
    # GGUF keeps no rotary base of local layers and no pattern: Gemma 3's are constants.
    config = huggingface.architecture(stored(family)[0], "x")
    fixed = dict(local_rope_base=10_000.0) if "local" in config.layer_pattern else {}
    file = write(tmp_path / "model.gguf", family, tokenizer_path)
    SIZES[f"golden_{family}"] = dataclasses.replace(config, **fixed)
    convert(str(file), str(tmp_path / "gguf"))
    convert(str(hf(family)), str(tmp_path / "hf"))
    found, wanted = folder.read_config(tmp_path / "gguf"), folder.read_config(tmp_path / "hf")
    assert not differences(found, dataclasses.replace(wanted, **fixed))
    one, two = (folder.open_tensors(tmp_path / name, wanted) for name in ("gguf", "hf"))
    for name in two.shapes:
        x, y = one.read(name), two.read(name)
        if family.startswith("gemma") and "norm" in name:  # stored with 1 added
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)
    assert ld.load_decoder(file).fingerprint == folder.fingerprint(tmp_path / "gguf")
    text = "the cat sat on  a mat\n\tand ran"
    tokenizers = [
        sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / n / "tokenizer.model"))
        for n in ("gguf", "hf")
    ]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)


def naive_blocks(kind, data):
    """Blocks of 32 or 256 numbers read as ggml's header describes them, a block at a time."""
    out = []
    if kind == Type.Q8_0:
        for block in data.reshape(-1, 34):
            out.append(block[:2].view(np.float16).astype(np.float32) * block[2:].view(np.int8))
    if kind == Type.Q4_1:
        for block in data.reshape(-1, 20):
            d, m = block[:4].view(np.float16).astype(np.float32)
            out.append(np.concatenate([block[4:] & 15, block[4:] >> 4]) * d + m)
    if kind == Type.Q6_K:
        for block in data.reshape(-1, 210):
            low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
            d = block[208:].view(np.float16).astype(np.float32)
            y = np.zeros(256, np.float32)
            for half in range(2):
                for i in range(32):
                    l0, l1, h = low[64 * half + i], low[64 * half + 32 + i], high[32 * half + i]
                    four = (
                        l0 & 15 | (h & 3) << 4,
                        l1 & 15 | (h >> 2 & 3) << 4,
                        l0 >> 4 | (h >> 4 & 3) << 4,
                        l1 >> 4 | h >> 6 << 4,
                    )
                    for j, q in enumerate(four):
                        at = 128 * half + 32 * j + i
                        y[at] = d[0] * int(scales[at // 16]) * (int(q) - 32)
            out.append(y)
    return np.concatenate(out)


@pytest.mark.parametrize(
    "kind",
    [k for k in Type if k.name[0] in "QBFI" and k.name[:2] not in ("I8", "I1", "I3", "I6", "F6")],
)
def test_block_types(tmp_path, monkeypatch, kind):
    """Every block type, as the library dequantises it whole; ours goes a few blocks at a time."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (6, block * 4)
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (shape[0], shape[1] // block * size), np.uint8)
    if kind in (Type.F32, Type.F16, Type.BF16):
        data = random.standard_normal(shape).astype(np.float32)
        data = (
            data
            if kind == Type.F32
            else data.astype(np.float16)
            if kind == Type.F16
            else gguf.quants.quantize(data, kind)
        )
    else:
        data.reshape(-1, size)[:, 1::2] &= 0x3F  # no scale is infinite or not a number
        data.reshape(-1, size)[:, 0::2] &= 0x3F
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    finish(writer)
    file = ours.GGUF(tmp_path / "x.gguf")
    try:
        expected = gguf.quants.dequantize(data, kind)
    except NotImplementedError:
        with pytest.raises(ours.UserError, match=f"type {kind.name}"):
            file.read("x")
        return
    monkeypatch.setattr(ours, "CHUNK", 5 * block)
    found = file.read("x")
    assert (
        found.shape == shape
        and found.dtype == file.dtype("x")
        and np.isfinite(found.astype(np.float32)).all()
    )
    np.testing.assert_array_equal(
        found.astype(np.float32), expected.reshape(shape).astype(np.float32)
    )
    if kind in (Type.Q8_0, Type.Q4_1, Type.Q6_K):
        np.testing.assert_allclose(found.reshape(-1), naive_blocks(kind, data), rtol=1e-6)


def test_a_quantised_model(hf, tokenizer_path, tmp_path):
    """As files come: matrices in blocks or in half precision, norms in float32."""
    file = write(
        tmp_path / "model.gguf",
        "gemma2",
        tokenizer_path,
        lambda name: Type.Q8_0 if "ffn_down" in name else Type.F16,
    )
    convert(str(file), str(tmp_path / "out"))
    convert(str(hf("gemma2")), str(tmp_path / "hf"))
    found, exact = (
        folder.open_tensors(tmp_path / n, folder.read_config(tmp_path / n)) for n in ("out", "hf")
    )
    assert set(found.dtypes.values()) == {np.dtype(np.float32)}
    for name in exact.shapes:
        x, y = found.read(name), exact.read(name)
        step = np.abs(y).max() / 127 if name == "layers.mlp.down" else 0  # of 8 bits
        np.testing.assert_allclose(x, y, rtol=0, atol=step / 2 + 1e-3 * step + 1e-7, err_msg=name)


@pytest.mark.parametrize("scaling", [(32.0, 1.0, 4.0, 8192.0), (8.0, 1.0, 4.0, 8192.0)])
def test_a_model_of_no_known_size_with_a_known_scaling(tokenizer_path, tmp_path, scaling):
    """For example, Llama 3.2 3B and Llama 3.1 8B."""
    file = write(tmp_path / "model.gguf", "llama", tokenizer_path, scaling=scaling)
    assert ours.open_source(file).architecture.rope_scaling == scaling


def test_gemma_2_without_the_keys_that_came_later(tokenizer_path, tmp_path):
    later = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    changed = {f"gemma2.{key}": None for key in later}
    file = write(tmp_path / "model.gguf", "gemma2", tokenizer_path, changed=changed)
    found = ours.open_source(file).architecture
    assert (found.window, found.attn_softcap, found.final_softcap) == (4096, 50.0, 30.0)


def test_a_file_that_says_it_is_of_no_parts(tokenizer_path, tmp_path):
    file = write(tmp_path / "model.gguf", "gemma2", tokenizer_path, changed={"split.count": 0})
    assert ours.open_source(file).architecture.num_layers > 0


def test_unknown_scaling_is_refused(tokenizer_path, tmp_path):
    """rope_freqs.weight alone does not say the numbers it was made from."""
    file = write(tmp_path / "model.gguf", "llama", tokenizer_path)
    refused(file, tmp_path / "out", "rope_freqs.weight", "known size")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("general.architecture", "bert", ["general.architecture='bert'", "gemma2"]),
        ("gemma2.block_count", 10**9, ["1000000000 layers"]),
        ("gemma2.block_count", "five", ["gemma2.block_count='five'", "int"]),
        ("gemma2.block_count", None, ["gemma2.block_count", "missing"]),
        ("gemma2.attention.head_count", 0, ["head_count=0"]),
        ("gemma2.attention.sliding_window", 0, ["gemma2.attention.sliding_window=0"]),
        (
            "gemma2.attention.layer_norm_rms_epsilon",
            [1.0],
            ["layer_norm_rms_epsilon=[1.0]", "float"],
        ),
        ("gemma2.expert_count", 8, ["expert_count", "mixtures"]),
        ("gemma2.rope.scaling.type", "yarn", ["rope.scaling.type='yarn'"]),
        ("gemma2.rope.scaling.type", "linear", ["rope.scaling.type='linear'", "expected none"]),
        ("gemma2.rope.dimension_count", 6, ["rope.dimension_count=6", "the head dim"]),
        ("split.count", 3, ["is one of 3 files", "--merge"]),
        ("gemma2.feed_forward_length", 7, ["blk.0.ffn_gate.weight is", "expected (7, "]),
        ("tokenizer.ggml.tokens", None, ["tokenizer.ggml.tokens"]),
    ],
)
def test_metadata_that_is_refused(tokenizer_path, tmp_path, key, value, words):
    file = write(tmp_path / "model.gguf", "gemma2", tokenizer_path, changed={key: value})
    refused(file, tmp_path / "out", *words)


@pytest.mark.parametrize("kind", ["linear", None])  # older files have no type
@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_linear_rotary_scaling(tokenizer_path, tmp_path, kind, key):
    changed = {"gemma3.rope.scaling.type": kind, "gemma3.rope.scaling.factor": None}
    changed |= {f"gemma3.{key}": 3.0}
    file = write(tmp_path / "model.gguf", "gemma3", tokenizer_path, changed=changed)
    assert ours.architecture(ours.GGUF(file)).rope_scaling == (3.0, 1.0, 4.0, 0.0)


def test_linear_rotary_scaling_without_a_factor_is_refused(tokenizer_path, tmp_path):
    changed = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": None}
    file = write(tmp_path / "model.gguf", "gemma3", tokenizer_path, changed=changed)
    refused(file, tmp_path / "out", "gemma3.rope.scaling.factor=None", "expected float")


@pytest.mark.parametrize(
    "family, key, bases",
    [
        ("gemma2", "gemma2.rope.freq_base", (2e5, 2e5)),
        ("gemma3", "gemma3.rope.freq_base_swa", (5e3, 2e5)),
    ],
)
def test_rotary_bases_of_global_and_local_layers(tokenizer_path, tmp_path, family, key, bases):
    """All layers of Gemma 2 have one base; Gemma 3's local layers have one of their own."""
    file = write(tmp_path / "model.gguf", family, tokenizer_path, changed={key: 2e5})
    config = ours.architecture(ours.GGUF(file))
    assert (config.rope_base, config.local_rope_base) == bases


def header(*parts):
    """Bytes of numbers and strings; a string is led by its length."""
    out = b""
    for part in parts:
        if isinstance(part, bytes):
            out += part
        elif isinstance(part, str):
            out += struct.pack("<Q", len(part)) + part.encode()
        else:
            code, number = part
            out += struct.pack("<" + code, number)
    return out


def tensor(name="x", dims=(32,), kind=0, offset=0):
    return header(name, ("I", len(dims)), *(("Q", d) for d in dims), ("I", kind), ("Q", offset))


def start(tensors=0, keys=0, version=3):
    return header(b"GGUF", ("I", version), ("Q", tensors), ("Q", keys))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", ["empty"]),
        (b"GG", ["not a GGUF file"]),
        (b"PK\3\4" + bytes(40), ["not a GGUF file", "name the folder"]),
        (start(version=1), ["version 1"]),
        (start(version=3 << 24), ["version"]),  # big-endian
        (start()[:-4], ["truncated"]),
        (start(tensors=2**63), ["truncated"]),
        (start(keys=2**40), ["truncated"]),
        (start(keys=1) + header(("Q", 2**62)) + bytes(64), ["truncated"]),
        (
            start(keys=1) + header("key", ("I", 9), ("I", 5), ("Q", 2**60)) + bytes(64),
            [f"a list has {2**60:,} entries"],
        ),
        (
            start(keys=1) + header("key", ("I", 9), ("I", 8), ("Q", 2**60)) + bytes(64),
            [f"a list has {2**60:,} entries"],
        ),
        (
            start(keys=1) + header("key", ("I", 9), ("I", 8), ("Q", 2**20)) + bytes(64),
            ["truncated"],
        ),
        (start(keys=1) + header("key", ("I", 9), ("I", 9), ("Q", 1)) + bytes(64), ["damaged"]),
        (start(keys=1) + header("key", ("I", 77)) + bytes(64), ["damaged", "77"]),
        (start(keys=1) + header(("Q", 1), b"\xff") + bytes(64), ["utf-8"]),
        (start(tensors=1) + tensor(dims=()) + bytes(64), ["0 dimensions"]),
        (start(tensors=1) + tensor(dims=(1,) * 5) + bytes(64), ["5 dimensions"]),
        (
            start(tensors=1) + tensor(dims=(2**32, 2**32)) + bytes(64),
            ["ends at byte", "the file has"],
        ),
        (
            start(tensors=1) + tensor("a\nb\0c", offset=2**63) + bytes(256),
            ["a\\nb\\x00c", "ends at byte"],
        ),
        (start(tensors=1) + tensor(kind=999) + bytes(256), ["999"]),
        (
            start(tensors=1) + tensor(dims=(33,), kind=8) + bytes(256),
            ["rows of 33", "multiple of 32"],
        ),
        (start(keys=1) + header("general.alignment", ("I", 4), ("I", 0)) + bytes(64), ["damaged"]),
        (start(keys=1) + header("general.alignment", ("I", 8), "x") + bytes(64), ["damaged"]),
    ],
)
def test_damaged_files(tmp_path, data, words):
    (tmp_path / "x.gguf").write_bytes(data)
    refused(tmp_path / "x.gguf", tmp_path / "out", "x.gguf", *words)


def test_without_the_library(tmp_path, monkeypatch):
    """Its absence is told as such, not as damage of the file."""
    (tmp_path / "x.gguf").write_bytes(start(tensors=1) + tensor(kind=999) + bytes(256))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ld.UserError, match="^gguf is not installed: .*setup.sh gguf"):
        ours.open_source(tmp_path / "x.gguf")


def test_the_real_one(smollm2_gguf):
    """SmolLM2's file: the size it says it is, in one name table."""
    source = ours.open_source(smollm2_gguf)
    assert not differences(source.architecture, SIZES["smollm2_135m"])
    assert len(source.shapes) == 272
