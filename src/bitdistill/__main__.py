"""``python -m bitdistill``, which launchers such as torchrun and accelerate start."""

from .cli import main

main()
