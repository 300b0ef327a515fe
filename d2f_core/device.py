"""Where this process computes: on what Ray reserved for it, never on a GPU that happens to be in sight."""


def reserved_device() -> str:
    """`cuda` in a Ray task or actor that holds a GPU, or a part of one; else `cpu`, outside of Ray too.

    A machine's GPUs are visible to every process that Ray starts, also to those that asked for none: one that took what
    it sees would share a GPU with whoever has reserved it.
    """
    import ray

    if not ray.is_initialized():
        return "cpu"
    return "cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"
