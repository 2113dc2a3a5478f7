"""Read run folders: the logs and options that stages leave (see main.py for the files of a run)."""
import dataclasses
from pathlib import Path

from compressed.errors import BadInput
from compressed.files import load_lines, load_record
from training.state import MACHINE

STAGES = ("pretrain", "rew", "masked")  # of training/main.py; quantize.py adds the stage "quantized"
# {option that is no setting but decides a result: the stages whose result it decides}
DECISIVE = {**dict.fromkeys(("network", "teacher", "made_up", "holdout"), STAGES),
            **dict.fromkeys(("penalty", "lam", "eps", "cost_power", "updates"), ("rew",)),
            **dict.fromkeys(("sparsity_type", "config_file", "target_sparsity"), ("rew", "masked")),
            "threshold": ("masked",), **dict.fromkeys(("grids", "frozen", "teachers"), ("quantized",))}
REMEDY = "remove it, or restore it"


def stage_logs(folder) -> list[Path]:
    """Return the paths of a run folder's logs, in the order of training.

    masked-1, masked-2, ... are repetitions of the masked stage before the last one, which is named masked.
    """
    numbers = sorted(int(path.stem[7:]) for path in Path(folder).glob("masked-*.jsonl") if path.stem[7:].isdecimal())
    stages = ("pretrain", "rew", *(f"masked-{number}" for number in numbers), "masked", "quantized")
    return [path for path in (Path(folder, f"{stage}.jsonl") for stage in stages) if path.is_file()]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Hold what a stage has left: its log (one dict an epoch), settings, and further options, in plain values."""
    name: str
    lines: list[dict]
    settings: dict
    options: dict

    @property
    def images(self) -> int:
        """Return the number of images that it was trained on so far, every epoch's counted."""
        return self.images_at(self.lines[-1])

    def images_at(self, line: dict) -> int:
        return line["step"] * self.settings["batch_size"]

    def apart_from_seed(self) -> dict:
        """Return what decides the stage's result but for its seed, as far as its folder records it."""
        kept = {key: value for key, value in self.settings.items() if key not in (*MACHINE, "seed")}
        for key, value in self.options.items():
            if key in DECISIVE:
                kept[key] = {name: v for name, v in value.items() if name != "seed"} if key == "grids" else value
        return kept


def read_stages(folder) -> list[Stage]:
    """Return the stages of a run folder, in the order of training. Raises BadInput for damaged files.

    Stages without an epoch in their log, or without their options, are left out.
    """
    stages = []
    for log in stage_logs(folder):
        options = log.with_suffix(".options.json")
        lines = load_lines(log)
        if not lines or not options.is_file():
            continue
        record = load_record(options, REMEDY)
        settings, others = record.get("settings"), record.get("options")
        if not isinstance(settings, dict) or not isinstance(others, dict) or "batch_size" not in settings:
            raise BadInput(f"{options}: not what a stage writes; {REMEDY}")
        stages.append(Stage(log.stem, lines, settings, others))
    return stages
