registered_param_bindings = []


class ParamBinding:
    def __init__(self, paste_button, tabname, source_text_component=None):
        self.paste_button = paste_button
        self.tabname = tabname
        self.source_text_component = source_text_component


def register_paste_params_button(binding):
    registered_param_bindings.append(binding)
