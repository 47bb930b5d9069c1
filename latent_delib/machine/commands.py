"""What every command line shares: flags without global state, and one clear line where a command cannot go on."""

import ast
import difflib
import errno
import logging
import os
import re
import runpy
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from latent_delib.errors import INTERRUPTED, LOST, Outage, UserError, no_memory

STOPPED = 75  # the exit code of a command that SIGTERM stopped, and that saved: run it again to go on
UNREAD = 128 + signal.SIGPIPE  # the exit code where nobody reads what is printed any more: `| head`
REQUIRED = object()
CONFIG = object()
FOLDERS = object()

ROOT = Path(__file__).parents[2]  # of the repository, where configs/ lies
TEXTS = ("prompt", "stop", "text")  # the flags that are text; in every other a leading ~ is the home folder
HOME = re.compile(r"^(files:|lines:|)(~[^/]*)")
NOISE = re.compile("Requested `tracked_metric`")  # Orbax warns of this in every run
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EPIPE)


class _Parser(flags.ArgumentParser):
    """Another parser, with an error that says what was expected."""

    def __init__(self, parser: flags.ArgumentParser, expected: str):
        self.parser, self.expected = parser, expected

    def parse(self, argument: Any) -> Any:
        try:
            return self.parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"expected {self.expected}, found {argument!r}") from None


class _Tuple(flags.ArgumentParser):
    """Reads "('A', 'B')", or one string without quotes."""

    def parse(self, argument: Any) -> tuple:
        value = argument
        if isinstance(argument, str):
            try:
                value = ast.literal_eval(argument)
            except (SyntaxError, ValueError):
                if "," in argument:
                    raise ValueError("one string, or two?") from None
        return tuple(value) if isinstance(value, tuple | list) else (value,)


PARSERS = {
    bool: _Parser(flags.BooleanParser(), "True or False"),
    int: _Parser(flags.IntegerParser(), "a whole number"),
    float: _Parser(flags.FloatParser(), "a number"),
    str: flags.ArgumentParser(),
    tuple: _Parser(_Tuple(), "one value, or several like \"('A', 'B')\""),
}
for _kind, _parser in PARSERS.items():  # of keys; with these the last of two tuples counts, as of everything else
    config_flags.register_flag_parser_for_type(_kind, _parser)


def run(main: Callable[[Any], None], doc: str, **options: tuple[Any, str]) -> None:
    """Parses the command line, calls `main(values)` and exits: with 1 for a user's mistake or a failed disk,
    with LOST for a store that does not answer, INTERRUPTED for Ctrl-C, UNREAD for a closed pipe.

    Args:
      main: gets the values as attributes.
      doc: printed by --help.
      options: flag name -> (default, help). The default gives the type; REQUIRED is a string that must be given,
        CONFIG a config file whose keys can be overridden as --NAME.key=value, None an integer that may be left out,
        FOLDERS the list of what stands on the command line without a flag: at least one.
    """
    _settle()
    values = flags.FlagValues()
    try:
        if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
            print(_help(doc, options))
        else:
            _parse(values, options)
            main(values)
        _flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Outage as error:
        print(f"error: {error.filename}: {error.strerror}; run again to go on", file=sys.stderr)
        sys.exit(LOST)
    except OSError as error:
        _end(error, values)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if line := _of_jax(error):
            sys.exit(f"error: {line}")
        raise


