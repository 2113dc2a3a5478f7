"""Prepare a script for importing torch, which takes seconds, and may be missing. Scripts import this first.

Ctrl-C ends the script with one line meanwhile: Python's own handler would raise KeyboardInterrupt somewhere in torch's
files, some of which ignore it. `command_line.run_script` puts that handler back.
"""
import importlib.util
import os
import signal
import sys

lacking = "Python is older than 3.11" if sys.version_info < (3, 11) else "torch is not installed for this Python"
if sys.version_info < (3, 11) or importlib.util.find_spec("torch") is None:
    print(f"{os.path.basename(sys.argv[0])}: {lacking} ({sys.executable}): bash run.sh setup installs all that is "
          "needed; then: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)

from compressed.command_line import end_at_once  # noqa: E402  (an older Python cannot import it)

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as by a shell in the background
    signal.signal(signal.SIGINT, end_at_once)
