"""Damage every kind of file that the project reads, and see whether anybody notices.

    python tests/fuzz.py [--count 1000] [--seed 0] [--kinds claim state.json ...]

Each file is damaged `count` times, by bits, bytes and blocks, and those of JSON by their values too, and then read as
the scripts read it. What may come of it:

    refused    one line (BadInput, or an OSError that run_script prints): the only right answer to a change
    same       the file was accepted, and what was read from it is what was written: the change touched nothing
    accepted   silently, with other contents                                                    a hole
    traceback  any other exception                                                              a bug
A digest can be computed anew by whoever alters a record on purpose. Such records ("... signed again") may be accepted
where nothing else contradicts them; so may a log, which is a text for readers and no run goes on from. A traceback is a
bug there too. Exit status 1 if there was a hole or a bug.
"""
import contextlib
import functools
import hashlib
import json
import pickle
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import quantize  # noqa: E402
from compressed import (
    checkpoints,  # noqa: E402
    cifar100,  # noqa: E402
    datasets,  # noqa: E402
    kaist,  # noqa: E402
    mnet,  # noqa: E402
)
from compressed.command_line import command_line, number, run_script  # noqa: E402
from compressed.errors import BadInput  # noqa: E402
from compressed.files import load_json, load_lines, save_record, save_tensors, sha256  # noqa: E402
from compressed.networks import load_checkpoint  # noqa: E402
from small import CLASSES, WIDTH, tiny_network  # noqa: E402
from training import loop, teachers  # noqa: E402
from training.state import State  # noqa: E402

WEIRD = (None, True, "", "x", "nan", -1, 0, 1, 10**9, 10**30, 1e308, 0.5, -0.0, float("nan"), float("inf"), [], {}, [1],
         {"a": 1}, "../x")


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bits turned; bytes overwritten, cut out, put in; a block zeroed, swapped, doubled; the end cut off."""
    data, n = bytearray(content), len(content)
    at, size = rng.randrange(n), rng.choice((1, 2, 8, 64, 512))
    kind = rng.randrange(9)
    if kind < 3:
        for _ in range(rng.choice((1, 1, 1, 2, 16))):
            data[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        data[at:at + size] = rng.randbytes(size)[:n - at]
    elif kind == 4:
        del data[at:at + size]
    elif kind == 5:
        data[at:at] = rng.randbytes(size)
    elif kind == 6:
        data[at:at + size] = bytes(min(size, n - at))
    elif kind == 7:
        other = rng.randrange(n)
        data[at], data[other] = data[other], data[at]
    else:
        del data[at:]
    return bytes(data)


def damage_value(record, rng: random.Random):
    """A JSON record with one value replaced by a weird one, one key renamed, or one thing left out, at any depth."""
    record = json.loads(json.dumps(record))
    places, stack = [], [record]
    while stack:
        each = stack.pop()
        inside = each.items() if isinstance(each, dict) else enumerate(each)
        for key, value in inside:
            places.append((each, key))
            if isinstance(value, (dict, list)):
                stack.append(value)
    shallow = [place for place in places if place[0] is record]
    container, key = rng.choice(shallow if rng.random() < 0.3 else places)
    kind = rng.randrange(4)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[key + "x"] = container.pop(key)
    else:
        container[key] = rng.choice(WEIRD)
    return record


def same(one, other) -> bool:
    """Whether two things that were read are the same, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one and other != other)


def network_and_claim(path):
    model, claim = checkpoints.load(path)
    return {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}, claim


