"""Run every stage in a few minutes on a CPU, on made-up images, to see how the parts work together.

    python -m tools.quick     trains in runs/quick and ships into runs/quick/shipped; nothing else is changed

At the end it prints a table of the results of each stage.
"""
import shutil
import time
from pathlib import Path

from compressed import claims
from compressed.command_line import command_line, run_python, run_script
from compressed.files import lock_folder, lock_file
from tools import shipping
from training.runs import load_lines

ROOT, RUN = shipping.ROOT, Path("runs/quick")
DATA = ("--made-up", "1000")
COMMON = ("--run-folder", RUN, *DATA, *"--batch-size 50 --augment plain --mixing none --sizes 16:0.7,32 --eval-every 9 "
          "--refresh 200".split())
STAGES = {"pretrain": "--pretrain --epochs 6 --lr 0.1 --warmup-epochs 1",
          "rew": "--rew --epochs 2 --lr 0.05 --warmup-epochs 0",
          "masked": "--masked-retrain --epochs 3 --lr 0.05 --warmup-epochs 0"}


def summary(seconds: dict[str, float]) -> list[str]:
    """Return the lines of the table: stage, share of zeros, accuracy, seconds, bytes of the packed file."""
    claim = claims.read(RUN / "shipped" / shipping.CLAIM)
    weights, accuracy = claim["counts"]["weights"]["all"], claim["accuracy"]
    rows = {stage: (last["zeros"] / weights["total"], last["test_accuracy"], "")
            for stage, last in ((stage, load_lines(RUN / f"{stage}.jsonl")[-1]) for stage in STAGES)}
    rows["shipped"] = (weights["sparsity"], accuracy["correct"] / accuracy["images"],
                       f"{claim['packed']['bytes']:,}")
    return [f"{'stage':<10}{'zeros':>10}{'accuracy':>10}{'seconds':>10}{'bytes of the packed file':>26}",
            *(f"{stage:<10}{zeros:>10.2%}{right:>10.2%}{seconds[stage]:>10.0f}{size:>26}".rstrip()
              for stage, (zeros, right, size) in rows.items())]


def main(argv=None) -> int:
    command_line(__doc__).parse_args(argv)
    with lock_file(RUN.with_suffix(".lock")):
        return run()


def run() -> int:
    """Train, ship and print the table; return 0, or the status of the first script that fails."""
    RUN.mkdir(parents=True, exist_ok=True)
    with lock_folder(RUN):
        for path in RUN.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    commands = {stage: (ROOT / "training" / "main.py", *options.split(), *COMMON) for stage, options in STAGES.items()}
    commands["shipped"] = ("-m", "tools.ship", RUN, "--into", RUN / "shipped", *DATA, "--calibration", "200",
                           "--renew", "200")
    seconds = {}
    for stage, command in commands.items():
        begin = time.monotonic()
        if status := run_python(*command):
            return status
        seconds[stage] = time.monotonic() - begin
    print("\n".join(["", *summary(seconds)]))
    return 0


if __name__ == "__main__":
    run_script(main)
