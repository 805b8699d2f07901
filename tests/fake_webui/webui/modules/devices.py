import contextlib

import torch

cpu = torch.device("cpu")
device = cpu
device_interrogate = cpu
fp8 = False
dtype = torch.float32
dtype_vae = torch.float32
dtype_unet = torch.float32
dtype_inference = torch.float32
unet_needs_upcast = False


def get_optimal_device_name():
    return "cpu"


def torch_gc():
    pass


def autocast(disable=False):
    # --no-half.
    return contextlib.nullcontext()


def without_autocast(disable=False):
    return contextlib.nullcontext()
