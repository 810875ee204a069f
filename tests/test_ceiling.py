"""The fit to the truth: which options it takes. `test_evaluate.py` fits one."""

from pathlib import Path

import pytest
import yaml

from benchmarks import ceiling, quality
from my.errors import UserError

DRY = ["--dry_run", "True"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "flag, value",
    [
        ("rule", "sds"),
        ("rule", "nfsd"),
        ("score_clip", "1,2"),
        ("bad_words", "foggy"),
        ("bridge_step", "0.3"),
        ("var_red", "False"),
        ("sd.scale", "4"),
        ("sd.negative_prompt", "a red duck"),
        ("sd.lora", "a.safetensors"),
        ("sd.precision", "bf16"),
        ("cls_scaling", "2"),
        ("compile", "True"),
        ("ideal.n_cameras", "8"),
        ("pose.view_words", "sides"),
        ("pose.view_style", "none"),
        ("pose.view_texts", "front="),
        ("pose.perp_neg", "True"),
        ("init", "elsewhere"),
    ],
)
@pytest.mark.parametrize("preset", ["ideal", "mini"])
def test_options_of_the_score_are_refused(here, flag, value, preset):
    with pytest.raises(UserError, match=f"^--{flag}: nothing here reads it; leave it out$"):
        ceiling.main(["--preset", preset, f"--{flag}", value, *DRY])
    (here / "config.yml").write_text(yaml.safe_dump({flag: value}))
    with pytest.raises(UserError, match=rf"^\./config.yml: {flag}: nothing here reads it; leave it out$"):
        ceiling.main(["--preset", preset, *DRY])
    assert not Path("full_config.yml").exists()


@pytest.mark.parametrize(
    "setting", [name for name, (command, *_) in quality.SETTINGS.items() if command == quality.FIT]
)
def test_the_fits_of_the_table_of_results_begin(setting):
    """What their presets say of the score is left as it is."""
    _, *flags = quality.SETTINGS[setting]
    ceiling.main([*flags, "--sd.prompt", "a blue duck", "--seed", "1", "--n_steps", "9", *DRY])
    kept = yaml.safe_load(Path("full_config.yml").read_text())
    assert kept["n_steps"] == 9 and kept["made_by"]["command"] == "benchmarks.ceiling"


@pytest.mark.parametrize("words", [[], ["--resume", "True"]])
def test_a_fit_does_not_begin_again_over_what_is_there(here, words):
    flags = ["--preset", "ideal", "--sd.prompt", "a blue duck"]
    ceiling.main([*flags, *DRY])
    (here / "ckpt" / "step_0000001").mkdir(parents=True)
    with pytest.raises(UserError, match="those of benchmarks.ceiling are not continued; start it in an empty folder"):
        ceiling.main([*flags, *words])
