"""Make the dense network of a run the dense baseline, with which the shipped network is compared.

    python training/main.py --recipe dense --pretrain --run runs/dense
    python -m tools.baseline runs/dense       (the default)

record/ gets its weights (dense.pt), log, options and the result of testers.py; the tables of the pages are updated.
Nothing is replaced before all of this is made.
"""
import dataclasses
import shutil
from pathlib import Path

from compressed.cifar100 import CIFAR100
from compressed.command_line import command_line, run_script, some_path
from compressed.errors import BadInput
from compressed.files import load_json, save_json
from tools import shipping
from training.runs import read_record

ROOT = shipping.ROOT
FILES = {"dense.pt": "pretrain.average.pt", "dense.jsonl": "pretrain.jsonl",
         "dense.options.json": "pretrain.options.json"}


def make_record(run: Path, record: Path) -> None:
    """Create the folder `record` as a copy of record/, with the dense network of a run and its test result."""
    shutil.copytree(ROOT / "record", record)
    for name, source in FILES.items():
        shutil.copyfile(run / source, record / name)
    with open(record / "dense.tested.json", "wb") as file:
        shipping.run(ROOT / "testers.py", "--checkpoint", record / "dense.pt", "--json", stdout=file)
    tested = load_json(record / "dense.tested.json") | {"checkpoint": "record/dense.pt"}  # its final place
    save_json(tested, record / "dense.tested.json")


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("run", nargs="?", type=some_path, default=Path("runs/dense"), metavar="RUN",
                        help="run folder (%(default)s)")
    run = parser.parse_args(argv).run
    for name in ("pretrain.pt", *FILES.values()):  # the first is written when the stage has ended
        if not (run / name).is_file():
            raise BadInput(f"{run / name} is not there: this run has no dense network yet")
    record = read_record(run / "pretrain.options.json")
    options, data_set = record["options"], record.get("data_set")  # which older records do not state
    if options.get("holdout") or options.get("made_up") or data_set not in (None, dataclasses.asdict(CIFAR100)):
        raise BadInput(f"{run} was not trained on all train images of CIFAR-100, as the shipped network was")
    with shipping.staging(ROOT) as new:
        make_record(run, new / "record")
        shipping.run("-m", "tools.report", "--logs", new / "record", "--to", new)
        shipping.install(new, ROOT)
    print("baseline.py: record/dense.pt is now the dense network of " + str(run))
    return 0


if __name__ == "__main__":
    run_script(main)
