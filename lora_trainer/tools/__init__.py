"""What is done to finished LoRA files, and with them: convert, resize, merge, extract."""
