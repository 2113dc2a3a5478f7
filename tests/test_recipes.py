"""Recipes: TOML files with the options of all stages."""
import json

import numpy as np
import pytest

import quantize
from compressed import networks
from compressed.cifar100 import CIFAR100
from compressed.errors import BadInput
from compressed.graph import prepare, weight_layers
from tiny import SPEC as TINY
from training import main as training
from training import arguments, recipes
from training.runs import training_record


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('\ufeffbatch-size = 20\nteacher = ["a.pt", "b.pt"]\n[pretrain]\nlr = 0.5\nwarmup = false\n'
                    '[rew]\nlr = 0.25\n', encoding="utf-8")
    return path


def test_the_command_line_stands_above_the_recipe(recipe, tmp_path):
    run = str(tmp_path / "run")
    args, by_stage = arguments.parse_stages(["--recipe", str(recipe), "--run", run])
    assert [by_stage[stage].lr for stage in training.STAGES] == [0.5, 0.25, None]
    assert {options.batch_size for options in by_stage.values()} == {20}
    assert by_stage["pretrain"].warmup is False and by_stage["rew"].warmup is True and args.batch_size == 20
    assert list(map(str, by_stage["masked"].teacher)) == ["a.pt", "b.pt"]
    _, by_stage = arguments.parse_stages(["--recipe", str(recipe), "--lr", "0.1", "--teacher", "c.pt", "--run", run])
    assert {options.lr for options in by_stage.values()} == {0.1}
    assert list(map(str, by_stage["rew"].teacher)) == ["c.pt"]
    assert arguments.parse_stages(["--recipe", str(recipe), "--run", run, "--teacher"])[1]["masked"].teacher == []


@pytest.mark.parametrize("line, said", (
    ("epochs = [2, 3]", "the recipe's options of pretrain: .*unrecognized arguments: 3"),
    ("lr = false", "the recipe's options of pretrain: .*unrecognized arguments: --no-lr"),
    ('lr = "much"', "the recipe's options of pretrain: argument --lr: ")))
def test_a_value_of_a_wrong_type_is_refused_with_its_place(tmp_path, line, said):
    path = tmp_path / "mine.toml"
    path.write_text(f"no-cuda = false\nholdout = false\n[pretrain]\n{line}\n")
    with pytest.raises(BadInput, match=said):
        arguments.parse_stages(["--recipe", str(path), "--run", str(tmp_path / "run")])


