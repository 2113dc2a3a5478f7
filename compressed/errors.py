"""The exception for input that the user can mend, and the wording of errors in one line."""


class BadInput(ValueError):
    """Input that the user can mend. Scripts print its one line and exit with status 2 (see command_line.run_script)."""


def one_line(error: BaseException) -> str:
    """Return the type and the message of an exception on one line, the message cut to 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")
