"""Impossible command lines: refused at once, in one line, with status 2, before anything is read or written."""
import contextlib
import re
from argparse import ArgumentParser, ArgumentTypeError
from unittest import mock

import pytest

import check_model_operations
import fuzz
import quantize
import testers
from benchmarks import depthwise_shapes, gpu_check, inference_speed, profile_step, sparsity_methods, training_speed
from compressed import cifar100
from compressed.command_line import number, run_script
from tools import (baseline, compare, divergence, export_onnx, integer, kaist_checkpoint, layers, quick, report, ship,
                   train, verify)
from tools import pack as packed
from training import main as training
from training import teachers

SCRIPTS = (check_model_operations, quantize, testers, baseline, cifar100, compare, depthwise_shapes, divergence,
           export_onnx, gpu_check, inference_speed, integer, kaist_checkpoint, layers, packed, profile_step, quick,
           report, ship, sparsity_methods, teachers, train, training, training_speed, verify)
OTHERS = [(training, "--sizes", "24", "32 at the end"), (training, "--sizes", "20:0.5,32", "multiples of 8"),
          (training, "--teaching", "all", "'turns', 'mean'"), (training, "--recipe", "nowhere", "no recipe nowhere"),
          (export_onnx, "--out", "x.pt", "ends in .onnx"), (packed, "--out", "/dev/null/x.mnet", "cannot be written"),
          (check_model_operations, "--sparsity", "1/0", "a number from 0 to 1"), (ship, "--checkpoint", "x", "--into"),
          (train, "--run-f", "x", "--run-folder"), (train, "--ship", "x", "--ship"), (baseline, "--out", "x", "--out"),
          (quick, "--out", "x", "--out"), (teachers, "--folder", "nowhere", "holds no micronet"),
          (inference_speed, "--json", "/dev/null/x", "ends in .json"),
          *((script, "--json", "/dev/null/x", "cannot be written") for script in (
              training_speed, depthwise_shapes, profile_step, gpu_check))]


def options(script) -> list[tuple]:
    """Return (script, option, what it cannot be) of every option with a number, a path or choices."""
    parsers, wrong = [], []

    def record(parser, *_):
        parsers.append(parser)
        raise SystemExit

    with mock.patch.object(ArgumentParser, "parse_known_args", record), contextlib.suppress(SystemExit):
        script.main([])
    for action in parsers[0]._actions:
        kind = getattr(action.type, "__qualname__", "")
        values = {"some_path": ("",), "some_file": ("", ".", "/")}.get(kind, ())
        values = ("-1",) if kind.startswith("number.") else values
        wrong += [(script, action.option_strings[-1], value) for value in (*values, *["?"] * bool(action.choices))
                  if action.option_strings]
    return wrong


CASES = [case for script in SCRIPTS for case in options(script)]


@pytest.mark.parametrize("kind, wrong", ((int, ("", "x", "-1", "1.5", "nan", "9" * 25)),
                                         (float, ("", "x", "-1", "nan", "inf", "1e400"))))
def test_numbers(kind, wrong):
    convert = number(kind, 0, 9)
    assert [convert("0"), convert("9")] == [0, 9] and type(convert("7")) is kind
    for text in wrong:
        with pytest.raises(ArgumentTypeError, match=f"{re.escape(repr(text))}: expected a .*number from 0 to 9"):
            convert(text)


def test_the_types_of_options_are_recognised():
    """If they were not, there would be fewer command lines below, and nobody would notice."""
    values = [value for _, _, value in CASES]
    assert min(map(values.count, ("-1", "", "/", "?"))) > 10


@pytest.mark.parametrize("script, option, value, said", [*((*case, case[1]) for case in CASES), *OTHERS],
                         ids=lambda part: getattr(part, "__name__", part))
def test_impossible_command_lines(script, option, value, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: script.main([f"{option}={value}"]))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and not list(tmp_path.iterdir())
    *usage, last = err.splitlines()
    assert re.match(r"\S+: ", last) and all(re.match(r"usage: | {2,}", line) for line in usage)
    assert said in last


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0 and "usage: " in capsys.readouterr().out


def test_the_fuzzer_finds_nothing(capsys):
    """A short run of it; `python tests/fuzz.py` is the long one."""
    status, out = fuzz.main(["--count", "3", "--seed", "1"]), capsys.readouterr().out
    assert status == 0, out
    assert re.search("\n[0-9]+ damaged files: 0 silently accepted, 0 with a traceback\n$", out)
    assert out.count("refused") >= 15
