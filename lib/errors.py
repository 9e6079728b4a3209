"""The one exception for mistakes a user can mend; the scripts print its message and leave with exit code 2."""


class UserError(Exception):
    """Says what is wrong, where, and what to do."""
