"""Other trainers' files become settings that train, and what does not become one is listed.

The examples are those of the tools' own documentation; only their folders are replaced where they are trained.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lora_trainer.cli import main
from lora_trainer.config import build
from lora_trainer.errors import ConfigError
from lora_trainer.imports.read import read_file, to_yaml

# docs/config_README-en.md of kohya-ss/sd-scripts (Apache-2.0).
KOHYA = r"""
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'C:\hoge'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'C:\fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\reg'
  class_tokens = 'human'
  keep_tokens = 1

# This is a fine-tuning dataset
[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'C:\piyo'
  metadata_file = 'C:\piyo\piyo_md.json'
"""
# The same page: duplicate subsets.
KOHYA_TWICE = r"""
[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = 'C:\hoge'

[[datasets]]
resolution = 768

  [[datasets.subsets]]
  image_dir = 'C:\hoge'
"""
# The same page: separators and wildcards.
KOHYA_TAGS = """
[general]
flip_aug = true
color_aug = false
resolution = [1024, 1024]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator= "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;"
enable_wildcard = true

  [[datasets.subsets]]
  image_dir = "/path/to/image_dir"
  num_repeats = 1
  caption_prefix = "1girl, hatsune miku, vocaloid |||"
  caption_suffix = ", anime screencap ||| masterpiece, rating: general"
"""
# docs/train_README-ja.md of kohya-ss/sd-scripts (Apache-2.0): class+identifier.
KOHYA_REPEATS = r"""
[general]
enable_bucket = true

[[datasets]]
resolution = 512
batch_size = 4

  [[datasets.subsets]]
  image_dir = 'C:\hoge'
  class_tokens = 'hoge girl'
  num_repeats = 10

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'C:\reg'
  class_tokens = 'girl'
  num_repeats = 1
"""
# docs/masked_loss_README.md of kohya-ss/sd-scripts (Apache-2.0): without [[datasets]].
KOHYA_MASKED = """
[[datasets.subsets]]
image_dir = "/path/to/image/dir"
caption_extension = ".txt"
num_repeats = 8
alpha_mask = true
"""
# docs/validation.md of kohya-ss/sd-scripts (Apache-2.0).
KOHYA_VALIDATION = """
[general]
shuffle_caption = true
keep_tokens = 1

[[datasets]]
resolution = "1024,1024"
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'path/to/your_images'
  caption_extension = '.txt'
  num_repeats = 10

  [[datasets.subsets]]
  image_dir = 'path/to/your_validation_images'
  caption_extension = '.txt'
  validation_split = 1.0
"""
# The values of config/default.toml and config/lora.toml of Akegarasu/lora-scripts (AGPL-3.0), which name the same
# settings under other sections.
LORA_SCRIPTS_VALUES = {
    "model": {"v2": False, "v_parameterization": False, "pretrained_model_name_or_path": "./sd-models/model.ckpt"},
    "dataset": {
        **{"train_data_dir": "./train/input", "reg_data_dir": "", "prior_loss_weight": 1, "cache_latents": True},
        **{"shuffle_caption": True, "enable_bucket": True},
    },
    "additional_network": {
        **{"network_dim": 32, "network_alpha": 16, "network_train_unet_only": False},
        **{"network_train_text_encoder_only": False, "network_module": "networks.lora", "network_args": []},
    },
    "optimizer": {
        **{"unet_lr": 1e-4, "text_encoder_lr": 1e-5, "optimizer_type": "AdamW8bit"},
        **{"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 0, "lr_restart_cycles": 1},
    },
    "training": {
        **{"resolution": "512,512", "train_batch_size": 1, "max_train_epochs": 10, "noise_offset": 0.0},
        **{"keep_tokens": 0, "xformers": True, "lowram": False, "clip_skip": 2, "mixed_precision": "fp16"},
        "save_precision": "fp16",
    },
    "sample_prompt": {"sample_sampler": "euler_a", "sample_every_n_epochs": 1},
    "saving": {
        **{"output_name": "output_name", "save_every_n_epochs": 1, "save_n_epoch_ratio": 0, "save_last_n_epochs": 499},
        **{"save_state": False, "save_model_as": "safetensors", "output_dir": "./output", "logging_dir": "./logs"},
        "log_prefix": "output_name",
    },
    "others": {
        **{"min_bucket_reso": 256, "max_bucket_reso": 1024, "caption_extension": ".txt", "max_token_length": 225},
        "seed": 1337,
    },
}
# What its page writes: no sections, learning rates as texts, previews in parts (mikazuki/schema of the same).
LORA_SCRIPTS_PAGE = {
    **{"pretrained_model_name_or_path": "./sd-models/model.safetensors", "train_data_dir": "./train/aki"},
    **{"resolution": "512,768", "enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 64},
    **{"output_name": "aki", "output_dir": "./output", "save_model_as": "safetensors", "save_precision": "float"},
    **{"max_train_epochs": 10, "train_batch_size": 1, "network_train_unet_only": True, "learning_rate": "1e-4"},
    **{"unet_lr": "1e-4", "text_encoder_lr": "1e-5", "lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 0},
    **{"lr_scheduler_num_cycles": 1, "optimizer_type": "AdamW8bit", "network_module": "networks.lora"},
    **{"network_dim": 32, "network_alpha": 32, "enable_preview": True, "positive_prompts": "1girl, solo"},
    **{"negative_prompts": "lowres", "sample_cfg": 7, "sample_steps": 24, "sample_sampler": "euler_a"},
    **{"sample_width": 512, "sample_height": 512, "sample_seed": 2333, "sample_every_n_epochs": 2},
    **{"shuffle_caption": False, "mixed_precision": "bf16", "xformers": True, "cache_latents": True, "seed": 1337},
    **{"clip_skip": 2, "model_train_type": "sd-lora"},
}
# As OneTrainer writes training_concepts/concepts.json (modules/util/config/ConceptConfig.py of Nerogar/OneTrainer,
# AGPL-3.0, has the names and defaults).
ONETRAINER = [
    {
        **{"__version": 2, "name": "castle", "path": "/pictures/castle", "seed": -5, "enabled": True},
        **{"type": "STANDARD", "include_subdirectories": False, "image_variations": 1, "text_variations": 1},
        **{"balancing": 10.0, "balancing_strategy": "REPEATS", "loss_weight": 1.0, "concept_stats": {}},
        "image": {
            **{"enable_crop_jitter": True, "enable_random_flip": True, "enable_fixed_flip": False},
            **{"enable_random_rotate": False, "random_rotate_max_angle": 0.0, "enable_resolution_override": False},
            "resolution_override": "512",
        },
        "text": {
            **{"prompt_source": "sample", "prompt_path": "", "enable_tag_shuffling": True, "tag_delimiter": ","},
            **{"keep_tags_count": 2, "tag_dropout_enable": False, "tag_dropout_mode": "FULL"},
        },
    },
    {
        "name": "knight",
        "path": "/pictures/knight",
        "balancing": 0.4,
        "loss_weight": 0.5,
        "include_subdirectories": True,
    },
    {"name": "off", "path": "/pictures/off", "enabled": False},
    {"name": "prior", "path": "/pictures/prior", "type": "PRIOR_PREDICTION"},
    {"name": "held out", "path": "/pictures/held_out", "type": "VALIDATION"},
    {"name": "many", "path": "/pictures/many", "balancing": 50.0, "balancing_strategy": "SAMPLES"},
]


def toml(values: dict) -> str:
    """Enough of TOML for these."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", toml(value)]
    return "\n".join(lines)


FILES = {
    "kohya.toml": KOHYA,
    "twice.toml": KOHYA_TWICE,
    "tags.toml": KOHYA_TAGS,
    "repeats.toml": KOHYA_REPEATS,
    "masked.toml": KOHYA_MASKED,
    "validation.toml": KOHYA_VALIDATION,
    "default.toml": toml(LORA_SCRIPTS_VALUES),
    "page.toml": toml(LORA_SCRIPTS_PAGE),
    "page.json": json.dumps(LORA_SCRIPTS_PAGE),
    "concepts.json": json.dumps(ONETRAINER),
}


def taken(tmp_path: Path, name: str, text: str | None = None):
    """(settings as plain values, {key: (value, why)} of what was left, remarks)."""
    path = tmp_path / name
    path.write_text(FILES[name] if text is None else text, encoding="utf-8")
    _, found = read_file(path)
    return found.plain(), {left.key: (left.value, left.why) for left in found.left}, found.remarks


def test_kohyas_example(tmp_path):
    settings, left, _ = taken(tmp_path, "kohya.toml")
    assert settings == {
        "train_data_dir": "C:\\",
        "concepts": [
            {"folder": "hoge", "caption": "hoge girl"},
            {"folder": "fuga", "caption": "fuga boy"},
            {"folder": "piyo"},
        ],
        "resolution": 512,
        "batch_size": 4,
        "shuffle_captions": True,
        "keep_tokens": 2,
        "reg_data_dir": "C:\\reg",
        "preservation_prompt": "human",
    }
    assert left["datasets[1].batch_size"] == (2, "batch_size is 4 already: it holds for the whole run")
    assert left["datasets[1].resolution"][1] == "resolution is 512 already: it holds for the whole run"
    assert left["datasets[1].subsets[0].metadata_file"][0] == "C:\\piyo\\piyo_md.json"
    # Whatever is said of captions there is taken over or listed, never forgotten.
    for key in ("general.shuffle_caption", "datasets[0].subsets[1].keep_tokens"):
        assert key in left or {"shuffle_captions", "keep_tokens"} & set(settings)


@pytest.mark.parametrize("key", ["fp8_base", "fp8_base_unet"])
def test_kohyas_fp8_base(tmp_path, key):
    values = LORA_SCRIPTS_PAGE | {key: True}
    settings, left, remarks = taken(tmp_path, "page.json", json.dumps(values))
    assert settings["base_precision"] == "fp8"
    assert f"{key} True: the UNet's matrices in fp8, nothing else of the base" in remarks
    assert key not in left
    settings, left, _ = taken(tmp_path, "page.json", json.dumps(values | {key: False}))
    assert "base_precision" not in settings
    assert left[key][1].startswith("switched off there")


def test_one_folder_is_the_train_data_dir_itself(tmp_path):
    settings, left, _ = taken(tmp_path, "repeats.toml")
    assert settings["train_data_dir"] == "C:\\hoge"
    assert settings["concepts"] == [{"folder": ".", "repeats": 10, "caption": "hoge girl"}]
    assert settings["reg_data_dir"] == "C:\\reg"
    settings, left, _ = taken(tmp_path, "twice.toml")
    assert settings == {"train_data_dir": "C:\\hoge", "resolution": 512}
    assert left["datasets[1].subsets[0].image_dir"][1].startswith("the same folder again")


def test_folders_together_elsewhere_and_on_several_drives(tmp_path):
    def of(*folders):
        subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{folder}'\n" for folder in folders)
        settings, _, _ = taken(tmp_path, "x.toml", "[[datasets]]\n" + subsets)
        assert build({"base_model": "b"}, settings)
        return settings["train_data_dir"], [concept["folder"] for concept in settings.get("concepts", [])]

    assert of("/a/b/c", "/a/b/d/e", "/a/b") == ("/a/b", ["c", "d/e", "."])
    assert of("D:\\sets\\x\\one", "D:/sets/x/two") == ("D:\\sets\\x", ["one", "two"])
    assert of("C:\\one", "D:\\two") == (".", ["C:\\one", "D:\\two"])
    assert of("one/x", "two") == (".", ["one/x", "two"])
    assert of("./sets/one", "sets/two") == ("sets", ["one", "two"])
    assert of("/one", "two") == (".", ["/one", "two"])


def test_what_kohyas_other_examples_say(tmp_path):
    settings, left, _ = taken(tmp_path, "validation.toml")
    assert settings["validation_data_dir"] == "path/to/your_validation_images"
    assert settings["train_data_dir"] == "path/to/your_images"
    assert (settings["resolution"], settings["concepts"]) == (1024, [{"folder": ".", "repeats": 10}])
    settings, left, _ = taken(tmp_path, "masked.toml")
    assert (settings["masked_loss"], settings["unmasked_weight"]) == (True, 0)
    assert not any("mask" in key for key in left)
    settings, left, _ = taken(tmp_path, "tags.toml")
    assert settings["allow_upscaling"] is False
    assert left["general.color_aug"] == (False, "switched off there, as here")
    assert left["datasets[0].secondary_separator"] == (";;;", "not supported")


def test_lora_scripts_example(tmp_path):
    settings, left, remarks = taken(tmp_path, "default.toml")
    expected = {
        **{"base_model": "./sd-models/model.ckpt", "train_data_dir": "./train/input", "output_dir": "./output"},
        **{"output_name": "output_name", "lora_rank": 32, "lora_alpha": 16, "lora_dropout": 0, "learning_rate": 1e-4},
        **{"train_text_encoder": True, "text_encoder_lr": 1e-5, "lr_warmup_steps": 0},
        **{"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 1},
        **{"optimizer": "adamw", "resolution": 512, "allow_upscaling": True, "batch_size": 1, "epochs": 10},
        **{"clip_skip": 2, "seed": 1337, "mixed_precision": "fp16", "save_precision": "fp16", "enable_xformers": True},
    }
    assert {key: value for key, value in settings.items() if key in expected} == expected
    told = "\n".join(remarks)
    assert "LoRA scale alpha / rank = 16 / 32 = 0.5" in told
    assert "kohya's default: network_dropout 0, bucket_no_upscale False" in told
    assert "AdamW8bit: adamw" in told
    assert left["noise_offset"] == (0.0, "switched off there, as here")
    assert left["save_every_n_epochs"][1].startswith("it counts epochs")
    # Each of its keys is a setting, a remark, a thing that is so here, or listed.
    same = {"enable_bucket", "caption_extension", "save_model_as", "network_module", "network_train_unet_only"}
    same |= {"lr_restart_cycles", "unet_lr", "train_batch_size", "max_train_epochs", "xformers", "optimizer_type"}
    same |= {"network_dim", "network_alpha", "pretrained_model_name_or_path", "shuffle_caption", "keep_tokens"}
    for values in LORA_SCRIPTS_VALUES.values():
        for key in values:
            assert key in settings or key in left or key in same, key


def test_what_the_page_of_lora_scripts_writes(tmp_path):
    for name in ("page.toml", "page.json"):
        settings, left, remarks = taken(tmp_path, name)
        assert settings["sample_prompts"] == ["1girl, solo"]
        assert (settings["sample_negative_prompt"], settings["sample_guidance"]) == ("lowres", 7)
        assert settings["save_precision"] == "fp32"
        assert settings["train_text_encoder"] is False
        assert left["text_encoder_lr"] == ("1e-5", "the text encoder is not trained")
        assert settings["resolution"] == 640
        assert any("'512,768': about as many pixels as 640 × 640" in remark for remark in remarks)
        assert settings["allow_upscaling"] is False


def test_kohyas_alpha_of_1_is_said(tmp_path):
    settings, _, remarks = taken(tmp_path, "x.toml", "train_data_dir = 'a'\nnetwork_dim = 8\nlearning_rate = 1e-4\n")
    assert (settings["lora_alpha"], settings["max_train_steps"], settings["text_encoder_lr"]) == (1, 1600, 1e-4)
    assert any("alpha / rank = 1 / 8 = 0.125" in remark for remark in remarks)
    assert settings["ema_decay"] == 0
    settings, _, _ = taken(tmp_path, "x.json", '{"train_data_dir": "a", "network_dim": 8, "network_alpha": 0}')
    assert settings["lora_alpha"] == 8
    settings, left, _ = taken(tmp_path, "x.json", '{"train_data_dir": "a", "network_dim": 8, "network_alpha": null}')
    assert settings["lora_alpha"] == 1
    # A preset says only what it changes.
    preset = "[metadata]\nname = 'x'\n[data]\nresolution = '768,768'\nbucket_no_upscale = true\n"
    settings, left, _ = taken(tmp_path, "x.toml", preset)
    assert settings == {"resolution": 768, "allow_upscaling": False}
    assert left == {"metadata.name": ("x", "about the preset")}


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("optimizer_type = 'DAdaptation'", "optimizer_type", "optimizer: expected adamw"),
        ("optimizer_type = 'some.Thing'", "optimizer_type", "it names code: optimizer=custom"),
        ("lr_scheduler = 'piecewise_constant'", "lr_scheduler", "lr_scheduler: expected"),
        (
            "lr_scheduler = 'cosine'\nlr_scheduler_num_cycles = 3",
            "lr_scheduler_num_cycles",
            "only cosine_with_restarts",
        ),
        ("adaptive_noise_scale = 0.1", "adaptive_noise_scale", "does nothing without noise_offset"),
        ("noise_offset_random_strength = true", "noise_offset_random_strength", "not supported"),
        ("lr_warmup_steps = 0.1", "lr_warmup_steps", "constant schedule has no warm-up"),
        ("network_module = 'networks.dylora'", "network_module", "LoRA, LoHa, LoKr, IA³ and OFT are trained here"),
        ("network_module = 'lycoris.kohya'\nnetwork_args = ['algo=boft']", "network_args", "not known here"),
        ("network_args = ['dora_wd=True']", "network_args dora_wd", "adapter=dora scales the inputs"),
        ("network_args = ['down_lr_weight=sine']", "network_args down_lr_weight", "write its numbers as block_lrs"),
        ("network_args = ['conv_dim=x']", "conv_dim", "conv_rank: expected a whole number"),
        ("min_snr_gamma = 'x'", "min_snr_gamma", "min_snr_gamma: expected a number"),
        ("sample_prompts = './prompts.txt'", "sample_prompts", "files of prompts are not read"),
        ("resolution = '512,x'", "resolution", "expected 512"),
        ("enable_bucket = false", "enable_bucket", "their own shape"),
        ("max_train_epochs = 2\nmax_train_steps = 9", "max_train_steps", "goes before it"),
        ("sample_every_n_steps = 5", "sample_every", "expected sample_prompts beside it"),
        ("max_train_steps = 5\nlr_scheduler = 'linear'\nlr_warmup_steps = 9", "lr_warmup_steps", "fewer than"),
    ],
)
def test_what_has_no_counterpart_is_listed_with_its_value(tmp_path, text, key, why):
    _, left, _ = taken(tmp_path, "x.toml", f"train_data_dir = 'a'\n{text}\n")
    assert why in left[key][1]


