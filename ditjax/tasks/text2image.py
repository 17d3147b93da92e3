"""Text-to-image diffusion: the task `diffusion` with captions in the place of labels.

The network is PixArt-α's (`models/text_dit.py`), a frozen encoder's features of a caption are its
context (`tasks/text_conditions.py`), and all else is `tasks/diffusion.py`'s.
"""

from ditjax.tasks import diffusion
from ditjax.tasks.text_conditions import TextConditions

TASK = diffusion.TASK._replace(
    network="text_dit", sections={**diffusion.TASK.sections, "text": TextConditions}
)
