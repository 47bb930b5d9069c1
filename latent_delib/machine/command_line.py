"""Reads a command line: flags without global state, and config files whose keys are flags."""

import ast
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from latent_delib.errors import UserError

# These take the place of a default where a flag has none.
REQUIRED = object()  # a string that must be given
# For --config: the flag names a config file, whose keys --config.KEY=VALUE changes. A function in
# place of CONFIG makes the config where no file is named, from the values of the other flags.
CONFIG = object()
FOLDERS = object()  # all words that belong to no flag: at least one
# flag -> (default, help). The default gives the type; None means an optional integer.
Flags = dict[str, tuple[Any, str]]

# The folder above configs/: the repository, or the copy that setup.py puts into the package.
ROOT = Path(__file__).parents[2]
if not (ROOT / "configs").is_dir():
    ROOT = Path(__file__).parents[1] / "repository"
BASE = ROOT / "configs" / "base.py"  # declares every key
# A leading ~ stays as it is in these flags and keys. In all others it means the home folder.
TEXTS = ("prompt", "stop", "config.method.prompt_end")
WRITTEN = ("out", "workdir")  # flags that name where a command writes
HOME = re.compile(r"^((?:files:|lines:|qa:|qa_steps(?:-\d+)?:)?(?:hf:)?)(~[^/]*)")


class _TupleParser(flags.ArgumentParser):
    """Reads "('A', 'B')", or one string without quotes.

    If a flag is given twice, the last one counts, as for every other key.
    """

    def parse(self, argument: Any) -> tuple:
        value = argument
        if isinstance(argument, str):
            try:
                value = ast.literal_eval(argument)
            except (SyntaxError, ValueError):
                if "," in argument:  # one string, or two?
                    raise ValueError(
                        "expected one value, or several, such as \"('A', 'B')\"; "
                        "write one with a comma as \"('A,B',)\""
                    ) from None
        if isinstance(value, tuple | list):
            return tuple(value)
        return (value,)


class _PlainParser(flags.ArgumentParser):
    """Reads a value as another parser does, and says in plain words what it expects."""

    def __init__(self, parser: flags.ArgumentParser, expected: str):
        self.parser = parser
        self.expected = expected

    def parse(self, argument: Any) -> Any:
        try:
            return self.parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self.expected}") from None


PARSERS = {
    bool: _PlainParser(flags.BooleanParser(), "true or false"),
    int: _PlainParser(flags.IntegerParser(), "a whole number"),
    float: _PlainParser(flags.FloatParser(), "a number"),
    str: flags.ArgumentParser(),
    tuple: _TupleParser(),
}
for _kind, _parser in PARSERS.items():
    config_flags.register_flag_parser_for_type(_kind, _parser)


def help_text(doc: str, options: Flags) -> str:
    """Returns the text that --help prints."""
    lines = [doc.strip()]
    if options:
        lines += ["", "flags:"]
    for name, (default, text) in options.items():
        lines.append(f"  {_shown(name, default)}: {text}")
    if "config" in options:
        lines.append("  --list_keys: print the keys of the config, their values and meanings")
    return "\n".join(lines)


def parse_config(options: Flags) -> ConfigDict:
    """Returns the config of sys.argv; that of configs/base.py where no file is named.

    Other flags may be missing, and --list_keys may be given.

    Raises:
      UserError: as `parse`.
    """
    lenient: Flags = {"list_keys": (False, "")}
    for name, (default, text) in options.items():
        lenient[name] = "" if default in (REQUIRED, FOLDERS) else default, text
    lenient["config"] = (lambda _: load_config(str(BASE)), "")
    values = flags.FlagValues()
    parse(values, lenient)
    return values.config


