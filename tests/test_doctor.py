"""doctor.py: what it finds, and that its exit status says whether the run can start."""

import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

import crafted
import doctor
from families.sd import find, layout
from my import config, nvidia
from my.errors import RunError, run_main
from options.sjc import SJCConfig
from sjc import ready
from tiny import pixel_unet
from voxnerf.field import V_SD, V_SJC
from voxnerf.fused import selftest

pytestmark = pytest.mark.usefixtures("home", "no_tool")
ASK = nvidia.ask.__wrapped__


@pytest.fixture
def no_tool(monkeypatch):
    """A machine without an NVIDIA driver, whatever machine this is."""
    monkeypatch.setattr(nvidia, "ask", nvidia.Answer)


def run(capsys, *argv):
    """(exit status, {what: [states]}, everything printed) of doctor.py."""
    status = 0
    try:
        run_main(doctor.main, ["--device", "cpu", *argv])
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line[:8].strip() in (doctor.OK, doctor.NOTE, doctor.BAD)]
    states = {}
    for row in rows:
        states.setdefault(row[8:20].strip(), []).append(row[:8].strip())
    return status, states, out + err


def test_an_embedded_model_can_always_start(capsys, home, monkeypatch):
    (home / "constraints.txt").write_text("# none\n")
    monkeypatch.setattr(doctor, "TESTED", home / "constraints.txt")
    status, states, text = run(capsys, "--preset", "mini", "--sha256", "True")
    assert status == 0 and "This run can start" in text
    machine = ["python", "folder", "tested", "device", "precision", "disk", "ffmpeg", "hub"]
    assert list(states) == [*machine, "data root", "model"] and states["tested"] == [doctor.OK]
    weights = find.MINI / "vae" / "diffusion_pytorch_model.safetensors"
    assert f"vae/{weights.name} SHA-256 {hashlib.sha256(weights.read_bytes()).hexdigest()}" in text
    assert run(capsys, "--preset", "ideal")[0] == 0


