"""Tokenizers against their own libraries and against llama.cpp, alone and under seqio."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from ml_collections import ConfigDict
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from latent_delib.data import batches
from latent_delib.data import text as reader
from latent_delib.data import tokenizer as tokenizer_module
from latent_delib.data.rows import BadRecords
from latent_delib.data.tokenizer import Tokenizer, files, fingerprint
from latent_delib.errors import UserError
from latent_delib.weights import gguf, gguf_vocabulary
from tests.texts import config_to_prepare

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text())
TEXTS = GOLDEN["texts"]
VOCABULARY = Path(__file__).parents[1] / "golden" / "tokenizer.model"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "lstrip": False},
    "pad_token": None,
}


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    """BPE of pieces and bytes, some of them user-defined; no pad."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TEXTS).split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        user_defined_symbols=["\n", "\t", "\u2581\u2581", "<|im_start|>", "def"],
        control_symbols=["<other>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def library():
    """A byte-level BPE that cuts text into words as SmolLM does."""
    model = tokenizers.Tokenizer(models.BPE())
    words = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    model.pre_tokenizer = pre_tokenizers.Sequence(words)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(special_tokens=CONTROL, initial_alphabet=alphabet, vocab_size=500),
    )
    return model


def write_json(folder, model, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(model if isinstance(model, str) else model.to_str())
    (folder / "tokenizer_config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def json_path(library, tmp_path_factory):
    """Saved with a length, padding and a BOS of its own, which are not wanted here."""
    model = tokenizers.Tokenizer.from_str(library.to_str())
    model.enable_truncation(2)
    model.enable_padding(length=70)
    model.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return write_json(tmp_path_factory.mktemp("json") / "tokenizer", model, CONFIG)


def keys(**values):
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


USER_DEFINED = 4  # a type of pieces


def sentencepiece_keys(path):
    """What a GGUF of a SentencePiece model holds."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    ids = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = keys(
        model="llama",
        # llama.cpp's converter spells the spaces of user-defined pieces as spaces.
        tokens=[
            piece.piece.replace("\u2581", " ") if piece.type == USER_DEFINED else piece.piece
            for piece in model.pieces
        ],
        scores=[piece.score for piece in model.pieces],
        token_type=[piece.type for piece in model.pieces],
        bos_token_id=ids.bos_id(),
        eos_token_id=ids.eos_id(),
        add_space_prefix=model.normalizer_spec.add_dummy_prefix,
    )
    return found | (keys(padding_token_id=ids.pad_id()) if ids.pad_id() >= 0 else {})


@pytest.fixture(scope="module")
def bpe_keys(library):
    """What a GGUF of the byte-level BPE holds."""
    vocabulary = library.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    return keys(
        model="gpt2",
        pre="smollm",
        tokens=tokens,
        token_type=[3 if token in CONTROL else 1 for token in tokens],
        merges=[" ".join(merge) for merge in json.loads(library.to_str())["model"]["merges"]],
        bos_token_id=1,
        eos_token_id=2,
        padding_token_id=2,
    )


def from_gguf(metadata, folder):
    folder.mkdir(exist_ok=True)
    gguf_vocabulary.write(metadata, folder, "a.gguf")
    files = {path.name for path in folder.iterdir()} - {"chat_template.jinja"}
    assert len(files) == (2 if metadata["tokenizer.ggml.model"] == "gpt2" else 1)
    return Tokenizer(next(folder.glob("tokenizer.[jm]*")))


@pytest.fixture(scope="module")
def every(sentencepiece_path, json_path, bpe_keys, tmp_path_factory):
    """Kind of file -> Tokenizer."""
    folder = tmp_path_factory.mktemp("every")
    return {
        "sentencepiece": Tokenizer(sentencepiece_path),
        "json": Tokenizer(json_path),
        "gguf sentencepiece": from_gguf(sentencepiece_keys(sentencepiece_path), folder / "a"),
        "gguf json": from_gguf(bpe_keys, folder / "b"),
    }


KINDS = ["sentencepiece", "json", "gguf sentencepiece", "gguf json"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_as_it_was(every, kind):
    for text in [
        *TEXTS,
        *("".join(random.Random(i).choices("".join(TEXTS), k=60)) for i in range(200)),
    ]:
        assert every[kind].decode(every[kind].encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_text_leaves_no_trace(every, kind):
    tokenizer = every[kind]
    ids = tokenizer.encode("a b")
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == "a b"
    assert (
        tokenizer.decode(np.array([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 99])) == "a b"
    )
    assert not special & {i for text in TEXTS for i in tokenizer.encode(text)}
    with pytest.raises(UserError, match=r"text: character 1 is '\\udcff'"):
        tokenizer.encode("a\udcff")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ids, words",
    [
        ([5, -1], "ids: token -1, expected at least 0"),
        ([2.7], r"ids=\[2.7\]: expected a list of token ids"),
        (b"abc", "ids=b'abc': expected a list of token ids"),
        (3, "ids=3: expected a list of token ids"),
    ],
)
def test_what_is_no_token_is_refused(every, kind, ids, words):
    with pytest.raises(UserError, match=words):
        every[kind].decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_text_gives_alone(every, kind):
    assert every[kind].encode_batch(TEXTS) == list(map(every[kind].encode, TEXTS))
    assert every[kind].encode_batch([]) == []


@pytest.mark.parametrize("kind", [*KINDS, "with a space"])
def test_a_very_long_text_is_divided(every, kind, sentencepiece_path, tmp_path, monkeypatch):
    """It is read back as it was; only tokens at the edges of its parts may differ."""
    if kind == "with a space":
        metadata = sentencepiece_keys(sentencepiece_path) | keys(add_space_prefix=True)
        tokenizer = from_gguf(metadata, tmp_path)
    else:
        tokenizer = every[kind]
    text = "\n".join(TEXTS) * 3 + "word " * 99 + "x" * 300
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "_LONGEST", 100)
    parts = list(tokenizer_module._divided(text))
    assert "".join(parts) == text and max(map(len, parts)) < 100 and min(map(len, parts)) > 0
    short, long = tokenizer.encode_batch(["short", text])
    assert short == tokenizer.encode("short")
    assert tokenizer.decode(long) == text
    assert abs(len(long) - len(whole)) <= 2 * len(parts)


def test_a_text_without_an_edge_is_divided_anywhere(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_LONGEST", 4)
    cases = {
        "": [""],
        "abc": ["abc"],
        "abcdefg": ["abc", "def", "g"],
        "a\nb c d": ["a\n", "b", " c", " d"],
        "   x\n\n": ["  ", " x\n", "\n"],
    }
    for text, expected in cases.items():
        assert list(tokenizer_module._divided(text)) == expected


@pytest.mark.parametrize("text", [None, b"abc", 3])
def test_what_is_no_text_is_refused(every, text):
    with pytest.raises(UserError, match=f"text={text!r}: expected a str"):
        every["json"].encode(text)


def test_json_gives_what_its_library_gives(every, library):
    library.encode_special_tokens = True
    for text in TEXTS:
        assert every["json"].encode(text) == library.encode(text).ids
    assert every["json"].vocab_size == library.get_vocab_size() == 500


def test_gguf_gives_what_it_was_made_from(every, library, sentencepiece_path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    library.encode_special_tokens = True
    for text in TEXTS:
        assert every["gguf sentencepiece"].encode(text) == model.encode(text)
        assert every["gguf json"].encode(text) == library.encode(text).ids


def test_gguf_prefixes_a_space_unless_it_says_no(sentencepiece_path, tmp_path):
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_path.read_bytes())
    model.normalizer_spec.add_dummy_prefix = True
    metadata = sentencepiece_keys(sentencepiece_path)
    del metadata["tokenizer.ggml.add_space_prefix"]
    found = from_gguf(metadata, tmp_path / "a")
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    assert found.encode("cat") != Tokenizer(sentencepiece_path).encode("cat")
    for text in TEXTS:
        assert (
            found.encode(text) == expected.encode(text) and found.decode(found.encode(text)) == text
        )
    plain = Tokenizer(sentencepiece_path)
    for text in (" the cat", "the cat", "\nrain", ""):
        ids = plain.encode(text)  # as in the middle of a text
        for tokenizer in (plain, found):
            assert tokenizer.encode_in_text(text) == ids
            assert tokenizer.decode_in_text(ids) == tokenizer.settled(ids) == text


def test_a_sentencepiece_vocabulary_gives_what_llama_cpp_gives(tmp_path):
    direct, through_gguf = (
        Tokenizer(VOCABULARY),
        from_gguf(sentencepiece_keys(VOCABULARY), tmp_path / "a"),
    )
    for text, expected in zip(TEXTS, GOLDEN["sentencepiece"], strict=True):
        assert direct.encode(text) == through_gguf.encode(text) == expected
    assert vars(direct).keys() == vars(through_gguf).keys()
    for key in ("bos_id", "eos_id", "pad_id", "vocab_size"):
        assert getattr(direct, key) == getattr(through_gguf, key)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    """The metadata of a real GGUF."""
    pytest.importorskip("gguf")
    return gguf.GGUF(smollm2_gguf).metadata


@pytest.mark.parametrize("words", list(GOLDEN["smollm2"]))
def test_smollm2_gives_what_llama_cpp_gives(smollm2, words, tmp_path):
    metadata = dict(smollm2)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    if words != "smollm":
        more = keys(
            tokens=GOLDEN["tokens"], merges=GOLDEN["merges"], token_type=[1] * len(GOLDEN["tokens"])
        )
        metadata |= {key: smollm2[key] + values for key, values in more.items()}
    found = from_gguf(metadata | keys(pre=words), tmp_path / "a")
    for text, expected in zip(TEXTS, GOLDEN["smollm2"][words], strict=True):
        assert found.encode(text) == expected and found.decode(expected) == text
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)
    assert found.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    others = [rows for other, rows in GOLDEN["smollm2"].items() if other != words]
    assert GOLDEN["smollm2"][words] not in others, (
        "these texts do not tell the ways to cut them apart"
    )


@pytest.mark.parametrize(
    ("change", "ids"),  # of BOS, EOS, padding
    [
        ({}, (1, 2, 2)),
        ({"pad_token": "<|endoftext|>"}, (1, 2, 0)),
        ({"pad_token": {"content": "<|im_start|>"}}, (1, 2, 2)),
        ({"bos_token": None}, (0, 2, 2)),
        (
            {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
            (0, 0, 1),
        ),
        ({"bos_token": "<|im_end|>"}, (2, 2, 0)),
    ],
)
def test_special_ids_of_json(library, tmp_path, change, ids):
    found = Tokenizer(write_json(tmp_path, library, CONFIG | change))
    assert (found.bos_id, found.eos_id, found.pad_id) == ids
    assert found.decode(ids) == ""


def test_a_vocabulary_with_one_control_token(library, tmp_path):
    """GPT-2's: it separates documents, so a byte that no text has is the padding."""
    model = json.loads(library.to_str())
    model["added_tokens"] = model["added_tokens"][:1]
    found = Tokenizer(write_json(tmp_path, json.dumps(model), {"model_max_length": 1024}))
    assert (found.bos_id, found.eos_id) == (0, 0)
    assert found.pad_id == library.token_to_id("ÿ")
    for text in [*TEXTS, "ÿ", "naïveÿ\u00ff"]:
        ids = found.encode(text)
        assert found.pad_id not in ids
        assert found.decode([*ids, found.eos_id, found.pad_id, found.pad_id]) == text


def test_json_that_does_not_mark_its_special_tokens(library, tmp_path):
    model = json.loads(library.to_str())
    model["added_tokens"] = [token | {"special": False} for token in model["added_tokens"]]
    found = Tokenizer(write_json(tmp_path, json.dumps(model), CONFIG | {"bos_token": None}))
    assert found.decode([0, 2]) == "" and not {0, 2} & set(found.encode("<|endoftext|><|im_end|>"))
    assert 1 in found.encode("<|im_start|>")


def test_special_ids_of_sentencepiece(sentencepiece_path, tmp_path):
    original = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_path.read_bytes())
    names = [piece.piece for piece in original.pieces]

    def ids(**pieces):
        model = sentencepiece_model_pb2.ModelProto.FromString(original.SerializeToString())
        for name, piece in pieces.items():
            setattr(model.trainer_spec, f"{name}_piece", piece)
        (tmp_path / "x.model").write_bytes(model.SerializeToString())
        found = Tokenizer(tmp_path / "x.model")
        return [names[i] for i in (found.bos_id, found.eos_id, found.pad_id)]

    assert ids() == ["<s>", "</s>", "</s>"]
    assert ids(pad="<other>") == ["<s>", "</s>", "<other>"]
    assert ids(pad="<s>") == ["<s>", "</s>", "</s>"]
    assert ids(bos="</s>") == ["</s>", "</s>", "<s>"]
    for piece in original.pieces:
        piece.type = piece.NORMAL if piece.piece in ("<s>", "<other>") else piece.type
    with pytest.raises(UserError, match="token for BOS"):
        ids()
    with pytest.raises(UserError, match="token for padding"):
        ids(bos="</s>")


def test_files_and_fingerprint(json_path, sentencepiece_path, library, tmp_path):
    assert files(sentencepiece_path) == [sentencepiece_path]
    assert files(json_path) == [json_path, json_path.with_name("tokenizer_config.json")]
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder; name its tokenizer.model"):
        Tokenizer(tmp_path)
    assert (
        fingerprint(str(sentencepiece_path))
        == hashlib.sha256(sentencepiece_path.read_bytes()).hexdigest()
    )
    paths = [
        write_json(tmp_path / str(i), library, CONFIG | c)
        for i, c in enumerate(({}, {}, {"bos_token": None}))
    ]
    first, same, other = map(fingerprint, paths)
    assert first == same != other


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (None, None, r"tokenizer\.json: does not exist"),
        ("{", "{}", r"tokenizer\.json: not a tokenizer\.json \("),
        ("", "{}", r"tokenizer\.json: not a tokenizer\.json \("),
        ("[]", "{}", r"tokenizer\.json: not a tokenizer\.json \("),
        ("{}", "{}", r"tokenizer\.json: not a tokenizer\.json \("),
        ("[" * 100_000, "{}", r"tokenizer\.json: not a tokenizer\.json \("),
        (slice(0, -100), "{}", r"tokenizer\.json: not a tokenizer\.json \("),
        (slice(None), None, r"tokenizer_config\.json: does not exist"),
        (slice(None), "", r"tokenizer_config\.json: not JSON"),
        (slice(None), '{"bos_token": "<|im_start|>"', r"tokenizer_config\.json: not JSON"),
        (slice(None), "[" * 100_000, r"tokenizer_config\.json: not JSON"),
        (slice(None), "[]", r"tokenizer_config\.json: holds list, expected an object"),
        (
            slice(None),
            '{"eos_token": "<eos>"}',
            r"tokenizer_config\.json: eos_token is '<eos>', expected a token of ",
        ),
        (
            slice(None),
            '{"eos_token": 7}',
            r"tokenizer_config\.json: eos_token is 7, expected a token of ",
        ),
        (
            slice(None),
            '{"pad_token": {"text": 1}}',
            r"tokenizer_config\.json: pad_token is \{'text': 1\}, expected",
        ),
        (
            slice(None),
            '{"bos_token": ["<s>"]}',
            r"tokenizer_config\.json: bos_token is \['<s>'\], expected a token",
        ),
        (
            slice(None),
            '{"bos_token": "<|im_start|>"}',
            r"tokenizer_config\.json: names no token for EOS",
        ),
    ],
)
def test_bad_json(library, tmp_path, model, config, message):
    if model is not None:
        (tmp_path / "tokenizer.json").write_text(
            library.to_str()[model] if isinstance(model, slice) else model
        )
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=f"^(tokenizer )?{tmp_path}/{message}") as error:
        Tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_json_without_bos_or_padding(tmp_path):
    model = tokenizers.Tokenizer(models.BPE({"a": 0, "<e>": 1}, []))
    with pytest.raises(UserError, match="token for BOS"):
        Tokenizer(write_json(tmp_path, model, {"eos_token": "<e>"}))
    with pytest.raises(UserError, match="token for padding"):
        Tokenizer(
            write_json(
                tmp_path, model, {"bos_token": "<e>", "eos_token": "<e>", "pad_token": "<e>"}
            )
        )


