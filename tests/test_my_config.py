"""The command line: values by declared type, precedence, one-line errors, exact YAML."""

import enum
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import Field

from my import config as cfg
from my.config import values
from my.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class Grid(enum.Enum):
    dense = "dense"
    tensor = "tensor"


class SD(cfg.Config):
    prompt: str = Field("a pig", description="what to make")
    scale: float = Field(100.0, ge=0, description="guidance strength")
    variant: Literal["v1", "v2"] = Field("v1", description="weights")


class Toy(cfg.Config):
    preset: str | None = Field(None, description="named settings")
    sd: SD = SD(scale=50.0)
    n_steps: int = Field(10, gt=0, description="optimisation steps")
    lr: float = Field(0.05, description="learning rate")
    var_red: bool = Field(True, description="variance reduction")
    depth: float | None = Field(None, description="depth weight")
    size: tuple[int, int] = Field((64, 64), description="height, width")
    views: list[float] = Field([0.5], description="view angles")
    tags: list[str] = Field([], description="words")
    grid: Grid = Field(Grid.dense, description="field")


PRESETS = {"burger": "sd: {prompt: a burger}\nlr: 0.1\n", "chair": "sd.prompt: a chair\n"}


@pytest.fixture
def load(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    for name, text in PRESETS.items():
        (tmp_path / "presets" / f"{name}.yml").write_text(text)
    monkeypatch.chdir(tmp_path)

    def load(*argv, **kw):
        kw = {"prog": "toy.py", "doc": "Makes toys.", "presets_dir": tmp_path / "presets", **kw}
        return cfg.load(Toy, list(argv), **kw)

    return load


def refusal(load, *argv, **kw):
    with pytest.raises(UserError) as caught:
        load(*argv, **kw)
    assert "\n" not in str(caught.value) and caught.value.status == 2
    return str(caught.value)


def get(config, name):
    for key in name.split("."):
        config = getattr(config, key)
    return config


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("sd.prompt", "os.getcwd()", "os.getcwd()"),
        ("sd.prompt", "1e4", "1e4"),
        ("sd.prompt", "None", "None"),
        ("sd.prompt", "-x=[1]", "-x=[1]"),
        ("sd.prompt", "", ""),
        ("sd.scale", "3e4", 30000.0),
        ("lr", "-1", -1.0),
        ("lr", "-.5", -0.5),
        ("n_steps", "1e4", 10000),
        ("n_steps", "1_000", 1000),
        ("n_steps", "9007199254740993", 9007199254740993),
        ("var_red", "False", False),
        ("var_red", "no", False),
        ("var_red", "1", True),
        ("depth", "none", None),
        ("depth", "7", 7.0),
        ("sd.variant", "v2", "v2"),
        ("grid", "tensor", Grid.tensor),
        ("size", "32,16", (32, 16)),
        ("size", "[32, 16]", (32, 16)),
        ("views", "1,-2.5", [1.0, -2.5]),
        ("views", "[]", []),
        ("tags", "[a, 'b,c', 1]", ["a", "b,c", "1"]),
        ("tags", "[]", []),
        ("tags", "[it's, a b]", ["it's", "a b"]),
        ("tags", "a, b", ["a", "b"]),
    ],
)
def test_a_value_is_read_by_its_declared_type(load, name, text, value):
    for argv in ([f"--{name}", text], [f"--{name}={text}"]):
        got = get(load(*argv), name)
        assert got == value and type(got) is type(value)


def test_a_long_list_in_brackets_is_json(load):
    words = ["a blue duck, with a hat"] * 500
    assert load(f"--tags={json.dumps(words)}").tags == words
    assert "expected a list" in refusal(load, f"--tags={str(words)}")  # as Python writes it


@pytest.mark.parametrize("text", ["[" * 1900, "[" * 100_000, "[[]" * 600, "[a: " * 30_000, "[" + "a," * 50_000])
def test_brackets_inside_brackets_and_huge_lists_are_refused_at_once(load, monkeypatch, text):
    """The YAML parser takes a time for each word that grows with the brackets that are open."""
    seen, fetch = [], values.FlatLoader.fetch_more_tokens
    monkeypatch.setattr(values.FlatLoader, "fetch_more_tokens", lambda self: seen.append(1) or fetch(self))
    for name, kind in (("tags", "a list"), ("size", "2 integers")):
        assert f"--{name}: expected {kind}" in refusal(load, f"--{name}={text}")
    assert len(seen) < 20


