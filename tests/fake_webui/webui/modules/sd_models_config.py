config_default = "v1-inference.yaml"
config_inpainting = "v1-inpainting-inference.yaml"


def find_checkpoint_config(state_dict, info):
    channels = state_dict["model.diffusion_model.input_blocks.0.0.weight"].shape[1]
    return config_inpainting if channels == 9 else config_default