def test_a_lambda_leaves_the_masks_target(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[rew]\ntarget-sparsity = 0.6\n[masked]\ntarget-sparsity = 0.95\n")
    args = ["--recipe", str(path), "--run", str(tmp_path / "run")]
    for words, targets in (([], [0.6, 0.95]), (["--lambda", "1e-3"], [None, 0.95]),
                           (["--target-sparsity", "0.7"], [0.7, 0.7])):
        _, by_stage = arguments.parse_stages([*args, *words])
        assert [by_stage[stage].target_sparsity for stage in ("rew", "masked")] == targets
        assert by_stage["masked"].lam is None


def test_a_run_folder_keeps_its_recipe(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_bytes(recipe.read_bytes())
    args, by_stage = arguments.parse_stages(["--rew", "--run", str(run)])
    assert by_stage["rew"].lr == 0.25 and args.recipe == run / "recipe.toml"
    assert arguments.parse_stages(["--rew", "--run", str(tmp_path / "other")])[1]["rew"].lr is None


COOLDOWN = recipes.read(recipes.FOLDER / "default.toml")["masked"]["cooldown"]


@pytest.mark.parametrize("words, stage, expected", (
    ("--lambda 1e-5", "rew", {"lam": 1e-5, "target_sparsity": None, "updates": 5}),
    ("--mixup", "rew", {"mixup": True, "mixing": None}), ("--schedule cosine", "masked", {"cooldown": None}),
    ("--schedule constant", "masked", {"cooldown": COOLDOWN}),
    ("--masked-retrain --cooldown 9", "masked", {"cooldown": 9}),
    ("--made-up 32", "rew", {"made_up": 32, "holdout": False}), ("--smoothing 0.2", "masked", {"smooth": True}),
    ("", "rew", {"mixing": "none", "smoothing": 0.0, "warmup": False, "schedule": "constant", "cooldown": 0}),
    ("--mixing cutmix", "rew", {"mixing": "cutmix", "smoothing": 0.0, "warmup": False, "schedule": "constant"}),
    ("--warmup-epochs 3", "rew", {"mixing": "none", "warmup": True, "warmup_epochs": 3, "schedule": "constant"}),
    ("--cooldown 1", "rew", {"mixing": "none", "cooldown": 1, "schedule": "constant"}),
    ("--smooth", "rew", {"mixing": "none", "smoothing": None, "smooth": True}),
    ("--warmup-epochs 3", "pretrain", {"warmup": True}), ("--mixup --no-tricks", "masked", {"cooldown": COOLDOWN}),
    ("--penalty magnitude", "rew", {"cost_power": 0.0, "target_sparsity": 0.803}),
    ("--optimizer adam", "masked", {"lr": None}), ("--optimizer sgd", "masked", {"lr": 0.1}),
    ("--masked-retrain --sparsity-type threshold", "masked", {"sparsity_type": "threshold", "target_sparsity": None}),
    ("--masked-retrain --eps 0.1", "masked", {"sparsity_type": "threshold", "eps": 0.1}), ("", "rew", {"lam": None})))
def test_an_option_of_the_command_line_removes_what_it_excludes(tmp_path, words, stage, expected):
    path = tmp_path / "mine.toml"
    text = "holdout = true\nwarmup = false\nsmooth = false\n" + (recipes.FOLDER / "default.toml").read_text("utf-8")
    path.write_text(text.replace("[rew]", "[rew]\ncost-power = 0.5\nno-tricks = true")
                    .replace("[masked]", '[masked]\nsparsity-type = "threshold"'), "utf-8")
    _, by_stage = arguments.parse_stages(["--recipe", str(path), "--run", str(tmp_path / "run"), *words.split()])
    assert {name: getattr(by_stage[stage], name) for name in expected} == expected
    steps = training.plan.Plan(arguments.settings_for(stage, by_stage[stage], training.torch.device("cpu")), 256,
                               training.loop.Processes())
    assert steps.settings.cooldown == (0 if by_stage[stage].no_tricks else by_stage[stage].cooldown or 0)


def test_what_a_recipe_says_of_images_and_device_holds(tmp_path, capsys):
    """For training as for quantize.py. Another recipe replaces a run's when it trains something, and not before."""
    data, run, path = tmp_path / "set.npz", tmp_path / "run", tmp_path / "mine.toml"
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), np.uint8)
    labels = np.arange(200) % 10
    np.savez(data, train_images=images, train_labels=labels, test_images=images[:20], test_labels=labels[:20])
    text = (f'holdout = true\nno-cuda = true\ndata = "{data}"\nnetwork = "{TINY}"\nbatch-size = 60\nepochs = 1\n'
            'refresh = 0\nlr = 0.01\nprecision = "float32"\n')
    path.write_text(text)
    assert arguments.parse_stages(["--recipe", str(path)])[0].no_cuda
    assert training.main(["--recipe", str(path), "--run", str(run)]) == 0
    assert "3 epochs" not in capsys.readouterr().out
    record = json.loads((run / "pretrain.options.json").read_text())
    assert record["train_images"] == 180 and record["options"]["holdout"] is True
    args = quantize.parse(["--checkpoint", str(run / "masked.pt")])
    assert args.holdout and args.no_cuda and args.data == data
    path.write_text(text.replace("0.01", "0.02") + "[quantized]\nepochs = 3\n")
    assert training.main(["--recipe", str(path), "--run", str(run)]) == 0
    assert capsys.readouterr().out.count("exists, trained with other options (lr 0.01 -> 0.02") == 3
    for option in ("--pretrain", "--rew", "--masked-retrain"):
        with pytest.raises(BadInput, match="trained with other options"):
            training.main(["--recipe", str(path), "--run", str(run), option])
    assert (run / "recipe.toml").read_text() == text
    assert training.main(["--recipe", str(path), "--run", str(run), "--masked-retrain", "--no-resume"]) == 0
    assert "; then quantize.py fine-tunes for 3 epochs\n" in capsys.readouterr().out
    path.write_text(text)  # its one epoch is quantize.py's, too
    assert quantize.parse(["--checkpoint", str(run / "masked.pt"), "--recipe", str(path)]).epochs == 1
    assert training.main(["--recipe", str(path), "--run", str(run), "--masked-retrain", "--no-resume"]) == 0
    assert "; then quantize.py fine-tunes for 1 epochs\n" in capsys.readouterr().out
    assert (run / "recipe.toml").read_text() == path.read_text()


