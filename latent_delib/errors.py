"""The one exception a user's mistake raises; the commands print it as a single line."""


class UserError(ValueError):
    """A mistake in what the user gave: names the field or file, what was found, what was expected."""
