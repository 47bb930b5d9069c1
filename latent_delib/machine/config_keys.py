"""Lists the keys of a config, with the comments of configs/base.py."""

import re
from typing import Any

from ml_collections import ConfigDict

from latent_delib.machine.command_line import (
    BASE,
    Flags,
    fields_of_tables,
    keys_of,
    parse_config,
    value_of,
)

WIDTH = 48  # characters for a key with its value, where they fit
KEY = re.compile(r"c\.([\w.]+) = ")


def list_keys(options: Flags) -> str:
    """Returns the text that --list_keys prints: a line per key of the config in sys.argv.

    A line has the key, its value and its comment. The order is that of configs/base.py.

    Raises:
      UserError: a flag, key or value that is wrong, or a config file that fails.
    """
    comments = comments_of(BASE.read_text())
    places = {key: place for place, key in enumerate(comments)}
    lines = ["# --config.KEY=VALUE changes a key for a run"]
    config = parse_config(options)
    fields = fields_of_tables(config)

    def place(key: str) -> int:
        table = key.rpartition(".")[0]  # the place of a field
        return places.get(key, places.get(table, len(places)))

    # The fields that are not set come after those that are.
    keys = dict.fromkeys([*keys_of(config), *fields])
    for key in sorted(keys, key=place):
        lines += _lines_of(key, config, fields.get(key), comments.get(key, ""))
    return "\n".join(lines)


def comments_of(source: str) -> dict[str, str]:
    """Returns key -> comment, from the source of base.py.

    A comment is the lines above the key's line, then the comment at the end of that line.
    """
    found = {}
    above: list[str] = []
    for line in source.splitlines():
        code, _, comment = line.strip().partition("# ")
        key = KEY.match(code)
        if key:
            found[key[1]] = " ".join([*above, comment]).strip()
        above = [*above, comment] if comment and not code else []
    return found


def _lines_of(key: str, config: ConfigDict, kind: Any, comment: str) -> list[str]:
    """Returns the line of a key, as a list; an empty list for a table without a comment.

    kind: the type of a field, which may not be set; None for other keys.
    """
    value = value_of(config, key)
    if isinstance(value, ConfigDict):
        return [f"# {key}: {comment}"] if comment else []
    shown = f"{key} = {value!r}"
    if value is None and kind:
        shown = key
        comment = f"not set: {kind.__name__}"
    return [f"{shown:<{WIDTH}}  # {comment}" if comment else shown]
