"""Read a checkpoint together with its claim, and check one against the other."""
import dataclasses
from pathlib import Path

from torch import nn

from compressed import claims, mnet
from compressed.command_line import some_file
from compressed.errors import BadInput, brief
from compressed.files import sha256
from compressed.formats import Formats, found_formats
from compressed.graph import prepare
from compressed.networks import DEFAULT, followed, load_checkpoint

CHECKPOINT = "cifar100_mobilenetv2.pt"
SHIPPED = Path(__file__).resolve().parent.parent / CHECKPOINT


def add_option(parser) -> None:
    """Add --checkpoint to a parser."""
    parser.add_argument("--checkpoint", type=some_file, default=SHIPPED, metavar="F",
                        help=f"state dict with its claim (.json) next to it, or a packed .mnet (default: {CHECKPOINT})")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Hold what `read` found in a checkpoint file.

    model: in eval mode. claim: None if there is none. formats: as claimed or, without a claim, as found in the values.
    problems: one line for each contradiction between file and claim.
    """
    path: Path
    sha256: str
    model: nn.Module
    claim: dict | None
    formats: Formats
    problems: list[str]

    @property
    def claim_file(self) -> Path:
        """The file that holds the claim: the .json or, where there is none, the packed file itself."""
        file = claims.claim_path(self.path)
        return file if file.exists() else self.path


def _stated(claim: dict | None, claim_file: Path, network: str | None) -> tuple[str, int | None]:
    """Return (specification, number of classes) of a state dict's network, by its claim.

    If the claim does not state them: the specification that is given, and None.
    """
    if claim is None or "network" not in claim:
        return network or DEFAULT, None
    stated = claim["network"]
    spec, classes = (stated.get("spec"), stated.get("classes")) if isinstance(stated, dict) else (None, None)
    if not isinstance(spec, str) or type(classes) is not int or not 1 <= classes < 2**16:
        raise BadInput(f"{claim_file}: \"network\" holds no specification and number of classes")
    try:
        return followed(spec, network), classes
    except BadInput as error:
        raise BadInput(f"{claim_file}: {error}") from error


def read(path, network: str | None = None) -> Checkpoint:
    """Read a state dict or a packed .mnet, and its claim, the .json next to it; return a Checkpoint.

    network: the specification of the network, if the claim states none (default: the submission's); needed to run a
    network from a file, and then it must be the claim's.
    A packed file contains its formats. They are the claim if there is no .json; otherwise they must agree with it.
    Raises BadInput if a file cannot be read, or if the claim was altered since it was written.
    """
    path, claim_file, own, problems = Path(path), claims.claim_path(path), None, []
    claim = claims.read(claim_file) if claim_file.exists() else None
    spec, classes = _stated(claim, claim_file, network)
    if path.suffix == ".mnet":
        model, own = mnet.unpack(path, network)
    else:
        model = prepare(load_checkpoint(path, spec, classes))
    digest = sha256(path)
    if claim is None and own is None:
        return Checkpoint(path, digest, model, None, found_formats(model), [])
    if claim is None:
        claim = own
    else:
        if "network" in claim:
            if other := claims.other_network(claim["network"], model):
                problems.append(f"{claim_file}: {other}")
            claim["network"]["spec"] = spec  # as given: its file may be in another folder
        record = claim if own is None else claim.get("packed")
        claimed = record.get("sha256") if isinstance(record, dict) else None
        if claimed != digest:
            problems.append(f"{claim_file} is about another file, with SHA-256 {claimed}; that of {path} is {digest}")
        if differing := mnet.format_differences(claim, own) if own else []:
            problems.append(f"{claim_file} and {path} do not agree on {brief(differing)}")
    formats, contradictions = claims.check(claim, claim_file, model)
    return Checkpoint(path, digest, model, claim, formats, problems + contradictions)


def load(path, network: str | None = None) -> tuple[nn.Module, dict]:
    """Return (model, claim) of a checkpoint. Raises BadInput if it contradicts its claim or has none.

    network: as in `read`. exact_network takes both: exact_network(model, claim["activations"]).
    """
    checkpoint = read(path, network)
    if checkpoint.claim is None:
        raise BadInput(f"{path} has no claim next to it, {claims.claim_path(path).name}: its formats are unknown; "
                       "quantize.py writes one")
    if checkpoint.problems:
        more = f" (and {len(checkpoint.problems) - 1} more; testers.py lists them)" if checkpoint.problems[1:] else ""
        raise BadInput(f"{checkpoint.problems[0]}{more}")
    return checkpoint.model, checkpoint.claim
