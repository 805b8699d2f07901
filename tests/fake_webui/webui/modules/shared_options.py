from modules.options import OptionInfo

options_templates = {
    "CLIP_stop_at_last_layers": OptionInfo(1),
    "emphasis": OptionInfo("Original"),
    "fp8_storage": OptionInfo("Disable"),
    "lora_functional": OptionInfo(False),
    "lora_in_memory_limit": OptionInfo(0),
    "sd_checkpoint_hash": OptionInfo(""),
    "sd_checkpoints_limit": OptionInfo(1),
    "sd_model_checkpoint": OptionInfo(None),
    "sd_vae": OptionInfo("Automatic"),
}
