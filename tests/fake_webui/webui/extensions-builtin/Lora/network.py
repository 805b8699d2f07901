import os
from collections import namedtuple

from modules import hashes, sd_models

NetworkWeights = namedtuple("NetworkWeights", ["network_key", "sd_key", "w", "sd_module"])


class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name = name
        self.filename = filename
        self.metadata = {}
        self.is_safetensors = os.path.splitext(filename)[1].lower() == ".safetensors"
        try:
            self.metadata = sd_models.read_metadata_from_safetensors(filename)
        except Exception as error:
            print(f"reading lora {filename}: {error}")
        self.alias = self.metadata.get("ss_output_name", self.name)
        self.hash = None
        self.shorthash = None
        known = hashes.sha256_from_cache(filename, "lora/" + name, use_addnet_hash=True)
        self.set_hash(self.metadata.get("sshs_model_hash") or known or "")

    def set_hash(self, v):
        self.hash = v
        self.shorthash = v[0:12]
        if self.shorthash:
            import networks

            networks.available_network_hash_lookup[self.shorthash] = self

    def read_hash(self):
        if not self.hash:
            self.set_hash(hashes.sha256(self.filename, "lora/" + self.name, use_addnet_hash=True) or "")


class Network:
    def __init__(self, name, network_on_disk):
        self.name = name
        self.network_on_disk = network_on_disk
        self.te_multiplier = 1.0
        self.unet_multiplier = 1.0
        self.dyn_dim = None
        self.modules = {}
        self.mtime = None
        self.mentioned_name = None


class NetworkModule:
    def __init__(self, net, weights):
        self.network = net
        self.network_key = weights.network_key
        self.sd_key = weights.sd_key
        self.sd_module = weights.sd_module
        self.dim = None
        self.alpha = weights.w["alpha"].item() if "alpha" in weights.w else None

    def multiplier(self):
        text = "transformer" in self.sd_key[:20]
        return self.network.te_multiplier if text else self.network.unet_multiplier

    def calc_scale(self):
        return 1.0 if self.alpha is None else self.alpha / self.dim
