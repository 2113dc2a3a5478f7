"""Impossible command lines: refused at once, in one line, with status 2, before anything is read or written."""
import re
from argparse import ArgumentTypeError

import pytest

import check_model_operations
import fuzz
import quantize
import testers
from benchmarks import depthwise_shapes, gpu_check, inference_speed, profile_step, training_speed
from compressed import cifar100
from compressed.command_line import number, run_script
from tools import baseline, compare, export_onnx, integer, quick, report, ship, train, verify
from tools import pack as packed
from training import main as training
from training import teachers

WHOLE = ("-1", "1.5")
REAL = ("-1", "nan")
NOTHING = ("",)
OPTIONS = {  # script: {option: what it cannot be}
    training: {**dict.fromkeys(("--epochs", "--batch-size", "--seed", "--made-up", "--eval-every", "--updates",
                                "--refresh", "--workers"), WHOLE),
               **dict.fromkeys(("--lr", "--weight-decay", "--average", "--smoothing", "--smooth-eps",
                                "--target-sparsity", "--lambda", "--eps", "--distill",
                                "--temperature", "--save-seconds", "--show-seconds", "--max-minutes", "--threshold",
                                "--alpha",
                                "--warmup-epochs", "--cooldown", "--start-epoch", "--turn"), REAL),
               **dict.fromkeys(("--run", "--start", "--data", "--teacher"), NOTHING),
               "--sizes": ("", "x", "24", "20:0.5,32", "24:2,32"), "--teaching": ("", "all"),
               "--precision": ("float8",)},
    quantize: {**dict.fromkeys(("--epochs", "--batch-size", "--seed", "--made-up", "--calibration", "--renew",
                                "--activation-bits"), WHOLE),
               "--lr": REAL, **dict.fromkeys(("--checkpoint", "--out", "--data", "--teacher",
                                             "--tuning-folder"), NOTHING),
               "--scheme": ("x",)},
    testers: {"--made-up": WHOLE, "--checkpoint": NOTHING, "--data": NOTHING},
    integer: {"--made-up": WHOLE, "--images": WHOLE, "--checkpoint": NOTHING, "--data": NOTHING},
    export_onnx: {"--made-up": WHOLE, "--images": WHOLE, "--checkpoint": NOTHING, "--data": NOTHING,
                  "--out": ("", "x.pt")},
    packed: {"--checkpoint": NOTHING, "--out": ("", "x.pt", "/dev/null/x.mnet")},
    check_model_operations: {"--checkpoint": NOTHING, "--sparsity": (*REAL, "x", "1.5", "1/0"), "--weight-bits": WHOLE,
                             "--activation-bits": WHOLE},
    report: dict.fromkeys(("--checkpoint", "--logs", "--pages", "--to"), NOTHING),
    ship: {"--made-up": WHOLE, **dict.fromkeys(("--data", "--into"), NOTHING), "--checkpoint": ("x",)},
    train: {"--made-up": WHOLE, **dict.fromkeys(("--data", "--run"), NOTHING), "--run-f": ("x",), "--ship": ("x",)},
    compare: dict.fromkeys(("--csv", "--figure"), NOTHING),
    verify: {"--checkpoint": NOTHING}, baseline: {"--out": ("x",)}, quick: {"--out": ("x",)},
    cifar100: {"--data": NOTHING}, teachers: {"--data": NOTHING, "--folder": ("", "nowhere")},
    training_speed: {**dict.fromkeys(("--images", "--batch-size", "--rounds", "--workers"), WHOLE),
                     "--json": ("", "/dev/null/x")},
    profile_step: {**dict.fromkeys(("--batch-size", "--steps"), WHOLE), "--out": ("", "/dev/null/x")},
    gpu_check: {"--batch-size": WHOLE, "--seconds": REAL, "--out": ("", "/dev/null/x")},
    depthwise_shapes: {**dict.fromkeys(("--batch-size", "--rounds"), WHOLE), "--json": ("", "/dev/null/x")},
    inference_speed: {**dict.fromkeys(("--threads", "--rounds", "--batches"), WHOLE), "--seconds": REAL,
                      "--checkpoint": NOTHING,
                      "--json": ("", "/dev/null/x")},
}
LINES = [(script, [option, value]) for script, options in OPTIONS.items() for option, values in options.items()
         for value in values]


@pytest.mark.parametrize("kind, wrong", ((int, ("", "x", "-1", "1.5", "nan", "9" * 25)),
                                         (float, ("", "x", "-1", "nan", "inf", "1e400"))))
def test_numbers(kind, wrong):
    convert = number(kind, 0, 9)
    assert [convert("0"), convert("9")] == [0, 9] and type(convert("7")) is kind
    for text in wrong:
        with pytest.raises(ArgumentTypeError, match=f"{re.escape(repr(text))}: expected a .*number from 0 to 9"):
            convert(text)


@pytest.mark.parametrize("script, words", LINES, ids=lambda part: " ".join(part) if isinstance(part, list)
                         else part.__name__)
def test_impossible_command_lines(script, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: script.main([f"{words[0]}={words[1]}"]))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and not list(tmp_path.iterdir())
    *usage, last = err.splitlines()
    assert re.match(r"\S+: ", last) and all(re.match(r"usage: | {2,}", line) for line in usage)


def test_the_fuzzer_finds_nothing(capsys):
    """A short run of it; `python tests/fuzz.py` is the long one."""
    status, out = fuzz.main(["--count", "3", "--seed", "1"]), capsys.readouterr().out
    assert status == 0, out
    assert re.search("\n[0-9]+ damaged files: 0 silently accepted, 0 with a traceback\n$", out)
    assert out.count("refused") >= 15