class Kinds:
    """The files, made in a folder; `all`: {kind: (file, how it is read, whether it is JSON)}."""

    def __init__(self, folder: Path):
        def small_checkpoint(path, *_):
            return load_checkpoint(path, f"mobilenet_v2:MobileNetV2?width={WIDTH}", CLASSES)

        checkpoints.load_checkpoint = small_checkpoint
        model, claim = tiny_network()
        save_tensors(model.state_dict(), folder / "network.pt")
        save_record(claim | {"sha256": sha256(folder / "network.pt"), "accuracy": {"correct": 1},
                             "made_by": {"seed": 0}},
                    folder / "network.json")
        mnet.pack(model, claim, folder / "alone.mnet", WIDTH)
        save_tensors(model.state_dict(), folder / "float.pt")
        self.train(folder / "run")
        state = folder / "run" / "fuzz.state"
        self.state = State(state, None)
        self.state.settings = load_json(state / "state.json")["settings"]
        options = folder / "run" / "masked.options.json"
        save_record({"machine": "CPU", "train_images": 40, "settings": {"augment": "plain", "lr": 0.1}}, options)
        (folder / "run" / "masked.jsonl").write_bytes((folder / "run" / "fuzz.jsonl").read_bytes())
        self.images(folder / "set")
        micronet = kaist.Micronet().state_dict()
        micronet["linear.mask"] = torch.ones_like(micronet["linear.weight"])
        save_tensors(micronet, folder / "teacher.t7")
        parts = {f"state part {part}": (state / name, self.load_state, False)
                 for part, name in load_json(state / "state.json")["files"].items()}
        self.all = {
            ".pt": (folder / "network.pt", lambda: network_and_claim(folder / "network.pt"), False),
            ".pt without a claim": (folder / "float.pt", lambda: small_checkpoint(folder / "float.pt").state_dict(),
                                    False),
            "claim": (folder / "network.json", lambda: network_and_claim(folder / "network.pt"), True),
            ".mnet": (folder / "alone.mnet", lambda: dict(mnet.unpack(folder / "alone.mnet")[0].named_parameters()),
                      False),
            **parts,
            "state.json": (state / "state.json", self.load_state, True),
            "log": (folder / "run" / "fuzz.jsonl",
                    lambda: [line["step"] for line in load_lines(folder / "run" / "fuzz.jsonl")], False),
            "options": (options, lambda: quantize.training_record(folder / "run" / "masked.pt"), True),
            "CIFAR-100": (folder / "set" / "train", lambda: vars(cifar100.load(folder / "set", "train")), False),
            ".npz of images": (folder / "set.npz", lambda: vars(datasets.load(folder / "set.npz")), False),
            "teacher": (folder / "teacher.t7", lambda: teachers.load(folder / "teacher.t7").state_dict(), False)}

    def train(self, folder: Path) -> None:
        class Tiny(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 4, 3, stride=4)
                self.linear = torch.nn.Linear(4, 100)

            def forward(self, x):
                return self.linear(self.conv(x).relu().mean((2, 3)))

        self.settings = loop.Settings(epochs=3, batch_size=20, refresh=0)
        data = cifar100.made_up(40, 0)
        with contextlib.redirect_stdout(None):
            for _ in range(3):  # a step each: into the second epoch
                loop.train("fuzz", Tiny(), data, None, self.settings, folder, max_seconds=0)

    def load_state(self):
        return self.state.load("cpu", functools.partial(loop.constant_so_far, epoch_steps=2))

    def images(self, folder: Path) -> None:
        folder.mkdir()
        for split, n in (("train", 200), ("test", 100)):
            content = {"data": np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8),
                       "fine_labels": [i % 100 for i in range(n)]}
            (folder / split).write_bytes(pickle.dumps(content, 4))
            cifar100.FINGERPRINT[split] = cifar100.fingerprint(cifar100.digests(*cifar100.read(folder / split)))
            cifar100.COUNT[split] = n
        four = cifar100.made_up(40, 0, classes=4)
        images, labels = four.images.permute(0, 2, 3, 1).numpy(), four.labels.numpy()
        np.savez(folder.with_suffix(".npz"), train_images=images, train_labels=labels, test_images=images[:9],
                 test_labels=labels[:9])


def forged_digest(record: dict) -> str:
    """`files.digest` of whoever forges a record: of NaN and infinity, too, for which that refuses to make one."""
    content = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def outcome(read, wanted) -> str:
    try:
        found = read()
    except (BadInput, OSError) as error:
        return "refused" if "\n" not in str(error) else f"traceback: {type(error).__name__} of several lines"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:100]}"
    return "same" if same(found, wanted) else "accepted"


def attack(path: Path, read, is_json: bool, count: int, rng: random.Random) -> dict[str, Counter]:
    """{how: Counter of outcomes}; the file is as it was afterwards."""
    original, wanted = path.read_bytes(), read()
    found = {"bytes": Counter(), **({"values": Counter(), "values, signed again": Counter()} if is_json else {})}
    try:
        for i in range(count):
            how = list(found)[i % len(found)]
            if how == "bytes":
                content = damage_bytes(original, rng)
            else:
                record = damage_value(json.loads(original), rng)
                if "signed" in how:
                    record = record | {"digest": forged_digest(record)}
                content = json.dumps(record).encode()
            if content != original:
                path.write_bytes(content)
                found[how][outcome(read, wanted)] += 1
    finally:
        path.write_bytes(original)
    return found


def main(argv=None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--count", type=number(int, 1, 10**9), default=1000, metavar="N",
                        help="damaged files of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--kinds", nargs="+", metavar="K", help="some kinds alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = Kinds(Path(folder)).all
        for kind in args.kinds or kinds:
            if kind not in kinds:
                parser.error(f"no kind {kind!r}; there are: {', '.join(kinds)}")
            for how, outcomes in attack(*kinds[kind], args.count, random.Random(f"{args.seed} {kind}")).items():
                holes = outcomes["accepted"] if "signed" not in how and kind != "log" else 0
                bugs = sum(number for name, number in outcomes.items() if name.startswith("traceback"))
                bad += holes + bugs
                print(f"{kind + ', ' + how:<40}" + ", ".join(f"{number} {name}"
                                                             for name, number in sorted(outcomes.items())), flush=True)
    print(f"{bad} silently accepted or with a traceback")
    return int(bad > 0)


if __name__ == "__main__":
    run_script(main)
