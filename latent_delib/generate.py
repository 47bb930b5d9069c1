"""Continues prompts with the plain decoder and with latents.

  python -m latent_delib.generate --workdir=DIR --prompt=TEXT [--no_augment]
  python -m latent_delib.generate --workdir=DIR --prompts=FILE --out=FILE      many prompts, JSON lines in and out

Reads the newest checkpoint of WORKDIR (or --step) and the decoder it was trained on. A line of --prompts is
{"prompt": TEXT}, and may have a "seed" of its own; a line of --out adds "decoder", "augmented" and "joined".
"""

import json
from pathlib import Path
from typing import Any

import jax
from etils import epath

from latent_delib import mesh as mesh_lib
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.lm import load as loading
from latent_delib.lm import model as lm
from latent_delib.machine import arguments, checkpoint, commands, files
from latent_delib.machine.progress import Progress


def main(flags: Any) -> None:
    requests = read_prompts(flags)
    delay = None if flags.coprocessor_devices else flags.delay
    options = {k: getattr(flags, k) for k in ("temperature", "top_k", "top_p", "every", "batch_size")}
    lm.check_options(flags.max_new_tokens, delay=delay, **options)
    lm.check_attention(flags.attention)
    if flags.out and (out := epath.Path(flags.out)).is_dir():
        raise UserError(f"--out={flags.out}: is a folder, expected a file")
    elif flags.out:
        out.parent.mkdir(parents=True, exist_ok=True)
    model = load(flags)
    options |= {"stop": flags.stop or [], "seed": [r["seed"] for r in requests]}
    for name, augment in (("decoder", False), ("augmented", True)):
        if augment and model.coprocessor is None:
            continue
        total = len(requests) * flags.max_new_tokens
        found = model.continuations(
            [r["prompt"] for r in requests],
            flags.max_new_tokens,
            augment=augment,
            delay=delay if augment else 0,
            progress=Progress(f"{name}: decoded", total, "tokens"),
            **options,
        )
        for request, continuation in zip(requests, found):
            request |= {name: continuation.text} | ({"joined": list(continuation.joined)} if augment else {})
            if not flags.out:
                print(f"--- {name}\n{request['prompt']}{continuation.text}", flush=True)
    if flags.out:
        lines = (json.dumps(r) + "\n" for r in requests)  # ASCII: JSON has halves of characters that UTF-8 lacks
        files.write(out, "".join(lines).encode())
        print(f"{len(requests)} continuations are in {flags.out}", flush=True)


def read_prompts(flags: Any) -> list[dict[str, Any]]:
    """What is asked for, each a "prompt" and its "seed"."""
    if flags.coprocessor_devices and flags.delay:
        raise UserError(f"--delay={flags.delay}: with --coprocessor_devices latents join when they are ready")
    if bool(flags.prompt) == bool(flags.prompts):
        raise UserError("expected --prompt=TEXT or --prompts=FILE, one of them, and not empty")
    arguments.whole("--seed", flags.seed, 0, arguments.INT64)
    if flags.prompt:
        return [{"prompt": flags.prompt, "seed": flags.seed}]
    requests = []
    try:
        text = Path(flags.prompts).read_text(encoding="utf-8-sig")  # with or without a mark of the byte order
    except UnicodeDecodeError as error:
        raise UserError(f"{flags.prompts}: not UTF-8 at byte {error.start}") from None
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines knows ends of lines that JSON does not
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f'{flags.prompts}:{number}: not JSON, expected {{"prompt": TEXT}} on each line') from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f'{flags.prompts}:{number}: expected a "prompt" that is text and not empty')
        seed = row.get("seed", flags.seed + number - 1)
        seed = arguments.whole(f"{flags.prompts}:{number}: seed", seed, 0, arguments.INT64)
        requests.append(row | {"seed": seed})
    if not requests:
        raise UserError(f"{flags.prompts}: holds no prompts")
    return requests


def load(flags: Any) -> lm.AugmentedLM:
    """The model of a workdir, on all devices; with --coprocessor_devices the last of them are the coprocessor's own."""
    if not 0 <= flags.coprocessor_devices < jax.device_count():
        has = _devices(jax.device_count())
        raise UserError(
            f"--coprocessor_devices={flags.coprocessor_devices}: this machine has {has}, and the decoder needs one"
        )
    checkpoints, _, meta = checkpoint.open_for_reading(flags.workdir, flags.step)
    checkpoints.close()
    path, has_latents = loading.decoder_of(flags.workdir, meta), METHODS[meta["method.name"]].write is not None
    split = jax.device_count() - flags.coprocessor_devices
    if flags.tensor < 1 or split % flags.tensor:
        raise UserError(f"--tensor={flags.tensor}: does not divide the {_devices(split)} of the decoder")
    here, there = jax.devices()[:split], jax.devices()[split:]
    augment = has_latents and not flags.no_augment
    for name in () if augment else ("every", "delay", "coprocessor_devices"):
        if value := getattr(flags, name):
            why = "--no_augment" if has_latents else f"method {meta['method.name']}"
            raise UserError(f"--{name}={value}: says when latents join, and with {why} there are none")
    mesh = mesh_lib.make({"data": -1, "tensor": flags.tensor}, here)
    decoder = loading.load_decoder(path, meta["config"]["compute"]["dtype"], mesh)
    coprocessor = loading.load_coprocessor(flags.workdir, flags.step) if augment else None
    beside = mesh_lib.make({"data": 1, "tensor": -1}, there) if there else None
    return lm.AugmentedLM(decoder, coprocessor, mesh, beside, flags.max_length, flags.attention)


def _devices(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        workdir=(commands.REQUIRED, "of a training job"),
        prompt=("", "the text to continue"),
        prompts=("", "or a file of them, JSON lines"),
        out=("", "where continuations go, JSON lines; the screen if left out"),
        no_augment=(False, "the plain decoder alone"),
        max_new_tokens=(64, "tokens to decode"),
        temperature=(0.0, "0: the likeliest token each time"),
        top_k=(0, "sample from that many likeliest tokens; 0: from all"),
        top_p=(1.0, "sample from the likeliest tokens that reach this probability together"),
        stop=("", "a text ends before this string"),
        seed=(0, "of the sampling; prompt i of a file has seed + i where it names none"),
        every=(0, "latents are written again after so many tokens; 0: once, at the end of the prompt"),
        delay=(0, "tokens decoded before the latents join (asynchronous coprocessor, simulated)"),
        coprocessor_devices=(0, "devices of the coprocessor's own: latents join when they are ready"),
        tensor=(1, "devices that split each layer between them; prompts are split over the rest"),
        batch_size=(16, "prompts at once"),
        max_length=(8192, "tokens of a prompt and its continuation"),
        attention=("auto", "its form: auto, by platform, or reference, xla, pallas_gpu, pallas_tpu"),
        step=(None, "checkpoint step; the newest if left out"),
    )
