"""Where a checkpoint is looked for: on disk, below the data root, on the hub; and what is said when it is nowhere."""

import shutil

import pytest

from families.libraries import reason
from families.sd import diffusers_folder, find, hub, lora_files
from families.sd.options import Options as SDConfig
from my.errors import UserError

pytestmark = pytest.mark.usefixtures("home")


def found(**options):
    return find.find_checkpoint(SDConfig(**options))


def as_folder(path):
    for part in diffusers_folder.PARTS:
        (path / part).mkdir(parents=True)
    return path


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors", ""])
@pytest.mark.parametrize(
    "options, name",
    [
        ({"variant": "v1"}, "diffusion_ckpts/stable_diffusion/sd-v1-5"),
        ({"variant": "v2"}, "diffusion_ckpts/sd2/512-base-ema"),
        ({"variant": "v2", "v2_highres": True}, "diffusion_ckpts/sd2/768-v-ema"),
    ],
)
def test_published_names_below_the_data_root(home, options, name, ending):
    path = home / "sjc_data" / (name + ending)
    assert found(**options).path is None
    path.parent.mkdir(parents=True)
    path.touch() if ending else as_folder(path)
    assert found(**options).path == path


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"variant": "v1"}, "--sd.variant v1"),
        ({"variant": "v2"}, "--sd.variant v2"),
        ({"variant": "v2", "v2_highres": True}, "--sd.v2_highres True"),
    ],
)
def test_nothing_anywhere_tells_every_place(home, options, flag):
    nowhere = found(**options)
    with pytest.raises(UserError) as caught:
        hub.fetch(nowhere)
    message = str(caught.value)
    name = "v2_highres" if options.get("v2_highres") else options["variant"]
    assert len(nowhere.repos) >= 2 and nowhere.repos == tuple(hub.table()[name])
    for word in (
        flag,
        str(home),
        "env.json",
        ".ckpt",
        "--preset mini",
        "--preset ideal",
        *(f"{repo}: HF_HUB_OFFLINE is set" for repo in nowhere.repos),
    ):
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error, words",
    [
        (
            ValueError(
                "Cannot load  because a.weight expected shape torch.Size([32, 96]), but got torch.Size([32, 64]). If "
                "you want to"
            ),
            "a.weight is (32, 64) in the weights, and (32, 96) by config.json",
        ),
        (FileNotFoundError(2, "No such file or directory", "f/config.json"), "no file f/config.json"),
        (RuntimeError("first. Then\nmore"), "first"),
        (KeyError(), "KeyError"),
    ],
)
def test_reasons_of_libraries_are_shortened(error, words):
    assert reason(error) == words


def test_given_paths_come_before_hub_ids(home):
    assert found(checkpoint="org/name").repos == ("org/name",)
    assert found(checkpoint=str(as_folder(home / "org" / "name"))).path == home / "org" / "name"
    assert found(checkpoint="org/name").path is not None  # it is on disk now
    (home / "a.safetensors").touch()
    assert found(checkpoint="~/a.safetensors").path == home / "a.safetensors"


@pytest.mark.parametrize(
    "text, is_id",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("a/b", True),
        ("./a/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("name", False),
        ("a/b.ckpt", False),
        ("a/b.safetensors", False),
        ("~/b", False),
        ("../b", False),
    ],
)
def test_hub_ids(text, is_id):
    assert find.is_hub_id(text) == is_id


def test_vanished_repositories_have_mirrors():
    repos = found(checkpoint="runwayml/stable-diffusion-v1-5").repos
    assert repos[0] == "runwayml/stable-diffusion-v1-5" and len(repos) > 1
    assert all(find.HUB_ID.fullmatch(repo) for repos in hub.table().values() for repo in repos)