def test_kohyas_network_arguments_mean_the_same_here(tmp_path):
    head = "train_data_dir = 'a'\nnetwork_dim = 8\nnetwork_alpha = 4\nnetwork_train_unet_only = true\n"
    dims = ",".join(["2"] * 12 + ["16"] + ["0"] + ["8"] * 11)
    down = ",".join(["0.5"] * 12)
    arguments = ["conv_dim=4", "rank_dropout=0.1", f"block_dims={dims}", f"down_lr_weight={down}", "mid_lr_weight=2"]
    text = f"{head}scale_weight_norms = 1.0\nnetwork_args = {arguments}\n"
    settings, left, _ = taken(tmp_path, "x.toml", text)
    assert (settings["conv_rank"], settings["conv_alpha"], settings["rank_dropout"]) == (4, 1, 0.1)
    assert settings["block_ranks"][11:15] == ["IN11=2", "MID=16", "OUT00=0", "OUT01=8"]
    # A block's alpha is the network's there, whatever its rank.
    assert settings["block_alphas"][11:14] == ["IN11=4", "MID=4", "OUT01=4"]
    assert settings["block_lrs"] == [*(f"IN{number:02}=0.5" for number in range(12)), "MID=2"]
    assert settings["scale_weight_norms"] == 1
    assert not any("network" in key for key in left)
    text = head + "network_module = 'lycoris.kohya'\nnetwork_args = ['algo=lokr', 'factor=8', 'conv_dim=2']\n"
    settings, _, remarks = taken(tmp_path, "x.toml", text)
    assert (settings["adapter"], settings["lokr_factor"]) == ("lokr", 8)
    assert (settings["conv_rank"], settings["conv_alpha"]) == (2, 4)
    assert any("outermost layers" in remark for remark in remarks)
    text = (
        head + "network_module = 'lycoris.kohya'\nnetwork_args = ['algo=diag-oft', 'constraint=0.1', 'rescaled=True']\n"
    )
    settings, left, _ = taken(tmp_path, "x.toml", text)
    assert (settings["adapter"], settings["lora_rank"], settings["conv_rank"]) == ("oft", 8, 8)
    assert {"network_args constraint", "network_args rescaled", "conv_alpha"} <= set(left)
    assert build({"base_model": "x", **settings}, {}).adapter == "oft"
    text = head + "network_module = 'lycoris.kohya'\nnetwork_args = ['algo=ia3', 'preset=ia3']\n"
    settings, _, _ = taken(tmp_path, "x.toml", text)
    assert (settings["adapter"], settings["target_modules"]) == ("ia3", ["to_k", "to_v", "ff.net.2"])
    settings, left, _ = taken(tmp_path, "x.toml", head + "network_module = 'networks.oft'\n")
    assert (settings["adapter"], "lora_rank" in settings) == ("oft", False)
    assert "the number of blocks" in left["network_dim"][1]
    xl = ",".join(map(str, range(1, 24)))
    settings, _, _ = taken(tmp_path, "x.toml", head + f"network_args = ['block_dims={xl}']\n")
    assert (settings["block_ranks"][0], settings["block_ranks"][9], settings["block_ranks"][-1]) == (
        *("IN00=2", "MID00=11", "OUT08=22"),
    )