def test_packages_newer_than_tested(home, monkeypatch):
    """Numbers are compared, not letters; what is not installed, and what is no exact version, is passed over."""
    path, here = home / "constraints.txt", {"torch": "2.15.0+cpu", "numpy": "2.10.1", "scipy": "1.9", "tqdm": "odd"}
    monkeypatch.setattr(doctor, "TESTED", path)
    assert doctor.check_packages() == []  # no such file

    def version(name):
        if name not in here:
            raise importlib.metadata.PackageNotFoundError
        return here[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    path.write_text(
        "# numpy==1\ntorch==2.14.1\nnumpy==2.9.3  # why\nscipy==1.10\ntqdm==4.0\nnosuch==1.0\neinops>=0.1\n"
    )
    (finding,) = doctor.check_packages()
    assert finding.state == doctor.NOTE and "pip install -r requirements.txt -c constraints.txt" in finding.to_do
    assert finding.found == (
        "torch 2.15.0 is newer than 2.14.1; numpy 2.10.1 is newer than 2.9.3, which CI last passed with"
    )
    here.update(torch="2.14.1+cu128", numpy="2.9.3")
    assert doctor.check_packages()[0].state == doctor.OK


def test_gpu_memory_that_is_too_small(monkeypatch):
    """On a GPU of 8 GB of which 3 are free; which flag helps is the family's own word."""
    for name, value in {"mem_get_info": (3e9, 8e9), "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr("my.script.pick_device", lambda name: torch.device("cuda"))
    finding = doctor.check_device(doctor.DoctorConfig())[-1]
    assert (finding.state, finding.found) == (doctor.NOTE, "3.0 of 8.0 GB free")
    assert finding.to_do == "end other programs on it, or give --low_vram True"
    assert doctor.check_device(doctor.DoctorConfig(family="ideal"))[-1] == (
        doctor.OK,
        "GPU memory",
        "3.0 of 8.0 GB free",
        "",
    )


def test_a_gpu_that_pytorch_does_not_see(capsys, home, monkeypatch):
    """The driver's tool names it; this PyTorch was built without CUDA. The run can start, on the CPU."""
    (home / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA GeForce RTX 4090, 560.94\n")
    (home / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(nvidia, "ask", ASK)
    status, states, text = run(capsys, "--preset", "ideal")
    assert status == 0 and states["GPU"] == [doctor.NOTE]
    assert "NVIDIA GeForce RTX 4090: PyTorch does not see it" in text and "a PyTorch without CUDA" in text
    assert "is built without CUDA; https://pytorch.org/get-started/locally/ has the build for this driver" in text
    asked = doctor.DoctorConfig(family="ideal", device="cuda")
    (finding,) = doctor.check_device(asked)
    assert finding.state == doctor.BAD and "is built without CUDA" in finding.found
    assert doctor.check_driver(asked) == doctor.check_renderer(asked) == []  # it is said already


# ---------------------------------------------------------------- the renderer


def test_the_self_test_is_run_on_request(capsys, monkeypatch, tmp_path):
    """For the field of the run, whatever an earlier test found; the new verdict is kept."""
    monkeypatch.setattr(selftest, "cache_file", lambda: tmp_path / "selftest.json")
    kind = selftest.Kind(V_SD, 4, False)
    selftest.start()
    selftest.keep_verdict(selftest.conditions(torch.device("cpu"), kind), "differs a lot")
    status, states, text = run(capsys, "--preset", "mini", "--selftest", "True")
    assert status == 0 and states["renderer"] == [doctor.OK]
    assert re.search(r"on cpu, for V_SD, channels 4: passed, \d+% of what is allowed; .* color \d\.\de-0\d,", text)
    assert re.search(r"gradient of d_scale \d\.\de-0\d, color after Adamax .*; \d+\.\d s, compilation included", text)
    assert list(selftest.read_verdicts().values()) == [""]
    assert "renderer" not in run(capsys, "--preset", "mini")[1]


def test_a_cpu_has_no_other_sums_for_deterministic_runs(monkeypatch):
    kinds = []
    outcome = selftest.Outcome("", {"color": selftest.Difference(0.0, 1.0)}, 1.0)
    monkeypatch.setattr(selftest, "run", lambda device, kind: kinds.append(kind) or outcome)
    doctor.check_renderer(doctor.DoctorConfig(family="ideal", device="cpu", selftest=True, deterministic=True))
    assert kinds == [selftest.Kind(V_SJC, 3, False)]


@pytest.mark.parametrize(
    "renderer, status, state", [("auto", 0, "note"), ("fused", 2, "MISSING"), ("reference", 0, "note")]
)
def test_a_self_test_that_fails(capsys, monkeypatch, tmp_path, renderer, status, state):
    """Only the run that asks for this renderer cannot start."""
    monkeypatch.setattr(selftest, "cache_file", lambda: tmp_path / "selftest.json")
    bad = {"gradient of color": selftest.Difference(0.5, 1e-4)}
    monkeypatch.setattr(selftest, "differences", lambda device, kind: bad)
    got, states, text = run(capsys, "--preset", "ideal", "--selftest", "True", "--renderer", renderer)
    assert got == status and states["renderer"] == [state]
    assert "differs from the reference in gradient of color by 0.5 (allowed 0.0001)" in text
    assert "--renderer reference" in text


def test_a_warp_that_does_not_start(capsys, monkeypatch):
    monkeypatch.setattr("voxnerf.render.start_problem", lambda: "the package warp-lang does not start here: no LLVM")
    for renderer, state in (("auto", doctor.NOTE), ("fused", doctor.BAD)):
        status, states, text = run(capsys, "--preset", "ideal", "--renderer", renderer)
        assert status == (2 if state == doctor.BAD else 0) and states["renderer"] == [state]
        assert "no LLVM" in text and "-> pip install warp-lang" in text
    status, states, _ = run(capsys, "--preset", "ideal", "--renderer", "reference")
    assert status == 0 and "renderer" not in states


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that PyTorch and Warp say is there: {what Warp lacks there, the verdict of the self-test, of what kind}."""
    says = {"lacks": "", "verdict": ""}
    monkeypatch.setattr("my.script.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(selftest, "cuda_problem", lambda device: says["lacks"])
    monkeypatch.setattr(selftest, "verdict", lambda device, kind: says.update(kind=kind) or says["verdict"])
    return says


def test_the_renderer_on_a_gpu(gpu):
    cfg = doctor.DoctorConfig(family="ideal")
    assert doctor.check_renderer(cfg) == [(doctor.OK, "renderer", "fused; its self-test passed on cuda:0", "")]
    assert gpu["kind"] == selftest.Kind(V_SJC, 3, False)
    doctor.check_renderer(doctor.DoctorConfig(family="sd", deterministic=True))
    assert gpu["kind"] == selftest.Kind(V_SD, 4, False, exact=True)
    gpu["verdict"] = "differs from the reference in depth by 3"
    (finding,) = doctor.check_renderer(cfg)
    assert finding.state == doctor.NOTE and finding.found == gpu["verdict"]
    assert "--selftest True" in finding.to_do and "until then the run uses --renderer reference" in finding.to_do
    assert doctor.check_renderer(doctor.DoctorConfig(family="ideal", renderer="reference")) == []


@pytest.mark.parametrize("renderer, state", [("auto", doctor.NOTE), ("fused", doctor.BAD)])
def test_a_driver_that_is_too_old_for_warp(gpu, renderer, state):
    gpu["lacks"] = "warp-lang 1.19.0 is built with CUDA 13.4, which needs a driver of series 580 or newer"
    (finding,) = doctor.check_renderer(doctor.DoctorConfig(family="ideal", renderer=renderer))
    assert finding.state == state and gpu["lacks"] in finding.found
    assert finding.to_do.startswith("update the driver, or install a +cu12 wheel from https://github.com/NVIDIA/warp")
    assert "--renderer reference" in finding.to_do


def test_a_self_test_that_breaks_the_device(gpu, monkeypatch):
    def broken(device, kind):
        raise RunError("the self-test left cuda:0 unusable")

    monkeypatch.setattr(selftest, "verdict", broken)
    (finding,) = doctor.check_renderer(doctor.DoctorConfig(family="ideal"))
    assert finding.state == doctor.BAD and "unusable" in finding.found and "--renderer reference" in finding.to_do


# ---------------------------------------------------------------- checkpoints


def test_without_weights_and_network_it_cannot(capsys):
    status, states, text = run(capsys)
    assert status == 2 and states["model"] == [doctor.BAD] and states["hub"] == [doctor.NOTE]
    for words in (
        "sd-v1-5.ckpt",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "--sd.checkpoint",
        "--preset mini",
        "cannot start; the table says what to do about: model",
    ):
        assert words in text


@pytest.fixture(scope="module")
def tensors():
    return crafted.single_file(crafted.small_parts())


def test_checkpoints_below_the_data_root(capsys, home, tensors):
    path = home / "sjc_data" / "diffusion_ckpts" / "stable_diffusion" / "sd-v1-5.ckpt"
    path.parent.mkdir(parents=True)
    crafted.save_ckpt(tensors, path)
    status, states, text = run(capsys, "--sha256", "True")
    assert status == 0 and states["checkpoint"] == states["model"] == [doctor.OK]
    assert text.count(f"{path}: .ckpt, 0.02 GB, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}") == 2


@pytest.mark.parametrize("meant, status, state", [("a.ckpt", 2, "MISSING"), ("b.safetensors", 0, "ok")])
def test_checksums_of_archives(capsys, home, tensors, meant, status, state):
    """One flipped bit of a .ckpt, which is the run's or only lies below the data root."""
    save_file(tensors, home / "b.safetensors")
    path = crafted.save_ckpt(tensors, home / "a.ckpt")
    whole = bytearray(path.read_bytes())
    whole[whole.index(tensors[f"{layout.VAE}encoder.conv_in.weight"].numpy().tobytes()) + 7] ^= 4
    path.write_bytes(whole)
    published = home / "sjc_data" / "diffusion_ckpts" / "sd2" / "512-base-ema.ckpt"
    published.parent.mkdir(parents=True)
    shutil.copy(path, published)
    assert run(capsys, "--sd.checkpoint", meant)[0] == 0
    got, states, text = run(capsys, "--sd.checkpoint", meant, "--sha256", "True")
    assert got == status and states["model"] == [state] and states["checkpoint"] == [doctor.NOTE]
    assert re.search(f"note.*{published}: the data of storage '.*' are damaged", text)


def test_checksums_of_folders_of_pickles(capsys, home, tiny_sd):
    weights = shutil.copytree(tiny_sd, home / "a") / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    digest = hashlib.sha256(weights.with_suffix(".bin").read_bytes()).hexdigest()
    status, _, text = run(capsys, "--sd.checkpoint", "a", "--sd.prompt", "a blue duck", "--sha256", "True")
    assert status == 0 and f"vae/diffusion_pytorch_model.bin SHA-256 {digest}" in text


def test_what_a_file_states_is_told(capsys, home, tensors):
    """A 1.x model with v-prediction, by the configuration beside it; and its VAE by --sd.vae."""
    save_file(tensors, home / "fur.safetensors")
    flags = "--sd.checkpoint", "fur.safetensors"
    status, states, text = run(capsys, *flags)
    assert status == 0 and states["predicts"] == [doctor.OK] and "stated nowhere: the run asks the UNet" in text
    (home / "fur.yaml").write_text('model: {params: {parameterization: "v"}}')
    assert "v_prediction, by fur.yaml" in run(capsys, *flags)[2]
    save_file({n: t for n, t in tensors.items() if n.startswith(layout.VAE)}, home / "v.safetensors")
    save_file(
        {**{n: t for n, t in tensors.items() if not n.startswith(layout.VAE)}, "ztsnr": torch.zeros(0)},
        home / "fur.safetensors",
    )
    assert "it has no VAE; give one with --sd.vae" in run(capsys, *flags)[2]
    status, states, text = run(
        capsys, *flags, "--sd.vae", "v.safetensors", "--sha256", "True", "--sigma_range", "10,900"
    )
    assert status == 0 and f"VAE         {home / 'v.safetensors'}: .safetensors" in text and "zero terminal SNR" in text
    (home / "fur.yaml").write_text("model: [")
    status, _, text = run(capsys, *flags, "--sd.vae", "v.safetensors")
    assert status == 2 and "fur.yaml, beside the checkpoint, is damaged" in text


def test_a_file_that_will_not_load(capsys, home, tensors):
    lacking = {name: t for name, t in tensors.items() if name != f"{layout.UNET}out.2.bias"}
    save_file(lacking, home / "a.safetensors")
    status, states, text = run(capsys, "--sd.checkpoint", "a.safetensors")
    assert status == 2 and states["model"] == [doctor.BAD]
    assert "lacks 1 tensor: model.diffusion_model.out.2.bias [4]" in text


def test_a_folder_that_will_not_load(capsys, home, tiny_sd):
    flags = "--sd.checkpoint", str(shutil.copytree(tiny_sd, home / "a")), "--sd.prompt", "a blue duck"
    assert run(capsys, *flags)[0] == 0
    weights = home / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    status, _, text = run(capsys, *flags)
    assert status == 2 and f"{weights}: ends at byte" in text
    weights.unlink()
    assert "unet: no diffusion_pytorch_model.safetensors and no diffusion" in run(capsys, *flags)[2]


def test_a_folder_whose_settings_do_not_fit_its_weights(capsys, home, tiny_sd):
    path = shutil.copytree(tiny_sd, home / "a") / "unet" / "config.json"
    path.write_text(path.read_text().replace('"cross_attention_dim": 16', '"cross_attention_dim": 8'))
    status, _, text = run(capsys, "--sd.checkpoint", "a", "--sd.prompt", "a blue duck")
    assert status == 2
    assert re.search(r"attn2.to_[kv].weight is \(16, 16\) in the weights, and \(16, 8\) by config.json", text)


def test_a_grid_beyond_the_machine(capsys, home, monkeypatch):
    def too_much(*args):
        raise MemoryError

    monkeypatch.setattr("sjc.ready", too_much)
    status, _, text = run(capsys, "--preset", "mini", "--sd.prompt", "a blue duck", "--vox.grid_size", "5000")
    assert status == 2 and "too large for this machine's memory, with --vox.grid_size 5000" in text


def test_what_only_the_model_can_tell_is_told(capsys, home, tensors):
    """The run's own checks before its first step, of each option that may not fit this model."""
    save_file(tensors, home / "a.safetensors")
    save_file(
        {"unet.nosuch.lora_A.weight": torch.ones(2, 9), "unet.nosuch.lora_B.weight": torch.ones(9, 2)},
        home / "l.safetensors",
    )
    flags = "--sd.checkpoint", "a.safetensors"
    assert run(capsys, *flags)[0] == 0
    for option, value, words in (
        ("sd.ema", "True", "--sd.ema True: .* lacks .* averaged weights"),
        ("sd.lora", "l.safetensors", "l.safetensors: does not fit this checkpoint: its only layer is"),
        ("sigma_range", "10,1001", "--sigma_range ends at 1001: this model's table has 1000 entries"),
        ("vox.c", "3", "--vox.c 3: this model's space has 4 channels"),
    ):
        status, states, text = run(capsys, *flags, f"--{option}", value)
        assert status == 2 and states["model"] == [doctor.BAD] and re.search(words, text), text
    for option, value, words in (
        ("sd.negative_prompt", "ugly", "--sd.negative_prompt: this model has no word"),
        ("pose.view_texts", "front=the face of", "--pose.view_texts .*: this model has no"),
    ):
        status, _, text = run(capsys, "--preset", "mini", f"--{option}", value)
        assert status == 2 and re.search(words, text), text


def test_a_pipeline_of_family_ddpm(capsys, home):
    DDPMPipeline(pixel_unet(), DDPMScheduler(num_train_timesteps=500)).save_pretrained(home / "a")
    flags = "--family", "ddpm", "--ddpm.checkpoint"
    assert run(capsys, *flags, "a", "--sigma_range", "10,480")[0] == 0
    assert "this model's table has 500 entries" in run(capsys, *flags, "a")[2]
    assert "org/name: HF_HUB_OFFLINE is set" in run(capsys, *flags, "org/name")[2]


# ---------------------------------------------------------------- the folder of the run


def test_the_folder_counts_and_a_resumed_run_is_the_one_it_holds(capsys, home):
    saved = SJCConfig(family="ideal", sd={"prompt": "a blue duck"})
    config.write(saved, "full_config.yml")
    assert run(capsys, "--resume", "True")[0] == 0  # not one of Stable Diffusion
    sjc = ready(saved, "cpu")[0]
    sjc.save("ckpt", 0)
    assert run(capsys, "--resume", "True", "--sha256", "True")[0] == 0
    status, states, text = run(capsys, "--preset", "ideal")
    assert status == 2 and states["folder"] == [doctor.BAD] and "and its options are others: " in text
    status, states, text = run(capsys, "--resume", "True", "--lr", "0.5")
    assert status == 2 and "lr 0.5 (was 0.05)" in text and "model" not in states  # not that of the defaults
    assert "model" not in run(capsys)[1]
    (home / "ckpt" / "step_0000000" / "tensors.safetensors").write_bytes(b"")
    status, states, text = run(capsys, "--resume", "True")
    assert status == 2 and states["model"] == [doctor.BAD] and "tensors.safetensors is damaged" in text


def test_the_projects_own_folder_is_none_for_a_run(capsys, monkeypatch):
    monkeypatch.chdir(doctor.ROOT)
    status, states, text = run(capsys, "--preset", "mini")
    assert status == 2 and states["folder"] == [doctor.BAD] and "go to an experiment directory" in text


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    "free_gb, status, words", [(20, 0, "the run downloads org/b first"), (3, 2, "it takes up to 6 GB")]
)
def test_what_the_hub_has_can_be_downloaded(capsys, monkeypatch, free_gb, status, words):
    """A hub in which only the second repository is left, and a disk with room for it or not."""

    def model_info(self, repo, timeout):
        if repo != "org/b":
            raise OSError("gone")
        return SimpleNamespace(gated=False)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("families.sd.hub.table", lambda: {"v1": ["org/a", "org/b"]})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free_gb * 1e9}))
    got, states, text = run(capsys)
    assert got == status and words in text and states["model"] == [doctor.NOTE if status == 0 else doctor.BAD]


