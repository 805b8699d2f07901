"""Step times and memory of this trainer and of what it is compared with: see README.md."""