def test_a_group_keeps_its_other_defaults(load):
    assert load("--sd.prompt", "x").sd == SD(prompt="x", scale=50.0)


def test_a_value_that_begins_with_two_dashes_needs_the_equals_spelling(load):
    assert load("--sd.prompt=--x").sd.prompt == "--x"
    assert "--sd.prompt needs a value: text" in refusal(load, "--sd.prompt", "--lr", "1")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr"], ["--lr needs a value"]),
        (["--lr", "fast"], ["--lr", "a finite number", "'fast'"]),
        (["--lr", "nan"], ["--lr", "finite"]),
        (["--views", "1,inf"], ["--views", "finite"]),
        (["--n_steps", "1.5"], ["--n_steps", "an integer", "'1.5'"]),
        (["--n_steps", "0"], ["--n_steps", "greater than 0", "got 0"]),
        (["--sd.scale", "-1"], ["--sd.scale", "greater than or equal to 0"]),
        (["--var_red", "maybe"], ["--var_red", "True or False"]),
        (["--size", "1,2,3"], ["--size", "2 integers with commas between"]),
        (["--size", "[1,"], ["--size", "2 integers"]),
        (["--sd.variant", "v3"], ["--sd.variant", "one of v1, v2"]),
        (["--grid", "tensr"], ["dense, tensor", "perhaps you meant tensor"]),
        (["--lr", "1", "--lr=2"], ["--lr is given twice"]),
        (["--prompt", "x"], ["--prompt", "perhaps you meant --sd.prompt"]),
        (["--n_stepz", "1"], ["perhaps you meant --n_steps"]),
        (["--sd", "1"], ["--sd is a group".replace("--sd ", "--sd: "), "--sd.variant"]),
        (["--sd.prompt", "a", "pig"], ["unexpected word 'pig'", "quotes"]),
        (["-lr", "1"], ["unexpected word '-lr'"]),
        (
            ["--preset", "burgr"],
            ["--preset: no preset 'burgr' of this script; perhaps you meant burger; its presets are burger, chair"],
        ),
        (["--tags", ""], ["--tags: expected a list, each text, got ''"]),
        (["--views", " "], ["--views: expected a list"]),
        (["--preset", "../x"], ["no preset '../x'"]),
        (["--sd.prompt", "a\0b"], ["--sd.prompt: has a character that no name of a file can have, got 'a\\x00b'"]),
        (["--tags", "a,\ud800"], ["--tags: has a character that no name of a file can have, got 'a,\\ud800'"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(load, argv, words):
    message = refusal(load, *argv)
    assert all(word in message for word in words), message


def test_precedence_is_defaults_preset_config_file_flags(load):
    assert (load().sd.prompt, load().lr) == ("a pig", 0.05)
    config = load("--preset", "burger")
    assert (config.preset, config.sd.prompt, config.lr, config.sd.scale) == (
        "burger", "a burger", 0.1, 50.0)  # fmt: skip
    Path("config.yml").write_text("preset: burger\nlr: 2e-1\n")
    assert (load().preset, load().sd.prompt, load().lr) == ("burger", "a burger", 0.2)
    config = load("--preset", "chair", "--lr", "0.3")
    assert (config.preset, config.sd.prompt, config.lr) == ("chair", "a chair", 0.3)
    assert load(config_file=None).preset is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("n_stepz: 3", ["n_stepz", "perhaps you meant n_steps"]),
        ("sd: {promt: x}", ["sd.promt", "perhaps you meant sd.prompt"]),
        ("sd: 3", ["sd", "is a group; it holds sd.prompt"]),
        ("n_steps: -3", ["n_steps", "greater than 0", "got -3"]),
        ("n_steps: true", ["n_steps", "an integer", "True"]),
        ("lr: .nan", ["lr", "finite"]),
        ("var_red: 3", ["var_red", "True or False"]),
        ("sd.prompt: 1984", ["sd.prompt", "expected text"]),
        ("lr: 1\nlr: 2", ["lr is given twice"]),
        ("sd: {prompt: a}\nsd.prompt: b", ["sd.prompt is given twice"]),
        ("lr: [1", ["broken YAML at line"]),
        ("just words", ["key: value"]),
        ("!!python/object/apply:os.getcwd []", ["broken YAML"]),
        ("preset: burgr", ["preset", "perhaps you meant burger"]),
    ],
)
def test_a_mistake_in_yaml_names_the_file(load, text, words):
    Path("config.yml").write_text(text)
    message = refusal(load)
    assert message.startswith("./config.yml")
    assert all(word in message for word in words), message


