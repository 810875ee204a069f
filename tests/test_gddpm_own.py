"""Guided-diffusion UNets of one's own: outputs against a plain implementation, settings, and what files are instead."""

import math

import pytest
import torch
import torch.nn.functional as F

from adapt import make_adapter
from families.gddpm import files, layout, published
from families.gddpm.adapter import SCHEDULES, GuidedDDPMAdapter
from families.gddpm.unet import NoisyClassifier, build_unet, published_shapes
from my.errors import UserError
from options.sampling import SamplingConfig
from options.sjc import SJCConfig

TINY = published.OPTIONS | {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attends": (False, True),
    "n_classes": None,
    "num_heads": 2,
    "num_head_channels": None,
}
PLAIN = {"use_scale_shift_norm": False, "resblock_updown": False, "learn_sigma": False}
LABELS = {"n_labels": 7, "num_heads": None, "num_head_channels": 64}


def fill(options, kind=build_unet, seed=0, dtype=torch.float32):
    """Return random weights by published names."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=rng) * 0.1).to(dtype)
        for name, shape in published_shapes(kind(options), options).items()
    }


def save(path, state):
    torch.save(state, path)
    return str(path)


def run(cls=SJCConfig, cls_scaling=1.0, **gddpm):
    return cls(family="gddpm", gddpm=gddpm, cls_scaling=cls_scaling)


def adapter(**gddpm):
    cfg = run(**gddpm)
    cfg.check_files()
    return make_adapter(cfg, "cpu")


def refused(cfg, *words, longest=300):
    with pytest.raises(UserError) as caught:
        cfg.check_files()
        make_adapter(cfg, "cpu")
    message = str(caught.value)
    assert all(word in message for word in words), message
    bare = " ".join(word for word in message.split() if "/" not in word)
    assert message.isprintable() and len(bare) <= longest, message


# ---------------------------------------------------------------- the UNet again, plainly, out of the papers


def twice(x):
    """Return x with each pixel four times."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Plain:
    """The UNet of arXiv 2102.09672 and 2105.05233, evaluated block by block as a file names them."""

    def __init__(self, w, heads, new_order=False):
        self.w, self.heads, self.new_order = w, heads, new_order

    def conv(self, name, x, **how):
        return F.conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], **how)

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x):
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def resblock(self, name, x, emb, change=lambda x: x):
        """BigGAN's block: what changes the resolution stands between norm and convolution, and on the way past."""
        h = self.conv(f"{name}.in_layers.2", change(F.silu(self.norm(f"{name}.in_layers.0", x))), padding=1)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if e.shape[1] == 2 * h.shape[1]:  # adaptive group norm
            scale, shift = e.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h, x = self.conv(f"{name}.out_layers.3", F.silu(h), padding=1), change(x)
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.w else x)

    def attention(self, name, x):
        b, c, height, width = x.shape
        rows = F.conv1d(
            self.norm(f"{name}.norm", x).reshape(b, c, -1), self.w[f"{name}.qkv.weight"], self.w[f"{name}.qkv.bias"]
        )
        parts = (
            rows.chunk(3, 1)
            if self.new_order
            else [torch.cat([one.chunk(3, 1)[i] for one in rows.chunk(self.heads, 1)], 1) for i in range(3)]
        )
        out = []
        for q, k, v in zip(*(part.chunk(self.heads, 1) for part in parts)):  # (b, c / heads, n)
            weight = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(-1)
            out.append(v @ weight.transpose(1, 2))
        h = F.conv1d(torch.cat(out, 1), self.w[f"{name}.proj_out.weight"], self.w[f"{name}.proj_out.bias"])
        return x + h.reshape(x.shape)

    def block(self, name, x, emb, change=lambda x: x):
        """A block in a sequence of them, by what it has."""
        if f"{name}.qkv.weight" in self.w:
            return self.attention(name, x)
        return self.resblock(name, x, emb, change) if f"{name}.in_layers.2.weight" in self.w else None

    def __call__(self, x, t, y=None, n_res=1, n_levels=2):
        half = self.w["time_embed.0.weight"].shape[1] // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", waves)))
        emb = emb if y is None else emb + self.w["label_emb.weight"][y]
        kept = [self.conv("input_blocks.0.0", x, padding=1)]
        for i in range(1, n_levels * (n_res + 1)):
            name, x = f"input_blocks.{i}", kept[-1]
            if i % (n_res + 1) == 0:
                if f"{name}.0.op.weight" in self.w:
                    x = self.conv(f"{name}.0.op", x, stride=2, padding=1)
                else:
                    x = self.block(f"{name}.0", x, emb, lambda x: F.avg_pool2d(x, 2))
                    x = F.avg_pool2d(kept[-1], 2) if x is None else x
            else:
                x = self.block(f"{name}.0", x, emb)
                x = self.attention(f"{name}.1", x) if f"{name}.1.qkv.weight" in self.w else x
            kept.append(x)
        x = self.block("middle_block.2", self.attention("middle_block.1", self.block("middle_block.0", x, emb)), emb)
        for i in range(n_levels * (n_res + 1)):
            x = self.block(f"output_blocks.{i}.0", torch.cat([x, kept.pop()], 1), emb)
            attends = f"output_blocks.{i}.1.qkv.weight" in self.w
            x = self.attention(f"output_blocks.{i}.1", x) if attends else x
            if i % (n_res + 1) == n_res and kept:
                name = f"output_blocks.{i}.{1 + attends}"
                if f"{name}.conv.weight" in self.w:
                    x = self.conv(f"{name}.conv", twice(x), padding=1)
                else:
                    larger = self.block(name, x, emb, twice)
                    x = twice(x) if larger is None else larger
        return self.conv("out.2", F.silu(self.norm("out.0", x)), padding=1)


