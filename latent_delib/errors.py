"""The exceptions that the commands print as a single line."""

LOST = 69  # the exit code where another process is gone or a store does not answer: run it again to go on


class UserError(ValueError):
    """A mistake in what the user gave: names the field or file, what was found, what was expected.

    Names from damaged files may hold anything: what cannot be printed is escaped, so the message stays one line.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class Outage(OSError):
    """A store that does not answer, as (errno, text, filename): it may do so later, and nothing in it is damaged."""
