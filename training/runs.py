"""Describe the stages of a run, and read the logs and options that they leave (see main.py for the files of a run)."""
import dataclasses
import json
import math
import sys
from pathlib import Path

from compressed import networks, threads
from compressed.cifar100 import Images
from compressed.command_line import say_once
from compressed.errors import BadInput, refused
from compressed.files import from_json, git_commit, load_record, sha256
from training.state import tensor_digest

STAGES = ("pretrain", "rew", "masked")  # of training/main.py; quantize.py adds the stage "quantized"
# {option that is no setting but decides a result: the stages whose result it decides}
DECISIVE = {**dict.fromkeys(("network", "teacher", "made_up", "holdout"), STAGES),
            **dict.fromkeys(("penalty", "lam", "eps", "cost_power", "updates"), ("rew",)),
            **dict.fromkeys(("sparsity_type", "config_file", "target_sparsity"), ("rew", "masked")),
            "threshold": ("masked",), **dict.fromkeys(("grids", "frozen", "teachers", "normalise"), ("quantized",))}


def stage_logs(folder) -> list[Path]:
    """Return the paths of a run folder's logs, in the order of training.

    masked-1, masked-2, ... are repetitions of the masked stage before the last one, which is named masked.
    """
    numbers = sorted(int(path.stem[7:]) for path in Path(folder).glob("masked-*.jsonl") if path.stem[7:].isdecimal())
    stages = ("pretrain", "rew", *(f"masked-{number}" for number in numbers), "masked", "quantized")
    return [path for path in (Path(folder, f"{stage}.jsonl") for stage in stages) if path.is_file()]


def new_record(stage: str, data: Images, settings, options: dict, processes: int = 1) -> dict:
    """Return what the STAGE.options.json of a stage that begins says of it, in plain values."""
    record = {"stage": stage, "machine": threads.describe_machine(data.labels.device, processes),
              "train_images": len(data), "data": tensor_digest([data.images, data.labels]),
              "data_set": dataclasses.asdict(data.data_set), "commit": git_commit(), "code": code_of(stage, options),
              "settings": dataclasses.asdict(settings), "options": options}
    return json.loads(json.dumps(record, default=str))  # paths as text


def load_lines(path) -> list[dict]:
    """Return the lines of a stage's log, JSON objects with "step" and "epoch". Raises BadInput, naming the line, for
    others."""
    lines = []
    for number, text in enumerate(Path(path).read_bytes().splitlines(), 1):
        with refused(f"{path}: line {number} is no line of a log", "; remove the file, or restore it"):
            lines.append(from_json(text))
            step, epoch = lines[-1]["step"], lines[-1]["epoch"]
            if type(step) is not int or type(epoch) not in (int, float) or not 0 < epoch < math.inf:
                raise ValueError("its step is no integer, or its epoch no number above 0")
    return lines


def stage_of(path) -> str:
    """Return the stage of a file of a run: masked-1 of masked-1.average.pt."""
    return Path(path).name.split(".")[0]


def code_of(stage: str, options: dict) -> dict[str, str]:
    """Return {"network" or "penalty": digest} of the user's own files that decide a stage's result."""
    named = {name: options.get(name) for name in ("network", *["penalty"] * (stage == "rew"))}
    found = {name: networks.source_digest(spec) for name, spec in named.items() if spec}
    return {name: digest for name, digest in found.items() if digest}


def read_record(path: Path, remedy: str = "remove it, or restore it") -> dict:
    """Return the contents of a STAGE.options.json. Raises BadInput, with `remedy` at its end, for a damaged one."""
    record = load_record(path, remedy)
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("options"), dict):
        raise BadInput(f"{path}: not what a stage writes; {remedy}")
    return record


def other_start(folder: Path, stage: str) -> tuple[str, str] | None:
    """Return the SHA-256 of the weights that a stage started from and of those there now, if they differ; else None.

    They are those of the stage before. If the stage had a --start, or these weights are gone, nothing is compared; nor
    are those of older records, which do not say whether the stage started from random weights.
    """
    record, before = Path(folder, f"{stage}.options.json"), {"rew": "pretrain", "masked": "rew"}.get(stage)
    weights = Path(folder, f"{before}.pt")
    if not before or not record.is_file() or not weights.is_file():
        return None
    said = read_record(record)
    started, now = said.get("start_sha256", "not known"), sha256(weights)
    if said["options"].get("start") or started in ("not known", now):
        return None
    return started or "random weights", now


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """What a stage leaves: its log (one dict per epoch), settings and further options, in plain values."""
    name: str
    lines: list[dict]
    settings: dict
    options: dict
    machine: dict | str  # text in a record of an older version
    train_images: int | None
    data: str | None  # digest of the train images
    teachers_sha256: list | None  # of their files
    code: dict | None  # digests of the user's own files

    @classmethod
    def of(cls, name: str, lines: list[dict], record: dict) -> "StageRecord":
        """Return a stage. record: a STAGE.options.json; older ones, and entries of a claim, lack some of the keys."""
        return cls(name, lines, record["settings"], record.get("options", {}), *map(record.get, (
            "machine", "train_images", "data", "teachers_sha256", "code")))

    @classmethod
    def of_claim(cls, record: dict) -> "StageRecord":
        """Return the stage of an entry of a claim's made_by.training, whose log has the last epoch alone."""
        return cls.of(record["stage"], [record["last_epoch"]], record)

    def images(self, line: dict) -> int:
        """Return the number of images, repetitions counted, on which the stage had been trained at a line of its log.

        The epochs before a --start-epoch do not count: they are in the log that the stage's start has.
        """
        before = round((self.options.get("start_epoch") or 0) * line["step"] / line["epoch"])
        return (line["step"] - before) * min(self.settings["batch_size"], self.train_images or math.inf)

    def apart_from_seed(self) -> dict:
        """Return what decides the stage's result but for its seed and rounding, as far as its folder records it."""
        # precision and graphs change the rounding alone; "compile" is in records of older versions
        apart = ("seed", "precision", "graphs", "compile")
        kept = {key: value for key, value in self.settings.items() if key not in apart}
        kept |= {"data": self.data, "code": self.code or None}
        for key, value in self.options.items():
            if self.name.split("-")[0] in DECISIVE.get(key, ()):
                kept[key] = {name: v for name, v in value.items() if name != "seed"} if key == "grids" else value
        return kept


