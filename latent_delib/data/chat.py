"""Chat templates: turn a conversation into one text, which an instruct model continues.

A template is a Jinja program that comes with the model. It may use the same names as in
`transformers` (apply_chat_template), and runs in a sandbox.
"""

import datetime
import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from latent_delib.errors import UserError
from latent_delib.machine import arguments

FILE = "chat_template.jinja"  # beside a tokenizer
MARK = "\ufdd0"  # a noncharacter, which Unicode reserves for uses like this
FIELDS = {"role", "content"}


def checked(name: str, messages: Any) -> list[dict[str, str]]:
    """Returns messages as a list of dicts.

    Raises:
      UserError: there are no messages, or one is not of the form {"role": TEXT, "content": TEXT}.
    """
    found = arguments.several(name, messages)
    for i, message in enumerate(found):
        has_fields = isinstance(message, Mapping) and set(message) == FIELDS
        if not has_fields or not all(isinstance(text, str) for text in message.values()):
            raise UserError(
                f'{name}[{i}]={reprlib.repr(message)}: expected {{"role": TEXT, "content": TEXT}}'
            )
    if not found:
        raise UserError(f"{name}: is empty")
    return [dict(message) for message in found]


def marked(messages: list[dict[str, str]], control: Iterable[str]) -> list[dict[str, str]]:
    """Returns messages with MARK put inside each control token that they spell."""
    control = list(control)

    def marked_text(text: str) -> str:
        for token in control:
            text = text.replace(token, token[0] + MARK + token[1:])
        return text

    return [{field: marked_text(message[field]) for field in message} for message in messages]


def render(template: str, messages: list[dict[str, str]], tokens: Mapping[str, str]) -> str:
    """Returns a conversation as text, up to where the next message of the model begins.

    Args:
      template: a Jinja program.
      messages: as `checked` or `marked` returns them.
      tokens: the spellings of "bos_token" and "eos_token".

    Raises:
      UserError: the template refuses the messages, or cannot be run.
    """
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Keeps the text between {% generation %} and {% endgeneration %}, which mark replies."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        program = environment.from_string(template)
        return program.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(f"messages: the chat template fails on them: {error}") from None


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """Returns a value as JSON. Jinja's own filter would escape it for HTML.

    how: `indent`, `separators` and `sort_keys` of json.dumps.
    """
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def _refuse(message: str) -> NoReturn:
    """Raises the error that a template asks for."""
    raise ValueError(message)


def _now(form: str) -> str:
    """Returns the time, which some templates write into the text."""
    return datetime.datetime.now().strftime(form)
