"""Ship the masked network of a run: quantize, pack, execute, export and verify it, and copy its training record.

    python -m tools.ship                        the run runs/default, even if its training is not finished
    python -m tools.ship RUN --epochs 6 ...     another run; further options go to quantize.py
    python -m tools.ship RUN --into small       into the folder small/ instead of the repository's root; bash run.sh
                                                verifies every folder of the repository that holds a shipped network.
                                                For a network or data of your own, give a folder outside the
                                                repository or deeper in it, such as shipped/mine; the files
                                                there have the same names
    python -m tools.ship RUN --if-better        only if it is more accurate on the test set than the network that it
                                                would replace

Everything is made and verified in a new folder, and then replaces the shipped files. If anything fails, the old files
stay, and what was made so far is kept in RUN/candidate. It takes about twelve minutes on two cores, besides the
fine-tuning. The tables and figures of the pages describe the network at the root, and are renewed when it is replaced;
two tables and the board's figure show the others, too.
"""
import argparse
import dataclasses
import shlex
import shutil
import sys
from pathlib import Path

from compressed import cifar100, claims, datasets, networks
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import command_line, parse_own, run_script, some_path, some_text
from compressed.errors import BadInput
from compressed.files import sha256
from tools import shipping
from training import recipes
from training.runs import read_record, stage_logs

ROOT, CANDIDATE = shipping.ROOT, "candidate"


