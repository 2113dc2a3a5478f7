"""Print a table of a network's layers, its numbers of parameters, and the operations that thop counts.

    python -m tools.layers [--network SPEC]
"""
import torch
from torch import nn

from compressed import networks
from compressed.cifar100 import IMAGE_SIZE
from compressed.command_line import command_line, run_script
from compressed.counting import thop_counts
from compressed.graph import weight_layers


def layer_table(model: nn.Module) -> str:
    """Return a line for each convolution and linear layer: index, name, kind, weight's shape, output's shape, weights.
    """
    outputs = {}
    hooks = [module.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, tuple(out.shape[1:])))
             for _, module in weight_layers(model)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    for hook in hooks:
        hook.remove()
    lines = [f"{'':>2}  {'layer':<22} {'kind':<10} {'weight':<18} {'stride':>6} {'output':<12} {'weights':>9}"]
    for index, (name, module) in enumerate(weight_layers(model)):
        if isinstance(module, nn.Linear):
            kind, stride = "linear", ""
        else:
            kernel = "x".join(map(str, module.kernel_size))
            kind, stride = (f"{kernel} dw" if module.groups > 1 else kernel), module.stride[0]
        shape = "x".join(map(str, module.weight.shape))
        out = "x".join(map(str, outputs[module]))
        lines.append(f"{index:>2}  {name:<22} {kind:<10} {shape:<18} {stride:>6} {out:<12} {module.weight.numel():>9,}")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = command_line(__doc__)
    networks.add_option(parser)
    model = networks.make(parser.parse_args(argv).network)
    print(layer_table(model))
    layers = [module for _, module in weight_layers(model)]
    conv = sum(module.weight.numel() for module in layers if isinstance(module, nn.Conv2d))
    norm = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    linear = [module for module in layers if isinstance(module, nn.Linear)]
    print(f"\n{len(layers)} weight tensors: {conv:,} convolution weights, {sum(m.weight.numel() for m in linear):,} "
          f"linear weights (+ {sum(m.bias.numel() for m in linear if m.bias is not None)} biases), {norm:,} BatchNorm "
          f"scales and shifts,"
          f" {sum(p.numel() for p in model.parameters()):,} parameters in all")
    thop = thop_counts(model)
    if thop is None:
        print("without thop's count: it is not installed, or does not work here (pip install -r requirements.txt)")
    else:  # the submission's 325.4M was a batch of two
        print(f"thop, batch of 1: {thop[0]:,}\nthop, batch of 2: {thop[1]:,}")
    return 0


if __name__ == "__main__":
    run_script(main)
