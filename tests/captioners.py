"""Small captioners that really caption: drawings of a ball, and what is to be said of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (235, 200, 40)}
GROUNDS = {"white": (240, 240, 240), "grey": (128, 128, 128), "black": (15, 15, 15)}
KINDS = [(color, ground) for color in COLORS for ground in GROUNDS]
SIZE = 32
_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "ball", "on", *COLORS, *GROUNDS)


def drawing(color: str, ground: str, seed: int, size: int = SIZE) -> Image.Image:
    """A ball somewhere; every `seed` another place, size, shade and noise."""
    draw_from = np.random.default_rng(seed)
    noise = draw_from.normal(0, 4, (size, size, 3))
    image = Image.fromarray(np.clip(GROUNDS[ground] + noise, 0, 255).astype(np.uint8))
    radius = size * draw_from.uniform(0.25, 0.4)
    x, y = draw_from.uniform(radius, size - radius, 2)
    shade = tuple(int(np.clip(value + draw_from.integers(-20, 21), 0, 255)) for value in COLORS[color])
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    return image


def sentence(color: str, ground: str) -> str:
    return f"a {color} ball on {ground}"


def train_blip(folder: Path, *, steps: int = 80, batch: int = 16) -> Path:
    """A BLIP of transformers' own classes that has learned to say what a drawing shows, as a folder of the hub's."""
    from transformers import BlipForConditionalGeneration

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = BlipForConditionalGeneration(_blip_config())
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            pixels, ids = _batch(range(240))
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
                rows = torch.randint(0, len(ids), (batch,))
                inputs = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "labels": ids[rows]}
                model(pixel_values=pixels[rows], **inputs).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
    model.eval().save_pretrained(folder, safe_serialization=True)
    _write_processor(folder)
    return folder


def _blip_config() -> object:
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

    ids = {word: at for at, word in enumerate(_WORDS)}
    text = BlipTextConfig(
        vocab_size=len(_WORDS),
        hidden_size=48,
        encoder_hidden_size=48,
        intermediate_size=96,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=ids["[DEC]"],
        eos_token_id=ids["[SEP]"],
        sep_token_id=ids["[SEP]"],
        pad_token_id=ids["[PAD]"],
    )
    vision = BlipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        attention_dropout=0.0,
    )
    return BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=48)


_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _batch(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, ids = [], []
    for seed in seeds:
        color, ground = KINDS[seed % len(KINDS)]
        values = np.asarray(drawing(color, ground, seed), np.float32) / 255
        pixels.append(((values - _MEAN) / _STD).transpose(2, 0, 1))
        words = ("[DEC]", *sentence(color, ground).split(), "[SEP]")
        ids.append([_WORDS.index(word) for word in words])
    return torch.tensor(np.stack(pixels), dtype=torch.float32), torch.tensor(ids)


def _write_processor(folder: Path) -> None:
    """The files that Salesforce/blip-image-captioning-base has beside its weights."""
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n", encoding="utf-8")
    special = {"bos_token": "[DEC]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    special |= {"pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    tokenizer = {**special, "do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIZE, "width": SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


# A tag's row in selected_tags.csv: (name, category).
TAGS = (("general", "9"), ("explicit", "9"), ("red_ball", "0"), ("green_ball", "0"), ("blue_ball", "0"))
TAGS += (("white_ground", "0"), ("black_ground", "0"), (">_<", "0"), ("ball_(toy)", "0"), ("bob_the_ball", "4"))


def write_tagger(folder: Path, size: int = 448) -> Path:
    """A tagger in SmilingWolf's layout whose scores come from the pixels: how much of the picture has which color.

    Its input is NHWC, BGR from 0 to 255; a score is the sigmoid of a linear map of the picture's 3 × 3 mean colors.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    # Rows for the mean of B, G, R over the middle, and over the four corners; the last is the bias.
    middle = {"red_ball": (-1, -1, 2), "green_ball": (-1, 2, -1), "blue_ball": (2, -1, -1), "bob_the_ball": (0, 0, 0)}
    corners = {"white_ground": (1, 1, 1, -600), "black_ground": (-1, -1, -1, 150)}
    always = {">_<": 3.0, "ball_(toy)": 2.0, "bob_the_ball": 1.0, "general": 5.0, "explicit": -5.0}
    weights, bias = np.zeros((6, len(TAGS)), np.float32), np.zeros(len(TAGS), np.float32)
    for at, (name, _) in enumerate(TAGS):
        weights[:3, at] = np.array(middle.get(name, (0, 0, 0))) / 40
        weights[3:, at] = np.array(corners.get(name, (0, 0, 0, 0))[:3]) / 30
        bias[at] = corners.get(name, (0, 0, 0, 0))[3] / 30 - (2.0 if name in middle else 0.0) + always.get(name, 0.0)
    third = size // 3
    constants = {
        "start": np.array([third, third], np.int64),
        "end": np.array([2 * third, 2 * third], np.int64),
        "zero": np.array([0, 0], np.int64),
        "corner": np.array([size // 8, size // 8], np.int64),
        "axes": np.array([1, 2], np.int64),
        "weights": weights,
        "bias": bias,
    }
    nodes = [
        helper.make_node("Slice", ["input", "start", "end", "axes"], ["inner"]),
        helper.make_node("Slice", ["input", "zero", "corner", "axes"], ["outer"]),
        helper.make_node("ReduceMean", ["inner"], ["inner_mean"], axes=[1, 2], keepdims=0),
        helper.make_node("ReduceMean", ["outer"], ["outer_mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Concat", ["inner_mean", "outer_mean"], ["means"], axis=1),
        helper.make_node("Gemm", ["means", "weights", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", size, size, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", len(TAGS)])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(folder / "model.onnx"))
    rows = [f'{at},"{name}",{category},{1000 - at}' for at, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n", encoding="utf-8")
    return folder


def write_random(folder: Path, kind: str) -> Path:
    """A captioner of another kind of transformers that has learned nothing: for what loads it, not for what it says."""
    from transformers import (
        GitConfig,
        GitForCausalLM,
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    body = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = {**body, "image_size": SIZE, "patch_size": 8}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "git":
            model = GitForCausalLM(GitConfig(vision_config=eyes, vocab_size=len(_WORDS), **body, **ids))
        else:
            mouth = GPT2Config(vocab_size=len(_WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=64, **ids)
            config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**eyes), mouth)
            config.decoder_start_token_id, config.pad_token_id = 2, 0
            model = VisionEncoderDecoderModel(config=config)
            model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 2, 0
    model.eval().save_pretrained(folder, safe_serialization=True)
    _write_processor(folder)
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text(encoding="utf-8"))
    processor["image_processor_type"] = "CLIPImageProcessor" if kind == "git" else "ViTImageProcessor"
    if kind == "git":
        processor |= {"crop_size": {"height": SIZE, "width": SIZE}, "size": {"shortest_edge": SIZE}}
    file.write_text(json.dumps(processor), encoding="utf-8")
    return folder


def words_known(sentence: str) -> bool:
    return set(sentence.split()) <= set(_WORDS)
