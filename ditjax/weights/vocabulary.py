"""Words in the files of other programs, shared by reading and writing."""

METADATA = "ditjax"

# In the metadata of a safetensors file: a JSON list of each class's list of names.
CLASS_NAMES = "class_names"

# In the metadata of a safetensors file: JSON of config.text.tokens and features.
TEXT = "ditjax_text"

MODEL_INDEX = "model_index.json"

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