def parse(values: flags.FlagValues, options: Flags) -> None:
    """Parses sys.argv into `values`, and runs the config file that it names.

    Raises:
      UserError: a flag, key or value is wrong; a flag is missing; or a config file fails.
    """
    words = [name for name, (default, _) in options.items() if default is FOLDERS]
    for name, (default, _) in options.items():
        if name not in words:
            _define(values, name, default)
    try:
        rest = values(sys.argv, known_only=True)[1:]
        rest = _parse_keys(values, options, rest)
    except flags.Error as error:
        raise UserError(str(error).removeprefix("flag ")) from None
    for name in words:
        _define(values, name, FOLDERS)
        values[name].value = rest
        rest = []
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; --help lists the flags")
    for name, (default, text) in options.items():
        if default in (REQUIRED, FOLDERS) and not values[name].value:
            raise UserError(f"{_shown(name, default)} is missing: {text}")
        values[name].value = _expand_home(name, values[name].value)
        if name in WRITTEN and re.match(r"(?!gs://)\w+:/", values[name].value):
            raise UserError(
                f"--{name}={values[name].value}: expected a local path or gs://BUCKET/PATH"
            )


def _shown(name: str, default: Any) -> str:
    return "DIR" if default is FOLDERS else f"--{name}"


def _define(values: flags.FlagValues, name: str, default: Any) -> None:
    kind = int if default is None else type(default)
    if default in (REQUIRED, CONFIG, FOLDERS) or callable(default):
        kind, default = str, None
    flag = flags.Flag(PARSERS[kind], None, name, default, "", boolean=kind is bool)
    flags.DEFINE_flag(flag, values)


def _parse_keys(values: flags.FlagValues, options: Flags, arguments: list[str]) -> list[str]:
    """Loads the config file and sets its keys by --config.KEY=VALUE; returns the other words.

    Raises:
      UserError: the config file is missing or fails; a flag or key does not exist.
      flags.Error: a value is wrong.
    """
    keys = flags.FlagValues()
    known = list(values)
    config = _config(values, options)
    if config is not None:
        known += [f"config.{key}" for key in keys_of(config)]
        known += [f"config.{key}" for key in fields_of_tables(config)]
    _check_names(arguments, known)
    if config is not None:
        _clear_named_fields(config, arguments)
        config_flags.DEFINE_config_dict("config", config, flag_values=keys, sys_argv=arguments)
        values["config"].value = config
    return keys(["", *arguments])[1:]


def _config(values: flags.FlagValues, options: Flags) -> ConfigDict | None:
    """Returns the config that the command line names; None for a command without one."""
    if "config" not in options:
        return None
    default, text = options["config"]
    if values.config:
        return load_config(values.config)
    if callable(default):
        return default(values)
    raise UserError(f"--config is missing: {text}")


def keys_of(config: ConfigDict, above: str = "") -> Iterator[str]:
    """Yields the dotted key of every value and table of a config."""
    for name, value in config.items():
        yield above + name
        if isinstance(value, ConfigDict):
            yield from keys_of(value, f"{above}{name}.")


def value_of(config: ConfigDict, key: str) -> Any:
    """Returns the value of a dotted key; None for a field that is not set."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part)
    return value


def fields_of_tables(config: ConfigDict) -> dict[str, Any]:
    """Returns key -> type, for each field that TABLES of base.py allows in the config's tables."""
    there = set(keys_of(config))
    found = {}
    for table, kind in runpy.run_path(str(BASE))["TABLES"].items():
        if table in there:
            found |= {f"{table}.{field.name}": field.type for field in dataclasses.fields(kind)}
    return found


def _clear_named_fields(config: ConfigDict, arguments: list[str]) -> None:
    """Sets each field that an argument names to an empty value of its type.

    Then the flag sets the field, and is read as that type, whatever the config file has set.
    """
    given = {flag.removeprefix("no") for flag in map(_flag_of, arguments)}
    for key, kind in fields_of_tables(config).items():
        if f"config.{key}" in given:
            above, _, field = key.rpartition(".")
            table = value_of(config, above)
            with config.unlocked():
                if field in table:
                    del table[field]  # a value of any type
                table[field] = kind()


