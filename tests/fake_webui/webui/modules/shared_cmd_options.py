import argparse
import os

from modules.paths_internal import data_path, models_path

cmd_opts = argparse.Namespace(
    api=False,
    api_auth=None,
    ckpt_dir=None,
    hide_ui_dir_config=False,
    listen=False,
    lora_dir=os.path.join(models_path, "Lora"),
    lowvram=False,
    lyco_dir_backcompat=os.path.join(models_path, "LyCORIS"),
    medvram=False,
    medvram_sdxl=False,
    no_half=True,
    no_prompt_history=False,
    nowebui=False,
    share=False,
    ui_config_file=os.path.join(data_path, "ui-config.json"),
    vae_dir=None,
)
cmd_opts.webui_is_non_local = False
