"""The student model. Importing this package registers the student classes with transformers.

This folder imports torch, transformers and its own siblings only: a copy of these files travels with
every student checkpoint.
"""

from .families import FAMILIES, Family, ends_in, family_of, find_family
from .hadamard import HADAMARD_SITES
from .layers import BitLinear, SubLN, TernarySpec
from .low_bit_states import KV_BITS, QUERY_BITS, UNQUANTISED, quantize_states
from .students import STUDENT_CLASSES, register_students, student_class

register_students()

__all__ = [
    "FAMILIES",
    "HADAMARD_SITES",
    "KV_BITS",
    "QUERY_BITS",
    "STUDENT_CLASSES",
    "UNQUANTISED",
    "BitLinear",
    "Family",
    "SubLN",
    "TernarySpec",
    "ends_in",
    "family_of",
    "find_family",
    "quantize_states",
    "register_students",
    "student_class",
]