REMOVED = object()
BAD_BOTH = [
    (dict(model=REMOVED), "model is missing"),
    (dict(model=3), "model is 3, expected one of gpt2, llama"),
    (dict(model="bert"), "model is 'bert'"),
    (dict(tokens=REMOVED), "tokens is missing"),
    (dict(tokens=[]), "0 tokens, .* 500 entries"),
    (dict(tokens=lambda x: [*x[:9], 9, *x[10:]]), ""),
    (dict(tokens=lambda x: [*x[:9], x[4], *x[10:]]), "500 tokens, 499 of them different"),
    (dict(token_type=REMOVED), "token_type is missing"),
    (dict(token_type=lambda x: x[1:]), "499 entries in token_type"),
    (dict(bos_token_id=500), "bos_token_id is 500"),
    (dict(eos_token_id=-1), "eos_token_id is -1"),
    (dict(eos_token_id="2"), "str"),
    (dict(padding_token_id=1 << 40), "padding_token_id is 1099511627776"),
]
BAD_BPE = [
    (dict(pre="other"), "pre is 'other', expected one of default, gpt-2, llama-bpe, qwen2, smollm"),
    (dict(pre=1), "pre is 1"),
    (dict(merges=REMOVED), "merges is missing"),
    (dict(merges=lambda x: [*x, 5]), "int"),
    (dict(merges=["a"]), ""),
    (dict(merges=["a b c"]), ""),
    (dict(merges=["zq q"]), "zq"),
    (dict(merges=["Z Z"]), "ZZ"),
]
BAD_SENTENCEPIECE = [
    (dict(scores=REMOVED), "scores is missing"),
    (dict(scores=lambda x: x[1:]), ""),
    (dict(scores=lambda x: [*x[1:], "x"]), "str"),
    (dict(tokens=lambda x: [*x[:9], "", *x[10:]]), "empty"),
    (dict(token_type=lambda x: [*x[1:], 7]), "7"),
    (dict(token_type=lambda x: [*x[1:], 1.5]), "float"),
    (dict(token_type=lambda x: [1 if t == 2 else t for t in x]), "unk"),
    (dict(token_type=lambda x: [1 if t == 6 and i % 2 else t for i, t in enumerate(x)]), "byte"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [("gpt2", *row) for row in BAD_BOTH + BAD_BPE]
    + [("llama", *row) for row in BAD_BOTH + BAD_SENTENCEPIECE],
)
def test_bad_gguf(bpe_keys, sentencepiece_path, tmp_path, kind, change, message):
    metadata = dict(bpe_keys if kind == "gpt2" else sentencepiece_keys(sentencepiece_path))
    for key, value in keys(**change).items():
        metadata[key] = value(metadata[key]) if callable(value) else value
        if value is REMOVED:
            del metadata[key]
    with pytest.raises(UserError, match=rf"^some/a\.gguf: tokenizer\.ggml.*{message}") as error:
        gguf_vocabulary.write(metadata, tmp_path, "some/a.gguf")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_gguf_without_bos_or_padding(bpe_keys, sentencepiece_path, tmp_path):
    """Qwen's files name no BOS, Llama's no padding."""
    for key in ("bos_token_id", "padding_token_id"):
        metadata = {k: v for k, v in bpe_keys.items() if not k.endswith(key)}
        found = from_gguf(metadata, tmp_path / key)
        assert (found.bos_id, found.eos_id, found.pad_id) == (
            (0, 2, 2) if key == "bos_token_id" else (1, 2, 2)
        )
    metadata = sentencepiece_keys(sentencepiece_path)
    assert "tokenizer.ggml.padding_token_id" not in metadata
    # the unknown token, as some files have it
    found = from_gguf(metadata | keys(padding_token_id=0), tmp_path / "pad")
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)


