"""What a sound file is that is no whole Stable Diffusion: named by its tensors, with advice that can be followed."""

import json
from pathlib import Path

import pytest

from families.sd import kinds, layout

KEYS = Path(__file__).resolve().parent / "reference" / "sd_v1_checkpoint_keys.json"
UNET, VAE, CLIP = layout.UNET, layout.VAE, layout.CLIP


@pytest.fixture(scope="module")
def v1():
    return {name: tuple(shape) for name, shape in json.loads(KEYS.read_text()).items()}


def only(*prefixes):
    return lambda v1: {name: shape for name, shape in v1.items() if name.startswith(prefixes)}


def without(prefix):
    return lambda v1: {name.removeprefix(prefix): shape for name, shape in only(prefix)(v1).items()}


def widened(channels):
    return lambda v1: {**v1, f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3)}


def plus(name):
    return lambda v1: {**v1, name: (3, 3)}


def alone(*names):
    return lambda v1: dict.fromkeys(names, (3, 3))


LORA = "a LoRA, or an adapter like it; give it as --sd.lora, beside a checkpoint"
EMBEDDING = "a textual-inversion embedding; embeddings are not supported: describe it in the prompt"
WHOLE_FILES = [  # what is said, and a file of that kind
    ("a multi-view model, such as MVDream", plus(f"{UNET}camera_embed.0.weight")),
    ("a multi-view model, such as MVDream or ImageDream", plus(f"{UNET}image_embed.proj.weight")),
    ("Zero123, which draws other views", lambda v1: {**widened(8)(v1), "cc_projection.weight": (768, 772)}),
    ("an inpainting model, whose UNet takes 9 channels instead of 4", widened(9)),
    ("InstructPix2Pix, or another that reads a picture, whose UNet takes 8", widened(8)),
    ("a depth-to-image model, whose UNet takes 5", widened(5)),
    ("an upscaler, whose UNet takes 7", widened(7)),
    ("another model, whose UNet takes 6", widened(6)),
    ("a ControlNet", plus("control_model.time_embed.0.weight")),
    ("Stable Diffusion XL", plus("conditioner.embedders.1.model.ln_final.weight")),
    ("the refiner of Stable Diffusion XL", plus(f"{UNET}label_emb.0.0.weight")),
    ("Stable Diffusion 3", alone(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight")),
    ("Flux, or a transformer", alone("double_blocks.0.img_attn.norm.key_norm.scale")),
    ("Flux, or a transformer", alone("model.diffusion_model.single_blocks.0.linear1.weight")),
    ("AuraFlow", alone("model.double_layers.0.attn.w1o.weight")),
    ("PixArt", alone("adaln_single.linear.weight", "pos_embed.proj.weight")),
    ("Stable Video Diffusion", plus(f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight")),
    ("a text-to-video model", plus(f"{UNET}input_blocks.1.0.temopral_conv.conv1.0.weight")),
    ("Stable Cascade", alone("clip_txt_pooled_mapper.weight")),
    ("Stable Cascade", alone("effnet_mapper.0.weight")),
    ("DeepFloyd IF", alone("encoder_pooling.1.positional_embedding", "input_blocks.0.0.weight")),
    ("Kandinsky", alone("add_embedding.image_norm.weight", "conv_in.weight")),
    ("the noise levels of EDM, such as Playground", plus("edm_vpred.sigma_max")),
    ("levels of EDM", plus("edm_mean")),
    ("a latent consistency model", plus(f"{UNET}time_embed.cond_proj.weight")),
    ("GLIGEN", plus(f"{UNET}position_net.linears.0.weight")),
    ("it is quantised; use the plain", plus(f"{UNET}x.absmax")),
    ("it is quantised", plus("scaled_fp8")),
    ("Zero123", alone("clip_camera_projection.weight")),
    ("a diffusion transformer", alone("patch_embedding.weight", "blocks.0.x")),
    ("an upscaler of pictures, such as ESRGAN", alone("model.1.sub.0.RDB1.conv1.0.weight")),
    (
        "a checkpoint that a run of this project wrote: .* --resume True",
        alone("field/density", "optim/density/exp_avg"),
    ),
    ("the state of an optimizer", alone("optimizer.0.exp_avg")),
    ("ESRGAN", alone("params_ema.body.0.rdb1.conv1.weight")),
]
ADDED_FILES = [
    (LORA, alone("lora_unet_down_blocks_0_attentions_0.lora_down.weight")),
    (LORA, alone("unet.down_blocks.0.attn1.to_q.lora_A.weight")),
    (LORA, alone("lora_te_text_model_x.lora_up.weight")),
    (
        "a Custom Diffusion adapter; it is not supported: merge it",
        alone("down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"),
    ),
    (LORA, alone("lycoris_x.hada_w1_a")),
    (LORA, alone("base_model.model.x.lora_A.weight")),
    (EMBEDDING, alone("string_to_param.*")),
    (EMBEDDING, alone("emb_params")),
    (EMBEDDING, alone("<cat-toy>")),
    ("a ControlNet", alone("controlnet_cond_embedding.conv_in.weight", "conv_in.weight")),
    ("a ControlNet", alone("input_hint_block.0.weight", "input_blocks.0.0.weight")),
    ("a ControlNet-LLLite", alone("lllite_unet_x.down.0.weight")),
    ("a T2I-Adapter", alone("body.0.block1.weight")),
    ("a T2I-Adapter", alone("adapter.body.0.resnets.0.block1.weight")),
    ("an IP-Adapter", alone("image_proj.norm.weight")),
    ("an IP-Adapter", alone("ip_adapter.1.to_k_ip.weight")),
    ("a hypernetwork", alone("768.0.linear.0.weight")),
    ("an AnimateDiff motion module", alone("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight")),
]
PARTS = [
    (
        r"the averaged weights \(model_ema\) of a UNet, without the plain ones; use the file that has both",
        lambda v1: {layout.ema_name(n) if n.startswith(UNET) else n: shape for n, shape in v1.items()},
    ),
    ("a diffusers model put into one file; give the diffusers folder", alone("unet.down_blocks.0.x", "vae.encoder.x")),
    ("an encoder of pictures alone", alone("vision_model.embeddings.patch_embedding.weight")),
    ("a UNet alone; give the whole checkpoint: UNet, VAE and text encoder", only(UNET)),
    ("a UNet alone, of Stable Diffusion, of guided-diffusion or of .*; .* or see --family gddpm", without(UNET)),
    ("the unet of a diffusers folder alone; give the folder", alone("down_blocks.0.resnets.0.conv1.weight")),
    ("a VAE alone; give it as --sd.vae, beside a checkpoint", only(VAE)),
    ("a VAE alone; give it as", without(VAE)),
    ("a VAE alone; give it as", alone("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight")),
    ("TAESD, a VAE made small", alone("encoder.layers.0.weight", "decoder.layers.3.conv.0.weight")),
    ("TAESD", alone("0.weight", "1.conv.0.weight")),
    ("a text encoder alone; give the whole", without("cond_stage_model.transformer.")),
    ("a text encoder alone", alone("encoder.layers.0.mlp.fc1.bias", "embeddings.token_embedding.weight")),
    ("a text encoder alone", alone("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight")),
    (
        "a pruned UNet without a middle block, such as BK-SDM; give its diffusers folder",
        lambda v1: {name: shape for name, shape in v1.items() if "middle_block" not in name},
    ),
    ("it has no VAE; give one with --sd.vae FILE_OR_FOLDER", only(UNET, CLIP)),
    ("it has no text encoder, and there is no option to give one; give the whole", only(UNET, VAE)),
    (
        r"it has no text encoder that is known \(cond_stage_model.bert.x\)",
        lambda v1: {**only(UNET, VAE)(v1), "cond_stage_model.bert.x": (3,)},
    ),
    (r"it has no UNet .*; it begins with fc.weight \[3, 3\]; use a text-to-image checkpoint", alone("fc.weight")),
]


@pytest.mark.parametrize("words, make", WHOLE_FILES + ADDED_FILES + PARTS)
def test_other_files_are_named(v1, words, make):
    with pytest.raises(kinds.NotStableDiffusion, match=words) as caught:
        kinds.refuse_others(make(v1))
    message = str(caught.value)
    assert "get the file again" not in message and len(message) < 200  # of 300, with what stands around it


def test_a_whole_checkpoint_is_none_of_them(v1):
    kinds.refuse_others(v1)
    kinds.refuse_others({**v1, "v_pred": (0,), "ztsnr": (0,), "alphas_cumprod": (1000,), "model_ema.decay": ()})
    kinds.refuse_others(only(UNET, CLIP)(v1), vae_given=True)


def test_names_out_of_a_file_are_escaped_and_cut():
    with pytest.raises(kinds.NotStableDiffusion) as caught:
        kinds.refuse_others({"\x1b[2J" + "x" * 10_000: (1,) * 10_000, "b": (2,)})
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "make, words",
    [
        (
            alone(
                "decoder.conv_in.weight", "post_quant_conv.weight", "first_stage_model.decoder.mid.block_1.conv1.weight"
            ),
            "it is the decoder of a VAE alone; give a file or a folder that has its encoder, too",
        ),
        (alone("up_blocks.0.attn2.processor.to_k_custom_diffusion.weight"), "it is a Custom Diffusion adapter"),
        (alone("lora_unet_x.lora_down.weight"), "it is a LoRA, .* and no VAE of Stable Diffusion"),
        (alone("encoder.layers.0.weight"), "TAESD"),
        (alone("decoder.time_conv_out.weight"), "the VAE of a video model"),
    ],
)
def test_what_is_no_vae(make, words):
    with pytest.raises(kinds.NotStableDiffusion, match=words):
        kinds.refuse_other_vaes(make({}))


@pytest.mark.parametrize("channels, words", [(16, "Stable Diffusion 3 or Flux, whose latents have"), (8, "another m")])
def test_other_latents(channels, words):
    with pytest.raises(kinds.NotStableDiffusion, match=words):
        kinds.refuse_other_latents({"latent_channels": channels})
