"""What every command line shares: flags without global state, and one clear line for a user's mistake."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from latent_delib.errors import LOST, Outage, UserError

STOPPED = 75  # the exit code of a command that SIGTERM stopped, and that saved: run it again to go on
REQUIRED = object()
CONFIG = object()
FOLDERS = object()
DEFINE = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def run(main: Callable[[Any], None], doc: str, **options: tuple[Any, str]) -> None:
    """Parses the command line, calls `main(values)` and exits: with 1 for a user's mistake or a failed disk,
    with LOST for a store that does not answer.

    Args:
      main: gets the values as attributes.
      doc: printed by --help.
      options: flag name -> (default, help). The default gives the type; REQUIRED is a string that must be given,
        CONFIG a config file whose keys can be overridden as --NAME.key=value, None an integer that may be left out,
        FOLDERS the list of what stands on the command line without a flag: at least one.
    """
    values = flags.FlagValues()
    for name, (default, text) in options.items():
        if default is CONFIG:
            config_flags.DEFINE_config_file(name, None, text, lock_config=True, flag_values=values)
        elif default is REQUIRED:
            flags.DEFINE_string(name, None, text, flag_values=values)
        elif default is not FOLDERS:
            DEFINE[int if default is None else type(default)](name, default, text, flag_values=values)
    shown = {name: "DIR" if default is FOLDERS else f"--{name}" for name, (default, _) in options.items()}
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        rows = "\n".join(f"  {shown[name]}: {text}" for name, (_, text) in options.items())
        print(f"{doc.strip()}\n\nflags:\n{rows}")
        sys.exit(0)

    _quiet()
    flags.FLAGS(sys.argv[:1])  # seqio reads absl's own flags and wants them parsed
    try:
        rest = _parse(values, [name for name, (default, _) in options.items() if default is CONFIG])
        for name, (default, text) in options.items():
            if default is FOLDERS:  # parsing is over, so this makes no flag
                flags.DEFINE_multi_string(name, rest or None, text, flag_values=values)
                rest = []
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags are {list(shown.values())}")
        needed = (REQUIRED, CONFIG, FOLDERS)
        if absent := [n for n, (default, _) in options.items() if default in needed and values[n].value in (None, "")]:
            raise UserError(f"{shown[absent[0]]} is missing: {options[absent[0]][1]}")
        main(values)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Outage as error:
        print(f"error: {error.filename}: {error.strerror}; run again to go on", file=sys.stderr)
        sys.exit(LOST)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'disk'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _quiet() -> None:
    """Leaves the error line alone on the screen: what libraries log of a failure on the way is also raised.

    After a failed write, tensorstore's threads go on reporting to event loops that orbax has closed, with coroutines in
    them that it never came to.
    """
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
    sys.unraisablehook = lambda _: None


def _parse(values: flags.FlagValues, configs: list[str]) -> list[str]:
    """Parses sys.argv, loads the config files it names, and returns what is left over."""
    for argument in sys.argv[1:]:
        name, given, path = argument.removeprefix("--").partition("=")
        path = path.partition(":")[0]  # FILE.py:ARGUMENT gives get_config one
        if name in configs and given and not os.path.isfile(path):
            raise UserError(f"{argument}: no such file")
    try:
        rest = values(sys.argv)[1:]
        for name in configs:
            getattr(values, name)  # a config file is run at its first use
        return rest
    except (KeyError, AttributeError) as error:  # all that ml_collections says of an unknown key is its last part
        key = re.findall(r"\w+", str(error.args[0]))[0]
        given = [a for a in sys.argv[1:] if key in a.split("=")[0].split(".")] or [key]
        raise UserError(f"{given[0]}: no such key; the config file and configs/base.py declare all there are") from None
    except Exception as error:  # and it raises what it likes for a wrong type or a file that fails
        text = re.sub(r"(?s)Error whilst parsing config file:\s+Traceback .*\n(?=\S)", "", str(error))
        raise UserError(" ".join(text.split())) from None
