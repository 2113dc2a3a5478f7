"""Read a recipe: a TOML file with the options of every stage of a run.

    network = "mobilenet_v2:SmallMobileNetV2"     options of all stages come first,
    batch-size = 128

    [pretrain]                                    then a table for each stage: pretrain, rew, masked (training/main.py)
    epochs = 240                                  and quantized (quantize.py)

Options have the names of the command line. `true` gives --option, `false` --no-option, a list an option's several
values. The command line overrides the recipe.
"""
import argparse
from pathlib import Path

from compressed.errors import BadInput
from compressed.files import load_toml

FOLDER = Path(__file__).resolve().parent / "recipes"
STAGES = ("pretrain", "rew", "masked", "quantized")


def find(name) -> Path:
    """Return the path of a recipe: a file, or a name in training/recipes. Raises BadInput if there is none."""
    for path in (Path(name), FOLDER / f"{name}.toml", FOLDER / name):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
    raise BadInput(f"there is no recipe {name}; give a TOML file, or one of those in training/recipes: {known}")


def read(name) -> dict[str, dict]:
    """Return {stage: {option: value}} of a recipe (see `find`), and under "common" the options of all stages.

    Raises BadInput for a file that is not TOML, and for tables that are not stages.
    """
    path = find(name)
    content = load_toml(path)
    tables = {key: content.pop(key) for key, value in list(content.items()) if isinstance(value, dict)}
    if unknown := sorted(tables.keys() - set(STAGES)):
        raise BadInput(f"{path}: there is no stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    return dict.fromkeys(STAGES, {}) | tables | {"common": content}


def words(recipe: dict[str, dict], stage: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return a stage's options as words of a command line.

    Raises BadInput for an option that the parser does not know; of the common ones quantize.py takes those it knows.
    """
    line = []
    for name, value in (recipe["common"] | recipe[stage]).items():
        if f"--{name}" not in parser._option_string_actions:
            if stage == "quantized" and name not in recipe[stage]:
                continue
            raise BadInput(f"the recipe's stage {stage} has an unknown option {name!r}")
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line
