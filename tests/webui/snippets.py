"""What the tests run inside the WebUI's process."""

# SHA-256 over all tensors of the loaded model, LoRAs of the last prompt included.
DIGEST = """
import hashlib
from modules import sd_models
from modules.call_queue import queue_lock
with queue_lock:
    whole = hashlib.sha256()
    for name, tensor in sorted(sd_models.model_data.sd_model.state_dict().items()):
        whole.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
result = whole.hexdigest()
"""

# How many of the UNet's tensors a view shares, and how long the view took.
SHARED = """
import time
from modules import sd_models
from modules.call_queue import queue_lock
from lora_trainer.config import build
from lora_trainer.hosts.webui.view import view_of, state_of
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
    ours = model.unet(x, t, encoder_hidden_states=torch.cat([model.text.embed(p) for p in prompts])).sample
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
