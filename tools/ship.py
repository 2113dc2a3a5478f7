"""Ship the masked network of a run: quantize it, pack, execute and export it, record how it was trained, verify it all.

    python -m tools.ship                        runs/default, finished or as its last stop left it
    python -m tools.ship RUN --epochs 6 ...     another run; further options go to quantize.py
    python -m tools.ship RUN --into small       into a folder of its own, which then holds a checkpoint and its record/
    python -m tools.ship RUN --if-better        only if it is more accurate on the test set than the shipped network

Everything is made and verified in a new folder first. The shipped files are replaced once all of it is there, and stay
as they are if anything fails. What is made but not shipped is kept in RUN/candidate. Some twelve minutes on two cores.
The figures and the tables of the pages are those of the network at the repository's root.
"""
import argparse
import shlex
import shutil
import sys
from pathlib import Path

from compressed import cifar100, claims, shipping
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import command_line, parse_own, run_python, run_script, some_path
from compressed.errors import BadInput
from training.runs import stage_logs

ROOT = shipping.ROOT


def parse(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and the words for quantize.py."""
    parser = command_line(__doc__)
    parser.usage = "python -m tools.ship [RUN] [--into DIR] [--if-better] [options of quantize.py]"
    parser.add_argument("--into", type=some_path, default=ROOT, metavar="DIR",
                        help="where the files are shipped to (default: the repository's root)")
    parser.add_argument("--if-better", action="store_true", help="ship nothing that is not more accurate")
    parser.add_argument("--checkpoint", "--out", "--tuning-folder", dest="refused", help=argparse.SUPPRESS)
    cifar100.add_options(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    run = argv.pop(0) if argv and not argv[0].startswith("-") else "runs/default"
    args, words = parse_own(parser, argv)
    args.run = Path(run)
    if args.refused is not None:
        parser.error("RUN and --into choose what quantize.py reads and writes: no --checkpoint, --out, --tuning-folder")
    if not (args.run / "masked.average.pt").is_file():
        raise BadInput(f"{args.run / 'masked.average.pt'} is not there: this run has no masked network yet; train it "
                       "further with bash run.sh train")
    return args, words


def run_all(*commands) -> None:
    """Run commands one after the other. Raises BadInput after the first that fails."""
    for command in commands:
        if status := run_python(*command):
            raise BadInput(f"{Path(command[command[0] == '-m']).name} ended with status {status}, see above; "
                           "nothing was replaced")


def build(args, words: list[str], new: Path) -> None:
    """Make the checkpoint of args.run with all that belongs to it in the folder `new`, and verify it.

    quantize.py gets the weights in float16: the file that goes to record/ is the one that is quantized.
    """
    checkpoint, data = ("--checkpoint", new / CHECKPOINT), cifar100.option_words(args)
    quantize = ["--checkpoint", str(args.run / "masked.average.pt"), *words, *data]
    run_all((ROOT / "quantize.py", *quantize, "--out", new / CHECKPOINT, "--tuning-folder", args.run))
    claim = claims.read(new / shipping.CLAIM)
    if args.into.resolve() != ROOT:
        quantize += ["--out", str(args.into / CHECKPOINT)]
    claims.record(new / CHECKPOINT, "made_by",
                  claim["made_by"] | {"command": f"python quantize.py {shlex.join(quantize)}"})
    run_all(("-m", "tools.pack", *checkpoint),
            ("-m", "tools.integer", "--record", *checkpoint, *data),
            ("-m", "tools.export_onnx", "--record", *checkpoint, *data))
    shipping.copy_record(args.run, stage_logs(args.run), claim, new / "record")
    run_all(("-m", "tools.verify", *checkpoint, *data))


def describe(new: Path) -> None:
    """Add to `new` what the repository says of its network: history, figures, and pages with their tables."""
    record = ROOT / "record"
    replaced = shipping.of_a_run(record)
    for path in record.glob("*"):
        if path.is_file() and path not in replaced:
            shutil.copy2(path, new / "record" / path.name)
    run_all(("-m", "tools.report", "--record", "--checkpoint", new / CHECKPOINT, "--logs", new / "record", "--to", new))


def keep(new: Path, candidate: Path) -> Path:
    """Move what was made into a run's folder, in place of what was kept there before. Returns where it is."""
    if candidate.exists():
        shutil.move(candidate, new.parent / "candidate")
    return Path(shutil.move(new, candidate))


def main(argv=None) -> int:
    args, words = parse(argv)
    shipped = shipping.shipped_accuracy(args.into) if args.if_better else None
    with shipping.staging(args.into) as new:
        build(args, words, new)
        objection = args.if_better and shipping.objection(shipping.shipped_accuracy(new), shipped)
        if objection:
            kept = keep(new, args.run / "candidate")
            print(f"ship.py: not shipped, {objection}; it is in {kept}, and bash run.sh ship {args.run} ships it")
            return 0
        try:
            if args.into.resolve() == ROOT:
                describe(new)
            stays = {path.name for path in (new / "record").iterdir()}
            shipping.install(new, args.into, [path.relative_to(args.into) for path in
                                              shipping.of_a_run(args.into / "record") if path.name not in stays])
        except (BadInput, OSError) as error:
            raise BadInput(f"{error}; what was made is in {keep(new, args.run / 'candidate')}") from error
    print(f"ship.py: shipped {args.into / CHECKPOINT}")
    return 0


if __name__ == "__main__":
    run_script(main)
