"""Tools around a compressed network: python -m tools.NAME."""
import sys

if sys.argv[0] == "-m":  # as long as Python looks for the module that it is to run
    import compressed.interrupt  # noqa: F401
