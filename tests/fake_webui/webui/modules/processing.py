import hashlib
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from modules import extra_networks, lowvram, paths_internal, script_callbacks, sd_models, sd_vae, shared
from modules.shared import opts, state
from PIL import Image


@dataclass(repr=False)
class StableDiffusionProcessing:
    sd_model: object = None
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    sampler_name: str = None
    scheduler: str = None
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    override_settings: dict[str, Any] = None
    override_settings_restore_afterwards: bool = True
    refiner_checkpoint: str = None
    refiner_switch_at: float = None
    cached_uc: ClassVar[list] = [None, None]
    cached_c: ClassVar[list] = [None, None]
    c: tuple = field(default=None, init=False)
    uc: tuple = field(default=None, init=False)
    extra_network_data: dict = field(default=None, init=False)

    def __post_init__(self):
        self.override_settings = dict(self.override_settings or {})
        self.scripts, self.script_args = None, None
        self.cached_uc = StableDiffusionProcessing.cached_uc
        self.cached_c = StableDiffusionProcessing.cached_c

    def cached_params(self, required_prompts, steps, extra_network_data):
        """The name of a LoRA is in the prompt, not its weights."""
        names = [p.items for params in extra_network_data.values() for p in params]
        info = shared.sd_model.sd_checkpoint_info
        return required_prompts, steps, names, info, opts.CLIP_stop_at_last_layers

    def get_conds_with_caching(self, function, required_prompts, steps, caches, extra_network_data):
        key = self.cached_params(required_prompts, steps, extra_network_data)
        for cache in caches:
            if cache[0] is not None and cache[0] == key:
                return cache[1]
        caches[0][1] = function(shared.sd_model, required_prompts)
        caches[0][0] = key
        return caches[0][1]

    def setup_conds(self):
        prompt, _ = extra_networks.parse_prompt(self.prompt)
        networks = self.extra_network_data
        self.uc = self.get_conds_with_caching(encode, [self.negative_prompt], self.steps, [self.cached_uc], networks)
        self.c = self.get_conds_with_caching(encode, [prompt], self.steps, [self.cached_c], networks)

    def close(self):
        self.sd_model = None


@dataclass(repr=False)
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    enable_hr: bool = False


class Processed:
    def __init__(self, p, images_list):
        self.images = images_list


def encode(model, prompts):
    return model.cond_stage_model(prompts)


def process_images(p):
    stored_opts = {k: opts.data[k] for k in p.override_settings if k in opts.data}
    try:
        if sd_models.checkpoint_aliases.get(p.override_settings.get("sd_model_checkpoint")) is None:
            p.override_settings.pop("sd_model_checkpoint", None)
            sd_models.reload_model_weights()
        for k, v in p.override_settings.items():
            opts.set(k, v, is_api=True, run_callbacks=False)
            if k == "sd_model_checkpoint":
                sd_models.reload_model_weights()
            if k == "sd_vae":
                sd_vae.reload_vae_weights()
        return process_images_inner(p)
    finally:
        # The options come back, the checkpoint stays until the next picture; the VAE comes back at once.
        if p.override_settings_restore_afterwards:
            for k, v in stored_opts.items():
                setattr(opts, k, v)
                if k == "sd_vae":
                    sd_vae.reload_vae_weights()


@torch.no_grad()
def process_images_inner(p):
    if state.job_count == -1:
        state.job_count = p.n_iter
    images = []
    for _ in range(p.n_iter):
        if state.interrupted or state.stopping_generation:
            break
        sd_models.reload_model_weights()
        p.sd_model = shared.sd_model
        _, p.extra_network_data = extra_networks.parse_prompt(p.prompt)
        extra_networks.activate(p, p.extra_network_data)
        p.setup_conds()
        if not shared.cmd_opts.no_prompt_history:
            with open(os.path.join(paths_internal.data_path, "params.txt"), "w", encoding="utf8") as file:
                file.write(p.prompt)
        images.append(_drawn(p))
        if lowvram.is_enabled(shared.sd_model):
            lowvram.send_everything_to_cpu()
        extra_networks.deactivate(p, p.extra_network_data)
        state.job_no += 1
    return Processed(p, images)


def _drawn(p):
    """Noise and weights, hashed: any other weight or word gives another picture."""
    generator = torch.Generator().manual_seed(p.seed)
    x = torch.randn(1, 4, p.height // 8, p.width // 8, generator=generator)
    state.sampling_steps = p.steps
    for step in range(p.steps):
        if state.interrupted:
            break
        state.sampling_step = step
        script_callbacks.cfg_denoiser_callback(
            script_callbacks.CFGDenoiserParams(x, None, None, step, p.steps, p.c, p.uc)
        )
        if p.refiner_checkpoint and step == int(p.steps * p.refiner_switch_at):
            with sd_models.SkipWritingToConfig():
                sd_models.reload_model_weights(info=sd_models.get_closet_checkpoint_match(p.refiner_checkpoint))
        x = shared.sd_model.model(x, p.c + p.uc)
    return Image.frombytes("L", (8, 4), hashlib.sha256(x.numpy().tobytes()).digest())
