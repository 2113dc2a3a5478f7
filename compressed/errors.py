"""The one exception for input that the user can mend."""


class BadInput(ValueError):
    """Input that the user can mend. Scripts print its one line and exit with status 2 (see scripts.run_script)."""
