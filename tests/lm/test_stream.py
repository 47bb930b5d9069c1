"""A continuation in pieces: joined, they are the continuation, however tokens and text are cut."""

import dataclasses
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

import latent_delib as ld
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.lm.sampling import Endings

PROMPT = "the cat sat on a mat and a dog"
NEW = 24


@pytest.fixture(scope="module")
def lm(decoder_folder):
    """Its weights are random, and most of its vocabulary is bytes: few of them make characters."""
    decoder = ld.load_decoder(decoder_folder)
    return ld.AugmentedLM(decoder, ld.init_coprocessor(decoder, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": False, "temperature": 5.0, "seed": 1},
        {"temperature": 5.0, "seed": 2, "every": 5, "delay": 2},
    ],
)
def test_joined_pieces_are_the_continuation(lm, options):
    (text,) = lm.generate([PROMPT], NEW, **options)
    pieces = list(lm.stream(PROMPT, NEW, **options))
    assert "".join(pieces) == text
    assert len(pieces) > 1 and "" not in pieces


def test_stop_strings_and_eos(lm):
    options = {"temperature": 5.0, "seed": 9}  # few tokens alike
    (whole,) = lm.continuations([PROMPT], NEW, **options)
    text = whole.text
    assert len(text) > 14
    for stop in ([text[5:9]], [text[9:12], text[8:14]], text[7]):
        (found,) = lm.generate([PROMPT], NEW, stop=stop, **options)
        assert "".join(lm.stream(PROMPT, NEW, stop=stop, **options)) == found != text
    tokenizer = Tokenizer(lm.tokenizer.path)
    tokenizer.eos_ids = [int(whole.tokens[9])]
    early = ld.AugmentedLM(dataclasses.replace(lm.decoder, tokenizer=tokenizer), lm.coprocessor)
    (found,) = early.generate([PROMPT], NEW, **options)
    assert "".join(early.stream(PROMPT, NEW, **options)) == found != text


def test_mistakes_are_told_before_the_first_piece(lm):
    with pytest.raises(ld.UserError, match=r"prompts\[0\] is empty"):
        lm.stream("")
    with pytest.raises(ld.UserError, match="temperature=-1.0"):
        lm.stream(PROMPT, temperature=-1.0)


CONTROL = ["<s>", "</s>"]


def bytes_as_tokens():
    """A vocabulary of bytes that are tokens of their own, as Llama 2's, and a few words."""
    pieces = [*CONTROL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁cat", "s", "é", "!"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return model


def byte_level():
    """A vocabulary whose letters stand for bytes, as Llama 3's."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: i for i, piece in enumerate([*CONTROL, *letters, "\u0120cat", "\u00c3\u00a9"])}
    model = tokenizers.Tokenizer(models.BPE(ids, []))
    model.decoder = decoders.ByteLevel()
    return model


@pytest.fixture(scope="module", params=["sentencepiece", "bytes", "byte_level"])
def tokenizer(request, tokenizer_path, tmp_path_factory):
    if request.param == "sentencepiece":
        return Tokenizer(tokenizer_path)
    folder = tmp_path_factory.mktemp(request.param)
    make = bytes_as_tokens if request.param == "bytes" else byte_level
    make().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Tokenizer(folder / "tokenizer.json")


TEXTS = ["naïve cats, “quoted”", "日本語 cat\n", "🙂🙃 é!", "\ufffd\ufffd x"]


@pytest.mark.parametrize("seed", range(8))
def test_any_tokens_in_any_chunks(tokenizer, seed):
    """Whole characters, halves of them, bytes of none, control tokens; stop strings from within."""
    draw = random.Random(seed)
    tokens = []
    for text in draw.choices(TEXTS, k=6):
        tokens += tokenizer.encode(text)
        noise = draw.choices(range(tokenizer.vocab_size), k=draw.randrange(4))
        tokens += [token for token in noise if token != tokenizer.pad_id]
    whole = tokenizer.decode(tokens)
    begin = draw.randrange(len(whole) // 2, len(whole) - 6)
    overlapping = [whole[begin : begin + 5], whole[begin + 1 : begin + 3]]
    for stop in ([], overlapping, overlapping[:1], ["</s>"]):
        ends = Endings(tokenizer, stop)
        expected = ends.cut(np.array(tokens))
        for chunk in (1, 3, 7, len(tokens)):
            found = "".join(ends.pieces(decoded(tokens, chunk, ends, tokenizer.pad_id)))
            assert found == expected


def decoded(tokens, chunk, ends, pad_id):
    """Yields what decoding sees of tokens, until an ending is in sight."""
    for made in range(chunk, len(tokens) + chunk, chunk):
        new = np.array(tokens[:made] + [pad_id] * (len(tokens) - made))
        yield new
        if ends.seen(new[None, :made])[0]:
            return


def test_a_piece_holds_no_half_of_a_stop_string(tokenizer):
    tokens = tokenizer.encode("cats!!scats")
    ends = Endings(tokenizer, ["!!x", "sca"])
    pieces = list(ends.pieces(decoded(tokens, 1, ends, tokenizer.pad_id)))
    assert "".join(pieces).strip() == "cats!!" and len(pieces) > 2
