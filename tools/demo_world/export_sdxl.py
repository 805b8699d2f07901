"""The parts that `pretrain.py … sdxl` left, and the demo checkpoint's VAE, as one fp16 checkpoint of SDXL's form.

usage: python export_sdxl.py PARTS_FOLDER OUT.safetensors

What was learned is written into the trainer's own views of an empty checkpoint, so that no name is mapped here; the
file is then opened, and has to answer as the networks that were trained.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from networks import LAYERS, VOCABULARY, WIDTH, text_config
from networks_sdxl import UNET, make_text, make_unet, told
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.ldm import clip_state, open_clip_state, unet_state
from lora_trainer.demo import WORLD
from lora_trainer.hosts.standalone import open_model
from lora_trainer.models.bridge import unet_view
from lora_trainer.models.families import SD1, SDXL
from lora_trainer.models.single_file import encoders_of
from lora_trainer.sampling import conditions

QUANT = "first_stage_model.quant_conv."
TABLE = "embeddings.token_embedding.weight"


def sdxls_vae() -> dict[str, Tensor]:
    """The demo's VAE with latents that SDXL's factor scales to what SD1's factor makes of its own."""
    whole = load_file(WORLD / "emoji-world.safetensors")
    vae = {name: tensor for name, tensor in whole.items() if name.startswith("first_stage_model.")}
    units = SD1.scale_factor / SDXL.scale_factor
    channels = len(vae[QUANT + "bias"]) // 2
    for kind in ("weight", "bias"):
        vae[QUANT + kind][:channels] *= units
    # The variance's logarithm.
    vae[QUANT + "bias"][channels:] += 2 * math.log(units)
    vae["first_stage_model.post_quant_conv.weight"] /= units
    return vae


def filled(unet: dict[str, Tensor], text: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
    """The checkpoint's state dict."""
    first, second = (part.prefix for part in SDXL.text)
    shapes = unet_state(UNET) | clip_state(first, text_config()) | open_clip_state(second, width=WIDTH, layers=LAYERS)
    state = {name: torch.zeros(shape, dtype=torch.half) for name, shape in shapes.items()}
    write(unet_view(state, head_channels=SDXL.head_channels), unet)
    encoders = encoders_of(state, SDXL, None)
    for name, encoder in zip(("first", "second"), encoders, strict=True):
        own = {key.removeprefix(f"{name}."): value for key, value in text.items() if key.startswith(f"{name}.")}
        table = torch.zeros(VOCABULARY, WIDTH, dtype=torch.half)
        table[seen] = own[TABLE]
        write(encoder.inner, own | {TABLE: table})
    write(encoders[1].projection, {"weight": text["text_projection.weight"]})
    return state | sdxls_vae()


@torch.no_grad()
def write(view: nn.Module, values: dict[str, Tensor]) -> None:
    """Into each parameter of `view` the value of its name; none may be left."""
    parameters = dict(view.named_parameters())
    assert parameters.keys() == values.keys(), sorted(parameters.keys() ^ values.keys())[:4]
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def check(path: Path, unet: dict[str, Tensor], text: dict[str, Tensor], seen: Tensor) -> None:
    """The file as the trainer opens it answers as what was trained."""
    network, texts = make_unet(), make_text(seen)
    network.load_state_dict({name: value.float() for name, value in unet.items()})
    texts.load_state_dict({name: value.float() for name, value in text.items()})
    where = torch.zeros(VOCABULARY, dtype=torch.long)
    where[seen] = torch.arange(len(seen))
    model = open_model(path, torch.device("cpu"))
    words = ["noto emoji of red apple", ""]
    tokens = torch.cat([model.text.tokenize(caption) for caption in words])
    said = texts(where[tokens], torch.isin(tokens, seen).float())
    ours = conditions(model, words, (128, 128))
    assert torch.allclose(ours["encoder_hidden_states"], said.context, atol=1e-2)
    assert torch.allclose(ours["added_cond_kwargs"]["text_embeds"], said.pooled, atol=1e-2)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = network(x, 500, **told(said)).sample
    away = (model.unet(x, 500, **ours).sample - theirs).abs().max().item()
    print(f"{path}: answers differ by {away:.1e} from those of the trained networks")
    assert away < 1e-2


def main(parts: Path, out: Path) -> None:
    unet: dict[str, Tensor] = {}
    for path in sorted(parts.glob("unet-average-*.pt")):
        unet |= torch.load(path, weights_only=True)
    text = torch.load(parts / "text-average-0.pt", weights_only=True)
    seen = text.pop("seen")
    save_file(filled(unet, text, seen), out)
    check(out, unet, text, seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
