"""Stands in for the repository BLIP: a decoder that says which of its colors a picture is nearest to."""

import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.colors = nn.Parameter(torch.zeros(3, 3))

    def generate(self, image, sample, num_beams, min_length, max_length):
        assert image.shape[1:] == (3, 384, 384)
        distances = (self.colors - image.mean(dim=(2, 3))).norm(dim=1)
        return [f"a picture of something {('red', 'green', 'blue')[int(distances.argmin())]}"]


def blip_decoder(pretrained, med_config):
    model = Decoder()
    model.load_state_dict(torch.load(pretrained, map_location="cpu"))
    return model
