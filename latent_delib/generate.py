"""Continues prompts with the plain decoder and with latents.

  python -m latent_delib.generate --workdir=DIR --prompt=TEXT [--chat] [--no_augment]
  python -m latent_delib.generate --workdir=DIR --prompts=FILE --out=FILE

Reads the newest checkpoint of WORKDIR (or --step) and the decoder it was trained on. On the screen
the continuation of a single prompt appears as it is decoded. Both FILEs are JSON lines. A line of
--prompts is {"prompt": TEXT}, and may have a "seed" of its own. A line of --out adds two texts,
"decoder" and "augmented", and "joined", the numbers of tokens after which latents joined.

With --chat an instruct model answers each prompt. A line may also hold a whole conversation to be
answered, {"messages": [{"role": "user", "content": TEXT}, ...]}.
"""

import json
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from latent_delib import mesh as mesh_lib
from latent_delib.data import chat
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.lm import inputs, load, sampling
from latent_delib.lm.inputs import Prompt
from latent_delib.lm.model import AugmentedLM
from latent_delib.machine import arguments, commands, files
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.progress import Progress


def main(flags: Any) -> None:
    if flags.coprocessor_devices and flags.delay:
        raise UserError(
            f"--delay={flags.delay}: with --coprocessor_devices latents join when they are ready"
        )
    delay = None if flags.coprocessor_devices else flags.delay
    sampler = {name: getattr(flags, name) for name in sampling.options()}
    inputs.check_options(flags.max_new_tokens, flags.every, delay, sampler)
    inputs.check_attention(flags.attention)
    arguments.whole("batch_size", flags.batch_size, 1)
    if flags.max_length <= flags.max_new_tokens:
        raise UserError(
            f"--max_length={flags.max_length}: expected more than "
            f"--max_new_tokens={flags.max_new_tokens}, so that a prompt fits"
        )
    requests = read_requests(flags)
    out = epath.Path(flags.out)
    if flags.out and files.is_folder(out):
        raise UserError(f"--out={out}: is a folder, expected a file")
    if flags.out:
        files.check_writable(str(out.parent))

    lm = load_model(flags)
    for name, augment in (("decoder", False), ("augmented", True)):
        if augment and lm.coprocessor is None:
            continue
        options = {
            "stop": flags.stop or [],
            "augment": augment,
            "every": flags.every,
            "delay": delay if augment else 0,
            **sampler,
        }
        if flags.prompt and not flags.out:
            print_stream(lm, requests[0], name, flags, options)
        else:
            continue_all(lm, requests, name, flags, options)
    if flags.out:
        # ASCII: JSON can hold half characters, UTF-8 cannot
        lines = [json.dumps(request) + "\n" for request in requests]
        files.write(out, "".join(lines).encode())
        print(f"{len(requests)} continuations are in {out}", flush=True)


def print_stream(
    lm: AugmentedLM, request: dict[str, Any], name: str, flags: Any, options: dict[str, Any]
) -> None:
    """Prints the continuation of one request piece by piece, as it is decoded.

    Args:
      name: "decoder" or "augmented".
      options: keyword arguments of `AugmentedLM.stream`, without the seed.
    """
    prompt = prompt_of(request, flags.chat, lm.tokenizer)
    pieces = lm.stream(prompt, flags.max_new_tokens, seed=request["seed"], **options)
    print(f"--- {name}\n{shown(request, flags.chat)}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def continue_all(
    lm: AugmentedLM, requests: list[dict[str, Any]], name: str, flags: Any, options: dict[str, Any]
) -> None:
    """Adds its continuation to each request, under `name`; without --out it prints them too.

    Args: as for `print_stream`.
    """
    found = lm.continuations(
        [prompt_of(request, flags.chat, lm.tokenizer) for request in requests],
        flags.max_new_tokens,
        seed=[request["seed"] for request in requests],
        batch_size=flags.batch_size,
        progress=Progress(f"{name}: decoded", len(requests) * flags.max_new_tokens, "tokens"),
        **options,
    )
    for request, continuation in zip(requests, found):
        request[name] = continuation.text
        if options["augment"]:
            request["joined"] = list(continuation.joined)
        if not flags.out:
            print(f"--- {name}\n{shown(request, flags.chat)}{continuation.text}", flush=True)


def prompt_of(request: dict[str, Any], is_chat: bool, tokenizer: Tokenizer) -> Prompt:
    """Returns what the model continues for a request: its text, or the tokens of a conversation."""
    if "messages" in request:
        return tokenizer.chat(request["messages"])
    if is_chat:
        return tokenizer.chat([{"role": "user", "content": request["prompt"]}])
    return request["prompt"]


def shown(request: dict[str, Any], is_chat: bool) -> str:
    """Returns what the screen shows before a continuation: the prompt, or the last message."""
    if "messages" in request:
        return request["messages"][-1]["content"] + "\n\n"
    return request["prompt"] + ("\n\n" if is_chat else "")


