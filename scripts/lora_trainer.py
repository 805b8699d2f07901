"""The extension's entry: the WebUI runs this file at start and at each Reload UI."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def version_on_disk() -> str:
    text = (ROOT / "lora_trainer" / "__init__.py").read_text(encoding="utf-8")
    return text.split('__version__ = "', 1)[1].split('"', 1)[0]


try:
    import lora_trainer
    from lora_trainer.hosts.webui.extension import register
except ImportError as error:
    from lora_trainer.hosts.webui.absent import register_absent

    register_absent(error, ROOT)
else:
    if lora_trainer.__version__ == version_on_disk():
        register()
    else:
        from lora_trainer.hosts.webui.absent import register_outdated

        register_outdated(version_on_disk())
