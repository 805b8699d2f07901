import os
import re

import numpy as np
import torch
from modules import deepbooru_model, devices, modelloader, paths, shared

re_special = re.compile(r"([\\()])")


class DeepDanbooru:
    def __init__(self):
        self.model = None

    def load(self):
        if self.model is not None:
            return
        files = modelloader.load_models(
            model_path=os.path.join(paths.models_path, "torch_deepdanbooru"),
            model_url="https://example.invalid/model-resnet_custom_v3.pt",
            ext_filter=[".pt"],
            download_name="model-resnet_custom_v3.pt",
        )
        self.model = deepbooru_model.DeepDanbooruModel()
        self.model.load_state_dict(torch.load(files[0], map_location="cpu"))
        self.model.eval()
        self.model.to(devices.cpu, devices.dtype)

    def start(self):
        self.load()
        self.model.to(devices.device)

    def stop(self):
        if not shared.opts.interrogate_keep_models_in_memory:
            self.model.to(devices.cpu)
            devices.torch_gc()

    def tag_multi(self, pil_image, force_disable_ranks=False):
        threshold = shared.opts.interrogate_deepbooru_score_threshold
        ranks = shared.opts.interrogate_return_ranks and not force_disable_ranks
        pic = pil_image.convert("RGB").resize((512, 512))
        a = np.expand_dims(np.array(pic, dtype=np.float32), 0) / 255
        with torch.no_grad(), devices.autocast():
            x = torch.from_numpy(a).to(devices.device, devices.dtype)
            y = self.model(x)[0].detach().cpu().numpy()
        found = {
            tag: p
            for tag, p in zip(self.model.tags, y, strict=True)
            if p >= threshold and not tag.startswith("rating:")
        }
        order = sorted(found) if shared.opts.deepbooru_sort_alpha else sorted(found, key=lambda tag: -found[tag])
        filtered = {tag.strip().replace(" ", "_") for tag in shared.opts.deepbooru_filter_tags.split(",")}
        res = []
        for tag in [tag for tag in order if tag not in filtered]:
            shown = tag.replace("_", " ") if shared.opts.deepbooru_use_spaces else tag
            shown = re.sub(re_special, r"\\\1", shown) if shared.opts.deepbooru_escape else shown
            res.append(f"({shown}:{found[tag]:.3f})" if ranks else shown)
        return ", ".join(res)


model = DeepDanbooru()
