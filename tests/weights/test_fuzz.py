"""Damaged headers by the hundred end in one clear line or a whole folder, in little memory."""

import json
import random
import shutil
import tracemalloc

import numpy as np
import pytest
from checkpoints import stored
from gguf_files import write
from safetensors.numpy import save_file

from latent_delib.convert import convert
from latent_delib.errors import UserError

RUNS = 60  # of each kind of file
MEMORY = 64 << 20  # bytes; the files are a few hundred kilobytes
NUMBERS = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutate(draw: random.Random, data: bytes, end: int) -> bytes:
    """One to three changes in the first `end` bytes."""
    for _ in range(draw.randint(1, 3)):
        at, kind = draw.randrange(end), draw.randrange(6)
        if kind == 0:  # a bit
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == 1:  # any bytes
            data = data[:at] + draw.randbytes(draw.randint(1, 8)) + data[at + 8 :]
        elif kind == 2:  # some fewer, some again
            data = data[:at] + data[at + draw.randint(1, 16) :]
        elif kind == 3:
            data = data[:at] + data[max(0, at - 16) : at] + data[at:]
        elif kind == 4:  # a count
            data = data[:at] + draw.choice(NUMBERS).to_bytes(8, "little") + data[at + 8 :]
        else:  # cut off
            data = data[: max(1, draw.randrange(len(data)))] if draw.random() < 0.3 else data
        end = max(1, min(end, len(data)))
    return data


def mutate_json(draw: random.Random, data: bytes) -> bytes:
    """A value replaced by one of another kind, or the text itself damaged."""
    if draw.random() < 0.3:
        return mutate(draw, data, len(data))
    tree = node = json.loads(data)
    while isinstance(node, dict | list) and node:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or draw.random() < 0.3:
            values = (
                None,
                True,
                -1,
                0,
                10**30,
                0.5,
                1e300,
                "",
                "../x",
                "x\0y",
                [],
                [[]],
                {},
                {"rope_type": []},
                float("nan"),
            )
            node[key] = draw.choice(values)
            if isinstance(node, dict) and draw.random() < 0.2:
                del node[key]
            break
        node = node[key]
    return json.dumps(tree).encode()


@pytest.fixture
def cases(hf, tokenizer_path, tmp_path):
    """kind -> (what is converted, the file that is damaged, how)."""
    sharded = hf("gemma3")
    tensors = stored("gemma3")[1]
    (sharded / "model.safetensors").unlink()
    save_file(tensors, sharded / "a.safetensors")
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")})
    )
    file = write(tmp_path / "model.gguf", "gemma2", tokenizer_path)
    data = file.read_bytes()
    # Small keys and tensor infos lie before and after the vocabulary; the tensors' data is the end
    # of the file.
    end = len(data) - sum(x.size * 4 for x in stored("gemma2")[1].values())

    def in_safetensors(draw, data):
        return mutate(draw, data, 8 + int.from_bytes(data[:8], "little"))

    whole = hf("llama")
    return {
        "safetensors": (whole, whole / "model.safetensors", in_safetensors),
        "config": (sharded, sharded / "config.json", mutate_json),
        "index": (sharded, sharded / "model.safetensors.index.json", mutate_json),
        "gguf": (file, file, lambda draw, data: mutate(draw, data, end)),
        "gguf_keys": (file, file, lambda draw, data: mutate(draw, data, 900)),
        "gguf_tensors": (
            file,
            file,
            lambda draw, data: data[: end - 3000] + mutate(draw, data[end - 3000 :], 3000),
        ),
    }


@pytest.mark.parametrize(
    "kind", ["safetensors", "config", "index", "gguf", "gguf_keys", "gguf_tensors"]
)
def test_damaged_headers(cases, tmp_path, kind):
    source, file, damage = cases[kind]
    whole, out, draw = file.read_bytes(), tmp_path / "out", random.Random(kind)
    before = sorted(p.name for p in tmp_path.iterdir())
    refused = 0
    tracemalloc.start()
    for run in range(RUNS):
        data = damage(draw, whole)
        file.write_bytes(data)
        try:
            convert(str(source), str(out))
            shutil.rmtree(out)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), error
        except BaseException as error:
            (tmp_path.parent / f"damaged_{kind}_{run}").write_bytes(data)
            raise AssertionError(f"{kind}, run {run}: {error!r}") from error
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > RUNS // 4, "the damage did none"
    assert peak < MEMORY, f"{peak / 1e6:.0f} MB"


def test_damage_is_damage():
    draw, data = random.Random(0), np.arange(200, dtype=np.uint8).tobytes()
    assert sum(mutate(draw, data, 100) != data for _ in range(100)) > 80
    assert (
        sum(
            mutate_json(draw, b'{"a": {"b": [1, 2]}, "c": 3}') != b'{"a": {"b": [1, 2]}, "c": 3}'
            for _ in range(100)
        )
        > 80
    )