def test_a_claim_holds_the_options_that_the_recipe_gave(tmp_path):
    """quantize.py takes them from the run folder: those of the stage, of all stages, and of the command line."""
    path = tmp_path / "mine.toml"
    path.write_text(f'network = "{TINY}"\nbatch-size = 16\n[pretrain]\nturn = 0.5\n')
    assert training.main(["--recipe", str(path), "--pretrain", "--made-up", "32", "--epochs", "1", "--refresh", "0",
                          "--optimizer", "muon", "--run", str(tmp_path / "run"), "--no-cuda"]) == 0
    (stage,) = training_record(tmp_path / "run" / "masked.pt")
    expected = {"turn": 0.5, "batch_size": 16, "epochs": 1, "network": TINY, "recipe": str(path), "made_up": 32}
    assert {name: stage["options"][name] for name in expected} == expected and stage["stage"] == "pretrain"
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text, named", (("[dense]\n", "no stage 'dense'"), ("lr = ", "not readable as TOML"),
                                         ("speed = 3\n", "unknown option 'speed'"),
                                         ("resume = false\n", "'resume', which belongs to one command"),
                                         ('start = "a.pt"\n', "'start', which belongs to one command"),
                                         ("[rew]\nmax-minutes = 3\n", "'max-minutes', which belongs to one command"),
                                         ("no-cuda = true\n[rew]\nholdout = true\n", "'holdout', .*for all stages")))
def test_what_cannot_be_is_named(tmp_path, text, named):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=named):
        arguments.parse_stages(["--recipe", str(path), "--run", str(tmp_path)])


def test_an_unknown_recipe_is_named(tmp_path):
    with pytest.raises(BadInput, match="there is no recipe nothing.*small"):
        arguments.parse_stages(["--recipe", "nothing", "--run", str(tmp_path)])


def test_real_images_and_sgd_in_place_of_a_recipes_made_up_ones_and_adam(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('made-up = 100\noptimizer = "adam"\nlr = 0.001\n')
    _, by_stage = arguments.parse_stages(["--recipe", str(path), "--run", str(tmp_path / "run"), "--holdout",
                                         "--optimizer", "sgd"])
    assert (by_stage["rew"].holdout, by_stage["rew"].made_up, by_stage["rew"].lr) == (True, None, None)


def test_fine_tuning_takes_the_submissions_names(tmp_path):
    """Common options in the names of its commands, which quantize.py itself does not know."""
    path = tmp_path / "mine.toml"
    path.write_text('optmzr = "adam"\nlr-scheduler = "cosine"\nmixup = true\nepoch = 7\nsmooth-eps = 0.2\n')
    args = quantize.parse(["--recipe", str(path), "--checkpoint", str(tmp_path / "masked.pt")])
    assert (args.optimizer, args.schedule, args.mixing, args.epochs) == ("adam", "cosine", "mixup", 7)
    path.write_text("mixup = false\n[quantized]\nepoch = 2\nepochs = 3\n")
    args = quantize.parse(["--recipe", str(path), "--checkpoint", str(tmp_path / "masked.pt")])
    assert (args.mixing, args.epochs) == ("none", 3)


def test_the_dense_baseline_sees_what_the_sparse_network_does():
    """As many images, the fine-tuning's included, as many of them at 24x24, by the same options."""
    dense, default = (recipes.read(recipes.FOLDER / f"{name}.toml") for name in ("dense", "default"))
    assert dense["common"] == default["common"]
    stages = [default[name] for name in recipes.STAGES]
    assert dense["pretrain"]["epochs"] == sum(stage["epochs"] for stage in stages)
    small = [stage["epochs"] * float(stage.get("sizes", "24:0,").split(":")[1].split(",")[0])
             for stage in (dense["pretrain"], *stages)]
    assert small[0] == pytest.approx(sum(small[1:]), rel=0.01)


RECIPES = sorted(path.stem for path in recipes.FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", [*RECIPES, *{"default", "dense", "small"}.difference(RECIPES)])
def test_the_recipes_here_are_taken(name, tmp_path):
    _, by_stage = arguments.parse_stages(["--recipe", name, "--run", str(tmp_path)])
    for stage, options in by_stage.items():
        assert arguments.settings_for(stage, options, training.torch.device("cpu")).epochs > 0
    args = quantize.parse(["--recipe", name, "--epochs", "1", "--lr", "0.5",
                           "--checkpoint", str(tmp_path / "masked.pt")])
    model = prepare(networks.make(args.network))
    chosen = quantize.grid_options(args, model)
    assert quantize.tuning_options(args, CIFAR100, training.torch.device("cpu"), "").settings.lr == 0.5
    assert len(chosen.table) == len(weight_layers(model))
    assert args.network == arguments.parse_stages(["--recipe", name, "--run", str(tmp_path)])[1]["masked"].network