def test_a_mistake_in_a_preset_names_the_preset(load):
    Path("presets/bad.yml").write_text("preset: burger")
    assert "preset bad (bad.yml): preset: no such option" in refusal(load, "--preset", "bad")


# ---------------------------------------------------------------- what is asked for, and read by nothing

READ_BY = {
    "sd": {"grid": ("dense",)},
    "sd.prompt": {},
    "depth": {"sd.variant": ("v1",), "tags": ()},
    "size": {"views": (1.0, 2.0)},
    "lr": None,
}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sd.scale", "2"], None),
        (
            ["--sd.scale", "2", "--grid", "tensor"],
            "--sd.scale: not read with --grid tensor; leave it out, or give --grid dense",
        ),
        (["--sd.scale", "50", "--grid", "tensor"], "--sd.scale: not read"),  # its default, but asked for
        (["--sd.prompt", "x", "--grid", "tensor"], None),  # an option's own entry comes before its group's
        (
            ["--depth", "1", "--sd.variant", "v2"],
            "--depth: not read with --sd.variant v2; leave it out, or give --sd.variant v1",
        ),
        (["--depth", "1"], None),
        (["--depth", "1", "--tags", "a,b"], "--depth: not read with --tags a,b; leave it out, or leave out --tags"),
        (["--size", "1,2", "--views", "0,2"], None),
        (["--size", "1,2"], "--size: not read with --views 0.5; leave it out, or give --views 1.0 or 2.0"),
        (["--lr", "1"], "--lr: nothing here reads it; leave it out"),
        (["--preset", "burger", "--grid", "tensor"], None),  # sets lr: a preset's are nobody's mistake
    ],
)
def test_what_is_asked_for_must_be_read(load, argv, words):
    config = load(*argv)
    if words is None:
        cfg.refuse_unread(config, READ_BY)
        return
    with pytest.raises(UserError) as caught:
        cfg.refuse_unread(config.model_copy(), READ_BY)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    "text, asked",
    [
        ("lr: 0.05", False),
        ("lr: 0.2", True),
        ("{preset: burger, lr: 0.1}", False),
        ("{preset: burger, lr: 0.05}", True),
    ],
)
def test_a_line_of_config_yml_counts_where_it_changes_something(load, text, asked):
    Path("config.yml").write_text(text)
    config = load()
    if asked:
        with pytest.raises(UserError, match="^./config.yml: lr: nothing here reads it"):
            cfg.refuse_unread(config, READ_BY)
    else:
        cfg.refuse_unread(config, READ_BY)


def test_where_an_option_was_asked_for(load):
    Path("config.yml").write_text("{lr: 0.2, depth: 1, n_steps: 10}")
    config = load("--preset", "burger", "--depth", "2", "--sd.scale", "50").model_copy()
    asked = {name: config.where_asked(name) for name in cfg.flat(config)}
    assert {name: where for name, where in asked.items() if where} == {
        "preset": "--preset", "lr": "./config.yml: lr", "depth": "--depth", "sd.scale": "--sd.scale"}  # fmt: skip
    assert Toy().where_asked("lr") is None and Toy().check_files() is None


