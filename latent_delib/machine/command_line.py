"""The command line of every command: flags without global state, and config files whose keys are flags."""

import ast
import difflib
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from latent_delib.errors import UserError

# Defaults of flags that have none.
REQUIRED = object()  # a string that must be given
CONFIG = object()  # a config file, whose keys can be changed by --NAME.KEY=VALUE
FOLDERS = object()  # the list of words without a flag: at least one
Options = dict[str, tuple[Any, str]]  # flag -> (default, help); the default gives the type, None an optional integer

ROOT = Path(__file__).parents[2]  # of the repository, where configs/ is
TEXTS = ("prompt", "stop", "text")  # the flags that are text; in every other a leading ~ is the home folder
HOME = re.compile(r"^(files:|lines:|)(~[^/]*)")


class _Parser(flags.ArgumentParser):
    """Parses with a function, and says what was expected where that fails."""

    def __init__(self, function: Callable[[Any], Any], expected: str):
        self.function = function
        self.expected = expected

    def parse(self, argument: Any) -> Any:
        try:
            return self.function(argument)
        except (SyntaxError, TypeError, ValueError):
            raise ValueError(f"expected {self.expected}, found {argument!r}") from None


def _parse_tuple(argument: Any) -> tuple:
    """Reads "('A', 'B')", or one string without quotes."""
    value = argument
    if isinstance(argument, str):
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            if "," in argument:  # one string, or two?
                raise
    if isinstance(value, tuple | list):
        return tuple(value)
    return (value,)


PARSERS = {
    bool: _Parser(flags.BooleanParser().parse, "True or False"),
    int: _Parser(flags.IntegerParser().parse, "a whole number"),
    float: _Parser(flags.FloatParser().parse, "a number"),
    str: flags.ArgumentParser(),
    tuple: _Parser(_parse_tuple, "one value, or several like \"('A', 'B')\""),
}
for _kind, _parser in PARSERS.items():  # of keys; with these the last of two tuples counts, as of everything else
    config_flags.register_flag_parser_for_type(_kind, _parser)


def help_text(doc: str, options: Options) -> str:
    """Returns the text that --help prints."""
    lines = [doc.strip(), "", "flags:"]
    for name, (default, text) in options.items():
        lines.append(f"  {_shown(name, default)}: {text}")
    return "\n".join(lines)


def parse(values: flags.FlagValues, options: Options) -> None:
    """Parses sys.argv into `values`, and runs the config files that it names.

    Raises:
      UserError: a flag, key or value that is wrong, one that is missing, or a config file that fails.
    """
    shown = [_shown(name, default) for name, (default, _) in options.items()]
    for name, (default, text) in options.items():
        _define(values, name, default, text)
    try:
        rest = values(sys.argv, known_only=True)[1:]
        for name, (default, _) in options.items():
            given = values[name].value
            if default is FOLDERS and given:
                raise UserError(f"--{name}: no such flag; there are {', '.join(shown)}")
            if default is CONFIG and given:
                config = load_config(name, given)
                rest = _override(name, config, rest)
                values[name].value = _expand_home(config)
            elif isinstance(given, str) and name not in TEXTS:
                values[name].value = _expand_home(given)
    except flags.Error as error:
        raise UserError(str(error).removeprefix("flag ")) from None
    _refuse_unknown(rest, values, options, shown)
    for name, (default, text) in options.items():
        if default is FOLDERS:
            values[name].value = [_expand_home(word) for word in rest]
            rest = []
        if default in (REQUIRED, CONFIG, FOLDERS) and not values[name].value:
            raise UserError(f"{_shown(name, default)} is missing: {text}")
    if rest:
        expected = f"; expected flags alone: {', '.join(shown)}" if shown else ""
        raise UserError(f"unexpected argument {rest[0]!r}{expected}")


def _shown(name: str, default: Any) -> str:
    return "DIR" if default is FOLDERS else f"--{name}"


def _define(values: flags.FlagValues, name: str, default: Any, text: str) -> None:
    kind = int if default is None else type(default)
    if default in (REQUIRED, CONFIG, FOLDERS):
        kind, default = str, None
    flag = flags.Flag(PARSERS[kind], None, name, default, text, boolean=kind is bool)
    flags.DEFINE_flag(flag, values)


