"""LoRA Trainer: train LoRAs on the Stable Diffusion checkpoint you already use."""

__version__ = "0.1.0"
