"""Verify checkpoints: run testers.py, then check_model_operations.py, and see whether both agree with the claim.

    python -m tools.verify                   every shipped network: that at the repository's root, and those in folders
                                             of their own, such as kaist/
    python -m tools.verify --checkpoint F    another checkpoint; further options go to testers.py

Exit status 0: everything was verified. 2: something contradicts a claim, or could not be verified.
"""
import sys
from pathlib import Path

from compressed.command_line import command_line, parse_own, run_python, run_script, some_file, some_text

ROOT = Path(__file__).resolve().parent.parent  # not from a module that imports torch: the scripts load it themselves
SHIPPED = "cifar100_mobilenetv2.pt"


def verify(checkpoint: Path, words: list[str], network: list[str]) -> int:
    """Run both scripts on a checkpoint; return 0 if it was verified, else the exit status of the last that failed.

    words: options of testers.py. network: of both scripts.
    """
    options = "--checkpoint", checkpoint, *network
    status = run_python(ROOT / "testers.py", *options, *words)
    if status in (0, 2):  # with any other status it came to no verdict
        print(flush=True)
        status = run_python(ROOT / "check_model_operations.py", *options) or status
    if not status and checkpoint.suffix != ".mnet" and not checkpoint.with_suffix(".json").is_file():
        print(f"verify.py: {checkpoint} has no claim: {checkpoint.with_suffix('.json')} is missing", file=sys.stderr)
        status = 2
    if status:
        print(f"verify.py: {checkpoint} is NOT verified in full, see above", file=sys.stderr)
    else:
        print(f"verify.py: verified {checkpoint}", flush=True)
    return status


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--checkpoint", type=some_file, metavar="F", help="(default: every shipped one)")
    parser.add_argument("--network", type=some_text, metavar="SPEC",
                        help="FILE.py:NAME, needed if the claim names code in a file")
    args, words = parse_own(parser, argv)
    shipped = [args.checkpoint] if args.checkpoint else [ROOT / SHIPPED, *sorted(ROOT.glob(f"*/{SHIPPED}"))]
    network = [] if args.network is None else ["--network", args.network]
    statuses = [verify(checkpoint, words, network) for checkpoint in shipped]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    run_script(main)