def test_gguf_special_tokens_of_normal_type(bpe_keys, sentencepiece_path, tmp_path):
    types = [1] * len(bpe_keys["tokenizer.ggml.tokens"])
    found = from_gguf(bpe_keys | keys(token_type=types), tmp_path / "a")
    assert found.decode([1, 2]) == "" and not {1, 2} & set(found.encode("<|im_start|><|im_end|>"))
    metadata = sentencepiece_keys(sentencepiece_path)
    types = [1 if kind == 3 else kind for kind in metadata["tokenizer.ggml.token_type"]]
    found = from_gguf(metadata | keys(token_type=types), tmp_path / "b")
    assert (found.bos_id, found.eos_id, found.pad_id) == (1, 2, 2)
    assert found.decode([1, 2]) == "" and not {1, 2} & set(found.encode("<s></s>"))


def test_gguf_user_defined_tokens_are_cut_out_first(bpe_keys, tmp_path):
    tokens, types = (
        list(bpe_keys["tokenizer.ggml.tokens"]),
        list(bpe_keys["tokenizer.ggml.token_type"]),
    )
    tokens += ["<tool>", "   "]
    found = from_gguf(bpe_keys | keys(tokens=tokens, token_type=[*types, 4, 4]), tmp_path / "a")
    ids = found.encode("a<tool>    b")
    assert ids.count(500) == ids.count(501) == 1 and found.decode(ids) == "a<tool>    b"


