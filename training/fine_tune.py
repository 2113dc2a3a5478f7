"""Quantization-aware fine-tuning of the float weights and the step sizes.

The files are in a folder of their own, Tuning.folder: quantized.options.json, the log quantized.jsonl, and the result
quantized.pt; while it runs, also quantized.start.pt (the network that it starts from) and quantized.state/. The same
command resumes an unfinished fine-tuning, on any machine, and takes the result of a finished one.
"""
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from compressed import grids, networks, threads
from compressed.cifar100 import Images
from compressed.errors import BadInput, refused
from compressed.exact_network import Quantizer, quantize_activations
from compressed.files import load_record, save_record, save_tensors
from compressed.graph import prepare, read_graph, weight_layers
from compressed.networks import load_state
from training import loop, masks, plan, teachers
from training.batchnorm import freeze
from training.learned_steps import Oscillation, fix_steps, learn_steps
from training.runs import code_of, new_record
from training.state import MACHINE, State


# ---- The stage -----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a network is fine-tuned.

    frozen: share of the epochs, at the end, in which the BatchNorm statistics stay as they are. teachers: checkpoints,
    as in training/main.py. source_sha256: of the float checkpoint. folder: where state, log and result are written.
    network: its specification. others: what else decides the result, in plain values. normalise: the input
    normalisation of teachers that were trained elsewhere, see teachers.load.
    """
    settings: plan.Settings
    frozen: float
    teachers: tuple[str, ...]
    source_sha256: str
    folder: Path
    resume: bool
    network: str
    others: dict
    normalise: tuple | None = None

    @property
    def code(self) -> dict[str, str]:
        """The digest of the user's own file of the network, if there is one."""
        return code_of("quantized", {"network": self.network})

    @property
    def file(self) -> Path:
        return self.folder / "quantized.pt"

    @property
    def start(self) -> Path:
        """The network that fine-tuning starts from, kept until that is finished: its grids take minutes."""
        return self.folder / "quantized.start.pt"

    def options(self, chosen: grids.Options) -> dict:
        """Return what decides the result, in plain values."""
        settings = {key: value for key, value in dataclasses.asdict(self.settings).items() if key not in MACHINE}
        place, name, arguments = networks.parse(self.network)
        return json.loads(json.dumps({"grids": dataclasses.asdict(chosen), "frozen": self.frozen, "settings": settings,
                                      "teachers": [Path(path).name for path in self.teachers],
                                      "built_by": f"{Path(place).name}:{name} {arguments}"} | self.others))


def fine_tune(model: nn.Module, train_data: Images, test_data: Images, tuning: Tuning, chosen: grids.Options,
              steps_before=()) -> nn.Module:
    """Train a network on its grids, in place: weights, BatchNorms and steps; zeros stay zero. Return it.

    Writes tuning.file, and to quantized.options.json the options with `steps_before`, the accuracies before
    fine-tuning. Raises BadInput if it was stopped: the same call resumes it.
    """
    settings, file, device = tuning.settings, tuning.file, train_data.labels.device

    def at_epoch(network, epoch):
        if epoch >= round((1 - tuning.frozen) * settings.epochs):
            freeze(network)

    def began():
        file.unlink(missing_ok=True)  # of other options
        tuning.start.unlink(missing_ok=True)
        record = new_record("quantized", train_data, settings, tuning.options(chosen))
        save_record(record | {"source_sha256": tuning.source_sha256, "accuracy_by_step": list(steps_before),
                              "teachers_sha256": teachers.file_digests(tuning.teachers), "code": tuning.code},
                    file.with_suffix(".options.json"))
        save_tensors(start, tuning.start)

    start = {name: value.clone() for name, value in with_steps(model).items()}
    zeros = masks.Masks(model, masks.zero_masks(model))
    learn_steps(model, chosen.scheme, chosen.scale_bits)
    model.to(device, memory_format=torch.channels_last)  # the steps of activations are new
    taught_by = teachers.load_all(tuning.teachers, tuning.network, train_data.data_set, tuning.normalise, device)
    with threads.stop_noted():  # a fine-tuning that gets a signal during its last step still finishes
        finished = loop.train("quantized", model, train_data, test_data, settings, file.parent, masks=zeros,
                              teachers=taught_by, prepare=at_epoch, resume=tuning.resume, eval_every=0, began=began,
                              context=tuning.options(chosen), watch=Oscillation(model))
        if finished is None:
            raise BadInput("fine-tuning was stopped; the same command" + " without --no-resume" * (not tuning.resume)
                           + " resumes it")
        fix_steps(finished, chosen.scheme, chosen.scale_bits)
        save_tensors(with_steps(finished), file)
        tuning.start.unlink(missing_ok=True)
        State(file.with_suffix(".state")).remove()
    return finished


def with_steps(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network on its grids, with the steps of weights and activations: "NAME.step"."""
    modules = dict(weight_layers(model)) | {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    content = model.state_dict() | {f"{name}.step": torch.as_tensor(module.step) for name, module in modules.items()}
    return {name: value.cpu().contiguous() for name, value in content.items()}


def resumed(model: nn.Module, tuning: Tuning, chosen: grids.Options) -> tuple[nn.Module, list[dict], bool] | None:
    """Return the network that a fine-tuning of the same options left, the accuracies before it, whether it is finished.

    If it is not, the network is the one that it starts from. model: a plain network of its kind, which is filled. None
    if there is none, or with --no-resume. Raises BadInput if the file is of another checkpoint or of other
    options.
    """
    file = next((file for file in (tuning.file, tuning.start) if file.is_file()), None)
    if not tuning.resume or file is None:
        return None
    record = load_record(tuning.file.with_suffix(".options.json"), "--no-resume fine-tunes again")
    teachers_differ = any(None not in pair and pair[0] != pair[1]
                          for pair in zip(record.get("teachers_sha256", ()), teachers.file_digests(tuning.teachers)))
    if (record.get("source_sha256") != tuning.source_sha256 or record.get("options") != tuning.options(chosen)
            or teachers_differ or record.get("code") not in (None, tuning.code)):
        raise BadInput(f"{file} was fine-tuned from another checkpoint or with other options, teachers or code of the "
                       "network; --no-resume fine-tunes again")
    model = prepare(model)
    points = read_graph(model).activation_points
    steps = {f"{name}.step": name for name in (*dict(weight_layers(model)), *points)}
    content = load_state(file, model.state_dict().keys() | steps.keys())
    with refused(f"{file}: not what a fine-tuning writes", "; --no-resume starts it again"):
        steps = {name: content.pop(key) for key, name in steps.items()}
        model.load_state_dict(content)
    grids.quantize_weights(model, chosen.table, chosen.scheme)
    for name, module in weight_layers(model):
        module.step = steps[name]
    quantize_activations(model, [{"name": name, "bits": bits, "signed": signed, "step": float(steps[name])}
                                 for (name, signed), bits in zip(points.items(), chosen.activation_bits, strict=True)])
    return model.eval(), record["accuracy_by_step"], file == tuning.file
