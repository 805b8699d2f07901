import re
from collections import defaultdict

extra_network_registry = {}
re_extra_net = re.compile(r"<(\w+):([^>]+)>")


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []
        self.positional = [item for item in self.items if "=" not in item]
        self.named = dict(item.split("=", 1) for item in self.items if "=" in item)


class ExtraNetwork:
    def __init__(self, name):
        self.name = name

    def activate(self, p, params_list):
        raise NotImplementedError

    def deactivate(self, p):
        raise NotImplementedError


def register_extra_network(extra_network):
    extra_network_registry[extra_network.name] = extra_network


def activate(p, extra_network_data):
    """Also those that the prompt does not mention: it switches them off."""
    for name, extra_network in extra_network_registry.items():
        extra_network.activate(p, extra_network_data.get(name, []))


def deactivate(p, extra_network_data):
    for extra_network in extra_network_registry.values():
        extra_network.deactivate(p)


def parse_prompt(prompt):
    found = defaultdict(list)
    for name, args in re_extra_net.findall(prompt):
        found[name].append(ExtraNetworkParams(items=args.split(":")))
    return re_extra_net.sub("", prompt), found
