"""Loads a checkpoint's weights into a module, and compares what was loaded with the checkpoint."""

from collections.abc import Mapping

from torch import Tensor, nn

from d2f_core.train.checkpoint import Checkpoint, CheckpointError, iter_tensors, tensor_digest


class ParameterMismatchError(ValueError):
    """A checkpoint and a module do not have the same trained parameters."""


def shapes_of(module: nn.Module, found: Checkpoint, kind: str = "weights") -> dict[str, tuple[int, ...]]:
    """The shape of each trained parameter, by name.

    Raises:
        ParameterMismatchError: their names are not those of the checkpoint's tensors of this kind.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters() if parameter.requires_grad}
    if odd := sorted(found.manifest.tensors.get(kind, {}).keys() ^ shapes.keys()):
        raise ParameterMismatchError(
            f"{found.uri} and the network do not have the same parameters: {odd[:3]} and others, {len(odd)} in all. "
            "Use the model config that they were trained with."
        )
    return shapes


def check_shape(found: Checkpoint, name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ParameterMismatchError unless a tensor of the checkpoint has its parameter's shape."""
    if tuple(tensor.shape) != shapes.get(name):
        raise ParameterMismatchError(
            f"{found.uri}: {name!r} has shape {tuple(tensor.shape)}, not {shapes.get(name)}. Use the model config that "
            "it was trained with."
        )


def load_parameters(module: nn.Module, found: Checkpoint, kind: str = "weights") -> None:
    """Load the tensors of a kind ("weights" or "ema") into the module while they are read: after an error, the module
    holds some of them.

    Raises:
        ParameterMismatchError: names or shapes differ from the module's trained parameters.
        CheckpointError: a file is damaged.
    """
    shapes, parameters = shapes_of(module, found, kind), dict(module.named_parameters())
    for name, tensor in iter_tensors(found, kind):
        check_shape(found, name, tensor, shapes)
        parameters[name].data.copy_(tensor)


def check_loaded(checkpoint: Checkpoint, kind: str, named: Mapping[str, Tensor]) -> None:
    """Compare tensors that were loaded into an engine, parameter name -> tensor on any device, with the checkpoint.

    `named` may hold only one worker's share of the parameters.

    Raises:
        CheckpointError: names the first parameter that differs from the checkpoint or is missing in it.
    """
    expected = checkpoint.manifest.tensors.get(kind, {})
    for name, tensor in named.items():
        digest = tensor_digest(tensor)
        if digest != expected.get(name):
            stored = f"has {expected[name][:12]}" if name in expected else "does not have this parameter"
            raise CheckpointError(
                f"After loading {checkpoint.uri}, {kind} of {name!r} ({tensor.dtype}, {tuple(tensor.shape)}) has "
                f"digest {digest[:12]}; the checkpoint {stored}. The engine did not take over what was read: do not "
                "train on."
            )
