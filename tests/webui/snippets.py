"""What the tests run inside the WebUI's process."""

# SHA-256 over all tensors of the loaded model, LoRAs of the last prompt included.
DIGEST = """
import hashlib
import torch
from modules import sd_models
from modules.call_queue import queue_lock
with queue_lock:
    whole = hashlib.sha256()
    for name, tensor in sorted(sd_models.model_data.sd_model.state_dict().items()):
        whole.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
result = whole.hexdigest()
"""

# How many of the UNet's tensors a view shares, and how long the view took.
SHARED = """
import time
from modules import sd_models
from modules.call_queue import queue_lock
from lora_trainer.config import build
from lora_trainer.hosts.webui.tensors import state_of
from lora_trainer.hosts.webui.view import view_of
with queue_lock:
    sd_model = sd_models.model_data.sd_model
    took = []
    for _ in range(3):
        # What it computes: how long it waits for a core is the machine's affair.
        began = time.thread_time()
        model = view_of(sd_model, build({"base_model": "x", "train_data_dir": "y"}))
        took.append(time.thread_time() - began)
    def places(tensors):
        return {(t.data_ptr(), tuple(s for s in t.shape if s > 1)) for t in tensors}
    state = state_of(sd_model)
    unet = [t for n, t in state.items() if n.startswith("model.diffusion_model.")]
    vae = [t for n, t in state.items() if n.startswith("first_stage_model.")]
    mine = places(model.unet.state_dict().values()), places(model.vae.state_dict().values())
    result = {
        "unet": [len(places(unet) & mine[0]), len(unet)],
        "vae": [len(places(vae) & mine[1]), len(vae)],
        "seconds": min(took),
    }
"""

# How many weights the WebUI stores in fp8, how many of them a view reads where they are, and how many it has in all.
IN_FP8 = """
import torch
from modules import sd_models
from modules.call_queue import queue_lock
from lora_trainer.config import build
from lora_trainer.hosts.webui.tensors import state_of
from lora_trainer.hosts.webui.view import view_of
from lora_trainer.models.stored import stored_in
with queue_lock:
    sd_model = sd_models.model_data.sd_model
    model = view_of(sd_model, build({"base_model": "x", "train_data_dir": "y"}))
    networks = (model.unet, model.text.module)
    theirs = {t.data_ptr() for t in state_of(sd_model).values() if t.dtype == torch.float8_e4m3fn and t.dim() > 1}
    read = {weight.codes[0].data_ptr() for network in networks for weight in stored_in(network)}
    result = [len(theirs), len(theirs & read), sum(len(stored_in(network)) for network in networks)]
"""

# Text encoder and UNet with a LoRA, through the WebUI's loader and through the trainer: how far they are from each
# other, and the base from both.
APPLIED = """
import sys
import torch
from pathlib import Path
from modules import sd_models
from modules.call_queue import queue_lock
from lora_trainer.config import build
from lora_trainer.hosts.webui.merged import unmerge
from lora_trainer.hosts.webui.view import view_of
from lora_trainer.sampling import apply_lora
networks = sys.modules["networks"]
with queue_lock, torch.no_grad():
    sd_model = sd_models.model_data.sd_model
    unmerge(sd_model)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    prompts = ["noto emoji of red apple", "twemoji emoji of taco"]
    t = torch.tensor([100, 700])
    unet, encoder = sd_model.model.diffusion_model, sd_model.cond_stage_model
    plain = encoder(prompts)
    base = unet(x, t, context=plain)
    networks.load_networks([NAME], [1.0], [1.0], [None])
    context = encoder(prompts)
    theirs = unet(x, t, context=context)
    unmerge(sd_model)
    restored = unet(x, t, context=encoder(prompts))
    model = view_of(sd_model, build({"base_model": "x", "train_data_dir": "y"}))
    apply_lora(model, Path(networks.available_networks[NAME].filename))
    contexts = [model.text.encode(model.text.tokenize(p)) for p in prompts]
    ours = model.unet(x, t, encoder_hidden_states=torch.cat(contexts)).sample
    result = {
        "apart": (ours - theirs).abs().max().item(),
        "effect": (theirs - base).abs().max().item(),
        "effect on the text": (context - plain).abs().max().item(),
        "restored": torch.equal(base, restored),
    }
"""

