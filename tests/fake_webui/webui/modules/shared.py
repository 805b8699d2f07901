import torch
from modules import options, shared_cmd_options, shared_options

cmd_opts = shared_cmd_options.cmd_opts
opts = options.Options(shared_options.options_templates, set())
device = torch.device("cpu")
parallel_processing_allowed = True
weight_load_location = None

# As the real start-up does it, since these import `shared` themselves.
from modules import interrogate, shared_items, shared_state  # noqa: E402, F401

state = shared_state.State()
interrogator = interrogate.InterrogateModels("interrogate")
