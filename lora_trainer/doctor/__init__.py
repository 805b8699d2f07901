"""What is wrong with a folder of pictures, found before anything is trained on it."""

from lora_trainer.doctor.examine import examine
from lora_trainer.doctor.findings import Finding, Report

__all__ = ["Finding", "Report", "examine"]