def test_regularisation_pictures_and_masks_are_taken(tmp_path):
    text = "train_data_dir = 'a'\nreg_data_dir = './reg'\nprior_loss_weight = 0.5\nmasked_loss = true\n"
    settings, left, _ = taken(tmp_path, "x.toml", text)
    assert (settings["reg_data_dir"], settings["prior_loss_weight"]) == ("./reg", 0.5)
    assert (settings["masked_loss"], settings["unmasked_weight"]) == (True, 0)
    assert not {"reg_data_dir", "prior_loss_weight", "masked_loss"} & set(left)
    settings, left, _ = taken(tmp_path, "x.toml", "train_data_dir = 'a'\nreg_data_dir = ''\nprior_loss_weight = 1\n")
    assert not {"reg_data_dir", "prior_loss_weight"} & set(settings)
    assert left["prior_loss_weight"][1] == "without reg_data_dir it says nothing"
    subsets = "[[datasets.subsets]]\nimage_dir = 'a'\nconditioning_data_dir = 'masks'\n"
    subsets += "[[datasets.subsets]]\nimage_dir = 'r'\nis_reg = true\nnum_repeats = 2\n"
    subsets += "[[datasets.subsets]]\nimage_dir = 's'\nis_reg = true\n"
    settings, left, _ = taken(tmp_path, "x.toml", subsets)
    assert (settings["mask_dir"], settings["masked_loss"], settings["reg_data_dir"]) == ("masks", True, "r")
    assert left["datasets[0].subsets[2].image_dir"] == ("s", "reg_data_dir is 'r' already: it holds for the whole run")
    assert "as many regularisation pictures" in left["datasets[0].subsets[1].num_repeats"][1]


