"""Compare an execution of a quantized network with exact_network, the network that testers.py evaluates."""
import argparse

from torch import Tensor

from compressed import checkpoints, datasets, networks
from compressed.command_line import command_line, number


def option_parser(text: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every script that executes a checkpoint; `text` is the script's docstring."""
    parser = command_line(text)
    checkpoints.add_option(parser)
    networks.add_option(parser, networks.CLAIM)
    datasets.add_options(parser)
    parser.add_argument("--images", type=number(int, 1, 10**6), metavar="N", help="use only N of the test images: the "
                        "first in the order of their SHA-256, which is the same for every copy of the data set, and "
                        "mixes the classes")
    parser.add_argument("--record", action="store_true", help="write the result into the checkpoint's claim")
    return parser


def agreement(found: Tensor, exact: Tensor, labels: Tensor) -> dict[str, int]:
    """Count the images on which two executions agree: float32 logits [N, classes] of one, and of exact_network.

    {"images", "correct", "float_correct": of exact_network, "agree": images with the same prediction, "identical":
    images whose logits are the same to the last bit}
    """
    predicted, expected = found.argmax(1), exact.argmax(1)
    return {"images": len(labels), "correct": int((predicted == labels).sum()),
            "float_correct": int((expected == labels).sum()), "agree": int((predicted == expected).sum()),
            "identical": int((found == exact).all(1).sum())}


def describe(executed_by: str, report: dict) -> list[str]:
    """Return the lines that show the result of `agreement`."""
    def share(key: str) -> str:
        return f"{report[key]}/{report['images']} ({report[key] / report['images']:.2%})"
    return [f"Accuracy in {executed_by}: {share('correct')}; in exact_network, which testers.py evaluates: "
            f"{share('float_correct')}",
            f"Same prediction: {share('agree')} images; same logits to the last bit: {share('identical')}"]
