"""A stand-in for AUTOMATIC1111's WebUI: as small as the extension's needs, and true to it where the extension depends
on it. `webui/` has the paths, names and parameters of the real tree; `test_webui_signatures` compares the two.
"""