def test_what_the_cache_holds_needs_no_network(home, tiny_sd, monkeypatch):
    """The second mirror is in the cache: it is taken, and a half-downloaded first one is not. Each is tried once."""
    first, second = found(variant="v1").repos
    for repo, whole in ((first, False), (second, True)):
        root = home / "hub" / f"models--{repo.replace('/', '--')}"
        shutil.copytree(tiny_sd, root / "snapshots" / "abc")
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("abc")
        if not whole:
            (root / "snapshots" / "abc" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tried, cached = [], hub.cached
    monkeypatch.setattr(hub, "cached", lambda repo: tried.append(repo) or cached(repo))
    options = SDConfig(variant="v1")
    found_there = find.find(options)
    assert hub.fetch(found_there.place) == root / "snapshots" / "abc"  # of the second
    assert options.to_download(found_there) is None and options.facts(found_there) == {}
    assert options.checkpoints(found_there) == {"model": root / "snapshots" / "abc"}
    assert tried == [first, second]


def test_a_folder_without_a_part(home):
    shutil.rmtree(as_folder(home / "a") / "unet")
    with pytest.raises(UserError, match=f"--sd.checkpoint {home / 'a'}: .* it has no unet; give .*--preset mini"):
        found(checkpoint=str(home / "a"))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"v2_highres": True}, "--sd.v2_highres True: only --sd.variant v2 has it"),
        ({"ema": True, "checkpoint": "a"}, "--sd.ema True: --sd.checkpoint a is no single file"),
        ({"ema": True, "variant": "mini"}, "--sd.ema True: --sd.variant mini is no single file"),
        ({"ema": True, "checkpoint": "org/name"}, "--sd.ema True: --sd.checkpoint org/name is no single file"),
        ({"v2_highres": True, "variant": "v2", "checkpoint": "a"}, "--sd.v2_highres True: --sd.checkpoint a is no"),
    ],
)
def test_options_that_would_do_nothing(home, options, words):
    as_folder(home / "a")
    with pytest.raises(UserError, match=words):
        found(**options)


@pytest.mark.parametrize(
    "text, want",
    [
        ("l.safetensors", "{}/l.safetensors"),
        ("l.pt:0.5", "{}/l.pt:0.5"),
        ("l.pt:1", "{}/l.pt"),
        ("l:2.pt", "{}/l:2.pt"),
        ("l:2:1", "{}/l:2:1"),
    ],
)
def test_a_lora_is_told_as_it_was_given(home, text, want):
    assert find.absolute(SDConfig(lora=[text])).lora == [want.format(home)]
    assert lora_files.split(want.format(home))[1] == lora_files.split(text)[1]


def test_check_needs_no_network(home):
    with pytest.raises(UserError, match="--sd.lora l.safetensors:0.5: no such file: l.safetensors"):
        find.check(SDConfig(lora=["l.safetensors:0.5"]))
    with pytest.raises(UserError, match=r"--sd.prompt: this model knows no '\.'; leave that out"):
        find.check(SDConfig(variant="mini", prompt="a burger. a", negative_prompt="ugly"))
    with pytest.raises(UserError, match="--sd.negative_prompt: this model has no word for 'ugly'"):
        find.check(SDConfig(variant="mini", prompt="a burger", negative_prompt="ugly"))
    with pytest.raises(UserError, match="--prompts: this model has no word for 'zebra'"):
        find.check(SDConfig(variant="mini", prompt="not asked for"), {"--prompts": ["a duck", "a zebra"]})
    find.check(SDConfig(variant="v1"))  # the hub is asked later


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "--sd.checkpoint is empty; give a folder"),
        (" ", "--sd.checkpoint is empty"),
        ("https://huggingface.co/org/name", "a web address; give the hub id org/name"),
        ("https://huggingface.co/org/name/", "a web address; give the hub id org/name"),
        ("https://huggingface.co/org/name/blob/main/a.ckpt", "a web address; download the file, and give its path"),
        ("http://localhost/a.safetensors", "a web address; download the file"),
    ],
)
def test_what_is_no_place(home, text, words):
    with pytest.raises(UserError, match=words):
        find.check(find.absolute(SDConfig(checkpoint=text)))


@pytest.mark.parametrize("text", ["", " ", ":0.5"])
def test_a_lora_without_a_name(home, text):
    with pytest.raises(UserError, match=f"--sd.lora: {text!r} names no file; give PATH"):
        find.check(find.absolute(SDConfig(lora=[text])))


@pytest.mark.parametrize("name", ["~nosuchuser/m.ckpt", "x" * 300 + ".safetensors"])
def test_paths_that_cannot_be(home, name):
    with pytest.raises(UserError, match="no such file"):
        found(checkpoint=name)
    with pytest.raises(UserError, match="no such file"):
        lora_files.read(name)