VARIANTS = {
    "published kind": {},
    "improved-diffusion": PLAIN | {"learn_sigma": True},
    "no variance": {"learn_sigma": False},
    "time added": {"use_scale_shift_norm": False},
    "convolutions between": {"resblock_updown": False},
    "averages between": {"resblock_updown": False, "conv_resample": False},
    "ten classes": {"n_classes": 10},
    "deeper": {"num_res_blocks": 2, "attends": (True, True)},
    "everywhere": {"attends": (True, True)},
    "only in the middle": {"attends": (False, False)},
    "three levels": {"channel_mult": (1, 1, 2), "attends": (False, True, False)},
    "half width": {"num_channels": 64, "channel_mult": (0.5, 1.5)},
    "one level": {"channel_mult": (1,), "attends": (True,)},
    "new order": {"use_new_attention_order": True},
    "plain and averaged": PLAIN | {"conv_resample": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_of_every_variant(variant, tmp_path, capsys):
    """Read off the file alone, but for heads and their order, and evaluated: as the papers say, to 1e-5."""
    options = TINY | VARIANTS[variant]
    weights = fill(options)
    asked = {"use_new_attention_order": True} if options["use_new_attention_order"] else {}
    classes = {"imgnet_cat": 3} if options["n_classes"] else {}
    got = adapter(checkpoint=save(tmp_path / "own.pt", weights), image_size=16, num_heads=2, **asked, **classes)
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 16, 16, generator=rng), torch.tensor([5, 900])
    y = torch.tensor([3, 9]) if options["n_classes"] else None
    want = Plain(weights, 2, options["use_new_attention_order"])(
        x, t, y, options["num_res_blocks"], len(options["channel_mult"])
    )
    out = got.unet(x, t, class_labels=y).sample
    assert out.shape[1] == (6 if options["learn_sigma"] else 3) and out.std() > 0.01
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    told = layout.unet({k: v.shape for k, v in weights.items()})
    one = variant == "one level"  # nothing to change the resolution
    assert {k: options[k] for k in told if not one or k != "resblock_updown"} == {
        k: v for k, v in told.items() if not one or k != "resblock_updown"
    }


# ---------------------------------------------------------------- what shapes do not tell


def test_what_was_read_and_what_was_assumed_is_said(tmp_path, capsys):
    """Shapes of its default for 64 pixels, one block per level: the edge follows from the multiples."""
    options = TINY | PLAIN | {"channel_mult": (1, 2, 3, 4), "attends": (False, False, True, True), "image_size": 64}
    ours = adapter(checkpoint=save(tmp_path / "ema_0.9999_000100.pt", fill(options)))
    read, assumed = capsys.readouterr().err.splitlines()
    for words in (
        "num_channels 32",
        "channel_mult 1,2,3,4",
        "num_res_blocks 1",
        "attention_resolutions 16,8",
        "no classes",
    ):
        assert words in read
    for words in (
        "num_heads 4",
        "noise_schedule linear",
        "diffusion_steps 1000",
        "use_new_attention_order False",
        "rescale_timesteps False",
        "predict_xstart False",
        "image_size 64",
        "--gddpm.",
    ):
        assert words in assumed
    assert len(read.replace(str(tmp_path), "")) <= 300 and len(assumed) <= 300
    assert ours.data_shape == (3, 64, 64) and ours.unet.mid_block.attentions[0].heads == 4


def test_flags_go_before_what_is_assumed(tmp_path, capsys):
    ours = adapter(
        checkpoint=save(tmp_path / "own.pt", fill(TINY)),
        image_size=16,
        num_head_channels=16,
        noise_schedule="cosine",
        diffusion_steps=4000,
        rescale_timesteps=True,
        predict_xstart=True,
    )
    assert "diffusion_steps" not in capsys.readouterr().err
    assert ours.unet.mid_block.attentions[0].heads == 64 // 16
    assert len(ours.sigmas) == 4000 and ours.sigmas.tolist() == SCHEDULES["cosine"](4000).tolist()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = ours.sigmas[4000 - 1 - 1001].item()  # step 1001 of 4000 is told as 250.25 of 1000
    want = ours.unet((1 + sigma**2) ** -0.5 * x, torch.tensor([250.25, 250.25])).sample[:, :3]
    torch.testing.assert_close(ours.denoise(x, sigma, ours.embed(["", ""])), want)  # the picture itself


def test_linear_noise_of_other_lengths():
    """Betas are scaled by 1000 / n (arXiv 2102.09672): sum of betas, and so about the last abar, stay what they are."""
    for n in (250, 1000, 4000):
        sigmas = SCHEDULES["linear"](n)
        assert len(sigmas) == n and sigmas[-1] == pytest.approx(math.sqrt(0.1 / n / (1 - 0.1 / n)), rel=1e-9)
    assert SCHEDULES["linear"](4000)[0] == pytest.approx(SCHEDULES["linear"](1000)[0], rel=0.05)


def test_settings_of_a_published_model_are_taken_by_its_shapes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(published.PUBLISHED, "m_imgnet_64", TINY | {"noise_schedule": "cosine", "n_classes": 10})
    monkeypatch.setitem(published.PUBLISHED, "m_lsun_256", TINY | {"num_res_blocks": 5})
    file = save(tmp_path / "x.pt", fill(TINY | {"n_classes": 10}))
    net = files.unet(run(checkpoint=file).gddpm)
    assert net.model == "m_imgnet_64" and net.options["noise_schedule"] == "cosine" and net.options["num_heads"] == 2
    assert len(net.notes) == 1 and "its shapes are those of m_imgnet_64, whose settings are taken" in net.notes[0]
    assert files.unet(run(checkpoint=file, model="m_imgnet_64").gddpm).notes == []
    (tmp_path / "sjc_data" / published.MODELS).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "sjc_data" / published.MODELS / "lsun_bedroom.pt", fill(TINY | {"n_classes": 10}))
    refused(run(), "its shapes are of m_imgnet_64, not of m_lsun_256", "--gddpm.checkpoint")