def read_stage(log: Path) -> StageRecord | None:
    """Return the stage of a log; None without an epoch or options in the folder. Raises BadInput for damaged files."""
    options, lines = log.with_suffix(".options.json"), load_lines(log) if log.is_file() else []
    if not lines or not options.is_file():
        return None
    return StageRecord.of(log.stem, lines, read_record(options))


def read_stages(folder) -> list[StageRecord]:
    """Return the stages of a run folder, in the order of training (see `read_stage`)."""
    return [stage for stage in map(read_stage, stage_logs(folder)) if stage]


def stage_records(logs) -> list[dict]:
    """Return what a claim records of the stages of these logs; those of which `read_stage` returns None are left out.
    """
    return [{"stage": stage.name, "machine": stage.machine, "train_images": stage.train_images,
             "settings": stage.settings, "options": stage.options, "last_epoch": stage.lines[-1]}
            | {name: value for name in ("teachers_sha256", "code") if (value := getattr(stage, name))}
            for stage in map(read_stage, logs) if stage]


def record_next_to(checkpoint) -> dict | None:
    """Return what STAGE.options.json says of a checkpoint's stage, as of STAGE.average.pt; None if it is not there."""
    file = Path(checkpoint).with_name(f"{stage_of(checkpoint)}.options.json")
    return read_record(file) if file.is_file() else None


def warn_of_another_network(checkpoint, spec: str) -> None:
    """Print a warning if a checkpoint was trained here as another network, or with other arguments, than it is read.

    Its shapes may fit all the same, as with another dilation or activation.
    """
    record = record_next_to(checkpoint)
    theirs = record and record["options"].get("network")
    if theirs and not networks.same(theirs, spec):
        say_once(f"warning: {checkpoint} was trained as {theirs}, and is read as {spec}")


def has_same_order(checkpoint, stage: str, seed: int) -> bool:
    """Return True if a checkpoint comes from a stage of the same kind and seed, as its folder records it.

    Random numbers depend on the seed, the stage's name and the step alone. So a stage that starts from such weights at
    step 0 trains on the same images again, in the same order, augmented alike.
    """
    record = record_next_to(checkpoint) if stage_of(checkpoint).split("-")[0] == stage else None
    return record is not None and record["settings"].get("seed") == seed


def warn_of_seen_images(trained: list[dict], checkpoint) -> None:
    """Print a warning if a hold-out is one on which some stage of a checkpoint was trained: its `stage_records`."""
    if stages := [stage["stage"] for stage in trained if not stage["options"].get("holdout")]:
        print(f"warning: {checkpoint}: the stage {stages[0]} was trained without --holdout: the network has seen these "
              "images", file=sys.stderr)


def warn_of_a_held_out_run(trained: list[dict]) -> None:
    """Print a warning if the last stage of a network was trained with --holdout, so that the test set stays unused."""
    if trained and trained[-1]["options"].get("holdout"):
        print(f"warning: the stage {trained[-1]['stage']} was trained with --holdout, and this is tested on the test "
              "set; --holdout leaves that unused", file=sys.stderr)


def training_record(checkpoint) -> list[dict]:
    """Return `stage_records` of all stages recorded in a checkpoint's folder, in the order of training.

    If the checkpoint has the name of a stage, as in rew.average.pt, they end with that stage.
    """
    folder, name = Path(checkpoint).parent, stage_of(checkpoint)
    logs = [log for log in stage_logs(folder) if log.stem != "quantized"]
    names = [log.stem for log in logs]
    logs = logs[:names.index(name) + 1] if name in names else logs
    for log in logs:
        if other_start(folder, log.stem):
            raise BadInput(f"{folder}: the stage {log.stem} was trained from other weights than those that are there "
                           "now; train it again")
    return stage_records(logs)
