"""Read a recipe: a TOML file with the options of every stage of a run.

    network = "mobilenet_v2:SmallMobileNetV2"     options of all stages come first,
    batch-size = 128

    [pretrain]                                    then a table for each stage: pretrain, rew, masked (training/main.py)
    epochs = 240                                  and quantized (quantize.py)

Options have the names of the command line. `true` means --option; `false` means --no-option, or nothing if there is no
such option; a list holds the values of an option that takes several. The command line overrides the recipe, and an
option there removes the options of the recipe that it excludes. Options that select the images or the device must be
common to all stages. Options of a single command, such as --start, are refused.
"""
import argparse
from pathlib import Path

from compressed.errors import BadInput
from compressed.files import find_toml, load_toml
from training import plan, runs, sparsity

FOLDER = Path(__file__).resolve().parent / "recipes"
STAGES = (*runs.STAGES, "quantized")
OF_A_COMMAND = ("help", "pretrain", "rew", "masked_retrain", "recipe", "run", "start", "start_epoch", "resume",
                "max_minutes")
OF_ALL_STAGES = ("data", "holdout", "made_up", "no_cuda")
# {option of the command line: options of a recipe that it excludes, whatever its value}; see `excluded` for others
EXCLUDED = {"lam": ["target_sparsity"], "target_sparsity": ["lam"], "mixup": ["mixing"], "mixing": ["mixup"],
            "holdout": ["made_up"], "made_up": ["holdout", "data"], "data": ["made_up"], "warmup_epochs": ["warmup"],
            "smoothing": ["smooth"]}
# what --no-tricks means, so that an option of the command line stands above one part of it in a recipe
NO_TRICKS = {"mixing": "none", "mixup": None, "smoothing": 0.0, "warmup": False, "schedule": "constant", "cooldown": 0}


def path_of(name: str | None, folder: Path) -> Path | None:
    """Return the path of a recipe: a file, or a name in training/recipes; without a name, a run folder's, or None.

    Raises BadInput if there is none of this name.
    """
    kept = folder / "recipe.toml"
    return find_toml(name, FOLDER, "recipe") if name else kept if kept.is_file() else None


def take_images(args: argparse.Namespace, path: Path | None) -> None:
    """Set the options of the images (datasets.add_options) in `args` to the recipe's, as far as they go together."""
    common = read(path)["common"] if path else {}
    data, holdout, made_up = args.data, args.holdout, args.made_up
    if "data" in common and not made_up:
        args.data = data or Path(str(common["data"]))
    args.holdout = bool(holdout or common.get("holdout") and not made_up)
    args.made_up = made_up or (None if data or holdout else common.get("made-up"))


def read(path: Path) -> dict[str, dict]:
    """Return {stage: {option: value}} of a recipe, and under "common" the options of all stages.

    Raises BadInput for a file that is not TOML, and for tables that are not stages.
    """
    content = load_toml(path)
    tables = {key: content.pop(key) for key, value in list(content.items()) if isinstance(value, dict)}
    if unknown := sorted(tables.keys() - set(STAGES)):
        raise BadInput(f"{path}: there is no stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    return dict.fromkeys(STAGES, {}) | tables | {"common": content}


def words(recipe: dict[str, dict], stage: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a stage, or of "common", as words of a command line.

    Raises BadInput for an option that the parser does not know, or that cannot stand there. Of the common options
    quantize.py takes those that it knows.
    """
    line, options = [], recipe["common"] | recipe[stage]
    if stage == "quantized":  # quantize.py does not know the submission's names
        mixup = {} if "mixup" not in options else {"mixing": "mixup" if options.pop("mixup") else "none"}
        options = {plan.SUBMISSIONS.get(name, name): value for name, value in (mixup | options).items()}
    for name, value in options.items():
        if f"--{name}" not in parser._option_string_actions:
            if stage == "quantized" and name not in recipe[stage]:
                continue
            raise BadInput(f"the recipe has an unknown option {name!r} ({stage})")
        action = parser._option_string_actions[f"--{name}"]
        option = action.dest
        if option in OF_A_COMMAND:
            raise BadInput(f"the recipe has the option {name!r}, which belongs to one command: give it there instead")
        if option in OF_ALL_STAGES and stage in runs.STAGES and name in recipe[stage]:
            raise BadInput(f"the recipe's table [{stage}] has the option {name!r}, which is for all stages: move it to "
                           "the top")
        if isinstance(value, bool):
            plain_flag = action.nargs == 0 and f"--no-{name}" not in parser._option_string_actions
            if value or not plain_flag:  # `false` leaves out a flag that has no opposite
                line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def given(parser: argparse.ArgumentParser, argv=None) -> dict:
    """Return {option: value} of the options on a command line alone, without defaults."""
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not absent}


def excluded(name: str, value) -> list[str]:
    """Return the options of a recipe that an option of the command line excludes."""
    if name == "penalty":
        return sparsity.not_taken(value)
    if name == "smooth":
        return ["smoothing"] if value else []
    if name == "schedule":
        return [] if value == "constant" else ["cooldown"]
    if name == "sparsity_type":
        return ["target_sparsity"] if value == "threshold" else []
    return EXCLUDED.get(name, [])


def merged(parser: argparse.ArgumentParser, ours: dict, recipe: dict[str, dict] | None, stage: str):
    """Return all options of a stage, or of "common": `ours` (see `given`), else the recipe's, else the defaults.

    An option of ours removes the recipe's options that it excludes. If ours changes the optimizer from Adam to SGD or
    Muon, or back, the recipe's learning rate is dropped, too: it would be wrong by orders of magnitude. Lambda is the
    penalty's, so the masked stage keeps the recipe's target.
    """
    def refuse(message):
        raise BadInput(f"the recipe's options of {stage}: {message}")
    command_lines, parser.error = parser.error, refuse
    theirs = given(parser, words(recipe, stage, parser)) if recipe else {}
    parser.error = command_lines
    if stage == "masked" and "target_sparsity" in theirs:
        ours = {name: value for name, value in ours.items() if name != "lam"}
    dropped = {other for name, value in ours.items() for other in excluded(name, value)}
    optimizers = theirs.get("optimizer"), ours.get("optimizer", theirs.get("optimizer"))
    if [each == "adam" for each in optimizers] in ([True, False], [False, True]):
        dropped.add("lr")
    if theirs.pop("no_tricks", False):
        theirs |= NO_TRICKS
    theirs = {name: value for name, value in theirs.items() if name not in dropped}
    return argparse.Namespace(**vars(parser.parse_args([])) | theirs | ours)