@pytest.mark.parametrize(
    "gddpm, words",
    [
        ({}, ["do not tell the edge of its pictures", "--gddpm.image_size"]),
        ({"image_size": 15}, ["--gddpm.image_size 15", "halves it 1 times", "a multiple of 2"]),
        ({"image_size": 16, "num_heads": 3}, ["64 channels, which num_heads 3 does not divide"]),
        ({"image_size": 16, "num_heads": 2, "num_head_channels": 32}, ["both tell the heads", "give one"]),
        ({"image_size": 16, "imgnet_cat": 3}, ["ImageNet class 3", "knows none", "--gddpm.classifier"]),
    ],
)
def test_settings_that_do_not_fit(tmp_path, gddpm, words):
    refused(run(checkpoint=save(tmp_path / "own.pt", fill(TINY)), **gddpm), *words)


def test_settings_of_published_models_are_known():
    refused(run(num_heads=4), "--gddpm.num_heads: read with --gddpm.checkpoint only", "m_lsun_256")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {"state_dict": w},
        lambda w: {"model": w},
        lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
        lambda w: {k: v.half() for k, v in w.items()},
        lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}},
        lambda w: {k: v.bfloat16() for k, v in w.items()},
    ],
    ids=["module", "state_dict", "model", "compiled", "fp16", "lightning", "bf16"],
)
def test_names_and_types_that_trainers_write(tmp_path, wrap):
    weights = {k: v.bfloat16().half().float() for k, v in fill(TINY).items()}
    unet = adapter(checkpoint=save(tmp_path / "own.pt", wrap(weights)), image_size=16).unet
    torch.testing.assert_close(unet.conv_in.weight, weights["input_blocks.0.0.weight"], rtol=1e-2, atol=1e-3)
    assert unet.dtype == torch.float32


