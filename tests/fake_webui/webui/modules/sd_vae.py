import glob
import os
from copy import deepcopy
from dataclasses import dataclass

from modules import devices, lowvram, paths_internal, script_callbacks, sd_hijack, sd_models, shared

vae_path = os.path.join(paths_internal.models_path, "VAE")
vae_dict = {}
base_vae = None
loaded_vae_file = None
checkpoint_info = None
unspecified = object()


@dataclass
class VaeResolution:
    vae: str = None
    source: str = None
    resolved: bool = True

    def tuple(self):
        return self.vae, self.source


def refresh_vae_list():
    vae_dict.clear()
    vae_dict.update({os.path.basename(path): path for path in sorted(glob.glob(os.path.join(vae_path, "*")))})


def resolve_vae(checkpoint_file):
    return VaeResolution(vae_dict.get(shared.opts.sd_vae), "specified in settings")


def store_base_vae(model):
    global base_vae, checkpoint_info
    if checkpoint_info != model.sd_checkpoint_info:
        assert not loaded_vae_file, "Trying to store non-base VAE!"
        base_vae = deepcopy(model.first_stage_model.state_dict())
        checkpoint_info = model.sd_checkpoint_info


def delete_base_vae():
    global base_vae, checkpoint_info
    base_vae = None
    checkpoint_info = None


def restore_base_vae(model):
    global loaded_vae_file
    if base_vae is not None and checkpoint_info == model.sd_checkpoint_info:
        _load_vae_dict(model, base_vae)
        loaded_vae_file = None
    delete_base_vae()


def clear_loaded_vae():
    global loaded_vae_file
    loaded_vae_file = None


def load_vae(model, vae_file=None, vae_source="from unknown source"):
    global loaded_vae_file
    if vae_file:
        store_base_vae(model)
        _load_vae_dict(model, sd_models.read_state_dict(vae_file))
    elif loaded_vae_file:
        restore_base_vae(model)
    loaded_vae_file = vae_file
    model.base_vae = base_vae
    model.loaded_vae_file = loaded_vae_file


def _load_vae_dict(model, vae_dict_1):
    model.first_stage_model.load_state_dict(vae_dict_1)
    model.first_stage_model.to(devices.dtype_vae)


def reload_vae_weights(sd_model=None, vae_file=unspecified):
    sd_model = sd_model or shared.sd_model
    vae_source = "from function argument"
    if vae_file == unspecified:
        vae_file, vae_source = resolve_vae(sd_model.sd_checkpoint_info.filename).tuple()
    if loaded_vae_file == vae_file:
        return None
    if sd_model.lowvram:
        lowvram.send_everything_to_cpu()
    else:
        sd_model.to(devices.cpu)
    sd_hijack.model_hijack.undo_hijack(sd_model)
    load_vae(sd_model, vae_file, vae_source)
    sd_hijack.model_hijack.hijack(sd_model)
    if not sd_model.lowvram:
        sd_model.to(devices.device)
    script_callbacks.model_loaded_callback(sd_model)
    return sd_model
