"""Inputs and outputs: the specification of a model's inputs, the check of a caller's values, and their conversion.

Each value that a caller passes becomes an `Argument`, or raises an `InputError` that names the input, the expected value
and the actual one. Results are converted here too, to the kind of the inputs: numpy, torch or device.
"""

from aiotrt.tensors.argument import Argument
from aiotrt.tensors.conversion import number, numpy_view, own, widened
from aiotrt.tensors.input_specs import InputSpecs
from aiotrt.tensors.kind import DEVICE, NUMPY, Kind
from aiotrt.tensors.output_names import OutputNames, flatten
from aiotrt.tensors.parameters import Parameters, arrange
from aiotrt.tensors.signature import Key, Signature, Specs
from aiotrt.tensors.structure import Structure, children, examples, take_apart
from aiotrt.tensors.tensor_spec import Shapes, TensorSpec

__all__ = [
    "DEVICE",
    "NUMPY",
    "Argument",
    "InputSpecs",
    "Key",
    "Kind",
    "OutputNames",
    "Parameters",
    "Shapes",
    "Signature",
    "Specs",
    "Structure",
    "TensorSpec",
    "arrange",
    "children",
    "examples",
    "flatten",
    "number",
    "numpy_view",
    "own",
    "take_apart",
    "widened",
]
