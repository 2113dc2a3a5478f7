"""Plant bugs one by one in a copy of the repository, and check that the tests of the changed module notice them.

    python tests/bugs.py [WORD ...]     only the bugs whose file or description holds one of the words

A bug changes one line and raises no error by itself: what fails is an assertion about a result. Exit status 1 if one
goes unnoticed. tests/test_repository.py checks that every line is still where the bug is planted.
"""
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# (file, part of a line, what it becomes, the tests that have to fail, what is wrong)
BUGS = (
    ("mobilenet_v2.py", "out = self.gated(out) + self.shortcut(x)",
     "out = self.gated(out) + x if out.shape == x.shape else out",
     "test_mobilenet_v2.py", "blocks whose width changes lose their shortcut"),
    ("compressed/graph.py", "return any(op.kind in NORMALISATIONS.values() for op in self.operations)", "return False",
     "test_exact_network.py", "a network that scales its input counts as one that does not"),
    ("compressed/counting.py", "terms, bits = (terms + 1) // 2,", "terms, bits = terms // 2,", "test_counting.py",
     "an adder tree drops the number that waits"),
    ("compressed/counting.py", "return min(layouts, key=cost)", "return max(layouts, key=cost)", "test_counting.py",
     "the dearer layout is stored"),
    ("compressed/formats.py", "max(~low, 0)", "max(-low, 0)", "test_counting.py", "the code -128 takes nine bits"),
    ("compressed/formats.py", "EVEN_TOLERANCE = 2.0**-22", "EVEN_TOLERANCE = 2.0**-12", "test_counting.py",
     "values off the grid pass for codes"),
    ("compressed/formats.py", "- bn.running_mean.double() * scale", "- bn.running_mean.double()",
     "test_exact_network.py", "the mean is subtracted unscaled"),
    ("compressed/dead_weight.py", "torch.stack(found).all(0)", "torch.stack(found).any(0)", "test_dead_weight.py",
     "one empty branch makes a sum empty"),
    ("compressed/mnet.py", "places[0] *= -1", "places[0] *= 1", "test_mnet.py", "packed codes lose their sign"),
    ("compressed/claims.py", "int(codes.max())) > bits:", "int(codes.max())) > 2 * bits:", "test_testers.py",
     "a claim below what the values need passes"),
    ("compressed/networks.py", "and (value < 0).any()", "and (value < -1).any()", "test_networks.py",
     "small negative variances pass"),
    ("compressed/files.py", "if record[\"digest\"] != digest(record):", "if record[\"digest\"] is None:",
     "test_files.py", "an altered record is read"),
    ("compressed/evaluation.py", "correct.cpu()[~duplicates[", "correct.cpu()[duplicates[", "test_evaluation.py",
     "near-duplicates alone are counted"),
    ("compressed/datasets.py", "if classes not in (None, data.data_set.classes):", "if classes is None:",
     "test_datasets.py", "a network of other classes is evaluated"),
    ("compressed/step_search.py", "for step in (2 * before, before / 2):", "for step in (2 * before, before):",
     "test_grids.py", "smaller steps are never tried"),
    ("compressed/grids.py", "min(-13 - needed, 15 - room)", "min(-14 - needed, 15 - room)", "test_grids.py",
     "the smallest scale stays subnormal"),
    ("training/penalties.py", "self.alphas = [factor / (group_norms(weight, self.kind) + self.eps)",
     "self.alphas = [factor / (group_norms(weight, self.kind) + 2 * self.eps)", "test_penalties.py",
     "eps counts twice"),
    ("training/feedback.py", "move.clamp(-fall, RISE)", "move.clamp(-RISE, fall)", "test_feedback.py",
     "lambda falls fast and rises slowly"),
    ("training/masks.py", "name: score > threshold for", "name: score >= threshold for", "test_masks.py",
     "fewer weights are pruned than the target says"),
    ("training/muon.py", "steps -= old * ((steps * old).sum((1, 2), keepdim=True) / norm**2)", "pass", "test_muon.py",
     "steps also scale the weights"),
    ("training/plan.py", "return settings.lr * (step + 1) / warmup", "return settings.lr * step / warmup",
     "test_loop.py", "the first step has no learning rate"),
    ("training/augmentation.py", "torch.where(cut, kept, lam).float()", "lam.float()", "test_augmentation.py",
     "CutMix's labels ignore that the box was clipped"),
    ("training/batchnorm.py", "norm.running_var.copy_(variance)", "pass", "test_batchnorm.py",
     "the variances are renewed, too"),
    ("training/loop.py", "target = torch.where(lam >= 0.5, labels, others)", "target = labels", "test_loop.py",
     "the train accuracy ignores the mixing"),
    ("training/state.py", "if hashlib.sha256(content).hexdigest() != record[\"sums\"][part]:", "if not content:",
     "test_loop.py", "a damaged state is resumed"),
    ("compressed/formats.py", "of_step = (gradient * (code - scaled * inside))",
     "of_step = (gradient * (code - scaled))", "test_grids.py", "clipped values give the step a wrong gradient"),
    ("compressed/integer_network.py", "weight.sum(0, dtype=torch.int32) * 128",
     "weight.sum(0, dtype=torch.int32) * 127", "test_integer.py", "unsigned codes are shifted by one"),
    ("compressed/exact_network.py", "RELU6 = 6.0", "RELU6 = 7.0", "test_exact_network.py", "ReLU6 is clipped at 7"),
    ("compressed/integer_network.py", "windows(codes, branch.window, source.low)", "windows(codes, branch.window)",
     "test_integer.py", "a maximum of values below zero takes the padding"),
    ("compressed/counting.py", "signed and op.kind not in (*CLIPS, *UNSIGNED))", "signed)", "test_counting.py",
     "without a claim, a ReLU's codes have a sign"),
    ("training/learned_steps.py", "step = straight_through(short, step)", "step = short", "test_fine_tune.py",
     "the steps of channels get no gradient"),
    ("training/optimizers.py", "settings.turn, settings.weight_decay, kept or {},", "settings.turn, 0.0, kept or {},",
     "test_loop.py", "Muon does not decay what it does not turn"),
    ("training/loop.py", "weight = self.settings, len(x) / self.plan.batch_size",
     "weight = self.settings, 1 / len(self.plan.shares)", "test_loop.py", "unequal shares count alike"),
    ("training/penalties.py", "(prices[name] / mean) ** cost_power", "prices[name] ** cost_power", "test_penalties.py",
     "the price of a weight is not relative"),
    ("tools/export_onnx.py", "found[\"dilations\"] = window.dilation", "found[\"dilations\"] = (1, 1)",
     "test_export_onnx.py test_any_network.py", "dilation is left out"),
)


def copy_of_the_repository(folder: Path) -> Path:
    """Copy what the tests need, and return the copy."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, files)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def noticed(bug: tuple, folder: Path) -> tuple[bool, str]:
    """Plant one bug in the copy, run its tests, and take it out again. Return (whether they fail, the failed test)."""
    file, old, new, tests, _ = bug
    path = folder / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        run = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider",
                              *(f"tests/{name}" for name in tests.split())], cwd=folder, capture_output=True, text=True)
    finally:
        path.write_text(text, encoding="utf-8")
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in run.stdout.splitlines()
              if line.startswith("FAILED ")]
    return run.returncode == 1 and bool(failed), "; ".join(failed) or run.stdout[-300:] + run.stderr[-300:]


def main() -> int:
    words, missed = sys.argv[1:], 0
    chosen = [bug for bug in BUGS if not words or any(word in bug[0] + bug[4] for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_repository(Path(folder))
        for bug in chosen:
            began = time.monotonic()
            caught, by = noticed(bug, copy)
            missed += not caught
            print(f"{'noticed' if caught else 'MISSED '}  {bug[0]}: {bug[4]}  ({by}, {time.monotonic() - began:.0f} s)",
                  flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} bugs were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
