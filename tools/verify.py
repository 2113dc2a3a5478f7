"""Verify a checkpoint: testers.py, then check_model_operations.py, and whether both agree with its claim.

    python -m tools.verify                   the shipped checkpoint
    python -m tools.verify --checkpoint F    another one; further options go to testers.py

Exit status 0: verified in full. 2: something contradicts the claim, or could not be verified.
"""
import sys
from pathlib import Path

from compressed.command_line import command_line, parse_own, run_python, run_script, some_path

ROOT = Path(__file__).resolve().parent.parent  # not from a module that imports torch: the scripts load it themselves


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoint", type=some_path, metavar="F", help="(default: the shipped one)")
    args, words = parse_own(parser, argv)
    checkpoint = ("--checkpoint", args.checkpoint) if args.checkpoint else ()
    status = run_python(ROOT / "testers.py", *checkpoint, *words)
    if status in (0, 2):  # with any other status it came to no verdict
        print(flush=True)
        status = run_python(ROOT / "check_model_operations.py", *checkpoint) or status
    if status:
        print("verify.py: NOT verified in full, see above", file=sys.stderr)
    else:
        print("verify.py: verified")
    return status


if __name__ == "__main__":
    run_script(main)
