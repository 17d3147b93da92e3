"""unCLIP's decoder: the task `text2image` with CLIP's vector of an image beside the caption.

The vector is added to the embedded time and, by config.model.vector_tokens, to the text
(Ramesh et al. 2022, Sec. 2.1; `tasks/image_vectors.py`). All else is `tasks/text2image.py`'s.
"""

from ditjax.tasks import text2image
from ditjax.tasks.image_vectors import ImageVectors

TASK = text2image.TASK._replace(sections={**text2image.TASK.sections, "unclip": ImageVectors})
