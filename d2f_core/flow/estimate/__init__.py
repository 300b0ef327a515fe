"""What a finetuning takes, reckoned before it is started."""
