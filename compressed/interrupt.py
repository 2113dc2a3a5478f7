"""Let Ctrl-C end a script with one line while it imports torch, which takes seconds. Scripts import this first.

Python's own handler would raise KeyboardInterrupt somewhere in torch's files, some of which ignore it.
`command_line.run_script` puts that handler back.
"""
import signal

from compressed.command_line import end_at_once

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as by a shell in the background
    signal.signal(signal.SIGINT, end_at_once)
