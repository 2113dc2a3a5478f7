"""The exception for input that the user can fix, and error messages of one line."""
import contextlib


class BadInput(ValueError):
    """Input that the user can fix. Scripts print its one line and exit with status 2 (see command_line.run_script)."""


def one_line(error: BaseException) -> str:
    """Return the type and the message of an exception on one line, the message cut to 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def brief(problems: list[str]) -> str:
    """Return the first three problems, and the number of the others."""
    return "; ".join(problems[:3]) + (f" (and {len(problems) - 3} more)" if problems[3:] else "")


@contextlib.contextmanager
def refused(what: str, remedy: str = "", errors=Exception):
    """Raise BadInput, "what (reason)remedy", in place of such errors in the block. BadInput itself passes unchanged."""
    try:
        yield
    except BadInput:
        raise
    except errors as error:
        reason = isinstance(error, OSError) and error.strerror or one_line(error)
        raise BadInput(f"{what} ({reason}){remedy}") from error