def read_requests(flags: Any) -> list[dict[str, Any]]:
    """Returns the requests of the flags.

    Each is a dict with "prompt" or "messages", "seed", and any other keys of its line.
    """
    if bool(flags.prompt) == bool(flags.prompts):
        raise UserError("expected either --prompt=TEXT or --prompts=FILE, and not empty")
    arguments.whole("--seed", flags.seed, 0, arguments.SEED)
    if flags.prompt:
        return [{"prompt": flags.prompt, "seed": flags.seed}]
    text = files.read_text(Path(flags.prompts), "utf-8-sig")  # a byte order mark is no text
    if not text:
        raise UserError(f"{flags.prompts}: holds no prompts")
    lines = text.removesuffix("\n").split("\n")  # splitlines splits at more than JSON does
    requests = []
    for i, line in enumerate(lines):
        requests.append(_read_request(line, f"{flags.prompts}:{i + 1}", flags.seed + i))
    return requests


def _read_request(line: str, where: str, seed: int) -> dict[str, Any]:
    """Returns the request on a line, checked; `seed` is for a request without a seed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f'{where}: not JSON, expected {{"prompt": TEXT}} on each line') from None
    found = row if isinstance(row, dict) else {}
    if "messages" in found and "prompt" not in found:
        chat.checked(f"{where}: messages", found["messages"])
    elif "messages" in found or not isinstance(found.get("prompt"), str) or not found["prompt"]:
        raise UserError(
            f'{where}: expected a "prompt" that is text and not empty, or else "messages"'
        )
    seed = arguments.whole(f"{where}: seed", found.get("seed", seed), 0, arguments.SEED)
    return found | {"seed": seed}


def load_model(flags: Any) -> AugmentedLM:
    """Loads the model of a workdir onto all devices.

    With --coprocessor_devices the last devices are the coprocessor's.
    """
    mesh, beside = make_meshes(flags.tensor, flags.coprocessor_devices)
    record = load.read_record(flags.workdir, flags.step)
    method = record["method.name"]
    writes_latents = METHODS[method].writes_latents
    augment = writes_latents and not flags.no_augment
    if augment:
        delay = None if flags.coprocessor_devices else flags.delay
        inputs.check_joining(flags.every, delay, record["method.every"], method)
    else:
        _refuse_joining_flags(flags, "--no_augment" if writes_latents else f"method {method}")
    path = load.decoder_of(flags.workdir, record, flags.decoder)
    decoder = load.load_decoder(path, record["compute.dtype"], mesh)
    coprocessor = load.load_coprocessor(flags.workdir, flags.step) if augment else None
    return AugmentedLM(decoder, coprocessor, mesh, beside, flags.max_length, flags.attention)


def _refuse_joining_flags(flags: Any, why: str) -> None:
    """Raises UserError for a flag that says when latents join, where there are none."""
    for name in ("every", "delay", "coprocessor_devices"):
        value = getattr(flags, name)
        if value:
            raise UserError(
                f"--{name}={value}: has no effect, because with {why} no latents are written"
            )


def make_meshes(tensor: int, coprocessor_devices: int) -> tuple[Mesh, Mesh | None]:
    """Returns the decoder's mesh, and the coprocessor's where it has devices of its own."""
    devices = jax.devices()
    if not 0 <= coprocessor_devices < len(devices):
        most = len(devices) - 1
        raise UserError(
            f"--coprocessor_devices={coprocessor_devices}: expected 0 to {most}, "
            "as the decoder needs one"
        )
    split = len(devices) - coprocessor_devices
    if tensor < 1 or split % tensor:
        raise UserError(
            f"--tensor={tensor}: expected a divisor of {split}, the number of the decoder's devices"
        )
    mesh = mesh_lib.make({"data": -1, "tensor": tensor}, devices[:split])
    if not coprocessor_devices:
        return mesh, None
    return mesh, mesh_lib.make({"data": 1, "tensor": -1}, devices[split:])


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        workdir=(
            REQUIRED,
            "workdir of a training job, or an exported folder, hf:OWNER/NAME, packaged",
        ),
        decoder=("", "where the decoder is now, if not at the path of the training"),
        prompt=("", "the text to continue"),
        prompts=("", "a file of prompts, JSON lines, instead of --prompt"),
        chat=(False, "send each prompt as a user's message, in the model's chat template"),
        out=("", "where continuations go, JSON lines; the screen if left out"),
        no_augment=(False, "use the plain decoder alone"),
        max_new_tokens=(64, "tokens to decode"),
        **sampling.options(),
        stop=("", "end each text before this string"),
        seed=(0, "seed of the sampling; prompt i of a file has seed + i where it names none"),
        every=(
            0,
            "latents are written again after this many tokens; 0: once, at the end of the prompt",
        ),
        delay=(0, "tokens decoded before the latents join (asynchronous coprocessor, simulated)"),
        coprocessor_devices=(
            0,
            "devices for the coprocessor alone: latents join when they are ready",
        ),
        tensor=(1, "devices that split each layer between them; prompts are split over the rest"),
        batch_size=(16, "prompts at once"),
        max_length=(8192, "tokens of a prompt and its continuation"),
        attention=inputs.ATTENTION_FLAG,
        step=(None, "checkpoint step; the newest if left out"),
    )
