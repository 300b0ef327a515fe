"""What a distillation needs, before anything is started."""