def test_a_gated_repository_needs_its_licence(capsys, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def auth_check(self, repo):
        raise GatedRepoError.__new__(GatedRepoError)  # made of a response, whose library changes

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(gated="auto"))
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", auth_check)
    status, states, text = run(capsys, "--sd.checkpoint", "org/a")
    assert status == 2 and states["model"] == [doctor.BAD]
    assert "on the hub: org/a: gated: accept its licence on its page" in text


def test_the_hub_is_the_one_of_hf_endpoint(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://mirror.localhost")
    monkeypatch.setattr("urllib.request.urlopen", lambda r, timeout: asked.append(r.full_url) or io.StringIO())
    assert doctor.check_hub()[0].found == "http://mirror.localhost answers" and asked == ["http://mirror.localhost"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sd.chekpoint", "x"], "perhaps you meant --sd.checkpoint"),
        (["--preset", "ideal", "--device", "warp"], "device"),
        (["--sd.lora", "nosuch.safetensors"], "no such file"),
        (["--preset", "ideal", "--sd.prompt", "a burger on mars"], "colours"),
    ],
)
def test_mistakes(capsys, argv, words):
    argv = argv if "--device" in argv else ["--device", "cpu", *argv]
    with pytest.raises(SystemExit) as ended:
        run_main(doctor.main, argv)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and words in out + err and err.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = "import sys, doctor\ntry: doctor.main(['-h'])\nexcept SystemExit: pass\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=doctor.ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "huggingface_hub"} & set(done.stdout.splitlines()[-1].split())
    assert "--sha256" in done.stdout and "--sd.checkpoint" in done.stdout
