import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lora_trainer.cli import main

sys.exit(main(["caption", *sys.argv[1:]]))
