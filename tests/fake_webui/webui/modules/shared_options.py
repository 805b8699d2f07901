from modules.options import OptionInfo

options_templates = {
    "CLIP_stop_at_last_layers": OptionInfo(1),
    "emphasis": OptionInfo("Original"),
    "deepbooru_escape": OptionInfo(True),
    "deepbooru_filter_tags": OptionInfo(""),
    "deepbooru_sort_alpha": OptionInfo(True),
    "deepbooru_use_spaces": OptionInfo(True),
    "fp8_storage": OptionInfo("Disable"),
    "interrogate_clip_max_length": OptionInfo(48),
    "interrogate_clip_min_length": OptionInfo(24),
    "interrogate_clip_num_beams": OptionInfo(1),
    "interrogate_deepbooru_score_threshold": OptionInfo(0.5),
    "interrogate_keep_models_in_memory": OptionInfo(False),
    "interrogate_return_ranks": OptionInfo(False),
    "lora_functional": OptionInfo(False),
    "lora_in_memory_limit": OptionInfo(0),
    "sd_checkpoint_hash": OptionInfo(""),
    "sd_checkpoints_limit": OptionInfo(1),
    "sd_model_checkpoint": OptionInfo(None),
    "sd_vae": OptionInfo("Automatic"),
}
