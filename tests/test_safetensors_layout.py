"""Files that are put together by our layout are those of the library."""

import pytest
import torch
from safetensors.torch import save

from d2f_core.safetensors_layout import CODES, layout
from d2f_core.train.checkpoint_file import FileImage


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, odd names, scalars and tensors without elements, in no order."""
    found = {}
    for number, name in enumerate(CODES):
        dtype = getattr(torch, name)
        found[f'b{number}.é "\\\n\x01\x7f'] = torch.arange(3 * number).to(dtype).reshape(number, 3)
        found[f"a{number}"] = torch.ones(()).to(dtype)
        found[f"C{number}"] = torch.ones(0, 4).to(dtype)
    found["view"] = torch.arange(6.0).reshape(2, 3).T
    return found


def test_a_file_image_has_the_bytes_of_safetensors_save():
    library = save({name: tensor.contiguous() for name, tensor in tensors().items()})
    image = FileImage(tensors())
    assert bytes(image.content) == library
    torch.testing.assert_close(image.tensors, tensors(), rtol=0, atol=0)


def test_metadata_stand_before_the_tensors_as_in_the_library():
    one = torch.ones(3)
    plan = layout({"w": ("float32", (3,))}, {"format": "pt"})
    assert save({"w": one}, {"format": "pt"}) == plan.header + one.numpy().tobytes()
    assert plan.starts == {"w": len(plan.header)} and plan.size == len(plan.header) + 12


def test_a_dtype_that_the_format_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"'w' is of dtype complex128\. Use one of bool, uint8"):
        layout({"w": ("complex128", (1,))})
