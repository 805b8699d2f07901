import glob
import hashlib
import os
import re
import threading

import safetensors
import safetensors.torch
from modules import (
    devices,
    hashes,
    lowvram,
    paths_internal,
    script_callbacks,
    sd_hijack,
    sd_models_config,
    sd_vae,
    shared,
)

from tests.fake_webui.latent_diffusion import model_of

model_path = os.path.join(paths_internal.models_path, "Stable-diffusion")
checkpoints_list = {}
checkpoint_aliases = {}
re_strip_checksum = re.compile(r"\s*\[[^]]+]\s*$")


class CheckpointInfo:
    def __init__(self, filename):
        self.filename = filename
        self.is_safetensors = filename.endswith(".safetensors")
        folder = shared.cmd_opts.ckpt_dir or model_path
        self.name = os.path.relpath(filename, folder) if filename.startswith(folder) else os.path.basename(filename)
        self.name_for_extra = os.path.splitext(os.path.basename(filename))[0]
        self.model_name = os.path.splitext(self.name.replace("/", "_").replace("\\", "_"))[0]
        self.metadata = {}
        self.hash = model_hash(filename)
        self.sha256 = hashes.sha256_from_cache(filename, f"checkpoint/{self.name}")
        self.shorthash = self.sha256[0:10] if self.sha256 else None
        self.title = f"{self.name} [{self.shorthash}]" if self.shorthash else self.name
        self.short_title = f"{self.name_for_extra} [{self.shorthash}]" if self.shorthash else self.name_for_extra
        self.ids = [
            self.hash,
            self.model_name,
            self.title,
            self.name,
            self.name_for_extra,
            f"{self.name} [{self.hash}]",
        ]

    def register(self):
        checkpoints_list[self.title] = self
        for name in self.ids:
            checkpoint_aliases[name] = self

    def calculate_shorthash(self):
        """The title gets the hash behind it: whoever kept the old title finds it among the aliases."""
        self.sha256 = hashes.sha256(self.filename, f"checkpoint/{self.name}")
        if self.shorthash != self.sha256[0:10]:
            self.shorthash = self.sha256[0:10]
            checkpoints_list.pop(self.title, None)
            self.title = f"{self.name} [{self.shorthash}]"
            self.short_title = f"{self.name_for_extra} [{self.shorthash}]"
            self.ids += [self.shorthash, self.sha256, self.title, self.short_title]
            self.register()
        return self.shorthash


