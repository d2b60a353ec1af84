"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """Something a user can put right. The message says what is wrong, where, and what to do."""
