"""From what people have to a base model: a checkpoint's parts put together, checked, asked and written once."""