def _refuse_unknown(arguments: list[str], values: flags.FlagValues, options: Options, shown: list[str]) -> None:
    """Raises UserError for an argument that is left and looks like a flag."""
    known = list(values)
    without_file = []  # the configs whose file is missing: that is said instead
    for name, (default, _) in options.items():
        if default is CONFIG and values[name].value:
            known += [f"{name}.{key}" for key in _keys(values[name].value)]
        elif default is CONFIG:
            without_file.append(f"--{name}.")
    for argument in arguments:
        given = argument.partition("=")[0]
        if argument.startswith("-") and not given.startswith(tuple(without_file)):
            meant = _did_you_mean(given.lstrip("-"), known) or f"; there are {', '.join(shown)}"
            raise UserError(f"{given}: no such flag{meant}")


def load_config(name: str, given: str) -> ConfigDict:
    """Returns what get_config() of a config file returns; FILE.py:ARGUMENT gives it an argument.

    Raises:
      UserError: there is no such file, or it fails: with its line.
    """
    path, colon, argument = given.partition(":")
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f"--{name}={given}: no such file")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # `from configs import base`, from wherever the command is started
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise ValueError("defines no get_config()")
        config = get_config(argument) if colon else get_config()
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise UserError(f"{error.filename or path}{line}: {error.msg}") from None
    except Exception as error:
        raise UserError(_of_config_file(error, path)) from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returns {type(config).__name__}, expected a ConfigDict")
    return config


def _of_config_file(error: Exception, path: str) -> str:
    """Returns one line with the file's own line in which an error came up."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}, line {lines[-1]}" if lines else path
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    text = " ".join(str(error).replace(r"\n", " ").split())
    text = re.sub("'?(Key .*?) Other fields present: .*(Did you mean .*?)'?$", r"\1 \2", text)
    return f"{where}: {kind}{text}"


def _override(name: str, config: ConfigDict, arguments: list[str]) -> list[str]:
    """Sets the keys that --NAME.KEY=VALUE give, the last of each, and locks the config; returns the other arguments.

    Raises:
      UserError: a key that is not there.
      flags.Error: a value that is wrong.
    """
    keys = list(_keys(config))
    for argument in arguments:
        found = re.fullmatch(rf"--?(?:no)?{name}\.(.*)", argument.partition("=")[0])
        if found and found[1] not in keys:
            raise UserError(_no_such_key(name, found[1], config, keys))
    overrides = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(name, config, flag_values=overrides, sys_argv=arguments)
        return overrides(["", *arguments], known_only=True)[1:]
    except (TypeError, ValueError) as error:  # a dictionary of fields that is none
        raise UserError(f"--{name}: {' '.join(str(error).split())}") from None


def _keys(config: ConfigDict, above: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield above + name
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{above}{name}.")


def _no_such_key(name: str, key: str, config: ConfigDict, keys: list[str]) -> str:
    above, _, last = key.rpartition(".")
    if above in keys and isinstance(config[above], ConfigDict) and not config[above]:
        whole = f"--{name}.{above}=\"{{'{last}': ...}}\""
        return f"--{name}.{key}: {above} is empty in this config; give it whole, as {whole}, or in the config file"
    meant = _did_you_mean(key, keys, f"{name}.") or "; the config file and configs/base.py declare all there are"
    return f"--{name}.{key}: no such key{meant}"


def _did_you_mean(given: str, known: list[str], above: str = "") -> str:
    """Returns a question with the known name most like a given one: of the same last part, or few letters apart."""
    alike = [name for name in known if name.rpartition(".")[2] == given.rpartition(".")[2]]
    close = difflib.get_close_matches(given, alike or known, n=1, cutoff=0.0 if alike else 0.6)
    return f"; did you mean --{above}{close[0]}?" if close else ""


def _expand_home(value: Any) -> Any:
    """Returns a value with the home folder for each leading ~, which no shell expands behind `--flag=`."""
    if isinstance(value, str):
        return HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), value)
    if isinstance(value, tuple):
        return tuple(_expand_home(item) for item in value)
    if isinstance(value, ConfigDict):
        for key, item in value.items():
            if isinstance(item, str | tuple | ConfigDict):
                value[key] = _expand_home(item)
    return value
