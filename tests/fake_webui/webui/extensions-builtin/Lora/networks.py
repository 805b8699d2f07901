import os
import re

import network
import network_lora
import torch
from modules import devices, sd_models, shared

module_types = [network_lora.ModuleTypeLora()]
suffix_conversion = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
originals = None
extra_network_lora = None
available_networks = {}
available_network_aliases = {}
loaded_networks = []
networks_in_memory = {}
available_network_hash_lookup = {}
forbidden_network_aliases = {}


def convert_diffusers_name_to_compvis(key, is_sd2):
    """Counts three places a level, as only SD1.5's form has them."""
    found = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key)
    if found:
        side, level, kind, place, rest = found.groups()
        first = 3 * int(level) + int(place) + (side == "down")
        rest = suffix_conversion.get(rest, rest) if kind == "resnets" else rest
        way = "input" if side == "down" else "output"
        return f"diffusion_model_{way}_blocks_{first}_{int(kind == 'attentions')}_{rest}"
    found = re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key)
    if found:
        kind, place, rest = found.groups()
        rest = suffix_conversion.get(rest, rest) if kind == "resnets" else rest
        return f"diffusion_model_middle_block_{1 if kind == 'attentions' else 2 * int(place)}_{rest}"
    found = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(?:down|up)samplers_0_conv", key)
    if found and found[1] == "down":
        return f"diffusion_model_input_blocks_{3 + 3 * int(found[2])}_0_op"
    if found:
        return f"diffusion_model_output_blocks_{2 + 3 * int(found[2])}_{2 if int(found[2]) else 1}_conv"
    second = re.match(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", key)
    if second and (is_sd2 or second[1]):
        rest = second[3].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
        return f"{'1_' if second[1] else ''}model_transformer_resblocks_{second[2]}_{rest}"
    return re.sub(r"^lora_te_(text_model_encoder_layers_)", r"transformer_\1", key)


def assign_network_names_to_compvis_modules(sd_model):
    mapping = {}
    if sd_model.is_sdxl:
        embedders = shared.sd_model.conditioner.embedders
        texts = {f"{i}_": embedder.wrapped for i, embedder in enumerate(embedders) if hasattr(embedder, "wrapped")}
    else:
        texts = {"": shared.sd_model.cond_stage_model.wrapped}
    named = [(prefix + name, module) for prefix, part in texts.items() for name, module in part.named_modules()]
    for name, module in [*named, *shared.sd_model.model.named_modules()]:
        module.network_layer_name = name.replace(".", "_")
        mapping[module.network_layer_name] = module
    sd_model.network_layer_mapping = mapping


def load_network(name, network_on_disk):
    net = network.Network(name, network_on_disk)
    net.mtime = os.path.getmtime(network_on_disk.filename)
    matched = {}
    for key_network, weight in sd_models.read_state_dict(network_on_disk.filename).items():
        before, _, network_part = key_network.partition(".")
        layers = shared.sd_model.network_layer_mapping
        key = convert_diffusers_name_to_compvis(before, "model_transformer_resblocks" in layers)
        # The projections of a packed attention are one module there.
        sd_module = layers.get(key) or layers.get(re.sub(r"_[qkv]_proj$", "", key))
        if sd_module is None:
            key = key.replace("lora_unet", "diffusion_model").replace("lora_te1_text_model", "0_transformer_text_model")
            sd_module = layers.get(key)
        if sd_module is None:
            continue
        if key not in matched:
            matched[key] = network.NetworkWeights(network_key=key_network, sd_key=key, w={}, sd_module=sd_module)
        matched[key].w[network_part] = weight
    for key, weights in matched.items():
        net_module = next(filter(None, (kind.create_module(net, weights) for kind in module_types)), None)
        if net_module is None:
            raise AssertionError(f"Could not find a module type that would accept those keys: {', '.join(weights.w)}")
        net.modules[key] = net_module
    return net


def purge_networks_from_memory():
    while len(networks_in_memory) > shared.opts.lora_in_memory_limit:
        networks_in_memory.pop(next(iter(networks_in_memory)))
    devices.torch_gc()


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    already_loaded = {net.name: net for net in loaded_networks if net.name in names}
    loaded_networks.clear()
    unavailable = [name for name in names if name not in available_network_aliases]
    if unavailable:
        update_available_networks_by_names(unavailable)
    for i, name in enumerate(names):
        on_disk = available_network_aliases.get(name)
        net = already_loaded.get(name) or networks_in_memory.get(name)
        if on_disk is not None and (net is None or os.path.getmtime(on_disk.filename) > net.mtime):
            net = networks_in_memory[name] = load_network(name, on_disk)
            on_disk.read_hash()
        if net is None:
            continue
        net.mentioned_name = name
        net.te_multiplier = te_multipliers[i] if te_multipliers else 1.0
        net.unet_multiplier = unet_multipliers[i] if unet_multipliers else 1.0
        net.dyn_dim = dyn_dims[i] if dyn_dims else 1.0
        loaded_networks.append(net)
    purge_networks_from_memory()


def store_weights_backup(weight):
    return None if weight is None else weight.to(devices.cpu, copy=True)


def restore_weights_backup(obj, field, weight):
    if weight is None:
        setattr(obj, field, None)
        return
    getattr(obj, field).copy_(weight)


def network_restore_weights_from_backup(self):
    weights_backup = getattr(self, "network_weights_backup", None)
    bias_backup = getattr(self, "network_bias_backup", None)
    if weights_backup is None and bias_backup is None:
        return
    if weights_backup is not None:
        restore_weights_backup(self, "weight", weights_backup)
    restore_weights_backup(self, "bias", bias_backup)


def network_apply_weights(self):
    """Merge `loaded_networks` into a layer: from its backup, unless just these are in it by their names."""
    network_layer_name = getattr(self, "network_layer_name", None)
    if network_layer_name is None:
        return
    current_names = getattr(self, "network_current_names", ())
    wanted_names = tuple((x.name, x.te_multiplier, x.unet_multiplier, x.dyn_dim) for x in loaded_networks)
    if getattr(self, "network_weights_backup", None) is None and wanted_names != ():
        if current_names != ():
            raise RuntimeError(f"{network_layer_name} - no backup weights found and current weights are not unchanged")
        self.network_weights_backup = store_weights_backup(self.weight)
    if getattr(self, "network_bias_backup", None) is None and wanted_names != ():
        self.network_bias_backup = store_weights_backup(self.bias)
    if current_names == wanted_names:
        return
    network_restore_weights_from_backup(self)
    for net in loaded_networks:
        module = net.modules.get(network_layer_name)
        if module is not None:
            with torch.no_grad():
                updown, _ = module.calc_updown(self.weight)
                self.weight.copy_((self.weight.to(dtype=updown.dtype) + updown).to(dtype=self.weight.dtype))
    self.network_current_names = wanted_names


def network_reset_cached_weight(self):
    self.network_current_names = ()
    self.network_weights_backup = None
    self.network_bias_backup = None


def process_network_files(names=None):
    for folder, _, files in sorted(os.walk(shared.cmd_opts.lora_dir)):
        for file in sorted(files):
            name, ending = os.path.splitext(file)
            if ending not in (".pt", ".ckpt", ".safetensors") or (names and name not in names):
                continue
            entry = network.NetworkOnDisk(name, os.path.join(folder, file))
            available_networks[name] = entry
            if entry.alias in available_network_aliases:
                forbidden_network_aliases[entry.alias.lower()] = 1
            available_network_aliases[name] = entry
            available_network_aliases[entry.alias] = entry


def update_available_networks_by_names(names):
    process_network_files(names)


def list_available_networks():
    available_networks.clear()
    available_network_aliases.clear()
    forbidden_network_aliases.clear()
    available_network_hash_lookup.clear()
    forbidden_network_aliases.update({"none": 1, "Addams": 1})
    os.makedirs(shared.cmd_opts.lora_dir, exist_ok=True)
    process_network_files()


list_available_networks()
