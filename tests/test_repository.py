"""What the repository says of itself: imports point one way, scripts parse, the README quotes the claim."""
import ast
import copy
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import bugs
import testers
from benchmarks import gpu_check
from compressed import checkpoints, counting, threads
from compressed.checkpoints import CHECKPOINT
from compressed.command_line import needed
from compressed.errors import BadInput
from compressed.exact_network import exact_network, probe_logits
from compressed.files import load_json, save_record, sha256
from compressed.graph import trace
from mobilenet_v2 import MobileNetV2
from small import save_stage
from tools import report, shipping, tables
from training.runs import load_lines, read_stages, stage_logs

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text() for name in (*report.PAGES, "training/README.md")}
README, ACCOUNT = PAGES["README.md"], PAGES["ACCOUNT.md"]
SHIPPED = [ROOT / CHECKPOINT, *shipping.in_folders(ROOT)]
FILES = sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
               for folder in (".", "compressed", "tools", "training") for path in (ROOT / folder).glob("*.py")
               if path.name != "__init__.py")
BENCHMARKS = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")]
TOOL_LIBRARIES = {"tools.agreement", "tools.figures", "tools.shipping", "tools.tables"}  # no scripts
SCRIPTS = {"quantize", "testers", "check_model_operations", "training.main",
           *(name for name in FILES if name.startswith("tools."))} - TOOL_LIBRARIES


@pytest.fixture(scope="module")
def measured():
    return report.measure(ROOT / CHECKPOINT, None, ROOT / "record")


