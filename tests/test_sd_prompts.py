"""What web UIs let a prompt state is refused or noted: Stable Diffusion would read it as words."""

import pytest

from families.sd.prompts import check
from my.errors import UserError


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "a fox <lora:fur_v2:0.8>",
            "--sd.prompt: <lora:fur_v2:0.8> is a LoRA inside a prompt; take it out, and give its "
            "file: --sd.lora fur_v2.safetensors:0.8",
        ),
        ("<LyCO:x> a fox", "is a LoRA inside a prompt"),
        ("a fox <hypernet:anime:0.5>", "hypernetwork"),
        ("a fox, embedding:EasyNegative", "a textual inversion, which is not supported; describe it in words"),
    ],
)
def test_what_cannot_be_had_is_refused(text, words):
    with pytest.raises(UserError) as error:
        check({"--sd.prompt": ["a fox", text]})
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text, what",
    [
        ("a (red:1.3) fox", "(red:1.3) is a weight"),
        ("a [red:blue:0.5] fox", "a change of words"),
        ("a [red|blue] fox", "a change of words"),
        ("a fox BREAK a house", "BREAK is a join"),
        ("a ((red)) fox", "an emphasis"),
        ("a __color__ fox", "a wildcard"),
    ],
)
def test_what_is_read_as_plain_words_is_noted(capsys, text, what):
    check({"--sd.negative_prompt": [text]})
    assert f"{what}" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert err.endswith("in web UIs; here it is read as plain words\n")


@pytest.mark.parametrize(
    "text",
    [
        "A high quality photo of a delicious burger",
        "a fox (red) at 3:30",
        "a [fox]",
        "5 < 6",
        "and a break",
        "Trump: a portrait, f/1.8",
    ],
)
def test_plain_prompts_are_left_alone(capsys, text):
    check({"--sd.prompt": [text]})
    assert not capsys.readouterr().err