def test_running_averages_are_taken_and_the_rest_is_named(tmp_path, capsys):
    raw, average = fill(TINY), fill(TINY, seed=1)
    unet = adapter(checkpoint=save(tmp_path / "both.pt", {"model": raw, "ema": average}), image_size=16).unet
    assert torch.equal(unet.conv_in.weight, average["input_blocks.0.0.weight"])
    assert "only what is below ema is read, not model." in capsys.readouterr().err


def test_running_averages_beside_a_file_are_named(tmp_path, capsys):
    save(tmp_path / "ema_0.9999_000100.pt", fill(TINY))
    adapter(checkpoint=save(tmp_path / "model000100.pt", fill(TINY)), image_size=16)
    assert "ema_0.9999_000100.pt beside it has the running averages" in capsys.readouterr().err


def test_classes_of_ones_own(tmp_path):
    """Ten classes, no classifier unless it is given; classes beyond are refused, before anything is loaded."""
    own = {"checkpoint": save(tmp_path / "own.pt", fill(TINY | {"n_classes": 10})), "image_size": 16}
    ours = adapter(**own, imgnet_cat=7)
    assert ours.classifier is None and ours.embed(["a view", "2"]).tolist() == [7, 2]
    with pytest.raises(UserError, match="class 10: must be 0 to 9"):
        ours.embed(["10"])
    refused(run(**own, imgnet_cat=10), "class 10", "knows 0 to 9")
    refused(run(**own), "draws one class out of 10", "--gddpm.imgnet_cat 0 to 9")
    drawn = run(SamplingConfig, **own).check_files().classes
    assert len(drawn) == 16 and max(drawn) <= 9 and len(set(drawn)) > 4


def test_a_classifier_of_ones_own(tmp_path):
    options = TINY | LABELS | {"channel_mult": (1, 2)}
    label = save(tmp_path / "classifier.pt", fill(options, NoisyClassifier))
    own = {"checkpoint": save(tmp_path / "own.pt", fill(TINY)), "image_size": 16, "classifier": label}
    ours = adapter(**own, imgnet_cat=6)
    assert ours.classifier.n_labels == 7 and ours.cls_scaling == 1
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = ours.embed([""])
    assert not torch.equal(
        ours.denoise(x, ours.sigmas[500].item(), y), GuidedDDPMAdapter(ours.unet).denoise(x, ours.sigmas[500].item(), y)
    )
    refused(run(**own), "--gddpm.classifier: guides to a class only")
    refused(run(**own | {"image_size": 32}, imgnet_cat=6), "judges pictures of 16 pixels, and the UNet draws 32")
    refused(run(**own | {"classifier": own["checkpoint"]}, imgnet_cat=6), "it is a UNet; give it as --gddpm.checkpoint")
    refused(run(**own | {"classifier": "nosuch.pt"}, imgnet_cat=6), "--gddpm.classifier nosuch.pt: no such file")
    wrong = save(tmp_path / "w.pt", fill(TINY | {"n_classes": 10}))
    refused(run(**own | {"checkpoint": wrong}, imgnet_cat=6), "knows 7 classes, and the UNet 10")


W = torch.zeros(2, 2)
KINDS = {
    "LoRA": {"lora_unet_x.lora_up.weight": W},
    "ControlNet": {"control_model.x": W},
    "Stable Diffusion checkpoint": {"cond_stage_model.x": W, "model.diffusion_model.input_blocks.0.0.weight": W},
    "UNet of a Stable Diffusion alone": {"input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": W},
    "latent diffusion model without text": {"first_stage_model.encoder.conv_in.weight": W},
    "diffusers pipeline alone": {"down_blocks.0.resnets.0.conv1.weight": W},
    "GLIDE": {"token_embedding.weight": W},
    "score_sde": {"module.all_modules.0.W": W},
    "EDM": {"model.enc.64x64_conv.weight": W},
    "denoising-diffusion-pytorch": {"model.init_conv.weight": W},
    "first DDPM": {"down.0.block.0.norm1.weight": W},
    "diffusion transformer": {"joint_blocks.0.x": W},
    "VAE alone": {"decoder.conv_in.weight": W},
    "text encoder alone": {"text_model.x": W},
    "textual-inversion": {"emb_params": W},
    "it has no input_blocks.0.0.weight": {"a\x1b[31m" * 160: W},
}


