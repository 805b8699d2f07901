import torch
from torch import nn


class DeepDanbooruModel(nn.Module):
    """Its tags come with its weights; small, but its scores come from the pixels as the real one's do."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.head = nn.Linear(3, 5)

    def forward(self, *inputs):
        (pictures,) = inputs
        assert pictures.shape[1:] == (512, 512, 3)
        return torch.sigmoid(self.head(pictures.mean(dim=(1, 2))))

    def load_state_dict(self, state_dict, **kwargs):
        self.tags = state_dict.get("tags", [])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "tags"})