def parse(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and the remaining words of the command line, which are for quantize.py."""
    parser = command_line(__doc__)
    parser.usage = "python -m tools.ship [RUN] [--into DIR] [--if-better] [options of quantize.py]"
    parser.add_argument("--into", type=some_path, default=ROOT, metavar="DIR",
                        help="where the files are shipped to (default: the repository's root)")
    parser.add_argument("--if-better", action="store_true", help="ship it only if it is more accurate on the test set")
    parser.add_argument("--recipe", type=some_text, metavar="NAME", help="as for quantize.py (default: the run's own)")
    parser.add_argument("--checkpoint", "--out", "--tuning-folder", dest="refused", help=argparse.SUPPRESS)
    datasets.add_options(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    run = argv.pop(0) if argv and not argv[0].startswith("-") else "runs/default"
    args, words = parse_own(parser, argv)
    args.run = Path(run)
    words = [*(["--recipe", args.recipe] if args.recipe else []), *words]
    recipes.take_images(args, recipes.path_of(args.recipe, args.run))
    candidate = (args.run / CANDIDATE).resolve()
    if candidate in (args.into.resolve(), *args.into.resolve().parents):
        parser.error(f"--into {args.into}: what cannot be shipped is kept there; give another folder")
    if args.refused is not None:
        parser.error("RUN and --into choose what quantize.py reads and writes: no --checkpoint, --out, --tuning-folder")
    if not (args.run / "masked.average.pt").is_file():
        raise BadInput(f"{args.run / 'masked.average.pt'} is not there: this run has no masked network yet; train it "
                       "further with bash run.sh train")
    options = args.run / "masked.options.json"
    record = read_record(options, "give another run") if options.is_file() else {"options": {}}
    data = "hold-out" if args.holdout else "made up" if args.made_up else "test"
    why = misplaced(record["options"].get("network", networks.DEFAULT), data, record.get("data_set"), args.into)
    if why and not args.if_better:  # that makes it, and says why it is not shipped
        raise BadInput(why)
    return args, words


def misplaced(network: str, data: str, data_set: dict | None, into: Path) -> str | None:
    """Return why a network cannot be shipped into the folder `into`, in words; None if it can.

    bash run.sh verifies the root and the folders in it, and the board shows them. data, data_set: as in a claim.
    """
    if ROOT not in (into.resolve(), into.resolve().parent):
        return None
    elsewhere = "give --into a folder outside the repository, or deeper in it, such as shipped/mine"
    try:
        networks.followed(network, None)
    except BadInput:
        return f"{network} is not this repository's own code: {elsewhere}"
    if data != "test" or data_set not in (None, dataclasses.asdict(cifar100.CIFAR100)):
        return f"the accuracy is not that on CIFAR-100's test set: {elsewhere}"
    if network != networks.DEFAULT and into.resolve() == ROOT:
        return f"the pages at the repository's root are about {networks.DEFAULT}: give --into FOLDER for {network}"
    return None


def copy_record(run: Path, claim: dict, recipe: Path | None, record: Path) -> None:
    """Copy logs, options, recipe and masked weights of a run into a new folder `record`.

    The log of a fine-tuning is copied only if the claim names that stage: it may be left over from another attempt.
    Raises BadInput if the weights are no longer those that were quantized.
    """
    record.mkdir()
    stages = {stage["stage"] for stage in claim["made_by"]["training"]}
    logs = [log for log in stage_logs(run) if log.stem != "quantized" or "quantized" in stages]
    for path in (*logs, *(log.with_suffix(".options.json") for log in logs)):
        if path.is_file():
            shutil.copyfile(path, record / path.name)
    if recipe:
        shutil.copyfile(recipe, record / "recipe.toml")
    shutil.copyfile(run / "masked.average.pt", record / "masked.pt")  # what further training starts from
    if sha256(record / "masked.pt") != claim["made_by"]["source_sha256"]:
        raise BadInput(f"{run / 'masked.average.pt'} was replaced while it was quantized; ship it again")


def build(args, words: list[str], new: Path) -> str | None:
    """Make and verify, in the folder `new`, the checkpoint of args.run, its claim, packed file, ONNX model and record.

    Return why it is `misplaced` in args.into, which is an error without --if-better; else None.

    quantize.py reads the run's float16 weights, the same file that is copied to record/.
    """
    checkpoint, data = ("--checkpoint", new / CHECKPOINT), datasets.option_words(args)
    quantize = ["--checkpoint", str(args.run / "masked.average.pt"), *words, *data]
    shipping.run(ROOT / "quantize.py", *quantize, "--out", new / CHECKPOINT, "--tuning-folder", args.run)
    claim = claims.read(new / shipping.CLAIM)
    why = misplaced(claim["network"]["spec"], claim["accuracy"]["data"], claim.get("data_set"), args.into)
    if why and not args.if_better:
        raise BadInput(why)
    if args.into.resolve() != ROOT:
        quantize += ["--out", str(args.into / CHECKPOINT)]
    checkpoint += ("--network", claim["network"]["spec"])  # no script runs the code that a claim names without it
    claims.record(new / CHECKPOINT, "made_by",
                  claim["made_by"] | {"command": f"python quantize.py {shlex.join(quantize)}"}, claim)
    shipping.run("-m", "tools.pack", *checkpoint)
    shipping.run("-m", "tools.integer", "--record", *checkpoint, *data)
    shipping.run("-m", "tools.export_onnx", "--record", *checkpoint, *data)
    copy_record(args.run, claim, recipes.path_of(args.recipe, args.run), new / "record")
    shipping.run("-m", "tools.verify", *checkpoint, *data)
    return why


def keep(new: Path, candidate: Path) -> Path:
    """Move `new` to `candidate`, replacing what is there; return the new path. An error leaves what is there."""
    moved = candidate.with_name(f"{candidate.name}.new")
    shutil.rmtree(moved, ignore_errors=True)
    shutil.move(new, moved)  # a copy, where it is another file system
    shutil.rmtree(candidate, ignore_errors=True)
    return moved.rename(candidate)


def main(argv=None) -> int:
    args, words = parse(argv)
    shipped = shipping.shipped_accuracy(args.into) if args.if_better else None
    with shipping.staging(args.into) as new:
        try:
            why = build(args, words, new)
            if args.if_better and (objection := why or shipping.objection(shipping.shipped_accuracy(new), shipped)):
                kept = keep(new, args.run / CANDIDATE)
                again = shlex.join(word for word in (sys.argv[1:] if argv is None else argv) if word != "--if-better")
                print(f"ship.py: not shipped, {objection}; it is in {kept}, and bash run.sh ship {again} ships it")
                return 0
            if args.into.resolve() == ROOT:
                for name in () if shipping.freed(ROOT / "record") else shipping.BASELINE:
                    if (ROOT / "record" / name).is_file():  # of the tables, too
                        shutil.copy2(ROOT / "record" / name, new / "record")
                shipping.run("-m", "tools.report", "--checkpoint", new / CHECKPOINT, "--logs", new / "record",
                             "--to", new)
            shipping.install(new, args.into)
        except (BadInput, OSError) as error:
            if not (new / CHECKPOINT).is_file():
                raise
            raise BadInput(f"{error}; what was made is in {keep(new, args.run / CANDIDATE)}") from error
    print(f"ship.py: shipped {args.into / CHECKPOINT}")
    if args.into.resolve().parent == ROOT:
        print("ship.py: python -m tools.report adds it to the tables and the board")
    return 0


if __name__ == "__main__":
    run_script(main)
