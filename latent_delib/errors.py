"""The one exception a user's mistake raises; the commands print it as a single line."""


class UserError(ValueError):
    """A mistake in what the user gave: names the field or file, what was found, what was expected.

    Names from damaged files may hold anything: what cannot be printed is escaped, so the message stays one line.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))
