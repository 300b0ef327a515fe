"""Networks and their weights: diffusers, transformers and PEFT live here."""
