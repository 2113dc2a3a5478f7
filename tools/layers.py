"""Print a table of a network's layers, its numbers of parameters, and the operations that thop counts.

    python -m tools.layers [--network SPEC]
"""
from torch import nn

from compressed import networks
from compressed.command_line import command_line, run_script
from compressed.counting import NO_THOP, thop_counts
from compressed.graph import layer_kind, trace, weight_layers


def layer_table(model: nn.Module) -> str:
    """Return a line for each convolution and linear layer: index, name, kind, weight's shape, output's shape, weights.
    """
    shapes = {op.name: op.shape for op in trace(model)}
    lines = [f"{'':>2}  {'layer':<22} {'kind':<14} {'weight':<18} {'stride':>6} {'output':<12} {'weights':>9}"]
    for index, (name, module) in enumerate(weight_layers(model)):
        kind, stride = "linear", ""
        if isinstance(module, nn.Conv2d):
            kind, stride = f"{layer_kind(module)} {'x'.join(map(str, module.kernel_size))}", module.stride[0]
        weight, out = ("x".join(map(str, shape)) for shape in (module.weight.shape, shapes.get(name, ["unused"])))
        count = module.weight.numel()
        lines.append(f"{index:>2}  {name:<22} {kind:<14} {weight:<18} {stride:>6} {out:<12} {count:>9,}")
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = command_line(__doc__)
    networks.add_option(parser)
    model = networks.make(parser.parse_args(argv).network)
    print(layer_table(model))

    def parameters(kind: type, *names: str) -> int:
        return sum(p.numel() for module in model.modules() if isinstance(module, kind)
                   for name, p in module.named_parameters(recurse=False) if name in names)

    print(f"\n{len(weight_layers(model))} weight tensors: {parameters(nn.Conv2d, 'weight'):,} convolution weights, "
          f"{parameters(nn.Linear, 'weight'):,} linear weights (+ {parameters(nn.Linear, 'bias')} biases), "
          f"{parameters(nn.BatchNorm2d, 'weight', 'bias'):,} BatchNorm scales and shifts, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters in all")
    thop = thop_counts(model)  # the submission's 325.4M was a batch of two
    print(f"without {NO_THOP}" if thop is None else
          "\n".join(f"thop, batch of {images}: {count:,}" for images, count in enumerate(thop, 1)))
    return 0


if __name__ == "__main__":
    run_script(main)
