"""Draw images of prompts: a run, a folder of diffusers or of ours, and custom pipelines.

from ditjax.sampling.text2image import Text2Image

pipeline = Text2Image.from_pretrained("runs/small/text2image")
pipeline("a red three left of a blue seven", num=4).images[0].save("x.png")
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from ditjax.config import changed
from ditjax.errors import UserError, reason, shown
from ditjax.sampling.pipeline import Output, Pipeline
from ditjax.tasks.text_conditions import has_texts


class Text2Image(Pipeline):
    """A DiT of texts, its text encoder and its autoencoder on a mesh."""

    _custom = ""  # the SHA-256 of the file that defines a custom pipeline

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *args: Any, custom_pipeline: str = "", **options: Any
    ) -> Self:
        """Load a run's directory or a folder with a model_index.json, as `Pipeline` does.

        `custom_pipeline` is a Python file with one subclass of this class, which is then the
        pipeline's. It is code that the caller names and trusts: nothing in a folder of weights is
        ever imported. Raises UserError.
        """
        kind: Any = custom_class(custom_pipeline) if custom_pipeline else cls
        found: Any = super(Text2Image, kind).from_pretrained(path, *args, **options)
        if not has_texts(found.config):
            raise UserError(f"{path} holds a network of classes: load it with Pipeline.")
        return found

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        cfg_scale: float | None = None,
        num: int | None = None,
        seed: int | None = None,
        steps: str | int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        batch_size: int | None = None,
        quiet: bool = False,
    ) -> Output:
        """Draw `num` images, by default one per prompt; image i is of prompt i % len.

        Image i depends only on (seed, i) and its prompt. Other arguments default to the recipe's.
        Another negative prompt or scale compiles nothing anew. Raises UserError.
        """
        before = self.config
        changes: dict[str, Any] = {"sample": {}, "text": {}}
        if cfg_scale is not None:
            changes["sample"]["cfg_scale"] = cfg_scale
        if negative_prompt is not None:
            changes["text"]["negative"] = negative_prompt
        try:
            self.config = changed(before, changes)
            found = super().__call__(
                None,
                prompts=[prompt] if isinstance(prompt, str) else list(prompt),
                num=num,
                seed=seed,
                steps=steps,
                sampler=sampler,
                eta=eta,
                batch_size=batch_size,
                quiet=quiet,
            )
        finally:
            self.config = before
        custom = {"custom_pipeline": self._custom} if self._custom else {}
        return found._replace(record={**found.record, **custom})


def custom_class(file: str | os.PathLike[str]) -> type[Text2Image]:
    """The one subclass of `Text2Image` that a Python file defines.

    The file is imported once, under a name of its own. Raises UserError for a path that is no such
    file, and for a file that fails or defines no or several subclasses.
    """
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"custom_pipeline={shown(os.fspath(file))}: expected the path of a Python file,"
            " PATH.py; pipelines are not fetched by name."
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    module = _imported(path, content, f"_ditjax_pipeline_{digest[:16]}")
    found = [
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, Text2Image)
        and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(each.__name__ for each in found) or "none"
        raise UserError(f"{path} defines {names}: expected one subclass of Text2Image.")
    found[0]._custom = digest
    return found[0]


def _imported(path: Path, content: bytes, name: str) -> ModuleType:
    """The module of a file's content: of these bytes, never of a compiled file beside it."""
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = os.fspath(path)
    try:
        exec(compile(content, path, "exec"), vars(module))
    except Exception as error:  # the caller's own code may fail in any way
        raise UserError(
            f"{path} cannot be imported ({type(error).__name__}: {reason(error)})."
        ) from error
    sys.modules[name] = module
    return module
