import network
import torch


class ModuleTypeLora:
    def create_module(self, net, weights):
        if all(x in weights.w for x in ("lora_up.weight", "lora_down.weight")):
            return NetworkModuleLora(net, weights)
        return None


class NetworkModuleLora(network.NetworkModule):
    def __init__(self, net, weights):
        super().__init__(net, weights)
        # As the real one: a kind of layer that has no up and down raises.
        known = isinstance(weights.sd_module, torch.nn.MultiheadAttention) or weights.sd_module.weight.dim() in (2, 4)
        assert known, f"{self.network_key} matched a layer with unsupported type"
        self.up_model = weights.w["lora_up.weight"]
        self.down_model = weights.w["lora_down.weight"]
        self.dim = self.down_model.shape[0]

    def calc_updown(self, orig_weight):
        up, down = self.up_model.to(orig_weight.dtype), self.down_model.to(orig_weight.dtype)
        updown = (up.flatten(1) @ down.flatten(1)).reshape(orig_weight.shape)
        return updown * self.calc_scale() * self.multiplier(), None