def test_what_an_option_once_took_is_told_with_what_to_do():
    class Mended(cfg.Config):
        field: Literal["dense"] = Field("dense", json_schema_extra={"gone": {"hash": "give dense"}})
        other: int = 1

    assert [option.extra for option in cfg.walk(Mended)] == [{"gone": {"hash": "give dense"}}, {}]
    message = refusal(lambda: cfg.load(Mended, ["--field", "hash"], prog="p", doc="d", config_file=None))
    assert message == "--field hash: is no longer here; give dense"


def test_values_are_converted_once():
    """What reaches the model has its declared type: it converts nothing."""
    for name, wrong in (("lr", "1"), ("n_steps", 1.0), ("size", [1, 2]), ("grid", "dense"), ("var_red", 1)):
        options = {option.name: option for option in cfg.walk(Toy)}
        with pytest.raises(UserError, match=name):
            values.build(Toy, options, {name: values.Given(wrong, name)})


def test_every_limit_of_the_project_has_words_of_ours():
    """Of the configurations of all scripts: what each option may be limited by, `reason` can say."""
    from doctor import DoctorConfig
    from evaluate import EvaluateConfig
    from options.canvas import CanvasConfig
    from options.film import FilmConfig
    from options.nerf import NeRFConfig
    from options.sampling import SamplingConfig

    def limits(kind, metadata):
        yield from (type(item).__name__ for item in metadata)
        for arg in get_args(kind):
            if get_origin(kind) is not Literal:
                yield from limits(arg, getattr(arg, "__metadata__", ()))
        for item in getattr(kind, "__metadata__", ()):
            yield from (type(m).__name__ for m in item.metadata)

    def fields(cls):
        for field in cls.model_fields.values():
            if cfg.is_group(field.annotation):
                yield from fields(field.annotation)
            else:
                yield field

    used = {
        name
        for cls in (CanvasConfig, DoctorConfig, EvaluateConfig, FilmConfig, NeRFConfig, SamplingConfig)
        for field in fields(cls)
        for name in limits(field.annotation, field.metadata)
    }
    assert used - {"FieldInfo"} == {"Gt", "Ge", "Lt", "Le", "MultipleOf", "MinLen", "MaxLen"}


class Own(cfg.Config):
    run: list[str] = Field(["."], max_length=1)
    n: int = 3


def test_options_of_another_configuration_are_kept_apart(capsys):
    apart = cfg.Apart({name: o for name, o in cfg.options_of(Toy).items() if name != "n_steps"}, "Toys, too.")

    def own(*argv):
        return cfg.load(Own, argv, prog="p", doc="", positional="run", config_file=None, apart=apart)

    loaded = own("here", "--n", "4", "--lr", "2")
    assert (loaded.run, loaded.n) == (["here"], 4)
    assert cfg.given_apart(loaded) == {"lr": cfg.Given(2.0, "--lr")} and cfg.given_apart(own()) == {}
    with pytest.raises(UserError, match="^--lr: expected a finite number"):
        own("--lr", "x")
    with pytest.raises(UserError, match="^--n_steps: no such option"):
        own("--n_steps", "3")
    with pytest.raises(UserError, match="^RUN: takes 1 value, got 2: 'a,b'; give 1$"):
        own("a", "b")
    with pytest.raises(SystemExit):
        own("-h")
    text = capsys.readouterr().out
    assert text.endswith("Toys, too.\n") and "--lr" not in text


def test_a_configuration_of_what_was_kept_apart(tmp_path):
    (tmp_path / "p.yml").write_text("lr: 5\nn_steps: 7\n")
    given = {"preset": cfg.Given("p", "--preset"), "size": cfg.Given((9, 9), "--size")}
    made = cfg.of_layer(Toy, given, tmp_path, {"n_steps": cfg.Given(8, "a file")})
    assert (made.lr, made.n_steps, made.size) == (5, 8, (9, 9))
    assert made.where_asked("size") == "--size" and made.where_asked("n_steps") is None