def model_hash(filename):
    with open(filename, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[0:8]


def list_models():
    checkpoints_list.clear()
    checkpoint_aliases.clear()
    for filename in sorted(glob.glob(os.path.join(shared.cmd_opts.ckpt_dir or model_path, "*.safetensors"))):
        CheckpointInfo(filename).register()


def get_closet_checkpoint_match(search_string):
    if not search_string:
        return None
    if search_string in checkpoint_aliases:
        return checkpoint_aliases[search_string]
    for wanted in (search_string, re.sub(re_strip_checksum, "", search_string)):
        found = [info for info in checkpoints_list.values() if wanted in info.title]
        if found:
            return min(found, key=lambda info: len(info.title))
    return None


def select_checkpoint():
    """Raises FileNotFoundError where there is none at all."""
    info = checkpoint_aliases.get(shared.opts.sd_model_checkpoint)
    if info is None and not checkpoints_list:
        raise FileNotFoundError("No checkpoints found.")
    return info or next(iter(checkpoints_list.values()))


def read_metadata_from_safetensors(filename):
    with safetensors.safe_open(filename, "pt") as file:
        return dict(file.metadata() or {})


def read_state_dict(checkpoint_file, print_global_state=False, map_location=None):
    return safetensors.torch.load_file(checkpoint_file)


def get_checkpoint_state_dict(checkpoint_info, timer):
    checkpoint_info.calculate_shorthash()
    return read_state_dict(checkpoint_info.filename)


class SkipWritingToConfig:
    skip = False
    previous = None

    def __enter__(self):
        self.previous = SkipWritingToConfig.skip
        SkipWritingToConfig.skip = True
        return self

    def __exit__(self, exc_type, exc_value, exc_traceback):
        SkipWritingToConfig.skip = self.previous


def load_model_weights(model, checkpoint_info, state_dict, timer):
    """Into the live module, in place."""
    checkpoint_info.calculate_shorthash()
    if not SkipWritingToConfig.skip:
        shared.opts.data["sd_model_checkpoint"] = checkpoint_info.title
    if state_dict is None:
        state_dict = get_checkpoint_state_dict(checkpoint_info, timer)
    model.is_sdxl = hasattr(model, "conditioner")
    model.is_sd2 = not model.is_sdxl and hasattr(model.cond_stage_model, "model")
    model.is_sd1, model.is_sd3 = not (model.is_sdxl or model.is_sd2), False
    middle = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    model.is_ssd = model.is_sdxl and middle not in state_dict
    model.latent_channels = 4
    model.load_state_dict(state_dict, strict=False)
    model.float()
    model.alphas_cumprod_original = model.alphas_cumprod
    model.sd_model_hash = checkpoint_info.shorthash
    model.sd_model_checkpoint = checkpoint_info.filename
    model.sd_checkpoint_info = checkpoint_info
    shared.opts.data["sd_checkpoint_hash"] = checkpoint_info.sha256
    sd_vae.delete_base_vae()
    sd_vae.clear_loaded_vae()
    sd_vae.load_vae(model, *sd_vae.resolve_vae(checkpoint_info.filename).tuple())


class SdModelData:
    def __init__(self):
        self.sd_model = None
        self.loaded_sd_models = []
        self.was_loaded_at_least_once = False
        self.lock = threading.Lock()

    def get_sd_model(self):
        if self.was_loaded_at_least_once:
            return self.sd_model
        with self.lock:
            if self.sd_model is None and not self.was_loaded_at_least_once:
                try:
                    load_model()
                except Exception as error:
                    print(f"Stable diffusion model failed to load: {error}")
                    self.sd_model = None
        return self.sd_model

    def set_sd_model(self, v, already_loaded=False):
        self.sd_model = v
        if already_loaded:
            sd_vae.base_vae = v.base_vae
            sd_vae.loaded_vae_file = v.loaded_vae_file
            sd_vae.checkpoint_info = v.sd_checkpoint_info
        self.loaded_sd_models = [model for model in self.loaded_sd_models if model is not v]
        if v is not None:
            self.loaded_sd_models.insert(0, v)


model_data = SdModelData()


def send_model_to_cpu(m):
    if m.lowvram:
        lowvram.send_everything_to_cpu()
    else:
        m.to(devices.cpu)


def send_model_to_device(m):
    lowvram.apply(m)
    if not m.lowvram:
        m.to(shared.device)


def send_model_to_trash(m):
    m.to(device="meta")


def load_model(checkpoint_info=None, already_loaded_state_dict=None):
    checkpoint_info = checkpoint_info or select_checkpoint()
    if model_data.sd_model:
        send_model_to_trash(model_data.sd_model)
        model_data.sd_model = None
    state_dict = already_loaded_state_dict or get_checkpoint_state_dict(checkpoint_info, None)
    sd_model = model_of(state_dict)
    sd_model.used_config = sd_models_config.find_checkpoint_config(state_dict, checkpoint_info)
    load_model_weights(sd_model, checkpoint_info, state_dict, None)
    send_model_to_device(sd_model)
    sd_hijack.model_hijack.hijack(sd_model)
    sd_model.eval()
    model_data.set_sd_model(sd_model)
    model_data.was_loaded_at_least_once = True
    script_callbacks.model_loaded_callback(sd_model)
    return sd_model


def reuse_model_from_already_loaded(sd_model, checkpoint_info, timer):
    """The loaded model of that file, else one whose weights may be replaced, else None."""
    if sd_model is not None and sd_model.sd_checkpoint_info.filename == checkpoint_info.filename:
        return sd_model
    for loaded in model_data.loaded_sd_models:
        if loaded.sd_checkpoint_info.filename == checkpoint_info.filename:
            send_model_to_device(loaded)
            model_data.set_sd_model(loaded, already_loaded=True)
            if not SkipWritingToConfig.skip:
                shared.opts.data["sd_model_checkpoint"] = checkpoint_info.title
                shared.opts.data["sd_checkpoint_hash"] = checkpoint_info.sha256
            sd_vae.reload_vae_weights(loaded)
            return model_data.sd_model
    if shared.opts.sd_checkpoints_limit > 1 and len(model_data.loaded_sd_models) < shared.opts.sd_checkpoints_limit:
        model_data.sd_model = None
        load_model(checkpoint_info)
        return model_data.sd_model
    if not model_data.loaded_sd_models:
        return None
    sd_model = model_data.sd_model = model_data.loaded_sd_models.pop()
    sd_vae.base_vae = sd_model.base_vae
    sd_vae.loaded_vae_file = sd_model.loaded_vae_file
    sd_vae.checkpoint_info = sd_model.sd_checkpoint_info
    return sd_model


def reload_model_weights(sd_model=None, info=None, forced_reload=False):
    checkpoint_info = info or select_checkpoint()
    sd_model = sd_model or model_data.sd_model
    current = sd_model.sd_checkpoint_info if sd_model else None
    if sd_model and sd_model.sd_model_checkpoint == checkpoint_info.filename and not forced_reload:
        return sd_model
    sd_model = reuse_model_from_already_loaded(sd_model, checkpoint_info, None)
    if not forced_reload and sd_model and sd_model.sd_checkpoint_info.filename == checkpoint_info.filename:
        return sd_model
    if sd_model is not None:
        send_model_to_cpu(sd_model)
        sd_hijack.model_hijack.undo_hijack(sd_model)
    state_dict = get_checkpoint_state_dict(checkpoint_info, None)
    config = sd_models_config.find_checkpoint_config(state_dict, checkpoint_info)
    if sd_model is None or config != sd_model.used_config:
        if sd_model is not None:
            send_model_to_trash(sd_model)
        load_model(checkpoint_info, already_loaded_state_dict=state_dict)
        return model_data.sd_model
    try:
        load_model_weights(sd_model, checkpoint_info, state_dict, None)
    except Exception:
        load_model_weights(sd_model, current, None, None)
        raise
    finally:
        sd_hijack.model_hijack.hijack(sd_model)
        if not sd_model.lowvram:
            sd_model.to(devices.device)
        script_callbacks.model_loaded_callback(sd_model)
    model_data.set_sd_model(sd_model)
    return sd_model


def unload_model_weights(sd_model=None, info=None):
    send_model_to_cpu(sd_model or shared.sd_model)
    return sd_model
