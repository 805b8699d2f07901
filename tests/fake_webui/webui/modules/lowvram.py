from modules import devices, shared

module_in_gpu = None


def send_everything_to_cpu():
    global module_in_gpu
    if module_in_gpu is not None:
        module_in_gpu.to(devices.cpu)
    module_in_gpu = None


def is_needed(sd_model):
    return shared.cmd_opts.lowvram or shared.cmd_opts.medvram


def apply(sd_model):
    enable = is_needed(sd_model)
    shared.parallel_processing_allowed = not enable
    if enable:
        setup_for_low_vram(sd_model, not shared.cmd_opts.lowvram)
    else:
        sd_model.lowvram = False


def setup_for_low_vram(sd_model, use_medvram):
    """The parts stay on the CPU and come to the GPU one at a time, when their forward is called."""
    if getattr(sd_model, "lowvram", False):
        return
    sd_model.lowvram = True

    def send_me_to_gpu(module, _):
        global module_in_gpu
        if module_in_gpu is module:
            return
        send_everything_to_cpu()
        module.to(devices.device)
        module_in_gpu = module

    if hasattr(sd_model, "conditioner"):
        text = sd_model.conditioner
    else:
        text = getattr(sd_model.cond_stage_model, "model", None) or sd_model.cond_stage_model.transformer
    for module in (text, sd_model.first_stage_model, sd_model.model):
        module.register_forward_pre_hook(send_me_to_gpu)


def is_enabled(sd_model):
    return sd_model.lowvram