def test_help_shows_every_option_with_type_default_and_meaning(load, capsys):
    with pytest.raises(SystemExit) as caught:
        load("--lr", "1", "--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "toy.py" in text and "Makes toys." in text and "presets: burger, chair" in text
    assert "--sd.scale  a finite number (>= 0)\n        guidance strength [default: 50.0]" in text
    assert "--sd.variant  one of v1, v2" in text and "[default: dense]" in text
    assert "--depth  a finite number or None" in text


def test_positional_words_fill_their_field(load):
    config = load("a", "--lr", "1", "b", positional="tags")
    assert config.tags == ["a", "b"] and config.lr == 1
    assert "given twice" in refusal(load, "a", "--tags", "b", positional="tags")


def test_a_required_option_is_asked_for():
    class Needy(cfg.Config):
        path: str

    message = refusal(lambda: cfg.load(Needy, [], prog="p", doc="d", config_file=None))
    assert message == "--path: is required; give it a value"

    class Explained(cfg.Config):
        path: str = Field(description="a folder of pictures")

    message = refusal(lambda: cfg.load(Explained, [], prog="p", doc="d", config_file=None))
    assert message == "--path: is required; give it a folder of pictures"


def test_yaml_round_trips_every_value_exactly(tmp_path):
    config = Toy(
        sd=SD(prompt='McDonald\'s: "no" # 1e4\n\tNone é 😀 ' + "long " * 60, scale=1e-300),
        lr=0.1 + 0.2,
        depth=1e22,
        views=[1 / 3, -0.0, 5e-324],
        tags=["1", "1e4", "true", "null", "None", ""],
        size=(1, 2),
        grid=Grid.tensor,
    )
    path = tmp_path / "full_config.yml"
    cfg.write(config, path)
    assert cfg.read(Toy, path) == config
    assert path.read_text().partition("made_by:")[0] == cfg.show(config) == cfg.show(cfg.read(Toy, path))


@pytest.mark.parametrize(
    "text, word",
    [
        ("lr: x", "lr: expected a finite number"),
        ("sd: {a: 1}", "sd.a: no such"),
        ("sd: 3", "is a group"),
        ("n_steps: 0", "must be greater than 0, got 0"),
        ("lr: [", "YAML"),
    ],
)
def test_reading_an_unfit_full_config_is_one_line(tmp_path, text, word):
    (tmp_path / "f.yml").write_text(text)
    message = refusal(lambda: cfg.read(Toy, tmp_path / "f.yml"))
    assert str(tmp_path / "f.yml") in message and word in message
    assert "cannot be read" in refusal(lambda: cfg.read(Toy, tmp_path / "absent.yml"))


def test_importing_the_parser_loads_no_heavy_package():
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'imageio'} & set(sys.modules)"
    code = f"import sys, my.config, my.errors, my.checkpoint; print({heavy} or 'light')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "light", done.stdout + done.stderr


def test_version(load, capsys):
    with pytest.raises(SystemExit) as done:
        load("--version")
    assert done.value.code in (0, None)
    version = capsys.readouterr().out.split("of Score Jacobian Chaining ")[1].split(", torch 2")[0]
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()


def test_versions_are_kept_with_a_run_and_read_past(load, tmp_path):
    cfg.write(load(), "written.yml")
    kept = yaml.safe_load(Path("written.yml").read_text())
    assert kept["made_by"].keys() == {"version", "torch"} and list(kept)[-1] == "made_by"
    assert cfg.read(type(load()), "written.yml") == load()
    Path("config.yml").write_text(Path("written.yml").read_text())
    load()


def test_every_published_preset_is_there_and_is_plain(load):
    names = {path.stem for path in (ROOT / "presets").glob("*.yml")}
    published = """trump obama biden temple burger icecream ficus castle sydney rose schoolbus
        rocket fries motorcycle car tank chair duck horse giraffe zebra printer link pig"""
    assert set(published.split()) <= names
    for name in published.split():
        values = yaml.safe_load((ROOT / "presets" / f"{name}.yml").read_text())
        assert values["sd"]["scale"] == 100 and values["sd"]["prompt"].strip()
        assert values.get("emptiness_step", "unset") == ("unset" if name == "chair" else 0.5)
        assert values.get("var_red", False) is False
    chair = yaml.safe_load((ROOT / "presets/chair.yml").read_text())
    assert (chair["n_steps"], chair["lr"], chair["emptiness_weight"]) == (50000, 0.01, 7000)
