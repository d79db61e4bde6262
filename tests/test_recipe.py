"""Recipes: strict files, the same options as compile, a command that says the same."""

import inspect
import shlex

import pytest
import yaml
from typer.main import get_command

import moqc.api
from moqc.errors import UserError
from moqc.quant.overrides import Override
from moqc.recipe import Recipe, make_recipe, read_recipe

CHANGED = Recipe(
    bits=2.5,
    overrides=(Override(r"layers\.0\..*down", (4, 8)),),
    calibration=("a b.txt", "c.txt"),
    context=512,
    pipeline="legalize,schedule",
)


@pytest.mark.parametrize("recipe", [Recipe(), CHANGED])
def test_yaml_and_back(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert make_recipe(read_recipe(file), "file") == recipe


def test_keys_and_defaults_are_those_of_compile():
    parameters = inspect.signature(moqc.api.compile).parameters
    for key, value in Recipe().options().items():
        assert parameters[key].default == value, key


def test_every_choice_of_compile_is_in_a_recipe():
    """What is missing would be missing from the command that makes an artifact again."""
    elsewhere = {"model", "out", "cache", "force", "start_from", "debug"}
    assert set(inspect.signature(moqc.api.compile).parameters) - elsewhere == set(Recipe().options())


def test_the_command_line_has_the_same_defaults():
    from moqc.cli import app

    options = {option.name: option for option in get_command(app).commands["compile"].params}
    for key, value in Recipe().options().items():
        assert (options[key].default or ()) == (value or ()), key


def test_command_names_what_is_changed():
    words = shlex.split(CHANGED.command("my model", "out"))
    assert words[:5] == ["moqc", "compile", "my model", "-o", "out"]
    given = list(zip(words[5::2], words[6::2], strict=True))
    assert given == [
        ("--bits", "2.5"),
        ("--override", r"layers\.0\..*down=4,8"),
        ("--calib", "a b.txt"),
        ("--calib", "c.txt"),
        ("--context", "512"),
        ("--pipeline", "legalize,schedule"),
    ]
    assert Recipe().command("m", "o") == "moqc compile m -o o"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: many", "bits: input should be a valid number"),
        ("bit: 2", "unknown option 'bit': known are bits"),
        ("bits: [2", "line 1: not YAML"),
        ("- bits", "`key: value` lines"),
        ("context: 1.5", "context: input should be a valid integer"),
    ],
)
def test_errors_name_file_and_place(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml") as error:
        read_recipe(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_file_is_the_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("# nothing\n")
    assert read_recipe(file) == {}
    with pytest.raises(UserError, match=r"none\.yaml: cannot read"):
        read_recipe(tmp_path / "none.yaml")


def test_options_on_the_command_line_win(tmp_path, monkeypatch):
    """The recipe's other keys stay; an option that is only the default does not override it."""
    from typer.testing import CliRunner

    from moqc.cli import app

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"bits": 2.25, "seed": 7, "calibration": ["x.txt"]}))
    seen = {}

    def compile(model, output, **options):
        seen.update(options)
        return "text"

    monkeypatch.setattr(moqc.api, "compile", compile)
    result = CliRunner().invoke(app, ["compile", "m", "--recipe", str(file), "--bits", "2.5"])
    assert result.exit_code == 0, result.output
    assert (seen["bits"], seen["seed"], seen["calibration"]) == (2.5, 7, ["x.txt"])
    assert "linears" not in seen


def test_overrides_are_texts_or_tables():
    wanted = (Override("down", (4, 8)),)
    assert make_recipe({"overrides": ["down=4,8"]}, "here").overrides == wanted
    assert make_recipe({"overrides": [{"sites": "down", "bits": [4, 8]}]}, "here").overrides == wanted
    with pytest.raises(UserError, match=r"^here: overrides\.0\.bits"):
        make_recipe({"overrides": [{"sites": "down"}]}, "here")


def test_shares_are_written_as_people_do():
    assert make_recipe({"prune": "15%"}, "here").prune == 0.15
    assert make_recipe({"prune": 0.15}, "here").prune == 0.15


def test_plain_values_make_a_recipe():
    assert make_recipe({"bits": 2}, "here").bits == 2.0
    with pytest.raises(UserError, match=r"^here: unknown option 'x'"):
        make_recipe({"x": 1}, "here")
