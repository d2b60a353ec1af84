"""The exceptions that are meant for the person at the terminal."""


class UserError(Exception):
    """Something a user can put right. The message says what is wrong, where, and what to do."""


class DamagedFileError(UserError):
    """A file that is there and is not what this project writes."""
