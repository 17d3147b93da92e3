"""The shipped tokenizer: byte-level BPE of caption scenes, trained once.

    python -m ditjax.data.scene_bpe [DIR]

writes assets/scene_bpe.json and its line of the manifest. Its 256 bytes are tokens, so that it
encodes every text; a text begins with <start> and ends with <end>, which is its padding, too.
"""

import json
import sys
from importlib.metadata import version

from ditjax.data.caption_scenes import every_caption
from ditjax.files.assets import SHIPPED, save_asset_files

MOST = 384  # of the words that merges give, the captions need fewer
START, END = "<start>", "<end>"


def trained_bpe() -> bytes:
    """Train the tokenizer on the captions of all scenes -> the content of its file."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=MOST,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(every_caption(), trainer)
    found.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(name, found.token_to_id(name)) for name in (START, END)],
    )
    return (found.to_str() + "\n").encode()


def write_bpe(folder: str) -> None:
    """Write the file and its record."""
    content = trained_bpe()
    record = {
        "data": "captions of ditjax.data.caption_scenes.every_caption",
        "made_by": "python -m ditjax.data.scene_bpe",
        "tokenizers": version("tokenizers"),
        "vocabulary": len(json.loads(content)["model"]["vocab"]),
    }
    save_asset_files(folder, {"scene_bpe.json": (content, record)})


if __name__ == "__main__":
    write_bpe(sys.argv[1] if len(sys.argv) > 1 else str(SHIPPED))
