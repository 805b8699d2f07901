import networks
from modules import extra_networks


class ExtraNetworkLora(extra_networks.ExtraNetwork):
    def __init__(self):
        super().__init__("lora")
        self.errors = {}

    def activate(self, p, params_list):
        names = [params.positional[0] for params in params_list]
        te = [float(params.positional[1]) if len(params.positional) > 1 else 1.0 for params in params_list]
        unet = [float(q.positional[2]) if len(q.positional) > 2 else t for q, t in zip(params_list, te, strict=True)]
        networks.load_networks(names, te, unet, [None] * len(names))

    def deactivate(self, p):
        self.errors.clear()
