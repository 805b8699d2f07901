import networks
import torch
from modules import patches

LAYERS = ("Linear", "Conv2d", "GroupNorm", "LayerNorm")


class LoraPatches:
    """Each layer of torch's merges before it computes, and forgets its backup when it is loaded."""

    def __init__(self):
        for kind in LAYERS:
            layer = getattr(torch.nn, kind)
            forward = patches.patch(__name__, layer, "forward", self._merging(layer.forward))
            load = patches.patch(
                __name__, layer, "_load_from_state_dict", self._forgetting(layer._load_from_state_dict)
            )
            setattr(self, f"{kind}_forward", forward)
            setattr(self, f"{kind}_load_state_dict", load)

    def undo(self):
        for kind in LAYERS:
            patches.undo(__name__, getattr(torch.nn, kind), "forward")
            patches.undo(__name__, getattr(torch.nn, kind), "_load_from_state_dict")

    @staticmethod
    def _merging(original):
        def forward(self, input):
            networks.network_apply_weights(self)
            return original(self, input)

        return forward

    @staticmethod
    def _forgetting(original):
        def load(self, *args, **kwargs):
            networks.network_reset_cached_weight(self)
            return original(self, *args, **kwargs)

        return load
