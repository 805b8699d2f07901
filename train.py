import sys

from lora_trainer.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