def test_json_through_the_reader_and_prepare(every, tmp_path):
    from latent_delib import prepare

    tokenizer = every["json"]
    documents = [text.strip("\r\n") for text in TEXTS]
    documents = [text for text in documents if text]
    (tmp_path / "text").write_bytes("\n\f\n".join(documents).encode())
    source, path = f"files:{tmp_path}/text", str(tokenizer.path)
    expected = [tokenizer.encode(text) for text in documents]
    found = reader.documents(reader.open_source(source), Tokenizer(path), BadRecords(0))
    assert [document.tokens.tolist() for document in found] == expected

    data = {
        "sources": (source,),
        "weights": (1.0,),
        "validation": (source,),
        "seq_len": 16,
        "max_bad_records": 0,
    }
    meta = prepare.prepare(config_to_prepare(data, path), f"{tmp_path}/out")
    assert (meta["bos_id"], meta["pad_id"], meta["vocab_size"]) == (1, 2, 500)
    prepared = ConfigDict(data | {"token_files": f"{tmp_path}/out"})
    found = batches.validation_documents(prepared, tokenizer=tokenizer)
    assert [document.tokens.tolist() for document in found] == expected
    batch = next(batches.Training(prepared, tokenizer).batches(batch_size=2, seed=0))
    text = ConfigDict(data | {"token_files": ""})
    again = next(batches.Training(text, tokenizer).batches(batch_size=2, seed=0))
    assert (
        batch["tokens"].shape == again["tokens"].shape == (2, 16)
        and (again["tokens"][:, 0] == 1).all()
    )

    config = tokenizer.path.with_name("tokenizer_config.json")
    kept = config.read_text()
    try:
        config.write_text(json.dumps(CONFIG | {"bos_token": "<|endoftext|>"}))
        with pytest.raises(UserError, match="tokenizer sha256"):
            batches.Training(prepared, tokenizer)
    finally:
        config.write_text(kept)


def test_a_sentencepiece_model_needs_no_other_library(sentencepiece_path):
    code = (
        "import sys, latent_delib.weights.gguf_vocabulary;"
        "from latent_delib.data.tokenizer import Tokenizer;"
        f"Tokenizer({str(sentencepiece_path)!r});"
        "print({'tokenizers', 'jax', 'google'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
