"""Train all stages of a run, and ship its network if it is more accurate than the shipped one.

    python -m tools.train                      the run runs/default; after a stop, the same command resumes it
    python -m tools.train --run DIR ...        another run; further options go to training/main.py (see its --help)
    python -m tools.train --ship               ship the network whatever its accuracy

A new run uses the recipe training/recipes/default.toml, if that exists, unless --recipe names another. Only a network
of the default architecture that was tested on CIFAR-100's test set replaces the shipped one; for any other, the command
that ships it into a folder of its own is printed.
"""
import argparse
import shlex
from pathlib import Path

from compressed import cifar100, datasets, networks
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import command_line, parse_own, run_python, run_script, some_path, some_text
from tools import shipping
from training import recipes

ROOT = shipping.ROOT


def parse(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and the remaining words of the command line, which are for training/main.py.
    """
    parser = command_line(__doc__)
    parser.usage = "python -m tools.train [--run DIR] [--ship] [options of training/main.py]"
    parser.add_argument("--run-folder", "--run", dest="run", type=some_path, default=Path("runs/default"),
                        metavar="DIR", help="run folder (%(default)s)")
    parser.add_argument("--ship", action="store_true", help="replace the shipped files whatever the accuracy")
    parser.add_argument("--recipe", type=some_text, metavar="NAME",
                        help="recipe with the options of all stages, see training/main.py")
    networks.add_option(parser, "the recipe")
    parser.add_argument("--no-resume", action="store_true", help="train finished stages again")
    parser.add_argument("--no-cuda", action="store_true", help="use the CPU even if there is a CUDA device")
    datasets.add_options(parser)
    args, words = parse_own(parser, argv)
    began = any(args.run.glob("*.options.json")) or (args.run / "recipe.toml").is_file()
    if args.recipe is None and not began and (recipes.FOLDER / "default.toml").is_file():
        args.recipe = "default"
    path = recipes.path_of(args.recipe, args.run)
    recipes.take_images(args, path)
    args.given_network = args.network
    args.network = args.network or (path and recipes.read(path)["common"].get("network")) or networks.DEFAULT
    if args.ship and (why := not_shipped(args)):
        parser.error(f"--ship: {why}; {command_to_ship(args)} ships it")
    return args, words


def not_shipped(args) -> str | None:
    """Return why the network is not shipped here whatever its accuracy, in words; else None."""
    if args.network != networks.DEFAULT:
        return f"what is shipped is {networks.DEFAULT}"
    is_cifar100 = args.data is None or cifar100.holding(args.data, cifar100.SET, cifar100.COUNT)
    if args.made_up or args.holdout or not is_cifar100:
        return "the accuracy is not of CIFAR-100's test set"
    return None


def command_to_ship(args) -> str:
    """Return the command that ships the network of a run into a folder of its own."""
    return shlex.join(["bash", "run.sh", "ship", str(args.run), "--into", "FOLDER", *datasets.option_words(args)])


def announcement(args) -> str:
    """Return a sentence that says which files will be replaced after training, and on what condition."""
    shipped = shipping.shipped_accuracy(ROOT)
    if why := not_shipped(args):
        return f"nothing shipped is going to be replaced: {why}; then {command_to_ship(args)}"
    if args.ship:
        condition = "whatever its accuracy"
    elif shipped:
        condition = f"if more than {shipped['correct']} of {shipped['images']} test images are right"
    else:
        condition = "as there is none yet"
    names = ", ".join(sorted(path.name for path in ROOT.glob(Path(CHECKPOINT).stem + ".*"))) or CHECKPOINT
    return f"after training this replaces, {condition}: {names}, the logs and weights of its training in record/, " \
           "figures/, and the tables of README.md and the other pages"


def main(argv=None) -> int:
    args, words = parse(argv)
    data = datasets.option_words(args)
    again = ["--run-folder", str(args.run), *words, *data, *["--no-cuda"] * args.no_cuda,
             *(["--recipe", args.recipe] if args.recipe else []),
             *(["--network", args.given_network] if args.given_network else [])]
    print(f"train.py: {announcement(args)}", flush=True)
    go_on = f"train.py: not finished yet; to go on: bash run.sh train {shlex.join([*again, *['--ship'] * args.ship])}"
    try:
        status = run_python(ROOT / "training" / "main.py", *again, *["--no-resume"] * args.no_resume)
        finished = (args.run / "masked.pt").is_file()  # else --max-minutes stopped it, or the options name one stage
        if status == 0 and finished and not_shipped(args):
            print(f"train.py: trained; to ship it: {command_to_ship(args)}")
            return 0
        if status == 0 and finished:
            return run_python("-m", "tools.ship", args.run, *data, *["--no-cuda"] * args.no_cuda,
                              *["--if-better"] * (not args.ship))
    except KeyboardInterrupt:
        status = 130
    if status == 0 or status > 128:  # it was stopped
        print(go_on)
    return status


if __name__ == "__main__":
    run_script(main)
