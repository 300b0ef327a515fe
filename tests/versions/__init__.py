"""Opens exports in other releases of diffusers, transformers, PEFT and MLflow: `make check-versions`."""
