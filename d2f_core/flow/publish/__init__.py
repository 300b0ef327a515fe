"""Publishing trained models as registered versions."""