# Each update takes at least KEPT["seconds"] and raises after KEPT["raise_at"] of them.
PACED = """
import time
from lora_trainer.training import step
KEPT.update(SETTINGS)
KEPT["updates"] = 0
if "update" not in KEPT:
    original = KEPT["update"] = step.Update.__call__
    def paced(self):
        time.sleep(KEPT["seconds"])
        original(self)
        KEPT["updates"] += 1
        if KEPT["updates"] == KEPT["raise_at"]:
            raise RuntimeError("raised by the test")
    step.Update.__call__ = paced
result = None
"""

# Wait in the WebUI's queue from some moment of an update on; how many updates ended in the meantime.
WAITED = """
import random, time
from modules.call_queue import queue_lock
before = KEPT["updates"]
while KEPT["updates"] == before:
    time.sleep(0.0005)
time.sleep(KEPT["seconds"] * random.random() / 2)
before = KEPT["updates"]
with queue_lock:
    result = KEPT["updates"] - before
    time.sleep(0.005)
"""

UNTIL_DRAWING = """
import time
from modules import shared
deadline = time.monotonic() + 20
while shared.state.sampling_step <= 3 and time.monotonic() < deadline:
    time.sleep(0.02)
result = shared.state.sampling_step
"""


def paced(seconds: float = 0.0, raise_at: int = -1) -> str:
    return PACED.replace("SETTINGS", repr({"seconds": seconds, "raise_at": raise_at}))


def applied(name: str) -> str:
    return APPLIED.replace("NAME", repr(name))


# What the WebUI's own code and a view of the loaded model make of the same prompts, and how many tensors they share.
VIEWED = """
import torch
from modules import sd_models, prompt_parser
from modules.call_queue import queue_lock
from lora_trainer.config import build
from lora_trainer.hosts.webui.merged import unmerge
from lora_trainer.hosts.webui.tensors import state_of
from lora_trainer.hosts.webui.view import view_of
from lora_trainer.sampling import conditions
def config(**settings):
    return build({"base_model": "x", "train_data_dir": "y"}, settings)
def said(sd_model, prompts):
    batch = prompt_parser.SdConditioning(prompts, width=128, height=64)
    told = sd_model.get_learned_conditioning(batch)
    return (told["crossattn"], told["vector"]) if isinstance(told, dict) else (told, None)
def asked(sd_model, x, t, told):
    extra = {} if told[1] is None else {"y": told[1]}
    return sd_model.model.diffusion_model(x, t, context=told[0], **extra)
def answered(model, x, t, prompts):
    return model.unet(x, t, **conditions(model, prompts, (128, 64)), return_dict=False)[0]
def told_sizes(model, prompts):
    added = conditions(model, prompts, (128, 64))["added_cond_kwargs"]
    return model.unet.add_time_proj(added["time_ids"].flatten()).reshape(len(prompts), -1)
def whole(model, context):
    # The WebUI fills up Stable Diffusion 3's with zeros.
    return getattr(model.unet, "whole", lambda same: same)(context)
def places(tensors):
    return {(p.data_ptr(), p.numel()) for p in tensors}
PROMPTS = ["noto emoji of red apple", "", "a cat sitting on a mat " * 20 + "with a hat"]
SYNTAX = ["a (cat:1.4), [dog] BREAK (mat)", "a cat, sitting on a mat, " * 20]
with queue_lock, torch.no_grad():
    sd_model = sd_models.model_data.sd_model
    unmerge(sd_model)
    channels = sd_model.model.diffusion_model.in_channels
    x = torch.randn(2, channels, 8, 16, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([100, 700])
    SNIPPET
"""