def _settle() -> None:
    """Makes the process one whose last line is the error.

    What libraries log of a failure on the way is also raised; their other warnings are left alone. After a failed
    write, tensorstore's threads go on reporting to event loops that orbax has closed, with coroutines in them that it
    never came to.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # until here Ctrl-C ends the process: see __init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # text that the terminal cannot show
    logging.basicConfig()  # a handler, where no library has made one
    for handler in logging.root.handlers:
        handler.addFilter(_is_news)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    sys.unraisablehook = _unraisable
    flags.FLAGS(sys.argv[:1])  # seqio reads absl's own flags and wants them parsed


def _is_news(record: logging.LogRecord) -> bool:
    """Tells whether a record says more than every run does. What Orbax logs as an error it also raises."""
    of_orbax = record.name == "asyncio" or "orbax" in Path(record.pathname).parts
    raised = of_orbax and record.levelno >= logging.ERROR
    return not raised and not NOISE.search(str(record.msg))


def _unraisable(lost: Any) -> None:
    """Raises Ctrl-C again where Python drops it, as in a callback of a library that is being imported."""
    if issubclass(lost.exc_type, KeyboardInterrupt):  # from a thread, or it would be dropped again
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()


def _help(doc: str, options: dict[str, tuple[Any, str]]) -> str:
    rows = "\n".join(f"  {_shown(name, default)}: {text}" for name, (default, text) in options.items())
    return f"{doc.strip()}\n\nflags:\n{rows}"


def _shown(name: str, default: Any) -> str:
    return "DIR" if default is FOLDERS else f"--{name}"


def _parse(values: flags.FlagValues, options: dict[str, tuple[Any, str]]) -> None:
    """Parses sys.argv into `values`, and runs the config files it names.

    Raises:
      UserError: a flag, key or value that is wrong, one that is missing, or a config file that fails.
    """
    shown = {name: _shown(name, default) for name, (default, _) in options.items()}
    configs = [name for name, (default, _) in options.items() if default is CONFIG]
    for name, (default, text) in options.items():
        if default is not FOLDERS:
            _define(values, name, default, text)
    try:
        rest = values(sys.argv, known_only=True)[1:]
        for name in configs:
            if values[name].value:
                config = _load(name, values[name].value)
                rest = _override(name, config, rest)
                values[name].value = _expand_home(config)
    except flags.Error as error:
        raise UserError(str(error).removeprefix("flag ")) from None

    _refuse_unknown(rest, values, configs, list(shown.values()))
    for name, (default, text) in options.items():
        if default is FOLDERS:  # parsing is over, so this makes no flag
            flags.DEFINE_multi_string(name, [_expand_home(x) for x in rest] or None, text, flag_values=values)
            rest = []
        elif isinstance(values[name].value, str) and name not in TEXTS:
            values[name].value = _expand_home(values[name].value)
    for name, (default, text) in options.items():
        if default in (REQUIRED, CONFIG, FOLDERS) and values[name].value in (None, ""):
            raise UserError(f"{shown[name]} is missing: {text}")
    if rest:
        expected = f"; expected flags alone: {', '.join(shown.values())}" if shown else ""
        raise UserError(f"unexpected argument {rest[0]!r}{expected}")


def _refuse_unknown(arguments: list[str], values: flags.FlagValues, configs: list[str], shown: list[str]) -> None:
    """Raises UserError for what is left of the arguments and looks like a flag."""
    known = list(values)
    for name in configs:
        if values[name].value:
            known += [f"{name}.{key}" for key in _keys(values[name].value)]
    for argument in arguments:
        given = argument.partition("=")[0]
        without_file = any(given.startswith(f"--{name}.") for name in configs)  # of a config file that is missing
        if argument.startswith("-") and not without_file:
            meant = _did_you_mean(given.lstrip("-"), known) or f"; there are {', '.join(shown)}"
            raise UserError(f"{given}: no such flag{meant}")


def _define(values: flags.FlagValues, name: str, default: Any, text: str) -> None:
    if default is REQUIRED or default is CONFIG:
        kind, default = str, None
    else:
        kind = int if default is None else type(default)
    flag = flags.Flag(PARSERS[kind], None, name, default, text, boolean=kind is bool)
    flags.DEFINE_flag(flag, values)


def _load(name: str, given: str) -> ConfigDict:
    """Returns what get_config() of a config file returns; FILE.py:ARGUMENT gives it one.

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
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        text = " ".join(str(error).replace(r"\n", " ").split())
        text = re.sub("'?(Key .*?) Other fields present: .*(Did you mean .*?)'?$", r"\1 \2", text)
        raise UserError(f"{where}: {kind}{text}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returns {type(config).__name__}, expected a ConfigDict")
    return config


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
    """The known name most like a given one: that ends alike, or that differs in few letters."""
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


def _flush() -> None:
    """Writes what is still to be printed; a process started without a standard output has none."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _end(error: OSError, values: flags.FlagValues) -> None:
    """Exits for a disk or a network that failed, or for an output that nobody reads."""
    if isinstance(error, BrokenPipeError) and _unread():
        sys.stdout = None  # or Python tries again as it ends, and tells of it
        sys.exit(UNREAD)
    text = " ".join(str(error.strerror or error).split())
    if error.filename:
        sys.exit(f"error: {_of_file(error, Path(os.fsdecode(error.filename))) or f'{error.filename}: {text}'}")
    if error.errno in UNWRITTEN:
        flagged = [name for name in ("out", "workdir") if name in values and values[name].value]
        written = [f"--{name}={values[name].value}" for name in flagged]
        text = f"{text}, writing to {' or '.join([*written, 'standard output'])}"
    sys.exit(f"error: {text}")


def _of_file(error: OSError, path: Path) -> str:
    """Returns what is wrong where a file and a folder were mistaken for each other, else ""."""
    files = [above for above in (path, *path.parents) if above.is_file()]
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and files:
        return f"{files[0]}: is a file, expected a folder"
    if error.errno == errno.EISDIR:
        return f"{path}: is a folder, expected a file"
    return ""


def _unread() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def _of_jax(error: Exception) -> str:
    """Returns one line where memory is short, or where JAX finds no device; "" for a bug."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, MemoryError):
        return f"out of memory: {text or 'none is left'}"
    if line := no_memory(error):
        return (
            f"{line}; take fewer rows at once (evaluation: config.evaluate.batch_size and positions; others: "
            "--batch_size), or more devices (config.mesh)"
        )
    none_found = isinstance(error, AssertionError) and frames and "xla_bridge" in frames[-1].filename
    if none_found or text.startswith("Unable to initialize backend"):
        wanted = os.environ.get("JAX_PLATFORMS", "(unset)")
        why = re.sub(r"^Unable to initialize backend '\w+': | \(set JAX_PLATFORMS=.*", "", text).rstrip(".")
        why = why or "JAX finds no such platform here"
        return f"JAX_PLATFORMS={wanted}: {why}; unset it, or install what it needs (launch/setup.sh)"
    return ""
