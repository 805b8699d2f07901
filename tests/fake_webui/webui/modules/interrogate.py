import os

import numpy as np
import torch
from modules import devices, lowvram, modelloader, paths, shared

blip_image_eval_size = 384


class InterrogateModels:
    blip_model = None
    clip_model = None
    dtype = None
    running_on_cpu = None

    def __init__(self, content_dir):
        self.content_dir = content_dir
        self.running_on_cpu = devices.device_interrogate == torch.device("cpu")

    def load_blip_model(self):
        import models.blip

        files = modelloader.load_models(
            model_path=os.path.join(paths.models_path, "BLIP"),
            model_url="https://example.invalid/model_base_caption_capfilt_large.pth",
            ext_filter=[".pth"],
            download_name="model_base_caption_capfilt_large.pth",
        )
        blip_model = models.blip.blip_decoder(pretrained=files[0], med_config=os.path.join(paths.paths["BLIP"], "x"))
        blip_model.eval()
        return blip_model

    def load_clip_model(self):
        modelloader.downloads.append("ViT-L-14.pt")
        raise RuntimeError("nothing of CLIP is here")

    def load(self):
        if self.blip_model is None:
            self.blip_model = self.load_blip_model()
            if not shared.cmd_opts.no_half and not self.running_on_cpu:
                self.blip_model = self.blip_model.half()
        self.blip_model = self.blip_model.to(devices.device_interrogate)
        if self.clip_model is None:
            self.clip_model = self.load_clip_model()

    def send_blip_to_ram(self):
        if not shared.opts.interrogate_keep_models_in_memory and self.blip_model is not None:
            self.blip_model = self.blip_model.to(devices.cpu)

    def generate_caption(self, pil_image):
        size = (blip_image_eval_size, blip_image_eval_size)
        values = np.asarray(pil_image.resize(size), np.float32).transpose(2, 0, 1) / 255
        gpu_image = torch.from_numpy(values.copy()).unsqueeze(0).type(self.dtype).to(devices.device_interrogate)
        with torch.no_grad():
            caption = self.blip_model.generate(
                gpu_image,
                sample=False,
                num_beams=shared.opts.interrogate_clip_num_beams,
                min_length=shared.opts.interrogate_clip_min_length,
                max_length=shared.opts.interrogate_clip_max_length,
            )
        return caption[0]

    def interrogate(self, pil_image):
        """A click on Interrogate CLIP, outside the queue as in the real page."""
        shared.state.begin(job="interrogate")
        lowvram.send_everything_to_cpu()
        try:
            self.load()
            res = self.generate_caption(pil_image)
        except Exception:
            res = "<error>"
        self.send_blip_to_ram()
        shared.state.end()
        return res