_COMPARED = """
    model, state = view_of(sd_model, config()), state_of(sd_model)
    shared = {}
    for part, module in (("model.diffusion_model.", model.unet), ("first_stage_model.", model.vae)):
        theirs = [p for name, p in state.items() if name.startswith(part)]
        shared[part] = [len(places(theirs) & places(module.parameters())), len(theirs)]
    storages = {p.untyped_storage().data_ptr() for p in state.values()}
    texts = [p for module in model.text.modules for p in module.parameters()]
    shared["text"] = [sum(p.untyped_storage().data_ptr() in storages for p in texts), len(texts)]
    said_apart = pooled_apart = told_apart = viewed_apart = 0.0
    prompts_too = view_of(sd_model, config(caption_syntax="webui"))
    for prompt in PROMPTS + SYNTAX:
        host = said(sd_model, [prompt])
        for one in [prompts_too] if prompt in SYNTAX else [model, prompts_too]:
            mine = one.text.read(prompt)
            said_apart = max(said_apart, (whole(model, mine.context) - host[0]).abs().max().item())
            if mine.pooled is not None:
                width = mine.pooled.shape[1]
                pooled_apart = max(pooled_apart, (mine.pooled - host[1][:, :width]).abs().max().item())
                if hasattr(model.unet, "add_time_proj"):
                    told_apart = max(told_apart, (told_sizes(model, [prompt]) - host[1][:, width:]).abs().max().item())
        if VIEWS and prompt in PROMPTS:
            view = model.text.encode(model.text.tokenize(prompt))
            viewed_apart = max(viewed_apart, (whole(model, view) - host[0]).abs().max().item())
    prompts = PROMPTS[:2]
    host = asked(sd_model, x, t, said(sd_model, prompts))
    result = {
        "shared": shared,
        "said apart": said_apart,
        "pooled apart": pooled_apart,
        "told apart": told_apart,
        "viewed apart": viewed_apart,
        "answered apart": (host - answered(model, x, t, prompts)).abs().max().item() if VIEWS else None,
        "answers": host.abs().mean().item(),
        "family": model.facts.family.name,
        "prediction": model.noise.prediction,
        "ends without signal": model.noise.snr[-1].item() == 0,
        "notices": list(model.facts.notices),
    }
"""

# What a negative prompt and a prompt tell a refiner beside their words, by the WebUI and by the trainer.
_SCORED = """
    model = view_of(sd_model, config())
    added = conditions(model, ["ugly", "a cat"], (128, 64), negatives=1)["added_cond_kwargs"]
    mine = model.unet.add_time_proj(added["time_ids"].flatten()).reshape(2, -1)
    width, apart = added["text_embeds"].shape[1], []
    for row, prompt in enumerate(["ugly", "a cat"]):
        batch = prompt_parser.SdConditioning([prompt], width=128, height=64, is_negative_prompt=row == 0)
        host = sd_model.get_learned_conditioning(batch)["vector"]
        apart.append((host[0, width:] - mine[row]).abs().max().item())
    result = {"apart": apart, "told": added["time_ids"].tolist(), "limit": model.noise.trained}
"""

# As APPLIED, for a model of any family.
_APPLIED_TO_ANY = """
    import sys
    from pathlib import Path
    from safetensors.torch import load_file
    from lora_trainer.sampling import apply_lora
    networks = sys.modules["networks"]
    prompts = PROMPTS[:2]
    plain = said(sd_model, prompts)
    base = asked(sd_model, x, t, plain)
    networks.load_networks([NAME], [1.0], [1.0], [None])
    told = said(sd_model, prompts)
    theirs = asked(sd_model, x, t, told)
    unet_only = asked(sd_model, x, t, plain)
    unmerge(sd_model)
    networks.load_networks([NAME], [0.5], [0.5], [None])
    half = asked(sd_model, x, t, said(sd_model, prompts))
    unmerge(sd_model)
    restored = asked(sd_model, x, t, said(sd_model, prompts))
    model = view_of(sd_model, config())
    adapter = apply_lora(model, Path(networks.available_networks[NAME].filename))
    with adapter.weight(0.5):
        ours_at_half = answered(model, x, t, prompts)
    version = networks.available_networks[NAME].sd_version.name
    names = {name.partition(".")[0] for name in load_file(networks.available_networks[NAME].filename)}
    loaded = networks.load_network(NAME, networks.available_networks[NAME])
    applied = {module.network_key.partition(".")[0] for module in loaded.modules.values()}
    unmatched = sorted(names - applied)
    ours = answered(model, x, t, prompts)
    result = {
        "apart": (ours - theirs).abs().max().item(),
        "apart at half": (ours_at_half - half).abs().max().item(),
        "effect": (theirs - base).abs().max().item(),
        "effect on the text": (told[0] - plain[0]).abs().max().item(),
        "effect on the pooled": 0 if told[1] is None else (told[1] - plain[1]).abs().max().item(),
        "effect of the UNet": (unet_only - base).abs().max().item(),
        "restored": torch.equal(base, restored),
        "answer": theirs.flatten()[::64].tolist(),
        "version": version,
        "unmatched": unmatched,
    }
"""


def compared(*, views: bool = True) -> str:
    """Without `views` of the text encoders nothing is encoded by them."""
    return VIEWED.replace("    SNIPPET", _COMPARED).replace("VIEWS", str(views))


def scored() -> str:
    return VIEWED.replace("    SNIPPET", _SCORED)


def applied_to_any(name: str) -> str:
    return VIEWED.replace("    SNIPPET", _APPLIED_TO_ANY.replace("NAME", repr(name)))