def test_noise_loss_optimizer_and_schedule_are_taken(tmp_path):
    text = """
    train_data_dir = 'a'
    loss_type = 'huber'
    huber_schedule = 'exponential'
    huber_scale = 1.0
    min_snr_gamma = 5
    noise_offset = 0.05
    adaptive_noise_scale = 0.1
    multires_noise_iterations = 6
    ip_noise_gamma = 0.1
    max_timestep = 900
    optimizer_type = 'prodigyplus.ProdigyPlusScheduleFree'
    optimizer_args = ['d_coef=2']
    lr_scheduler = 'cosine_with_restarts'
    lr_scheduler_num_cycles = 3
    lr_warmup_steps = 0.1
    """
    settings, left, _ = taken(tmp_path, "x.toml", "\n".join(line.strip() for line in text.splitlines()))
    expected = {
        **{"loss_type": "huber", "huber_schedule": "exponential", "min_snr_gamma": 5, "noise_offset": 0.05},
        **{"adaptive_noise_scale": 0.1, "multires_noise_iterations": 6, "ip_noise_gamma": 0.1, "max_timestep": 900},
        **{"optimizer": "prodigyplusschedulefree", "optimizer_args": ["d_coef=2"], "lr_warmup_ratio": 0.1},
        **{"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
    }
    assert {key: value for key, value in settings.items() if key in expected} == expected
    assert not set(left) & {*expected, "huber_scale"}


def test_kohyas_line_of_a_preview(tmp_path):
    line = "(masterpiece:1.2), 1girl, --n lowres, bad  --w 512  --h 768  --l 7  --s 24  --d 1337"
    settings, left, _ = taken(tmp_path, "x.toml", f"train_data_dir = 'a'\nsample_prompts = '{line}'\n")
    assert settings["sample_prompts"] == ["(masterpiece:1.2), 1girl,"]
    assert (settings["sample_negative_prompt"], settings["sample_steps"]) == ("lowres, bad", 24)
    assert left["sample_prompts --w"][0] == "512"


def test_onetrainers_concepts(tmp_path):
    settings, left, remarks = taken(tmp_path, "concepts.json")
    assert settings["train_data_dir"] == "/pictures"
    assert settings["concepts"] == [{"folder": "castle", "repeats": 10}, {"folder": "knight"}, {"folder": "many"}]
    assert settings["validation_data_dir"] == "/pictures/held_out"
    assert left["[1].balancing"] == (0.4, "repeats are whole numbers here: 1 instead")
    assert left["[1].loss_weight"] == (0.5, "not supported")
    assert left["[2].path"] == ("/pictures/off", "the concept is switched off there")
    assert left["[3].path"][1] == "concepts of type PRIOR_PREDICTION are not supported"
    assert left["[5].balancing"][1].startswith("the strategy SAMPLES")
    assert "[0].image.resolution_override" not in left
    assert "[0].text.tag_dropout_mode" not in left
    for key in ("[0].image.enable_random_flip", "[0].text.keep_tags_count"):
        assert key in left or {"flip", "keep_tokens"} & set(settings)
    assert any("include_subdirectories" in remark for remark in remarks)
    inside = json.dumps({"model_type": "STABLE_DIFFUSION_15", "concepts": ONETRAINER[:1]})
    settings, left, _ = taken(tmp_path, "config.json", inside)
    assert settings["train_data_dir"] == "/pictures/castle"
    assert left["model_type"][1] == "only the concepts of OneTrainer's settings are read"


# They train


@pytest.fixture
def world(tmp_path) -> Path:
    """The folders that the examples name, each with two pictures."""
    for number, name in enumerate(
        ["hoge", "fuga", "piyo", "held_out", "castle", "knight", "many", "aki/3_a girl", "reg"]
    ):
        folder = tmp_path / "world" / name
        folder.mkdir(parents=True)
        for index in range(2):
            values = np.random.default_rng(2 * number + index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index}.png")
            if name == "castle":
                Image.new("L", (64, 64), 255).save(folder / f"{index}-masklabel.png")
            # Where the file gives a caption it is used for what has none.
            if name not in ("hoge", "fuga", "aki/3_a girl", "reg"):
                (folder / f"{index}.txt").write_text(f"{name} {index}")
    return tmp_path / "world"


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_documented_example_imports_and_trains(name, world, checkpoint, tmp_path, capsys):
    text = FILES[name].replace("\r", "")
    text = re.sub(r"C:\\(\w+)", lambda found: f"{world}/{found[1]}", text)
    places = {"/path/to/image_dir": "castle", "/path/to/image/dir": "castle", "path/to/your_images": "castle"}
    places |= {"path/to/your_validation_images": "held_out", "./train/input": "aki", "./train/aki": "aki"}
    for place, folder in places.items():
        text = text.replace(place, f"{world}/{folder}")
    text = text.replace("/pictures", str(world))
    source, target = tmp_path / name, tmp_path / "run.yaml"
    source.write_text(text, encoding="utf-8")
    assert main(["import", str(source), "--output", str(target)]) == 0
    listed = capsys.readouterr().out
    # What is said is said in both places.
    for line in listed.splitlines()[1:]:
        assert f"# {line.strip()}\n" in target.read_text(encoding="utf-8")
    # Small and short, on this machine; everything else is as it was imported.
    changes = [f"base_model={checkpoint}", f"output_dir={tmp_path / 'out'}", "output_name=it", "max_train_steps=2"]
    changes += ["resolution=64", "lr_warmup_steps=0", "clip_skip=1", "sample_prompts=[]", "cpu_threads=1", "device=cpu"]
    assert main(["train", "--config", str(target), *changes, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["state"], result["steps"]) == ("done", 2)
    assert Path(result["output"][0]).is_file()
    kept = yaml.safe_load((tmp_path / "out" / "it.yaml").read_text(encoding="utf-8"))
    imported = yaml.safe_load(target.read_text(encoding="utf-8"))
    assert kept.get("concepts", []) == imported.get("concepts", [])


# The command


def test_without_an_output_the_yaml_is_printed_and_reads_back(tmp_path, capsys):
    path = tmp_path / "kohya.toml"
    path.write_text(KOHYA, encoding="utf-8")
    assert main(["import", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Made from kohya.toml, kohya's data-set description.\n# needed: base_model, ")
    assert build({"base_model": "b"}, yaml.safe_load(out)).concepts[0].caption == "hoge girl"
    assert yaml.safe_load(out)["reg_data_dir"] == "C:\\reg"
    assert yaml.safe_load(out)["preservation_prompt"] == "human"


def test_nothing_is_overwritten(tmp_path, capsys):
    path, target = tmp_path / "kohya.toml", tmp_path / "mine.yaml"
    path.write_text(KOHYA, encoding="utf-8")
    target.write_text("mine")
    assert main(["import", str(path), "--output", str(target)]) == 2
    assert "expected a new name" in capsys.readouterr().err
    assert target.read_text() == "mine"


def test_a_value_cannot_leave_its_comment(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        'train_data_dir = "a"\n"evil\\nlora_rank: 1" = "x\\nbase_model: y\\u2028z\\u001b[2J"\n', encoding="utf-8"
    )
    name, found = read_file(path)
    text = to_yaml(path, name, found)
    assert "\x1b" not in text
    assert yaml.safe_load(text)["lora_rank"] == 4
    assert "base_model" not in yaml.safe_load(text)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.yaml", b"a: 1", "expected a .toml or .json file, found .yaml"),
        ("x.toml", b"a = ", "not valid: Invalid value"),
        ("x.toml", b"a = 1", "expected one of: kohya's data-set description, OneTrainer's concepts, lora-scripts'"),
        ("x.json", b"[]", "found a list"),
        ("x.json", b"{", "not valid: Expecting property name"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.toml", b"a = " + b"[" * 100_000, "nested too deeply"),
        ("x.toml", b"a" + b".a" * 100 + b" = 1", "line 1: expected keys of at most 32 parts"),
        ("x.toml", b"\n" + b'"\\""' + b'."\\""' * 100 + b" = 1", "line 2: expected keys of at most 32 parts"),
        ("x.toml", b"\xff", "expected UTF-8 text, found byte 0xff at 0"),
        ("x.toml", b"#" * 300_000, "expected at most 256 KiB"),
        ("x.toml", b"[[datasets]]\n[[datasets.subsets]]\nis_reg = false", "found none"),
        ("x.json", b'{"datasets": {"subsets": 3}, "general": []}', "found none"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert main(["import", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")
    assert words in line


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_file(tmp_path / "x.toml")


def test_however_much_is_left_all_of_it_is_named(tmp_path, capsys):
    lines = ["train_data_dir = 'a'", *(f"unknown_key_number_{number} = '{'x' * 150}'" for number in range(200))]
    path, target = tmp_path / "x.toml", tmp_path / "run.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert main(["import", str(path), "--output", str(target)]) == 0
    for text in (capsys.readouterr().out, target.read_text(encoding="utf-8")):
        assert all(f"unknown_key_number_{number} = 'x" in text for number in range(200))