def _flag_of(argument: str) -> str:
    """Returns the name of a flag without dashes and value; "" for another word."""
    found = re.match(r"--?([a-zA-Z][^=]*)", argument)
    return found[1] if found else ""


def _check_names(arguments: list[str], known: list[str]) -> None:
    """Raises UserError for an unknown flag, with the known name that is most like it.

    A table that is set as a whole is refused too, because its other keys would be lost.
    """
    for flag in map(_flag_of, arguments):
        inside = [name for name in known if name.startswith(f"{flag}.")]
        if flag.startswith("config.") and inside:
            raise UserError(f"--{flag}: is a table; set its keys, such as --{inside[0]}=...")
        if not flag or flag in known or flag.removeprefix("no") in known:
            continue
        key = flag.split(".")[-1]
        alike = [name for name in known if name.split(".")[-1] == key]  # in another table
        cutoff = 0.0 if alike else 0.8
        close = difflib.get_close_matches(flag, alike or known, n=1, cutoff=cutoff)
        is_key = "." in flag and "config" in known
        remedy = "--list_keys lists the keys" if is_key else "--help lists the flags"
        if close:
            remedy = f"did you mean --{close[0]}?"
        raise UserError(f"--{flag}: no such flag; {remedy}")


def load_config(given: str) -> ConfigDict:
    """Runs get_config() of a config file; FILE.py:ARGUMENT gives it an argument.

    A bare name, such as `quickstart`, means a file in configs/.

    Raises:
      UserError: there is no such file; or it fails, and the message names the line.
    """
    path, colon, argument = given.partition(":")
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        known = _configs()
        if path not in known:
            names = ", ".join(known)
            raise UserError(f"--config={given}: no such file; known names: {names}")
        path = str(known[path])
    if str(ROOT) not in sys.path:
        # `from configs import base` works then, in whatever folder the command is started
        sys.path.append(str(ROOT))
    get_config = run_file(path).get("get_config")
    if get_config is None:
        raise UserError(f"{path}: defines no get_config()")
    if colon and not inspect.signature(get_config).parameters:
        raise UserError(f"--config={given}: takes no argument; leave out :{argument}")
    try:
        config = get_config(argument) if colon else get_config()
    except Exception as error:
        raise UserError(_config_message(error, path)) from None
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returns {type(config).__name__}, expected a ConfigDict"
        )
    return config


def run_file(path: str) -> dict[str, Any]:
    """Runs a Python file and returns its names.

    Raises:
      UserError: it fails, and the message names the line.
    """
    try:
        return runpy.run_path(path)
    except Exception as error:
        raise UserError(_config_message(error, path)) from None


def _configs() -> dict[str, Path]:
    """Returns the config files in configs/ by name."""
    files = sorted((ROOT / "configs").glob("*.py"))
    return {file.stem: file for file in files if "def get_config" in file.read_text()}


def _config_message(error: Exception, path: str) -> str:
    """Returns an error as one line, with the number of the config file's line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    where = f"{path}, line {lines[-1]}" if lines else path
    # ml_collections lists every key before its guess.
    text = re.sub(r"(?s)Other fields present: .*?(Did you mean|$)", r"\1", str(error))
    return f"{where}: {type(error).__name__}: {' '.join(text.split())}"


def _expand_home(name: str, value: Any) -> Any:
    """Expands each leading ~ of a value to the home folder: a shell does not, after `--flag=`."""
    if name in TEXTS:
        return value
    if isinstance(value, str):
        return HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), value)
    if isinstance(value, tuple | list):
        return type(value)(_expand_home(name, each) for each in value)
    if isinstance(value, ConfigDict):
        for key, item in value.items():
            if isinstance(item, str | tuple | ConfigDict):
                value[key] = _expand_home(f"{name}.{key}", item)
    return value
