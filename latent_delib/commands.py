"""What every command line shares: flags without global state, and one clear line for a user's mistake."""

import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from latent_delib.errors import UserError

REQUIRED = object()
CONFIG = object()
DEFINE = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def run(main: Callable[[Any], None], doc: str, **options: tuple[Any, str]) -> None:
    """Parses the command line, calls `main(values)` and exits.

    Args:
      main: gets the values as attributes.
      doc: printed by --help.
      options: flag name -> (default, help). The default gives the type; REQUIRED is a string that must be given,
        CONFIG a config file whose keys can be overridden as --NAME.key=value, None an integer that may be left out.
    """
    values = flags.FlagValues()
    for name, (default, text) in options.items():
        if default is CONFIG:
            config_flags.DEFINE_config_file(name, None, text, lock_config=True, flag_values=values)
        elif default is REQUIRED:
            flags.DEFINE_string(name, None, text, flag_values=values)
        else:
            DEFINE[int if default is None else type(default)](name, default, text, flag_values=values)
    if {"--help", "-h", "--helpfull"} & set(sys.argv[1:]):
        rows = "\n".join(f"  --{name}: {text}" for name, (_, text) in options.items())
        print(f"{doc.strip()}\n\nflags:\n{rows}")
        sys.exit(0)

    logging.set_verbosity(logging.ERROR)
    flags.FLAGS(sys.argv[:1])  # seqio reads absl's own flags and wants them parsed
    try:
        try:
            rest = values(sys.argv)[1:]
        except Exception as error:  # ml_collections raises what it likes for a wrong key, type or file
            raise UserError(" ".join(str(error).split())) from None
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}; flags are {['--' + name for name in options]}")
        if absent := [n for n, (d, _) in options.items() if d in (REQUIRED, CONFIG) and values[n].value is None]:
            raise UserError(f"--{absent[0]} is missing: {options[absent[0]][1]}")
        main(values)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'disk'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