@pytest.mark.parametrize("what", KINDS)
def test_other_files_are_named(tmp_path, what):
    refused(run(checkpoint=save(tmp_path / "x.pt", KINDS[what])), what)


def changed(weights, **shapes):
    return weights | {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"input_blocks__0__0__weight": (32, 1, 3, 3)}, ["grey pictures", "RGB only"]),
        ({"input_blocks__0__0__weight": (32, 6, 3, 3)}, ["an upsampler"]),
        ({"input_blocks__0__0__weight": (32, 5, 3, 3)}, ["takes 5 channels"]),
        ({"out__2__weight": (4, 32, 3, 3)}, ["gives 4 channels"]),
        ({"input_blocks__1__0__out_layers__3__weight": (33, 33, 3, 3)}, ["a level of 33 channels"]),
        ({"time_embed__0__weight": (0, 10**12)}, ["1000000000000 channels"]),
        ({"time_embed__0__weight": (3,)}, ["shape of another architecture"]),
        ({"input_blocks__999999__0__weight": (1,)}, ["numbers input_blocks to 999999"]),
        ({"input_blocks__4__0__weight": (1,)}, ["5 input blocks are no 2 levels"]),
        ({"label_emb__weight": (0, 10**12)}, ["shape of another architecture"]),
        (
            {"middle_block__0__in_layers__2__weight": (32, 64, 3, 3)},
            ["middle_block.0.in_layers.2.weight is [32, 64, 3, 3]", "[64, 64, 3, 3] is meant"],
        ),
        ({"middle_block__9__x": (2,)}, ["nothing of that name is meant"]),
    ],
)
def test_shapes_of_no_such_model(tmp_path, shapes, words):
    refused(run(checkpoint=save(tmp_path / "x.pt", changed(fill(TINY), **shapes)), image_size=16), *words)


def test_whole_numbers_are_refused(tmp_path):
    weights = fill(TINY) | {"out.2.bias": torch.zeros(6, dtype=torch.int8)}
    refused(run(checkpoint=save(tmp_path / "x.pt", weights), image_size=16), "out.2.bias is of whole numbers")


def test_an_optimizer_is_named(tmp_path):
    state = {"state": {0: {"exp_avg": W}}, "param_groups": []}
    refused(run(checkpoint=save(tmp_path / "opt000100.pt", state)), "the optimizer's state", "ema_0.9999_000100.pt")


def test_a_classifier_that_pools_otherwise_is_named():
    with pytest.raises(layout.NotGuidedDiffusion, match="does not pool by attention"):
        layout.classifier({layout.FIRST: (32, 3, 3, 3), "out.3.weight": (7, 64, 1, 1)})


def test_levels_of_a_classifier_by_its_attentions():
    options = TINY | LABELS | {"num_res_blocks": 3, "channel_mult": (1, 2, 2, 2), "image_size": 32}
    for attends in ((False, True, False, True), (False, True, True, True)):
        want = options | {"attends": attends}
        told = layout.classifier(published_shapes(NoisyClassifier(want), want))
        assert (told["attends"], told["num_res_blocks"], told["image_size"], told["n_labels"]) == (attends, 3, 32, 7)
    narrow = options | {"num_channels": 64, "attends": (True,) * 4}
    shapes = published_shapes(NoisyClassifier(narrow), narrow)
    shapes |= {"input_blocks.1.0.out_layers.3.weight": (32, 32, 3, 3)}
    with pytest.raises(layout.NotGuidedDiffusion, match="no multiple of 64 channels"):
        layout.classifier(shapes)
    none = options | {"attends": (False,) * 4}
    with pytest.raises(layout.NotGuidedDiffusion, match="do not tell its levels"):
        layout.classifier(published_shapes(NoisyClassifier(none), none))


@pytest.mark.parametrize("name", ["cd_bedroom256_lpips.pt", "edm_cat256_ema.pt", "ct_imagenet64.pt"])
def test_models_that_are_told_levels_of_noise_are_known_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    refused(run(checkpoint=str(tmp_path / name)), "by its name, a consistency model or a UNet of EDM")