def imported(module: str) -> set[str]:
    """The modules of this repository that one imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_model_file_imports_torch_alone():
    others = {name.split(".")[0] for name in imported("mobilenet_v2")} - set(sys.stdlib_module_names)
    assert others == {"torch"}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    """Scripts and tools -> training -> compressed -> the network: verifying needs no training code."""
    assert SCRIPTS <= set(FILES)
    assert not imported(module) & SCRIPTS
    assert module.startswith("tools.") or not imported(module) & TOOL_LIBRARIES
    if module.startswith("compressed.") or module in ("testers", "check_model_operations"):
        assert not any(name.split(".")[0] == "training" for name in imported(module))


def test_the_root_holds_the_submissions_names_alone():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "mobilenet_v2.py", "testers.py", "check_model_operations.py", "quantize.py"}


def test_imports_have_no_circle():
    graph = {module: imported(module) & set(FILES) for module in FILES}
    while graph:
        leaves = [module for module, uses in graph.items() if not uses & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


@pytest.mark.parametrize("script", ["run.sh", "training/run.sh", ".ci/run"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_run_sh_refuses_an_unknown_command():
    result = subprocess.run(["bash", ROOT / "run.sh", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2 and "unknown command nonsense" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_run_sh_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = subprocess.run(["bash", ROOT / "run.sh", "setup"], capture_output=True, text=True,
                            env={"PATH": "/usr/bin:/bin", "PYTHON": str(old), "VENV": str(tmp_path / "venv")})
    assert result.returncode == 2 and "older than Python 3.11" in result.stderr


@pytest.fixture
def run_sh(tmp_path):
    """run.sh in a folder of its own, with a python that only says where and how it was called."""
    home = tmp_path / "home"
    (home / "venv" / "bin").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, home)
    shutil.copy(ROOT / "requirements.txt", home / "venv")
    python = home / "venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$PWD: $*"\nexit 3\n')
    python.chmod(0o755)

    def run(*words, script=home / "run.sh", **settings):
        return subprocess.run(["bash", script, *words], capture_output=True, text=True, cwd=settings.pop("cwd", home),
                              env={**os.environ, "VENV": "venv"} | settings)
    run.home = home
    return run


@pytest.mark.parametrize("words, called", (
    ("", "-m tools.verify"), ("verify --data d", "-m tools.verify --data d"), ("test -q x.py", "-m pytest -q x.py"),
    ("quick", "-m tools.quick"), ("train --epochs 2", "-m tools.train --epochs 2"), ("ship RUN", "-m tools.ship RUN"),
    ("baseline RUN", "-m tools.baseline RUN")))
def test_run_sh_hands_its_words_on(run_sh, words, called):
    result = run_sh(*words.split())
    assert (result.returncode, result.stdout, result.stderr) == (3, f"{run_sh.home}: {called}\n", "")
    module = called.split()[1]
    assert module == "pytest" or module in FILES


def test_run_sh_makes_an_environment_anew_whose_python_is_gone(run_sh):
    works = run_sh.home / "works"
    works.write_text('#!/bin/sh\necho "$*"\n'
                     'case $* in "-m venv"*) rm venv/bin/python; cp "$0" venv/bin/python;; esac\n')
    works.chmod(0o755)
    (run_sh.home / "venv/pyvenv.cfg").touch()
    python = run_sh.home / "venv/bin/python"
    python.unlink()
    python.symlink_to("/usr/bin/python3.0")
    result = run_sh("verify", PYTHON=str(works))
    assert result.returncode == 0 and "-m venv --clear venv\n-m pip install" in result.stdout
    assert result.stdout.endswith("\n-m tools.verify\n")


def test_run_sh_setup_ends_there(run_sh):
    result = run_sh("setup")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("way", ("link", "linked folder", "relative", "CDPATH"))
def test_run_sh_works_from_elsewhere(run_sh, tmp_path, way):
    elsewhere, settings = tmp_path / "elsewhere", {}
    (elsewhere / "home").mkdir(parents=True)
    script = "../home/run.sh"
    if way == "link":
        script = elsewhere / "verify"
        script.symlink_to("../home/run.sh")
    elif way == "linked folder":
        (elsewhere / "repository").symlink_to(run_sh.home)
        script = "repository/run.sh"
    elif way == "CDPATH":
        script, settings = "home/run.sh", {"CDPATH": str(elsewhere), "cwd": tmp_path}
    result = run_sh(script=script, **{"cwd": elsewhere} | settings)
    assert (result.returncode, result.stdout, result.stderr) == (3, f"{run_sh.home}: -m tools.verify\n", "")


def test_run_sh_with_crlf_says_so(run_sh):
    script = run_sh.home / "run.sh"
    script.write_bytes(script.read_bytes().replace(b"\n", b"\r\n"))
    result = run_sh()
    assert result.returncode == 2 and result.stdout == "" and re.fullmatch("run.sh: .*CRLF.*\n", result.stderr)


def test_git_gives_shell_scripts_no_crlf(tmp_path):
    """Whatever core.autocrlf says."""
    for words in ("init -q", "add .", "checkout-index --force --prefix=out/ --all"):
        if words == "add .":
            shutil.copy(ROOT / ".gitattributes", tmp_path)
            for name in ("run.sh", "training/run.sh", ".ci/run"):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, tmp_path / name)
        subprocess.run(["git", "-c", "core.autocrlf=true", *words.split()], cwd=tmp_path, check=True,
                       capture_output=True)
    for name in ("run.sh", "training/run.sh", ".ci/run"):
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / name).read_bytes()


def test_every_file_that_the_readme_names_exists():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if not link.startswith("http"):
                assert (ROOT / name).parent.joinpath(link).exists(), (name, link)


def test_every_python_command_in_the_readme_names_a_script():
    scripts = re.findall(r"(?:python|torchrun[^`\n]*?) ([\w/]+\.py)", "".join(PAGES.values()))
    assert len(scripts) > 10
    for script in scripts:
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ([\w.]+)", "".join(PAGES.values())):
        assert module.split(".")[0] in ("pip", "pytest") or module in FILES + BENCHMARKS, module


def test_how_far_the_penalty_came():
    last = load_lines(ROOT / "record/rew.jsonl")[-1]
    share = last["zeros"] / (3_944_032 - 1_080)  # of all layers but the stem
    for name in ("training/METHOD.md", "record/README.md"):
        assert f"reached {share:.0%}" in PAGES[name]


def test_the_readmes_tables_are_those_of_the_claim():
    assert report.main(["--check"]) == 0


def test_a_changed_number_in_a_page_is_noticed(measured, monkeypatch):
    changed = copy.deepcopy(measured.claim)
    changed["counts"]["weights"]["all"]["zeros"] += 1
    monkeypatch.setattr(report, "measure", lambda *_: dataclasses.replace(measured, claim=changed))
    with pytest.raises(BadInput, match="the tables of .*ACCOUNT.md.* run python -m tools.report"):
        report.main(["--check"])


def test_report_into_a_folder(tmp_path):
    """All that it reads of a record is read from --logs, and nothing else is written."""
    shutil.copytree(ROOT / "record", tmp_path / "record", ignore=shutil.ignore_patterns("*.pt", "*.md"))
    (tmp_path / "record/dense.tested.json").write_text('{"correct": 1234, "images": 10000}')
    save_record({"settings": {"batch_size": 128}, "options": {}}, tmp_path / "record/dense.options.json")
    before = (ROOT / "figures/board.png").stat().st_mtime_ns
    assert report.main(["--logs", str(tmp_path / "record"), "--to", str(tmp_path / "to")]) == 0
    for name in ("layers", "cost", "training", "board", "sparsity"):
        assert (tmp_path / f"to/figures/{name}.png").stat().st_size > 10_000
    command = "`python testers.py --checkpoint record/dense.pt`"
    row, = re.findall(r"\| dense\b.*81.92%.*\n", README)
    assert (tmp_path / "to/README.md").read_text() == README.replace(row, f"| dense | 12.34% | 81.92% | {command} |\n")
    assert (tmp_path / "to/record/README.md").read_text() == PAGES["record/README.md"]
    assert (ROOT / "figures/board.png").stat().st_mtime_ns == before and (ROOT / "README.md").read_text() == README


def test_the_row_of_the_dense_baseline(measured):
    """By where it comes from; without one the comparison is left out."""
    for dense, label in ((None, "dense; ours: not trained yet | - | "),
                         ({"correct": 8200, "images": 10_000, "freed": False, "images_trained": 5 * 10**6},
                          "dense | 82.00% | "),
                         ({"correct": 8200, "images": 10_000, "freed": True},
                          "dense; ours: the masked network, trained further without its mask | 82.00% | ")):
        network = dataclasses.replace(measured, dense=dense)
        for page in (report.summary(network), report.results(network)):
            assert f"| {label}81.92% |" in page
        assert ("what compression costs is not known" in report.dense(network)) == (label != "dense | 82.00% | ")
        assert ("on 5.00M images, the shipped one on " in report.dense(network)) == (label == "dense | 82.00% | ")
        assert ("| difference from this dense network |" in report.results(network)) == (dense is not None)


def test_the_accuracy_without_near_duplicates_has_a_row_where_it_was_measured(measured):
    claim = copy.deepcopy(measured.claim)
    claim["accuracy"]["without_duplicates"] = {"correct": 7400, "images": 9109}
    row = "near-duplicate in the train set | 81.24% (7,400 of 9,109) | - | `python testers.py` |"
    known = measured.claim["accuracy"].get("without_duplicates") is not None
    for page in (report.summary, report.results):
        assert row in page(dataclasses.replace(measured, claim=claim)) and ("near-duplicate" in page(measured)) == known


def test_the_images_of_all_stages_are_those_of_the_logs():
    stages = load_json(ROOT / "cifar100_mobilenetv2.json")["made_by"]["training"]
    images = sum(stage.images(stage.lines[-1]) for stage in read_stages(ROOT / "record"))
    effort = report.Shipped("", None, {"made_by": {"training": stages}}).effort()
    assert effort.startswith(f"{images / 1e6:.2f}M") and f"| {effort} |" in README


@pytest.mark.parametrize("spec, name", (("mobilenet_v2:MobileNetV2", "ours, small/"), (
    "mobilenet_v2:KaistMobileNetV2", "KAIST AI's network, compressed further")))
def test_the_tables_take_in_a_second_network(measured, spec, name, tmp_path):
    """One in a folder of its own: rows of two tables, in the board's by score, and points of the figure.

    What is another's is called so, with its licence.
    """
    small = report.Shipped("small", measured.model, copy.deepcopy(measured.claim) | {"network": {"spec": spec}})
    for found in small.claim["counts"]["score"].values():
        found["score"] /= 4
    both = dataclasses.replace(measured, others=(small,))
    rows = report.board(both).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows[:3]] == [
        f"| **{name}**, not entered", "| **ours**, not entered", "| RIAIR, 1st"]
    what = r"MobileNetV2 x1\.3, 3,944,032 weights, \d\d% sparse, 6/8-bit weights, 8-bit activations"
    assert re.search(rf"\| {what} \| ", rows[1])
    scores = ", ".join(f"{score / 4:.4f}" for score in measured.scores.values())
    row = f"| **{name}**: accuracy; score | {measured.result()}; {scores} | - | `bash run.sh` |"
    assert row in report.summary(both).splitlines()
    for page in (report.summary(both), report.board(both)):
        assert ("(c) 2019 Kthyeon" in page and "[small/](small)" in page) == ("Kaist" in spec)
    labels = report.made_figures(both, tmp_path)["board"].axes[0].get_legend_handles_labels()[1]
    assert labels[:2] == ["ours", name]


def test_the_figure_of_costs_has_every_kind(tmp_path):
    """Of networks with hard swish, products and sigmoids, too."""
    network = report.Shipped("small", *checkpoints.load(shipping.in_folders(ROOT)[0]))
    totals = [counting.totals(rows)["bits"] / 32e6 for rows in network.counted.values()]
    axes = report.made_figures(network, tmp_path)["cost"].axes[1]
    assert [text.get_text() for text in axes.texts] == [f"{total:.2f}M" for total in totals]


def test_the_figure_of_sparsity_has_zeros_and_path_of_the_pruned_layers(tmp_path):
    """Of every reweighted stage that followed a path: that in the folder of the logs, and those in record/*/."""
    found = report.feedback_stages(ROOT / "record")
    assert "MobileNetV2, target 80.3%" in found and "SmallMobileNetV2, target 64.0%" in found
    line = load_lines(ROOT / "record/default/rew.jsonl")[0]
    lines = [line | {"epoch": 1, "zeros_share": 0.25, "zeros_path": 0.3, "lambda": 1e-6},
             line | {"epoch": 2, "zeros_share": 0.5, "zeros_path": 0.5, "lambda": 2e-6}]
    save_stage(tmp_path, "rew", {"network": "m:Mine"}, lines)
    found = report.feedback_stages(tmp_path)
    assert list(found)[0] == "Mine, target 50.0%" and len(found) >= 3
    left, right = needed("tools.figures").sparsity_figure(found).axes
    drawn = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(drawn["Mine, target 50.0%"]) == [25, 50] and list(left.lines[1].get_ydata()) == [30, 50]
    assert list(right.lines[0].get_ydata()) == [1e-6, 2e-6]


def test_the_page_of_the_small_network_is_that_of_its_files():
    folder = ROOT / "record/small"
    page, claim = (folder / "README.md").read_text(), load_json(folder / "net.json")
    last = {log.stem: load_lines(log)[-1] for log in stage_logs(folder)}
    assert claim["sha256"] == sha256(folder / "net.pt")
    assert claim["made_by"]["source_sha256"] == sha256(folder / "masked.average.pt")
    for stage in ("pretrain", "rew", "masked", "quantized"):
        assert f"{last[stage]['test_accuracy']:.2%}" in page
    assert f"{last['rew']['zeros_share']:.2%} of the pruned layers' weights are zero" in page
    accuracy, scores = claim["accuracy"], claim["counts"]["score"]
    assert f"its accuracy, {accuracy['correct'] / accuracy['images']:.2%}, is below" in page
    assert " / ".join(f"{scores[name]['score']:.4f}" for name in counting.CONVENTIONS) in page


def test_the_comparison_of_pruning_methods():
    """Mean and deviation over seeds for each target, nearly-zeros, and differences by seed; and the figure."""
    rows = [{"method": method, "target": target, "seed": seed, "accuracy": accuracy, "near_zero": near,
             "machine": {"device": "CPU", "cores": 2, "processes": 1, "torch": "2.14"}}
            for method, target, seed, accuracy, near in (
                ("proximal", 0.9, 0, 0.5, 0.8), ("proximal", 0.9, 1, 0.52, 0.9), ("one-shot", 0.9, 1, 0.4, 0.005),
                ("proximal", 0.8, 0, 0.6, 0.75))]
    about = {"network": "m:Mine", "epochs": [3, 2, 1], "batch_size": 4, "sizes": "24:0.5,32", "precision": "float32"}
    table = tables.methods_table({"about": about, "rows": rows}).splitlines()
    assert table[2:4] == ["| one-shot |  |  |  | 40.00% (1) | 0.5% |  |",
                          "| proximal | 60.00% (1) | 75.0% |  | 51.00% ± 1.41% (2) | 85.0% | +12.00 |"]
    assert "`m:Mine`, 3 epochs dense, 2 to make" in table[5] and "on 2 CPU cores" in table[5]
    assert "Without pruning" not in table[5]
    rows.append(rows[0] | {"method": "dense", "target": 0, "accuracy": 0.7})
    assert "Without pruning, the same training reaches 70.00% (1)." in tables.methods_table(
        {"about": about, "rows": rows}).splitlines()[5]
    left, right = needed("tools.figures").methods_figure(tables.by_seed(rows)).axes
    assert [text.get_text() for text in right.get_xticklabels()] == ["one-shot", "proximal"]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["seed 0"]
    assert [list(line.get_ydata()) for line in left.lines] == [[60], [70, 70]]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in right.lines] == [
        ([1], [50]), ([0, 1], [70, 70]), ([0, 1], [40, 52])]


def test_every_pruning_method_has_three_seeds():
    """Of the penalty in the loss, one lambda."""
    values = tables.by_seed(load_json(ROOT / "benchmarks/sparsity_methods.json")["rows"])
    assert set(values) == {0.0, 0.8, 0.9} and set(values[0.0]["dense"]) == {0, 1, 2}
    for target in (0.8, 0.9):
        complete = {tables.by_lambda(method)[0] for method, found in values[target].items() if set(found) == {0, 1, 2}}
        assert complete == {"proximal", "loss", "magnitude", "one-shot", "plain"}


def test_what_method_md_says_of_pruning_methods():
    rows = load_json(ROOT / "benchmarks/sparsity_methods.json")["rows"]
    values = tables.by_seed(rows)
    points = {(name, target): {seed: 100 * accuracy for seed, accuracy in found.items()}
              for target, each in values.items() for name, found in each.items()}

    def above(better, worse):
        return [points[better][seed] - points[worse][seed] for seed in points[better]]

    def span(*pairs):
        found = [value for pair in pairs for value in above(*pair)]
        return f"{min(found):.1f} to {max(found):.1f}"

    def near(method):
        return statistics.mean(row["near_zero"] for row in rows if (row["method"], row["target"]) == (method, 0.8))

    best, proximal, magnitude, at_once, plain = "loss-1e-06", "proximal", "magnitude", "one-shot", "plain"
    text = (ROOT / "training/METHOD.md").read_text()
    for said in (
            "behind the others by " + span(*(((name, 0.9), (at_once, 0.9)) for name in
                                             (best, "loss-1e-05", proximal, magnitude))),
            f"ahead of gradual magnitude pruning, by {span(((at_once, 0.8), (magnitude, 0.8)))} points",
            f"for every seed: by {span(((best, 0.8), (magnitude, 0.8)))} points at 80% zeros, by "
            f"{span(((best, 0.9), (magnitude, 0.9)))} at 90%",
            f"gradual magnitude pruning at 80% zeros, by {span(((proximal, 0.8), (magnitude, 0.8)))} points",
            f"({', '.join(f'{value:+.1f}' for value in above((proximal, 0.9), (magnitude, 0.9)))})",
            f"ahead of the proximal form, the default here, for every seed: by {span(((best, 0.8), (proximal, 0.8)))} "
            f"points at 80%, by {span(((best, 0.9), (proximal, 0.9)))} at 90%",
            f"behind pruning at once at 80% for every seed, by {span(((at_once, 0.8), (proximal, 0.8)))} points, and "
            f"{span(((proximal, 0.9), (at_once, 0.9)))} ahead of it at 90%",
            f"{span(((proximal, 0.9), (plain, 0.9)))} points behind `proximal` at 90% zeros and\n  "
            f"{span(((proximal, 0.8), (plain, 0.8)))} at 80%, and {span(((at_once, 0.9), (plain, 0.9)))} and "
            f"{span(((at_once, 0.8), (plain, 0.8)))} behind pruning at once",
            f"{near(plain):.0%} of the pruned layers' weights are\n  below 1e-4 before the mask "
            f"(`proximal`: {near(proximal):.0%})",
            f"with 80% zeros lose {span((('dense', 0.0), (best, 0.8)))} points, and those with 90% "
            f"{span((('dense', 0.0), (best, 0.9)))}"):
        assert said in text, said


def test_what_account_md_says_of_fixed_lengths_from_the_fan_in(monkeypatch):
    found, of_codes = [], counting.fixed_bits
    for path in SHIPPED:
        checkpoint = checkpoints.read(path)
        with monkeypatch.context() as patch:
            patch.setattr(counting, "fixed_bits", lambda weight, grid, activation, terms=None: of_codes(
                weight, grid, activation, weight[0].numel()))
            by_fan_in = counting.summary(checkpoint.model, checkpoint.formats)
        scores = [counts["score"]["fixed"]["score"] for counts in (by_fan_in, checkpoint.claim["counts"])]
        found.append("{:.4f} instead of {:.4f}".format(*scores))
    text = (ROOT / "ACCOUNT.md").read_text()
    assert all(each in text for each in found) and len(found) == 2


def test_the_smaller_network_is_below_the_board():
    claims = [load_json(path.with_suffix(".json")) for path in shipping.in_folders(ROOT)]
    claim = min(claims, key=lambda each: each["counts"]["score"]["tree"]["score"])
    assert claim["accuracy"]["correct"] >= 8000 and claim["accuracy"]["data"] == "test"
    for convention, column in zip(("32-bit", "fixed", "tree"), (3, 4, 5)):
        published = [float(number) for entry in report.BOARD for number in re.findall(r"0\.\d+", entry[column])]
        assert published and claim["counts"]["score"][convention]["score"] < min(published)


def test_both_networks_are_shipped():
    assert {ROOT / CHECKPOINT, ROOT / "kaist" / CHECKPOINT} <= set(SHIPPED)
    for path in SHIPPED:
        assert all(path.with_suffix(suffix).is_file() for suffix in (".pt", ".json", ".mnet"))


@pytest.mark.parametrize("checkpoint", SHIPPED, ids=lambda path: path.parent.name)
def test_a_shipped_network_is_what_its_claim_says(checkpoint):
    """All but its accuracy, for which tests/test_testers.py needs the real images."""
    found = checkpoints.read(checkpoint)
    claim, record = found.claim, checkpoint.parent / "record"
    assert found.problems == []
    assert claim["accuracy"]["data"] == "test" and claim["accuracy"]["images"] == 10_000
    assert claim["counts"] == counting.summary(found.model, found.formats)
    assert claim["probe_logits"] == probe_logits(exact_network(found.model, claim["activations"]))
    packed = checkpoints.read(checkpoint.with_suffix(".mnet"))
    assert packed.problems == [] and packed.formats == found.formats
    assert all(map(torch.equal, packed.model.state_dict().values(), found.model.state_dict().values()))
    assert re.fullmatch("[0-9a-f]{12}", claim["made_by"]["commit"])  # and no "-dirty"
    assert claim["made_by"]["source_sha256"] == sha256(record / "masked.pt")  # so anybody can repeat it
    assert {stage["stage"]: stage["last_epoch"] for stage in claim["made_by"]["training"]} == {
        log.stem: load_lines(log)[-1] for log in stage_logs(record)}


def test_the_shipped_model_is_what_the_issue_asks_for():
    claim = load_json(ROOT / "cifar100_mobilenetv2.json")
    assert claim["counts"]["weights"]["submission"]["sparsity"] >= 0.7695
    bits = [tensor["bits"] for tensor in claim["tensors"]
            if tensor["name"].split(".")[-2] in ("conv1", "conv2", "conv3", "0", "linear")
            and tensor["name"].endswith("weight")]
    assert [i for i, b in enumerate(bits) if b == 6] == [3, 5, 8, 10, 11, 14, 16, 19, 55] and len(bits) == 58
    assert set(bits) == {6, 8} and all(a["bits"] == 8 for a in claim["activations"]) and len(claim["activations"]) == 55


def test_the_dense_baseline_is_the_file_that_was_tested(capsys):
    """Its accuracy is what testers.py said of this file; and testers.py takes it, without a claim beside it."""
    tested = load_json(ROOT / "record" / "dense.tested.json")
    dense = ROOT / tested["checkpoint"]
    assert tested["sha256"] == sha256(dense) and (tested["data"], tested["images"]) == ("test", 10_000)
    assert testers.main(["--checkpoint", str(dense), "--made-up", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == tested["counts"]


@pytest.mark.parametrize("recorded, device", (
    ("1 process(es), CPU, 2 core(s), torch 2.14.1+cu130, Python 3.11.7", "2 CPU cores"),
    ("2 process(es), CPU, 1 core(s), torch 2.14.1, Python 3.11.7", "2 CPU cores"),
    ("CPU, 1 cores, torch 2.14.1+cu130", "1 CPU core"),
    ("4 process(es), NVIDIA H200, torch 2.11.0+cu130, Python 3.12.3", "4 NVIDIA H200"),
    ("NVIDIA H200, torch 2.11.0+cu130", "1 NVIDIA H200"),
    ({"device": "AMD Instinct MI300X", "cores": 8, "processes": 1}, "1 AMD Instinct MI300X"),
    ({"device": "CPU", "cores": 8, "processes": 3}, "24 CPU cores")))
def test_the_machine_of_a_record(recorded, device):
    assert tables.device(report.machine(recorded)) == device


def test_images_and_hours_are_summed_by_device():
    cpu, gpu = threads.describe_machine("cpu"), {"device": "AMD Instinct MI300X", "cores": 8, "processes": 1}
    stages = [{"stage": name, "machine": machine, "settings": {"batch_size": 1000}, "last_epoch": {
        "seconds": seconds, "step": seconds, "epoch": 1}} for name, machine, seconds in (
        ("pretrain", cpu | {"cores": 16}, 5400), ("rew", gpu, 60), ("masked", cpu | {"cores": 16}, 3600),
        ("quantized", gpu, 120))]
    measured = report.Shipped("", None, {"made_by": {"training": stages}})
    assert measured.effort() == "9.18M: 9.00M in 2.5 h on 16 CPU cores, 0.18M in 3 min on 1 AMD Instinct MI300X"
    del stages[1::2]
    assert measured.effort() == "9.00M in 2.5 h on 16 CPU cores"


def test_the_gpu_check_runs_the_tests_of_a_gpu():
    marked = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")
              if "@pytest.mark." + "cuda\n" in path.read_text()}
    assert marked == set(gpu_check.TESTS[0][2:])
    for file, _, name in (word.partition("::") for words in gpu_check.TESTS for word in words):
        assert not name or f"def {name}(" in (ROOT / file).read_text()


def test_every_table_has_a_place():
    places = re.findall(r"<!-- (\w+) -->\n", "".join(PAGES.values()))
    assert sorted(places) == sorted([*(make.__name__ for make in report.TABLES), *tables.BENCHMARKS])


def test_fill():
    assert report.fill("nothing here", {"a": "new"}) == "nothing here"
    assert report.fill("<!-- a -->\nold\n<!-- end a -->", {"a": "new"}) == "<!-- a -->\nnew\n<!-- end a -->"
    with pytest.raises(BadInput, match="a table 'b'"):
        report.fill("<!-- b -->\nold\n<!-- end b -->", {"a": "new"})


def test_figures_quoted_in_the_readme():
    """The numbers of the text that no table holds, from the commands that the text names."""
    dense = counting.submission_operations(trace(MobileNetV2()))
    half = counting.submission_operations(trace(MobileNetV2()), 0.5)
    for part in (dense, half):
        text = f"{part['multiplication_bits'] / 32e6:.3f}M + {part['addition_bits'] / 32e6:.3f}M"
        assert text in ACCOUNT
    assert f"{dense['bits'] / 32e6:.3f}M" in ACCOUNT and f"{half['bits'] / 32e6:.3f}M" in ACCOUNT


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of an installed package: what pip finds in a wheel, built from a copy, for it leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
    source, wheels, installed = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    shutil.copytree(ROOT / "compressed", source / "compressed", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mobilenet_v2.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=source, check=True, capture_output=True)
    wheel, = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(installed)
    return installed


def test_the_package_has_all_that_the_libraries_need(package):
    assert {path.name for path in package.iterdir() if path.suffix != ".dist-info"} == {"compressed", "mobilenet_v2.py"}
    for folder in (ROOT / "compressed", package / "compressed"):
        assert {path.name for path in folder.iterdir() if path.name != "__pycache__"} == {
            path.name for path in (ROOT / "compressed").iterdir() if path.suffix in (".py", ".c", ".csv")}


def test_the_readmes_python_runs_anywhere(package, tmp_path):
    """In a folder with files of our modules' names, with the installed package."""
    for name in ("files", "graph", "errors", "networks", "mobilenet_v2", "training", "tools"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')")
    (tmp_path / "REPOSITORY").symlink_to(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    (tmp_path / "example.py").write_text(f"import torch\nimages = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)\n{code}"
                                         "print(tuple(logits.shape), checkpoints.__file__)\n")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(package), "CC": "false"})
    assert done.stdout == f"(2, 100) {package / 'compressed' / 'checkpoints.py'}\n", done.stderr


def test_the_package_requires_what_requirements_txt_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    assert sorted(stated) == sorted((ROOT / "requirements.txt").read_text().splitlines())


def test_the_first_page_is_short():
    assert f"; {len(bugs.BUGS)} planted bugs" in README
    assert len(README.split()) <= 1200 and len(README.splitlines()) <= 150


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug[4])
def test_planted_bugs_are_about_lines_that_exist(bug):
    file, old, new, tests, _ = bug
    assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1 and new != old
    assert all((ROOT / "tests" / name).is_file() for name in tests.split())


def test_the_times_of_an_epoch():
    """They are medians over the log's epochs, whose times have one decimal."""
    lines = load_lines(ROOT / "record/default/masked-1.jsonl")
    times = {size: statistics.median(b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:]) if b["size"] == size)
             for size in (24, 32)}
    assert f"takes {times[32]:.1f} s, and {times[24]:.1f} s at 24x24" in (ROOT / "training/README.md").read_text()
    page = (ROOT / "record/default/README.md").read_text()
    assert f"takes {times[24]:.1f} s at 24x24 and {times[32]:.1f} s at 32x32" in page
    lines = load_lines(ROOT / "record/default/masked.jsonl")
    minutes = statistics.median(b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])) / 60
    assert "on the CPU (two cores of a Zen 4) 5 to 6 minutes at\n32x32" in page and 4.9 <= minutes <= 6.1
    for stage in ("pretrain", "rew"):
        last = load_lines(ROOT / f"record/default/{stage}.jsonl")[-1]
        assert f"{last['seconds']:.0f} s; {last['test_accuracy']:.2%} on the test set" in page
    assert f"{last['zeros_share']:.2%} zeros in the pruned layers, all made by the penalty" in page
