"""Loads a checkpoint's weights into a module."""

from torch import nn

from d2f_core.train.checkpoint import Checkpoint, iter_tensors


class ParameterMismatchError(ValueError):
    """A checkpoint and a module do not have the same trained parameters."""


def load_parameters(module: nn.Module, found: Checkpoint, kind: str = "weights") -> None:
    """Load the tensors of a kind ("weights" or "ema") into the module while they are read: after an error, the module
    holds some of them.

    Raises:
        ParameterMismatchError: names or shapes differ from the module's trained parameters.
        CheckpointError: a file is damaged.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    saved = found.manifest.tensors.get(kind, {})
    if odd := sorted(saved.keys() ^ trained.keys()):
        raise ParameterMismatchError(
            f"{found.uri} and the network do not have the same parameters: {odd[:3]} and others, {len(odd)} in all. "
            "Use the model config that they were trained with."
        )
    for name, tensor in iter_tensors(found, kind):
        if tuple(tensor.shape) != shapes[name]:
            raise ParameterMismatchError(
                f"{found.uri}: {name!r} has shape {tuple(tensor.shape)}, not {shapes[name]}. Use the model config that "
                "it was trained with."
            )
        trained[name].data.copy_(tensor)
