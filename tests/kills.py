"""Kill every stage again and again at random moments; check that weights and log are those of a run without kills.

    python tests/kills.py [--kills 20] [--seed 0]

Each stage of training/main.py trains on made-up images, with the weight average, from the second on with the penalty or
the masks and with a teacher. It writes its state after every step. SIGKILL ends it up to two seconds after the first
state was written, in a step or in the middle of writing, and the same command resumes it. Exit status 1 if a bit
differs.
"""
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressed.command_line import command_line, number, run_script

COMMON = ("--made-up 160 --batch-size 16 --epochs 12 --lr 0.02 --warmup-epochs 1 --augment plain --refresh 32 "
          "--eval-every 4 --sizes 8:0.8,32 --no-cuda").split()
STAGES = {"pretrain": ["--pretrain"], "rew": ["--rew"], "masked": ["--masked-retrain"]}


def train(stage: str, folder: Path, *more) -> subprocess.Popen:
    teacher = ["--teacher", str(folder / "pretrain.pt")] if stage != "pretrain" else []
    command = [sys.executable, str(ROOT / "training" / "main.py"), *STAGES[stage], "--run", str(folder), *COMMON]
    return subprocess.Popen([*command, *teacher, *more], stdout=subprocess.DEVNULL)


def kill_often(stage: str, folder: Path, kills: int, rng: random.Random) -> int:
    """Train a stage to its end, with kills on the way; return how many there were."""
    state, done = folder / f"{stage}.state" / "state.json", 0
    while not (folder / f"{stage}.pt").is_file():
        process, before = train(stage, folder, "--save-seconds", "0"), state.read_bytes() if state.is_file() else b""
        while done < kills and process.poll() is None:
            if state.is_file() and state.read_bytes() != before:
                time.sleep(rng.uniform(0, 2))
                process.kill()
                done += 1
                break
            time.sleep(0.01)
        if process.wait() > 0:
            sys.exit(f"kills.py: {stage} ended with status {process.returncode} after {done} kills")
    return done


def same(stage: str, one: Path, other: Path) -> bool:
    """Return True if a stage left the same weights and the same log, but for the seconds, in both folders."""
    weights = [torch.load(folder / f"{stage}.pt") for folder in (one, other)]
    logs = [[json.loads(line) | {"seconds": 0} for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
            for folder in (one, other)]
    return logs[0] == logs[1] and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] | weights[1])


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--kills", type=number(int, 1, 10**6), default=20, metavar="N",
                        help="of each stage (%(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=0, metavar="S", help="(%(default)s)")
    args = parser.parse_args(argv)
    rng, total, bad = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        for stage in STAGES:
            if train(stage, whole).wait():
                return 1
            kills = kill_often(stage, killed, args.kills, rng)
            equal = same(stage, whole, killed)
            total, bad = total + kills, bad + (not equal)
            print(f"{stage}: killed {kills} times, {'equal to the last bit' if equal else 'DIFFERENT'}", flush=True)
    print(f"{total} kills: {len(STAGES) - bad} of {len(STAGES)} stages equal to the last bit")
    return int(bad > 0)


if __name__ == "__main__":
    run_script(main)
