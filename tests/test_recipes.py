"""Recipes: TOML files with the options of all stages."""
from pathlib import Path

import pytest

import quantize
from compressed import networks
from compressed.cifar100 import CIFAR100
from compressed.errors import BadInput
from compressed.graph import prepare, weight_layers
from training import main as training
from training import recipes
from training.runs import training_record


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('\ufeffbatch-size = 20\nteacher = ["a.pt", "b.pt"]\n[pretrain]\nlr = 0.5\nresume = false\n'
                    '[rew]\nlr = 0.25\n', encoding="utf-8")
    return path


def test_the_command_line_stands_above_the_recipe(recipe, tmp_path):
    run = str(tmp_path / "run")
    args, by_stage = training.parse_stages(["--recipe", str(recipe), "--run", run])
    assert [by_stage[stage].lr for stage in training.STAGES] == [0.5, 0.25, None]
    assert {options.batch_size for options in by_stage.values()} == {20}
    assert by_stage["pretrain"].resume is False and by_stage["rew"].resume is True
    assert list(map(str, by_stage["masked"].teacher)) == ["a.pt", "b.pt"]
    _, by_stage = training.parse_stages(["--recipe", str(recipe), "--lr", "0.1", "--teacher", "c.pt", "--run", run])
    assert {options.lr for options in by_stage.values()} == {0.1}
    assert list(map(str, by_stage["rew"].teacher)) == ["c.pt"]


def test_a_run_folder_keeps_its_recipe(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_bytes(recipe.read_bytes())
    args, by_stage = training.parse_stages(["--rew", "--run", str(run)])
    assert by_stage["rew"].lr == 0.25 and args.recipe == run / "recipe.toml"
    assert training.parse_stages(["--rew", "--run", str(tmp_path / "other")])[1]["rew"].lr is None


def test_a_claim_holds_the_options_that_the_recipe_gave(tmp_path):
    """quantize.py takes them from the run folder: those of the stage, of all stages, and of the command line."""
    path = tmp_path / "mine.toml"
    network = f"{Path(__file__).with_name('tiny.py')}:Tiny"
    path.write_text(f'network = "{network}"\nbatch-size = 16\n[pretrain]\nturn = 0.5\n')
    assert training.main(["--recipe", str(path), "--pretrain", "--made-up", "32", "--epochs", "1", "--refresh", "0",
                          "--optimizer", "muon", "--run", str(tmp_path / "run"), "--no-cuda"]) == 0
    (stage,) = training_record(tmp_path / "run" / "masked.pt")
    expected = {"turn": 0.5, "batch_size": 16, "epochs": 1, "network": network, "recipe": str(path), "made_up": 32}
    assert {name: stage["options"][name] for name in expected} == expected and stage["stage"] == "pretrain"
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text, named", (("[dense]\n", "no stage 'dense'"), ("lr = ", "not readable as TOML"),
                                         ("speed = 3\n", "unknown option 'speed'"), (b"\xff", "not readable as TOML")))
def test_what_cannot_be_is_named(tmp_path, text, named):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=named):
        training.parse_stages(["--recipe", str(path), "--run", str(tmp_path)])
    with pytest.raises(BadInput, match="there is no recipe nothing.*small"):
        training.parse_stages(["--recipe", "nothing", "--run", str(tmp_path)])


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes.FOLDER.glob("*.toml")))
def test_the_recipes_here_are_taken(name, tmp_path):
    _, by_stage = training.parse_stages(["--recipe", name, "--run", str(tmp_path)])
    for stage, options in by_stage.items():
        assert training.settings_for(stage, options, training.torch.device("cpu")).epochs > 0
    args = quantize.parse(["--recipe", name, "--lr", "0.5"])
    model = prepare(networks.make(args.network))
    chosen = quantize.grid_options(args, model)
    assert quantize.tuning_options(args, chosen.augment, CIFAR100).settings.lr == 0.5
    assert len(chosen.table) == len(weight_layers(model))
    assert args.network == training.parse_stages(["--recipe", name, "--run", str(tmp_path)])[1]["masked"].network
